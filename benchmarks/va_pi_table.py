"""The VA-pi demo's results, one row a seed, as a markdown table.

python benchmarks/va_pi_table.py runs/demo-va-pi runs/demo-va-pi-1 runs/demo-va-pi-2"""

import json
import sys
from pathlib import Path

COLUMNS = (
    "seed",
    "FD, T = 1",
    "after / before",
    "base's best law",
    "after, best law",
    "cross-entropy, same steps",
    "same CPU time",
    "rewards shuffled",
    "FD to held-out fonts",
    "recall",
    "accuracy",
    "MSE",
    "perceptual",
    "diversity",
    "step, s",
    "replay gap, nats",
)


def row(run: Path) -> str:
    s = json.loads((run / "summary.json").read_text())
    pair = {name: f"{s[f'{name}_before']:.3f} -> {s[f'{name}_after']:.3f}" for name in ("fd_heldout", "recall", "accuracy", "perceptual")}
    cells = [
        str(s["seed"]),
        f"{s['fd_before']:.3f} -> **{s['fd_after']:.3f}** (± {s['fd_ci95']:.3f})",
        f"{s['fd_after'] / s['fd_before']:.2f}",
        f"{s['fd_temperature_control']:.3f} ({s['temperature_control']})",
        f"{s['fd_after_best_law']:.3f} ({s['best_law_after']})",
        f"{s['fd_ce_only']:.3f}",
        f"{s['fd_ce_only_same_cpu']:.3f}",
        f"{s['fd_shuffled_reward']:.3f}",
        pair["fd_heldout"],
        pair["recall"],
        pair["accuracy"],
        f"{s['mse_before']:.4f} -> {s['mse_after']:.4f}",
        pair["perceptual"],
        f"{s['token_diversity_before']:.3f} -> {s['token_diversity_after']:.3f}",
        f"{s['step_seconds']:.2f}",
        f"{s['replay_gap_max']:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for run in sys.argv[1:]:
        print(row(Path(run)))
