"""Tokens of pictures on disk, so that a picture is encoded once. A picture is known by its pixels, a cache by its tokenizer's weights."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from varl.data.words import as_float
from varl.errors import DataError

MANIFEST = "tokens.json"
LAYOUT = 1
"""Of what lies in a cache; another number is refused."""
_TMP = ".tmp-"

Encode = Callable[[Float[Tensor, "B 3 H W"]], Int[Tensor, "B L"]]
"""Pixels in [0, 1] to ids."""


def tokenizer_key(weights: Mapping[str, Tensor], config: str) -> str:
    """The name of a tokenizer by what it does: sha256 of its config (as text) and of its weights' names, types, shapes and bytes."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def picture_keys(images: UInt8[Tensor, "B 3 H W"]) -> list[bytes]:
    """sha256 of each picture's size and pixels."""
    size = "x".join(map(str, images.shape[1:])).encode()
    return [hashlib.sha256(size + image.contiguous().numpy().tobytes()).digest() for image in images]


class TokenCache:
    """A folder of tokens that one tokenizer made: a manifest that names it, and files of picture keys and ids, each whole or not there and
    named by the hash of what it holds. Several processes may write to it at once."""

    def __init__(self, path: Path | str, *, tokenizer: str, name: str) -> None:
        """`tokenizer` is its `tokenizer_key`, `name` what the user calls it. A folder of another tokenizer is a DataError."""
        self.path = Path(path)
        self.rows: dict[bytes, Int[Tensor, " L"]] = {}
        file = self.path / MANIFEST
        if file.exists():
            self._refuse_others(file, tokenizer, name)
        elif self.path.exists() and (self.path.is_file() or any(_TMP not in part.name for part in self.path.iterdir())):
            raise DataError(f"{path}: is there already and is no cache of tokens (it has no {MANIFEST}). Give a new folder.")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"layout": LAYOUT, "tokenizer": tokenizer, "name": name}, indent=2).encode())
        for part in sorted(self.path.glob("*.safetensors")):
            self._read(part)

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, images: Float[Tensor, "B 3 H W"], encode: Encode) -> Int[Tensor, "B L"]:
        """The tokens of pictures in [0, 1], each pixel taken as the nearest of a file's 256 levels, which changes none that came from a
        file. Those that the cache lacks are encoded, together, each once, and kept."""
        pixels = (images * 255).round().to("cpu", torch.uint8)
        keys = picture_keys(pixels)
        new = {key: i for i, key in enumerate(keys) if key not in self.rows}
        if new:
            self._add(list(new), encode(as_float(pixels[list(new.values())])).to("cpu", torch.int32))
        return torch.stack([self.rows[key] for key in keys]).long()

    def _add(self, keys: list[bytes], ids: Int[Tensor, "N L"]) -> None:
        self._check(ids, "the tokenizer")
        data = save({"keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).copy()).view(-1, 32), "ids": ids.contiguous()})
        write_whole(self.path / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)
        self.rows |= dict(zip(keys, ids, strict=True))

    def _read(self, file: Path) -> None:
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != file.stem:
            raise DataError(f"{file}: is damaged (its sha256 is not its name). Delete it; its pictures will be encoded again.")
        try:
            tensors = load(data)
            keys, ids = tensors["keys"], tensors["ids"]
        except (SafetensorError, KeyError) as error:
            raise DataError(f"{file}: holds no tokens ({error}). Delete it, or give another folder.") from error
        self._check(ids, str(file))
        self.rows |= dict(zip((row.numpy().tobytes() for row in keys), ids, strict=True))

    def _check(self, ids: Int[Tensor, "N L"], where: str) -> None:
        have = next(iter(self.rows.values()), ids[0])
        if ids.shape[1] != len(have):
            raise DataError(
                f"{self.path}: holds pictures of {len(have)} tokens, {where} gives {ids.shape[1]}. Keep pictures of another size in a "
                "cache of their own."
            )

    def _refuse_others(self, file: Path, tokenizer: str, name: str) -> None:
        try:
            manifest = json.loads(file.read_bytes())
            layout, theirs, called = manifest["layout"], manifest["tokenizer"], manifest["name"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: cannot be understood ({error!r}). Delete the folder; its pictures will be encoded again.") from error
        if layout != LAYOUT:
            raise DataError(
                f"{file}: has layout {layout}, this VARL writes {LAYOUT}. Delete the folder; its pictures will be encoded again."
            )
        if theirs != tokenizer:
            raise DataError(
                f"{self.path}: holds tokens of the tokenizer {called!r} ({theirs[:12]}), not of {name!r} ({tokenizer[:12]}): their ids "
                "mean other things. Give another folder, or delete this one."
            )


def write_whole(file: Path, data: bytes) -> None:
    """The file whole or not at all."""
    beside = file.with_name(f"{file.name}{_TMP}{os.getpid()}")
    try:
        with beside.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DataError(f"{file}: cannot be written ({error.strerror}). Make room there, or choose another folder.") from error
