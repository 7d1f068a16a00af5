"""A run small enough to be done many times over: a next-scale model of random weights, six prompts, a reward of pixels. Also what child
processes of the tests do with it; so nothing here imports pytest."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from varl.checkpoints import folder
from varl.checkpoints import model as model_folder
from varl.config import (
    FolderConfig,
    GRPOConfig,
    MiddleStep,
    NextScaleConfig,
    OptimConfig,
    PythonRewardConfig,
    RunConfig,
    TextConfig,
    TokenizerConfig,
    TrainConfig,
    VARRLConfig,
    WeightedReward,
)
from varl.data.folder import write_folder
from varl.models.next_scale import NextScale
from varl.run import train
from varl.settings import from_yaml
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.train.loop import Trainer
from varl.types import Prompt

MODEL = NextScaleConfig(
    depth=2,
    width=16,
    heads=2,
    grids=((1, 1), (1, 2), (2, 4)),
    text=TextConfig(alphabet="ABC", max_length=4),
    tokenizer=TokenizerConfig(vocab=16, channels=4, width=8, multipliers=(1,), blocks=1, attention=False, patch=4),
)
PROMPTS = tuple(Prompt(text=text) for text in ("A", "B", "C", "AB", "BC", "CA"))
GRPO = GRPOConfig(num_generations=4, rollouts_per_chunk=4)
ALGORITHMS = {
    "grpo": GRPO,
    "var_rl": VARRLConfig(grpo=GRPO, middle_step=MiddleStep(index=2), num_continuations=2, prefix_updates=2, suffix_updates=1),
}
TIMED = ("seconds/", "images_per_second", "memory_gb")
"""Metrics that two equal runs do not share."""

LISTENERS: list[Callable[[Tensor], Tensor | None]] = []
"""What happens when a picture is judged: called with the rewards, which it may replace."""


def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Every pixel counts, each by another weight, so that no two pictures tie."""
    value = (images.flatten(1) * torch.linspace(-1, 1, images[0].numel())).sum(1)
    for listener in LISTENERS:
        value = value if (said := listener(value)) is None else said
    return value


def make(home: Path) -> None:
    """`home`/base, a model folder, and `home`/data, its prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokenizer = NextScale(MODEL), MultiScaleVQ(MODEL.tokenizer, MODEL.grids)
        with torch.no_grad():
            for weight in (*model.parameters(), *tokenizer.parameters()):
                weight.add_(0.2 * torch.randn(weight.shape))
    model_folder.save(home / "base", model, tokenizer, {})
    write_folder(home / "data", None, PROMPTS)


def config(home: Path, algorithm: str = "grpo", **changes) -> RunConfig:
    """Six steps, with everything that has a state: moments, moving average, schedule."""
    settings = {
        "steps": 6,
        "prompts_per_step": 4,
        "rollouts_per_backward": 6,
        "optim": OptimConfig(lr=3e-3, warmup_steps=2),
        "ema_decay": 0.9,
        "device": "cpu",
        "save_every": 2,
        "image_every": 3,
    }
    return RunConfig(
        model=str(home / "base"),
        data=FolderConfig(path=str(home / "data")),
        rewards={"pixels": WeightedReward(reward=PythonRewardConfig(target="toy_run:reward"))},
        algorithm=ALGORITHMS[algorithm],
        train=TrainConfig(**(settings | changes)),  # type: ignore[arg-type]
        seed=3,
    )


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    return replace(config, train=replace(config.train, steps=steps))


def metrics(out: Path) -> list[dict]:
    """metrics.jsonl without what is timed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def kill_at(owner: object, name: str, call: int) -> None:
    """From now on this process is killed, without a word, at the end of call number `call` of `owner`.`name`."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


KILLS = {
    "in the first step, weights moved": partial(kill_at, Trainer, "_step", 1),
    "in step 4, weights moved": partial(kill_at, Trainer, "_step", 4),
    "in the save of step 4, half of its files written": partial(kill_at, folder, "write_tensors", 5),
    "in the save of step 4, written and not yet renamed": partial(kill_at, folder, "_sync", 9),
    "after the last step, half of the model folder written": partial(kill_at, folder, "write_tensors", 13),
}


def run_and_die(text: str, out: Path, kill: str, processes: int = 1) -> None:
    """A child process that is killed half-way. `text` is the config."""
    torch.set_num_threads(1)
    KILLS[kill]()
    train(from_yaml(text), out, processes=processes)


if __name__ == "__main__":  # under torchrun: config file, run directory
    torch.set_num_threads(1)
    train(from_yaml(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
