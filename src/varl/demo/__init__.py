"""`make demo`, `make demo-va-pi`, `make demo-mar-grpo`: a bundled model, post-trained and measured before, after, and against its
controls.

Every part leaves its result in the run directory, so that the same command goes on wherever it was interrupted."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Say = Callable[[str], None]
Tick = Callable[[Mapping[str, Any]], None]


def copy_gallery(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pictures of eval/before and eval/after into gallery/, and what their index.json say."""
    for side in ("before", "after"):
        folder = out / "gallery" / side
        folder.mkdir(parents=True, exist_ok=True)
        for picture in (out / "eval" / side).glob("*.png"):
            (folder / picture.name).write_bytes(picture.read_bytes())
    before, after = (json.loads((out / "eval" / side / "index.json").read_text()) for side in ("before", "after"))
    return before, after


def available_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
