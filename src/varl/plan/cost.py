"""The arithmetic of a run: how often each kind of update is made, what one costs in operations, and what is held in memory."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from varl.build import needs_reference
from varl.config import NextScaleConfig, OptimConfig, PretrainConfig, RunConfig, VARRLConfig
from varl.errors import ConfigError
from varl.models.next_scale import NextScale
from varl.policies.sampling import CHUNK_ELEMENTS
from varl.tokenizers.multiscale_vq import MultiScaleVQ

FORWARD_AND_BACKWARD = 3
"""A training pass, in forward passes: the backward pass multiplies twice as much."""
LOGIT_COPIES = 3
"""Logits, their log-softmax and their gradient."""
WHOLE = "whole pictures"
"""Name of an update that trains every token."""


# ---- a picture's cost -------------------------------------------------------------------------------------------------------------------


def without_memory(config: NextScaleConfig) -> tuple[NextScale, MultiScaleVQ]:
    with torch.device("meta"):
        return fresh(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one row."""

    flops: float
    saved: int
    """Bytes that autograd keeps for the backward pass, weights not counted, in fp32."""


def cost(fn: Callable[[], Any], module: nn.Module) -> Cost:
    """Of one call of `fn`, which runs `module` on the meta device."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        held = fn()  # keeps the graph, so that no storage is freed and its address used again
    del held
    return Cost(flops=float(counter.get_total_flops()), saved=sum(saved.values()))


def transformer_cost(model: NextScale, scales: int) -> Cost:
    """A teacher-forced pass over the first scales of one picture, logits included; drawing them with a cache multiplies the same."""
    config, tokens = model.config, model.ends[scales - 1]

    def run() -> Tensor:
        text = config.text
        ids = torch.ones(1, dtype=torch.long) if text is None else torch.ones(1, 3 + text.max_length, dtype=torch.long)
        condition = model.condition(ids)
        hidden = model(condition, torch.empty(1, tokens - model.ends[0], config.tokenizer.channels), scales)
        return model.logits(hidden, condition)

    return cost(run, model)


def decoder_cost(tokenizer: MultiScaleVQ) -> Cost:
    """From one feature map to pixels."""
    return cost(lambda: tokenizer.render(torch.empty(1, tokenizer.config.channels, *tokenizer.quantize.grids[-1])), tokenizer)


def autoencoder_cost(tokenizer: MultiScaleVQ, size: tuple[int, int]) -> Cost:
    """One picture through encoder and decoder."""
    return cost(lambda: tokenizer.render(tokenizer.features(torch.empty(1, 3, *size))), tokenizer)


def weights_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def optimizer_bytes(module: nn.Module, config: OptimConfig) -> int:
    """AdamW keeps two numbers a weight; Muon one for each matrix inside blocks, and AdamW's two for the rest."""
    inside = sum(p.numel() for name, p in module.named_parameters() if p.ndim == 2 and "blocks" in name.split("."))
    return 8 * weights_of(module) - (4 * inside if config.name == "muon" else 0)


def matmul_speed(device: torch.device, dtype: torch.dtype, width: int, seconds: float = 0.2) -> float:
    """Floating-point operations per second of products [1024, width] x [width, 4 width]: of the fastest of those made in `seconds`, so that
    other work on the machine does not count."""
    together = 10 if device.type == "cuda" else 1  # so that a GPU is not waited for after each
    a, b = torch.ones(1024, width, device=device, dtype=dtype), torch.ones(width, 4 * width, device=device, dtype=dtype)

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(together):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    end, taken = time.perf_counter() + seconds, [timed()]
    while time.perf_counter() < end:
        taken.append(timed())
    return together * 2 * 1024 * width * 4 * width / min(taken)


def device_of(name: str) -> torch.device:
    """Where a run with this `device` setting happens."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': there is no CUDA device here, or this torch is built without CUDA. Use cpu, or auto.")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- a run's ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One kind of optimizer update."""

    name: str
    count: int
    """How many of them the run makes."""
    judged: int
    """Pictures drawn to the end and judged, in one update."""
    drawn: int
    """Tokens drawn; a prefix that several continuations share counts once."""
    trained: int
    """Tokens in training passes."""
    flops: dict[str, float]
    """Floating-point operations by phase."""


