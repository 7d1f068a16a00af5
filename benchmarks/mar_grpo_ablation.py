"""What each part of MAR-GRPO is worth on letters.

    python benchmarks/mar_grpo_ablation.py [--out runs/mar-ablation] [--steps 24] [--seeds 3] [--jobs 2] [--only NAME ...] [--report]

Every arm is `varl train` on mar_grpo/glyphs_cpu with one switch changed, over several seeds, at equal judged pictures (but for `rewarded`,
which judges M + 1 times as many); then 1,152 pictures are drawn at temperature 1 and judged by the classifier that paid and by the one that
did not."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from arms import interval, results, study

from varl.build import model_path
from varl.config import MARGRPOConfig, RunConfig
from varl.demo.letters import PLAIN
from varl.demo.mar_grpo import WARM, columns, evaluate, roughness, variation
from varl.recipes.mar_grpo import glyphs_cpu, released


def but(**changes: object) -> Callable[[RunConfig], RunConfig]:
    """The recipe with another algorithm."""

    def change(config: RunConfig) -> RunConfig:
        assert isinstance(config.algorithm, MARGRPOConfig)
        return replace(config, algorithm=replace(config.algorithm, **changes))

    return change


SWITCHES: dict[str, Callable[[RunConfig], RunConfig]] = {
    "ours: M = 2, damping": but(),
    "GRPO, head frozen": but(num_trajectories=0),
    "GRPO, head trained": but(num_trajectories=0, train_head=True),
    "ours, head trained": but(train_head=True),
    "released form": lambda config: released(config, config.name),
    "released form, no consistency": lambda config: but(consistency=None)(released(config, config.name)),
    "M = 4, damping": but(num_trajectories=4),
    "damping of all tokens": but(uncertain_fraction=1.0),
    "first path joined by the others": but(trajectories="include_primary"),
    "others in place of the first": but(trajectories="release"),
    "others rewarded too": but(trajectories="rewarded"),
    "2 of 4 steps": but(ar_steps=2),
    "12 moves": but(denoise_moves=12),
}


def run_config(name: str, seed: int, steps: int) -> RunConfig:
    ours = glyphs_cpu()
    train = replace(ours.train, steps=steps, image_every=0, save_every=steps)
    return SWITCHES[name](replace(ours, seed=seed, train=train))


def judge(model: Path, cache: Path) -> None:
    evaluate(model, config=glyphs_cpu(), cache=cache, laws=PLAIN, tick=lambda metrics: None)


SHOWN = ("reward", "accuracy", "fd", "recall")
HEAD = ["arm", "seeds", "reward, nats", "held-out accuracy", "FD", "recall", "CV of the gradient's norm", "roughness of the KL", "CPU s"]


def rows(base: dict[str, Any], arms: Iterator[tuple[str, list[Path]]]) -> list[list[str]]:
    made = [["base", "", *(f"{base['T1.0'][key]:.3f}" for key in SHOWN), "", "", ""]]
    for name, here in arms:
        judged = [results(place)["T1.0"] for place in here]
        notes = [json.loads((place / "model" / "notes.json").read_text()) for place in here]
        curves = [columns(place / "metrics.jsonl") for place in here]
        cells = [interval([each[key] for each in judged]) for key in SHOWN]
        cells.append(interval([variation(curve["grad_norm"][WARM:]) for curve in curves], ".2f"))
        cells.append(interval([roughness(curve["kl"]) for curve in curves], ".2f"))
        made.append([name, str(len(here)), *cells, f"{statistics.mean(each['cpu_seconds'] for each in notes):.0f}"])
    return made


def main() -> None:
    arms = {name: lambda seed, steps, name=name: run_config(name, seed, steps) for name in SWITCHES}
    base = model_path(glyphs_cpu().model)
    study(__doc__ or "", arms, out="runs/mar-ablation", steps=24, base=base, judge=judge, head=HEAD, rows=rows)


if __name__ == "__main__":
    main()
