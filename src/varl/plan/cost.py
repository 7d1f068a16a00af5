"""The arithmetic of a run: how often each kind of update is made, what one costs in operations, and what is held in memory."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from varl.build import needs_reference
from varl.config import BSQConfig, MARGRPOConfig, OptimConfig, PretrainConfig, RunConfig, VAPIConfig, VARRLConfig
from varl.errors import ConfigError
from varl.models.classifier import Classifier
from varl.plan.families import AnyFamily, Family, autoencoder_cost, classifier_cost, decoder_cost, encoder_cost
from varl.policies.sampling import CHUNK_ELEMENTS
from varl.train.optim import build_optimizer

FORWARD_AND_BACKWARD = 3
"""A training pass, in forward passes: the backward pass multiplies twice as much."""
ONLY_THROUGH = 2
"""The same where adapters are trained: through the weights, but for none of them."""
LOGIT_COPIES = 3
"""Logits, their log-softmax and their gradient."""
DRAWN_COPIES = 4
"""Of logits from which several tokens are drawn: they, their log-softmax, its exponential and the sums of that."""
WHOLE = "whole pictures"
"""Name of an update that trains every token."""
IN_CONTEXT = "draws in the context of a picture"
"""Name of VA-pi's update."""


def weights_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def learned(module: nn.Module) -> int:
    """Weights that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def optimizer_bytes(module: nn.Module, config: OptimConfig) -> int:
    """AdamW keeps two numbers a weight; Muon one for each matrix that is its own, and AdamW's two for the rest."""
    if config.name == "adamw":
        return 8 * learned(module)
    groups = build_optimizer(module, config).param_groups
    return sum((4 if group["muon"] else 8) * p.numel() for group in groups for p in group["params"])


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
    """Tokens in training passes; a pass that several rows share counts once."""
    flops: dict[str, float]
    """Floating-point operations by phase."""


def run_updates(config: RunConfig, family: Family, m: int | None) -> tuple[Update, ...]:
    """How often each kind of update is made, and what one costs."""
    if isinstance(config.algorithm, VAPIConfig):
        return (_in_context(config, config.algorithm, family),)
    prompts, algorithm, steps = config.train.prompts_per_step, config.algorithm, config.train.steps
    grpo, layout = algorithm.grpo, family.layout
    pictures, whole, tokens = prompts * grpo.num_generations, family.forward(layout.steps).flops, layout.tokens
    start, start_tokens = (0.0, 0) if m is None else (family.forward(m).flops, family.tokens(m))
    reading, to_end = family.reading(), family.drawing(layout.steps)
    to_middle = 0.0 if m is None else family.drawing(m)
    decode = decoder_cost(family).flops

    def update(name: str, times: int, prefixes: int, judged: int, trained: Sequence[tuple[int, float, int]]) -> Update:
        """`prefixes` drawn as far as m, `judged` pictures finished from there; `trained` holds (rows, operations, tokens) of each pass."""
        return Update(
            name=name,
            count=times,
            judged=judged,
            drawn=prefixes * start_tokens + judged * (tokens - start_tokens),
            trained=grpo.num_iterations * sum(rows * length for rows, _, length in trained),
            flops={
                "rollout": branches(config) * (prompts * reading + prefixes * to_middle + judged * (to_end - to_middle)),
                "decode": judged * decode,
                "train": _passes(config) * sum(rows * flops for rows, flops, _ in trained),
            },
        )

    if not isinstance(algorithm, VARRLConfig):
        return (update(WHOLE, steps, 0, pictures, [(pictures, whole, tokens)]),)
    finished = pictures * algorithm.num_continuations
    siblings = [(finished, whole, tokens)] if algorithm.tree_reuse else []
    shared = prompts if algorithm.shared_prefix_baseline else pictures
    cycle = algorithm.prefix_updates + algorithm.suffix_updates
    prefix_steps = steps // cycle * algorithm.prefix_updates + min(steps % cycle, algorithm.prefix_updates)
    prefix = "prefix" if m is not None and m < layout.steps else WHOLE
    both = (
        update(prefix, prefix_steps, pictures, finished, [(pictures, start, start_tokens), *siblings]),
        update("suffix", steps - prefix_steps, shared, pictures, [(pictures, whole, tokens)]),
    )
    return tuple(kind for kind in both if kind.count)


