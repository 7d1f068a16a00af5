"""Rewards without an engine, for tests and first steps; and any callable of the user's own, by name."""

from collections.abc import Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor

from varl.errors import ConfigError
from varl.rewards.service import find_callable
from varl.types import Prompt, RewardFn


def brightness(images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
    """Mean of all pixels, in [0, 1]."""
    return images.mean((1, 2, 3))


def left_brightness(images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
    """Mean of the pixels in the left third, in [0, 1]: a reward whose cause has a place."""
    return images[..., : max(images.shape[-1] // 3, 1)].mean((1, 2, 3))


def redness(images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
    """Mean of red minus the mean of green and blue, in [-1, 1]."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def load_callable(target: str) -> RewardFn:
    """The callable at `module:function`, or at `path.py:function`."""
    try:
        return cast(RewardFn, find_callable(target))
    except ValueError as error:
        raise ConfigError(str(error)) from error
