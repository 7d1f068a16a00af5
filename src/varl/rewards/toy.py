"""Rewards without an engine, for tests and first steps; and any callable of the user's own, by name."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

from jaxtyping import Float
from torch import Tensor

from varl.errors import ConfigError
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
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"target {target!r}: must be module:function or path.py:function.")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise ConfigError(f"target {target!r}: there is no file {path}. Give a path from the folder in which the command runs.")
        spec = importlib.util.spec_from_file_location(f"varl_user_{path.stem}", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a user's file may raise anything
            raise ConfigError(f"target {target!r}: {path} cannot be imported ({type(error).__name__}: {error}). Mend the file.") from error
    else:
        try:
            module = import_module(place)
        except ImportError as error:
            raise ConfigError(
                f"target {target!r}: module {place} cannot be imported ({error}). Install it, or give path.py:function."
            ) from error
    fn = getattr(module, name, None)
    if not callable(fn):
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ConfigError(f"target {target!r}: {place} has no callable {name!r}. It has: {', '.join(known) or 'none'}.")
    return cast(RewardFn, fn)
