"""Several rewards in one sum. Which one rules it is decided by weights, and by whose differences are larger."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch

from varl.algorithms.advantages import FLAT, SOFT, nan_std
from varl.types import Judgement, Prompt


def standardised(judgement: Judgement, prompts: Sequence[Prompt]) -> Judgement:
    """One reward's judgement with the differences inside a group in standard deviations, and the group's mean as it was:

        x' = mean_G x + (x - mean_G x) / (std_G x + 1e-4)          the first step of GDPO (arXiv 2601.05242); std unbiased

    A weighted sum of such rewards has the advantages of the weighted sum of their z-scores, because a group's mean drops out of them; its
    mean over pictures is still that of the plain weighted sum. A group is pictures of equal prompts side by side. Failed pictures stay out
    of mean and deviation; a flat group (standard deviation below 1e-6) has x' = mean. Regions keep summing to the value: their shares are
    divided alike, and what the mean is short of is spread evenly. `parts` are left as they are."""
    value = judgement.value
    mean, factor, start = torch.zeros_like(value), torch.zeros_like(value), 0
    for _, same in groupby(prompts):
        group = slice(start, start := start + len(list(same)))
        sigma = nan_std(value[group])
        mean[group] = value[group].nanmean()
        factor[group] = 0.0 if sigma < FLAT else 1 / (sigma + SOFT)
    rest, shares = (1 - factor) * mean, judgement.region_value
    if shares is not None:
        shares = shares * factor[:, None] + (rest / (~shares.isnan()).sum(1).clamp(min=1))[:, None]
    return replace(judgement, value=value * factor + rest, region_value=shares)
