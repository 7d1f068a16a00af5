"""A small convolutional network that names what a picture shows: its maps say how alike two pictures are, its features how alike two sets
of pictures are."""

from math import gcd

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from varl.config import ClassifierConfig

GROUPS = 4
"""Of channels that are normalised together; fewer where the width is no multiple of it."""


class Layer(nn.Module):
    """Convolution, norm, ReLU. No picture's result depends on those beside it."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride, padding=1)
        self.norm = nn.GroupNorm(gcd(GROUPS, after), after)

    def forward(self, x: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B _ _ _"]:
        return F.relu(self.norm(self.conv(x)))


class Classifier(nn.Module):
    """An `eval.features.Classifier`."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths, halvings = config.widths, len(config.widths) - 1
        places = [-(-side // 2**halvings) for side in config.image_size]
        self.layers = nn.ModuleList(
            Layer(before, after, 2 if i else 1) for i, (before, after) in enumerate(zip((3, *widths), widths, strict=False))
        )
        self.pool = nn.Linear(widths[-1] * places[0] * places[1], widths[-1])
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], config.num_classes)

    def maps(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """What each layer sees in pictures in [0, 1]."""
        x, maps = 2 * images - 1, []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Features of pictures in [0, 1], as many as the last layer has channels, all of one length before the ReLU: no picture's features
        are so large that a Frechet distance is of it alone."""
        return F.relu(self.norm(self.pool(self.maps(images)[-1].flatten(1))))

    def classify(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Log-probabilities of the classes."""
        return self.head(features).log_softmax(-1)


class FeatureMaps(nn.Module):
    """A classifier's `maps`, as a network of their own."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        return self.classifier.maps(images)
