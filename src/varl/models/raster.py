"""LlamaGen's transformer (arXiv 2406.06525): a class or a caption, then a picture's tokens row by row, each drawn given all before it.

    reads      c_1 ... c_N  x_0  x_1 ... x_{L-2}
    predicts            x_0  x_1  x_2 ... x_{L-1}

Module and parameter names are those of the released checkpoints. The grid need not be square."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from varl.config import CaptionConfig, RasterConfig
from varl.models.layers import KVCache, rotate

NORM_EPS = 1e-5
ROPE_BASE = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A prompt as tokens that come before the picture's."""

    tokens: Float[Tensor, "B N D"]
    there: Bool[Tensor, "B N"] | None
    """False where a shorter caption was padded, on its left; None where nothing was."""

    def rows(self, index: Int[Tensor, " b"] | slice) -> "Condition":
        return Condition(tokens=self.tokens[index], there=None if self.there is None else self.there[index])


# ---- positions ------------------------------------------------------------------------------------------------------------------------


def rotations(grid: tuple[int, int], head_width: int, condition: int) -> Float[Tensor, "n pairs 2"]:
    """(cos, sin) by which each pair of channels turns, position by position: of the first half of the pairs by the token's row, of the
    second half by its column, with angle p / 10000^(4i / head_width) for pair i of its half. As trained, the `condition` positions before
    the picture have (0, 0) and not (1, 0): their queries and keys vanish, so they are seen through their values alone."""
    h, w = grid
    half = head_width // 2
    frequency = 1.0 / ROPE_BASE ** (torch.arange(0, half, 2).float() / half)
    row, column = (torch.outer(torch.arange(n).float(), frequency) for n in (h, w))
    angle = torch.cat([row[:, None].expand(-1, w, -1), column[None].expand(h, -1, -1)], -1).flatten(0, 1)
    return F.pad(torch.stack([angle.cos(), angle.sin()], -1), (0, 0, 0, 0, condition, 0))


def attention_mask(there: Bool[Tensor, "B N"], tokens: int) -> Bool[Tensor, "B 1 n n"]:
    """Who sees whom among the condition's positions and `tokens` of the picture: all before and itself, but for padding, which is seen by
    itself alone (someone must be, lest its row be NaN)."""
    seen = F.pad(there, (0, tokens), value=True)
    causal = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=there.device).tril()
    return (causal & seen[:, None] | torch.eye(len(causal), dtype=torch.bool, device=there.device))[:, None]


