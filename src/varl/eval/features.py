"""Pictures through a network, in batches, and once: features are kept on disk under a hash of the network and of the pictures."""

import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from varl.checkpoints.folder import file_sha256, read_tensors, write_tensors
from varl.data.folder import open_rgb
from varl.data.pictures import PICTURE_FILES, is_picture
from varl.errors import ConfigError, DataError, NumericsError

Extractor = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B D"]]
"""Pixels in [0, 1] in, features out: a module in eval mode, or a function on the CPU."""


@runtime_checkable
class Classifier(Protocol):
    """An extractor that can also name classes: what Inception score needs."""

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]: ...

    def classify(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        """Log-probabilities of the classes."""
        ...


# ---- sets of pictures -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSet:
    """A set of pictures of one size that can be read as often as needed, some at a time."""

    where: str
    count: int
    size: tuple[int, int]
    """H, W."""
    batches: Callable[[int], Iterator[UInt8[Tensor, "B 3 H W"]]]
    digest: Callable[[], str]
    """A hash of the content."""


def open_pictures(source: Path | str | Tensor) -> PictureSet:
    """A tensor [N, 3, H, W] (bytes, or floats in [0, 1], which are rounded to bytes as a file would have them), a folder of picture files
    at any depth, in the order of their paths, or an npz file with bytes [N, H, W, 3] as `arr_0`."""
    if isinstance(source, Tensor):
        return _tensor(source)
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".npz":
        return _npz(path)
    what = "is neither a folder nor an npz file" if path.exists() else "there is no such file or folder"
    raise DataError(f"pictures {str(path)!r}: {what}. Give a folder of pictures, or an npz file that holds them as `arr_0`.")


def _tensor(images: Tensor) -> PictureSet:
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise DataError(f"pictures: a tensor of shape {list(images.shape)}, must be [N, 3, H, W]. Stack RGB pictures.")
    if images.dtype != torch.uint8:
        if not images.is_floating_point() or not ((images >= 0) & (images <= 1)).all():
            raise DataError(f"pictures: {images.dtype} values that are not all in [0, 1]. Give bytes, or scale and clamp them.")
        images = (images.float() * 255).round().to(torch.uint8)
    images = images.cpu().contiguous()
    return PictureSet(
        where="pictures",
        count=len(images),
        size=(images.shape[2], images.shape[3]),
        batches=lambda batch: iter(images.split(batch)),
        digest=lambda: hashlib.sha256(repr(images.shape).encode() + images.numpy().tobytes()).hexdigest(),
    )


def _folder(path: Path) -> PictureSet:
    files = sorted(file for file in path.rglob("*") if is_picture(file))
    if not files:
        raise DataError(f"pictures {str(path)!r}: the folder holds no file that ends in {', '.join(PICTURE_FILES)}. Is it the right one?")
    size = _read(files[0]).shape[:2]

    def batches(batch: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(files), batch):
                read = list(pool.map(_read, files[start : start + batch]))
                for file, pixels in zip(files[start:], read, strict=False):
                    if pixels.shape[:2] != size:
                        raise DataError(
                            f"picture {file}: is {pixels.shape[0]}x{pixels.shape[1]} (height x width), {files[0].name} is "
                            f"{size[0]}x{size[1]}. Bring all to one size."
                        )
                yield torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2)

    def digest() -> str:
        total = hashlib.sha256()
        for file in files:
            total.update(file_sha256(file).encode())
        return total.hexdigest()

    return PictureSet(where=str(path), count=len(files), size=size, batches=batches, digest=digest)


def _read(file: Path) -> np.ndarray:
    return np.asarray(open_rgb(file, str(file)))


# ---- npz files ------------------------------------------------------------------------------------------------------------------------


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays in an npz file; nothing else of it is read."""
    if not zipfile.is_zipfile(path):
        what = "is no npz file, or was not copied whole" if path.exists() else "there is no such file"
        raise DataError(f"{path}: {what}. Write it with numpy.savez, or copy it again.")
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    shapes = {}
    for name in names:
        with _npz_array(path, name) as (_, shape, _):
            shapes[name] = shape
    return shapes


def npz_rows(path: Path, name: str, rows: int) -> Iterator[np.ndarray]:
    """An array of an npz file, some rows at a time: evaluators' files hold more pictures than memory does."""
    with _npz_array(path, name) as (data, shape, dtype):
        if not shape or dtype.hasobject:
            raise DataError(f"{path}: `{name}` is not a plain array, row after row. Save numpy.ascontiguousarray of it.")
        bytes_per_row = dtype.itemsize * math.prod(shape[1:])
        for start in range(0, shape[0], rows):
            some = min(rows, shape[0] - start)
            yield np.frombuffer(bytearray(data.read(some * bytes_per_row)), dtype).reshape(some, *shape[1:])
        data.read(1)  # at the end the checksum is compared


