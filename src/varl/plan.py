"""What a run will cost and what stands in its way, before any weight is loaded: the model is built without memory, on torch's meta device,
and asked what one picture costs."""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from varl.algorithms.var_rl import VARRL
from varl.build import build_algorithm, model_path, needs_reference, new_model
from varl.checkpoints.folder import MANIFEST, load_config, read_part
from varl.config import (
    DataConfig,
    FolderConfig,
    NextScaleConfig,
    OCRConfig,
    OptimConfig,
    PretrainConfig,
    PythonRewardConfig,
    RewardConfig,
    RunConfig,
    VARRLConfig,
    WordsConfig,
)
from varl.data.folder import read_folder
from varl.data.fonts import load_font
from varl.data.words import PALETTES, split, word_list
from varl.data.words import prompts as word_prompts
from varl.errors import CheckpointError, ConfigError, VarlError
from varl.models.next_scale import NextScale
from varl.policies.next_scale import NextScalePolicy
from varl.policies.sampling import CHUNK_ELEMENTS
from varl.rewards.ocr import choose_engine, open_engine
from varl.rewards.toy import load_callable
from varl.settings import from_yaml
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.text import encode_text
from varl.types import Prompt

FORWARD_AND_BACKWARD = 3
"""A training pass, in forward passes: the backward pass multiplies twice as much."""
LOGIT_COPIES = 3
"""Logits, their log-softmax and their gradient."""
PROMPTS_TRIED = 64
"""Prompts of drawn words that are given to the encoder; of a folder, all are."""

P = ParamSpec("P")
T = TypeVar("T")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    problems: tuple[str, ...]
    """What would stop the run, all of it."""
    warnings: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    """Which engine judges, and why."""
    grids: tuple[tuple[int, int], ...] = ()
    middle_step: int | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes by part at the moment when most is held."""
    available: int = 0
    """Bytes that the device has."""
    updates: tuple[Update, ...] = ()
    seconds: float | None = None
    """Of the whole run's multiplications at the measured speed of one large matrix product: a lower bound. Rewards are not in it."""

    @property
    def prefix_share(self) -> float:
        """Share of a picture's tokens in the prefix."""
        sizes = [h * w for h, w in self.grids]
        return sum(sizes[: self.middle_step]) / sum(sizes)

    def total(self, count: Callable[[Update], float]) -> float:
        """Over all updates of the run."""
        return float(sum(update.count * count(update) for update in self.updates))


def plan(config: RunConfig | PretrainConfig, *, calibrate: bool = True) -> Plan:
    """The plan of a run. `calibrate` measures the speed of a matrix product for 0.2 s, to say how long it takes at least.

        memory = weights 4N + gradients 4N + optimizer (AdamW 8N, Muon 4 per weight of a matrix inside blocks) + tokenizer 4N'
               + reference 4N + moving average 4N                                                    where there are any
               + rollout   key-value cache 2 x depth x width x L x rows x (4, bf16 2), rows doubled by guidance
               + training  what autograd saves in one micro-batch (counted; half in bf16), and 3 copies of a chunk of logits

    N parameters, L tokens of a picture; bytes. Of rollout and training only the larger where a step is one chunk: else the next chunk is
    drawn while one is trained on. Operations are counted by torch on the meta device, a training pass as 3 forward passes."""
    if isinstance(config, PretrainConfig):
        return _of_pretraining(config, calibrate)
    return _of_run(config, calibrate)


# ---- a picture's cost -------------------------------------------------------------------------------------------------------------------


def without_memory(config: NextScaleConfig) -> tuple[NextScale, MultiScaleVQ]:
    with torch.device("meta"):
        return new_model(config)


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


# ---- post-training ----------------------------------------------------------------------------------------------------------------------


