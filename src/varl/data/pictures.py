"""Real pictures and what they show, from wherever they lie: folders, prompts.jsonl, saved Hugging Face data sets, or memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from varl.config import PicturesConfig
from varl.data.folder import PROMPTS, open_rgb, path_of, read_folder
from varl.data.words import as_float
from varl.errors import DataError
from varl.rng import generator
from varl.types import Prompt

PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Pixels = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictures:
    """Pictures and what each shows. A prompt's `image` is the address of its picture: a path, or a row as `NAME#ROW`."""

    prompts: tuple[Prompt, ...]
    classes: tuple[str, ...] = ()
    """Names of the labels 0, 1, ..., where the source has names."""
    image_size: tuple[int, int]
    """(H, W) in pixels."""
    read: Callable[[str], Pixels]
    """From an address to pixels."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "3 H W"], Prompt]]:
        """Each picture in [0, 1] with its prompt, read when its turn comes."""
        return ((self.images([prompt])[0], prompt) for prompt in self.prompts)

    def images(self, prompts: Sequence[Prompt]) -> Float[Tensor, "B 3 H W"]:
        """The pictures of these prompts, in [0, 1]."""
        return as_float(self.pixels(prompts))

    def pixels(self, prompts: Sequence[Prompt]) -> UInt8[Tensor, "B 3 H W"]:
        """The pictures of these prompts, 0 to 255."""
        pictures = np.empty((len(prompts), *self.image_size, 3), np.uint8)
        for i, prompt in enumerate(prompts):
            pictures[i] = self.read(path_of(prompt))
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def read_pictures(config: PicturesConfig) -> Pictures:
    """The pictures at `config.path`, `config.share` of them, listed but not yet opened: a folder with prompts.jsonl, a saved data set, a
    folder with a sub-folder for each class (labels in the order of the names), or a folder of pictures."""
    path = Path(config.path)
    if not path.is_dir():
        raise DataError(f"pictures.path={config.path!r}: there is no such folder. Give a folder of pictures.")
    opened = open_path
    classes: tuple[str, ...] = ()
    if (path / PROMPTS).is_file():
        prompts = read_folder(path, open_pictures=False)
        for prompt in prompts:
            path_of(prompt)
    elif any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        prompts, classes, opened = _saved(config)
    else:
        prompts, classes = _folder(path)
    kept = tuple(prompts[i] for i in subset(len(prompts), config.share, config.seed))
    return Pictures(
        prompts=kept,
        classes=classes,
        image_size=config.image_size,
        read=lambda address: centre_crop(opened(address), config.image_size),
    )


def heldout_pictures(config: PicturesConfig, most: int) -> Pictures | None:
    """Some of the pictures at `config.heldout`, `most` at most and from all over them; None where there are none."""
    if config.heldout is None:
        return None
    found = read_pictures(replace(config, path=config.heldout, heldout=None, share=1.0))
    some = subset(len(found), min(1.0, most / len(found)), config.seed)
    return replace(found, prompts=tuple(found.prompts[i] for i in some))


def together(*parts: Pictures) -> Callable[[Sequence[Prompt]], Float[Tensor, "B 3 H W"]]:
    """From prompts of any of the parts to their pictures, in [0, 1]."""
    source = {prompt.image: part for part in parts for prompt in part.prompts}

    def images(prompts: Sequence[Prompt]) -> Float[Tensor, "B 3 H W"]:
        for prompt in prompts:
            if path_of(prompt) not in source:
                raise DataError(f"picture {prompt.image}: is not one of this data. Ask for the data's own prompts.")
        return torch.cat([source[prompt.image].images([prompt]) for prompt in prompts])

    return images


def subset(count: int, share: float, seed: int) -> list[int]:
    """Which of `count` pictures belong to a share of them: round(share * count), one at least, in their own order. The same seed's smaller
    share is a part of its larger one."""
    order = torch.randperm(count, generator=generator(seed, "subset")).tolist()
    return sorted(order[: max(1, round(share * count))])


def open_path(address: str) -> Image.Image:
    return open_rgb(Path(address), address)


def centre_crop(image: Image.Image, image_size: tuple[int, int]) -> Pixels:
    """The middle of `image`, scaled to cover `image_size` (H, W): halved by box filter while both sides are twice too long or more, then
    bicubic, then cut. As ADM prepares ImageNet (arXiv 2105.05233), for any ratio of sides."""
    height, width = image_size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


# ---- sources ----------------------------------------------------------------------------------------------------------------------------


def _folder(path: Path) -> tuple[list[Prompt], tuple[str, ...]]:
    own = sorted(file for file in path.iterdir() if is_picture(file))
    inside = {
        folder.name: sorted(file for file in folder.rglob("*") if is_picture(file))
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }
    filled = [name for name, files in inside.items() if files]
    if own and filled:
        raise DataError(
            f"{path}: holds pictures ({own[0].name}) and folders of pictures ({filled[0]}). Put every picture into the folder of its "
            "class, or give a folder of pictures alone."
        )
    if own:
        return [Prompt(image=str(file)) for file in own], ()
    if not filled:
        raise DataError(f"{path}: holds no picture ({', '.join(PICTURE_FILES)}), {PROMPTS} or saved data set. Give the folder of one.")
    if len(filled) < len(inside):
        empty = next(name for name in inside if name not in filled)
        raise DataError(f"{path}: the class {empty!r} has no picture, but would be label {list(inside).index(empty)}. Fill or remove it.")
    names = tuple(inside)
    return [Prompt(text=name, label=label, image=str(file)) for label, name in enumerate(names) for file in inside[name]], names


def is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_FILES and not file.name.startswith(".") and file.is_file()


def _saved(config: PicturesConfig) -> tuple[list[Prompt], tuple[str, ...], Callable[[str], Image.Image]]:
    """Rows of what `datasets.Dataset.save_to_disk` wrote: columns `image`, and `label`, a caption, or both."""
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{config.path}: is a saved data set, and the package that reads it is not installed ({error}). Run `pip install 'varl[data]'`."
        ) from error
    try:
        data: Any = datasets.load_from_disk(config.path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{config.path}: cannot be read as a saved data set ({error}). Copy or save it again.") from error
    if isinstance(data, dict):
        if config.split not in data:
            raise DataError(f"{config.path}: has no split {config.split!r}. Set pictures.split to one of {', '.join(data)}.")
        data = data[config.split]
    columns = data.features
    if not isinstance(columns.get("image"), datasets.Image):
        raise DataError(
            f"{config.path}: has no column `image` of pictures, but {', '.join(columns)}. Rename or cast one to datasets.Image."
        )
    said = [name for name in ("label", config.caption) if name in columns]
    if not said:
        raise DataError(
            f"{config.path}: has neither a column `label` nor {config.caption!r}, but {', '.join(columns)}. Set pictures.caption to the "
            "column of the captions."
        )
    values = data.select_columns(said)[:]
    for name, kind in (("label", int), (config.caption, str)):
        for row, value in enumerate(values.get(name, ())):
            if not isinstance(value, kind):
                raise DataError(f"{config.path}: row {row}: {name}={value!r} must be {'a whole number' if kind is int else 'a string'}.")
    names = tuple(getattr(columns.get("label"), "names", None) or ())
    texts = values.get(config.caption) or [names[label] if names else "" for label in values["label"]]
    labels = values.get("label") or [None] * len(texts)
    prompts = [
        Prompt(text=text, label=label, image=f"{config.path}#{row}") for row, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    if not prompts:
        raise DataError(f"{config.path}: has no rows. Give a data set with pictures.")
    stored = data.cast_column("image", datasets.Image(decode=False))

    def opened(address: str) -> Image.Image:
        cell = stored[int(address.rpartition("#")[2])]["image"]
        return open_rgb(Path(cell["path"]) if cell["bytes"] is None else BytesIO(cell["bytes"]), address)

    return prompts, names, opened
