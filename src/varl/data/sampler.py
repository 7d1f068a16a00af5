"""Which prompts a step sees: a function of the step alone, so that a run resumes without any state of it."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from varl.errors import DataError
from varl.rng import generator
from varl.types import Prompt

Item = TypeVar("Item")


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of `count` prompts in an epoch."""
    return tuple(torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist())


class PromptSampler:
    """`per_step` prompts for each step: every prompt once before any comes again, in a new order each epoch."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, per_step: int) -> None:
        if not prompts:
            raise DataError("no prompts: nothing to draw from. Give at least one.")
        self.prompts, self.seed, self.per_step = tuple(prompts), seed, per_step

    def at(self, step: int) -> list[Prompt]:
        """The prompts of step `step`, counted from 0."""
        count = len(self.prompts)
        places = range(step * self.per_step, (step + 1) * self.per_step)
        return [self.prompts[permutation(count, self.seed, place // count)[place % count]] for place in places]


def shard(items: Sequence[Item], rank: int, world: int) -> tuple[list[Item], tuple[int, ...]]:
    """One rank's items, side by side, and their global slot numbers. Ranks differ by one item at most; an item (and the
    group of rollouts made from it) is never split."""
    first, last = (len(items) * r // world for r in (rank, rank + 1))
    return list(items[first:last]), tuple(range(first, last))
