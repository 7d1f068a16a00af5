"""The demo's results, one row a seed, as a markdown table.

    python benchmarks/demo_table.py runs/demo runs/demo-1 runs/demo-2

Reads what `make demo` left; a run whose control has not been measured shows a dash there."""

import json
import sys
from pathlib import Path

COLUMNS = (
    "seed",
    "word accuracy, T = 1",
    "best of T = 1, .8, .6",
    "second judge, T = 1",
    "NED similarity",
    "token diversity",
    "base trained on instead",
    "pictures judged",
    "RL seconds",
    "replay gap, nats",
)


def best(results: dict) -> float:
    return max(result["word_accuracy"] for name, result in results.items() if name.startswith("T"))


def row(run: Path) -> str:
    before, after = (json.loads((run / "eval" / f"{side}.json").read_text()) for side in ("before", "after"))
    notes = json.loads((run / "model" / "notes.json").read_text())
    control = run / "eval" / "continued.json"
    plain_before, plain_after = before["T1.0"], after["T1.0"]
    cells = [
        str(notes["seed"]),
        f"{plain_before['word_accuracy']:.3f} -> **{plain_after['word_accuracy']:.3f}** (± {plain_after['word_accuracy_ci95']:.3f})",
        f"{best(before):.3f} -> {best(after):.3f}",
        f"{before['second_judge']['word_accuracy']:.3f} -> {after['second_judge']['word_accuracy']:.3f}",
        f"{plain_before['ned']:.3f} -> {plain_after['ned']:.3f}",
        f"{plain_before['token_diversity']:.2f} -> {plain_after['token_diversity']:.2f}",
        f"{json.loads(control.read_text())['T1.0']['word_accuracy']:.3f}" if control.exists() else "-",
        str(notes["reward_calls"]),
        f"{notes['seconds']:.0f}",
        f"{notes['replay_gap_max']:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


print("| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *(row(Path(run)) for run in sys.argv[1:]), sep="\n")
