"""Faces to draw words with, that pip brings: no system fonts, no downloads."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from varl.errors import DataError

FACES = {
    "sans": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif-Bold.ttf",
    "mono": "DejaVuSansMono-Bold.ttf",
    "oblique": "DejaVuSans-BoldOblique.ttf",
    "italic": "DejaVuSerif-BoldItalic.ttf",
    "thin-sans": "DejaVuSans.ttf",
    "thin-serif": "DejaVuSerif.ttf",
    "thin-mono": "DejaVuSansMono.ttf",
    "times": "STIXGeneralBol.ttf",
}
"""Name -> file in matplotlib's font folder. matplotlib itself is never imported."""


def font_path(name: str) -> Path:
    """The font file behind a name of `FACES`, or `name` itself where it is the path of one."""
    if name not in FACES:
        if Path(name).is_file():
            return Path(name)
        raise DataError(f"font {name!r}: neither a bundled face ({', '.join(FACES)}) nor a file. Use one of these names, or a .ttf path.")
    package = find_spec("matplotlib")
    folders = package.submodule_search_locations if package else None
    if not folders:
        raise DataError(f"font {name!r}: the bundled faces come with matplotlib, which is not installed. Run `pip install 'varl[words]'`.")
    return Path(folders[0]) / "mpl-data" / "fonts" / "ttf" / FACES[name]


@cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """The face at `size` pixels per em. Laid out glyph by glyph, which is the same wherever it runs."""
    path = font_path(name)
    try:
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"font {name!r}: {path} cannot be read as a font ({error}). Use a .ttf or .otf file.") from error