@contextmanager
def _npz_array(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as data:
            shape, fortran, dtype = headers[np.lib.format.read_magic(data)](data)
            yield data, shape, np.dtype(object) if fortran else dtype
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise DataError(f"{path}: `{name}` cannot be read ({error}). The file is damaged: copy it again.") from error


def _npz(path: Path) -> PictureSet:
    shape = npz_shapes(path).get("arr_0")
    if shape is None or len(shape) != 4 or shape[3] != 3 or not shape[0]:
        found = "is missing" if shape is None else f"has shape {list(shape)}"
        raise DataError(f"{path}: `arr_0` {found}; pictures are bytes [N, H, W, 3]. Is it the right file?")

    def batches(batch: int) -> Iterator[Tensor]:
        for rows in npz_rows(path, "arr_0", batch):
            if rows.dtype != np.uint8:
                raise DataError(f"{path}: `arr_0` holds {rows.dtype}, must hold bytes (uint8), 0 to 255. Save it so.")
            yield torch.from_numpy(rows).permute(0, 3, 1, 2)

    return PictureSet(where=str(path), count=shape[0], size=shape[1:3], batches=batches, digest=lambda: file_sha256(path))


# ---- features -------------------------------------------------------------------------------------------------------------------------


def device_of(extractor: Extractor) -> torch.device:
    """Where a module's first parameter lies; the CPU for anything else."""
    first = next(extractor.parameters(), None) if isinstance(extractor, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def fingerprint(extractor: Extractor) -> str:
    """A hash of a module's classes, of what it prints as, and of its weights. Code that changes with none of these is not seen."""
    if not isinstance(extractor, nn.Module):
        raise ConfigError(
            f"extractor {extractor!r}: is no nn.Module, so that its features in a cache could not be told from another's. Wrap it in one, "
            "or give no cache."
        )
    total = hashlib.sha256(repr(extractor).encode())
    for module in extractor.modules():
        total.update(f"{type(module).__module__}.{type(module).__qualname__};".encode())
    for name, tensor in extractor.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def extract(
    pictures: PictureSet,
    extractor: Extractor,
    *,
    batch: int = 64,
    cache: Path | str | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> Float[Tensor, "N D"]:
    """Features of all pictures, in fp32 on the CPU. With `cache`, a folder, those of the same pictures and extractor are read from there,
    and written there for the next time."""
    if isinstance(extractor, nn.Module) and extractor.training:
        raise ConfigError(
            f"extractor {type(extractor).__name__}: is in training mode, where features may be random. Call its eval() first."
        )
    file = None if cache is None else Path(cache) / f"{fingerprint(extractor)[:16]}-{pictures.digest()[:32]}.safetensors"
    if file is not None and file.is_file():
        tick(pictures.count)
        return read_tensors(file)["features"]
    device, parts = device_of(extractor), []
    for images in pictures.batches(batch):
        features = extractor(images.to(device).float() / 255)
        if features.ndim != 2 or len(features) != len(images):
            raise ConfigError(
                f"extractor: gave {list(features.shape)} for {len(images)} pictures, must give [{len(images)}, D]. Pool or flatten its "
                "output."
            )
        parts.append(features.float().cpu())
        tick(len(images))
    features = torch.cat(parts)
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(1).sum())
        raise NumericsError(
            f"{pictures.where}: features of {bad} of {len(features)} pictures are not finite. Check the extractor's weights."
        )
    if file is not None:
        _keep(file, features)
    return features


def _keep(file: Path, features: Tensor) -> None:
    beside = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(beside, {"features": features})
        beside.replace(file)
    except OSError as error:
        raise DataError(f"cache {str(file.parent)!r}: cannot be written ({error.strerror}). Give another folder, or none.") from error
