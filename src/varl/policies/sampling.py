"""From logits to the law of a token: one function makes both the law we draw from and the law we score, so they differ only where a
config says so."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from varl.config import LawConfig

CHUNK_ELEMENTS = 1 << 26
"""Logits held at once while scoring: 256 MiB in fp32."""


def keep_top_k(logits: Float[Tensor, "*B V"], k: int) -> Float[Tensor, "*B V"]:
    """All but the k largest to -inf (ties at the k-th are kept)."""
    return logits if k == 0 or k >= logits.shape[-1] else logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits: Float[Tensor, "*B V"], p: float) -> Float[Tensor, "*B V"]:
    """The smallest set of tokens with probability p: in ascending order, those whose cumulative probability is at most 1 - p go."""
    if p >= 1:
        return logits
    ascending, order = logits.sort(-1)
    out = ascending.softmax(-1).cumsum(-1) <= 1 - p
    out[..., -1] = False
    return logits.masked_fill(out.scatter(-1, order, out), -torch.inf)


def guide(cond: Float[Tensor, "*B V"], uncond: Float[Tensor, "*B V"], guidance: Tensor | float) -> Float[Tensor, "*B V"]:
    """Classifier-free guidance on logits, in fp32: uncond + s (cond - uncond). 0 is unconditional, 1 conditional."""
    return uncond.float() + guidance * (cond.float() - uncond.float())


def token_law(
    cond: Float[Tensor, "*B V"],
    uncond: Float[Tensor, "*B V"] | None,
    law: LawConfig,
    guidance: Tensor | float,
    temperature: Tensor | float | None = None,
) -> Float[Tensor, "*B V"]:
    """Log-probabilities of one token under `law`: guidance, temperature, top-k, top-p, in that order, in fp32. `guidance` is this step's
    `cfg_scale` (a tensor broadcasts over tokens); `uncond` may be None where no step is guided. `temperature` is this step's, None where
    all have the law's."""
    logits = cond.float() if uncond is None else guide(cond, uncond, guidance)
    if temperature is not None or law.temperature != 1.0:
        logits = logits / (law.temperature if temperature is None else temperature)
    return keep_top_p(keep_top_k(logits, law.top_k), law.top_p).log_softmax(-1)


def draw(logp: Float[Tensor, "*B V"], uniform: Float[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """Inverse-CDF sampling: the token in whose stretch of [0, 1) the uniform falls. One uniform per token is the whole randomness of a
    picture, the same on every device; a token of probability 0 is never drawn."""
    return draw_several(logp, uniform.unsqueeze(-1)).squeeze(-1)


def draw_several(logp: Float[Tensor, "*B V"], uniform: Float[Tensor, "*B G"]) -> Int[Tensor, "*B G"]:
    """`draw`, G times from each law."""
    p = logp.exp()
    cdf = p.cumsum(-1)
    if cdf.is_cuda:  # summed in parallel it may rise, or fall, by a rounding error where p is 0
        cdf = torch.where(p > 0, cdf, 0.0).cummax(-1).values
    # scaled by the rounded total, and kept below it, so that rounding never falls off the end
    total = cdf[..., -1:]
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    # a law of NaN draws the last token: the loop names it, where an index outside the vocabulary would crash first
    return torch.searchsorted(cdf, target, right=True).clamp(max=logp.shape[-1] - 1)


def smooth_weights(logp: Float[Tensor, "*B V"], gumbel: Float[Tensor, "*B V"], ratio: float) -> Float[Tensor, "*B V"]:
    """VAR's `more_smooth`: how much of each code goes into a token that is no code but a mixture of them,

        softmax(((1 + r) log p + g) / tau),   tau = max(0.27 (1 - 0.95 r), 0.005)

    with Gumbel noise g, and r the share of the scales before this one, 0 to 1: sharper and colder from scale to scale. As released, p is
    filtered by top-k and top-p first."""
    return (((1 + ratio) * logp + gumbel) / max(0.27 * (1 - 0.95 * ratio), 0.005)).softmax(-1)


def token_scores(logp: Float[Tensor, "*B V"], ids: Int[Tensor, "*B"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Log-probability of what was drawn, and the entropy of its law (no gradient)."""
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy(logp)


@torch.no_grad()
def entropy(logp: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Nats; no gradient."""
    return -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1)


def analytic_kl(logp: Float[Tensor, "*B V"], ref_logp: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """KL(policy || reference) = sum_v p (log p - log q), nats; tokens of probability 0 count 0."""
    return (logp.exp() * torch.where(logp > -torch.inf, logp - ref_logp, 0.0)).sum(-1)


def row_slices(rows: int, size: int) -> list[slice]:
    """Of at most `size` rows each."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def in_row_chunks(fn: Callable[[slice], tuple[Tensor, ...]], rows: int, elements_per_row: int) -> tuple[Tensor, ...]:
    """fn over slices of rows, concatenated, so that at most CHUNK_ELEMENTS of its largest tensor exist at once; with gradient each slice
    is recomputed in the backward pass. Where all fits, fn is simply called once."""
    slices = row_slices(rows, max(1, CHUNK_ELEMENTS // elements_per_row))
    if len(slices) == 1:
        return fn(slices[0])
    parts = [checkpoint(fn, piece, use_reentrant=False) if torch.is_grad_enabled() else fn(piece) for piece in slices]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
