"""A user's own data: a folder with prompts.jsonl, one JSON object a line, and the pictures that it names.

    {"text": "RED|FOX", "regions": [{"text": "RED", "box": [0.1, 0.1, 0.6, 0.4]}, {"text": "FOX"}], "image": "images/000000.png"}
    {"text": "two red dogs left of a bench, no cat", "objects": [{"name": "bench"}, {"name": "dog", "count": 2, "colour": "red",
     "position": ["left of", 0]}], "unwanted": [{"name": "cat"}]}

Every key is optional: text, regions, style (a list of strings), label (a whole number), image (a path within the folder), objects and
unwanted. A box is x0, y0, x1, y1 in shares of the picture. GenEval's lines are read as they are: their `prompt` is the text, `include` the
objects, `exclude` what is unwanted, `class` a name and `color` a colour; `tag` is passed over."""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from varl.errors import DataError
from varl.types import Box, Position, Prompt, Region, Wanted

PROMPTS = "prompts.jsonl"
KEYS = ("text", "regions", "style", "label", "image", "objects", "unwanted")
GENEVAL = {"prompt": "text", "include": "objects", "exclude": "unwanted", "class": "name", "color": "colour"}
"""What GenEval's lines call our keys."""


def write_folder(path: Path | str, images: UInt8[Tensor, "N 3 H W"] | None, prompts: Sequence[Prompt]) -> None:
    """Writes prompts.jsonl, and each picture as images/NNNNNN.png where there are any."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if images is not None:
        (folder / "images").mkdir(exist_ok=True)
    lines = []
    for i, prompt in enumerate(prompts):
        entry: dict[str, Any] = {"text": prompt.text}
        if prompt.regions:
            entry["regions"] = [{"text": r.text} | ({"box": list(r.box)} if r.box else {}) for r in prompt.regions]
        if prompt.style:
            entry["style"] = list(prompt.style)
        for key, wanted in (("objects", prompt.objects), ("unwanted", prompt.unwanted)):
            if wanted:
                entry[key] = [_written(one) for one in wanted]
        if prompt.label is not None:
            entry["label"] = prompt.label
        if images is not None:
            entry["image"] = f"images/{i:06d}.png"
            Image.fromarray(images[i].permute(1, 2, 0).contiguous().numpy()).save(folder / entry["image"])
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    (folder / PROMPTS).write_text("".join(lines), encoding="utf-8")


def _written(wanted: Wanted) -> dict[str, Any]:
    """The object as a line has it, without what is as it is if not told."""
    entry: dict[str, Any] = {"name": wanted.name, "count": wanted.count}
    if wanted.colour is not None:
        entry["colour"] = wanted.colour
    if wanted.attributes:
        entry["attributes"] = list(wanted.attributes)
    if wanted.position is not None:
        entry["position"] = list(wanted.position)
    return entry


def read_folder(path: Path | str, *, open_pictures: bool = True) -> list[Prompt]:
    """The folder's prompts, `image` as a full path. Every line and every picture is checked, of pictures only that they are there unless
    `open_pictures`; the first fault is a DataError that names its file and line."""
    file = Path(path) / PROMPTS
    if not file.is_file():
        raise DataError(f"data folder {str(path)!r}: has no {PROMPTS}. Write one JSON object a line, e.g. " + '{"text": "CAT"}.')
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 ({error}). Save it as UTF-8.") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(read_line(line, f"{file}:{number}", Path(path), open_pictures=open_pictures))
    if not prompts:
        raise DataError(f"{file}: is empty. Write one JSON object a line.")
    return prompts


def read_line(line: str, where: str, folder: Path, *, open_pictures: bool = True) -> Prompt:
    """The prompt of one line, `image` as a path in `folder`; DataError says with `where` what is wrong with it."""
    try:
        return _prompt(line, folder, open_pictures)
    except _Fault as fault:
        raise DataError(f"{where}: {fault}") from fault.__cause__


class _Fault(Exception):
    """What is wrong with a line, without its place."""


def _prompt(line: str, folder: Path, open_pictures: bool) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Fault(f"{line[:60]!r} is not JSON ({error}). Write one complete object on each line.") from error
    if isinstance(entry, dict):
        _typed(entry, "tag", str, None)
        entry = _renamed({key: value for key, value in entry.items() if key != "tag"})
    _object(entry, KEYS)
    return Prompt(
        text=_typed(entry, "text", str, ""),
        regions=tuple(_region(region) for region in _typed(entry, "regions", list, [])),
        style=tuple(_text("style", part) for part in _typed(entry, "style", list, [])),
        label=_typed(entry, "label", int, None),
        image=_picture(entry["image"], folder, open_pictures) if "image" in entry else None,
        objects=tuple(_wanted(part, place) for place, part in enumerate(_typed(entry, "objects", list, []))),
        unwanted=tuple(_wanted(part, None) for part in _typed(entry, "unwanted", list, [])),
    )


def _renamed(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with our keys, where it has GenEval's."""
    for theirs, ours in GENEVAL.items():
        if theirs in entry and ours in entry:
            raise _Fault(f"has {theirs} and {ours}, which are the same. Leave one of them out.")
    return {GENEVAL.get(key, key): value for key, value in entry.items()}


