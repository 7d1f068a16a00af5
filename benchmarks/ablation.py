"""Learning curves of the paper's switches, beside the numbers that the paper prints.

    python benchmarks/ablation.py [--schedule constant|linear] [--out runs/ablation] [--images 5760] [--jobs 2] [--only NAME ...] [--report]

Every arm is `varl train` on the bundled words model with one switch changed from CENTRE, over several seeds, until the same number of
judged pictures. Accuracy is of held-out words at temperature 1, 512 pictures at fixed seeds, several times a run. Arms are compared at
equal judged pictures, and at the CPU time (trainer and reader) of the quicker of the two. Runs that are there already are gone on with,
so it may be stopped at any time; --report only reads."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from arms import half_width, interval
from common import machine, table

from varl.config import EvalConfig, GRPOConfig, MiddleStep, OCRConfig, OptimConfig, RunConfig, VARRLConfig, WeightedReward
from varl.recipes.var_rl import words_cpu
from varl.settings import from_yaml, to_yaml

MANY, FEW = range(5), range(3)
OPTIM = {
    "constant": OptimConfig(lr=1.5e-4, warmup_steps=5),
    "linear": OptimConfig(lr=1e-4, warmup_steps=5, schedule="linear"),
}
"""With the recipe's peak rate all along, noise moves the weights far; decaying to 0 takes some of it back."""
EVALUATIONS = 3
GROUP = GRPOConfig(num_generations=16, panw_alpha=1.0, loss_type="dapo")
CENTRE = VARRLConfig(grpo=GROUP, middle_step=MiddleStep(index=3), num_continuations=2, prefix_updates=3, suffix_updates=1)
CENTRE_NAME = "m = 3 (11 % of tokens), K = 2, alpha 1, 3:1"
"""The middle of the paper's table: m_256 (by token share), K = 2, alpha = 1 (its rows for masks and alternation say so), 3:1, no masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    algorithm: GRPOConfig | VARRLConfig
    seeds: range = FEW
    prompts: int = 3
    """Per step; with CENTRE's group and continuations 96 pictures are judged in a prefix update."""

    def judged(self) -> float:
        """Pictures judged in an update, mean over a cycle."""
        a = self.algorithm
        if isinstance(a, GRPOConfig):
            return self.prompts * a.num_generations
        prefix = self.prompts * a.grpo.num_generations * a.num_continuations
        suffix = self.prompts * a.grpo.num_generations
        return (prefix * a.prefix_updates + suffix * a.suffix_updates) / (a.prefix_updates + a.suffix_updates)


def panw(alpha: float) -> Arm:
    return Arm(algorithm=replace(CENTRE, grpo=replace(GROUP, panw_alpha=alpha)))


def until(m: int) -> Arm:
    return Arm(algorithm=replace(CENTRE, middle_step=MiddleStep(index=m)))


ARMS: dict[str, Arm] = {
    "GRPO": Arm(algorithm=replace(GROUP, panw_alpha=0.0), prompts=6, seeds=MANY),
    "GRPO, PANW 0.7": Arm(algorithm=replace(GROUP, panw_alpha=0.7), prompts=6, seeds=MANY),
    "GRPO, letter credit": Arm(algorithm=replace(GROUP, panw_alpha=0.0, region_credit=True), prompts=6, seeds=MANY),
    "GRPO, PANW 0.7, letter credit": Arm(algorithm=replace(GROUP, panw_alpha=0.7, region_credit=True), prompts=6, seeds=MANY),
    CENTRE_NAME: Arm(algorithm=CENTRE, seeds=MANY),
    "K = 1, twice the group": Arm(algorithm=replace(CENTRE, num_continuations=1, grpo=replace(GROUP, num_generations=32)), seeds=MANY),
    "K = 4, half the prompts": Arm(algorithm=replace(CENTRE, num_continuations=4, grpo=replace(GROUP, num_generations=8))),
    "log-mean-exp, eta 1": Arm(algorithm=replace(CENTRE, middle_return="log_mean_exp")),
    "m = 5 (all; one stage)": Arm(algorithm=GROUP, prompts=6),
    "m = 4 (29 %)": until(4),
    "m = 2 (4 %)": until(2),
    "alpha 1.2": panw(1.2),
    "alpha 0.8": panw(0.8),
    "alpha 0.6": panw(0.6),
    "alpha 0": panw(0.0),
    "masks, direct": Arm(algorithm=replace(CENTRE, grpo=replace(GROUP, mask="direct"))),
    "prefix only": Arm(algorithm=replace(CENTRE, prefix_updates=1, suffix_updates=0)),
    "coarse alternation": Arm(algorithm=replace(CENTRE, prefix_updates=52, suffix_updates=17)),
    "m = 4, alpha 0.7, letter credit, K = 1": Arm(
        algorithm=replace(
            CENTRE,
            middle_step=MiddleStep(index=4),
            num_continuations=1,
            grpo=replace(GROUP, panw_alpha=0.7, region_credit=True),
        ),
        prompts=6,
        seeds=MANY,
    ),
}

