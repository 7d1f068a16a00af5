"""What is trained on, in memory, and in which order."""

import math
from pathlib import Path
from typing import NamedTuple, assert_never

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from varl.config import FolderConfig, GlyphsConfig, PicturesConfig, PretrainConfig, WordsConfig
from varl.data import glyphs
from varl.data.folder import load_images, read_folder
from varl.data.pictures import Pictures, heldout_pictures, read_pictures
from varl.data.words import dataset, split, word_list
from varl.errors import ConfigError
from varl.rng import generator
from varl.types import Prompt

HELDOUT_PICTURES = 256


class Shown(NamedTuple):
    """Training and held-out pictures with their prompts."""

    images: UInt8[Tensor, "N 3 H W"]
    prompts: list[Prompt]
    held_images: UInt8[Tensor, "n 3 H W"]
    held_prompts: list[Prompt]


def pictures(config: PretrainConfig) -> Shown:
    """Words: training words only, and held-out words. Letters: of the fonts of `data.split`, and of held-out fonts. Other pictures: all
    there are, without others as `heldout` held against their own first ones."""
    data, size = config.data, config.model.image_size
    if not isinstance(data, FolderConfig) and data.image_size != size:
        raise ConfigError(f"data.image_size={data.image_size}, but the model's pictures are {size} (height, width). Make them equal.")
    match data:
        case WordsConfig():
            words = split(word_list(data), data)
            train = dataset(data, words.pretrain, config.pictures, data.seed)
            return Shown(*train, *dataset(data, words.heldout, HELDOUT_PICTURES, data.seed + 9))
        case FolderConfig():
            said = read_folder(Path(data.path))
            held = read_folder(Path(data.heldout)) if data.heldout else said[:HELDOUT_PICTURES]
            return Shown(load_images(said, size), said, load_images(held, size), held)
        case GlyphsConfig():
            train = glyphs.pictures(data, data.split, config.pictures, data.seed)
            return _read(train, glyphs.pictures(data, "heldout", HELDOUT_PICTURES, data.seed + 9))
        case PicturesConfig():
            return _read(read_pictures(data), heldout_pictures(data, HELDOUT_PICTURES))
    assert_never(data)


def _read(real: Pictures, held: Pictures | None) -> Shown:
    others = held or real
    some = others.prompts[:HELDOUT_PICTURES]
    return Shown(real.pixels(real.prompts), list(real.prompts), others.pixels(some), list(some))


def batch_index(pictures: int, batch: int, step: int, seed: int, purpose: str) -> Int[Tensor, " b"]:
    """Rows of one training batch: a seeded permutation per epoch, walked without replacement; a function of the step alone."""
    per_epoch = pictures // batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(pictures, generator=generator(seed, purpose, epoch))
    return order[place * batch : (place + 1) * batch]


def psnr(error: float) -> float:
    """Of a mean squared error of pixels in [-1, 1], in dB."""
    return 10 * math.log10(4 / max(error, 1e-12))


def signed(images: UInt8[Tensor, "B 3 H W"], device: torch.device) -> Float[Tensor, "B 3 H W"]:
    """Pixels in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1
