"""How near is the picture to a real one?"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from varl.config import ReconstructionConfig
from varl.errors import ConfigError
from varl.rewards.perceptual import Distance, Features, Maps, feature_distance
from varl.rewards.references import References
from varl.types import Judgement, Prompt


def mean_squared_error(images: Float[Tensor, "B 3 H W"], references: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Of pictures in [0, 1], in the units of pixels in [-1, 1] as VA-pi's release has it: 4 times their mean squared difference."""
    return 4 * (images - references).square().mean((1, 2, 3))


def distances(
    images: Float[Tensor, "B 3 H W"],
    references: Float[Tensor, "B 3 H W"],
    maps: Maps,
    features: Features | None,
    distance: Distance = feature_distance,
) -> dict[str, Float[Tensor, " B"]]:
    """`mse` (pixels in [-1, 1]) and, where there are `features`, `perceptual`, of pictures in [0, 1] to references whose feature maps are
    `maps`. Differentiable in `images`, which may overshoot."""
    parts = {"mse": mean_squared_error(images, references)}
    return parts if features is None else {**parts, "perceptual": distance(features(images), maps).float()}


def reconstruction_value(parts: Mapping[str, Float[Tensor, " B"]], lpips_weight: float) -> Float[Tensor, " B"]:
    """-(MSE + lpips_weight * perceptual distance), VA-pi (arXiv 2512.19680) Eq. 10."""
    return -parts["mse"] - lpips_weight * parts["perceptual"] if lpips_weight > 0 else -parts["mse"]


def require_network(config: ReconstructionConfig, features: Features | None) -> None:
    """ConfigError where the perceptual distance has a weight and there are no features to take it in."""
    if features is None and config.lpips_weight > 0:
        raise ConfigError(
            f"reconstruction.lpips_weight={config.lpips_weight}: there is no network to look with. Set vgg and heads (LPIPS), "
            "or features, or lpips_weight=0, which is MSE alone."
        )


class Reference(NamedTuple):
    """A real picture, and its feature maps, each without batch."""

    picture: Float[Tensor, "3 H W"]
    maps: list[Tensor]


class ReconstructionReward:
    """A RewardFn: -(MSE + lpips_weight * perceptual distance) to the prompt's own picture, VA-pi (arXiv 2512.19680) Eq. 10. The reference
    is the real picture, not what the tokenizer makes of it. NaN where it cannot be read. Parts: `mse` (pixels in [-1, 1]) and `perceptual`.

    `pictures` gives the real pictures of prompts, in [0, 1]; `features` the feature maps of pictures, `distance` what lies between them.
    Each row has its own value, however many are judged together; the G draws of a picture share its feature maps. Pictures reach a reward
    cut to [0, 1]; the release compares them as they leave the decoder."""

    def __init__(
        self,
        config: ReconstructionConfig,
        pictures: Callable[[Sequence[Prompt]], Float[Tensor, "B 3 H W"]],
        features: Features | None = None,
        distance: Distance = feature_distance,
    ) -> None:
        require_network(config, features)
        self.config, self.features, self.distance = config, features, distance
        self._references = References(pictures, self._look, config.keep)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Judgement:
        features = self.features
        for part in (features, self.distance):
            if isinstance(part, nn.Module):
                part.to(images.device)
        names = ("mse",) if features is None else ("mse", "perceptual")
        parts = {name: torch.full((len(prompts),), torch.nan) for name in names}
        for rows, found in self._references.batches(images, prompts, self.config.batch):
            references = torch.stack([reference.picture for reference in found])
            maps = [torch.stack(layer) for layer in zip(*(reference.maps for reference in found), strict=True)]
            for name, part in distances(images[rows].float(), references, maps, features, self.distance).items():
                parts[name][rows] = part.cpu()
        return Judgement(value=reconstruction_value(parts, self.config.lpips_weight), parts=parts)

    def _look(self, picture: Float[Tensor, "1 3 H W"]) -> Reference:
        return Reference(picture[0], [layer[0] for layer in self.features(picture)] if self.features is not None else [])
