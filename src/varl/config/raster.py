"""Models that draw token by token: LlamaGen, Janus-Pro."""

from dataclasses import dataclass
from typing import ClassVar

from varl.config.text import CaptionConfig
from varl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class VQConfig:
    """LlamaGen's VQ (arXiv 2406.06525): one code per cell of the grid, compared by cosine. The defaults are VQ-16; VQ-8 has multipliers
    (1, 2, 2, 4)."""

    vocab: int = 16384
    channels: int = 8
    """Of a code vector (LlamaGen's codebook_embed_dim)."""
    latent: int = 256
    """Channels between encoder and codebook, and between codebook and decoder (z_channels)."""
    width: int = 128
    """Base width of encoder and decoder."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width per level; each level after the first halves the picture."""
    blocks: int = 2
    attention: bool = True
    """Self-attention at the coarsest level, as released. Small fast tokenizers do without."""
    patch: int = 1
    """Pixels per side folded into channels before the first convolution; 1 as released. 4 puts every convolution on the token grid."""

    @property
    def stride(self) -> int:
        """Pixels per token and side."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RasterConfig:
    """LlamaGen's transformer (arXiv 2406.06525), class-conditional or reading captions."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    grid: tuple[int, int] = (16, 16)
    """(h, w) in tokens; need not be square."""
    mlp_width: int | None = None
    """Of the SwiGLU. None is LlamaGen's: 8/3 of `width`, rounded up to a multiple of 256."""
    num_classes: int | None = None
    """Class-conditional, if set."""
    captions: CaptionConfig | None = None
    """Text-conditional, if set."""
    tokenizer: VQConfig = VQConfig()

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ConfigError(f"model.grid={list(self.grid)}: needs at least 1x1 token. Give (h, w).")
        if self.width % (4 * self.heads):
            raise ConfigError(
                f"model.width={self.width} is no multiple of 4 x model.heads={self.heads}: half of a head's pairs of channels turn "
                "with the row, half with the column. Change one of the two."
            )
        if (self.num_classes is None) == (self.captions is None):
            raise ConfigError("model: set exactly one of num_classes (class-conditional) and captions (text-conditional).")

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU, resolved."""
        return self.mlp_width or -(-(8 * self.width // 3) // 256) * 256

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        stride = self.tokenizer.stride
        return self.grid[0] * stride, self.grid[1] * stride


@dataclass(frozen=True, slots=True, kw_only=True)
class JanusConfig:
    """What a policy must know of a Janus-Pro (arXiv 2501.17811). Its folder is as `transformers` has it, with all of it in config.json."""

    num_classes: ClassVar[None] = None
    """It reads captions."""
    depth: int
    width: int
    kv_heads: int
    head_width: int
    positions: int
    """Tokens of a caption and its picture, at most."""
    grid: tuple[int, int]
    """(h, w) in tokens."""
    bos: int
    boi: int
    """The token that a picture follows (<begin_of_image>)."""
    pad: int
    """What stands in place of the caption's tokens where there is none."""
    tokenizer: VQConfig

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        stride = self.tokenizer.stride
        return self.grid[0] * stride, self.grid[1] * stride
