"""All that a run needs to go on as if it had never stopped: `step-000120` folders of safetensors and JSON, with a manifest of hashes."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from varl.checkpoints.folder import damage, read_part, read_tensors, remove_leftovers, write_folder
from varl.errors import CheckpointError

logger = logging.getLogger("varl")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run after `step` steps."""

    step: int
    tensors: dict[str, Any]
    """State dicts by group, nested as they were saved: model, ema, optimizer."""
    extra: dict[str, Any]
    """Plain JSON: seconds so far, controllers, tracker id."""
    path: Path
    refused: tuple[str, ...] = ()
    """Names of newer checkpoints that were damaged, each with what is wrong."""


def save(folder: Path | str, step: int, tensors: Mapping[str, Mapping[Any, Any]], extra: Mapping[str, Any], keep: int = 2) -> Path:
    """`folder`/step-NNNNNN, written whole or not at all. Then all but the `keep` newest are removed, and any of a later step too: a run
    that saves `step` has left those behind. In a group, mappings, lists, tuples, numbers and strings may nest around the tensors."""
    parts: dict[str, bytes | Mapping[str, Tensor]] = {}
    groups = {}
    for group, state in tensors.items():
        flat: dict[str, Tensor] = {}
        groups[group] = _outline(state, "", flat)
        parts[f"{group}.safetensors"] = flat
    parts["state.json"] = json.dumps({"step": step, "extra": extra, "groups": groups}).encode()
    path = write_folder(Path(folder) / f"step-{step:06d}", parts)
    older = [other for other in _steps(Path(folder)) if _number(other) <= step]
    for other in _steps(Path(folder)):
        if other not in older[: max(keep, 1)]:
            doomed = other.rename(other.with_name(f"{other.name}.tmp-{os.getpid()}"))
            shutil.rmtree(doomed)
    return path


def load(path: Path | str) -> RunState:
    """The checkpoint at `path`, after every file's hash was found to be that of the manifest."""
    path = Path(path)
    problems = damage(path)
    if problems:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}. Resume from another checkpoint.")
    return _read(path)


def load_latest(folder: Path | str) -> RunState | None:
    """The newest whole checkpoint in `folder`, None if there is none at all. A damaged one is named in a warning and passed over; if all
    are damaged, that is an error. Half-written folders of dead processes are removed."""
    folder = Path(folder)
    remove_leftovers(folder)
    refused: list[str] = []
    for path in _steps(folder):
        problems = damage(path)
        if not problems:
            return replace(_read(path), refused=tuple(refused))
        refused.append(f"{path.name}: {'; '.join(problems)}")
        logger.warning("checkpoint %s is damaged and not used: %s", path, "; ".join(problems))
    if refused:
        every = "\n  ".join(refused)
        raise CheckpointError(f"{folder}: every checkpoint is damaged.\n  {every}\nMove the folder away to start the run afresh.")
    return None


def _read(path: Path) -> RunState:
    state = json.loads(read_part(path, "state.json"))
    tensors = {group: _restore(outline, read_tensors(path / f"{group}.safetensors")) for group, outline in state["groups"].items()}
    return RunState(step=state["step"], tensors=tensors, extra=state["extra"], path=path)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _outline(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON that tells dict keys of any kind, lists and tuples apart; its tensors go to `tensors`, named by their place."""
    match value:
        case Tensor():
            if path in tensors:
                raise ValueError(f"two tensors would both be called {path!r}; rename one of the keys that lead to them")
            tensors[path] = value
            return {"tensor": path}
        case Mapping():
            return {"dict": [[key, _outline(item, f"{path}/{key}" if path else str(key), tensors)] for key, item in value.items()]}
        case list() | tuple():
            items = [_outline(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": items}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(
        f"{path}: a {type(value).__name__} cannot be saved; only tensors, numbers, strings, and mappings, lists, tuples of them"
    )


def _restore(outline: Any, tensors: Mapping[str, Tensor]) -> Any:
    match outline:
        case {"tensor": name}:
            return tensors[name].clone()  # an optimizer keeps it, and the file may go
        case {"dict": items}:
            return {key: _restore(item, tensors) for key, item in items}
        case {"list": items}:
            return [_restore(item, tensors) for item in items]
        case {"tuple": items}:
            return tuple(_restore(item, tensors) for item in items)
    return outline
