"""How alike two pictures look to a network: distances between unit feature vectors, place by place; LPIPS (arXiv 1801.03924) is the one
whose channels were weighed to agree with people."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

Maps = Sequence[Float[Tensor, "B _ _ _"]]
"""Feature maps [B, C, h, w] of the layers of a network."""
Features = Callable[[Float[Tensor, "B 3 H W"]], Maps]
"""From pictures in [0, 1] to their feature maps."""
Distance = Callable[[Maps, Maps], Float[Tensor, " B"]]
"""Of pictures by their feature maps."""

EPSILON = 1e-10
"""Added to a vector's length before dividing by it, as LPIPS does."""


def normalise_channels(features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """The feature vector of each place, made one long; where it is 0 it stays 0."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + EPSILON)


def feature_distance(a: Maps, b: Maps) -> Float[Tensor, " B"]:
    """Mean over layers of the mean over places of |u_a - u_b|^2, u the unit feature vectors: 0 for equal directions, 2 for orthogonal ones,
    4 for opposite ones, whatever the layers' sizes. Unweighted, and so of no published scale: this is not LPIPS."""
    places = [(x - y).square().sum(1).mean((1, 2)) for x, y in zip(map(normalise_channels, a), map(normalise_channels, b), strict=True)]
    return torch.stack(places).mean(0)


def lpips(a: Maps, b: Maps, heads: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, " B"]:
    """Sum over layers of the mean over places of sum_c w_c (u_a - u_b)_c^2, with w a layer's head: LPIPS (arXiv 1801.03924) Eq. 1, whose
    w^2 is the released head."""
    pairs = zip(map(normalise_channels, a), map(normalise_channels, b), heads, strict=True)
    return torch.stack([torch.einsum("bchw,c->b", (x - y).square(), weight) / x[0, 0].numel() for x, y, weight in pairs]).sum(0)


STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions; a stage ends where its last ReLU does, and LPIPS looks there."""


class VGG16(nn.Module):
    """The convolutions of VGG16 (arXiv 1409.1556), with the names of torchvision's weights."""

    def __init__(self, stages: Sequence[Sequence[int]] = STAGES) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []
        """Places of the last ReLU of each stage."""
        width = 3
        for widths in stages:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for out in widths:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
                width = out
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Feature maps of pictures in [0, 1] at the end of each stage."""
        x, maps = (images - self.mean) / self.std, []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.ends:
                maps.append(x)
        return maps


class Heads(nn.Module):
    """LPIPS's weights of the channels of VGG16's stages, with the names of the released file."""

    def __init__(self, widths: Sequence[int] = tuple(stage[-1] for stage in STAGES)) -> None:
        super().__init__()
        for k, width in enumerate(widths):
            self.add_module(f"lin{k}", nn.ModuleDict({"model": nn.ModuleList([nn.Identity(), nn.Conv2d(width, 1, 1, bias=False)])}))

    def forward(self, a: Maps, b: Maps) -> Float[Tensor, " B"]:
        return lpips(a, b, [weight.flatten() for weight in self.parameters()])
