"""How a model is drawn from."""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from varl.config.demand import demand
from varl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LawConfig:
    """How logits become the distribution of a token: guidance, temperature, top-k, top-p, in that order."""

    cfg_scale: tuple[float, ...] = (1.0,)
    """Guidance uncond + s * (cond - uncond); one value per step, or one for all. 1 is none and costs nothing."""
    temperature: float = 1.0
    temperature_ramp: tuple[float, ...] = (1.0,)
    """By which `temperature` is multiplied; one value per step, or one for all."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability; 1 keeps all."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"law.temperature={self.temperature}: must be above 0. For greedy decoding set top_k=1.")
        if not self.temperature_ramp or not min(self.temperature_ramp) > 0:
            raise ConfigError(f"law.temperature_ramp={list(self.temperature_ramp)}: must be above 0, one value per step or one for all.")
        if self.top_k < 0:
            raise ConfigError(f"law.top_k={self.top_k}: must be 0 (keep all) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"law.top_p={self.top_p}: must lie in (0, 1]; 1 keeps all tokens.")

    @property
    def guided(self) -> bool:
        return any(scale != 1.0 for scale in self.cfg_scale)

    def guidance(self, step: int) -> float:
        """cfg_scale of one step."""
        return self.cfg_scale[0] if len(self.cfg_scale) == 1 else self.cfg_scale[step]

    def heat(self, step: int) -> float:
        """Temperature of one step."""
        return self.temperature * (self.temperature_ramp[0] if len(self.temperature_ramp) == 1 else self.temperature_ramp[step])


def var_guidance(cfg: float, steps: int) -> tuple[float, ...]:
    """VAR's ramp as `cfg_scale`: 1 + cfg * i / (S - 1) at step i, none at the first."""
    return tuple(1.0 + cfg * i / max(steps - 1, 1) for i in range(steps))


def settled_counts(tokens: int, steps: int, rounding: Literal["floor", "round"] = "floor") -> tuple[int, ...]:
    """Tokens that each step of a masked model settles, by the cosine schedule, which leaves L cos(pi/2 (i+1)/n) of L tokens open after step
    i of n:

        floor   MAR (arXiv 2406.11838): rounded down, but at least one token at each step, and at least one left for the last
        round   NOVA: rounded to the nearest; a step that settles nothing is left out, so there may be fewer than n

    Together they are all L tokens."""
    if not 1 <= steps <= tokens:
        raise ConfigError(f"{steps} steps for {tokens} tokens: every step settles a token or more. Set 1 to {tokens} steps.")
    left, counts = tokens, []
    for i in range(steps):
        open_ = tokens * math.cos(math.pi / 2 * (i + 1) / steps)
        if i == steps - 1:
            after = 0
        else:
            after = round(open_) if rounding == "round" else max(1, min(left - 1, math.floor(open_)))
        counts.append(left - after)
        left = after
    return tuple(count for count in counts if count)


def mar_guidance(cfg: float, tokens: int, steps: int) -> tuple[float, ...]:
    """MAR's linear ramp as `cfg_scale`: 1 + (cfg - 1) * (share of tokens that are known after step i), where the last step counts one as
    unknown, as released."""
    known = accumulate(settled_counts(tokens, steps))
    return tuple(1.0 + (cfg - 1.0) * min(count, tokens - 1) / tokens for count in known)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmaskingConfig:
    """How a masked model draws a picture. The defaults are MAR's quick setting; the authors measure FID with 256 steps."""

    steps: int = 64
    """n, in which the tokens are settled, a few at first, by the cosine schedule."""
    denoise_steps: int = 100
    """T, in which each token is made of noise; so many of the 1000 that its head was trained on, evenly spread."""

    def __post_init__(self) -> None:
        demand("unmasking.steps", self.steps, self.steps >= 1, "1 or more")
        demand("unmasking.denoise_steps", self.denoise_steps, 1 <= self.denoise_steps <= 1000, "1 to 1000")
