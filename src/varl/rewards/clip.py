"""Rewards that look at a picture with CLIP: how well it fits its text, whether people would pick it, whether they would like it."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from varl.errors import RewardError
from varl.models.vision import CLIP, AestheticHead
from varl.types import Judgement, Prompt


def clip_score(cosine: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """100 max(cosine, 0), as torchmetrics and most tables report CLIPScore. Its paper (arXiv 2104.08718) has 2.5 in place of 100 and begins
    each text with "A photo depicts"; here the text is the prompt's own."""
    return 100 * cosine.clamp(min=0)


def texts_of(prompts: Sequence[Prompt]) -> list[str]:
    """The prompts' texts. RewardError where one has none."""
    for prompt in prompts:
        if not prompt.text.strip():
            raise RewardError(f"prompt with label {prompt.label}: has no text to compare with. Give it a `text`.")
    return [prompt.text for prompt in prompts]


class TextMatch:
    """A RewardFn: the cosine of the picture's and its text's features, in the published unit that `unit` makes of it. Part: `cosine`."""

    def __init__(self, clip: CLIP, unit: Callable[[Float[Tensor, " B"]], Float[Tensor, " B"]], batch: int) -> None:
        self.clip, self.unit, self.batch = clip, unit, batch

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Judgement:
        texts, clip = texts_of(prompts), self.clip.to(images.device)
        seen = torch.cat([clip.encode_images(part) for part in images.split(self.batch)])
        cosine = (seen * clip.encode_texts(texts)).sum(1).cpu()
        return Judgement(value=self.unit(cosine), parts={"cosine": cosine})


class Aesthetic:
    """A RewardFn: LAION's aesthetic score of the picture, about 1 to 10, whatever the prompt."""

    def __init__(self, clip: CLIP, head: AestheticHead, batch: int) -> None:
        self.clip, self.head, self.batch = clip, head.eval().requires_grad_(False), batch

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
        clip, head = self.clip.to(images.device), self.head.to(images.device)
        return torch.cat([head(clip.encode_images(part)) for part in images.split(self.batch)]).cpu()
