"""Prompts and pictures."""

from dataclasses import dataclass
from typing import Literal

from varl.config.demand import demand
from varl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class WordsConfig:
    """Pictures of words, drawn here from real fonts."""

    image_size: tuple[int, int] = (16, 64)
    """(H, W) in pixels."""
    fonts: tuple[str, ...] = ("sans", "serif", "mono")
    """Names of the bundled faces, or paths of font files."""
    palettes: tuple[str, ...] = ("ink", "night", "sea", "fire", "moss", "candy")
    """Colour pairs, text on ground."""
    word_list: str = "wonderwords"
    """`wonderwords`, or the path of a text file with one word a line."""
    letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """Words with other letters are left out."""
    min_length: int = 3
    max_length: int = 5
    heldout_share: float = 0.15
    """Share of the words kept from pre-training and from RL, for evaluation. Split by hash, so it does not depend on the list's order."""
    rl_share: float = 0.5
    """Share of the other words kept from pre-training, for RL only."""
    regions: tuple[float, ...] = (1.0,)
    """Share of pictures with 1, 2, ... text regions; the paper's balance for 2 to 5 is (0, 0.2, 0.3, 0.3, 0.2)."""
    jitter: int = 1
    """Pixels by which a region may move."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderConfig:
    """A user's own data: a folder with prompts.jsonl, and the pictures it names."""

    path: str
    heldout: str | None = None
    """Another such folder, for evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlyphsConfig:
    """Coloured pictures of letters, drawn here from real fonts; a font family belongs to one set alone."""

    image_size: tuple[int, int] = (24, 24)
    """(H, W) in pixels."""
    letters: str = "ABDEGHKMRSTX"
    """The classes: letter i is label i."""
    fonts: tuple[str, ...] = (
        "matplotlib",
        "fontpkg_inconsolata",
        "fontpkg_instrument_serif",
        "fontpkg_inter",
        "fontpkg_merriweather",
        "fontpkg_open_sans",
        "fontpkg_oswald",
        "fontpkg_oxygen",
        "fontpkg_playfair_display",
        "fontpkg_pt_serif",
        "fontpkg_public_sans",
        "fontpkg_roboto",
        "fontpkg_work_sans",
        "fontpkg_zilla_slab",
    )
    """Where font files lie: names of installed packages, paths of folders, or of files."""
    shares: tuple[float, float, float, float] = (0.4, 0.2, 0.2, 0.2)
    """Of the families: to train on, for the network that rewards, for the network that judges, and held out."""
    split: Literal["train", "reward", "judge"] = "train"
    """Which of the first three sets is trained on."""
    palettes: tuple[str, ...] = ("ink", "night", "sea", "fire", "moss", "candy")
    """Colour pairs, letter on ground."""
    sizes: tuple[float, ...] = (0.8, 0.86, 0.92)
    """Pixels per em, as shares of the picture's height. A letter too large for the picture is drawn as large as fits."""
    jitter: int = 1
    """Pixels by which a letter may move."""
    seed: int = 0
    """Which family goes where."""

    def __post_init__(self) -> None:
        if len(self.letters) < 2 or len(set(self.letters)) < len(self.letters):
            raise ConfigError(f"glyphs.letters={self.letters!r}: must be two letters or more, each once. They are the classes.")
        if min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ConfigError(f"glyphs.shares={self.shares}: none may be below 0, and not all 0. Give shares of the font families.")
        if not self.sizes or not all(0 < size <= 1 for size in self.sizes):
            raise ConfigError(f"glyphs.sizes={self.sizes}: must be shares of the picture's height, above 0 and at most 1.")
        if not self.fonts or not self.palettes:
            raise ConfigError("glyphs: fonts and palettes must not be empty. Name at least one of each.")
        demand("glyphs.jitter", self.jitter, 0 <= self.jitter < min(self.image_size) // 4, "0 or more and under a quarter of the picture")


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturesConfig:
    """Real pictures with what they show: a folder of pictures or of a sub-folder per class, a folder with prompts.jsonl, or a data set that
    Hugging Face `datasets` saved to disk."""

    path: str
    image_size: tuple[int, int] = (256, 256)
    """(H, W) in pixels, to which pictures are scaled and cut from the middle (as ADM does, arXiv 2105.05233)."""
    heldout: str | None = None
    """Other such pictures, for evaluation."""
    tokens: str | None = None
    """Folder in which the pictures' tokens are kept, so that each picture is encoded once."""
    share: float = 1.0
    """Use this share of the pictures; VA-pi (arXiv 2512.19680) learns from 0.01 of ImageNet."""
    seed: int = 0
    """Which pictures that share is. A smaller share is a part of a larger one."""
    split: str = "train"
    """Of a saved data set with several."""
    caption: str = "text"
    """Column of a saved data set that holds captions, where there is one."""

    def __post_init__(self) -> None:
        demand("pictures.share", self.share, 0 < self.share <= 1, "above 0 and at most 1")
        if min(self.image_size) < 1:
            raise ConfigError(f"pictures.image_size={self.image_size}: must be (height, width), 1 pixel or more each.")


DataConfig = WordsConfig | FolderConfig | GlyphsConfig | PicturesConfig