def _of_run(config: RunConfig, calibrate: bool) -> Plan:
    problems: list[str] = []
    warnings: list[str] = []
    device = _try(problems, device_of, config.train.device) or torch.device("cpu")
    model_config = _try(problems, _model_config, config.model)
    prompts, heldout = _data(problems, config.data, "rl")
    rewards = [_try(problems, _reward, name, part.reward) for name, part in config.rewards.items()]
    if config.eval.every and isinstance(config.data, FolderConfig) and not config.data.heldout:
        problems.append(f"eval.every={config.eval.every}, but the data holds no prompts for evaluation. Set data.heldout, or eval.every=0.")
    if config.eval.every and heldout is not None and config.eval.samples > heldout:
        warnings.append(f"eval.samples={config.eval.samples}, but there are {heldout} held-out prompts or words: some come more than once.")
    said = tuple(line for line in rewards if line)
    if model_config is None:
        return Plan(problems=tuple(problems), warnings=tuple(warnings), rewards=said)
    model, tokenizer = without_memory(model_config)
    policy = _try(problems, NextScalePolicy, model, tokenizer, sample_law=config.sample_law, score_law=config.score_law)
    _check_prompts(problems, prompts, model_config)
    algorithm = None if policy is None else _try(problems, build_algorithm, config.algorithm, policy)
    m = _try(problems, algorithm.middle, policy.layout) if policy and isinstance(algorithm, VARRL) else None
    if isinstance(config.data, WordsConfig) and config.data.image_size != model_config.image_size:
        warnings.append(
            f"data.image_size={config.data.image_size}, but the model draws {model_config.image_size}: "
            "boxes are laid out for another shape."
        )
    if algorithm is None or (isinstance(algorithm, VARRL) and m is None):
        return Plan(problems=tuple(problems), warnings=tuple(warnings), rewards=said, grids=model_config.grids)
    updates = _updates(config, model, tokenizer, m)
    memory = _memory(config, model, tokenizer, m)
    plan = Plan(
        problems=tuple(problems),
        warnings=(*warnings, *_doubts(config, updates)),
        rewards=said,
        grids=model_config.grids,
        middle_step=m,
        parameters={"transformer": weights_of(model), "tokenizer": weights_of(tokenizer)},
        memory=memory,
        available=device_memory(device),
        updates=updates,
    )
    return _finished(plan, device, config.train.dtype, model_config.width, calibrate)


def _updates(config: RunConfig, model: NextScale, tokenizer: MultiScaleVQ, m: int | None) -> tuple[Update, ...]:
    """How often each kind of update is made, and what one costs."""
    prompts, algorithm, steps = config.train.prompts_per_step, config.algorithm, config.train.steps
    grpo = algorithm.grpo if isinstance(algorithm, VARRLConfig) else algorithm
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
        return (update("all", steps, 0, pictures, [(pictures, whole, tokens)]),)
    finished = pictures * algorithm.num_continuations
    siblings = [(finished, whole, tokens)] if algorithm.tree_reuse else []
    shared = prompts if algorithm.shared_prefix_baseline else pictures
    cycle = algorithm.prefix_updates + algorithm.suffix_updates
    prefix_steps = steps // cycle * algorithm.prefix_updates + min(steps % cycle, algorithm.prefix_updates)
    both = (
        update("prefix", prefix_steps, pictures, finished, [(pictures, start, start_tokens), *siblings]),
        update("suffix", steps - prefix_steps, shared, pictures, [(pictures, whole, tokens)]),
    )
    return tuple(kind for kind in both if kind.count)


def _memory(config: RunConfig, model: NextScale, tokenizer: MultiScaleVQ, m: int | None) -> dict[str, int]:
    algorithm, c, size = config.algorithm, model.config, 2 if config.train.dtype == "bfloat16" else 4
    grpo = algorithm.grpo if isinstance(algorithm, VARRLConfig) else algorithm
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
    training = _training_bytes(model, scales, rows, size)
    if chunk < config.train.prompts_per_step * group:  # the next chunk is drawn while one is trained on
        return _held(memory | cache | training)
    return _held(memory | max(cache, training, key=lambda part: sum(part.values())))


