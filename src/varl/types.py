"""All that crosses from one room to another: a prompt, what a policy did, how it was judged, what to learn from it.

A picture is a trajectory of token actions laid out on steps. Letters: B rollouts, P prompts, G group, K completions, L image tokens,
S steps (raster index, scale, or unmasking round), R text regions, V vocabulary, D width, H W pixels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, groupby
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from varl.rng import Stream

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in shares of the picture, 0 to 1, y downwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A line of text that the picture shall show, and where, if that is known."""

    text: str
    box: Box | None = None


Position = Literal["left of", "right of", "above", "below", "next to"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Objects of one class that the picture shall show."""

    name: str
    """The class: "dog", "traffic light"."""
    count: int = 1
    """So many or more."""
    colour: str | None = None
    attributes: tuple[str, ...] = ()
    """What else they are: "wooden", "round"."""
    position: tuple[Position, int] | None = None
    """Where they lie: ("left of", i) of the prompt's object i, which comes before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked of one picture. A policy reads the parts that its model was trained on, a reward the parts that it can check."""

    text: str = ""
    regions: tuple[Region, ...] = ()
    style: tuple[str, ...] = ()
    """Attributes from a closed vocabulary: a font, a palette."""
    label: int | None = None
    image: str | None = None
    """Path of a reference picture."""
    objects: tuple[Wanted, ...] = ()
    unwanted: tuple[Wanted, ...] = ()
    """What must not be there: `count` or more of a class."""

    @property
    def words(self) -> tuple[str, ...]:
        """The words that a reader should find, region by region."""
        return tuple(word for region in self.regions for word in region.text.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the tokens of a picture lie. Next-scale: one grid per step; raster and masked: one grid, many steps."""

    grids: tuple[tuple[int, int], ...]
    """(h, w) in tokens, coarse to fine."""
    steps: int
    """S: how many times the policy acts before the picture is done."""

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.grids)

    def cells(self) -> Float[Tensor, "L 4"]:
        """The box of each token in shares of the picture (x0, y0, x1, y1), grid after grid, row by row."""
        rows = []
        for h, w in self.grids:
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            rows.append(torch.stack([x / w, y / h, (x + 1) / w, (y + 1) / h], -1).reshape(-1, 4))
        return torch.cat(rows).float()


class _Batch:
    """Row selection shared by the batch types: every tensor and tuple field whose first axis is B."""

    __slots__ = ()

    def rows(self, index: Sequence[int]) -> Any:
        at = torch.as_tensor(list(index), dtype=torch.long)

        def pick(value: Any) -> Any:
            match value:
                case Tensor():
                    return value[at.to(value.device)]
                case tuple():
                    return tuple(value[i] for i in index)
                case _Batch():
                    return value.rows(index)
                case dict():
                    return {name: pick(part) for name, part in value.items()}
            return value

        return replace(self, **{f.name: pick(getattr(self, f.name)) for f in fields(self) if not f.metadata.get("whole")})  # type: ignore[type-var]

    def beside(self, further: Any) -> Any:
        """Each row, followed by its own: `further` has len(further) / B rows for each of them, side by side."""
        count, copies = len(self), len(further) // len(self)  # type: ignore[arg-type]

        def join(first: Any, second: Any) -> Any:
            match first:
                case Tensor():
                    return torch.cat([first, second])
                case tuple():
                    return first + second
                case _Batch():
                    names = [f.name for f in fields(first) if not f.metadata.get("whole")]  # type: ignore[arg-type]
                    return replace(first, **{name: join(getattr(first, name), getattr(second, name)) for name in names})  # type: ignore[type-var]
                case dict():
                    return {name: join(part, second[name]) for name, part in first.items()}
            return first

        return join(self, further).rows([row for i in range(count) for row in (i, *range(count + i * copies, count + (i + 1) * copies))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain(_Batch):
    """Of tokens that are not chosen at once but by N moves each, the last of which ends at the token: what is known of every move."""

    logp: Float[Tensor, "B L N"]
    """Log-density of each move, summed over its d numbers; nats, under the law that is scored. Of no meaning where the move is not drawn
    but computed."""
    scored: Bool[Tensor, "B L N"]
    """Moves that count: `Rollout.logp` and what `Policy.score` gives are sums over these, and it costs no more than they do. As drawn: all
    admissible ones, the same for every token, which leaves out those without noise. None for tokens that are not `sampled`."""
    sample_logp: Float[Tensor, "B L N"] | None = None
    """As `logp`, under the law that was drawn from, where that is another one."""
    settled: Int[Tensor, "B L"] | None = None
    """The step that put the token into the picture, where tokens are looked at in another one: at step i, those settled before i are
    known. Else that is `Rollout.step`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(_Batch):
    """What the policy did on B prompts, and all it needs to score it again."""

    prompts: tuple[Prompt, ...]
    actions: Tensor
    """Family-private: ids [B, L], bits [B, L, d]; or denoising paths [B, L, N+1, d], whose last entry is the token."""
    logp: Float[Tensor, "B L"]
    """Nats, under the law that is scored; what `Policy.score` must give again before the first update."""
    step: Int[Tensor, "B L"]
    """The step that chose the token."""
    sampled: Bool[Tensor, "B L"]
    """False where the token was given and not chosen: a shared prefix."""
    index: Int[Tensor, " B"]
    """Global sample index, the row's random address."""
    sample_logp: Float[Tensor, "B L"] | None = None
    """Nats, under the law that was drawn from, where that is another one."""
    context: Tensor | None = None
    """Teacher-forced inputs (VA-pi), where they are not the actions; the tokens [B, L, d] whose paths were drawn anew (MAR-GRPO)."""
    chain: Chain | None = None
    """Where a token is chosen by a chain of moves."""
    state: Any = field(default=None, metadata={"whole": True}, repr=False)
    """What a branching policy needs to go on from here: its caches, of exactly these rows."""

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Sequence[int]) -> "Rollout":
        return replace(_Batch.rows(self, index), state=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(_Batch):
    """A rollout under the policy as it is now."""

    logp: Float[Tensor, "B L"]
    """Differentiable; nats; fp32."""
    entropy: Float[Tensor, "B L"]
    """Of the law each token was scored under; nats; no gradient."""
    ref_logp: Float[Tensor, "B L"] | None = None
    """Of the reference model, where there is one."""
    kl: Float[Tensor, "B L"] | None = None
    """Analytic KL(policy || reference) of each token's law, differentiable, where there is a reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A piece of text that a reader saw in a picture."""

    text: str
    confidence: float
    """0 to 1."""
    box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement(_Batch):
    """How good B pictures are, and where. NaN is a judgement that failed; it is not a bad picture."""

    value: Float[Tensor, " B"]
    parts: dict[str, Float[Tensor, " B"]] = field(default_factory=dict)
    """Named components before weights, each in its own unit, for the metrics."""
    region_value: Float[Tensor, "B R"] | None = None
    """Where `value` is a sum over regions: each region's share. NaN pads pictures with fewer regions."""
    region_box: Float[Tensor, "B R 4"] | None = None
    """The region's box, in shares of the picture; NaN where there is none."""
    found: tuple[tuple[Found, ...], ...] | None = None
    """What was read in each picture."""


WATCHED = "monitor/"
"""So begin the names of parts that are measured beside the reward, and never learned from."""

RewardFn = Callable[[Float[Tensor, "B 3 H W"], Sequence[Prompt]], Float[Tensor, " B"] | Judgement]
"""Pixels in [0, 1] and prompts in, one float each out (NaN: failed), or a Judgement if it can say where."""


def groups(prompts: Sequence[Prompt], group: int | None) -> list[range]:
    """The rows of each group: `group` side by side, or if that is not said, those of equal prompts side by side."""
    sizes = [len(list(same)) for _, same in groupby(prompts)] if group is None else [group] * (len(prompts) // group)
    return [range(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]


@runtime_checkable
class GroupRewardFn(Protocol):
    """A RewardFn to which it matters which pictures are a group: it compares them, or looks at some of each."""

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"] | Judgement: ...

    def of_groups(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt], group: int | None) -> Float[Tensor, " B"] | Judgement:
        """A group is `group` pictures side by side; None: those of equal prompts side by side."""
        ...


@runtime_checkable
class Judge(Protocol):
    """A reward that is asked now and answers later, so that the next pictures are drawn meanwhile."""

    def submit(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt], group: int | None = None) -> "Future[Judgement]":
        """Of whole groups: `group` pictures side by side are one, or if that is not said, those of equal prompts side by side."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch(_Batch):
    """What to learn from B rollouts: the objective is the sum over tokens of weight * surrogate(advantage) - beta * kl_weight * KL."""

    rollout: Rollout
    advantage: Float[Tensor, "B L"]
    """Per token, because credit may be local (a text region's own advantage)."""
    weight: Float[Tensor, "B L"]
    """Stage x PANW x mask; 0 where nothing is to be learned from the reward."""
    kl_weight: Float[Tensor, "B L"]
    judgement: Judgement
    size: Float[Tensor, " B"]
    """Each row's share of the denominator: the loop divides the gradient once, by the sum of sizes over all pieces and ranks."""
    stage: str = field(default="all", metadata={"whole": True})
    """all, prefix or suffix."""
    metrics: Mapping[str, float] = field(default_factory=dict, metadata={"whole": True})
    shown: Mapping[str, Float[Tensor, "B L"]] = field(default_factory=dict)
    """What the algorithm says of each token, for the report; no part of learning."""

    def __len__(self) -> int:
        return len(self.rollout)

    def split(self, rollouts: int) -> "list[TrainBatch]":
        """Pieces of at most `rollouts` rows. The pieces' metrics are those of the whole."""
        return [self.rows(range(i, min(i + rollouts, len(self)))) for i in range(0, len(self), rollouts)]


@runtime_checkable
class Policy(Protocol):
    """A model and its tokenizer, as something that acts, scores what it did, and shows it."""

    @property
    def module(self) -> nn.Module:
        """What is trained; every parameter that requires grad."""
        ...

    @property
    def layout(self) -> Layout: ...

    def rollout(self, prompts: Sequence[Prompt], rng: Stream) -> Rollout:
        """Draw one picture per prompt from the sample law. No grad."""
        ...

    def score(self, rollout: Rollout) -> Score:
        """Score it under the score law. Costs only the tokens that the rollout holds."""
        ...

    def decode(self, rollout: Rollout) -> Float[Tensor, "B 3 H W"]:
        """Pixels in [0, 1]. No grad."""
        ...


@runtime_checkable
class BranchingPolicy(Policy, Protocol):
    """What VMR needs: stop half-way, and finish the same picture several times."""

    def prefix(self, prompts: Sequence[Prompt], rng: Stream, *, steps: int) -> Rollout:
        """The first `steps` steps; the rollout holds only their tokens, and the state to go on from."""
        ...

    def complete(self, prefix: Rollout, rng: Stream) -> Rollout:
        """Whole pictures: `len(rng)` of them, len(rng) / B from each row of the prefix, side by side; given tokens are not `sampled`."""
        ...


@runtime_checkable
class TeacherForcedPolicy(Policy, Protocol):
    """What VA-pi needs: read a real picture, and draw every token from the same (noised) context."""

    def encode(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Rollout:
        """The pictures' own tokens as given actions; nothing in it is `sampled`, and nothing scored: `logp` is NaN."""
        ...

    def draw(self, given: Rollout, rng: Stream, *, prefix_noise: float) -> Rollout:
        """`len(rng)` draws, len(rng) / B of them sharing each row's context."""
        ...


@runtime_checkable
class RedrawingPolicy(Policy, Protocol):
    """What MAR-GRPO needs: draw the same tokens again from the same latents. Rows side by side that share prompt, context and steps share
    their latents too, so one forward pass serves them."""

    def redraw(self, rollout: Rollout, rng: Stream) -> Rollout:
        """`len(rng)` further denoising paths, len(rng) / B for each row, every token's from the latent that it was drawn from: `context`
        holds the tokens of the rollout, and nothing that is redrawn is seen by another token."""
        ...

    def preview(self, rollout: Rollout, rng: Stream, steps: Int[Tensor, "B K"]) -> Rollout:
        """What the row's `steps` made of every token that was not known then, B * K rows side by side, len(rng) of them: those that the
        step settled keep their path, the others are drawn, never shown and thrown away. `step` is that step for all tokens, `sampled` are
        those not known, `context` the tokens of the rollout, `chain.settled` its steps."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """Who gets how much credit. The loop is blind to which one it is."""

    num_iterations: int
    """Optimizer steps on each batch of rollouts; 1 is strictly on-policy."""

    def collect(self, policy: Policy, prompts: Sequence[Prompt], judge: Judge, rng: Stream, step: int) -> Iterator[TrainBatch]:
        """Act, judge, give credit: no grad. Yields a piece as soon as it can be trained on, while later pieces are still being judged.
        `rng` has one row per prompt; the policy is not changed before the last piece was taken."""
        ...

    def objective(self, policy: Policy, batch: TrainBatch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The sum to be maximised, not yet divided by size, and its metrics."""
        ...
