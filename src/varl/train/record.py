"""A run directory: what was asked, what happened step by step, and what came out, so that a run can be read, resumed and compared.

config.yaml, metrics.jsonl (one object a step), events.jsonl, images/step-000010.png, tensorboard/; others add
checkpoints/, pictures/, model/ and what their commands measured."""

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varl.checkpoints.folder import replace_file
from varl.errors import ConfigError
from varl.settings import diff, from_yaml, to_yaml

METRICS = {
    "reward": "mean over the step's pictures that could be judged, weighted sum of the parts, in the rewards' own unit",
    "reward_std": "mean over groups of the standard deviation within the group, unit of the reward",
    "reward_failed": "share of pictures whose reward failed",
    "rewards/*/mean": "mean of one part over pictures, before its weight, in its own unit",
    "rewards/*/std": "mean over groups of the standard deviation of one part within the group, before its weight, in its own unit",
    "frac_reward_zero_std": "share of groups in which all rewards are equal, so that they teach nothing",
    "advantage_abs_mean": "mean over tokens of |advantage|; unit of the reward, or standard deviations if scaled",
    "loss": "minus the objective divided by its size: what the optimizer descends; its value has no meaning across steps",
    "kl": "mean over scored tokens of the analytic KL(policy || reference), nats per token",
    "entropy": "mean entropy of the scored law, nats per token",
    "entropy/step_*": "the same over the tokens of one step (0 is the coarsest scale), or of the block that begins there, nats per token",
    "prior/nll": "cross-entropy of the pictures' own tokens in the context that the draws shared, nats per token",
    "clip_ratio/*": "share of learning tokens whose gradient the clip stopped: low_mean below, high_mean above, region_mean either",
    "grad_norm": "L2 norm of the gradient before clipping",
    "grad_norm/*": "L2 norm of one part's gradient before clipping",
    "lr": "AdamW's learning rate",
    "sampling/sampling_logp_difference/mean": "mean |log-prob now - log-prob recorded while sampling|, nats; 0 before the first update",
    "sampling/sampling_logp_difference/max": "its maximum over tokens, nats; what the replay gate holds against the dtype's tolerance",
    "sampling/law_difference/mean": "mean |log-prob under the sample law - under the score law|, nats; only where the two laws differ",
    "sampling/law_difference/max": "its maximum over tokens, nats",
    "trajectory_spread": "mean over tokens of their standard deviation over denoising paths of the same latent, unit of the latents",
    "consistent": "share of the tokens not known at a trained step that the consistency filter lets learn from the reward",
    "consistent/*": "the same at one step",
    "mask_occupancy": "share of active tokens that the mask lets learn from the reward",
    "mask_occupancy/*": "the same over the tokens of one step",
    "stage": "which tokens were trained: all, prefix or suffix",
    "middle_step": "m, the number of steps in the prefix",
    "reward_variance/settled": "variance of the reward between prefixes, unbiased (may fall below 0), squared unit of the reward",
    "reward_variance/open": "variance of the reward between continuations of one prefix, squared unit of the reward",
    "tokens_trained": "tokens with a weight in this step's objective",
    "reward_calls": "pictures judged so far",
    "images_per_second": "pictures drawn, judged and trained on, per second of wall clock",
    "seconds/rollout": "drawing tokens, seconds of this step",
    "seconds/decode": "tokens to pixels, seconds of this step",
    "seconds/reward_wait": "waiting for rewards that were not ready, seconds of this step",
    "seconds/train": "forward and backward of the objective, seconds of this step",
    "seconds/optimizer": "summing, clipping and applying the gradient, seconds of this step",
    "seconds/total": "the whole step, seconds of wall clock",
    "memory_gb": "largest memory held so far, 10^9 bytes; of the GPU if there is one",
    "monitor/pixel_diversity": "RMS difference between two pictures of a prompt, mean over pairs of those looked at; pixels in [0, 1]",
    "monitor/background_edges": "share of pixels outside of the prompt's text boxes with a step of the luma above .1 to a neighbour",
    "monitor/*": "mean of a held-out reward, which nothing learns from, over the pictures looked at, in its own unit",
    "monitor/alarm": "after each window: 1 where the reward rose while something that is watched fell, else 0",
    "eval/*": "on held-out prompts at fixed seeds, in the metric's own unit",
    "pretrain/loss": "tokenizer: pixel and codebook loss; transformer: cross-entropy, nats per token, or the head's squared error",
    "pretrain/psnr": "of reconstructed pictures, dB",
    "pretrain/latent_kl": "KL of the posterior to N(0, 1), nats per number of the latents",
    "pretrain/code_usage": "share of the codebook in use",
    "pretrain/bit_usage": "entropy of how often each bit of a scale is 1, mean over bits and scales; 1 is half of the time",
    "pretrain/perplexity": "exp of the mean cross-entropy per token",
    "pretrain/accuracy": "share of tokens whose most probable value is the right one",
    "pretrain/*": "a further quantity of pre-training, in its own unit",
}
"""Every metric that a run may write, with its unit; * stands for any name."""

MAY_CHANGE = frozenset(
    (
        "train.steps",
        "train.max_seconds",
        "train.save_every",
        "train.image_every",
        "train.keep",
        "eval.every",
        "monitor.on_alarm",
        "steps",
        "max_seconds",
        "save_every",
    )
)
"""Settings with which a run may go on although it was started with others."""


