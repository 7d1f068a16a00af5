"""What each part of MAR-GRPO is worth on letters.

    python benchmarks/mar_grpo_ablation.py [--out runs/mar-ablation] [--steps 24] [--seeds 3] [--jobs 2] [--only NAME ...] [--report]

Every arm is `varl train` on mar_grpo/glyphs_cpu with one switch changed, over several seeds, at equal judged pictures (but for `rewarded`,
which judges M + 1 times as many); then 1,152 pictures are drawn at temperature 1 and judged by the classifier that paid and by the one that
did not. Runs that are there already are not repeated, so it may be stopped at any time; --report only reads."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from common import machine, table
from scipy.stats import t as student

from varl.build import model_path
from varl.config import MARGRPOConfig, RunConfig
from varl.demo.letters import PLAIN
from varl.demo.mar_grpo import WARM, columns, evaluate, roughness, variation
from varl.recipes.mar_grpo import glyphs_cpu, released
from varl.settings import to_yaml


def but(**changes: object) -> Callable[[RunConfig], RunConfig]:
    """The recipe with another algorithm."""

    def change(config: RunConfig) -> RunConfig:
        assert isinstance(config.algorithm, MARGRPOConfig)
        return replace(config, algorithm=replace(config.algorithm, **changes))

    return change


ARMS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "GRPO, head frozen": but(num_trajectories=0),
    "GRPO, head trained": but(num_trajectories=0, train_head=True),
    "ours: M = 2, damping": but(),
    "ours, head trained": but(train_head=True),
    "M = 4, damping": but(num_trajectories=4),
    "damping of all tokens": but(uncertain_fraction=1.0),
    "first path joined by the others": but(trajectories="include_primary"),
    "others in place of the first": but(trajectories="release"),
    "others rewarded too": but(trajectories="rewarded"),
    "released form": lambda config: released(config, config.name),
    "released form, no consistency": lambda config: but(consistency=None)(released(config, config.name)),
    "2 of 4 steps": but(ar_steps=2),
    "12 moves": but(denoise_moves=12),
}


def run_config(name: str, seed: int, steps: int) -> RunConfig:
    ours = glyphs_cpu()
    train = replace(ours.train, steps=steps, image_every=0, save_every=steps)
    return ARMS[name](replace(ours, seed=seed, train=train))


def folder(out: Path, name: str, seed: int) -> Path:
    return out / "".join(c if c.isalnum() else "-" for c in name) / str(seed)


def run(out: Path, name: str, seed: int, steps: int) -> None:
    here = folder(out, name, seed)
    if (here / "judged.json").exists():
        return
    here.mkdir(parents=True, exist_ok=True)
    config = run_config(name, seed, steps)
    recipe = here.with_name(f"{seed}.yaml")
    recipe.write_text(to_yaml(config))
    with here.with_name(f"{seed}.txt").open("w") as said:
        command = [Path(sys.executable).with_name("varl"), "train", recipe, "--out", here]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=said, stderr=said, check=True)
    judge(here / "model", config, here / "judged")
    print(name, seed, flush=True)


def judge(model: Path, config: RunConfig, cache: Path) -> None:
    evaluate(model, config=config, cache=cache, laws=PLAIN, tick=lambda metrics: None)


# ---- reading what the runs left -------------------------------------------------------------------------------------------------------


def interval(values: list[float], form: str = ".3f") -> str:
    """Mean and the half-width of its 95 % t-interval."""
    if len(values) < 2:
        return f"{values[0]:{form}} (one seed)"
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{form}} ± {half:{form}}"


def rows(out: Path, seeds: int) -> list[list[str]]:
    found = []
    for name in ARMS:
        here = [place for seed in range(seeds) if ((place := folder(out, name, seed)) / "judged.json").exists()]
        if not here:
            continue
        judged = [json.loads((place / "judged.json").read_text())["T1.0"] for place in here]
        notes = [json.loads((place / "model" / "notes.json").read_text()) for place in here]
        curves = [columns(place / "metrics.jsonl") for place in here]
        found.append(
            [
                name,
                str(len(here)),
                *(interval([each[key] for each in judged]) for key in ("reward", "accuracy", "fd", "recall")),
                interval([variation(curve["grad_norm"][WARM:]) for curve in curves], ".2f"),
                interval([roughness(curve["kl"]) for curve in curves], ".2f"),
                f"{statistics.mean(each['cpu_seconds'] for each in notes):.0f}",
            ]
        )
    return found


HEAD = ["arm", "seeds", "reward, nats", "held-out accuracy", "FD", "recall", "CV of the gradient's norm", "roughness of the KL", "CPU s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mar-ablation"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(ARMS))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        judge(model_path(glyphs_cpu().model), glyphs_cpu(), options.out / "base")
        with ThreadPoolExecutor(options.jobs) as pool:
            todo = [(name, seed) for seed in range(options.seeds) for name in options.only]
            list(pool.map(lambda job: run(options.out, *job, options.steps), todo))
    print(machine())
    base = json.loads((options.out / "base.json").read_text())["T1.0"]
    before = ["base", "", *(f"{base[key]:.3f}" for key in ("reward", "accuracy", "fd", "recall")), "", "", ""]
    print(table(HEAD, [before, *rows(options.out, options.seeds)]))


if __name__ == "__main__":
    main()
