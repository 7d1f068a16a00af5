"""Every knob of a run: frozen dataclasses, no torch. Composed, never inherited; each field has one home, and says its unit and source."""

import math
import re
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import ClassVar, Literal

from varl.errors import ConfigError


def _demand(name: str, value: int | float, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value}: must be {wanted}.")


# ---- models -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """A learned character encoder. The picture's tokens look at the characters through cross-attention."""

    alphabet: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """Characters that a prompt may hold; a space separates words and `|` regions, and both are always understood."""
    styles: tuple[str, ...] = ()
    """Closed vocabulary of attributes (fonts, palettes) that a prompt may name."""
    max_length: int = 24
    """Longest prompt, in characters."""
    layers: int = 1
    """Self-attention layers over the characters."""


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
class CaptionConfig:
    """Captions as features of a frozen text encoder, one token each before the picture's. The defaults are flan-t5-xl's, as released."""

    tokens: int = 120
    """Longest caption, in the encoder's tokens."""
    width: int = 2048
    """Of a feature vector."""
    encoder: str = "google/flan-t5-xl"
    """What makes the features, a T5 for LlamaGen and Infinity, Phi-2 for NOVA: its name on the Hugging Face hub, looked for in the local
    cache, or a folder's path."""
    lowercase: bool = True
    """Whether captions are lower-cased first, as LlamaGen's are; Infinity's and NOVA's are not."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class KLConfig:
    """A KL autoencoder: a Gaussian over a vector per cell, and no codes. The defaults are MAR's (arXiv 2406.11838), KL-16; NOVA's
    are Stable Diffusion's, of which it takes 2 x 2 cells as a token."""

    channels: int = 16
    """Of a cell's vector."""
    width: int = 128
    """Base width of encoder and decoder."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width per level; each level after the first halves the picture."""
    blocks: int = 2
    attention: bool = True
    """Self-attention at the encoder's coarsest level, and in the middle of both, as released. Small fast ones do without."""
    levels_attend: bool = True
    """Whether the encoder's coarsest level has it too; Stable Diffusion's has it in the middle alone."""
    patch: int = 1
    """Pixels per side folded into channels before the first convolution; 1 as released. 4 puts every convolution on the token grid."""
    shift: float = 0.0
    """Subtracted from the vectors first."""
    scale: float = 0.2325
    """By which the vectors are multiplied to have variance 1 or so, which the diffusion head expects; as released, for KL-16."""
    fold: int = 1
    """Cells per token and side: NOVA's 2 makes a token of 2 x 2 vectors, one after the other."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"tokenizer.scale={self.scale}: must be above 0 and finite, 1 / the standard deviation of the latents or so.")
        _demand("tokenizer.fold", self.fold, self.fold >= 1, "1 or more")

    @property
    def stride(self) -> int:
        """Pixels per token and side."""
        return self.fold * self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def token_width(self) -> int:
        """d, numbers of a token."""
        return self.channels * self.fold**2


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionHeadConfig:
    """What MAR draws a token's vector with (arXiv 2406.11838): an MLP that removes noise. The defaults are MAR-B's."""

    depth: int = 6
    """Residual blocks."""
    width: int = 1024
    target: Literal["noise", "velocity"] = "noise"
    """What it learns to say of x_t = sqrt(a) x_0 + sqrt(1 - a) eps. noise: eps, and how far the step's variance lies between its bounds, as
    released. velocity: sqrt(a) eps - sqrt(1 - a) x_0 alone, with the posterior's variance, which is as well-conditioned at every step."""
    least_signal: float = 0.0
    """Least share a of the signal in x_t; 0 is the cosine schedule as released, whose last steps magnify every error of the network."""

    def __post_init__(self) -> None:
        if min(self.depth, self.width) < 1:
            raise ConfigError(f"head: depth={self.depth} and width={self.width} must be 1 or more.")
        _demand("head.least_signal", self.least_signal, 0 <= self.least_signal < 1, "at least 0 (as released) and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """A stack of transformer blocks, each of which sees all tokens; its MLPs are four times as wide."""

    depth: int = 12
    width: int = 768
    heads: int = 12

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.heads) < 1 or self.width % self.heads:
            raise ConfigError(f"depth={self.depth}, width={self.width}, heads={self.heads}: 1 or more each, and width a multiple of heads.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MARConfig:
    """MAR's transformer (arXiv 2406.11838), class-conditional. The defaults are MAR-B's, for 256 x 256 pixels."""

    encoder: ViTConfig = ViTConfig()
    """Reads the class and the tokens that are known."""
    decoder: ViTConfig = ViTConfig()
    """Sees all places."""
    head: DiffusionHeadConfig = DiffusionHeadConfig()
    grid: tuple[int, int] = (16, 16)
    """(h, w) in tokens; need not be square."""
    num_classes: int = 1000
    buffer: int = 64
    """Places before the picture's, all of which hold the class."""
    tokenizer: KLConfig = KLConfig()

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ConfigError(f"model.grid={list(self.grid)}: needs at least 1x1 token. Give (h, w).")
        if self.num_classes < 1 or self.buffer < 1:
            raise ConfigError(
                f"model: num_classes={self.num_classes} and buffer={self.buffer} must be 1 or more: what is asked for is a class, and it "
                "is read from the buffer."
            )
        _demand("model.tokenizer.fold", self.tokenizer.fold, self.tokenizer.fold == 1, "1: a MAR's token is one cell")

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        stride = self.tokenizer.stride
        return self.grid[0] * stride, self.grid[1] * stride


@dataclass(frozen=True, slots=True, kw_only=True)
class AncestralConfig:
    """A head that says the noise in x_t, drawn step by step (DDPM, arXiv 2006.11239), with the settings and names of diffusers'
    scheduler_config.json. 1000 steps are trained. The defaults are Stable Diffusion's."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """From beta_start to beta_end: evenly, evenly in sqrt(beta), or cosine (which takes no notice of them)."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    """Which of the 1000 are drawn: at an equal stride from 0, from the end, or from 0 to the end."""
    steps_offset: int = 0
    """Added to all of them where they are leading."""

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(f"head.drawn: betas from {self.beta_start} to {self.beta_end} must rise, between 0 and 1.")
        _demand("head.drawn.steps_offset", self.steps_offset, self.steps_offset >= 0, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    """A head that says the velocity from data to noise (rectified flow), drawn as a stochastic chain (arXiv 2505.05470)."""

    shift: float = 1.0
    """Noise levels s become shift s / (1 + (shift - 1) s): above 1, more of the steps are noisy ones."""

    def __post_init__(self) -> None:
        _demand("head.drawn.shift", self.shift, self.shift > 0, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class NOVAHeadConfig:
    """What NOVA draws a token with: an MLP that removes noise. The defaults are those of the 1024-pixel models of width 1024, with the
    sampler of the 512-pixel one."""

    depth: int = 6
    """Residual blocks."""
    width: int = 1024
    drawn: AncestralConfig | FlowConfig = AncestralConfig()

    def __post_init__(self) -> None:
        if min(self.depth, self.width) < 1:
            raise ConfigError(f"head: depth={self.depth} and width={self.width} must be 1 or more.")


NOVA_CAPTION = 512
"""Places that its table of "none" has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NOVAConfig:
    """NOVA's transformer (arXiv 2412.14169), of which VARL has what makes a single picture of a caption. The defaults are
    nova-d48w1024-sd512's."""

    num_classes: ClassVar[None] = None
    """It reads captions."""
    prefix: ViTConfig = ViTConfig(depth=16, width=1024, heads=16)
    """Reads the caption, and makes of it what comes before the picture (the video encoder)."""
    encoder: ViTConfig = ViTConfig(depth=32, width=1024, heads=16)
    """Sees the known tokens in its first half, all places in its second (the image encoder)."""
    head: NOVAHeadConfig = NOVAHeadConfig()
    grid: tuple[int, int] = (32, 32)
    """(h, w) in tokens, both even; need not be square."""
    rotary: bool = False
    """Positions turn queries and keys; else they are added to what is read."""
    motion: bool = False
    """Made for videos too: besides the caption it reads how much shall move, and how fast, which here is always what the authors set."""
    captions: CaptionConfig = CaptionConfig(tokens=256, width=2560, encoder="microsoft/phi-2", lowercase=False)
    tokenizer: KLConfig = KLConfig(channels=4, multipliers=(1, 2, 4, 4), levels_attend=False, scale=0.18215, fold=2)
    """Stable Diffusion's KL-8. SDXL's has scale 0.13025."""

    def __post_init__(self) -> None:
        if min(self.grid) < 2 or self.grid[0] % 2 or self.grid[1] % 2:
            raise ConfigError(f"model.grid={list(self.grid)}: the prefix has a place for every 2 x 2 tokens. Give an even (h, w).")
        if self.prefix.width != self.encoder.width:
            raise ConfigError(
                f"model: prefix.width={self.prefix.width} and encoder.width={self.encoder.width} must be the same: one reads the other."
            )
        if not self.rotary and self.encoder.width % 4:
            raise ConfigError(f"model.encoder.width={self.encoder.width}: added positions need a multiple of 4.")
        if self.rotary and any(part.width // part.heads % 32 for part in (self.prefix, self.encoder)):
            raise ConfigError(
                "model.rotary: of a head's pairs of channels 1/8 turn with time, 7/16 with the row and 7/16 with the column. Give heads "
                "that are a multiple of 32 wide."
            )
        if self.captions.tokens > NOVA_CAPTION:
            raise ConfigError(f"model.captions.tokens={self.captions.tokens}: NOVA has places for {NOVA_CAPTION}, at most.")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmonConfig:
    """What a policy must know of a Harmon (arXiv 2503.21979). Its folder is as its authors keep it, with Qwen2's config in config.json."""

    num_classes: ClassVar[None] = None
    """It reads captions."""
    mar: MARConfig
    """The MAR between whose halves the language model stands. Its classes are not used; its grid is the one that it was trained for."""
    width: int
    """Of the language model."""
    positions: int
    """Tokens of a caption, a picture and the buffer, at most."""
    grid: tuple[int, int]
    """(h, w) in tokens, of the pictures that are drawn."""

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ConfigError(f"model.grid={list(self.grid)}: needs at least 1x1 token. Give (h, w).")
        if (least := self.grid[0] * self.grid[1] + self.mar.buffer + 1) > self.positions:
            raise ConfigError(
                f"model.grid={list(self.grid)}: with {self.mar.buffer} tokens of buffer and a caption it takes {least} positions or more, "
                f"the language model has {self.positions}. Draw smaller pictures."
            )

    @property
    def tokenizer(self) -> KLConfig:
        return self.mar.tokenizer

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        stride = self.tokenizer.stride
        return self.grid[0] * stride, self.grid[1] * stride


ModelConfig = NextScaleConfig | InfinityConfig | RasterConfig | MARConfig | NOVAConfig
"""Of a model that VARL can make."""
ActingConfig = ModelConfig | JanusConfig | HarmonConfig
"""Of a model that a policy acts with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierConfig:
    """A small convolutional network that names what a picture shows. Its feature maps say how alike two pictures are, its last features how
    alike two sets of pictures are."""

    num_classes: int
    image_size: tuple[int, int]
    """(H, W) in pixels."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each convolution; each after the first sees the picture at half the size. The last is the number of features."""

    def __post_init__(self) -> None:
        _demand("model.num_classes", self.num_classes, self.num_classes >= 2, "2 or more")
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(f"model.widths={list(self.widths)}: needs one convolution at least, of 1 channel or more.")
        smallest = 2 ** (len(self.widths) - 1)
        if min(self.image_size) < smallest:
            raise ConfigError(
                f"model.image_size={list(self.image_size)}: {len(self.widths)} convolutions halve it {len(self.widths) - 1} times. Give "
                f"{smallest} pixels a side or more, or fewer widths."
            )


# ---- laws ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LawConfig:
    """How logits become the distribution of a token: guidance, temperature, top-k, top-p, in that order."""

    cfg_scale: tuple[float, ...] = (1.0,)
    """Guidance uncond + s * (cond - uncond); one value per step, or one for all. 1 is none and costs nothing."""
    temperature: float = 1.0
    temperature_ramp: tuple[float, ...] = (1.0,)
    """By which `temperature` is multiplied; one value per step, or one for all."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability; 1 keeps all."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"law.temperature={self.temperature}: must be above 0. For greedy decoding set top_k=1.")
        if not self.temperature_ramp or not min(self.temperature_ramp) > 0:
            raise ConfigError(f"law.temperature_ramp={list(self.temperature_ramp)}: must be above 0, one value per step or one for all.")
        if self.top_k < 0:
            raise ConfigError(f"law.top_k={self.top_k}: must be 0 (keep all) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"law.top_p={self.top_p}: must lie in (0, 1]; 1 keeps all tokens.")

    @property
    def guided(self) -> bool:
        return any(scale != 1.0 for scale in self.cfg_scale)

    def guidance(self, step: int) -> float:
        """cfg_scale of one step."""
        return self.cfg_scale[0] if len(self.cfg_scale) == 1 else self.cfg_scale[step]

    def heat(self, step: int) -> float:
        """Temperature of one step."""
        return self.temperature * (self.temperature_ramp[0] if len(self.temperature_ramp) == 1 else self.temperature_ramp[step])


def var_guidance(cfg: float, steps: int) -> tuple[float, ...]:
    """VAR's ramp as `cfg_scale`: 1 + cfg * i / (S - 1) at step i, none at the first."""
    return tuple(1.0 + cfg * i / max(steps - 1, 1) for i in range(steps))


def settled_counts(tokens: int, steps: int, rounding: Literal["floor", "round"] = "floor") -> tuple[int, ...]:
    """Tokens that each step of a masked model settles, by the cosine schedule, which leaves L cos(pi/2 (i+1)/n) of L tokens open after step
    i of n:

        floor   MAR (arXiv 2406.11838): rounded down, but at least one token at each step, and at least one left for the last
        round   NOVA: rounded to the nearest; a step that settles nothing is left out, so there may be fewer than n

    Together they are all L tokens."""
    if not 1 <= steps <= tokens:
        raise ConfigError(f"{steps} steps for {tokens} tokens: every step settles a token or more. Set 1 to {tokens} steps.")
    left, counts = tokens, []
    for i in range(steps):
        open_ = tokens * math.cos(math.pi / 2 * (i + 1) / steps)
        if i == steps - 1:
            after = 0
        else:
            after = round(open_) if rounding == "round" else max(1, min(left - 1, math.floor(open_)))
        counts.append(left - after)
        left = after
    return tuple(count for count in counts if count)


def mar_guidance(cfg: float, tokens: int, steps: int) -> tuple[float, ...]:
    """MAR's linear ramp as `cfg_scale`: 1 + (cfg - 1) * (share of tokens that are known after step i), where the last step counts one as
    unknown, as released."""
    known = accumulate(settled_counts(tokens, steps))
    return tuple(1.0 + (cfg - 1.0) * min(count, tokens - 1) / tokens for count in known)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmaskingConfig:
    """How a masked model draws a picture. The defaults are MAR's quick setting; the authors measure FID with 256 steps."""

    steps: int = 64
    """n, in which the tokens are settled, a few at first, by the cosine schedule."""
    denoise_steps: int = 100
    """T, in which each token is made of noise; so many of the 1000 that its head was trained on, evenly spread."""

    def __post_init__(self) -> None:
        _demand("unmasking.steps", self.steps, self.steps >= 1, "1 or more")
        _demand("unmasking.denoise_steps", self.denoise_steps, 1 <= self.denoise_steps <= 1000, "1 to 1000")


# ---- algorithms ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig:
    """Group-relative policy optimisation (arXiv 2402.03300), with the names of TRL."""

    num_generations: int = 16
    """G, rollouts per prompt. The group is the baseline, so at least 2."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """Over what the token sum is divided: each picture's own tokens (grpo), a constant length (dr_grpo), all active tokens of the step
    (dapo) or of the micro-batch (bnpo). Pictures have equal lengths, so they differ only where tokens are masked."""
    importance_sampling_level: Literal["token", "step", "sequence"] = "token"
    """What the clipped ratio spans: a token, the geometric mean of a step's tokens, or of all (GSPO)."""
    epsilon: float = 0.2
    epsilon_high: float | None = None
    """Upper clip, if it is another one (DAPO's clip-higher)."""
    beta: float = 0.0
    """KL weight to the reference model; 0 needs no reference."""
    kl_estimator: Literal["analytic", "k1", "k2", "k3"] = "analytic"
    """As a loss: analytic and k2 have the gradient of the reverse KL, k3 that of the forward KL, k1 none at all in expectation."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """By which standard deviation advantages are divided."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum", "running_scale"] = "sum_then_normalize"
    """Of several rewards: sum_then_normalize weighs them in their own units; normalize_then_sum first divides each by its own standard
    deviation inside the group (GDPO, arXiv 2601.05242), so that a weight means the same for all; running_scale divides by a running mean of
    those deviations over the steps before, one number for all groups, so that a group with hardly a difference stays one."""
    num_iterations: int = 1
    """Optimizer steps on each batch of rollouts."""
    panw_alpha: float = 0.0
    """PANW exponent, VAR-RL Eq. 9; 0 is plain GRPO."""
    region_credit: bool = False
    """Where the reward is a sum over text regions, give each region's own advantage to its own tokens."""
    mask: Literal["none", "direct", "chained"] = "none"
    """Mask propagation: only tokens under the judged boxes learn from the reward."""
    mask_dilation: int = 1
    """Cells of the finest grid by which boxes are widened, for masks and region credit."""
    rollouts_per_chunk: int = 32
    """Pictures drawn, judged and trained on together; while one chunk is judged the next is drawn."""

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ConfigError(
                f"grpo.num_generations={self.num_generations}: a group of one is its own baseline, every advantage is 0. "
                "Set it to 2 or more."
            )
        if self.importance_sampling_level not in ("token", "step", "sequence"):
            raise ConfigError(f"grpo.importance_sampling_level={self.importance_sampling_level!r}: use token, step or sequence.")
        if self.epsilon <= 0 or (self.epsilon_high is not None and self.epsilon_high <= 0):
            raise ConfigError(f"grpo.epsilon={self.epsilon}, epsilon_high={self.epsilon_high}: the clip range must be above 0.")
        if self.beta < 0:
            raise ConfigError(f"grpo.beta={self.beta}: a negative KL weight pushes away from the reference. Set 0 or more.")
        if self.num_iterations < 1:
            raise ConfigError(f"grpo.num_iterations={self.num_iterations}: must be 1 or more.")
        if self.panw_alpha < 0:
            raise ConfigError(f"grpo.panw_alpha={self.panw_alpha}: must be 0 (plain) or more; 0.6 to 0.8 is the robust range.")

    @property
    def grpo(self) -> "GRPOConfig":
        """Itself: what the config of every algorithm holds."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class MiddleStep:
    """Where the prefix ends. Exactly one of the three is set."""

    index: int | None = None
    """The prefix is the first `index` steps."""
    resolution: float | None = None
    """... up to the last grid whose longer side is at most this share of the final grid's (the paper's m_256 of 1024 is 0.25)."""
    token_share: float | None = None
    """... as many steps as hold at most this share of all tokens (the paper's m_256 is 0.089)."""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.index, self.resolution, self.token_share)) != 1:
            raise ConfigError(f"middle_step={self}: set exactly one of index, resolution and token_share.")


@dataclass(frozen=True, slots=True, kw_only=True)
class VARRLConfig:
    """VAR RL Done Right (arXiv 2601.02256): two-stage GRPO with a value-as-middle-return prefix reward."""

    grpo: GRPOConfig = GRPOConfig()
    middle_step: MiddleStep = MiddleStep(resolution=0.25)
    num_continuations: int = 1
    """K, completions from each prefix. Measured: at equal scored images K = 1 is never worse."""
    middle_return: Literal["mean", "log_mean_exp", "importance"] = "mean"
    """mean is the unbiased full-horizon prefix gradient; log_mean_exp the paper's Eq. 10; importance corrects it for a fixed old policy."""
    eta: float = 1.0
    """Temperature of the soft value."""
    prefix_updates: int = 3
    suffix_updates: int = 1
    """The cycle: so many prefix updates, then so many suffix updates. 3:1 is the paper's fine, 300:100 its coarse alternation."""
    tree_reuse: bool = False
    """Also train the suffix on the K continuations of a prefix update, each against its siblings (needs K >= 2)."""
    shared_prefix_baseline: bool = True
    """Suffix updates draw all G continuations from one prefix, whose mean is the baseline."""
    adapt_middle_step: bool = False
    """Experiment: choose m so that the share of reward variance settled by step m is nearest 0.25."""

    def __post_init__(self) -> None:
        if self.num_continuations < 1:
            raise ConfigError(f"var_rl.num_continuations={self.num_continuations}: a prefix needs at least 1 continuation to be judged.")
        if self.eta <= 0:
            raise ConfigError(f"var_rl.eta={self.eta}: the soft value's temperature must be above 0.")
        if self.tree_reuse and self.num_continuations < 2:
            raise ConfigError("var_rl.tree_reuse needs siblings as baseline: set num_continuations to 2 or more.")
        if self.prefix_updates < 0 or self.suffix_updates < 0 or self.prefix_updates + self.suffix_updates == 0:
            raise ConfigError(f"var_rl: a cycle of {self.prefix_updates} prefix and {self.suffix_updates} suffix updates trains nothing.")


@dataclass(frozen=True, slots=True, kw_only=True)
class VAPIConfig:
    """VA-pi (arXiv 2512.19680): GRPO on tokens drawn from the context of a real picture, paid by how well they rebuild it. A step learns
    from G + 1 rows for each picture, so `train.rollouts_per_backward` should be a multiple of that: a picture that is cut apart costs one
    forward pass more, and has the same gradient."""

    grpo: GRPOConfig = GRPOConfig(num_generations=8)
    """`beta` above 0 is the prior as KL to the initial model."""
    prefix_noise: float = 0.0
    """The paper's xi: each token of the context is replaced with this probability, by any other with equal odds (Eq. 28). The release draws
    from all K, the true one included: its xi is ours times 1 - 1/K."""
    prior_weight: float = 0.1
    """The paper's beta: weight of the cross-entropy of the picture's own tokens in that context, in nats per token."""
    drop_condition: float = 0.1
    """Share of pictures whose draws see no class or caption, so that the model keeps what guidance needs. Chosen once for a picture, before
    its draws; the release chooses anew for each draw while it learns, and so scores another law than it drew from."""
    shuffle_rewards: bool = False
    """A control: the rewards of a picture's draws are dealt out anew at random. The expected gradient of the reward is then 0."""

    def __post_init__(self) -> None:
        _demand("va_pi.prefix_noise", self.prefix_noise, 0 <= self.prefix_noise <= 1, "a share of the context's tokens, 0 to 1")
        _demand("va_pi.prior_weight", self.prior_weight, self.prior_weight >= 0, "0 (none) or more")
        _demand("va_pi.drop_condition", self.drop_condition, 0 <= self.drop_condition <= 1, "a share of the pictures, 0 to 1")
        if self.grpo.loss_type != "dapo":
            raise ConfigError(
                f"va_pi.grpo.loss_type={self.grpo.loss_type!r}: every draw learns from all of its tokens, so all types are one mean over "
                "tokens, and the prior is weighed against it. Leave it at dapo."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MARGRPOConfig:
    """MAR-GRPO (arXiv 2604.06966): GRPO on the denoising paths of a masked model whose diffusion head is frozen. The release's form is
    trajectories=release, support=unknown, consistency=0, grpo.loss_type=grpo. Modes that train on further paths make num_trajectories + 1
    rows of each that share one forward pass, so `train.rollouts_per_backward` should be a multiple of that."""

    grpo: GRPOConfig = GRPOConfig(num_generations=8)
    """The paper has num_generations=4 and beta=0.01. A token's ratio is that of all its scored moves together: with num_iterations above 1
    a Flow-GRPO range of 1e-4, for the mean over k moves of d numbers, is epsilon = 1e-4 k d here."""
    ar_steps: int = 12
    """K: on how many of a picture's steps to train, evenly spread; 0 is all. 12 of 64 is the paper's."""
    denoise_moves: int = 10
    """k: on how many of a token's admissible moves to train, evenly spread, chosen for each token anew; 0 is all. 10 of 25 is the
    paper's."""
    num_trajectories: int = 4
    """M, further denoising paths of each token from the same latent; 0 is plain GRPO. The release has 3 (NOVA) and 5 (Harmon)."""
    trajectories: Literal["release", "include_primary", "precision_weight", "rewarded"] = "precision_weight"
    """What they do for the uncertain tokens, see `algorithms/mar_grpo.py`: replace the path that made the picture, at its advantage
    (release); join it (include_primary); only say how far to damp it (precision_weight); join it, each with a picture and a reward of its
    own (rewarded)."""
    uncertain_fraction: float = 0.3
    """Share of a picture's tokens, those that differ most between trajectories, that this is done for. 0.3 is the release's."""
    support: Literal["committed", "unknown"] = "committed"
    """Which tokens a step is trained on: those it put into the picture, or, as released, all that were not known before it."""
    train_head: bool = False
    """Train the diffusion head too, as GRPO end to end does; the paper's method is to leave it as it is."""
    consistency: float | None = None
    """Of the unknown tokens, only those learn from the reward whose cosine to the final token the step raised by more than this; 0 is the
    release's, None takes all."""

    def __post_init__(self) -> None:
        for name in ("ar_steps", "denoise_moves"):
            _demand(f"mar_grpo.{name}", getattr(self, name), getattr(self, name) >= 0, "0 (all) or more")
        _demand("mar_grpo.num_trajectories", self.num_trajectories, self.num_trajectories >= 0, "0 (plain GRPO) or more")
        _demand("mar_grpo.uncertain_fraction", self.uncertain_fraction, 0 <= self.uncertain_fraction <= 1, "a share of the tokens, 0 to 1")
        if self.num_trajectories == 1 and (self.trajectories == "precision_weight" or 0 < self.uncertain_fraction < 1):
            raise ConfigError(
                "mar_grpo.num_trajectories=1: one path alone does not spread, so no token is more uncertain than another. Set it to 2 or "
                "more, or uncertain_fraction to 0 or 1 and trajectories to release, include_primary or rewarded."
            )
        if self.consistency is not None and self.support == "committed":
            raise ConfigError(
                f"mar_grpo.consistency={self.consistency}: the filter keeps every token that the step put into the picture, so with "
                "support=committed it does nothing. Leave it out, or set support=unknown."
            )
        if self.support == "unknown" and (self.grpo.loss_type != "grpo" or self.grpo.panw_alpha > 0):
            raise ConfigError(
                f"mar_grpo.support='unknown' gives every step a mean of its own, as released; grpo.loss_type={self.grpo.loss_type!r} and "
                f"panw_alpha={self.grpo.panw_alpha} would weigh steps by their tokens. Set loss_type=grpo and panw_alpha=0."
            )
        if self.support == "unknown" and self.trajectories == "rewarded":
            raise ConfigError(
                "mar_grpo.trajectories='rewarded': a token that is looked at before it is settled has made no picture to be rewarded for. "
                "Set support=committed, or another mode."
            )


AlgorithmConfig = GRPOConfig | VARRLConfig | VAPIConfig | MARGRPOConfig

# ---- data, rewards, training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WordsConfig:
    """Pictures of words, drawn here from real fonts."""

    image_size: tuple[int, int] = (16, 64)
    """(H, W) in pixels."""
    fonts: tuple[str, ...] = ("sans", "serif", "mono")
    """Names of the bundled faces, or paths of font files."""
    palettes: tuple[str, ...] = ("ink", "night", "sea", "fire", "moss", "candy")
    """Colour pairs, text on ground."""
    word_list: str = "wonderwords"
    """`wonderwords`, or the path of a text file with one word a line."""
    letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """Words with other letters are left out."""
    min_length: int = 3
    max_length: int = 5
    heldout_share: float = 0.15
    """Share of the words kept from pre-training and from RL, for evaluation. Split by hash, so it does not depend on the list's order."""
    rl_share: float = 0.5
    """Share of the other words kept from pre-training, for RL only."""
    regions: tuple[float, ...] = (1.0,)
    """Share of pictures with 1, 2, ... text regions; the paper's balance for 2 to 5 is (0, 0.2, 0.3, 0.3, 0.2)."""
    jitter: int = 1
    """Pixels by which a region may move."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderConfig:
    """A user's own data: a folder with prompts.jsonl, and the pictures it names."""

    path: str
    heldout: str | None = None
    """Another such folder, for evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlyphsConfig:
    """Coloured pictures of letters, drawn here from real fonts; a font family belongs to one set alone."""

    image_size: tuple[int, int] = (24, 24)
    """(H, W) in pixels."""
    letters: str = "ABDEGHKMRSTX"
    """The classes: letter i is label i."""
    fonts: tuple[str, ...] = (
        "matplotlib",
        "fontpkg_inconsolata",
        "fontpkg_instrument_serif",
        "fontpkg_inter",
        "fontpkg_merriweather",
        "fontpkg_open_sans",
        "fontpkg_oswald",
        "fontpkg_oxygen",
        "fontpkg_playfair_display",
        "fontpkg_pt_serif",
        "fontpkg_public_sans",
        "fontpkg_roboto",
        "fontpkg_work_sans",
        "fontpkg_zilla_slab",
    )
    """Where font files lie: names of installed packages, paths of folders, or of files."""
    shares: tuple[float, float, float, float] = (0.4, 0.2, 0.2, 0.2)
    """Of the families: to train on, for the network that rewards, for the network that judges, and held out."""
    split: Literal["train", "reward", "judge"] = "train"
    """Which of the first three sets is trained on."""
    palettes: tuple[str, ...] = ("ink", "night", "sea", "fire", "moss", "candy")
    """Colour pairs, letter on ground."""
    sizes: tuple[float, ...] = (0.8, 0.86, 0.92)
    """Pixels per em, as shares of the picture's height. A letter too large for the picture is drawn as large as fits."""
    jitter: int = 1
    """Pixels by which a letter may move."""
    seed: int = 0
    """Which family goes where."""

    def __post_init__(self) -> None:
        if len(self.letters) < 2 or len(set(self.letters)) < len(self.letters):
            raise ConfigError(f"glyphs.letters={self.letters!r}: must be two letters or more, each once. They are the classes.")
        if min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ConfigError(f"glyphs.shares={self.shares}: none may be below 0, and not all 0. Give shares of the font families.")
        if not self.sizes or not all(0 < size <= 1 for size in self.sizes):
            raise ConfigError(f"glyphs.sizes={self.sizes}: must be shares of the picture's height, above 0 and at most 1.")
        if not self.fonts or not self.palettes:
            raise ConfigError("glyphs: fonts and palettes must not be empty. Name at least one of each.")
        _demand("glyphs.jitter", self.jitter, 0 <= self.jitter < min(self.image_size) // 4, "0 or more and under a quarter of the picture")


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturesConfig:
    """Real pictures with what they show: a folder of pictures or of a sub-folder per class, a folder with prompts.jsonl, or a data set that
    Hugging Face `datasets` saved to disk."""

    path: str
    image_size: tuple[int, int] = (256, 256)
    """(H, W) in pixels, to which pictures are scaled and cut from the middle (as ADM does, arXiv 2105.05233)."""
    heldout: str | None = None
    """Other such pictures, for evaluation."""
    tokens: str | None = None
    """Folder in which the pictures' tokens are kept, so that each picture is encoded once."""
    share: float = 1.0
    """Use this share of the pictures; VA-pi (arXiv 2512.19680) learns from 0.01 of ImageNet."""
    seed: int = 0
    """Which pictures that share is. A smaller share is a part of a larger one."""
    split: str = "train"
    """Of a saved data set with several."""
    caption: str = "text"
    """Column of a saved data set that holds captions, where there is one."""

    def __post_init__(self) -> None:
        _demand("pictures.share", self.share, 0 < self.share <= 1, "above 0 and at most 1")
        if min(self.image_size) < 1:
            raise ConfigError(f"pictures.image_size={self.image_size}: must be (height, width), 1 pixel or more each.")


DataConfig = WordsConfig | FolderConfig | GlyphsConfig | PicturesConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class OCRConfig:
    """Reads the pictures, and compares with the prompt's words."""

    engine: Literal["auto", "tesseract", "rapidocr"] = "auto"
    """auto is tesseract where its language data is found, else rapidocr, and says so."""
    score: Literal["paper", "mixed", "exact", "ned", "letters"] = "mixed"
    """paper is VAR-RL's Comp + Sim - Pen; mixed is half exact, half NED similarity, per region; letters is the share of letters read right,
    and tells region credit about each letter."""
    letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """What a word may be made of, case ignored; the reader answers with nothing else."""
    workers: int = 1
    """Reader processes."""
    timeout: float = 20.0
    """Seconds for one batch of one worker, after which it is replaced and its pictures are NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonRewardConfig:
    """Any callable (images [B, 3, H, W] in [0, 1], prompts) -> [B]."""

    target: str
    """module:function, or path.py:function."""
    groupwise: bool = False
    """It compares pictures: called once for each prompt's group, with all its pictures and no others, where it is else called for many
    groups at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionConfig:
    """How near the picture is to the prompt's reference picture: -(MSE + lpips_weight * perceptual distance), VA-pi (arXiv 2512.19680)
    Eq. 10. The perceptual distance is LPIPS with `vgg` and `heads`, or a plain one with `features`."""

    lpips_weight: float = 1.0
    """The paper's lambda_p, of which it names no value; 1 is the released scripts'. 0 is MSE alone, and needs no network."""
    vgg: str | None = None
    """File of torchvision's VGG16 weights."""
    heads: str | None = None
    """File of LPIPS's linear heads for VGG16, version 0.1."""
    features: str | None = None
    """A classifier's folder or `bundled:NAME`; or module:function, or path.py:function, of pictures [B, 3, H, W] in [0, 1]: their feature
    maps, a list of [B, C, h, w]."""
    batch: int = 16
    """Pictures at once through the network. Changes memory, not results."""
    keep: int = 64
    """Reference pictures kept with their feature maps, the latest."""

    def __post_init__(self) -> None:
        _demand("reconstruction.lpips_weight", self.lpips_weight, self.lpips_weight >= 0, "0 (none) or more")
        _demand("reconstruction.batch", self.batch, self.batch >= 1, "1 or more")
        _demand("reconstruction.keep", self.keep, self.keep >= 1, "1 or more")
        if (self.vgg is None) != (self.heads is None):
            raise ConfigError("reconstruction: LPIPS is VGG16 and its linear heads. Set both vgg and heads, or neither.")
        if self.vgg is not None and self.features is not None:
            raise ConfigError("reconstruction: two perceptual distances. Set vgg and heads (LPIPS), or features.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScoreConfig:
    """How sure a classifier is that the picture shows the prompt's class: its log-probability, in nats, 0 at most."""

    classifier: str
    """A classifier's folder (made by `varl pretrain`), or `bundled:NAME`."""
    floor: float = -8.0
    """Lower ones count as this, so that one picture of nothing does not outweigh its group."""

    def __post_init__(self) -> None:
        _demand("class_score.floor", self.floor, self.floor < 0, "below 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CLIPScoreConfig:
    """CLIPScore (arXiv 2104.08718): how well the picture fits the prompt's text, 100 max(cosine, 0) as libraries report it (20 to 35)."""

    model: str = "openai/clip-vit-large-patch14"
    """A CLIP: a folder that `transformers` saved, or a hub name. The paper's is openai/clip-vit-base-patch32."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        _demand("clip_score.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PickScoreConfig:
    """PickScore (arXiv 2305.01569): which picture people would pick for the prompt's text, exp(logit_scale) cosine (18 to 24)."""

    model: str = "yuvalkirstain/PickScore_v1"
    """A CLIP: a folder that `transformers` saved, or a hub name."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Whose tokenizer and preprocessing: a folder, or a hub name."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        _demand("pick_score.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class HPSConfig:
    """HPS v2.1 (arXiv 2306.09341): which picture people would prefer for the prompt's text, a cosine (.2 to .35)."""

    weights: str = "xswu/HPSv2"
    """The released file HPS_v2.1_compressed.pt, or a hub name whose local cache holds it."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """The CLIP that it was tuned from: a folder with its config, tokenizer and preprocessing, or a hub name. Its weights are not needed."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        _demand("hps.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRewardConfig:
    """ImageReward (arXiv 2304.05977): which picture people would prefer for the prompt's text, of mean 0 and deviation 1 (-2 to 2)."""

    weights: str = "THUDM/ImageReward"
    """The released file ImageReward.pt, or a hub name whose local cache holds it."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """BERT's: a folder, or a hub name. Its weights are not needed."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        _demand("image_reward.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class HPSv3Config:
    """HPSv3 (arXiv 2508.03789): which picture people would prefer for the prompt's text; good ones have about 10."""

    template: str
    """The file hpsv3/dataset/data_collator_qwen.py of its package, in which the network's instruction stands. It is read, not run."""
    weights: str = "MizzenAI/HPSv3"
    """The released file HPSv3.safetensors, or a hub name whose local cache holds it."""
    processor: str = "Qwen/Qwen2-VL-7B-Instruct"
    """The Qwen2-VL that it was tuned from: a folder with its config and tokenizer, or a hub name. Its weights are not needed."""
    batch: int = 8
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        _demand("hpsv3.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class AestheticConfig:
    """LAION's aesthetic predictor, version 2: how much people would like the picture, 1 to 10, whatever the prompt."""

    head: str
    """The released file sac+logos+ava1-l14-linearMSE.pth."""
    model: str = "openai/clip-vit-large-patch14"
    """A CLIP: a folder that `transformers` saved, or a hub name."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        _demand("aesthetic.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SSIMConfig:
    """Structural similarity to the prompt's reference picture, at most 1."""

    multiscale: bool = False
    """MS-SSIM, over five scales, for which pictures need 176 pixels to a side."""
    batch: int = 64
    """Pictures at once. Changes memory, not results."""
    keep: int = 64
    """Reference pictures kept, the latest."""

    def __post_init__(self) -> None:
        _demand("ssim.batch", self.batch, self.batch >= 1, "1 or more")
        _demand("ssim.keep", self.keep, self.keep >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class DINOConfig:
    """How alike the picture and the prompt's reference picture look to DINOv2 (arXiv 2304.07193): a cosine."""

    model: str = "facebook/dinov2-base"
    """A folder that `transformers` saved, or a hub name."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""
    keep: int = 1024
    """Features of reference pictures kept, the latest."""

    def __post_init__(self) -> None:
        _demand("dino.batch", self.batch, self.batch >= 1, "1 or more")
        _demand("dino.keep", self.keep, self.keep >= 1, "1 or more")


TextRewardConfig = CLIPScoreConfig | PickScoreConfig | HPSConfig | ImageRewardConfig | HPSv3Config
"""Rewards that read the prompt's text."""
NetworkRewardConfig = TextRewardConfig | AestheticConfig | DINOConfig
"""Rewards whose weights lie in files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenEvalConfig:
    """GenEval (arXiv 2310.11513): whether a detector finds the prompt's `objects`, as many, of their colours and in their places."""

    score: Literal["graded", "correct"] = "graded"
    """graded is the mean over the prompt's conditions of the share to which each is met; correct is what GenEval counts, 0 or 1."""
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """A Mask2Former, DETR, RT-DETR or GroundingDINO: a folder that `transformers` saved, or a hub name."""
    clip: str = "openai/clip-vit-large-patch14"
    """A CLIP, which names colours: likewise."""
    threshold: float = 0.3
    """How sure the detector must be. GenEval's, of Mask2Former; other detectors may need another."""
    counting_threshold: float = 0.9
    """The same for prompts that say how many there shall be at most of something that they ask for."""
    batch: int = 8
    """Pictures at once through the detector. Changes memory, not results."""

    def __post_init__(self) -> None:
        for name in ("threshold", "counting_threshold"):
            _demand(f"geneval.{name}", getattr(self, name), 0 <= getattr(self, name) < 1, "0 or more, and below 1")
        _demand("geneval.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundingDINOConfig:
    """T2I-R1's detector reward (arXiv 2505.00703), which MAR-GRPO has too: whether GroundingDINO finds the prompt's `objects`, as many and
    in their places; in [0, 1]."""

    form: Literal["corrected", "paper"] = "corrected"
    """paper is the released code, where "above" is never right and "next to" always, and where the boxes of a class are thinned out by
    another measure than how far they cover each other."""
    model: str = "IDEA-Research/grounding-dino-base"
    """A GroundingDINO: a folder that `transformers` saved, or a hub name. T2I-R1's is IDEA-Research/grounding-dino-tiny."""
    threshold: float = 0.3
    """How sure it must be."""
    batch: int = 8
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        _demand("grounding_dino.threshold", self.threshold, 0 <= self.threshold < 1, "0 or more, and below 1")
        _demand("grounding_dino.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class VQAConfig:
    """How sure a model that answers questions is of each of the prompt's `objects`: "red dog?", p(yes) / (p(yes) + p(no)), in [0, 1]."""

    model: str = "microsoft/git-large-vqav2"
    """A GIT, as T2I-R1 and MAR-GRPO have it, or a BLIP, Salesforce/blip-vqa-base, as T2I-CompBench: a folder that `transformers` saved, or
    a hub name."""
    combine: Literal["mean", "product"] = "mean"
    """Over the prompt's objects. mean is T2I-R1's, product T2I-CompBench's, of which no object has a share."""
    batch: int = 16
    """Pictures at once through the network, with all that they are asked. Changes memory, not results."""

    def __post_init__(self) -> None:
        _demand("vqa.batch", self.batch, self.batch >= 1, "1 or more")


ObjectRewardConfig = GenEvalConfig | GroundingDINOConfig | VQAConfig
"""Rewards that look for the prompt's `objects`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRewardConfig:
    """Whatever `varl reward-serve` serves, in another process or on another machine."""

    url: str
    """The address that it prints: http://HOST:PORT."""
    timeout: float = 60.0
    """Seconds for one chunk of pictures, all tries together, after which they are NaN."""
    retries: int = 4
    """Further tries where the answer is none."""
    backoff: float = 0.5
    """Seconds before the first of them; before each later one twice as long."""
    break_after: int = 3
    """Chunks without an answer, in a row, after which the service is not asked for a while."""
    rest: float = 30.0
    """Seconds of that while; pictures are NaN at once."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"http://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?/?", self.url):
            raise ConfigError(f"served.url={self.url!r}: must be http://HOST:PORT, as `varl reward-serve` prints it.")
        _demand("served.timeout", self.timeout, 0 < self.timeout < math.inf, "above 0 and finite")
        _demand("served.retries", self.retries, self.retries >= 0, "0 (none) or more")
        _demand("served.backoff", self.backoff, self.backoff >= 0, "0 or more")
        _demand("served.break_after", self.break_after, self.break_after >= 1, "1 or more")
        _demand("served.rest", self.rest, self.rest >= 0, "0 (never stop asking) or more")


RewardConfig = (
    OCRConfig
    | PythonRewardConfig
    | ReconstructionConfig
    | ClassScoreConfig
    | NetworkRewardConfig
    | ObjectRewardConfig
    | SSIMConfig
    | ServedRewardConfig
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedReward:
    reward: RewardConfig = OCRConfig()
    weight: float = 1.0


PICTURE_MEASURES = ("pixel_diversity", "background_edges")
"""What every run measures on its pictures beside the reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """Looks for a reward that is won at the cost of something else: alarm where the train reward rises over a window of steps while what is
    never optimised falls, be it a held-out reward, how much a prompt's pictures differ, or the edges outside of its text boxes."""

    held_out: dict[str, RewardConfig] = field(default_factory=dict)
    """Rewards that are measured and never learned from."""
    pictures: int = 4
    """Of each prompt's group the first so many are looked at: they are as good as any, and a held-out reward may be dear."""
    window: int = 64
    """Steps from one look for a trend to the next; a multiple of 8, for it is cut into 8 blocks."""
    false_alarms: float = 0.01
    """Share of windows in which the alarm is raised although nothing that is watched has a trend, at most."""
    may_lose: float = 0.5
    """Share of its first level that a measure of the pictures may lose before its fall is one: whoever learns what is wanted draws less
    else. A held-out reward may lose nothing."""
    on_alarm: Literal["log", "stop"] = "log"
    """stop ends the run there, with its model; the same command goes on only with another setting here."""

    def __post_init__(self) -> None:
        _demand("monitor.pictures", self.pictures, self.pictures >= 2, "2 or more: one picture differs from none")
        _demand("monitor.window", self.window, self.window >= 16 and self.window % 8 == 0, "a multiple of 8, 16 or more")
        _demand("monitor.false_alarms", self.false_alarms, 0 < self.false_alarms < 0.5, "above 0 and below 0.5")
        _demand("monitor.may_lose", self.may_lose, 0 <= self.may_lose < 1, "at least 0 and below 1")
        if taken := {"alarm", *PICTURE_MEASURES} & self.held_out.keys():
            raise ConfigError(f"monitor.held_out.{min(taken)}: is a name of the monitor's own. Call it something else.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the matrices inside blocks, AdamW for the rest."""
    lr: float = 1e-4
    """AdamW's learning rate."""
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "linear"] = "constant"
    """linear decays to 0 at the last step."""
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _demand("optim.lr", self.lr, self.lr >= 0, "0 or more")
        _demand("optim.muon_lr", self.muon_lr, self.muon_lr >= 0, "0 or more")
        _demand("optim.weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        _demand("optim.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 (none) or more")
        _demand("optim.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0; inf does not clip")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    every: int = 0
    """Steps between held-out evaluations during training; 0 is never."""
    samples: int = 128
    seed: int = 1234
    batch: int = 64

    def __post_init__(self) -> None:
        _demand("eval.every", self.every, self.every >= 0, "0 (never) or more")
        _demand("eval.samples", self.samples, self.samples >= 1, "1 or more")
        _demand("eval.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int = 100
    """Optimizer updates (rollout batches; each has num_iterations optimizer steps)."""
    max_seconds: float = 0.0
    """Stop after so much time in training steps, counted over interruptions; 0 is no limit."""
    prompts_per_step: int = 8
    """P, over all ranks."""
    rollouts_per_backward: int = 64
    """Micro-batch. Changes memory, not results."""
    optim: OptimConfig = OptimConfig()
    ema_decay: float = 0.0
    """0 keeps no moving average."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast around the model; weights, log-probs and optimizer stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    save_every: int = 20
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept besides the newest milestone."""
    image_every: int = 10
    """Steps between picture grids at fixed prompts and seeds."""
    max_failed_rewards: float = 0.2
    """Share of a step's pictures whose reward may fail before the run stops."""
    idle_steps: int = 20
    """Stop after so many steps in a row that taught nothing (all advantages 0)."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "rollouts_per_backward", "save_every", "keep", "idle_steps"):
            _demand(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("image_every", "max_seconds"):
            _demand(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, "0 (none) or more")
        _demand("train.ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "at least 0 (none) and below 1")
        _demand("train.max_failed_rewards", self.max_failed_rewards, 0 <= self.max_failed_rewards <= 1, "a share, 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A post-training run, whole."""

    name: str = "run"
    model: str
    """A model folder (config.yaml, model.safetensors, tokenizer.safetensors), `bundled:NAME`, or a Janus-Pro as `transformers` keeps it: a
    folder, or a name on the Hugging Face hub, looked for in the local cache."""
    data: DataConfig = WordsConfig()
    rewards: dict[str, WeightedReward] = field(default_factory=lambda: {"ocr": WeightedReward()})
    algorithm: AlgorithmConfig = GRPOConfig()
    sample_law: LawConfig = LawConfig()
    score_law: LawConfig = LawConfig()
    unmasking: UnmaskingConfig | None = None
    """Of masked models, which need it, and of no others."""
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()
    seed: int = 0

    @property
    def asked(self) -> dict[str, RewardConfig]:
        """Every reward that is asked, learned from or held out, by its place here."""
        learned = {f"rewards.{name}": part.reward for name, part in self.rewards.items()}
        return learned | {f"monitor.held_out.{name}": reward for name, reward in self.monitor.held_out.items()}

    def __post_init__(self) -> None:
        for held, reward in self.monitor.held_out.items():
            if learned := [name for name, part in self.rewards.items() if part.weight and part.reward == reward]:
                raise ConfigError(
                    f"monitor.held_out.{held}: is rewards.{learned[0]}, which is learned from. Hold out another, or give that one weight 0."
                )
        if not self.score_law.top_k and self.score_law.top_p == 1:
            return
        filtered = f"score_law.top_k={self.score_law.top_k}, top_p={self.score_law.top_p}"
        if self.algorithm.grpo.beta > 0:
            raise ConfigError(
                f"{filtered} with grpo.beta={self.algorithm.grpo.beta}: the KL to a reference that has cut a token away is infinite. "
                "Score without a filter, or set beta=0."
            )
        if isinstance(self.algorithm, VAPIConfig) and self.algorithm.prior_weight > 0:
            raise ConfigError(
                f"{filtered} with va_pi.prior_weight={self.algorithm.prior_weight}: the cross-entropy of a token that was cut away is "
                "infinite. Score without a filter, or set prior_weight=0."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelLossConfig:
    """A loss on the pixels of what is drawn in the context of a real picture: the baselines of VA-pi (arXiv 2512.19680, appendix C)."""

    trains: Literal["transformer", "decoder"]
    """transformer: through the decoder and a straight-through one-hot (C.1); decoder: the tokenizer's, on drawn tokens, the transformer
    frozen (C.2)."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    """Minus this reward is the loss."""
    temperature: float = 1.0
    """Of the softmax whose derivative stands for that of the one-hot."""
    prior_weight: float = 0.0
    """Weight of the cross-entropy of the picture's own tokens in that context, in nats per token."""

    def __post_init__(self) -> None:
        _demand("pixel_loss.temperature", self.temperature, self.temperature > 0, "above 0")
        _demand("pixel_loss.prior_weight", self.prior_weight, self.prior_weight >= 0, "0 (none) or more")
        if self.trains == "decoder" and self.prior_weight > 0:
            raise ConfigError(f"pixel_loss.prior_weight={self.prior_weight}: the transformer is frozen. Set 0, or trains=transformer.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """A base model from scratch: tokenizer, then transformer; or a classifier."""

    name: str = "base"
    model: NextScaleConfig | InfinityConfig | RasterConfig | MARConfig | ClassifierConfig
    data: DataConfig = WordsConfig()
    pictures: int = 4096
    """Distinct training pictures, where they are drawn here. Of other pictures all are taken. All are kept in memory."""
    tokenizer_steps: int = 1000
    tokenizer_batch: int = 32
    tokenizer_lr: float = 3e-3
    warmup_share: float = 0.2
    """First part of the tokenizer's steps as a plain autoencoder, before its codebook is started from real features."""
    steps: int = 1000
    batch: int = 16
    optim: OptimConfig = OptimConfig(name="muon", lr=3e-3, schedule="linear")
    drop_prompt: float = 0.0
    """Share of training prompts replaced by the empty prompt, for guidance."""
    self_correction: float | None = None
    """Bitwise self-correction, of an Infinity: of each picture and scale a share of the bits, drawn between 0 and this, is turned round,
    and finer scales learn to correct it. None is the paper's 0.3."""
    init: str | None = None
    """Go on from this model folder: tokenizer kept, transformer trained on."""
    pixel_loss: PixelLossConfig | None = None
    """Instead of the tokens' cross-entropy; for a raster model that goes on."""
    max_cpu_seconds: float = 0.0
    """Stop the transformer after so much CPU time of this process, over interruptions; 0 is no limit."""
    save_every: int = 200
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("pictures", "tokenizer_batch", "batch", "save_every"):
            _demand(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("tokenizer_steps", "steps", "max_cpu_seconds", "tokenizer_lr"):
            _demand(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("warmup_share", "drop_prompt"):
            _demand(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a share, 0 to 1")
        if self.self_correction is not None:
            _demand("self_correction", self.self_correction, 0 <= self.self_correction <= 0.5, "0 to 0.5, where bits say nothing more")
            if not isinstance(self.model, InfinityConfig):
                raise ConfigError(f"self_correction={self.self_correction:g}: turns bits round, of an Infinity. Leave it out.")
        if isinstance(self.model, ClassifierConfig) and self.init is not None:
            raise ConfigError(f"init={self.init!r}: a classifier starts from nothing. Leave init out.")
        if self.pixel_loss is not None and not (isinstance(self.model, RasterConfig) and self.init is not None):
            raise ConfigError("pixel_loss: trains a raster model that can draw already. Set init to its folder, and `model` to its config.")

    @property
    def captions(self) -> CaptionConfig | None:
        """As the model reads them; None if it reads none."""
        return self.model.captions if isinstance(self.model, RasterConfig | InfinityConfig) else None

    @property
    def flipped(self) -> float:
        """`self_correction`, resolved."""
        return 0.3 if self.self_correction is None else self.self_correction

    @property
    def trains_tokenizer(self) -> bool:
        """Whether there is a first phase for it."""
        return self.init is None and not isinstance(self.model, ClassifierConfig)

    @property
    def total_steps(self) -> int:
        """Over all phases."""
        return (self.tokenizer_steps if self.trains_tokenizer else 0) + self.steps
