"""A flow-matching head as a stochastic chain: the moves of Flow-GRPO (arXiv 2505.05470)."""

from typing import TypeVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

NOISE = 0.7
"""Noise level of the released samplers, unitless."""
LEVELS = 1000
"""Of noise, on which heads are trained: 1/1000 to 1. A head is told 1000 times the level."""

Level = TypeVar("Level", float, Tensor)


def shifted(level: Level, shift: float) -> Level:
    """s level / (1 + (s - 1) level): 0 and 1 stay, and above s = 1 what lies between is noisier (arXiv 2403.03206 Eq. 23)."""
    return shift * level / (1 + (shift - 1) * level)


def flow_levels(steps: int, shift: float) -> Float64[Tensor, " N"]:
    """Noise levels from 1 to 0 between which a chain of N - 1 = `steps` moves goes: evenly from 1 to the least that was trained, and then
    0. As released all but the last are shifted, though the least has been already."""
    if steps < 1:
        raise ValueError(f"flow_levels: {steps} steps. Give 1 or more.")
    even = torch.linspace(1, shifted(1 / LEVELS, shift), steps, dtype=torch.float64)
    return torch.cat([shifted(even, shift), even.new_zeros(1)])


def flow_spread(sigma: float, following: float, first: float) -> float:
    """Noise rate s sqrt(sigma / (1 - sigma)) of the chain at noise level `sigma`, 1 to 0; at level 1, where that is infinite, with the
    level `first` that follows it in the denominator. Times sqrt(sigma - following) it is the move's standard deviation."""
    if not 0 <= following < sigma <= 1:
        raise ValueError(f"flow_spread: noise falls from sigma={sigma} to {following}; levels must fall, between 1 and 0.")
    return NOISE * (sigma / (1 - (first if sigma == 1 else sigma))) ** 0.5


def flow_factors(sigma: float, following: float, first: float) -> tuple[float, float, float]:
    """(a, b, standard deviation) of the move from noise level sigma to the `following` one, whose mean is a x + b v. With the noise rate g
    and dt = following - sigma < 0:

        a = 1 + g^2 dt / (2 sigma),     b = (1 + g^2 (1 - sigma) / (2 sigma)) dt,     std = g sqrt(-dt)

    Without noise (g = 0) that is Euler's step x + v dt."""
    rate, dt = flow_spread(sigma, following, first), following - sigma
    return 1 + rate**2 * dt / (2 * sigma), (1 + rate**2 * (1 - sigma) / (2 * sigma)) * dt, rate * (-dt) ** 0.5


def flow_move(
    x: Float[Tensor, "*B"], velocity: Float[Tensor, "*B"], sigma: float, following: float, first: float
) -> tuple[Float[Tensor, "*B"], float]:
    """(mean, standard deviation) of that move."""
    of_x, of_velocity, std = flow_factors(sigma, following, first)
    return of_x * x + of_velocity * velocity, std
