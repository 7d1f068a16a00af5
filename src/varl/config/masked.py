"""Masked models with a diffusion head: MAR, NOVA, Harmon."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from varl.config.demand import demand
from varl.config.text import CaptionConfig
from varl.errors import ConfigError


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
        demand("tokenizer.fold", self.fold, self.fold >= 1, "1 or more")

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
        demand("head.least_signal", self.least_signal, 0 <= self.least_signal < 1, "at least 0 (as released) and below 1")


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
        demand("model.tokenizer.fold", self.tokenizer.fold, self.tokenizer.fold == 1, "1: a MAR's token is one cell")

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
        demand("head.drawn.steps_offset", self.steps_offset, self.steps_offset >= 0, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    """A head that says the velocity from data to noise (rectified flow), drawn as a stochastic chain (arXiv 2505.05470)."""

    shift: float = 1.0
    """Noise levels s become shift s / (1 + (shift - 1) s): above 1, more of the steps are noisy ones."""

    def __post_init__(self) -> None:
        demand("head.drawn.shift", self.shift, self.shift > 0, "above 0")


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
