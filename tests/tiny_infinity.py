"""An Infinity small enough for every test, every weight of which matters, and captions for it."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from varl.config import BSQConfig, CaptionConfig, InfinityConfig
from varl.models.infinity import Infinity

TOKENIZER = BSQConfig(channels=3, width=8, multipliers=(1, 2), blocks=1)
CAPTIONS = CaptionConfig(tokens=6, width=128, lowercase=False)
SQUARE = InfinityConfig(
    depth=4,
    width=16,
    heads=2,
    chunks=2,
    mlp_width=24,
    grids=((1, 1), (2, 2), (3, 3)),
    reach=(4, 4),
    captions=CAPTIONS,
    tokenizer=TOKENIZER,
)
"""14 tokens of 3 bits, 6x6 pixels."""


def make_model(config: InfinityConfig = SQUARE, seed: int = 0) -> Infinity:
    torch.manual_seed(seed)
    model = Infinity(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def caption(text: str) -> Tensor:
    """Features [n, 128] of a text with n words."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(len(text.split()), CAPTIONS.width, generator=torch.Generator().manual_seed(seed))


def captions(texts: Sequence[str]) -> list[Tensor]:
    return [caption(text) for text in texts]
