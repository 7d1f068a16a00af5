"""Coloured pictures of letters, drawn from many real fonts. A font family belongs to one set alone: to train on, for the network that
rewards, for the network that judges, or held out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageFont

from varl.config import GlyphsConfig
from varl.data.pictures import Pictures
from varl.data.words import FAINTEST, Line, ink_of, paint
from varl.errors import DataError
from varl.rng import generator
from varl.types import Prompt

Split = Literal["train", "reward", "judge", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

FONT_FILES = (".ttf", ".otf", ".pfb")
EM = 96
"""Pixels per em at which a letter is drawn, once, and from which it is scaled: no hinting shows."""
NOTHING = "\uffff"
"""No character: what a font draws for it is what it draws for letters that it lacks."""
SAME_FACE = 0.01
"""Root mean square difference of all letters (coverage 0 to 1) up to which two faces are one: the same font in two formats."""
SAME_DESIGN = 0.045
"""... and up to which two families are one, under two names. Measured on 435 faces of 25 families: Vera and DejaVu 0, Latin and Computer
Modern 0.024, Termes and STIX 0.026; designs of different hands 0.066 and more."""

Coverage = UInt8[np.ndarray, "_ _"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """One style of one font."""

    family: str
    path: Path
    style: str
    """Of a variable font, the name of one of its instances; else empty."""

    @property
    def name(self) -> str:
        return f"{self.path.stem} {self.style}".strip()


# ---- which fonts there are --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def faces(config: GlyphsConfig) -> tuple[Face, ...]:
    """Every face of `config.fonts` that draws all of `config.letters` so that they can be told apart, each once, sorted. Families that draw
    the same letters have one name."""
    found: dict[Face, list[Coverage]] = {}
    for file in font_files(config.fonts):
        font = _open(file)
        for style in _styles(font):
            if style:
                font.set_variation_by_name(style)
            drawn = [ink_of(font, letter) for letter in (*config.letters, NOTHING)]
            inks = [ink[0] for ink in drawn[:-1] if ink is not None]
            shapes = {ink[0].tobytes() for ink in drawn if ink is not None}
            if len(inks) == len(config.letters) and len(shapes) == len(inks) + (drawn[-1] is not None):
                found[Face(family=family_of(font.getname()[0] or file.stem), path=file, style=style)] = inks
    kept = sorted(_legible(found), key=lambda face: (face.family, face.path.name, face.style))
    if not kept:
        raise DataError(f"glyphs.fonts={config.fonts}: no face in them draws all of {config.letters!r}. Name others, or fewer letters.")
    return tuple(_distinct({face: found[face] for face in kept}))


def font_files(sources: Sequence[str]) -> list[Path]:
    """The font files of packages, folders and files, each source's sorted."""
    places, absent = [], []
    for source in sources:
        package = find_spec(source) if source.isidentifier() else None
        roots = [Path(part) for part in (package.submodule_search_locations or ())] if package else [Path(source)]
        places += [(source, root) for root in roots if root.exists()]
        absent += [] if all(root.exists() for root in roots) else [source]
    if absent:
        packages = " ".join(source.replace("_", "-") for source in absent if source.isidentifier())
        fix = f"Run `pip install {packages}`, or set" if packages else "Set"
        raise DataError(
            f"glyphs.fonts: {', '.join(absent)}: no such package, folder or file. {fix} glyphs.fonts to packages or folders of fonts."
        )
    files = []
    for source, root in places:
        own = [root] if root.is_file() else [file for file in root.rglob("*") if file.suffix.lower() in FONT_FILES]
        if not own:
            raise DataError(f"glyphs.fonts: {source} holds no font ({', '.join(FONT_FILES)}). Take it out, or name another.")
        files += sorted(own, key=lambda file: file.relative_to(root).as_posix())
    return files


def family_of(name: str) -> str:
    """The family of a font by its own name: the first word, so that Sans, Serif, Mono and Condensed of one maker stay together; all of
    Computer Modern is one.

    "Roboto Condensed" -> "Roboto", "cmtt10" -> "Computer Modern"."""
    return "Computer Modern" if re.fullmatch(r"cm[a-z]+\d+", name) else name.split()[0]


