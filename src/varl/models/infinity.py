"""Infinity's transformer (arXiv 2412.04431): VAR's, but it reads a caption by cross-attention, its positions turn queries and keys, and of
a token it says d independent bits.

Module and parameter names are those of the released checkpoints. Attention over the picture goes scale by scale, each over its own and all
coarser tokens, so there is never an [L, L] mask, of 10,000 tokens neither."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from varl.config import InfinityConfig
from varl.models.layers import GivenBias, KVCache
from varl.models.next_scale import FFN, NORM_EPS, HeadNorm, NextScale, SelfAttention
from varl.models.raster import rotations


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Captions as the blocks see them; made once, used at every step. Each is held once, however many rows share it."""

    pooled: Float[Tensor, "N D"]
    block_modulation: Float[Tensor, "N 1 6 D"]
    """Of all blocks, each of which adds its own."""
    head_modulation: Float[Tensor, "N 1 2 D"]
    memory: tuple[tuple[Float[Tensor, "N heads n d"], Float[Tensor, "N heads n d"]], ...]
    """Keys and values of the caption's tokens, per block."""
    mask: Float[Tensor, "N 1 1 n"] | None
    """0 where there is a token, -inf where a shorter caption was padded; None where nothing was."""
    of: Int[Tensor, " B"]
    """Which caption each row has."""

    def rows(self, index: Int[Tensor, " b"] | slice) -> "Condition":
        return replace(self, of=self.of[index])


def turns_of(grids: Sequence[tuple[int, int]], reach: tuple[int, int], head_width: int) -> Float[Tensor, "L pairs 2"]:
    """(cos, sin) by which each token's pairs of channels turn: `models.raster.rotations` of the place in the grid `reach` that it covers
    when its scale's grid is stretched to that, round(i H / h), round(j W / w), halves to even."""
    table, places = rotations(reach, head_width, 0), []
    for h, w in grids:
        row, column = ((torch.arange(n) * (whole / n)).round().long() for n, whole in ((h, reach[0]), (w, reach[1])))
        places.append((row[:, None] * reach[1] + column).flatten())
    return table[torch.cat(places)]


