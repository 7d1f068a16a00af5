"""What a model reads: characters, captions."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """A learned character encoder. The picture's tokens look at the characters through cross-attention."""

    alphabet: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """Characters that a prompt may hold; a space separates words and `|` regions, and both are always understood."""
    styles: tuple[str, ...] = ()
    """Closed vocabulary of attributes (fonts, palettes) that a prompt may name."""
    max_length: int = 24
    """Longest prompt, in characters."""
    layers: int = 1
    """Self-attention layers over the characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionConfig:
    """Captions as features of a frozen text encoder, one token each before the picture's. The defaults are flan-t5-xl's, as released."""

    tokens: int = 120
    """Longest caption, in the encoder's tokens."""
    width: int = 2048
    """Of a feature vector."""
    encoder: str = "google/flan-t5-xl"
    """What makes the features, a T5 for LlamaGen and Infinity, Phi-2 for NOVA: its name on the Hugging Face hub, looked for in the local
    cache, or a folder's path."""
    lowercase: bool = True
    """Whether captions are lower-cased first, as LlamaGen's are; Infinity's and NOVA's are not."""
