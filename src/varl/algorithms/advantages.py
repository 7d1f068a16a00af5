"""How much better than its group a picture was. NaN is a judgement that failed: it joins no mean and no deviation, and gets advantage 0."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Scale = Literal["group", "batch", "none"]

FLAT = 1e-6
"""Below this standard deviation a group has nothing to tell its pictures apart by."""
SOFT = 1e-4
"""Added to the standard deviation before dividing by it, as in GRPO's reference code."""


def nan_std(value: Float[Tensor, "*B N"]) -> Float[Tensor, "*B"]:
    """Unbiased standard deviation over the last axis, of the entries that are not NaN; 0 where fewer than two are left. In fp64: the fp32
    mean of equal rewards of 100 is off by more than `FLAT`."""
    exact = value.double()
    deviation = (exact - exact.nanmean(-1, keepdim=True)).masked_fill(value.isnan(), 0.0)
    count = (~value.isnan()).sum(-1)
    return (deviation.square().sum(-1) / (count - 1).clamp(min=1)).sqrt().to(value.dtype)


def flat_groups(value: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Groups that teach nothing: constant (standard deviation below 1e-6), or with fewer than two judgements that did not fail."""
    return nan_std(value) < FLAT


def part_advantages(value: Float[Tensor, "P G R"], scale: Scale) -> Float[Tensor, "P G R"]:
    """Group-relative advantage of each of R parts of a reward, all R measured by one standard deviation:

        A_r = (x_r - mean_G x_r) / (sigma + 1e-4),      sigma^2 = sum_r var(x_r)

    The variances are unbiased and taken inside the group (`group`) or over all pictures (`batch`); `none` does not divide. One common
    sigma, because the gradient of a sum of parts must not weigh the parts anew; the sum of variances and not the variance of the sum,
    because the latter vanishes where one part gains what another loses, just where there is much to tell apart. A flat group gets 0."""
    return _divided((value - value.nanmean(1, keepdim=True)).masked_fill(value.isnan(), 0.0), value, scale)


def group_advantages(value: Float[Tensor, "P G"], scale: Scale = "group") -> Float[Tensor, "P G"]:
    """Advantage of each picture over its group, unitless (in units of the reward for `none`):

        A = (x - mean_G x) / (std + 1e-4)       GRPO (arXiv 2402.03300); std unbiased, of the group or of the whole batch

    A flat group (`flat_groups`) gets 0, and so does a failed picture."""
    return part_advantages(value[:, :, None], scale)[:, :, 0]


def sibling_advantages(value: Float[Tensor, "P G K R"], scale: Scale = "group") -> Float[Tensor, "P G K R"]:
    """Advantage of each of K continuations over its siblings, the other continuations of the same prefix, for each of R parts:

        A_k = (x_k - mean_{j != k} x_j) / (sigma + 1e-4) = K / (K - 1) * (x_k - mean_K x) / (sigma + 1e-4)

    The leave-one-out mean does not depend on x_k, so the gradient of the suffix stays unbiased. Sigma is that of the prompt's G*K pictures
    (`batch`: of all pictures): two siblings' own would make every pair +-0.7, however alike. Left alone, a continuation gets 0."""
    valid = (~value.isnan()).sum(2, keepdim=True)
    centred = (value - value.nanmean(2, keepdim=True)).masked_fill(value.isnan(), 0.0) * valid / (valid - 1).clamp(min=1)
    return _divided(centred.flatten(1, 2), value.flatten(1, 2), scale).reshape(value.shape)


def _divided(centred: Float[Tensor, "P N R"], value: Float[Tensor, "P N R"], scale: Scale) -> Float[Tensor, "P N R"]:
    within = nan_std(value.transpose(1, 2)).square().sum(-1).sqrt()
    match scale:
        case "group":
            sigma = within + SOFT
        case "batch":
            sigma = nan_std(value.flatten(0, 1).T).square().sum(-1).sqrt().expand_as(within) + SOFT
        case "none":
            sigma = torch.ones_like(within)
    return (centred / sigma[:, None, None]).masked_fill((within < FLAT)[:, None, None], 0.0)
