"""What the benchmarks share: the machine they ran on, both sides timed alternately in one process, and tables."""

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from varl.build import build_policy
from varl.config import NextScaleConfig, OCRConfig, RunConfig, WeightedReward
from varl.models.next_scale import NextScale
from varl.policies.next_scale import NextScalePolicy
from varl.recipes.pretrain import words_model
from varl.recipes.var_rl import words_cpu
from varl.tokenizers.multiscale_vq import MultiScaleVQ

RANDOM = "random"
"""Instead of a model folder: the words model's shape with random weights, for what does not depend on weights."""


def arguments(doc: str, minutes: float, *, model: str | None = "bundled:words", **choices: Sequence[str]) -> argparse.Namespace:
    """--minutes, --device, and --model unless it is None; and an option for each of `choices`, the first being the default."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=minutes, help="about how long to measure")
    if model is not None:
        parser.add_argument("--model", default=model, help=f"a model folder, or `{RANDOM}`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    found = parser.parse_args()
    found.device = torch.device(found.device)
    torch.manual_seed(0)
    return found


def machine(device: torch.device) -> str:
    """Hardware, torch, threads and commit, in a line."""
    try:
        cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {os.cpu_count()} cores"
    return f"{name}; torch {torch.__version__}, {torch.get_num_threads()} thread(s); commit {commit()}"


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../src")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with local changes" if changed else "")


def config(model: str, score: Literal["letters", "mixed"] = "letters") -> RunConfig:
    """The words recipe on `model`; `letters` is its own reward, `mixed` judges by the whole word."""
    return replace(words_cpu(), model=model, rewards={"ocr": WeightedReward(reward=OCRConfig(score=score))})


def policy_of(model: str, device: torch.device) -> NextScalePolicy:
    return random_policy(words_model(), device) if model == RANDOM else build_policy(config(model), device, reference=False)


def random_policy(shape: NextScaleConfig, device: torch.device) -> NextScalePolicy:
    return NextScalePolicy(NextScale(shape).to(device), MultiScaleVQ(shape.tokenizer, shape.grids).to(device))


def seconds(device: torch.device) -> float:
    """Of this process on the CPU, where a wall clock would count what other processes do; of the wall on a GPU, which is waited for."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def alternate(sides: Mapping[str, Callable[[], object]], device: torch.device, budget: float, least: int = 5) -> dict[str, Tensor]:
    """Seconds of each call, all sides in turn, until `budget` seconds of wall clock are over; one unmeasured turn first."""
    for side in sides.values():
        side()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(taken[next(iter(sides))]) < least:
        for name, side in sides.items():
            start = seconds(device)
            side()
            taken[name].append(seconds(device) - start)
    return {name: torch.tensor(times, dtype=torch.float64) for name, times in taken.items()}


def spread(value: Tensor, unit: float = 1.0, digits: int = 2) -> str:
    """Median and quartiles."""
    low, middle, high = (value.quantile(q).item() * unit for q in (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def milliseconds(value: Tensor) -> str:
    return spread(value, 1e3, 1)
