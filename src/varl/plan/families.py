"""What a picture costs in each model family, counted on torch's meta device, where nothing has memory. What was counted is kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, Protocol, assert_never, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from varl.checkpoints.model import OwnPair, Pair, fresh
from varl.config import (
    ActingConfig,
    HarmonConfig,
    InfinityConfig,
    JanusConfig,
    MARConfig,
    ModelConfig,
    NextScaleConfig,
    NOVAConfig,
    RasterConfig,
    UnmaskingConfig,
)
from varl.models.classifier import Classifier
from varl.models.harmon import Harmon
from varl.models.infinity import Infinity
from varl.models.janus import Janus
from varl.models.layers import recompute
from varl.models.lora import adapters
from varl.models.mar import MAR
from varl.models.masked import Denoiser, MaskedModel
from varl.models.next_scale import NextScale
from varl.models.nova import NOVA
from varl.models.raster import Condition, Raster
from varl.policies.acting import class_ids, require_text
from varl.policies.next_scale import model_ids
from varl.tokenizers.bsq import BSQ
from varl.tokenizers.kl import KL
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.vq import VQ
from varl.types import Layout, Prompt

Tokenizer = MultiScaleVQ | BSQ | VQ

CAPTION = 64
"""Tokens of a caption where the model can read far more; of a Janus, those of its chat template not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one row."""

    flops: float
    saved: int
    """Bytes that autograd keeps for the backward pass, weights not counted, in fp32."""


def cost(fn: Callable[[], Any], module: nn.Module, again: Sequence[nn.Module] = ()) -> Cost:
    """Of one call of `fn`, which runs `module` on the meta device. If the blocks `again` are computed again in the backward pass, their
    inputs are kept, and what one of them makes at once."""
    if again:
        return _computed_again(fn, module, again)
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    hooks = saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, hooks, FusedAttention():
        held = fn()  # keeps the graph, so that no storage is freed and its address used again
    del held
    return Cost(flops=float(counter.get_total_flops()), saved=sum(saved.values()))


class FusedAttention(TorchFunctionMode):
    """Attention as devices compute it, who keep queries, keys, values, what comes out and a number for each query, and never a matrix of
    all pairs, as the meta device does."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return Attended.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[-3] // k.shape[-3]
        out = q @ k.repeat_interleave(groups, -3).mT @ v.repeat_interleave(groups, -3)  # the operations, for the counter
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors[:3])


