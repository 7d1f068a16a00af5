"""Does a model that answers questions see the prompt's objects? GIT as T2I-R1 and MAR-GRPO ask it, BLIP as T2I-CompBench does."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from varl.config import VQAConfig
from varl.models.vqa import Asked
from varl.rewards.objects import padded, require_objects
from varl.types import Judgement, Prompt, Wanted


def question(wanted: Wanted) -> str:
    """ "red wooden chair?": colour, attributes and class, as T2I-R1 asks (T2I-CompBench asks with the article, as the prompt has it)."""
    return " ".join([*([wanted.colour] if wanted.colour else []), *wanted.attributes, wanted.name]) + "?"


class VQA:
    """A RewardFn: mean or product over the prompt's objects of p(yes) / (p(yes) + p(no)). Part: `least`, of the least likely one.

    Each object is a region, whose place is not known; not of a product. T2I-R1 does not ask where objects are placed or counted, but gives
    all such pictures 0."""

    def __init__(self, config: VQAConfig, model: Asked) -> None:
        self.config, self.model = config, model

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Judgement:
        require_objects(prompts)
        yes = self.model.yes(images, [[question(wanted) for wanted in prompt.objects] for prompt in prompts])
        parts = {"least": torch.stack([row.min() for row in yes])}
        if self.config.combine == "product":
            return Judgement(value=torch.stack([row.prod() for row in yes]), parts=parts)
        region_value = padded([(row / len(row)).tolist() for row in yes])
        return Judgement(value=region_value.nansum(1), parts=parts, region_value=region_value)