# ---- layers ---------------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def qkv(self, x: Float[Tensor, "B l D"], turns: Float[Tensor, "l pairs 2"]) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.wqkv(x).unflatten(2, (3 * self.heads, -1)).transpose(1, 2)
        q, k = rotate(qkv[:, : 2 * self.heads], turns).chunk(2, 1)
        return q, k, qkv[:, 2 * self.heads :]

    def forward(
        self, x: Float[Tensor, "B l D"], turns: Float[Tensor, "l pairs 2"], mask: Bool[Tensor, "B 1 l l"] | None
    ) -> Float[Tensor, "B l D"]:
        """Teacher-forced; without a mask each position sees all before it."""
        q, k, v = self.qkv(x, turns)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(out.transpose(1, 2).flatten(2))

    def step(
        self, x: Float[Tensor, "B l D"], turns: Float[Tensor, "l pairs 2"], mask: Bool[Tensor, "B 1 l n"] | None, cache: KVCache, block: int
    ) -> Float[Tensor, "B l D"]:
        """The condition, or one token after those in the cache."""
        q, k, v = self.qkv(x, turns)
        keys, values = cache.write(block, k, v)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None and x.shape[1] > 1)
        return self.wo(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: RasterConfig) -> None:
        super().__init__()
        self.attention = Attention(config.width, config.heads)
        self.feed_forward = SwiGLU(config.width, config.hidden)
        self.attention_norm, self.ffn_norm = RMSNorm(config.width), RMSNorm(config.width)

    def forward(self, x: Float[Tensor, "B l D"], attend: Callable[[Tensor], Tensor]) -> Float[Tensor, "B l D"]:
        x = x + attend(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """One token per class; the last is "none"."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, ids: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
        return self.embedding_table(ids)[:, None]


class Projection(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(before, after, bias=False), nn.Linear(after, after, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """One token per feature vector. "None" is as many vectors of `uncond_embedding`, from its end, as the caption beside it has."""

    uncond_embedding: Tensor

    def __init__(self, config: CaptionConfig, width: int) -> None:
        super().__init__()
        self.cap_proj = Projection(config.width, width)
        self.register_buffer("uncond_embedding", torch.randn(config.tokens, config.width) / config.width**0.5)

    def forward(self, features: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        return self.cap_proj(features)


# ---- the model ------------------------------------------------------------------------------------------------------------------------


class Raster(nn.Module):
    turns: Tensor

    def __init__(self, config: RasterConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = config.grid[0] * config.grid[1]
        """L, of a picture."""
        if config.captions is not None:
            self.prefix, self.cls_embedding = config.captions.tokens, CaptionEmbedding(config.captions, config.width)
        else:
            assert config.num_classes is not None
            self.prefix, self.cls_embedding = 1, ClassEmbedding(config.num_classes, config.width)
        self.tok_embeddings = nn.Embedding(config.tokenizer.vocab, config.width)
        self.layers: Sequence[Block] = nn.ModuleList(Block(config) for _ in range(config.depth))  # type: ignore[assignment]
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.tokenizer.vocab, bias=False)
        self.register_buffer("turns", rotations(config.grid, config.width // config.heads, self.prefix), persistent=False)
        for module in self.modules():  # as released
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    @classmethod
    def unfilled(cls, config: RasterConfig) -> "Raster":
        """A model on the CPU whose weights are still to be loaded: to draw initial ones takes minutes at the largest size."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu").turns = rotations(config.grid, config.width // config.heads, model.prefix)
        return model

    @property
    def blocks(self) -> nn.ModuleList:
        """What is split over processes, one by one."""
        return cast(nn.ModuleList, self.layers)

    # -- what is asked -----------------------------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Of captions, in tokens."""
        return self.prefix

    @property
    def empty(self) -> int:
        """Tokens of a caption that says nothing."""
        return self.prefix

    def none(self, length: int) -> Float[Tensor, "N C"]:
        """What stands for no caption in the place of one of `length` tokens, as released: the last of the vectors that were trained for
        it."""
        assert isinstance(self.cls_embedding, CaptionEmbedding)
        return self.cls_embedding.uncond_embedding[self.prefix - length :]

    def condition(self, given: Int[Tensor, " B"] | Float[Tensor, "B N C"], there: Bool[Tensor, "B N"] | None = None) -> Condition:
        """`given` are classes [B] (num_classes is "none"), or captions' features [B, N, C], padded on the left where `there` is False."""
        return Condition(tokens=self.cls_embedding(given), there=there)

    # -- teacher-forced ----------------------------------------------------------------------------------------------------------------

    def forward(self, condition: Condition, tokens: Int[Tensor, "B l"]) -> Float[Tensor, "B l D"]:
        """Hidden states of the first l tokens: row t is what token t is drawn from, having seen the condition and tokens 0 .. t-1. So the
        last of `tokens` is not read at all."""
        before, count = condition.tokens.shape[1], tokens.shape[1] - 1
        x = torch.cat([condition.tokens, self.tok_embeddings(tokens[:, :-1])], 1)
        turns = self.turns[self.prefix - before : self.prefix + count]
        mask = None if condition.there is None else attention_mask(condition.there, count)
        for block in self.layers:
            x = block(x, lambda h, block=block: block.attention(h, turns, mask))
        return x[:, before - 1 :]

    # -- one token at a time -----------------------------------------------------------------------------------------------------------

    def capacity(self, condition: Condition, tokens: int) -> int:
        """Positions that are read while the first `tokens` tokens are drawn: all of the condition, all tokens but the last."""
        return condition.tokens.shape[1] + tokens - 1

    def cache(self, condition: Condition, tokens: int) -> KVCache:
        """Room to draw the first `tokens` tokens."""
        heads = self.config.heads
        shape = (len(condition.tokens), heads, self.capacity(condition, tokens), self.config.width // heads)
        return KVCache.empty(len(self.layers), shape, self.output.weight)

    def step(self, condition: Condition, tokens: Int[Tensor, " B"] | None, cache: KVCache) -> Float[Tensor, "B 1 D"]:
        """What the next token is drawn from. `tokens` are those drawn last; None before the first, when the condition itself is read."""
        before = condition.tokens.shape[1]
        x = condition.tokens if tokens is None else self.tok_embeddings(tokens)[:, None]
        start, end = cache.length, cache.length + x.shape[1]
        turns = self.turns[self.prefix - before + start : self.prefix - before + end]
        mask = condition.there
        if mask is not None:
            mask = attention_mask(mask, 0) if tokens is None else F.pad(mask, (0, end - before), value=True)[:, None, None]
        for index, block in enumerate(self.layers):
            x = block(x, lambda h, block=block, index=index: block.attention.step(h, turns, mask, cache, index))
        cache.length = end
        return x[:, -1:]

    def logits(self, hidden: Float[Tensor, "B l D"]) -> Float[Tensor, "B l V"]:
        return self.output(self.norm(hidden))
