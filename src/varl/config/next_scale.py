"""Models that draw scale by scale: VAR, Infinity."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from varl.config.text import CaptionConfig, TextConfig
from varl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """Multi-scale residual VQ of VAR (arXiv 2404.02905)."""

    vocab: int = 4096
    channels: int = 32
    """Of a code vector (VAR's z_channels)."""
    width: int = 160
    """Base width of encoder and decoder (VAR's ch)."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width per level; each level after the first halves the picture."""
    blocks: int = 2
    shared_phi: int = 4
    """How many residual convolutions the scales share: 0 is one each, 1 is one for all."""
    phi_ratio: float = 0.5
    """Share of the convolution in phi (VAR's quant_resi)."""
    attention: bool = True
    """Self-attention at the coarsest level, as released. Small fast tokenizers do without."""
    patch: int = 1
    """Pixels per side folded into channels before the first convolution; 1 as released. 4 puts every convolution on the token grid."""

    @property
    def stride(self) -> int:
        """Pixels per token and side."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NextScaleConfig:
    """VAR's transformer, class-conditional as released, or reading characters."""

    depth: int = 16
    width: int = 1024
    heads: int = 16
    grids: tuple[tuple[int, int], ...] = tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    """(h, w) of each scale, coarse to fine; need not be square."""
    mlp_ratio: float = 4.0
    shared_adaln: bool = False
    """One AdaLN projection for all blocks (VAR-d36)."""
    attn_l2_norm: bool = True
    num_classes: int | None = None
    """Class-conditional, if set."""
    text: TextConfig | None = None
    """Text-conditional, if set."""
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self) -> None:
        if not self.grids or any(min(grid) < 1 for grid in self.grids):
            raise ConfigError(f"model.grids={list(self.grids)}: every scale needs at least 1x1 token. Give (h, w) pairs, coarse to fine.")
        if any(a[0] > b[0] or a[1] > b[1] for a, b in zip(self.grids, self.grids[1:], strict=False)):
            raise ConfigError(f"model.grids={list(self.grids)}: a later scale is smaller than an earlier one. Order them coarse to fine.")
        if self.width % self.heads:
            raise ConfigError(f"model.width={self.width} is no multiple of model.heads={self.heads}. Change one of the two.")
        if (self.num_classes is None) == (self.text is None):
            raise ConfigError("model: set exactly one of num_classes (class-conditional) and text (text-conditional).")

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        stride = self.tokenizer.stride
        return self.grids[-1][0] * stride, self.grids[-1][1] * stride


@dataclass(frozen=True, slots=True, kw_only=True)
class BSQConfig:
    """Infinity's multi-scale binary spherical quantizer (arXiv 2412.04431): no codebook, the sign of every channel is a bit. The defaults
    are those of the 2B model; the 8B model has 14 channels, multipliers (1, 2, 4, 4) and 2 cells."""

    vocab: ClassVar[int] = 2
    """Of a bit."""
    attention: ClassVar[bool] = False
    """There is none."""
    channels: int = 32
    """Bits of a cell."""
    width: int = 128
    """Base width of encoder and decoder."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    """Width per level; each level after the first halves the picture."""
    blocks: int = 2
    patch: int = 1
    """Pixels per side folded into channels before the first convolution; 1 as released."""
    cells: int = 1
    """Cells per token and side (the 8B model's spatial patchify): a token is the bits of cells x cells neighbours."""

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.channels, self.width, self.blocks, self.patch, self.cells, *self.multipliers) < 1:
            raise ConfigError("tokenizer: channels, width, multipliers, blocks, patch and cells must be 1 or more each.")

    @property
    def bits(self) -> int:
        """d, of a token."""
        return self.channels * self.cells**2

    @property
    def stride(self) -> int:
        """Pixels per token and side."""
        return self.cells * self.patch * 2 ** (len(self.multipliers) - 1)


_INFINITY_GRIDS: dict[float, str] = {
    1.0: "1,1 2,2 4,4 6,6 8,8 12,12 16,16 20,20 24,24 32,32 40,40 48,48 64,64",
    1.25: "1,1 2,2 3,3 5,4 10,8 15,12 20,16 25,20 30,24 35,28 45,36 55,44 70,56",
    1.333: "1,1 2,2 4,3 8,6 12,9 16,12 20,15 24,18 28,21 36,27 48,36 60,45 72,54",
    1.5: "1,1 2,2 3,2 6,4 9,6 15,10 21,14 27,18 33,22 39,26 48,32 63,42 78,52",
    1.75: "1,1 2,2 3,3 7,4 11,6 14,8 21,12 28,16 35,20 42,24 56,32 70,40 84,48",
    2.0: "1,1 2,2 4,2 6,3 10,5 16,8 22,11 30,15 38,19 46,23 60,30 74,37 90,45",
    2.5: "1,1 2,2 5,2 10,4 15,6 20,8 25,10 30,12 40,16 50,20 65,26 80,32 100,40",
    3.0: "1,1 2,2 6,2 9,3 15,5 21,7 27,9 36,12 45,15 54,18 72,24 90,30 111,37",
}
"""(h, w) of each scale of a megapixel, by height / width; pictures wider than high have them turned."""


