"""Tens of thousands of pictures from a model, as evaluators take them: each by its seed and index alone, written in shards so that an
interrupted drawing goes on, in the end one npz file."""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from varl.checkpoints.folder import read_tensors, write_bytes, write_tensors
from varl.errors import ConfigError, DataError
from varl.policies.acting import ActingPolicy
from varl.rng import Stream, generator
from varl.types import Prompt

SETTINGS, PICTURES = "settings.json", "pictures.npz"
_TMP = ".tmp-"
SHARD = 1000
"""Pictures that an interruption may cost, and the most that are drawn at once."""


def to_bytes(rendered: Float[Tensor, "B 3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "B 3 H W"]:
    """Pictures as a tokenizer gives them, meant to lie in [-1, 1], as bytes of `size` (H, W): resized, bicubic without smoothing, and then

        floor(clamp(127.5 v + 128, 0, 255))

    as ADM and LlamaGen do before they measure. A picture file rounds otherwise, by up to one level."""
    if tuple(rendered.shape[2:]) != size:
        rendered = F.interpolate(rendered.float(), size=size, mode="bicubic", align_corners=False, antialias=False)
    return (127.5 * rendered + 128).clamp(0, 255).to(torch.uint8)


def prompt_of(choices: Sequence[Prompt], seed: int, row: int) -> Prompt:
    """One of `choices`, uniformly at random, at the address (seed, "eval", "prompt", row)."""
    return choices[int(torch.randint(len(choices), (), generator=generator(seed, "eval", "prompt", row)))]


def draw_shard(
    policy: ActingPolicy,
    choices: Sequence[Prompt],
    rows: range,
    *,
    seed: int,
    size: tuple[int, int],
    batch: int,
    tick: Callable[[int], None],
) -> UInt8[Tensor, "N 3 H W"]:
    """The pictures with these indices, from the policy's sample law, at addresses (seed, "eval", row): the same ones in any batch, but for
    the rounding of sums."""
    parts = []
    for start in range(rows.start, rows.stop, batch):
        some = range(start, min(start + batch, rows.stop))
        rng = Stream(seed=seed, path=("eval",), rows=tuple(some))
        rollout = policy.rollout([prompt_of(choices, seed, row) for row in some], rng)
        parts.append(to_bytes(policy.render(rollout), size).cpu())
        tick(len(some))
    return torch.cat(parts)


def draw_pictures(
    load: Callable[[], ActingPolicy],
    choices: Sequence[Prompt],
    folder: Path,
    *,
    count: int,
    seed: int,
    size: tuple[int, int],
    batch: int,
    settings: Mapping[str, Any],
    tick: Callable[[int], None] = lambda n: None,
) -> Path:
    """`folder`/pictures.npz: `count` pictures of prompts among `choices`, bytes [count, H, W, 3] as `arr_0`. What is there already is not
    drawn again, and the model is loaded only if something is to be drawn. `settings`, all that shapes a picture beside the rest of what is
    given, tells whether the folder's pictures are these: ConfigError if they are others, DataError if the disk fails."""
    told = json.dumps({"count": count, "seed": seed, "size": list(size), "prompts": digest(choices), **settings}, indent=2)
    refuse_others(folder, json.loads(told))
    file, policy = folder / PICTURES, None
    if file.is_file():
        tick(count)
    else:
        shards = {}
        for start in range(0, count, SHARD):
            rows = range(start, min(start + SHARD, count))
            shard = shards[rows] = folder / f"{rows.start:06d}-{rows.stop:06d}.safetensors"
            if shard.is_file():
                tick(len(rows))
                continue
            policy = policy or load()
            images = draw_shard(policy, choices, rows, seed=seed, size=size, batch=batch, tick=tick)
            if not (folder / SETTINGS).is_file():  # a law that cannot be drawn under has failed by now, and left no trace
                with whole(folder / SETTINGS) as beside:
                    write_bytes(beside, told.encode())
            with whole(shard) as beside:
                write_tensors(beside, {"images": images})
        with whole(file) as beside:
            write_npz(beside, (count, *size, 3), (read_tensors(shard)["images"] for shard in shards.values()))
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    return file


def write_npz(file: Path, shape: tuple[int, int, int, int], parts: Iterator[UInt8[Tensor, "n 3 H W"]]) -> None:
    """`arr_0` of bytes [N, H, W, 3], a part at a time: together they are more than memory holds. The same pictures give the same file."""
    with file.open("wb") as out:
        with zipfile.ZipFile(out, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})  # type: ignore[arg-type]
            for images in parts:
                array.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        out.flush()
        os.fsync(out.fileno())


def digest(asked: Sequence[object]) -> str:
    """What tells lists of prompts apart."""
    return hashlib.sha256(repr(list(asked)).encode()).hexdigest()[:16]


def refuse_others(folder: Path, told: Mapping[str, Any], noted: Collection[str] = ()) -> None:
    """ConfigError where the folder holds other pictures than `told` makes, or something else. What is only `noted` may differ."""
    file = folder / SETTINGS
    if not file.is_file():
        if folder.is_file() or (folder.is_dir() and any(_TMP not in entry.name for entry in folder.iterdir())):
            raise ConfigError(f"{folder}: is there already, and no evaluation drew it (it has no {SETTINGS}). Give another --out.")
        return
    try:
        found = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: cannot be understood ({error}). Remove the folder; its pictures will be drawn again.") from error
    if others := [name for name in {**told, **found} if told.get(name) != found.get(name) and name not in noted]:
        differ = "; ".join(f"{name} was {found.get(name)}, is {told.get(name)}" for name in others)
        raise ConfigError(f"{folder}: holds pictures that were drawn otherwise: {differ}. Give another --out, or remove the folder.")


@contextmanager
def whole(file: Path, room: Path | None = None) -> Iterator[Path]:
    """Where to write `file`, which then is there whole or not at all: beside it, or in the folder `room` of the same disk."""
    beside = (room or file.parent) / f"{file.name}{_TMP}{os.getpid()}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(file)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written ({error.strerror}). What was drawn is kept: make room and run the same command again."
        ) from error
    finally:
        beside.unlink(missing_ok=True)
