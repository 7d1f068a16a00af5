"""A base model from scratch."""

from dataclasses import dataclass
from typing import Literal

from varl.config.data import DataConfig, WordsConfig
from varl.config.demand import demand
from varl.config.masked import MARConfig
from varl.config.models import ClassifierConfig
from varl.config.next_scale import InfinityConfig, NextScaleConfig
from varl.config.raster import RasterConfig
from varl.config.rewards import ReconstructionConfig
from varl.config.run import OptimConfig
from varl.config.text import CaptionConfig
from varl.errors import ConfigError


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
        demand("pixel_loss.temperature", self.temperature, self.temperature > 0, "above 0")
        demand("pixel_loss.prior_weight", self.prior_weight, self.prior_weight >= 0, "0 (none) or more")
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
            demand(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("tokenizer_steps", "steps", "max_cpu_seconds", "tokenizer_lr"):
            demand(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("warmup_share", "drop_prompt"):
            demand(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a share, 0 to 1")
        if self.self_correction is not None:
            demand("self_correction", self.self_correction, 0 <= self.self_correction <= 0.5, "0 to 0.5, where bits say nothing more")
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
