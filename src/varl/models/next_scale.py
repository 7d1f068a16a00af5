"""VAR's transformer (arXiv 2404.02905): grids of tokens, coarse to fine, each drawn at once given all coarser ones.

Module and parameter names are those of the released checkpoints. Two things are added: grids need not be square, and instead of a class the
model may read characters. Text comes in by cross-attention and not as a prefix, because then a grid's tokens stay the only sequence (the
released schedule, positions and cache hold as they are), the characters' keys and values are computed once per prompt and shared by all
steps, and a longer prompt costs nothing in self-attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from varl.config import NextScaleConfig, TextConfig
from varl.models.layers import GivenBias, KVCache, rotate

NORM_EPS = 1e-6
MAX_LOG_SCALE = 4.605170185988092  # log 100
ATTRIBUTE_SLOTS = 2
"""Places for attributes, between the start symbol and the characters; empty ones are padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A prompt as the blocks see it; made once, used at every step."""

    pooled: Float[Tensor, "B D"]
    block_modulation: tuple[Float[Tensor, "B 1 6 D"], ...]
    head_modulation: Float[Tensor, "B 1 2 D"]
    memory: tuple[tuple[Float[Tensor, "B heads N d"], Float[Tensor, "B heads N d"]], ...] | None
    """Keys and values of the characters, per block."""
    memory_mask: Bool[Tensor, "B 1 1 N"] | None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Condition":
        return Condition(
            pooled=fn(self.pooled),
            block_modulation=tuple(fn(m) for m in self.block_modulation),
            head_modulation=fn(self.head_modulation),
            memory=None if self.memory is None else tuple((fn(k), fn(v)) for k, v in self.memory),
            memory_mask=None if self.memory_mask is None else fn(self.memory_mask),
        )

    def rows(self, index: Int[Tensor, " b"] | slice) -> "Condition":
        return self.map(lambda t: t[index])


class SelfAttention(nn.Module):
    """Heads compare by cosine with a learned temperature (attn_l2_norm); scale t sees scales <= t, in one call per scale, so no [L, L]
    mask exists and the training pass computes what the cached decode computed. Where positions turn queries and keys (Infinity's), `turns`
    says how."""

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads, self.l2_norm = heads, l2_norm
        self.scale = 1.0 if l2_norm else 0.25 / (width // heads) ** 0.5
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
        self.mat_qkv = GivenBias(width, 3 * width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def qkv(self, x: Float[Tensor, "B l D"], turns: Float[Tensor, "l pairs 2"] | None) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = self.mat_qkv(x, bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()
            k = F.normalize(k, dim=-1)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        return q.type_as(v), k.type_as(v), v

    def forward(
        self, x: Float[Tensor, "B l D"], ends: Sequence[int], turns: Float[Tensor, "l pairs 2"] | None = None
    ) -> Float[Tensor, "B l D"]:
        """Teacher-forced over the scales that end at `ends`."""
        q, k, v = self.qkv(x, turns)
        starts = [0, *ends[:-1]]
        parts = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], scale=self.scale)
            for a, b in zip(starts, ends, strict=True)
        ]
        return self.proj(torch.cat(parts, 2).transpose(1, 2).flatten(2))

    def step(
        self, x: Float[Tensor, "B n D"], cache: KVCache, block: int, turns: Float[Tensor, "n pairs 2"] | None = None
    ) -> Float[Tensor, "B n D"]:
        """The tokens of one scale, after those in the cache."""
        q, k, v = self.qkv(x, turns)
        keys, values = cache.write(block, k, v)
        out = F.scaled_dot_product_attention(q, keys, values, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Tokens look at the prompt's characters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def remember(self, memory: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor]:
        k, v = self.kv(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def forward(self, x: Float[Tensor, "B l D"], memory: tuple[Tensor, Tensor], mask: Bool[Tensor, "B 1 1 N"]) -> Float[Tensor, "B l D"]:
        q = self.q(self.norm(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, memory[0], memory[1], attn_mask=mask.expand(-1, 1, q.shape[2], -1))
        return self.proj(out.transpose(1, 2).flatten(2))


class FFN(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x + gamma1 * attn(LN(x) (1 + scale1) + shift1), cross-attention where there is text, then the same with the FFN."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = SelfAttention(width, config.heads, config.attn_l2_norm)
        self.ffn = FFN(width, round(width * config.mlp_ratio))
        if config.text is not None:
            self.cross = CrossAttention(width, config.heads)
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Float[Tensor, "B l D"], condition: Condition, index: int, attend: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B l D"]:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = condition.block_modulation[index].unbind(2)
        norm = [x.shape[-1]]
        x = x + attend(F.layer_norm(x, norm, eps=NORM_EPS) * (scale1 + 1) + shift1) * gamma1
        if condition.memory is not None and condition.memory_mask is not None:
            x = x + self.cross(x, condition.memory[index], condition.memory_mask)
        return x + self.ffn(F.layer_norm(x, norm, eps=NORM_EPS) * (scale2 + 1) + shift2) * gamma2


class HeadNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class EncoderLayer(nn.Module):
    """A plain pre-norm layer over the characters. (torch's own takes another path without gradient than with, and a replay must not.)"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = CrossAttention(width, heads)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.ffn = FFN(width, 2 * width)

    def forward(self, x: Float[Tensor, "B N D"], there: Bool[Tensor, "B 1 1 N"]) -> Float[Tensor, "B N D"]:
        x = x + self.attn(x, self.attn.remember(self.attn.norm(x)), there)
        return x + self.ffn(self.norm(x))


class CharacterEncoder(nn.Module):
    """Characters and attributes to a memory [B, N, D] and a pooled vector [B, D]."""

    def __init__(self, config: TextConfig, width: int, heads: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(text_vocabulary(config), width)
        self.position = nn.Parameter(torch.randn(1, text_slots(config), width) * 0.5)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.pool = nn.Linear((ATTRIBUTE_SLOTS + 2) * width, width)

    def forward(self, ids: Int[Tensor, "B N"]) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B D"], Bool[Tensor, "B 1 1 N"]]:
        there = ids != 0
        x = self.symbols(ids) + self.position[:, : ids.shape[1]]
        for layer in self.layers:
            x = layer(x, there[:, None, None, :])
        x = self.norm(x)
        weight = there.unsqueeze(-1).to(x.dtype)
        mean = (x * weight).sum(1) / weight.sum(1)
        head = x[:, : ATTRIBUTE_SLOTS + 1].flatten(1)
        return x, self.pool(torch.cat([head, mean], 1)), there[:, None, None, :]


def text_vocabulary(config: TextConfig) -> int:
    """Padding, the empty prompt, `|`, space, the alphabet, the attributes."""
    return 4 + len(config.alphabet) + len(config.styles)


def text_slots(config: TextConfig) -> int:
    """A start symbol, attributes, characters."""
    return 1 + ATTRIBUTE_SLOTS + config.max_length


class NextScale(nn.Module):
    scale_of_token: Tensor

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [h * w for h, w in config.grids]
        self.ends: tuple[int, ...] = tuple(accumulate(sizes))
        """Tokens up to and including each scale."""
        width, first, std = config.width, sizes[0], (1 / config.width / 3) ** 0.5
        self.word_embed = nn.Linear(config.tokenizer.channels, width)
        if config.num_classes is not None:
            self.class_emb = nn.Embedding(config.num_classes + 1, width)
        if config.text is not None:
            self.text = CharacterEncoder(config.text, width, config.heads)
        self.pos_start = nn.Parameter(torch.empty(1, first, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.ends[-1], width))
        self.lvl_embed = nn.Embedding(len(sizes), width)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config) for _ in range(config.depth))  # type: ignore[assignment]
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, config.tokenizer.vocab)
        self.register_buffer("scale_of_token", self.scales_of_tokens(config.grids), persistent=False)
        self._init(std)

    @staticmethod
    def scales_of_tokens(grids: Sequence[tuple[int, int]]) -> Int[Tensor, " L"]:
        """Which scale each token belongs to."""
        return torch.cat([torch.full((h * w,), scale) for scale, (h, w) in enumerate(grids)])

    @classmethod
    def unfilled(cls, config: NextScaleConfig) -> "NextScale":
        """A model on the CPU whose weights are still to be loaded: to draw initial ones takes minutes at the largest size."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu").scale_of_token = cls.scales_of_tokens(config.grids)
        return model

    def _init(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
        for p in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(p, std=std)
        if self.config.text is not None:  # characters must not drown in their positions
            nn.init.trunc_normal_(self.text.symbols.weight, std=1.0)
        for block in self.blocks:
            for out in (block.attn.proj, block.ffn.fc2):
                out.weight.data.div_((2 * len(self.blocks)) ** 0.5)
            if not self.config.shared_adaln:
                modulation, gammas = cast(nn.Linear, block.ada_lin[-1]), 2 * self.config.width
                modulation.weight.data[gammas:].mul_(0.5)
                modulation.weight.data[:gammas].mul_(1e-3)
                modulation.bias.data[:gammas].fill_(1.0)
        cast(nn.Linear, self.head_nm.ada_lin[-1]).weight.data.mul_(0.5)
        self.head.weight.data.mul_(0.02)

    # -- what is asked -----------------------------------------------------------------------------------------------------------------

    def condition(self, ids: Int[Tensor, " B"] | Int[Tensor, "B N"]) -> Condition:
        """`ids` are classes [B] (num_classes is "none"), or characters [B, N] from `tokenizers.text`, padded with 0."""
        memory = mask = None
        if self.config.text is None:
            pooled = self.class_emb(ids)
        else:
            tokens, pooled, mask = self.text(ids)
            memory = tuple(block.cross.remember(tokens) for block in self.blocks)
        shape = (-1, 1, 6, self.config.width)
        if self.config.shared_adaln:
            shared = self.shared_ada_lin(pooled).view(shape)
            modulation = tuple(block.ada_gss + shared for block in self.blocks)
        else:
            modulation = tuple(block.ada_lin(pooled).view(shape) for block in self.blocks)
        return Condition(
            pooled=pooled,
            block_modulation=modulation,
            head_modulation=self.head_nm.ada_lin(pooled).view(-1, 1, 2, self.config.width),
            memory=memory,
            memory_mask=mask,
        )

    # -- teacher-forced ----------------------------------------------------------------------------------------------------------------

    def forward(self, condition: Condition, inputs: Float[Tensor, "B l C"], scales: int | None = None) -> Float[Tensor, "B L D"]:
        """Hidden states of the first `scales` scales (all by default): costs only their tokens. `inputs` [B, L - n_1, channels] are the
        down-sampled partial pictures of scales 2 and on (`MultiScaleVQ.inputs`)."""
        ends = self.ends[: scales or len(self.ends)]
        start = condition.pooled[:, None] + self.pos_start
        x = torch.cat([start, self.word_embed(inputs).to(start.dtype)], 1) if len(ends) > 1 else start
        x = x + self.lvl_embed(self.scale_of_token[: x.shape[1]]) + self.pos_1LC[:, : x.shape[1]]
        for index, block in enumerate(self.blocks):
            x = block(x, condition, index, lambda h, block=block: block.attn(h, ends))
        return x

    # -- one scale at a time -----------------------------------------------------------------------------------------------------------

    def cache(self, batch: int, scales: int | None = None) -> KVCache:
        """Room for the first `scales` scales of `batch` pictures."""
        heads, end = self.config.heads, self.ends[(scales or len(self.ends)) - 1]
        shape = (batch, heads, end, self.config.width // heads)
        return KVCache.empty(len(self.blocks), shape, self.blocks[0].attn.mat_qkv.weight)

    def step(self, condition: Condition, inputs: Float[Tensor, "B n C"] | None, scale: int, cache: KVCache) -> Float[Tensor, "B n D"]:
        """Hidden states of one scale; `inputs` is None at the first."""
        start, end = (self.ends[scale - 1] if scale else 0), self.ends[scale]
        x = condition.pooled[:, None] + self.pos_start if inputs is None else self.word_embed(inputs)
        x = x + self.lvl_embed.weight[scale] + self.pos_1LC[:, start:end]
        for index, block in enumerate(self.blocks):
            x = block(x, condition, index, lambda h, block=block, index=index: block.attn.step(h, cache, index))
        cache.length = end
        return x

    def logits(self, hidden: Float[Tensor, "B l D"], condition: Condition) -> Float[Tensor, "B l V"]:
        scale, shift = condition.head_modulation.unbind(2)
        return self.head(F.layer_norm(hidden, (hidden.shape[-1],), eps=NORM_EPS) * (scale + 1) + shift)
