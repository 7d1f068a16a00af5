"""All models there are, and the classifier."""

from dataclasses import dataclass

from varl.config.demand import demand
from varl.config.masked import HarmonConfig, MARConfig, NOVAConfig
from varl.config.next_scale import InfinityConfig, NextScaleConfig
from varl.config.raster import JanusConfig, RasterConfig
from varl.errors import ConfigError

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
        demand("model.num_classes", self.num_classes, self.num_classes >= 2, "2 or more")
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(f"model.widths={list(self.widths)}: needs one convolution at least, of 1 channel or more.")
        smallest = 2 ** (len(self.widths) - 1)
        if min(self.image_size) < smallest:
            raise ConfigError(
                f"model.image_size={list(self.image_size)}: {len(self.widths)} convolutions halve it {len(self.widths) - 1} times. Give "
                f"{smallest} pixels a side or more, or fewer widths."
            )