INFINITY_SCALES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""How many of them smaller pictures have."""


def infinity_grids(pixels: str = "1M", ratio: float = 1.0) -> tuple[tuple[int, int], ...]:
    """The schedule that Infinity was trained on for pictures of so many `pixels` and this height / width: 1, 1.25, 1.333, 1.5, 1.75, 2,
    2.5, 3, or one of them turned round (0.5 is 2 turned). Raises ConfigError for any other."""
    known = {**{tall: (tall, False) for tall in _INFINITY_GRIDS}, **{int(1000 / t) / 1000: (t, True) for t in _INFINITY_GRIDS if t > 1}}
    if pixels not in INFINITY_SCALES or ratio not in known:
        raise ConfigError(
            f"Infinity was trained on no pictures of {pixels!r} pixels with height / width {ratio}. Choose of {', '.join(INFINITY_SCALES)} "
            f"and of {', '.join(map(str, sorted(known)))}."
        )
    tall, turned = known[ratio]
    grids = [tuple(map(int, grid.split(","))) for grid in _INFINITY_GRIDS[tall].split()][: INFINITY_SCALES[pixels]]
    return tuple((w, h) if turned else (h, w) for h, w in grids)


@dataclass(frozen=True, slots=True, kw_only=True)
class InfinityConfig:
    """Infinity's transformer (arXiv 2412.04431), which reads captions and draws bits. The defaults are the 2B model's, for square pictures
    of a megapixel."""

    num_classes: ClassVar[None] = None
    """It reads captions."""
    scales: ClassVar[int] = 15
    """That it has embeddings for."""
    depth: int = 32
    width: int = 2048
    heads: int = 16
    chunks: int = 8
    """Into which the released file groups its blocks; of no effect but on names."""
    mlp_width: int | None = None
    """None is Infinity's: 4 x `width`, rounded to a multiple of 256."""
    grids: tuple[tuple[int, int], ...] = infinity_grids()
    """(h, w) of each scale in tokens, coarse to fine."""
    reach: tuple[int, int] = (64, 64)
    """(h, w) that the positions of every scale are stretched to: as trained, the last grid of a megapixel of the same height / width, for
    smaller pictures too."""
    captions: CaptionConfig = CaptionConfig(tokens=512, lowercase=False)
    tokenizer: BSQConfig = BSQConfig()

    def __post_init__(self) -> None:
        if not 1 <= len(self.grids) <= self.scales or self.grids[0] != (1, 1):
            raise ConfigError(
                f"model.grids={list(self.grids)}: the first is 1x1, drawn from the caption alone, and there are {self.scales} at most."
            )
        if any(a[0] > b[0] or a[1] > b[1] for a, b in pairwise((*self.grids, self.reach))):
            raise ConfigError(
                f"model.grids={list(self.grids)}, model.reach={list(self.reach)}: one is smaller than the one before it. Order grids "
                "coarse to fine, and let model.reach be the last, or a larger one."
            )
        if self.width % (4 * self.heads):
            raise ConfigError(
                f"model.width={self.width} is no multiple of 4 x model.heads={self.heads}: half of a head's pairs of channels turn "
                "with the row, half with the column. Change one of the two."
            )
        if self.depth % self.chunks:
            raise ConfigError(f"model.depth={self.depth} is no multiple of model.chunks={self.chunks}. Change one of the two.")
        if self.captions.width % self.pool_channels or self.width % self.pool_heads:
            raise ConfigError(
                f"model.captions.width={self.captions.width}: makes heads of {self.pool_channels} channels each, into which it and "
                f"model.width={self.width} must divide. Change one of the two."
            )

    @property
    def hidden(self) -> int:
        """Width of the MLPs, resolved."""
        return self.mlp_width or max(1, round(4 * self.width / 256)) * 256

    @property
    def pool_channels(self) -> int:
        """Of a caption's features for each head that they are pooled with."""
        return 64 if self.width > 4096 else 128

    @property
    def pool_heads(self) -> int:
        return self.captions.width // self.pool_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        stride = self.tokenizer.stride
        return self.grids[-1][0] * stride, self.grids[-1][1] * stride
