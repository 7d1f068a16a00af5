from itertools import pairwise

import pytest
import torch

from varl.config import mar_guidance, settled_counts
from varl.errors import ConfigError
from varl.models.flow import flow_levels, flow_move, shifted


@pytest.mark.parametrize(
    ("tokens", "steps", "first", "last"),
    [
        (256, 64, (1, 1, 1, 1, 1, 1), (7, 6, 6, 6)),
        (256, 16, (2, 3, 7, 8, 11, 13), (23, 25, 24, 25)),
        (256, 12, (3, 6, 11, 15, 18, 22), (31, 31, 33, 33)),
        (1024, 64, (1, 1, 1, 2, 3, 4), (25, 25, 25, 25)),
    ],
)
def test_mars_schedule_as_released(tokens, steps, first, last):
    counts = settled_counts(tokens, steps)
    assert (len(counts), sum(counts)) == (steps, tokens)
    assert counts[:6] == first
    assert counts[-4:] == last


def test_novas_schedule_as_released():
    """Its first step of 64 would settle nothing."""
    counts = settled_counts(1024, 64, "round")
    assert (len(counts), sum(counts)) == (63, 1024)
    assert counts[:9] == (1, 2, 2, 3, 3, 4, 5, 5, 6)
    assert counts[-8:] == (25,) * 8


@pytest.mark.parametrize("steps", [1, 2, 9, 10])
@pytest.mark.parametrize("rounding", ["floor", "round"])
def test_all_tokens_are_settled_whatever_the_steps(steps, rounding):
    counts = settled_counts(10, steps, rounding)
    assert sum(counts) == 10
    assert min(counts) >= 1
    assert rounding == "round" or len(counts) == steps


def test_impossible_schedules_are_refused():
    for steps in (0, 11):
        with pytest.raises(ConfigError, match=f"{steps} steps for 10 tokens"):
            settled_counts(10, steps)


def test_guidance_grows_with_what_is_known():
    assert settled_counts(16, 4) == (2, 3, 5, 6)
    assert mar_guidance(3.0, 16, 4) == (1.25, 1.625, 2.25, 2.875)
    assert mar_guidance(1.0, 16, 4) == (1.0,) * 4


def test_levels_of_the_flow_sampler():
    assert flow_levels(1, 3.0).tolist() == [1, 0]
    assert flow_levels(4, 1.0).tolist() == pytest.approx([1, 0.667, 0.334, 0.001, 0])
    least = 0.003 / 1.002
    assert flow_levels(3, 3.0).tolist() == pytest.approx([1, shifted((1 + least) / 2, 3.0), shifted(least, 3.0), 0])
    assert shifted(0.5, 3.0) == 0.75
    with pytest.raises(ValueError, match="0 steps"):
        flow_levels(0, 1.0)


def test_noise_of_the_flow_sampler_as_released():
    """25 levels, not shifted: standard deviations measured on the authors' scheduler."""
    at = flow_levels(25, 1.0).tolist()
    assert at[1] == pytest.approx(0.958375)
    zero = torch.zeros(1)
    std = [flow_move(zero, zero, now, after, at[1])[1] for now, after in pairwise(at)]
    assert [std[0], std[1], std[12], std[24]] == pytest.approx([0.7, 0.68528, 0.14296, 0.0007], abs=5e-6)


def test_the_mean_by_hand():
    """sigma 0.5 to 0.25: rate^2 = 0.49, dt = -0.25; x (1 - 0.1225) + v (1 + 0.245) (-0.25)."""
    mean, std = flow_move(torch.tensor([2.0]), torch.tensor([1.0]), 0.5, 0.25, 0.9)
    assert mean.item() == pytest.approx(2 * 0.8775 - 0.31125)
    assert std == pytest.approx(0.35)


def test_the_chain_keeps_the_marginals_of_the_flow():
    """Data N(0, 1) and noise N(0, 1): x at level s has variance (1 - s)^2 + s^2, and the exact velocity is E[noise - data | x]. Below level
    1, whose first move is never small, small steps keep that variance to first order in their size."""
    at = torch.linspace(0.98, 0.02, 4001, dtype=torch.float64).tolist()
    variance = 0.98**2 + 0.02**2
    for now, after in pairwise(at):
        slope = (now - (1 - now)) / ((1 - now) ** 2 + now**2)
        factor, std = flow_move(torch.tensor(1.0).double(), torch.tensor(slope).double(), now, after, at[1])
        variance = factor.item() ** 2 * variance + std**2
    assert variance == pytest.approx(0.98**2 + 0.02**2, rel=2e-3)


def test_levels_that_do_not_fall_are_refused():
    with pytest.raises(ValueError, match="must fall"):
        flow_move(torch.zeros(1), torch.zeros(1), 0.5, 0.5, 0.9)