def _in_context(config: RunConfig, algorithm: VAPIConfig, family: Family) -> Update:
    """VA-pi's: P pictures encoded, a forward pass for each from which its G draws come, P G decoded, a training pass for each picture; and
    one more for each time that a micro-batch cuts a picture's rows apart. Tokens kept on disk (`data.tokens`) save encoding, which is
    counted all the same."""
    pictures, grpo, tokens = config.train.prompts_per_step, algorithm.grpo, family.layout.tokens
    judged, whole = pictures * grpo.num_generations, family.forward(family.layout.steps).flops
    contexts = sum(sum(chunk) for chunk in contexts_of(config, algorithm, family.layout.steps))
    return Update(
        name=IN_CONTEXT,
        count=config.train.steps,
        judged=judged,
        drawn=judged * tokens,
        trained=grpo.num_iterations * contexts * tokens,
        flops={
            "encode": pictures * encoder_cost(family).flops,
            "rollout": branches(config) * pictures * whole,
            "decode": judged * decoder_cost(family).flops,
            "train": _passes(config) * contexts * whole,
        },
    )


def branches(config: RunConfig) -> int:
    """How often a token is read while pictures are drawn."""
    return 2 if config.sample_law.guided or config.score_law.guided else 1


def _passes(config: RunConfig) -> int:
    """Training on a row, in forward passes; with the reference's, which makes no gradient."""
    return config.algorithm.grpo.num_iterations * (2 if config.score_law.guided else 1) * passes_over(config)


def passes_over(config: RunConfig) -> int:
    """Of the transformer's, in forward passes: what is computed again, and the reference's, included."""
    own = FORWARD_AND_BACKWARD if config.train.lora is None else ONLY_THROUGH
    return own + config.train.gradient_checkpointing + needs_reference(config.algorithm)


def further_rows(algorithm: MARGRPOConfig) -> int:
    """How many of the further paths of a picture are trained on: all, unless they only say how far to damp."""
    idle = algorithm.trajectories == "precision_weight" or algorithm.uncertain_fraction == 0
    return 0 if idle else algorithm.num_trajectories


def rows_of(algorithm: VAPIConfig | MARGRPOConfig, steps: int) -> tuple[int, int]:
    """(contexts of a prompt, rows of each, side by side, which share its forward pass), of a model of so many steps. VA-pi's is a picture
    with its draws and its own tokens; MAR-GRPO's a picture it drew, or with support=unknown one of its steps, with the further paths."""
    if isinstance(algorithm, VAPIConfig):
        return 1, algorithm.grpo.num_generations + 1
    each = (algorithm.ar_steps or steps) if algorithm.support == "unknown" else 1
    return algorithm.grpo.num_generations * each, 1 + further_rows(algorithm)