def _open(file: Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(file), EM, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"font {file}: cannot be read ({error}). Install it again, or take it out of glyphs.fonts.") from error


def _styles(font: ImageFont.FreeTypeFont) -> list[str]:
    """Names of a variable font's instances of normal width, or one empty name."""
    try:
        names = [name.decode() for name in font.get_variation_names()]
    except OSError:
        return [""]
    return [name for name in names if "Condensed" not in name and "Expanded" not in name]


def _legible(found: dict[Face, list[Coverage]]) -> list[Face]:
    """The faces of which most letters, stretched to one size, look more like that letter in the other families than like another letter:
    symbols in the places of letters do not. Where there is only one family, all."""
    if not found:
        return []
    look = {}
    for face, inks in found.items():
        flat = np.stack([np.asarray(Image.fromarray(ink).resize((16, 16), Image.Resampling.BOX), np.float32).ravel() for ink in inks])
        flat -= flat.mean(1, keepdims=True)
        look[face] = flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)
    families = {face.family for face in found}
    mean = {family: np.mean([part for face, part in look.items() if face.family == family], axis=0) for family in families}
    kept = []
    for face, own in look.items():
        others = [part for family, part in mean.items() if family != face.family]
        best = (own @ np.mean(others, axis=0).T).argmax(1) if others else np.arange(len(own))
        kept += [face] if (best == np.arange(len(own))).mean() >= 0.5 else []
    return kept


def _distinct(found: dict[Face, list[Coverage]]) -> list[Face]:
    """The faces without those that were there before, families that share a design under the first of their names."""
    kept = list(found)
    pictures = np.array([[scaled(ink, (24, 24), 0.9, 0) for ink in found[face]] for face in kept])
    look = pictures.reshape(len(kept), -1).astype(np.float32) / 255
    square = (look * look).sum(1)
    gap = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * look @ look.T, 0) / look.shape[1])
    name = {face.family: face.family for face in kept}
    for i, j in zip(*np.nonzero(np.triu(gap <= SAME_DESIGN, 1)), strict=True):
        first, second = sorted((name[kept[i].family], name[kept[j].family]))
        name = {family: first if now == second else now for family, now in name.items()}
    new = [i for i in range(len(kept)) if not (gap[i, :i] <= SAME_FACE).any()]
    return [replace(kept[i], family=name[kept[i].family]) for i in new]


def split_families(families: Sequence[str], shares: Sequence[float], seed: int) -> dict[Split, tuple[str, ...]]:
    """Which family goes where: a seeded order, cut so that each set has its share, and one family at least where its share is not 0."""
    names = sorted(set(families))
    counts = [int(share > 0) for share in shares]
    if len(names) < sum(counts):
        raise DataError(
            f"glyphs: {len(names)} font families ({', '.join(names)}) cannot fill {sum(counts)} sets that share none. Name more in "
            "glyphs.fonts, or set some of glyphs.shares to 0."
        )
    while sum(counts) < len(names):
        wanted = [len(names) * share / sum(shares) - count for share, count in zip(shares, counts, strict=True)]
        counts[wanted.index(max(wanted))] += 1
    order = iter([names[i] for i in torch.randperm(len(names), generator=generator(seed, "families")).tolist()])
    return {split: tuple(sorted(next(order) for _ in range(count))) for split, count in zip(SPLITS, counts, strict=True)}


def faces_of(config: GlyphsConfig, split: Split) -> tuple[Face, ...]:
    """The faces of one set."""
    every = faces(config)
    own = split_families([face.family for face in every], config.shares, config.seed)[split]
    return tuple(face for face in every if face.family in own)


# ---- letters ----------------------------------------------------------------------------------------------------------------------------


