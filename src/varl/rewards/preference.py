"""Which picture people would prefer for a text, as networks say that read the text beside the picture: ImageReward, HPSv3."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from varl.models.hpsv3 import HPSv3Network
from varl.models.image_reward import ImageRewardNetwork
from varl.rewards.clip import texts_of
from varl.types import Judgement, Prompt

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Of the head of ImageReward 1.0 over pictures that its authors chose."""


def image_reward(raw: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """(raw - mean) / deviation, the published unit of what ImageReward's head says."""
    return (raw - MEAN) / DEVIATION


def in_batches(
    network: Callable[[Tensor, Sequence[str]], Tensor], images: Float[Tensor, "B 3 H W"], texts: Sequence[str], batch: int
) -> Float[Tensor, "B ..."]:
    """What `network` says of all, `batch` at a time, on the CPU."""
    return torch.cat([network(part, texts[i * batch : (i + 1) * batch]) for i, part in enumerate(images.split(batch))]).cpu()


class ImageReward:
    """A RewardFn: ImageReward of the picture and the prompt's text, about -2 to 2."""

    def __init__(self, network: ImageRewardNetwork, batch: int) -> None:
        self.network, self.batch = network, batch

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
        texts = texts_of(prompts)
        return image_reward(in_batches(self.network.to(images.device), images, texts, self.batch))


class HPSv3:
    """A RewardFn: the mean of HPSv3's score of the picture and the prompt's text. Part: `sigma`, the deviation that it gives itself."""

    def __init__(self, network: HPSv3Network, batch: int) -> None:
        self.network, self.batch = network, batch

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Judgement:
        texts = texts_of(prompts)
        mean, log_sigma = in_batches(self.network.at(images.device), images, texts, self.batch).unbind(1)
        return Judgement(value=mean, parts={"sigma": log_sigma.exp()})
