"""A model folder small enough for every test, and a run on it that takes a second a step."""

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from varl.checkpoints import model as model_folder
from varl.checkpoints.model import fresh
from varl.cli import main
from varl.config import (
    DiffusionHeadConfig,
    KLConfig,
    MARConfig,
    ModelConfig,
    NextScaleConfig,
    RasterConfig,
    TextConfig,
    TokenizerConfig,
    ViTConfig,
    VQConfig,
)
from varl.models.raster import Raster

TINY = NextScaleConfig(
    depth=1,
    width=32,
    heads=2,
    grids=((1, 1), (1, 2), (2, 4)),
    text=TextConfig(styles=("sans", "mono", "ink", "sea"), max_length=12),
    tokenizer=TokenizerConfig(vocab=16, channels=4, width=16, multipliers=(1,), blocks=1, attention=False, patch=8),
)
"""11 tokens on 3 scales, 16x32 pixels."""
TINY_RASTER = RasterConfig(
    depth=1,
    width=16,
    heads=2,
    grid=(3, 3),
    mlp_width=24,
    num_classes=5,
    tokenizer=VQConfig(vocab=16, channels=4, latent=6, width=8, multipliers=(1, 1, 1), blocks=1, attention=False),
)
"""9 tokens, 12x12 pixels, 5 classes."""

WIDE_RASTER = RasterConfig(
    depth=1,
    width=32,
    heads=2,
    grid=(2, 4),
    mlp_width=48,
    num_classes=3,
    tokenizer=VQConfig(vocab=16, channels=4, latent=8, width=16, multipliers=(1,), blocks=1, attention=False, patch=8),
)
"""8 tokens, 16x32 pixels, 3 classes."""

TINY_MAR = MARConfig(
    encoder=ViTConfig(depth=1, width=16, heads=2),
    decoder=ViTConfig(depth=1, width=24, heads=2),
    head=DiffusionHeadConfig(depth=2, width=20),
    grid=(2, 4),
    num_classes=3,
    buffer=2,
    tokenizer=KLConfig(channels=4, width=32, multipliers=(1,), blocks=1, attention=False, patch=8),
)
"""8 tokens of 4 numbers, 16x32 pixels, 3 classes."""


def save_tiny(path: Path, config: ModelConfig = TINY) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokenizer = fresh(config)
        if isinstance(model, Raster):  # fresh, it finds all tokens as likely, whatever it is asked for
            torch.nn.init.normal_(model.output.weight, std=0.3)
    return model_folder.save(path, model, tokenizer, {})


def write_config(folder: Path, *, model: str | None = None, extra: str = "") -> Path:
    """run.yaml in `folder`: four steps of GRPO for brightness, on `folder`/base."""
    if model is None:
        model = str(save_tiny(folder / "base"))
    file = folder / "run.yaml"
    file.write_text(f"""
name: tiny
model: {model}
data: {{kind: words, image_size: [16, 32], fonts: [sans], palettes: [ink], word_list: {word_file(folder)}, max_length: 3, jitter: 0}}
rewards: {{bright: {{reward: {{kind: python, target: "varl.rewards.toy:brightness"}}}}}}
algorithm: {{kind: grpo, num_generations: 4, rollouts_per_chunk: 4}}
train: {{steps: 4, prompts_per_step: 2, rollouts_per_backward: 4, image_every: 0, save_every: 2, device: cpu}}
eval: {{samples: 2}}
{extra}""")
    return file


def write_pictures(folder: Path, classes: int = 3, each: int = 2) -> Path:
    """A folder of noise for each class: a/0.png, a/1.png, b/0.png, ..., of WIDE_RASTER's size."""
    noise = torch.Generator().manual_seed(0)
    for label in range(classes):
        place = folder / "abcdefgh"[label]
        place.mkdir(parents=True)
        for number in range(each):
            pixels = torch.randint(256, (16, 32, 3), generator=noise, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    return folder


def word_file(folder: Path) -> Path:
    """Words of three letters, of which each set gets some."""
    file = folder / "words.txt"
    file.write_text("ACE\nADD\nAGE\nAID\nAIM\nAIR\nANT\nARM\nART\nASH\nBAD\nBAG\nBAR\nBAT\nBED\nBEE\nBIG\nBIT\nBOX\nBUS\n")
    return file


def status(*arguments: object) -> int | str | None:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def snapshot(folder: Path) -> dict[str, str]:
    """A hash of every file under `folder`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