def scaled(ink: Coverage, image_size: tuple[int, int], share: float, margin: int) -> Coverage:
    """A whole picture's coverage: the ink of a letter drawn at `EM`, its middle in the middle, `share` of the height per em, or as large as
    leaves `margin` pixels on each side."""
    height, width = image_size
    ratio = max(EM / (share * height), ink.shape[0] / (height - 2 * margin), ink.shape[1] / (width - 2 * margin))
    x, y = width * ratio / 2, height * ratio / 2
    half_w, half_h = int(max(x, ink.shape[1] / 2)) + 2, int(max(y, ink.shape[0] / 2)) + 2
    sheet = np.zeros((2 * half_h, 2 * half_w), np.uint8)
    top, left = half_h - ink.shape[0] // 2, half_w - ink.shape[1] // 2
    sheet[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    mid_x, mid_y = left + ink.shape[1] / 2, top + ink.shape[0] / 2
    box = (mid_x - x, mid_y - y, mid_x + x, mid_y + y)
    return np.asarray(Image.fromarray(sheet).resize((width, height), Image.Resampling.BOX, box=box))


@lru_cache(maxsize=1024)
def _lines(face: Face, letters: str, image_size: tuple[int, int], sizes: tuple[float, ...], jitter: int) -> tuple[tuple[Line, ...], ...]:
    """For each letter, for each size, the letter in the middle of the picture."""
    font = _open(face.path)
    if face.style:
        font.set_variation_by_name(face.style)
    rows = []
    for letter in letters:
        drawn = ink_of(font, letter)
        assert drawn is not None, f"{face.name} had {letter!r} when its faces were listed"
        lines = []
        for share in sizes:
            coverage = scaled(drawn[0], image_size, share, jitter).copy()
            coverage[coverage < FAINTEST] = 0
            down, across = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
            ink = coverage[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
            lines.append(Line(text=letter, top=int(down[0]), left=int(across[0]), ink=ink))
        rows.append(tuple(lines))
    return tuple(rows)


@lru_cache(maxsize=16)
def _kinds(config: GlyphsConfig, split: Split) -> tuple[tuple[Face, ...], ...]:
    """The faces of one set, family by family."""
    families: dict[str, list[Face]] = {}
    for face in faces_of(config, split):
        families.setdefault(face.family, []).append(face)
    if not families:
        raise DataError(f"glyphs.shares={config.shares}: no font family is in {split!r}. Give it a share.")
    return tuple(map(tuple, families.values()))


def draw(config: GlyphsConfig, split: Split, seed: int, index: int) -> UInt8[np.ndarray, "H W 3"]:
    """Picture `index` of one set: of letter index mod their number. Its family, face, size, palette and shift are drawn evenly."""
    kinds, moves = _kinds(config, split), 2 * config.jitter + 1
    share = torch.rand(6, generator=generator(seed, "glyphs", split, index), dtype=torch.float64).tolist()
    kind = kinds[int(share[0] * len(kinds))]
    face = kind[int(share[1] * len(kind))]
    lines = _lines(face, config.letters, config.image_size, config.sizes, config.jitter)[index % len(config.letters)]
    line = lines[int(share[2] * len(lines))]
    down, across = (int(part * moves) - config.jitter for part in share[4:])
    palette = config.palettes[int(share[3] * len(config.palettes))]
    return paint([replace(line, top=line.top + down, left=line.left + across)], palette, config.image_size)


def pictures(config: GlyphsConfig, split: Split, n: int, seed: int) -> Pictures:
    """`n` pictures of one set, labels 0 1 2 ... in turn, each drawn when it is read."""
    _kinds(config, split)
    letters, name = config.letters, f"glyphs:{split}:{seed}"
    prompts = tuple(Prompt(text=letters[i % len(letters)], label=i % len(letters), image=f"{name}#{i}") for i in range(n))
    read = partial(_read, config, split, seed)
    return Pictures(prompts=prompts, classes=tuple(letters), image_size=config.image_size, read=read)


def _read(config: GlyphsConfig, split: Split, seed: int, address: str) -> UInt8[np.ndarray, "H W 3"]:
    return draw(config, split, seed, int(address.rpartition("#")[2]))
