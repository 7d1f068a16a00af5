"""Value as middle return: what a half-drawn picture is worth, where to cut, and how many continuations pay."""

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from varl.algorithms.advantages import nan_std
from varl.config import MiddleStep
from varl.errors import ConfigError
from varl.types import Layout


def middle_return(
    reward: Float[Tensor, "B K"],
    mode: Literal["mean", "log_mean_exp", "importance"] = "mean",
    eta: float = 1.0,
    log_ratio: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    """Value of each prefix, from its K continuations, in units of the reward:

        mean           mean_k R_k
        log_mean_exp   eta log mean_k exp(R_k / eta)                        VAR-RL (arXiv 2601.02256) Eq. 10
        importance     eta log mean_k exp((R_k - eta log_ratio_k) / eta)    log_ratio: log policy/reference of the continuation, nats

    Paper: log_mean_exp, eta = 1, K = 2. Ours: mean, the unbiased gradient of the full-horizon reward whatever its unit; log_mean_exp is
    another, risk-seeking objective, and for rewards that differ by much less than eta it is the mean. Eq. 10 holds only where the policy
    that was drawn from is the one that KL is measured against; for a fixed reference it overshoots the soft value, which `importance`
    approaches from below as K grows. Failed continuations (NaN) are left out; a prefix none of whose continuations was judged is NaN."""
    failed = reward.isnan()
    if mode == "mean":
        return reward.nanmean(1)
    if mode == "importance":
        if log_ratio is None:
            raise ValueError("middle_return: mode 'importance' needs the continuations' log_ratio to the reference.")
        reward = reward - eta * log_ratio
    valid = (~failed).sum(1)
    value = eta * ((reward / eta).masked_fill(failed, -torch.inf).logsumexp(1) - valid.clamp(min=1).log())
    return value.masked_fill(valid == 0, torch.nan)


def middle_step(config: MiddleStep, layout: Layout) -> int:
    """m: the prefix is the first m of the layout's S steps, 1 <= m <= S. The paper's m_256 (12 of NextFlow's 18 scales) has a quarter of
    the final grid's side and 8.9 % of the tokens; on VAR's ten scales these are m = 4 and m = 5."""
    per_step = len(layout.grids) == layout.steps
    if config.index is not None:
        m = config.index
    elif config.resolution is not None:
        if not per_step:
            raise ConfigError(
                f"middle_step.resolution={config.resolution}: the {layout.steps} steps of this model do not each draw a grid of their own. "
                "Use middle_step.index."
            )
        m = sum(max(grid) <= config.resolution * max(layout.grids[-1]) + 1e-9 for grid in layout.grids)
    else:
        assert config.token_share is not None
        if not per_step and layout.steps != layout.tokens:
            raise ConfigError(
                f"middle_step.token_share={config.token_share}: {layout.tokens} tokens on {layout.steps} steps, and nothing says which "
                "has how many. Use middle_step.index."
            )
        sizes = [h * w for h, w in layout.grids] if per_step else [1] * layout.steps
        m = sum(total <= config.token_share * layout.tokens + 1e-9 for total in accumulate(sizes))
    if not 1 <= m <= layout.steps:
        raise ConfigError(f"{config} puts the end of the prefix at step {m}; this model has {layout.steps}. Set 1 to {layout.steps}.")
    return m


# ---- does it pay? What b, the share of reward variance that is settled by step m, says about K and m


def variance_parts(value: Float[Tensor, "P N K"]) -> tuple[float, float]:
    """(between, within): unbiased one-way analysis of variance of K continuations of each of N prefixes, averaged over prompts, in squared
    units of the reward:

        within = mean_n var_K(x_n)          E Var(R | s_m)
        between = var_N(mean_K x) - within / K      Var(E[R | s_m]); may come out below 0

    A prefix with a failed continuation is left out."""
    if value.shape[1] < 2 or value.shape[2] < 2:
        raise ValueError(f"variance_parts: needs at least 2 prefixes with 2 continuations each, got {list(value.shape)} (P, N, K).")
    mean = value.mean(2)
    within = value.var(2).nanmean()
    of_means = nan_std(mean).square().masked_fill((~mean.isnan()).sum(1) < 2, torch.nan).nanmean()
    return (of_means - within / value.shape[2]).item(), within.item()


def variance_share(between: float, within: float) -> float:
    """b = between / (between + within), 0 to 1; estimates below 0 count as 0."""
    between = max(between, 0.0)
    return between / (between + within) if between + within > 0 else 0.0


def prefix_noise(between: float, within: float, images: int, continuations: int, group: int) -> float:
    """Noise of the prefix gradient, per unit of squared score: (K between + within) / images * G / (G - 1). At equal judged images K = 1 is
    the quietest for the mean, whatever the reward."""
    return (continuations * between + within) / images * group / (group - 1)


def suffix_noise(within: float, images: int, siblings: int) -> float:
    """Noise of the suffix gradient against siblings that share the prefix: within / images * K / (K - 1)."""
    return within / images * siblings / (siblings - 1)


def best_continuations(between: float, within: float, prefix_cost: float, continuation_cost: float) -> float:
    """K* = sqrt(within / between * prefix_cost / continuation_cost), the K that makes the prefix gradient quietest at equal cost. Costs in
    any one unit: a prefix is drawn and trained on, a continuation drawn, decoded and judged. Below 1.4 stay with K = 1."""
    return math.sqrt(within / between * prefix_cost / continuation_cost) if between > 0 else math.inf


def next_middle_step(shares: Mapping[int, float], steps: int, target: float = 0.25) -> int:
    """Which m to try next, 1 <= m < S, given b(m) where it is known: b grows with m, so go on to the neighbour on the side of the target
    until it is bracketed, then take the nearest."""
    below = max((m for m, share in shares.items() if share < target), default=None)
    above = min((m for m, share in shares.items() if share >= target), default=None)
    if above is None:
        return min((below or 0) + 1, steps - 1)
    if below is None:
        return max(above - 1, 1)
    if above - below > 1:
        return below + 1
    return min(below, above, key=lambda m: abs(shares[m] - target))