class RMSNorm(nn.Module):
    """x / rms(x), times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * self.weight


class CaptionAttention(nn.Module):
    """Looks at a caption's tokens, with a query of its own: the caption in one vector. Keys have no bias."""

    def __init__(self, captions: int, width: int, heads: int, query: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.heads = heads
        self.mat_q = query
        self.mat_kv = GivenBias(captions, 2 * width)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def remember(self, tokens: Float[Tensor, "N n C"]) -> tuple[Tensor, Tensor]:
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        k, v = self.mat_kv(tokens, bias).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def attend(self, q: Float[Tensor, "B heads l d"], memory: tuple[Tensor, Tensor], mask: Tensor | None) -> Float[Tensor, "B l D"]:
        out = F.scaled_dot_product_attention(q, *memory, attn_mask=None if mask is None else mask.to(q.dtype))
        return self.proj(out.transpose(1, 2).flatten(2))


class Pool(CaptionAttention):
    """The caption in one vector."""

    mat_q: nn.Parameter

    def __init__(self, config: InfinityConfig) -> None:
        heads = config.pool_heads
        query = nn.Parameter(torch.empty(1, heads, config.width // heads))
        super().__init__(config.captions.width, config.width, heads, query)

    def forward(self, tokens: Float[Tensor, "N n C"], mask: Float[Tensor, "N 1 1 n"] | None) -> Float[Tensor, "N D"]:
        memory = self.remember(tokens)
        q = self.mat_q.to(memory[0].dtype).transpose(0, 1).expand(len(tokens), -1, -1, -1)
        return self.attend(q, memory, mask)[:, 0]


class CrossAttention(CaptionAttention):
    """What the picture's tokens read in the caption."""

    mat_q: nn.Linear

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__(config.width, config.width, config.heads, nn.Linear(config.width, config.width))

    def forward(self, x: Float[Tensor, "B l D"], memory: tuple[Tensor, Tensor], mask: Tensor | None) -> Float[Tensor, "B l D"]:
        return self.attend(self.mat_q(x).unflatten(2, (self.heads, -1)).transpose(1, 2), memory, mask)


class CaptionPool(nn.Module):
    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ca = Pool(config)


class Block(nn.Module):
    """x + gamma1 * sa(LN(x) (1 + scale1) + shift1), x + ca(LN(x)), then the first with the FFN."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width = config.width
        self.sa = SelfAttention(width, config.heads, l2_norm=True)
        self.ca, self.ca_norm = CrossAttention(config), nn.LayerNorm(width, eps=NORM_EPS)
        self.ffn = FFN(width, config.hidden)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def forward(
        self,
        x: Float[Tensor, "B l D"],
        condition: Condition,
        index: int,
        turns: Float[Tensor, "l pairs 2"],
        before: Sequence[int] | KVCache,
    ) -> Float[Tensor, "B l D"]:
        """`before` is what came before: the ends of the scales, of a teacher-forced pass, or the cache, of a single scale."""
        of, norm = condition.of, [x.shape[-1]]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.ada_gss + condition.block_modulation)[of].unbind(2)
        h = F.layer_norm(x, norm, eps=NORM_EPS) * (scale1 + 1) + shift1
        h = self.sa.step(h, before, index, turns) if isinstance(before, KVCache) else self.sa(h, before, turns)
        x = x + h * gamma1
        k, v = condition.memory[index]
        x = x + self.ca(self.ca_norm(x), (k[of], v[of]), None if condition.mask is None else condition.mask[of])
        return x + self.ffn(F.layer_norm(x, norm, eps=NORM_EPS) * (scale2 + 1) + shift2) * gamma2


class Chunk(nn.Module):
    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.module: Sequence[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]


class Infinity(nn.Module):
    scale_of_token: Tensor
    turns: Tensor

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        self.ends: tuple[int, ...] = tuple(accumulate(h * w for h, w in config.grids))
        """Tokens up to and including each scale."""
        width, captions, std = config.width, config.captions, (1 / config.width / 3) ** 0.5
        self.cfg_uncond = nn.Parameter(torch.randn(captions.tokens, captions.width) / captions.width**0.5)
        self.text_norm = RMSNorm(captions.width)
        self.text_proj_for_sos = CaptionPool(config)
        self.text_proj_for_ca = nn.Sequential(nn.Linear(captions.width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.lvl_embed = nn.Embedding(config.scales, width)
        self.word_embed = nn.Linear(config.tokenizer.bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, 2 * config.tokenizer.bits)
        size = config.depth // config.chunks
        self.block_chunks: Sequence[Chunk] = nn.ModuleList(Chunk([Block(config) for _ in range(size)]) for _ in range(config.chunks))  # type: ignore[assignment]
        self.register_buffer("scale_of_token", NextScale.scales_of_tokens(config.grids), persistent=False)
        self.register_buffer("turns", turns_of(config.grids, config.reach, width // config.heads), persistent=False)
        self._init(std)

    @classmethod
    def unfilled(cls, config: InfinityConfig) -> "Infinity":
        """A model on the CPU whose weights are still to be loaded: to draw initial ones takes minutes at the largest size."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.scale_of_token = NextScale.scales_of_tokens(config.grids)
        model.turns = turns_of(config.grids, config.reach, config.width // config.heads)
        return model

    def _init(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for p in (self.pos_start, self.text_proj_for_sos.ca.mat_q):
            nn.init.trunc_normal_(p, std=std)
        for block in self.blocks:
            for out in (block.sa.proj, block.ca.proj, block.ffn.fc2):
                out.weight.data.div_((2 * len(self.blocks)) ** 0.5)
        cast(nn.Linear, self.head_nm.ada_lin[-1]).weight.data.mul_(0.5)
        self.head.weight.data.mul_(0.02)

    @property
    def blocks(self) -> list[Block]:
        """In order; what is split over processes, one by one."""
        return [block for chunk in self.block_chunks for block in chunk.module]

    # -- what is asked -----------------------------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Of captions, in tokens."""
        return self.config.captions.tokens

    @property
    def empty(self) -> int:
        """Tokens of a caption that says nothing."""
        return self.longest

    def none(self, length: int) -> Float[Tensor, "n C"]:
        """What stands for no caption in the place of one of `length` tokens, as released: the first of the vectors that were trained for
        it."""
        return self.cfg_uncond[:length]

    def condition(self, features: Float[Tensor, "N n C"], there: Bool[Tensor, "N n"] | None = None) -> Condition:
        """Of captions' features, padded where `there` is False; one row each."""
        mask = None
        if there is not None:
            mask = torch.zeros(there.shape, device=there.device).masked_fill(~there, -torch.inf)[:, None, None]
        read = self.text_norm(features)
        pooled, tokens = self.text_proj_for_sos.ca(read, mask), self.text_proj_for_ca(read)
        return Condition(
            pooled=pooled,
            block_modulation=self.shared_ada_lin(pooled).view(-1, 1, 6, self.config.width),
            head_modulation=self.head_nm.ada_lin(pooled).view(-1, 1, 2, self.config.width),
            memory=tuple(block.ca.remember(tokens) for block in self.blocks),
            mask=mask,
            of=torch.arange(len(features), device=features.device),
        )

    # -- teacher-forced ----------------------------------------------------------------------------------------------------------------

    def forward(self, condition: Condition, inputs: Float[Tensor, "B l d"], scales: int | None = None) -> Float[Tensor, "B L D"]:
        """Hidden states of the first `scales` scales (all by default): costs only their tokens. `inputs` [B, L - 1, d] are the resized
        partial pictures of scales 2 and on (`BSQ.inputs`)."""
        ends = self.ends[: scales or len(self.ends)]
        x = condition.pooled[condition.of, None] + self.pos_start
        if len(ends) > 1:
            x = torch.cat([x, self.word_embed(inputs).to(x.dtype)], 1)
        x = x + self.lvl_embed(self.scale_of_token[: x.shape[1]])
        for index, block in enumerate(self.blocks):
            x = block(x, condition, index, self.turns[: x.shape[1]], ends)
        return x

    # -- one scale at a time -----------------------------------------------------------------------------------------------------------

    def cache(self, batch: int, scales: int | None = None) -> KVCache:
        """Room for the first `scales` scales of `batch` pictures."""
        heads, end = self.config.heads, self.ends[(scales or len(self.ends)) - 1]
        return KVCache.empty(self.config.depth, (batch, heads, end, self.config.width // heads), self.pos_start)

    def step(self, condition: Condition, inputs: Float[Tensor, "B n d"] | None, scale: int, cache: KVCache) -> Float[Tensor, "B n D"]:
        """Hidden states of one scale; `inputs` is None at the first."""
        start, end = (self.ends[scale - 1] if scale else 0), self.ends[scale]
        x = condition.pooled[condition.of, None] + self.pos_start if inputs is None else self.word_embed(inputs)
        x = x + self.lvl_embed.weight[scale]
        for index, block in enumerate(self.blocks):
            x = block(x, condition, index, self.turns[start:end], cache)
        cache.length = end
        return x

    def logits(self, hidden: Float[Tensor, "B l D"], condition: Condition) -> Float[Tensor, "B m 2"]:
        """Of the bits 0 and 1, m = l d, token by token."""
        scale, shift = condition.head_modulation[condition.of].unbind(2)
        return self.head(F.layer_norm(hidden, (hidden.shape[-1],), eps=NORM_EPS) * (scale + 1) + shift).unflatten(2, (-1, 2)).flatten(1, 2)