def run_updates(config: RunConfig, model: NextScale, tokenizer: MultiScaleVQ, m: int | None) -> tuple[Update, ...]:
    """How often each kind of update is made, and what one costs."""
    prompts, algorithm, steps = config.train.prompts_per_step, config.algorithm, config.train.steps
    grpo = algorithm.grpo
    pictures, whole, tokens = prompts * grpo.num_generations, transformer_cost(model, len(model.ends)).flops, model.ends[-1]
    start, start_tokens = (0.0, 0) if m is None else (transformer_cost(model, m).flops, model.ends[m - 1])
    branches = 2 if config.sample_law.guided or config.score_law.guided else 1
    passes = grpo.num_iterations * (2 if config.score_law.guided else 1)
    decode = decoder_cost(tokenizer).flops

    def update(name: str, times: int, prefixes: int, judged: int, trained: Sequence[tuple[int, float, int]]) -> Update:
        """`prefixes` drawn as far as m, `judged` pictures finished from there; `trained` holds (rows, operations, tokens) of each pass."""
        return Update(
            name=name,
            count=times,
            judged=judged,
            drawn=prefixes * start_tokens + judged * (tokens - start_tokens),
            trained=grpo.num_iterations * sum(rows * length for rows, _, length in trained),
            flops={
                "rollout": branches * (prefixes * start + judged * (whole - start)),
                "decode": judged * decode,
                "train": passes * (FORWARD_AND_BACKWARD + needs_reference(algorithm)) * sum(rows * flops for rows, flops, _ in trained),
            },
        )

    if not isinstance(algorithm, VARRLConfig):
        return (update(WHOLE, steps, 0, pictures, [(pictures, whole, tokens)]),)
    finished = pictures * algorithm.num_continuations
    siblings = [(finished, whole, tokens)] if algorithm.tree_reuse else []
    shared = prompts if algorithm.shared_prefix_baseline else pictures
    cycle = algorithm.prefix_updates + algorithm.suffix_updates
    prefix_steps = steps // cycle * algorithm.prefix_updates + min(steps % cycle, algorithm.prefix_updates)
    prefix = "prefix" if m is not None and m < len(model.ends) else WHOLE
    both = (
        update(prefix, prefix_steps, pictures, finished, [(pictures, start, start_tokens), *siblings]),
        update("suffix", steps - prefix_steps, shared, pictures, [(pictures, whole, tokens)]),
    )
    return tuple(kind for kind in both if kind.count)


def run_memory(config: RunConfig, model: NextScale, tokenizer: MultiScaleVQ, m: int | None) -> dict[str, int]:
    """Bytes by part, at the moment when most is held."""
    algorithm, c, size = config.algorithm, model.config, 2 if config.train.dtype == "bfloat16" else 4
    grpo = algorithm.grpo
    group = grpo.num_generations * (algorithm.num_continuations if isinstance(algorithm, VARRLConfig) else 1)
    chunk = min(max(1, grpo.rollouts_per_chunk // group), config.train.prompts_per_step) * group
    guided = 2 if config.sample_law.guided or config.score_law.guided else 1
    whole_pictures = not isinstance(algorithm, VARRLConfig) or algorithm.suffix_updates > 0 or algorithm.tree_reuse
    scales = len(model.ends) if whole_pictures or m is None else m
    weights = 4 * weights_of(model)
    memory = {
        "weights": weights,
        "gradients": weights,
        "optimizer": optimizer_bytes(model, config.train.optim),
        "tokenizer": 4 * weights_of(tokenizer),
        "reference": weights * needs_reference(algorithm),
        "moving average": weights * (config.train.ema_decay > 0),
    }
    cache = {"key-value cache": 2 * c.depth * c.width * model.ends[-1] * chunk * guided * size}
    rows = min(config.train.rollouts_per_backward, chunk) * (2 if config.score_law.guided else 1)
    training = training_bytes(model, scales, rows, size)
    if chunk < config.train.prompts_per_step * group:  # the next chunk is drawn while one is trained on
        return held(memory | cache | training)
    return held(memory | max(cache, training, key=lambda part: sum(part.values())))


def training_bytes(model: NextScale, scales: int, rows: int, size: int) -> dict[str, int]:
    tokens, vocab = model.ends[scales - 1], model.config.tokenizer.vocab
    logits = min(rows * tokens * vocab, max(CHUNK_ELEMENTS, tokens * vocab))
    return {"activations": rows * transformer_cost(model, scales).saved * size // 4, "logits": LOGIT_COPIES * 4 * logits}


def held(memory: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in memory.items() if size}


def pretraining_updates(config: PretrainConfig, model: NextScale, tokenizer: MultiScaleVQ) -> tuple[Update, ...]:
    """The tokenizer's, if it is trained, and the transformer's."""
    tokens, picture = model.ends[-1], autoencoder_cost(tokenizer, config.model.image_size)

    def update(name: str, times: int, batch: int, flops: float) -> Update:
        flops = FORWARD_AND_BACKWARD * batch * flops
        return Update(name=name, count=times, judged=0, drawn=0, trained=batch * tokens, flops={"train": flops})

    both = (
        update("tokenizer", 0 if config.init else config.tokenizer_steps, config.tokenizer_batch, picture.flops),
        update("transformer", config.steps, config.batch, transformer_cost(model, len(model.ends)).flops),
    )
    return tuple(kind for kind in both if kind.count)


def pretraining_memory(config: PretrainConfig, model: NextScale, tokenizer: MultiScaleVQ) -> dict[str, int]:
    """Bytes by part, in the phase that holds more."""
    size, weights = 2 if config.dtype == "bfloat16" else 4, 4 * weights_of(model)
    memory = {
        "weights": weights,
        "gradients": weights,
        "optimizer": optimizer_bytes(model, config.optim),
        "tokenizer, its gradients and optimizer": 16 * weights_of(tokenizer),
    }
    tokenizer_phase = {"activations": config.tokenizer_batch * autoencoder_cost(tokenizer, config.model.image_size).saved * size // 4}
    transformer_phase = training_bytes(model, len(model.ends), config.batch, size)
    return held(memory | max(tokenizer_phase, transformer_phase, key=lambda part: sum(part.values())))
