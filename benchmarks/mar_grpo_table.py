"""The table of RESULTS.md for the MAR-GRPO demo.

python benchmarks/mar_grpo_table.py runs/demo-mar-grpo runs/demo-mar-grpo-1 runs/demo-mar-grpo-2"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import table

Summary = Mapping[str, Any]


def change(name: str, form: str = ".3f") -> Callable[[Summary], str]:
    return lambda s: f"{s[f'{name}_before']:{form}} -> {s[f'{name}_after']:{form}}"


def with_interval(name: str, form: str) -> Callable[[Summary], str]:
    return lambda s: f"{s[f'{name}_before']:{form}} -> **{s[f'{name}_after']:{form}}** (± {s[f'{name}_ci95_after']:{form}})"


COLUMNS: dict[str, Callable[[Summary], str]] = {
    "seed": lambda s: str(s["seed"]),
    "reward, nats": with_interval("reward", ".2f"),
    "held-out accuracy, T = 1": with_interval("heldout", ".3f"),
    "best temperature": lambda s: f"{s['heldout_before_best_temperature']:.3f} -> {s['heldout_after_best_temperature']:.3f}",
    "GRPO end to end": lambda s: f"{s['reward_grpo']:.2f} / {s['heldout_grpo']:.3f}",
    "plain training, same CPU time": lambda s: f"{s['reward_continued_pretraining']:.2f} / {s['heldout_continued_pretraining']:.3f}",
    "FD": change("fd", ".2f"),
    "recall": change("recall"),
    "diversity": change("token_diversity"),
    "CV of the gradient's norm: GRPO, MAR-GRPO": lambda s: f"{s['grad_norm_cv_grpo']:.3f}, {s['grad_norm_cv_mar_grpo']:.3f}",
    "roughness of the KL: GRPO, MAR-GRPO": lambda s: f"{s['kl_curve_roughness_grpo']:.2f}, {s['kl_curve_roughness_mar_grpo']:.2f}",
    "pictures/s": lambda s: f"{s['images_per_second']:.0f}",
    "replay gap, nats": lambda s: f"{s['replay_gap_max']:.1e}",
    "commit": lambda s: s["commit"],
}


def main() -> None:
    summaries = [json.loads((Path(folder) / "summary.json").read_text()) for folder in sys.argv[1:]]
    print(table(list(COLUMNS), [[cell(summary) for cell in COLUMNS.values()] for summary in summaries]))


if __name__ == "__main__":
    main()