def _training_bytes(model: NextScale, scales: int, rows: int, size: int) -> dict[str, int]:
    tokens, vocab = model.ends[scales - 1], model.config.tokenizer.vocab
    logits = min(rows * tokens * vocab, max(CHUNK_ELEMENTS, tokens * vocab))
    return {"activations": rows * transformer_cost(model, scales).saved * size // 4, "logits": LOGIT_COPIES * 4 * logits}


def _held(memory: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in memory.items() if size}


def _doubts(config: RunConfig, updates: Sequence[Update]) -> list[str]:
    """Settings that work, and probably were not meant."""
    train, algorithm = config.train, config.algorithm
    grpo = algorithm.grpo if isinstance(algorithm, VARRLConfig) else algorithm
    group = grpo.num_generations * (algorithm.num_continuations if isinstance(algorithm, VARRLConfig) else 1)
    most = max(update.judged for update in updates)
    doubts = []
    if train.rollouts_per_backward > most:
        doubts.append(
            f"train.rollouts_per_backward={train.rollouts_per_backward} is more than the {most} pictures of a step: a step is one piece."
        )
    if grpo.rollouts_per_chunk < group:
        doubts.append(
            f"rollouts_per_chunk={grpo.rollouts_per_chunk} is less than a group of {group}, which is never split: chunks hold {group}."
        )
    if most <= max(grpo.rollouts_per_chunk, group):
        doubts.append(
            f"all {most} pictures of a step are one chunk: no rollout hides the time of a reward. Lower rollouts_per_chunk to overlap them."
        )
    if train.save_every > train.steps:
        doubts.append(f"train.save_every={train.save_every} is beyond the last of {train.steps} steps: a kill loses everything.")
    if train.optim.warmup_steps >= train.steps:
        doubts.append(f"train.optim.warmup_steps={train.optim.warmup_steps}: the run of {train.steps} steps never leaves the warm-up.")
    if config.sample_law != config.score_law:
        doubts.append("sample_law and score_law differ: what is drawn is not what is trained. The metrics sampling/law_* say by how much.")
    return doubts


# ---- pre-training -----------------------------------------------------------------------------------------------------------------------


def _of_pretraining(config: PretrainConfig, calibrate: bool) -> Plan:
    problems: list[str] = []
    device = _try(problems, device_of, config.device) or torch.device("cpu")
    if config.init is not None:
        found = _try(problems, _model_config, config.init)
        if found not in (None, config.model):
            problems.append(f"init={config.init!r} holds a model of another config than `model`. Copy `model` from its config.yaml.")
    _check_prompts(problems, _data(problems, config.data, "pretrain")[0], config.model)
    if isinstance(config.data, WordsConfig) and config.data.image_size != config.model.image_size:
        problems.append(
            f"data.image_size={config.data.image_size}, but the model's grids and stride make "
            f"{config.model.image_size} pixels. Make them equal."
        )
    model, tokenizer = without_memory(config.model)
    whole, tokens, size = transformer_cost(model, len(model.ends)), model.ends[-1], 2 if config.dtype == "bfloat16" else 4
    picture = autoencoder_cost(tokenizer, config.model.image_size)
    updates = (
        Update(
            name="tokenizer",
            count=0 if config.init else config.tokenizer_steps,
            judged=0,
            drawn=0,
            trained=config.tokenizer_batch * tokens,
            flops={"train": FORWARD_AND_BACKWARD * config.tokenizer_batch * picture.flops},
        ),
        Update(
            name="transformer",
            count=config.steps,
            judged=0,
            drawn=0,
            trained=config.batch * tokens,
            flops={"train": FORWARD_AND_BACKWARD * config.batch * whole.flops},
        ),
    )
    weights = 4 * weights_of(model)
    memory = {
        "weights": weights,
        "gradients": weights,
        "optimizer": optimizer_bytes(model, config.optim),
        "tokenizer, its gradients and optimizer": 16 * weights_of(tokenizer),
    }
    tokenizer_phase = {"activations": config.tokenizer_batch * picture.saved * size // 4}
    transformer_phase = _training_bytes(model, len(model.ends), config.batch, size)
    plan = Plan(
        problems=tuple(problems),
        grids=config.model.grids,
        parameters={"transformer": weights_of(model), "tokenizer": weights_of(tokenizer)},
        memory=_held(memory | max(tokenizer_phase, transformer_phase, key=lambda part: sum(part.values()))),
        available=device_memory(device),
        updates=tuple(update for update in updates if update.count),
    )
    return _finished(plan, device, config.dtype, config.model.width, calibrate)


# ---- what is missing --------------------------------------------------------------------------------------------------------------------


def _try(problems: list[str], fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What `fn` returns; where it cannot, its error joins the problems."""
    try:
        return fn(*args, **kwargs)
    except VarlError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None


def _model_config(name: str) -> NextScaleConfig:
    """The model's config, after every file beside it was found to have the size that was written; hashes are checked when it is loaded."""
    path = model_path(name)
    manifest = json.loads(read_part(path, MANIFEST))
    sizes = {file: (path / file).stat().st_size if (path / file).is_file() else 0 for file in manifest}
    wrong = [f"{file} has {size:,} bytes of {manifest[file]['bytes']:,}" for file, size in sizes.items() if size != manifest[file]["bytes"]]
    if wrong:
        raise CheckpointError(f"model={name!r}: not whole: {'; '.join(wrong)}. Copy or save the model folder again.")
    return from_yaml(load_config(path), NextScaleConfig)


def _data(problems: list[str], data: DataConfig, part: str) -> tuple[Sequence[Prompt], int | None]:
    """Some of the prompts that the run will see, and the number of held-out prompts or words; None where there are none to speak of. Every
    face, palette, list and folder that is missing joins the problems."""
    if isinstance(data, FolderConfig):
        held = _try(problems, read_folder, data.heldout) if data.heldout else None
        return _try(problems, read_folder, data.path) or (), None if held is None else len(held)
    known = len(problems)
    for name in data.fonts:
        _try(problems, load_font, name, 12)
    problems += [f"palette {name!r}: unknown. Known: {', '.join(PALETTES)}." for name in data.palettes if name not in PALETTES]
    words = _try(problems, lambda: split(word_list(data), data))
    if words is None:
        return (), None
    some = None if len(problems) > known else _try(problems, word_prompts, getattr(words, part), data, PROMPTS_TRIED, data.seed)
    return some or (), len(words.heldout)


def _check_prompts(problems: list[str], prompts: Sequence[Prompt], model: NextScaleConfig) -> None:
    """Whether the encoder knows every character and attribute."""
    text = model.text
    if text is not None and prompts:
        _try(problems, encode_text, [p.text for p in prompts], [p.style for p in prompts], text)


def _reward(name: str, config: RewardConfig) -> str:
    """Who judges. The engine is opened, the callable found."""
    match config:
        case OCRConfig():
            engine, why = choose_engine(config.engine)
            open_engine(engine)
            return f"{name}: {why}"
        case PythonRewardConfig():
            load_callable(config.target)
            return f"{name}: {config.target}"


# ---- in words ---------------------------------------------------------------------------------------------------------------------------


def _finished(plan: Plan, device: torch.device, dtype: str, width: int, calibrate: bool) -> Plan:
    """`plan` with its time, and the warning that it does not fit."""
    seconds, warnings = None, plan.warnings
    if calibrate:
        speed = matmul_speed(device, torch.bfloat16 if dtype == "bfloat16" else torch.float32, width)
        seconds = plan.total(lambda update: sum(update.flops.values())) / speed
    held = sum(plan.memory.values())
    if held > plan.available:
        warnings = (
            *warnings,
            f"about {in_bytes(held)} would be held, and the {device.type} has {in_bytes(plan.available)}: lower rollouts_per_backward and "
            "rollouts_per_chunk.",
        )
    return replace(plan, seconds=seconds, warnings=warnings)


def in_bytes(value: int | float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def in_time(seconds: int | float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{seconds:.2g} s"


def format_plan(plan: Plan) -> str:
    """The plan as text, one fact a line."""
    rows = [("problem", line) for line in plan.problems]
    if plan.updates:
        rows += _cost_rows(plan)
    rows += [("reward", line) for line in plan.rewards]
    rows += [("warning", line) for line in plan.warnings]
    if not plan.problems:
        rows.append(("", "nothing is missing"))
    return "\n".join(f"{name:<12}{line}" for name, line in rows)


def _cost_rows(plan: Plan) -> Iterable[tuple[str, str]]:
    tokens = sum(h * w for h, w in plan.grids)
    yield "picture", f"{tokens} tokens on {len(plan.grids)} scales: " + ", ".join(f"{h}x{w}" for h, w in plan.grids)
    if plan.middle_step is not None:
        yield "prefix", f"the first {plan.middle_step} scales hold {plan.prefix_share:.1%} of the tokens"
    for u in plan.updates:
        flops = ", ".join(f"{phase} {flops:.2e}" for phase, flops in u.flops.items())
        drawn = f"{u.judged:,} pictures judged, {u.drawn:,} tokens drawn, " if u.judged else ""
        yield "step", f"{u.count:,} x {u.name}: {drawn}{u.trained:,} tokens trained on; operations: {flops}"
    judged, drawn = plan.total(lambda u: u.judged), plan.total(lambda u: u.drawn)
    made = f"{judged:,.0f} pictures and reward calls, {drawn:,.0f} tokens drawn, " if judged else ""
    yield "run", f"{plan.total(lambda u: 1):,.0f} steps, {made}{plan.total(lambda u: u.trained):,.0f} tokens trained on"
    yield "parameters", ", ".join(f"{name} {number:,}" for name, number in plan.parameters.items())
    parts = ", ".join(f"{name} {in_bytes(number)}" for name, number in plan.memory.items())
    yield "memory", f"about {in_bytes(sum(plan.memory.values()))} of {in_bytes(plan.available)}: {parts}"
    if plan.seconds is not None:
        step = plan.seconds / plan.total(lambda u: 1)
        yield (
            "time",
            f"at least {in_time(plan.seconds)}, {in_time(step)} a step, if all ran at the speed of one large matrix product; rewards extra",
        )
