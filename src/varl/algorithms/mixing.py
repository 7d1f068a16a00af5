"""Several rewards in one sum. Which one rules it is decided by weights, and by whose differences are larger."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from varl.algorithms.advantages import FLAT, SOFT, nan_std
from varl.types import Judgement, Prompt, groups


def standardised(judgement: Judgement, prompts: Sequence[Prompt], group: int | None = None, scale: float | None = None) -> Judgement:
    """One reward's judgement with the differences inside a group in standard deviations, and the group's mean as it was:

        x' = mean_G x + (x - mean_G x) / (sigma + 1e-4)            sigma is `scale`, or if that is None, the group's own:
                                                                   the first step of GDPO (arXiv 2601.05242); std unbiased

    A weighted sum of such rewards has the advantages of the weighted sum of their z-scores, because a group's mean drops out of them; its
    mean over pictures is still that of the plain weighted sum. A group is `group` pictures side by side, or if that is not said, those of
    equal prompts. Failed pictures stay out of mean and deviation; a flat group (standard deviation below 1e-6) has x' = mean. Regions keep
    summing to the value: their shares are divided alike, and what the mean is short of is spread evenly. `parts` are left as they are."""
    value = judgement.value
    mean, factor = torch.zeros_like(value), torch.zeros_like(value)
    for there in groups(prompts, group):
        rows = slice(there.start, there.stop)
        sigma = nan_std(value[rows])
        mean[rows] = value[rows].nanmean()
        factor[rows] = 0.0 if sigma < FLAT else 1 / ((sigma if scale is None else scale) + SOFT)
    rest, shares = (1 - factor) * mean, judgement.region_value
    if shares is not None:
        shares = shares * factor[:, None] + (rest / (~shares.isnan()).sum(1).clamp(min=1))[:, None]
    return replace(judgement, value=value * factor + rest, region_value=shares)


MEMORY = 0.9
"""Share of the running scale that survives a step."""


class RunningScale:
    """Divides each of the named rewards by a running mean of its standard deviation inside groups, as the metric rewards/NAME/std has it:

        s_1 = d_1,      s_t = 0.9 s_{t-1} + 0.1 d_t                 d_t: step t's, over all its groups on all ranks

    Step t is divided by s_{t-1}: known before its first chunk is judged, so neither chunks nor ranks matter. Before there is any (the first
    step; a reward that was flat so far) it is the group's own deviation."""

    def __init__(self, names: Iterable[str]) -> None:
        self.scale = dict.fromkeys(names, 0.0)

    def __call__(self, name: str, judgement: Judgement, prompts: Sequence[Prompt], group: int | None) -> Judgement:
        scale = self.scale.get(name, 0.0)
        return standardised(judgement, prompts, group, None if scale < FLAT else scale)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Learns from the metrics of a step."""
        for name, scale in self.scale.items():
            new = metrics.get(f"rewards/{name}/std")
            if new is not None:
                self.scale[name] = new if scale < FLAT else MEMORY * scale + (1 - MEMORY) * new

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale = dict(state["scale"])
