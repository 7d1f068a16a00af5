"""A flow-matching head as a stochastic chain: the moves of Flow-GRPO (arXiv 2505.05470)."""

from jaxtyping import Float
from torch import Tensor

NOISE = 0.7
"""Noise level of the released samplers, unitless."""


def flow_spread(sigma: float, following: float, first: float) -> float:
    """Noise rate s sqrt(sigma / (1 - sigma)) of the chain at noise level `sigma`, 1 to 0; at level 1, where that is infinite, with the
    level `first` that follows it in the denominator. Times sqrt(sigma - following) it is the move's standard deviation."""
    if not 0 <= following < sigma <= 1:
        raise ValueError(f"flow_spread: noise falls from sigma={sigma} to {following}; levels must fall, between 1 and 0.")
    return NOISE * (sigma / (1 - (first if sigma == 1 else sigma))) ** 0.5


def flow_move(
    x: Float[Tensor, "*B"], velocity: Float[Tensor, "*B"], sigma: float, following: float, first: float
) -> tuple[Float[Tensor, "*B"], float]:
    """(mean, standard deviation) of the move from noise level sigma to the `following` one. With the noise rate g and dt = following -
    sigma < 0:

        mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt,     std = g sqrt(-dt)

    Without noise (g = 0) that is Euler's step x + v dt."""
    rate, dt = flow_spread(sigma, following, first), following - sigma
    mean = x * (1 + rate**2 * dt / (2 * sigma)) + velocity * (1 + rate**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, rate * (-dt) ** 0.5