def _computed_again(fn: Callable[[], Any], module: nn.Module, blocks: Sequence[nn.Module]) -> Cost:
    whole, kinds = cost(fn, module), [type(block) for block in blocks]
    recompute(blocks)
    kept = cost(fn, module).saved  # the blocks' inputs too
    for block, kind in zip(blocks, kinds, strict=True):
        block.__class__ = kind
    return Cost(flops=whole.flops, saved=kept + (whole.saved - kept) // len(blocks))


# ---- transformers -----------------------------------------------------------------------------------------------------------------------


@runtime_checkable
class Family(Protocol):
    """A transformer and its tokenizer on the meta device, and what a plan asks of the transformer."""

    @property
    def model(self) -> NextScale | Infinity | Raster | Janus: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def layout(self) -> Layout:
        """As the policy has it."""
        ...

    @property
    def positions(self) -> int:
        """Of a whole picture, in the key-value cache of a row."""
        ...

    def tokens(self, steps: int) -> int:
        """Of the first `steps` steps."""
        ...

    def forward(self, steps: int) -> Cost:
        """A teacher-forced pass over the first `steps` steps of one picture, logits included."""
        ...

    def reading(self) -> float:
        """Operations on a prompt that its pictures share when they are drawn."""
        ...

    def drawing(self, steps: int) -> float:
        """Operations to draw the first `steps` steps of one picture with a cache, logits included."""
        ...


class NextScaleFamily:
    """A caption is taken to be `CAPTION` tokens long."""

    def __init__(self, model: NextScale | Infinity, tokenizer: MultiScaleVQ | BSQ, again: Sequence[nn.Module] = ()) -> None:
        self.model, self.tokenizer, self.again = model, tokenizer, again
        self.layout = Layout(grids=model.config.grids, steps=len(model.config.grids))
        self.positions = model.ends[-1]
        self.forward = cache(self._forward)

    def tokens(self, steps: int) -> int:
        return self.model.ends[steps - 1]

    def _forward(self, steps: int) -> Cost:
        model = self.model
        features = model.config.tokenizer.bits if isinstance(model, Infinity) else model.config.tokenizer.channels

        def run() -> Tensor:
            condition = model.condition(self._asked())
            hidden = model(condition, torch.empty(1, self.tokens(steps) - model.ends[0], features), steps)
            return model.logits(hidden, condition)  # type: ignore[arg-type]

        return cost(run, model, self.again)

    def _asked(self) -> Tensor:
        config = self.model.config
        if isinstance(config, InfinityConfig):
            return torch.empty(1, min(CAPTION, config.captions.tokens), config.captions.width)
        return torch.ones(1, dtype=torch.long) if config.text is None else torch.ones(1, 3 + config.text.max_length, dtype=torch.long)

    def reading(self) -> float:
        """Counted with each picture's pass."""
        return 0.0

    def drawing(self, steps: int) -> float:
        """A step sees what its scale sees in a teacher-forced pass."""
        return self.forward(steps).flops


class RasterFamily:
    """A caption is taken to be as long as the model can read; for a Janus, which can read books, `CAPTION`."""

    def __init__(self, model: Raster | Janus, tokenizer: VQ, again: Sequence[nn.Module] = ()) -> None:
        self.model, self.tokenizer, self.again = model, tokenizer, again
        self.layout = Layout(grids=(model.config.grid,), steps=model.tokens)
        self.prefix = model.prefix if isinstance(model, Raster) else min(model.empty + CAPTION, model.longest)
        self.positions = self.prefix + model.tokens - 1
        self.forward = cache(self._forward)

    def tokens(self, steps: int) -> int:
        return steps

    def _forward(self, steps: int) -> Cost:
        model = self.model
        return cost(lambda: model.logits(model(self._condition(), torch.ones(1, steps, dtype=torch.long))), model, self.again)

    def reading(self) -> float:
        return self._step(self._condition, None, self.prefix)

    def drawing(self, steps: int) -> float:
        """What a step costs grows linearly with the tokens before it, so that all of them cost as many as there are times the mean of the
        first and the last. The first token is drawn from what was read."""
        model, token = self.model, torch.ones(1, dtype=torch.long, device="meta")
        head = cost(lambda: model.logits(torch.empty(1, 1, model.config.width)), model).flops
        if steps == 1:
            return head

        def there() -> Condition:
            return Condition(tokens=torch.empty(1, self.prefix, model.config.width), there=None)

        first, last = (self._step(there, token, self.prefix + before + 1) for before in (0, steps - 2))
        return steps * head + (steps - 1) * (first + last) / 2

    def _step(self, condition: Callable[[], Condition], token: Tensor | None, length: int) -> float:
        """Operations of a token, or of the condition if there is none, after which there are `length` positions, without logits."""
        model = self.model

        def run() -> Tensor:
            asked = condition()
            held = model.cache(asked, length + 1 - self.prefix)
            held.length = length - (self.prefix if token is None else 1)
            return model.step(asked, token, held)

        return cost(run, model).flops

    def _condition(self) -> Condition:
        model = self.model
        if model.config.num_classes is not None:
            return model.condition(torch.ones(1, dtype=torch.long))
        return model.condition(model.none(self.prefix)[None])


class MaskedFamily:
    """A masked model, drawn as `unmasking` says: passes of its transformer, and moves of its head."""

    def __init__(self, model: MaskedModel, tokenizer: KL, unmasking: UnmaskingConfig, asked: Any, again: Sequence[nn.Module] = ()) -> None:
        """`asked` is what the model's `condition` reads for one prompt. Raises ConfigError for steps that cannot be."""
        self.model: Any = model
        self.tokenizer, self.asked = tokenizer, asked
        self.counts = model.schedule(unmasking.steps)
        """Tokens that each step settles."""
        self.known = (0, *accumulate(self.counts[:-1]))
        """Tokens that each step has seen."""
        self.layout = Layout(grids=(model.config.grid,), steps=len(self.counts))
        with torch.no_grad():
            self.denoiser = model.denoiser(unmasking.denoise_steps)
            with torch.device("meta"):
                self.given = model.condition(asked)
        self.moves, self.admissible = self.denoiser.moves, int(self.denoiser.admissible.sum())
        self.condition, self.making = cache(self._condition), cache(self._making)
        self.reading, self.moving = cache(self._reading), cache(self._moving)
        self.width = self._see(0).shape[-1]
        """E, of a token's latent."""
        self._counted = [cost(lambda n=n: self._see(n), self.model, again) for n in (0, 1, 2)]

    @property
    def steps(self) -> range:
        return range(self.layout.steps)

    def _condition(self) -> Cost:
        """What a prompt's pictures share."""
        return cost(lambda: self.model.condition(self.asked), self.model)

    def _making(self, *, learns: bool = False) -> float:
        """Operations to make the chain anew, for any number of tokens; with its backward pass, if it learns."""
        if not learns:
            return cost(lambda: self.model.denoiser(self.moves), self.model).flops
        return self._move(lambda: self.model.denoiser(self.moves), learns).flops - self.moving(learns=True).flops

    def seeing(self, known: int) -> Cost:
        """A pass of the transformer over a picture, having seen so many tokens: attention makes it a polynomial of degree 2 in them."""

        def at(values: Sequence[float]) -> float:
            zero, one, two = values
            return zero + known * (one - zero) + known * (known - 1) / 2 * (two - 2 * one + zero)

        return Cost(flops=at([c.flops for c in self._counted]), saved=round(at([float(c.saved) for c in self._counted])))

    def _reading(self, *, learns: bool | None = None) -> Cost:
        """The head's own reading of a token's latent, once for its chain; with its backward pass to the latent, and if it `learns` to its
        weights."""
        z = torch.empty(1, self.width, device="meta", requires_grad=True)
        return self._with_backward(self.denoiser.read, z, learns)

    def _moving(self, *, learns: bool | None = None) -> Cost:
        """One move of one token; with its backward pass as in `reading`."""
        return self._move(lambda: self.denoiser, learns)

    def _move(self, denoiser: Callable[[], Denoiser], learns: bool | None) -> Cost:
        x, move = torch.empty(1, self.model.channels, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
        read = torch.empty_like(self.denoiser.read(torch.empty(1, self.width, device="meta"))).requires_grad_()
        return self._with_backward(lambda read: denoiser().law(x, move, read, None, None)[0], read, learns)

    def _see(self, known: int) -> Tensor:
        with torch.device("meta"):
            tokens = torch.empty(1, self.model.tokens, self.model.channels)
            return self.model(self.given, tokens, torch.zeros(1, known, dtype=torch.long))

    def _with_backward(self, fn: Callable[[Tensor], Tensor], by: Tensor, learns: bool | None) -> Cost:
        def run() -> object:
            out = fn(by.clone())  # the counter cannot have a leaf for a module's input
            if learns is None:
                return out
            return torch.autograd.grad(out.sum(), [by, *(self.model.head.parameters() if learns else ())], allow_unused=True), out

        return cost(run, self.model)


AnyFamily = Family | MaskedFamily


def without_memory(config: ModelConfig) -> OwnPair:
    with torch.device("meta"):
        return fresh(config)


@lru_cache(maxsize=8)
def family_of(config: ModelConfig, unmasking: UnmaskingConfig | None = None, *, head_learns: bool = True, again: bool = False) -> AnyFamily:
    """Of a model of ours; `head_learns` is of masked models alone. With `again` blocks are computed again in the backward pass."""
    pair = without_memory(config)
    if isinstance(pair[0], MAR | NOVA):
        pair[0].head.requires_grad_(head_learns)
    return as_family(pair, unmasking, again=again)


def family_of_pair(pair: Pair, unmasking: UnmaskingConfig | None, *, head_learns: bool, again: bool) -> AnyFamily:
    """`family_of` its config; of a model whose config does not tell its language model, or one with adapters, what is counted is counted on
    the pair itself."""
    config = pair[0].config
    if isinstance(config, HarmonConfig | JanusConfig) or adapters(pair[0]):
        return as_family(pair, unmasking, again=again)
    return family_of(config, unmasking, head_learns=head_learns, again=again)


def as_family(pair: Pair, unmasking: UnmaskingConfig | None = None, *, again: bool = False) -> AnyFamily:
    """Of a pair on the meta device; `unmasking` is of masked models alone. Raises ConfigError for steps that such a model cannot take."""
    blocks = tuple(pair[0].blocks) if again else ()
    match pair:
        case (NextScale() as model, MultiScaleVQ() as tokenizer) | (Infinity() as model, BSQ() as tokenizer):
            return NextScaleFamily(model, tokenizer, blocks)
        case (Raster() | Janus() as model, VQ() as tokenizer):
            return RasterFamily(model, tokenizer, blocks)
        case (MAR() as model, KL() as tokenizer):
            label = torch.zeros(1, dtype=torch.long, device="meta")
            return MaskedFamily(model, tokenizer, unmasking or UnmaskingConfig(), label, blocks)
        case (NOVA() as model, KL() as tokenizer):
            captions = model.config.captions
            caption = torch.empty(min(CAPTION, captions.tokens), captions.width, device="meta")
            return MaskedFamily(model, tokenizer, unmasking or UnmaskingConfig(), [caption], blocks)
        case (Harmon() as model, KL() as tokenizer):
            caption = torch.zeros(min(CAPTION, model.longest), dtype=torch.long, device="meta")
            return MaskedFamily(model, tokenizer, unmasking or UnmaskingConfig(), [caption], blocks)
    assert_never(pair)


def require_readable(prompts: Sequence[Prompt], config: ActingConfig) -> None:
    """DataError for a prompt that the model cannot read. How long a caption is, its encoder alone knows."""
    match config:
        case NextScaleConfig():
            model_ids(prompts, config)
        case RasterConfig(num_classes=int() as classes) | MARConfig(num_classes=classes):
            class_ids(prompts, classes)
        case InfinityConfig() | RasterConfig() | NOVAConfig() | JanusConfig() | HarmonConfig():
            require_text(prompts)


# ---- tokenizers, alike in all families --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def decoder_cost(family: AnyFamily) -> Cost:
    """From one feature map to pixels."""
    tokenizer = family.tokenizer
    h, w = tokenizer.maps[-1] if isinstance(tokenizer, BSQ) else family.layout.grids[-1]
    fold = tokenizer.config.fold if isinstance(tokenizer, KL) else 1
    render = tokenizer.decode if isinstance(tokenizer, KL) else tokenizer.render
    return cost(lambda: render(torch.empty(1, tokenizer.config.channels, fold * h, fold * w)), tokenizer)


@lru_cache(maxsize=8)
def encoder_cost(family: Family) -> Cost:
    """From pixels to the nearest codes, each token's looked for once."""
    tokenizer, c, picture = family.tokenizer, family.tokenizer.config, (1, 3, *family.model.config.image_size)

    def run() -> tuple[Tensor, Tensor]:
        return tokenizer.features(torch.empty(picture)), torch.empty(family.layout.tokens, c.channels) @ torch.empty(c.channels, c.vocab)

    return cost(run, tokenizer)


@lru_cache(maxsize=8)
def autoencoder_cost(family: AnyFamily) -> Cost:
    """One picture through encoder and decoder."""
    tokenizer, picture = family.tokenizer, (1, 3, *family.model.config.image_size)
    if isinstance(tokenizer, KL):
        return cost(lambda: tokenizer.decode(tokenizer.encode(torch.empty(picture)).mean), tokenizer)
    return cost(lambda: tokenizer.render(tokenizer.features(torch.empty(picture))), tokenizer)


# ---- classifiers ------------------------------------------------------------------------------------------------------------------------


def classifier_cost(classifier: Classifier) -> Cost:
    """One picture to its classes."""
    picture = (1, 3, *classifier.config.image_size)
    return cost(lambda: classifier.classify(classifier(torch.empty(picture))), classifier)