def contexts_of(config: RunConfig, algorithm: VAPIConfig | MARGRPOConfig, steps: int) -> list[list[int]]:
    """Of each chunk of a step, how many contexts each micro-batch holds rows of: one that is cut apart is in two micro-batches or more."""
    contexts, rows = rows_of(algorithm, steps)
    most, prompts = config.train.rollouts_per_backward, config.train.prompts_per_step
    at_once = max(1, algorithm.grpo.rollouts_per_chunk // algorithm.grpo.num_generations)
    chunks = [min(at_once, prompts - start) * contexts * rows for start in range(0, prompts, at_once)]
    return [[(min(first + most, end) - 1) // rows - first // rows + 1 for first in range(0, end, most)] for end in chunks]


def run_memory(config: RunConfig, family: Family, m: int | None) -> dict[str, int]:
    """Bytes by part, at the moment when most is held."""
    model, layout = family.model, family.layout
    algorithm, c, size = config.algorithm, model.config, 2 if config.train.dtype == "bfloat16" else 4
    grpo = algorithm.grpo
    group = grpo.num_generations * (algorithm.num_continuations if isinstance(algorithm, VARRLConfig) else 1)
    chunk = min(max(1, grpo.rollouts_per_chunk // group), config.train.prompts_per_step) * group
    whole_pictures = not isinstance(algorithm, VARRLConfig) or algorithm.suffix_updates > 0 or algorithm.tree_reuse
    steps = layout.steps if whole_pictures or m is None else m
    memory = weights_held(config, family)
    if isinstance(algorithm, VAPIConfig):
        rows = max(max(chunk) for chunk in contexts_of(config, algorithm, family.layout.steps))
        drawing = {"drawing": DRAWN_COPIES * 4 * _logits_at_once(chunk // group, layout.tokens, c.tokenizer.vocab)}
    else:
        rows = min(config.train.rollouts_per_backward, chunk)
        drawn = min(chunk, config.train.rollouts_per_draw or chunk)
        drawing = {"key-value cache": 2 * c.depth * c.width * family.positions * drawn * branches(config) * size}
    training = training_bytes(family, steps, rows * (2 if config.score_law.guided else 1), size)
    if chunk < config.train.prompts_per_step * group:  # the next chunk is drawn while one is trained on
        return held(memory | drawing | training)
    return held(memory | max(drawing, training, key=lambda part: sum(part.values())))


def weights_held(config: RunConfig, family: AnyFamily) -> dict[str, int]:
    """Bytes of what lasts the whole run. What is not trained is the reference's too."""
    model, moving = family.model, 4 * learned(family.model)
    return {
        "weights": 4 * weights_of(model),
        "gradients": moving,
        "optimizer": optimizer_bytes(model, config.train.optim),
        "tokenizer": 4 * weights_of(family.tokenizer),
        "reference": moving * (needs_reference(config.algorithm) and config.train.lora is None),
        "moving average": moving * (config.train.ema_decay > 0),
    }


def training_bytes(family: Family, steps: int, rows: int, size: int) -> dict[str, int]:
    """Of one micro-batch of the first `steps` steps."""
    codes = family.model.config.tokenizer
    choices = codes.bits if isinstance(codes, BSQConfig) else 1
    logits = _logits_at_once(rows, family.tokens(steps) * choices, codes.vocab)
    return {"activations": rows * family.forward(steps).saved * size // 4, "logits": LOGIT_COPIES * 4 * logits}


def _logits_at_once(rows: int, choices: int, vocab: int) -> int:
    """How many logits are held together, `choices` (tokens, or bits of tokens) a row; never less than a row's."""
    return min(rows * choices * vocab, max(CHUNK_ELEMENTS, choices * vocab))


def held(memory: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in memory.items() if size}


def pretraining_updates(config: PretrainConfig, family: Family) -> tuple[Update, ...]:
    """The tokenizer's, if it is trained, and the transformer's."""
    layout = family.layout

    def update(name: str, times: int, batch: int, flops: float) -> Update:
        flops = FORWARD_AND_BACKWARD * batch * flops
        return Update(name=name, count=times, judged=0, drawn=0, trained=batch * layout.tokens, flops={"train": flops})

    both = (
        update("tokenizer", 0 if config.init else config.tokenizer_steps, config.tokenizer_batch, autoencoder_cost(family).flops),
        update("transformer", config.steps, config.batch, family.forward(layout.steps).flops),
    )
    return tuple(kind for kind in both if kind.count)


def pretraining_weights(config: PretrainConfig, family: AnyFamily) -> dict[str, int]:
    """Bytes that both phases hold."""
    weights = 4 * weights_of(family.model)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": optimizer_bytes(family.model, config.optim),
        "tokenizer, its gradients and optimizer": 16 * weights_of(family.tokenizer),
    }


def pretraining_memory(config: PretrainConfig, family: Family) -> dict[str, int]:
    """Bytes by part, in the phase that holds more."""
    size, memory = 2 if config.dtype == "bfloat16" else 4, pretraining_weights(config, family)
    tokenizer_phase = {"activations": config.tokenizer_batch * autoencoder_cost(family).saved * size // 4}
    transformer_phase = training_bytes(family, family.layout.steps, config.batch, size)
    return held(memory | max(tokenizer_phase, transformer_phase, key=lambda part: sum(part.values())))


def classifier_updates(config: PretrainConfig, classifier: Classifier) -> tuple[Update, ...]:
    flops = FORWARD_AND_BACKWARD * config.batch * classifier_cost(classifier).flops
    return (Update(name="classifier", count=config.steps, judged=0, drawn=0, trained=0, flops={"train": flops}),)


def classifier_memory(config: PretrainConfig, classifier: Classifier) -> dict[str, int]:
    """Bytes by part; it is trained in fp32."""
    weights = 4 * weights_of(classifier)
    activations = config.batch * classifier_cost(classifier).saved
    optimizer = optimizer_bytes(classifier, config.optim)
    return {"weights": weights, "gradients": weights, "optimizer": optimizer, "activations": activations}