PAPER: tuple[tuple[str, str, str, float, float], ...] = (
    ("prefix m_256 against full horizon", CENTRE_NAME, "m = 5 (all; one stage)", 0.6565, 0.5741),
    ("m_256 against m_512", CENTRE_NAME, "m = 4 (29 %)", 0.6565, 0.6351),
    ("m_128 against m_256", "m = 2 (4 %)", CENTRE_NAME, 0.6677, 0.6565),
    ("PANW 1.0 against 1.2", CENTRE_NAME, "alpha 1.2", 0.6855, 0.6602),
    ("PANW 0.8 against 1.0", "alpha 0.8", CENTRE_NAME, 0.7051, 0.6855),
    ("PANW 0.6 against 1.0", "alpha 0.6", CENTRE_NAME, 0.7136, 0.6855),
    ("masks against none", "masks, direct", CENTRE_NAME, 0.7071, 0.6855),
    ("3:1 against coarse alternation", CENTRE_NAME, "coarse alternation", 0.6855, 0.6778),
    ("K = 2 against K = 1 with twice the group", CENTRE_NAME, "K = 1, twice the group", 0.6821, 0.6575),
    ("K = 4 against K = 2, equal pictures", "K = 4, half the prompts", CENTRE_NAME, 0.6720, 0.6821),
)
"""What is compared, our two arms, the paper's two word accuracies: base .5536, one seed, no error bars, and K = 1 has the same group there,
so half the pictures."""


def run_config(arm: Arm, seed: int, images: int, schedule: str) -> RunConfig:
    steps = EVALUATIONS * round(images / arm.judged() / EVALUATIONS)
    ours = words_cpu()
    return replace(
        ours,
        name="ablation",
        seed=seed,
        rewards={"ocr": WeightedReward(reward=OCRConfig(score="letters"))},
        algorithm=arm.algorithm,
        train=replace(
            ours.train,
            steps=steps,
            prompts_per_step=arm.prompts,
            image_every=0,
            save_every=steps,
            optim=OPTIM[schedule],
        ),
        eval=EvalConfig(every=steps // EVALUATIONS, samples=256),
    )


def folder(out: Path, name: str, seed: int) -> Path:
    return out / "".join(c if c.isalnum() else "-" for c in name) / str(seed)


def jobs(only: list[str]) -> Iterator[tuple[str, int]]:
    return ((name, seed) for seed in MANY for name, arm in ARMS.items() if seed in arm.seeds and (not only or name in only))


def finished(here: Path, seed: int) -> bool:
    """Whether all of the run's steps are done; one that was stopped has a model too."""
    file = here / "metrics.jsonl"
    if not (here / "model").exists() or not file.exists():
        return False
    steps = from_yaml(here.with_name(f"{seed}.yaml").read_text()).train.steps
    return json.loads(file.read_text().splitlines()[-1])["step"] == steps


def run(out: Path, name: str, seed: int, images: int, schedule: str) -> None:
    here = folder(out, name, seed)
    if finished(here, seed):
        return
    here.mkdir(parents=True, exist_ok=True)
    recipe = here.with_name(f"{seed}.yaml")
    recipe.write_text(to_yaml(run_config(ARMS[name], seed, images, schedule)))
    varl = Path(sys.executable).with_name("varl")
    with here.with_name(f"{seed}.txt").open("w") as said:
        command = [varl, "train", recipe, "--out", here]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=said, stderr=said, check=True)
    print(name, seed, flush=True)


# ---- reading what the runs left -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Curve:
    """Held-out word accuracy over a run: at each evaluation (CPU seconds, judged pictures, accuracy), from the base on."""

    points: list[tuple[float, float, float]]

    def at(self, axis: int, where: float) -> float:
        """Accuracy there, on the straight line between evaluations."""
        for low, high in zip(self.points, self.points[1:], strict=False):
            if where <= high[axis] + 1e-6:
                return low[2] + (high[2] - low[2]) * (where - low[axis]) / (high[axis] - low[axis])
        raise ValueError(f"{where} lies beyond the run's end at {self.points[-1][axis]}.")


