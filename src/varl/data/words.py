"""Pictures of words, drawn from real fonts: one to five lines of text, each with the exact box of its ink."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ImageFont
from torch import Tensor

from varl.config import WordsConfig
from varl.data.fonts import load_font
from varl.errors import DataError
from varl.rng import generator
from varl.types import Prompt, Region

Colour = tuple[int, int, int]

PALETTES: dict[str, tuple[Colour, Colour]] = {
    "ink": ((24, 24, 32), (244, 241, 232)),
    "night": ((240, 236, 214), (22, 26, 48)),
    "sea": ((232, 246, 250), (10, 84, 116)),
    "fire": ((255, 226, 120), (128, 18, 20)),
    "moss": ((28, 62, 30), (206, 226, 174)),
    "candy": ((128, 10, 84), (255, 212, 226)),
    "slate": ((222, 228, 234), (56, 66, 78)),
    "sand": ((92, 50, 14), (240, 220, 178)),
    "indigo": ((170, 180, 240), (20, 30, 90)),
    "wine": ((234, 164, 188), (84, 14, 38)),
    "pine": ((158, 202, 186), (8, 52, 36)),
    "plum": ((208, 170, 230), (58, 20, 80)),
}
"""Name -> colour of the text, colour of the ground (RGB). The last four share one difference between the two, (150, 150, 150): a picture is
then its ground plus the same ink whatever the palette, and a residual tokenizer can keep the colour in its coarsest token."""

SIZES = (0.875, 0.75, 0.625, 0.5, 0.4375, 0.375)
"""Pixels per em, as shares of the line height. Few, so that a short word and a long one differ little."""
SMALLEST = 6
"""Pixels per em under which letters are no longer told apart."""
FAINTEST = 8
"""Coverage (of 255) under which an edge pixel is left as ground, so that what is drawn can be seen and the box is exact."""


# ---- words ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WordSplit:
    """Three sets without a common word."""

    pretrain: tuple[str, ...]
    rl: tuple[str, ...]
    heldout: tuple[str, ...]


def word_list(config: WordsConfig) -> tuple[str, ...]:
    """The words of `config.word_list` in upper case, sorted, each once: only `config.letters`, `min_length` to `max_length` of them.

    `wonderwords` is that package's nouns, adjectives and verbs without its list of profanities; else it is a text file, one word a line."""
    if config.word_list == "wonderwords":
        assets = _wonderwords()
        banned = _lines(assets / "profanitylist.txt")
        raw = set().union(*(_lines(assets / f"{kind}list.txt") for kind in ("noun", "adjective", "verb"))) - banned
    elif Path(config.word_list).is_file():
        raw = _lines(Path(config.word_list))
    else:
        raise DataError(
            f"word_list {config.word_list!r}: neither `wonderwords` nor a file. Use that name, or the path of a text file, a word a line."
        )
    letters = set(config.letters)
    words = sorted(word for word in raw if config.min_length <= len(word) <= config.max_length and letters.issuperset(word))
    if not words:
        raise DataError(
            f"word_list {config.word_list!r}: none of its {len(raw)} words has {config.min_length} to {config.max_length} letters, all of "
            f"them in {config.letters!r}. Widen min_length, max_length or letters."
        )
    return tuple(words)


def _wonderwords() -> Path:
    package = find_spec("wonderwords")
    folders = package.submodule_search_locations if package else None
    if not folders:
        raise DataError(
            "word_list 'wonderwords': the package is not installed. Run `pip install 'varl[words]'`, or set word_list to the path of a "
            "text file with one word a line."
        )
    return Path(folders[0]) / "assets"


