"""A benchmark's pictures on disk, where its authors' scorer looks for them; drawn by address, by any number of processes, and only what is
not there yet."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from varl.checkpoints.folder import write_bytes
from varl.data.folder import open_rgb
from varl.errors import DataError
from varl.eval.benchmarks.benchmark import Benchmark, Item
from varl.eval.draw import SETTINGS, refuse_others, whole
from varl.policies.acting import ActingPolicy
from varl.rewards.ocr_reward import to_pixels
from varl.rng import Stream

PICTURES = "pictures"
ROOM = 1000
"""Addresses of a prompt: its first pictures are the same ones however many are drawn."""
Pixels = UInt8[Tensor, "3 H W"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The prompts that one of several processes draws: those whose index leaves `index` when divided by `count`."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence[Item]) -> range:
        return range(self.index, len(items), self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """`samples` pictures of each item, in `folder`/pictures."""

    benchmark: Benchmark
    items: Sequence[Item]
    samples: int
    folder: Path

    def files(self, i: int) -> list[Path]:
        """Of item i: one for each picture, or one sheet."""
        return [self.folder / PICTURES / name for name in self.benchmark.files(self.items[i], i, self.samples)]

    def missing(self, i: int) -> list[int]:
        """Numbers of the item's pictures that are not there. What is there is whole."""
        there = [file.is_file() for file in self.files(i)]
        return [k for k in range(self.samples) if not there[k if len(there) == self.samples else 0]]

    def load(self, i: int) -> UInt8[Tensor, "K 3 H W"]:
        """Every picture of item i."""
        files = self.files(i)
        pictures = [_read(file) for file in files]
        if len(files) == self.samples:
            if len({picture.shape for picture in pictures}) > 1:
                raise DataError(f"{files[0].parent}: its pictures are of several sizes. Remove the folder; it will be drawn again.")
            return torch.stack(pictures)
        columns = _columns(self.samples)
        _, height, width = pictures[0].shape
        if height % -(-self.samples // columns) or width % columns:
            raise DataError(f"{files[0]}: is {height}x{width} pixels and no sheet of {self.samples} pictures. Remove it; it will be drawn.")
        cells = pictures[0].unflatten(2, (columns, -1)).unflatten(1, (-(-self.samples // columns), -1))
        return cells.permute(1, 3, 0, 2, 4).flatten(0, 1)[: self.samples]

    def write(self, i: int, drawn: Mapping[int, Pixels]) -> None:
        """What was missing of item i. Its pictures last, so that where they are there all of it is."""
        files = self.files(i)
        pictures = torch.stack([drawn[k] if k in drawn else _read(files[k]) for k in range(self.samples)])
        sheet = _png(make_sheet(pictures))
        for name, data in self.benchmark.beside(self.items[i], i, sheet).items():
            self._put(self.folder / PICTURES / name, data)
        for k, file in enumerate(files):
            if len(files) < self.samples or k in drawn:
                self._put(file, sheet if len(files) < self.samples else _png(pictures[k]))

    def _put(self, file: Path, data: bytes) -> None:
        with whole(file, self.folder) as beside:
            write_bytes(beside, data)


def _columns(pictures: int) -> int:
    return min(pictures, 2)


def make_sheet(pictures: UInt8[Tensor, "K 3 H W"]) -> UInt8[Tensor, "3 h w"]:
    """The pictures two in a row, without a gap; black where none is left."""
    columns = _columns(len(pictures))
    blank = pictures.new_zeros(-len(pictures) % columns, *pictures.shape[1:])
    rows = torch.cat([pictures, blank]).unflatten(0, (-1, columns))
    return rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def _png(picture: Pixels) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(data, format="PNG")
    return data.getvalue()


def _read(file: Path) -> Pixels:
    return torch.from_numpy(np.array(open_rgb(file, str(file)))).permute(2, 0, 1)


def draw_gallery(
    load: Callable[[], ActingPolicy],
    gallery: Gallery,
    *,
    seed: int,
    batch: int,
    settings: Mapping[str, Any],
    noted: Mapping[str, Any] | None = None,
    shard: Shard = Shard(),
    tick: Callable[[int], None] = lambda n: None,
) -> None:
    """Draws what is not there of the shard's items, from the policy's sample law, picture k of item i at the address (seed, "eval",
    benchmark, i * ROOM + k): the same in any batch and shard, but for the rounding of sums. The model is loaded only if something is drawn.

    `settings`, all that shapes a picture beside what is given, lies in settings.json with what is `noted`; a folder whose settings differ
    is refused with a ConfigError. DataError if the disk fails: what was drawn is kept."""
    benchmark, items = gallery.benchmark, gallery.items
    told = {"benchmark": benchmark.command, "seed": seed, "samples": gallery.samples, **settings}
    told = json.loads(json.dumps(told))
    refuse_others(gallery.folder, told, noted or ())
    mine = shard.of(items)
    missing = {i: gallery.missing(i) for i in mine}
    todo = [(i, k) for i, some in missing.items() for k in some]
    tick(len(mine) * gallery.samples - len(todo))
    if not todo:
        return
    policy, waiting = load(), dict[int, dict[int, Tensor]]()
    for start in range(0, len(todo), batch):
        some = todo[start : start + batch]
        rng = Stream(seed=seed, path=("eval", benchmark.command), rows=tuple(i * ROOM + k for i, k in some))
        pixels = to_pixels(policy.decode(policy.rollout([items[i].prompt for i, _ in some], rng)))
        if not (gallery.folder / SETTINGS).is_file():  # a law that cannot be drawn under has failed by now, and left no trace
            with whole(gallery.folder / SETTINGS) as beside:
                write_bytes(beside, json.dumps({**told, **(noted or {})}, indent=2).encode())
        for (i, k), picture in zip(some, pixels, strict=True):
            waiting.setdefault(i, {})[k] = torch.from_numpy(picture).permute(2, 0, 1)
            if len(waiting[i]) == len(missing[i]):
                gallery.write(i, waiting.pop(i))
        tick(len(some))
