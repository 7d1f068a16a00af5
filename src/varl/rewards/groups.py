"""Rewards to which groups matter: those that compare the pictures of a prompt, and those that are only watched, on a few of each."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from varl.rewards.judge import judge_now
from varl.types import Box, Prompt, RewardFn, groups


class Groupwise:
    """A RewardFn that asks `fn` about one group at a time, all of it and nothing else, for the values of its pictures."""

    def __init__(self, fn: RewardFn) -> None:
        self.fn = fn

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
        return self.of_groups(images, prompts, None)

    def of_groups(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt], group: int | None) -> Float[Tensor, " B"]:
        said = [judge_now(self.fn, images[rows.start : rows.stop], prompts[rows.start : rows.stop]) for rows in groups(prompts, group)]
        return torch.cat([judgement.value for judgement in said])


class Watched:
    """A RewardFn that asks `fn` about the first `most` pictures of each group, all at once; the others are NaN. It says values alone, and
    nothing of where, so that nothing can be learned from it."""

    def __init__(self, fn: RewardFn, most: int) -> None:
        self.fn, self.most = fn, most

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
        return self.of_groups(images, prompts, None)

    def of_groups(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt], group: int | None) -> Float[Tensor, " B"]:
        rows = [row for there in groups(prompts, group) for row in there[: self.most]]
        own = None if group is None else min(group, self.most)
        value = torch.full((len(prompts),), torch.nan)
        value[rows] = judge_now(self.fn, images[rows], [prompts[row] for row in rows], own).value
        return value

    def close(self) -> None:
        if (close := getattr(self.fn, "close", None)) is not None:
            close()


# ---- what is measured on the pictures of every run --------------------------------------------------------------------------------------


def pixel_diversity(images: Float[Tensor, "G 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " G"]:
    """How much each picture of a group differs from the others: the root of the mean squared difference of their pixels, which lie in
    [0, 1], mean over the G - 1 others. NaN for one picture alone."""
    pixels = images.float().flatten(1)
    distance = torch.stack([(pixels - one).square().mean(1).sqrt() for one in pixels])
    return distance.sum(1) / (len(pixels) - 1) if len(pixels) > 1 else torch.full((1,), torch.nan)


STRONG = 0.1
"""Least step of the luma from a pixel to the next, of its range, that is an edge."""
LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue; ITU-R BT.601."""


def edge_density(images: Float[Tensor, "B 3 H W"], boxes: Sequence[Sequence[Box]]) -> Float[Tensor, " B"]:
    """Share of pixels with an edge, outside of each picture's boxes. An edge is a step of the luma of more
    than `STRONG` to the right or downwards, as the length of both; it counts where these three pixels lie outside of every box. NaN where
    none does."""
    luma = (images.float() * torch.tensor(LUMA, device=images.device)[:, None, None]).sum(1)
    height, width = luma.shape[1:]
    outside = torch.ones(luma.shape, dtype=torch.bool, device=images.device)
    for free, some in zip(outside, boxes, strict=True):
        for x0, y0, x1, y1 in some:
            free[math.floor(y0 * height) : math.ceil(y1 * height), math.floor(x0 * width) : math.ceil(x1 * width)] = False
    here = luma[:, :-1, :-1]
    steps = ((luma[:, :-1, 1:] - here).square() + (luma[:, 1:, :-1] - here).square()).sqrt()
    counts = outside[:, :-1, :-1] & outside[:, :-1, 1:] & outside[:, 1:, :-1]
    return ((steps > STRONG) & counts).sum((1, 2)) / counts.sum((1, 2))


def background_edges(images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
    """`edge_density` outside of the boxes that the prompts give their text regions; of the whole picture where they give none. Not outside
    of what was read: where text is found is the policy's doing, and would move the measure."""
    return edge_density(images, [[region.box for region in prompt.regions if region.box is not None] for prompt in prompts])