@cache
def definition(metric: str) -> str:
    """What METRICS says about `metric`; the longest pattern that fits, if its own name is not there."""
    fitting = [pattern for pattern in METRICS if pattern == metric or fnmatchcase(metric, pattern)]
    if not fitting:
        raise KeyError(f"metric {metric!r} has no definition. Add it, with its unit, to METRICS in varl/train/record.py.")
    return METRICS[metric if metric in fitting else max(fitting, key=len)]


class RunDirectory:
    """The one writer of a run directory; a second run is refused while this process lives. Step n is the state after n updates."""

    def __init__(self, path: Path | str, config: Any, *, writer: bool = True) -> None:
        """Opens `path` for a run of `config`, new or to go on. One process of a run is the `writer`; in others nothing is written."""
        self.path = Path(path)
        self.writer = writer
        self._step = 0
        self._tensorboard = None
        if not writer:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path / "lock")
        try:
            self._agree(config)
        except ConfigError:
            self._lock.close()
            raise
        self._metrics = (self.path / "metrics.jsonl").open("ab")

    def truncate(self, step: int) -> None:
        """Call it before the first `write`, with 0 in a new run: forgets the metrics of later steps than `step`, and what a kill left of a
        line, for they will be written again; opens TensorBoard's file where that package is installed."""
        if not self.writer:
            return
        self._step = step
        file = self.path / "metrics.jsonl"
        kept = [line for line in file.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        self._metrics.close()
        replace_file(file, b"".join(kept))
        self._metrics = file.open("ab")
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._tensorboard = _tensorboard(self.path / "tensorboard", step + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, on the disk before this returns; NaN and infinities become null. A metric that METRICS does not define
        is a KeyError."""
        line: dict[str, Any] = {"step": step}
        self._step = step
        for name, value in metrics.items():
            if name != "step":
                definition(name)
                line[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        if not self.writer:
            return
        self._metrics.write(json.dumps(line).encode() + b"\n")
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        if self._tensorboard is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._tensorboard.add_scalar(name, value, step)

    def event(self, kind: str, message: str) -> None:
        """One line of events.jsonl, at the last step written: a warning, a stop, a replaced worker, a refused checkpoint."""
        if not self.writer:
            return
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps({"time": time.time(), "step": self._step, "kind": kind, "message": message}, ensure_ascii=False) + "\n")

    def images(self, step: int, images: Float[Tensor, "B 3 H W"], captions: Sequence[str]) -> None:
        """images/step-NNNNNN.png: the pictures, pixels in [0, 1], with their captions."""
        if self.writer:
            _save_png(self.path / "images" / f"step-{step:06d}.png", picture_grid(images, captions))

    def close(self) -> None:
        if not self.writer:
            return
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._lock.close()

    def _agree(self, config: Any) -> None:
        """Writes config.yaml, or where a run has come as far as a step holds `config` against the one that is there."""
        file, metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        begun = any((self.path / "checkpoints").glob("step-*")) or (metrics.exists() and metrics.stat().st_size > 0)
        if begun and file.exists():
            lines = [line for line in diff(from_yaml(file.read_text(), type(config)), config) if line.split(":")[0] not in MAY_CHANGE]
            if lines:
                every = "\n  ".join(lines)
                raise ConfigError(
                    f"{self.path} holds a run with other settings:\n  {every}\nGive another --out, or the same settings to go on."
                )
        replace_file(file, to_yaml(config).encode())


def picture(image: Float[Tensor, "3 H W"]) -> Image.Image:
    """Pixels in [0, 1], rounded to 8 bits."""
    return Image.fromarray((image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def save_picture(file: Path, image: Float[Tensor, "3 H W"]) -> None:
    """`image`, pixels in [0, 1], as a PNG; folders are made as needed."""
    _save_png(file, picture(image))


def picture_grid(images: Float[Tensor, "B 3 H W"], captions: Sequence[str]) -> Image.Image:
    """The pictures in rows, each enlarged by a whole factor to about 256 pixels on its longer side, with its caption below."""
    gap, line = 8, 18
    height, width = images.shape[-2:]
    factor = max(1, 256 // max(height, width))
    cell_width, cell_height = factor * width + gap, factor * height + line + gap
    columns = max(1, min(len(images), 1056 // cell_width))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        sheet.paste(picture(image).resize((factor * width, factor * height), Image.Resampling.NEAREST), (x, y))
        while caption and font.getlength(caption) > factor * width:
            caption = caption[:-1]
        pen.text((x, y + factor * height + 1), caption, fill="black", font=font)
    return sheet


def _lock(file: Path) -> Any:
    """The open lock file, held until it is closed or the process dies; it says by which process."""
    lock = file.open("a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise ConfigError(f"{file.parent} is in use by process {holder}. Wait for it, stop it, or give another --out.") from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _tensorboard(path: Path, first_step: int) -> Any:
    """A TensorBoard writer, None where that package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path), purge_step=first_step)


def _step_of(line: bytes) -> float:
    """The step of a metrics line; infinity for what is no whole line."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf


def _save_png(file: Path, sheet: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.tmp")
    sheet.save(beside, format="PNG")
    beside.replace(file)
