"""Rewards tried on real pictures: what they say, how long they take, and in how much memory."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from varl.build import build_reward
from varl.config import FolderConfig, PicturesConfig, RunConfig
from varl.data.pictures import read_pictures, subset
from varl.plan.cost import device_of
from varl.plan.missing import config_of, judge_of
from varl.rewards.judge import judge_now
from varl.types import Prompt, RewardFn


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What one reward did with the pictures."""

    name: str
    pictures: Float[Tensor, " B"]
    """Of each picture under its own prompt, in the reward's own unit; NaN where it failed."""
    noise: Float[Tensor, " B"]
    """Of pictures of uniform noise under the same prompts."""
    alone: float
    """Seconds a picture, one picture at a time; texts, references and weights were seen before."""
    together: float
    """Seconds a picture, all at once."""
    memory: int
    """Most bytes of tensors that judging all at once held beyond those that stay. What a reward's own processes hold does not count."""


def try_rewards(config: RunConfig, folder: Path, most: int) -> list[Tried]:
    """Each reward of the run on the pictures in `folder`, `most` of them from all over it, scaled and cut to the size that the run's data
    has; where its data has none, the model's. VarlError says which judge is not there before one is asked."""
    device = device_of(config.train.device)
    size = config_of(config.model).image_size if isinstance(config.data, FolderConfig) else config.data.image_size
    real = read_pictures(PicturesConfig(path=str(folder), image_size=size))
    prompts = [real.prompts[i] for i in subset(len(real), min(1.0, most / len(real)), 0)]
    images = real.images(prompts).to(device)
    for name, part in config.rewards.items():
        judge_of(name, part.reward, real.images)
    return [try_reward(name, build_reward(part.reward, real.images), images, prompts) for name, part in config.rewards.items()]


@torch.no_grad()
def try_reward(name: str, reward: RewardFn, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Tried:
    """One reward on pictures in [0, 1] and their prompts; it is closed where it can be."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    try:
        judged = judge_now(reward, images, prompts).value
        memory = peak_bytes(images.device, lambda: judge_now(reward, images, prompts))
        together = seconds(lambda: judge_now(reward, images, prompts))
        alone = seconds(lambda: [judge_now(reward, images[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))])
        return Tried(
            name=name,
            pictures=judged,
            noise=judge_now(reward, noise, prompts).value,
            alone=alone / len(prompts),
            together=together / len(prompts),
            memory=memory,
        )
    finally:
        if (close := getattr(reward, "close", None)) is not None:
            close()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """Most memory of tensors that `call` held beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    changes = ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")  # type: ignore[attr-defined]
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def said(tried: Sequence[Tried]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table."""
    head = ["reward", "on its pictures", "on noise", "failed", "ms a picture, alone", f"in {len(tried[0].pictures)}", "times faster", "MiB"]
    rows = []
    for one in tried:
        times = [f"{1e3 * one.alone:.3g}", f"{1e3 * one.together:.3g}", f"{one.alone / one.together:.1f}"]
        failed = f"{int(one.pictures.isnan().sum())} of {len(one.pictures)}"
        rows.append([one.name, span(one.pictures), span(one.noise), failed, *times, f"{one.memory / 2**20:.3g}"])
    return head, rows


def span(values: Float[Tensor, " B"]) -> str:
    """Least, mean and largest value, failures left out."""
    there = values[~values.isnan()]
    if not len(there):
        return "nothing"
    return f"{there.min().item():.4g} to {there.max().item():.4g}, mean {there.mean().item():.4g}"
