"""What the readers of released files share."""

import argparse
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varl.checkpoints.folder import Shapes, read_tensors, require_fit, shapes_of, strict_load
from varl.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedFile:
    """A file as it was read; which of its weights are wanted is asked later."""

    path: Path
    content: Any

    def at(self, place: str) -> Any:
        """What lies there ("a/b" is b within a), or None."""
        found = self.content
        for name in place.split("/"):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def weights(self, *places: str) -> dict[str, Tensor]:
        """Tensors by name: what lies at the first of `places` that is there, or the whole file."""
        state = next((found for place in places if isinstance(found := self.at(place), dict)), self.content)
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise CheckpointError(
                f"{self.path}: holds no state dict, neither flat nor as {' or '.join(places)}. Give a released file or a training run's."
            )
        return state


def read_file(path: Path) -> ReleasedFile:
    """A `.safetensors` file, or one that torch wrote, of which nothing but tensors, plain values and a run's arguments is accepted."""
    if path.suffix == ".safetensors":
        return ReleasedFile(path=path, content=read_tensors(path))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training runs save their arguments too
            mapped = zipfile.is_zipfile(path)  # torch's format of old is not
            return ReleasedFile(path=path, content=torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0]}"  # torch goes on to advise that the file be trusted
        raise CheckpointError(f"{path}: cannot be read as a file of weights ({reason}). Is it there, and was it copied whole?") from error


def read_weights(path: Path, *places: str) -> dict[str, Tensor]:
    """A file's tensors by name: what lies at the first of `places` ("a/b" is b within a) that is there, or the whole file."""
    return read_file(path).weights(*places)


def count(shapes: Shapes, pattern: str) -> int:
    """How many different values the first group of `pattern` takes among the names."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def expect(shapes: Shapes, names: Sequence[str], what: str, where: str) -> None:
    """CheckpointError unless all `names` are there; `what` says whose they are."""
    missing = [name for name in names if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{where}: these are no weights of {what}.\n  missing: {', '.join(f'`{name}`' for name in missing)}\n"
            f"  it holds: {listed(shapes)}\nIs it the right file, and the right one of the two?"
        )


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    first = [f"`{name}`" for name in names]
    return (", ".join(first[:8]) or "nothing") + (f" and {len(first) - 8} more" if len(first) > 8 else "")


def fill_from_parts(module: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, Sequence[str]], where: str) -> None:
    """`module` with a `state` that has other names: `names` says for each of ours which tensors it is put together of, in equal parts along
    dimension 0. What does not fit is listed under the names of `state`."""
    want = {}
    for ours, tensor in module.state_dict().items():
        for name in names[ours]:
            want[name] = (tensor.shape[0] // len(names[ours]), *tensor.shape[1:])
    require_fit(shapes_of(state), want, type(module).__name__, where)
    strict_load(module, {ours: torch.cat([state[name] for name in those]) for ours, those in names.items()}, where)