def _lines(path: Path) -> set[str]:
    try:
        return {line.strip().upper() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
    except UnicodeDecodeError as error:
        raise DataError(f"word_list {str(path)!r}: is not UTF-8 ({error}). Save it as UTF-8.") from error


def split(words: Sequence[str], config: WordsConfig) -> WordSplit:
    """Held-out words, words for RL only, and the rest. A word's place depends on its own letters alone: adding words moves none."""
    bins: tuple[list[str], list[str], list[str]] = ([], [], [])
    for word in words:
        digest = hashlib.blake2s(word.encode()).digest()
        heldout, rl = (int.from_bytes(digest[i : i + 8], "little") / 2**64 for i in (0, 8))
        bins[2 if heldout < config.heldout_share else 1 if rl < config.rl_share else 0].append(word)
    return WordSplit(pretrain=tuple(bins[0]), rl=tuple(bins[1]), heldout=tuple(bins[2]))


# ---- lay out and paint ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of text, placed."""

    text: str
    top: int
    left: int
    ink: UInt8[np.ndarray, "h w"]
    """Coverage, 0 to 255. Its first and last rows and columns all hold ink."""


def line_height(height: int | float, width: int | float) -> float:
    """The height of a line of about five letters that fills a slot: such a line is four times as wide as high."""
    return min(float(height), width / 4)


def slots(count: int, image_size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) in pixels of each of `count` regions, row by row, without overlap: one or two to a row, whichever lets
    the lines be higher."""
    height, width = image_size
    rows = max((count, -(-count // 2)), key=lambda rows: line_height(height / rows, width / -(-count // rows)))
    edges = [round(height * row / rows) for row in range(rows + 1)]
    boxes = []
    for row, (top, bottom) in enumerate(pairwise(edges)):
        columns = 1 if rows == count else min(2, count - 2 * row)
        sides = [round(width * column / columns) for column in range(columns + 1)]
        boxes += [(top, left, bottom, right) for left, right in pairwise(sides)]
    return boxes


def ink_of(font: ImageFont.FreeTypeFont, text: str) -> tuple[UInt8[np.ndarray, "h w"], int] | None:
    """The coverage of `text`, cut to its ink, and the row of its top in the font's own frame (pixels, downwards); None without ink."""
    mask, offset = font.getmask2(text, mode="L")
    coverage = np.asarray(mask, dtype=np.uint8).reshape(mask.size[::-1]).copy()
    coverage[coverage < FAINTEST] = 0
    rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    if not len(rows):
        return None
    coverage = coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    coverage.setflags(write=False)
    return coverage, offset[1] + int(rows[0])


@lru_cache(maxsize=65536)
def _ink(text: str, font: str, size: int) -> tuple[UInt8[np.ndarray, "h w"], int]:
    """`ink_of` the face at `size` pixels per em."""
    drawn = ink_of(load_font(font, size), text)
    if drawn is None:
        raise DataError(f"text {text!r}: font {font!r} draws nothing for it. Use letters that the font has.")
    return drawn


@lru_cache(maxsize=4096)
def _capitals(font: str, size: int) -> float:
    """The row of the middle of a capital letter, in the font's own frame."""
    ink, top = _ink("H", font, size)
    return top + ink.shape[0] / 2


def lay_out(texts: Sequence[str], font: str, image_size: tuple[int, int], shifts: Sequence[tuple[int, int]], jitter: int) -> list[Line]:
    """Each text in the middle of its slot, as large as fits with room to move by `jitter` pixels, then moved by its (down, right) shift.
    Neighbours in a row keep half a letter size between them."""
    lines = []
    for text, (top, left, bottom, right), (down, across) in zip(texts, slots(len(texts), image_size), shifts, strict=True):
        height, width = bottom - top, right - left
        sizes = [size for share in SIZES if (size := round(share * line_height(height, width))) >= SMALLEST]
        for size in sizes:
            ink, ink_top = _ink(text, font, size)
            y = math.floor(height / 2 + ink_top - _capitals(font, size) + 0.5)
            margin = 2 if width == image_size[1] else size // 2
            if ink.shape[1] + 2 * jitter + margin <= width and y >= jitter and y + ink.shape[0] + jitter <= height:
                x = (width - ink.shape[1]) // 2
                lines.append(Line(text=text, top=top + y + down, left=left + x + across, ink=ink))
                break
        else:
            raise DataError(
                f"text {text!r}: does not fit into {height}x{width} (height x width) pixels in font {font!r} at any of the sizes {sizes}, "
                f"jitter {jitter}. Make image_size larger, or max_length, regions or jitter smaller."
            )
    return lines


def paint(lines: Sequence[Line], palette: str, image_size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """The picture: ground + (text - ground) * coverage / 255, rounded."""
    text, ground = (np.array(colour, dtype=np.float32) for colour in _palette(palette))
    image = np.empty((*image_size, 3), np.uint8)
    image[:] = ground.astype(np.uint8)
    for line in lines:
        h, w = line.ink.shape
        share = line.ink[..., None].astype(np.float32) / 255
        image[line.top : line.top + h, line.left : line.left + w] = np.rint(ground + (text - ground) * share).astype(np.uint8)
    return image


def _palette(name: str) -> tuple[Colour, Colour]:
    if name not in PALETTES:
        raise DataError(f"palette {name!r}: unknown. Known: {', '.join(PALETTES)}.")
    return PALETTES[name]


def as_prompt(lines: Sequence[Line], font: str, palette: str, image_size: tuple[int, int]) -> Prompt:
    """What the picture shows: texts joined by `|`, the box of each one's ink, and (font, palette) as style."""
    height, width = image_size
    return Prompt(
        text="|".join(line.text for line in lines),
        style=(font, palette),
        regions=tuple(
            Region(
                text=line.text,
                box=(
                    line.left / width,
                    line.top / height,
                    (line.left + line.ink.shape[1]) / width,
                    (line.top + line.ink.shape[0]) / height,
                ),
            )
            for line in lines
        ),
    )


def render(
    texts: Sequence[str], font: str, palette: str, image_size: tuple[int, int], shifts: Sequence[tuple[int, int]] | None = None
) -> tuple[UInt8[np.ndarray, "H W 3"], Prompt]:
    """A picture of `texts`, and the prompt that describes it, boxes included. `shifts` (down, right) in pixels, one per text."""
    shifts = shifts or [(0, 0)] * len(texts)
    jitter = max(abs(pixels) for shift in shifts for pixels in shift)
    lines = lay_out(texts, font, image_size, shifts, jitter)
    return paint(lines, palette, image_size), as_prompt(lines, font, palette, image_size)


# ---- draw at random ---------------------------------------------------------------------------------------------------------------------


def _sample(words: Sequence[str], config: WordsConfig, seed: int, index: int) -> tuple[list[Line], str, str]:
    """Sample `index` of `seed`: its lines, font and palette. It depends on nothing else."""
    most = len(config.regions)
    number, font, palette, *rest = torch.rand(3 + 3 * most, generator=generator(seed, "words", index), dtype=torch.float64).tolist()
    number *= sum(config.regions)
    count = 1
    while count < most and number >= config.regions[count - 1]:
        number -= config.regions[count - 1]
        count += 1
    chosen: list[int] = []
    for share in rest[:count]:
        pick = int(share * (len(words) - len(chosen)))
        for earlier in sorted(chosen):
            pick += pick >= earlier
        chosen.append(pick)
    moves = [int(share * (2 * config.jitter + 1)) - config.jitter for share in rest[most:]]
    face = config.fonts[int(font * len(config.fonts))]
    shifts = [(moves[2 * i], moves[2 * i + 1]) for i in range(count)]
    lines = lay_out([words[i] for i in chosen], face, config.image_size, shifts, config.jitter)
    return lines, face, config.palettes[int(palette * len(config.palettes))]


def _check(words: Sequence[str], config: WordsConfig) -> None:
    if len(words) < len(config.regions):
        raise DataError(f"{len(words)} words cannot fill pictures of up to {len(config.regions)} different ones. Use a longer word list.")
    if not config.regions or min(config.regions) < 0 or sum(config.regions) <= 0:
        raise DataError(f"words.regions={config.regions}: shares of pictures with 1, 2, ... regions; none below 0, and not all 0.")


def prompts(words: Sequence[str], config: WordsConfig, n: int, seed: int) -> list[Prompt]:
    """`n` prompts, with the boxes that their texts have when drawn. Prompt i depends on (seed, i) alone."""
    _check(words, config)
    return [as_prompt(*_sample(words, config, seed, index), config.image_size) for index in range(n)]


def dataset(config: WordsConfig, words: Sequence[str], n: int, seed: int) -> tuple[UInt8[Tensor, "N 3 H W"], list[Prompt]]:
    """`n` pictures and their prompts: the same prompts as `prompts` gives."""
    _check(words, config)
    images = np.empty((n, *config.image_size, 3), np.uint8)
    said = []
    for index in range(n):
        lines, font, palette = _sample(words, config, seed, index)
        images[index] = paint(lines, palette, config.image_size)
        said.append(as_prompt(lines, font, palette, config.image_size))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), said


def as_float(images: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Pixels in [0, 1]."""
    return images.float() / 255
