"""What a masked model and its diffusion head are asked, whichever family they are of."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@runtime_checkable
class Denoiser(Protocol):
    """A head as a chain of N Gaussian moves, from x ~ N(0, 1) to a token of d numbers. Made anew where weights or grad mode may have
    changed, and of use for any number of chains until then. All in fp32."""

    moves: int
    """N; move 0 is the first, from pure noise."""
    noisy: Bool[Tensor, " N"]
    """Moves that add noise, on the CPU; the others give their mean."""
    admissible: Bool[Tensor, " N"]
    """Of these, the ones whose density is well-conditioned, on the CPU: what is scored."""

    def read(self, z: Float[Tensor, "R E"]) -> Float[Tensor, "R W"]:
        """What the head makes of z: the same at every move, so it is computed once for a chain."""
        ...

    def law(
        self,
        x: Float[Tensor, "R d"],
        move: Int[Tensor, " R"],
        read: Float[Tensor, "R W"],
        unguided: Float[Tensor, "R W"] | None,
        guidance: Float[Tensor, "R 1"] | None,
    ) -> tuple[Float[Tensor, "R d"], Float[Tensor, "R d"]]:
        """(mean, log standard deviation) of each row's move from x; under guidance, where `unguided` is what was read for "none" and
        `guidance` its scale. The deviation of a move that is not noisy means nothing."""
        ...


@runtime_checkable
class MaskedModel(Protocol):
    """A transformer that says of every place of a picture what it expects there, having seen some of the tokens; and its head."""

    config: Any
    """Has `grid` (h, w), `image_size` (H, W), `num_classes` (None: it reads captions) and `tokenizer`."""
    tokens: int
    """L."""
    channels: int
    """d, of a token."""

    @property
    def head(self) -> nn.Module:
        """All that belongs to the diffusion head, and nothing else."""
        ...

    def schedule(self, steps: int) -> tuple[int, ...]:
        """How many tokens each step settles; there may be fewer steps than asked for. Raises ConfigError for what cannot be done."""
        ...

    def denoiser(self, steps: int) -> Denoiser:
        """The head as a chain of `steps` moves."""
        ...

    def condition(self, asked: Any, /) -> Any:
        """Of classes [B], where `num_classes` is "none"; or of captions, each the features [n, C] or ids [n] that were read of it, the
        empty caption being "none". What comes back can be indexed by rows like a tensor, and has a gradient."""
        ...

    def __call__(self, condition: Any, tokens: Float[Tensor, "B L d"], known: Int[Tensor, "B n"]) -> Float[Tensor, "B L E"]:
        """z of every place, having seen the tokens at the places `known`; the others are not read."""
        ...
