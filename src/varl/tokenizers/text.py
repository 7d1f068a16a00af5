"""Prompt text to character ids."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from varl.config import TextConfig
from varl.errors import DataError

PAD, START, SEPARATOR, SPACE, FIRST = 0, 1, 2, 3, 4
ATTRIBUTES = 2


def encode_text(texts: Sequence[str], styles: Sequence[Sequence[str]], config: TextConfig) -> Int[Tensor, "B N"]:
    """Rows of start symbol, attributes, characters, padded with 0 to the longest. The empty prompt is the start symbol alone: guidance's
    "none". Raises DataError for a character or an attribute that the encoder lacks, and for a text that is too long."""
    chars = {char: FIRST + i for i, char in enumerate(config.alphabet)} | {"|": SEPARATOR, " ": SPACE}
    names = {name: FIRST + len(config.alphabet) + i for i, name in enumerate(config.styles)}
    rows = []
    for text, style in zip(texts, styles, strict=True):
        if len(text) > config.max_length:
            raise DataError(
                f"prompt {text!r} has {len(text)} characters, the encoder takes {config.max_length}. "
                "Shorten it, or train with a larger model.text.max_length."
            )
        if unknown := sorted(set(text) - chars.keys()):
            raise DataError(f"prompt {text!r} holds {unknown}, which the encoder lacks. It knows {config.alphabet!r}, space and '|'.")
        if missing := [name for name in style if name not in names]:
            raise DataError(f"prompt {text!r} asks for style {missing}, which the encoder lacks. It knows {list(config.styles)}.")
        if len(style) > ATTRIBUTES:
            raise DataError(f"prompt {text!r} has {len(style)} attributes {list(style)}; at most {ATTRIBUTES} fit. Drop some.")
        rows.append([START, *(names[name] for name in style), *([PAD] * (ATTRIBUTES - len(style))), *(chars[char] for char in text)])
    width = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
