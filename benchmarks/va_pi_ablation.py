"""What each part of VA-pi is worth on letters, and what its baselines reach.

    python benchmarks/va_pi_ablation.py [--out runs/va-pi-ablation] [--steps 400] [--seeds 3] [--jobs 2] [--only NAME ...] [--report]

Every arm is `varl train` on va_pi/glyphs_cpu with one setting changed, or `varl pretrain` on a baseline, over several seeds, for as many
steps of as many pictures; then 4,104 pictures are drawn at temperature 1 and held against real ones, and held-out pictures are drawn again
in their own context, as in the demo."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from arms import Config, interval, results, study

from varl.build import model_path
from varl.config import ReconstructionConfig, RunConfig, VAPIConfig, WeightedReward
from varl.demo.letters import PLAIN
from varl.demo.va_pi import evaluate
from varl.recipes import va_pi


def but(**changes: object) -> Callable[[], RunConfig]:
    """The recipe with another objective."""

    def make() -> RunConfig:
        ours = va_pi.glyphs_cpu()
        assert isinstance(ours.algorithm, VAPIConfig)
        return replace(ours, algorithm=replace(ours.algorithm, **changes))

    return make


def group(size: int) -> Callable[[], RunConfig]:
    """Another number of draws of each picture, so of judged pictures too."""

    def make() -> RunConfig:
        ours = va_pi.glyphs_cpu()
        assert isinstance(ours.algorithm, VAPIConfig)
        grpo = replace(ours.algorithm.grpo, num_generations=size)
        train = replace(ours.train, rollouts_per_backward=8 * (size + 1))
        return replace(ours, algorithm=replace(ours.algorithm, grpo=grpo), train=train)

    return make


def weighed(lpips_weight: float) -> Callable[[], RunConfig]:
    def make() -> RunConfig:
        ours = va_pi.glyphs_cpu()
        reward = ours.rewards["reconstruction"].reward
        assert isinstance(reward, ReconstructionConfig)
        return replace(ours, rewards={"reconstruction": WeightedReward(reward=replace(reward, lpips_weight=lpips_weight))})

    return make


def with_kl() -> RunConfig:
    """The prior as KL to the initial model, in place of cross-entropy."""
    ours = va_pi.glyphs_cpu()
    assert isinstance(ours.algorithm, VAPIConfig)
    grpo = replace(ours.algorithm.grpo, beta=1.0)
    return replace(ours, algorithm=replace(ours.algorithm, grpo=grpo, prior_weight=0.0))


CHANGES: dict[str, Callable[[], Config]] = {
    "ours: xi 0, beta 1, lambda 1, G 8": but(),
    "cross-entropy alone": va_pi.glyphs_cpu_ce,
    "rewards shuffled": va_pi.glyphs_cpu_shuffled,
    "straight-through (STE)": va_pi.glyphs_cpu_ste,
    "decoder post-training": va_pi.glyphs_cpu_decoder,
    "reward alone: beta 0": va_pi.glyphs_cpu_reward_only,
    "beta 0.1": but(prior_weight=0.1),
    "beta 3": but(prior_weight=3.0),
    "KL in place of cross-entropy": with_kl,
    "xi 0.25": va_pi.glyphs_cpu_noisy,
    "xi 0.5": but(prefix_noise=0.5),
    "pixels alone: lambda 0": va_pi.glyphs_cpu_mse,
    "lambda 4": weighed(4.0),
    "G 4": group(4),
    "G 16": group(16),
}


def config_of(name: str, seed: int, steps: int) -> Config:
    made = CHANGES[name]()
    if isinstance(made, RunConfig):
        return replace(made, seed=seed, train=replace(made.train, steps=steps, image_every=0, save_every=steps))
    return replace(made, seed=seed + 1, steps=steps)


def judge(model: Path, cache: Path) -> None:
    evaluate(model, config=va_pi.glyphs_cpu(), cache=cache, laws=PLAIN, tick=lambda metrics: None)


SHOWN = ("fd", "fd_heldout", "accuracy", "precision", "recall", "token_diversity")
HEAD = ["arm", "seeds", "FD", "FD, held-out fonts", "accuracy", "precision", "recall", "token diversity", "MSE", "perceptual", "CPU s"]
FORCED = ("mse", "perceptual")


def rows(base: dict[str, Any], arms: Iterator[tuple[str, list[Path]]]) -> list[list[str]]:
    def cells(judged: list[dict[str, Any]]) -> list[str]:
        return [
            *(interval([each["T1.0"][key] for each in judged]) for key in SHOWN),
            *(interval([each["teacher_forced"][f"rewards/reconstruction/{key}"] for each in judged], ".4f") for key in FORCED),
        ]

    made = [["base", "", *(cell.removesuffix(" (one seed)") for cell in cells([base])), ""]]
    for name, here in arms:
        notes = [json.loads((place / "model" / "notes.json").read_text()) for place in here]
        spent = f"{statistics.mean(each['cpu_seconds'] for each in notes):.0f}" if all("cpu_seconds" in each for each in notes) else ""
        made.append([name, str(len(here)), *cells([results(place) for place in here]), spent])
    return made


def main() -> None:
    arms = {name: lambda seed, steps, name=name: config_of(name, seed, steps) for name in CHANGES}
    base = model_path(va_pi.glyphs_cpu().model)
    study(__doc__ or "", arms, out="runs/va-pi-ablation", steps=400, base=base, judge=judge, head=HEAD, rows=rows)


if __name__ == "__main__":
    main()
