"""What the readers of released files share."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varl.checkpoints.folder import Shapes, read_tensors
from varl.errors import CheckpointError


def read_weights(path: Path, *places: str) -> dict[str, Tensor]:
    """A file's tensors by name: what lies at the first of `places` ("a/b" is b within a) that is there, or the whole file."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training runs save their arguments too
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as a file of weights ({error}). Is it there, and was it copied whole?") from error
    state = next((found for place in places if isinstance(found := _at(loaded, place), dict)), loaded)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(
            f"{path}: holds no state dict, neither flat nor as {' or '.join(places)}. Give a released file or a training run's."
        )
    return state


def _at(loaded: Any, place: str) -> Any:
    for name in place.split("/"):
        loaded = loaded.get(name) if isinstance(loaded, dict) else None
    return loaded


def count(shapes: Shapes, pattern: str) -> int:
    """How many different values the first group of `pattern` takes among the names."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def expect(shapes: Shapes, names: Sequence[str], what: str, where: str) -> None:
    """CheckpointError unless all `names` are there; `what` says whose they are."""
    missing = [name for name in names if name not in shapes]
    if missing:
        held = ", ".join(f"`{name}`" for name in [*shapes][:8]) or "nothing"
        more = f" and {len(shapes) - 8} more" if len(shapes) > 8 else ""
        raise CheckpointError(
            f"{where}: these are no weights of {what}.\n  missing: {', '.join(f'`{name}`' for name in missing)}\n"
            f"  it holds: {held}{more}\nIs it the right file, and the right one of the two?"
        )
