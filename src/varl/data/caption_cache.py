"""Features of captions on disk, so that a caption is encoded once, and the encoder is not even loaded where all are there."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from varl.data.token_cache import write_whole
from varl.errors import DataError

Encode = Callable[[str], Float[Tensor, "n C"]]
"""From a caption to the features of its tokens."""


class CaptionCache:
    """A caption encoder that remembers: a folder with a folder for each encoder, and in that a file for each caption, whole or not there,
    named by the sha256 of the caption. Several processes, and threads, may ask at once."""

    def __init__(self, path: Path | str, *, encoder: Callable[[], str], load: Callable[[], Encode]) -> None:
        """`encoder` names the encoder by what it does, and is called when a caption is first asked for; `load` loads it, and is called when
        a caption is asked for that the folder lacks."""
        self.path, self._name, self._load = Path(path), encoder, load
        self._one_at_a_time = threading.Lock()

    @cached_property
    def folder(self) -> Path:
        return self.path / hashlib.sha256(self._name().encode()).hexdigest()

    @cached_property
    def _encode(self) -> Encode:
        return self._load()

    def __call__(self, texts: Sequence[str]) -> list[Float[Tensor, "n C"]]:
        """Features of each caption's tokens, in fp32 on the CPU."""
        with self._one_at_a_time:
            return [self._features(text) for text in texts]

    def _features(self, text: str) -> Float[Tensor, "n C"]:
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
        if file.is_file():
            return _read(file)
        features = self._encode(text).contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, save({"features": features, "sha256": _digest(features)}))
        return features


def _digest(features: Float[Tensor, "n C"]) -> Tensor:
    return torch.from_numpy(np.frombuffer(hashlib.sha256(features.numpy().tobytes()).digest(), np.uint8).copy())


def _read(file: Path) -> Float[Tensor, "n C"]:
    try:
        tensors = load(file.read_bytes())
        features, digest = tensors["features"], tensors["sha256"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{file}: holds no features ({error}). Delete it; its caption will be encoded again.") from error
    if not torch.equal(digest, _digest(features)):
        raise DataError(f"{file}: is damaged (its sha256 differs). Delete it; its caption will be encoded again.")
    return features