def _wanted(entry: Any, place: int | None) -> Wanted:
    """The object at that place of a prompt's; None: one that is unwanted, of which there is only a class and a count."""
    if isinstance(entry, dict):
        entry = _renamed(entry)
    _object(entry, ("name", "count") if place is None else ("name", "count", "colour", "attributes", "position"))
    name, count = _typed(entry, "name", str, ""), _typed(entry, "count", int, 1)
    if not name.strip():
        raise _Fault(f"object {entry!r} has no name. Add its class, such as dog.")
    if count < 1:
        raise _Fault(f"count={count} of {name!r}: must be 1 or more. What must not be there belongs to `unwanted`.")
    colour = _typed(entry, "colour", str, None)
    if colour is not None and not colour.strip():
        raise _Fault(f"colour={colour!r} of {name!r}: is empty. Name one, or leave the key out.")
    return Wanted(
        name=name,
        count=count,
        colour=colour,
        attributes=tuple(_text("attributes", part) for part in _typed(entry, "attributes", list, [])),
        position=_position(entry["position"], name, place) if place is not None and "position" in entry else None,
    )


def _position(value: Any, name: str, place: int) -> tuple[Position, int]:
    known = get_args(Position)
    if not isinstance(value, list) or len(value) != 2 or value[0] not in known or type(value[1]) is not int or not 0 <= value[1] < place:
        raise _Fault(
            f"position={value!r} of {name!r}: must be [where, i], where one of {', '.join(known)}, and i the place in the list, from 0, "
            "of an object before this one. Put the one that it is placed by before it."
        )
    return value[0], value[1]


def _object(entry: Any, keys: Sequence[str]) -> None:
    if not isinstance(entry, dict):
        raise _Fault(f"{entry!r} is not an object. Write {{...}} with keys of {', '.join(keys)}.")
    for key in entry:
        if key not in keys:
            raise _Fault(f"unknown key {key!r}. Known: {', '.join(keys)}.")


def _typed(entry: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = entry.get(key, default)
    if key in entry and (not isinstance(value, kind) or isinstance(value, bool)):
        names = {str: "a string", int: "a whole number", list: "a list"}
        raise _Fault(f"{key}={value!r} must be {names[kind]}. Correct it, or leave the key out.")
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _Fault(f"{key} holds {value!r}, must hold strings. Put it in quotes.")
    return value


def _region(entry: Any) -> Region:
    _object(entry, ("text", "box"))
    text = _typed(entry, "text", str, "")
    if not text.strip():
        raise _Fault(f"region {entry!r} has no text. Add what shall be read there.")
    return Region(text=text, box=_box(entry["box"]) if "box" in entry else None)


def _box(value: Any) -> Box:
    numbers = isinstance(value, list) and len(value) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or not (0 <= value[0] < value[2] <= 1 and 0 <= value[1] < value[3] <= 1):
        raise _Fault(f"box={value!r} must be [x0, y0, x1, y1] with 0 <= x0 < x1 <= 1, y alike. Give shares of the picture, not pixels.")
    x0, y0, x1, y1 = value
    return float(x0), float(y0), float(x1), float(y1)


def _picture(value: Any, folder: Path, open_pictures: bool) -> str:
    path = folder / _text("image", value)
    if not path.is_file():
        raise _Fault(f"image {value!r}: there is no file {path}. Paths are relative to the folder.")
    if open_pictures:
        try:
            open_rgb(path, repr(value))
        except DataError as error:
            raise _Fault(str(error)) from error
    return str(path)


def open_rgb(source: Path | BytesIO, name: str) -> Image.Image:
    """The picture, decoded and as RGB; a DataError says with `name` which one cannot be."""
    try:
        with Image.open(source) as image:
            image.load()
            if image.mode[0] not in "IF":
                return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image {name}: cannot be read ({error}). The file is damaged, or not a picture: write it again.") from error
    raise DataError(f"image {name}: has mode {image.mode}, more than 8 bits for each colour. Save it with 8 bits, as grey or RGB.")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as it is; grey and palette pictures converted; transparent ones laid on white."""
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")
    return image.convert("RGB")


def path_of(prompt: Prompt) -> str:
    """Where the prompt's picture is."""
    if prompt.image is None:
        raise DataError(f"prompt {prompt.text!r}: names no image. Add the key `image` to its line.")
    return prompt.image


def load_images(prompts: Sequence[Prompt], size: tuple[int, int]) -> UInt8[Tensor, "N 3 H W"]:
    """The prompts' pictures, each of `size` (H, W) pixels as it lies on disk: nothing is resized."""
    pictures = np.empty((len(prompts), *size, 3), np.uint8)
    for i, prompt in enumerate(prompts):
        path = path_of(prompt)
        image = open_rgb(Path(path), path)
        if (image.height, image.width) != size:
            raise DataError(
                f"image {path}: is {image.height}x{image.width} (height x width), must be {size[0]}x{size[1]}. Resize the pictures, or set "
                "image_size."
            )
        pictures[i] = np.asarray(image)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