def curve(run_folder: Path, base: float) -> Curve:
    notes = json.loads((run_folder / "model" / "notes.json").read_text())
    rows: list[Mapping[str, Any]] = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    cpu_per_second = notes["cpu_seconds"] / notes["seconds"]
    points, spent = [(0.0, 0.0, base)], 0.0
    for row in rows:
        spent += row["seconds/total"] * cpu_per_second
        if "eval/word_accuracy" in row:
            points.append((spent, float(row["reward_calls"]), row["eval/word_accuracy"]))
    return Curve(points)


def verdict(values: list[float], paper: float) -> str:
    mean, half = statistics.mean(values), half_width(values)
    agrees = "agrees" if mean * paper > 0 else "disagrees"
    return agrees if abs(mean) > half else f"{agrees}, but 0 is inside the interval"


def base_accuracy(out: Path) -> float:
    """Of the model that every run starts from, on the prompts and seeds that the runs are evaluated on."""
    file = out / "base.json"
    if not file.exists():
        from varl.build import build_policy, build_prompts
        from varl.eval.words import draw_sample, reading_metrics
        from varl.rewards.judge import judge_now
        from varl.rewards.ocr_reward import OCRReward

        config = run_config(ARMS["GRPO"], 0, 960, "constant")
        policy = build_policy(config, torch.device("cpu"), reference=False)
        prompts = build_prompts(config.data, 0, config.eval.samples).heldout
        sample = draw_sample(policy, prompts, copies=2, seed=config.eval.seed, batch=config.eval.batch)
        reward = OCRReward(OCRConfig())
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(reading_metrics(judge_now(reward, sample.images, sample.prompts).parts, 2)))
        reward.close()
    return json.loads(file.read_text())["word_accuracy"]


def report(out: Path, schedule: str) -> None:
    base = base_accuracy(out)
    curves = {
        name: {seed: curve(folder(out, name, seed), base) for seed in arm.seeds if finished(folder(out, name, seed), seed)}
        for name, arm in ARMS.items()
    }
    curves = {name: runs for name, runs in curves.items() if runs}
    rate = f"Learning rate {OPTIM[schedule].lr:g}, {schedule} after {OPTIM[schedule].warmup_steps} steps"
    print(f"{machine(torch.device('cpu'))}. {rate}. Base: {base:.3f}; ± are 95 % t-intervals over seeds.\n")
    rows = []
    for name, runs in curves.items():
        ends = [run.points[-1] for run in runs.values()]
        gained = [end[2] - base for end in ends]
        against = [
            (min(run.points[-1][0], other.points[-1][0]), run, other)
            for seed, run in runs.items()
            if (other := curves["GRPO"].get(seed)) is not None
        ]
        at_equal_time = [run.at(0, time) - other.at(0, time) for time, run, other in against]
        at_equal_pictures = [run.points[-1][2] - other.points[-1][2] for _, run, other in against]
        rows.append(
            (
                name,
                len(runs),
                f"{statistics.mean(end[1] for end in ends):.0f}",
                f"{statistics.mean(end[0] for end in ends):.0f}",
                interval(gained),
                "-" if name == "GRPO" else interval(at_equal_pictures),
                "-" if name == "GRPO" else interval(at_equal_time),
            )
        )
    head = ("arm", "seeds", "pictures judged", "CPU s", "gained", "more than GRPO, equal pictures", "more than GRPO, equal CPU time")
    print(table(head, rows))
    print("The paper's comparisons. Differences of word accuracy; ours paired by seed at equal judged pictures.\n")
    rows = []
    for what, ours, against, theirs, their_other in PAPER:
        seeds = sorted(curves.get(ours, {}).keys() & curves.get(against, {}).keys())
        if len(seeds) < 2:
            continue
        values = [curves[ours][seed].points[-1][2] - curves[against][seed].points[-1][2] for seed in seeds]
        rows.append((what, f"{theirs - their_other:+.3f}", interval(values), len(seeds), verdict(values, theirs - their_other)))
    print(table(("comparison", "paper", "ours", "seeds", "sign"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--schedule", choices=[*OPTIM], default="linear", help="of the learning rate")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--images", type=int, default=5760, help="judged pictures of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--only", nargs="*", default=[], choices=[*ARMS], help="these arms only")
    parser.add_argument("--report", action="store_true", help="only read what is there")
    asked = parser.parse_args()
    out = asked.out / asked.schedule
    if not asked.report:
        with ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(lambda job: run(out, job[0], job[1], asked.images, asked.schedule), jobs(asked.only)))
    report(out, asked.schedule)


if __name__ == "__main__":
    main()
