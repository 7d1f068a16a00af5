import math

import numpy as np
import pytest
import torch

from varl.algorithms.vmr import (
    best_continuations,
    middle_return,
    middle_step,
    next_middle_step,
    prefix_noise,
    suffix_noise,
    variance_parts,
    variance_share,
)
from varl.config import MiddleStep
from varl.errors import ConfigError
from varl.types import Layout

NAN = torch.nan


def squares(*sides):
    return Layout(grids=tuple((n, n) for n in sides), steps=len(sides))


VAR_256 = squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
NEXTFLOW = squares(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
RASTER = Layout(grids=((16, 16),), steps=256)
MASKED = Layout(grids=((16, 16),), steps=64)

# ---- the value


def test_soft_value_by_hand():
    reward = torch.tensor([[0.0, math.log(3.0)]])
    assert middle_return(reward, "log_mean_exp").item() == pytest.approx(math.log(2.0))
    assert middle_return(reward, "mean").item() == pytest.approx(math.log(3.0) / 2)


def test_soft_value_tends_to_mean_then_max():
    reward = torch.tensor([[0.0, 1.0]])
    assert middle_return(reward, "log_mean_exp", eta=1e3).item() == pytest.approx(0.5, abs=1e-3)
    assert middle_return(reward, "log_mean_exp", eta=1e-3).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("mode", ["mean", "log_mean_exp"])
def test_one_continuation_is_its_reward(mode):
    reward = torch.tensor([[0.3], [-2.0], [NAN]])
    torch.testing.assert_close(middle_return(reward, mode, eta=0.5), reward[:, 0], equal_nan=True)


@pytest.mark.parametrize("mode", ["mean", "log_mean_exp", "importance"])
def test_failed_continuations_are_left_out(mode):
    reward = torch.tensor([[0.2, NAN, 0.6], [NAN, NAN, NAN]])
    got = middle_return(reward, mode, 0.5, torch.zeros(2, 3))
    torch.testing.assert_close(got[0], middle_return(torch.tensor([[0.2, 0.6]]), mode, 0.5, torch.zeros(1, 2))[0])
    assert got[1].isnan()


def test_importance_is_eq_10_of_the_rewards_less_their_kl():
    reward, ratio = torch.tensor([[0.2, 0.9]]), torch.tensor([[0.5, -0.1]])
    want = middle_return(reward - 0.3 * ratio, "log_mean_exp", 0.3)
    torch.testing.assert_close(middle_return(reward, "importance", 0.3, ratio), want)
    torch.testing.assert_close(middle_return(reward, "importance", 0.3, 0 * ratio), middle_return(reward, "log_mean_exp", 0.3))
    with pytest.raises(ValueError, match="log_ratio"):
        middle_return(reward, "importance")


@pytest.mark.parametrize(("sigma", "bonus", "tolerance"), [(0.25, 0.0625 / 4 - 0.25**4 / 16, 1e-5), (2.0, 0.64, 6e-3)])
def test_the_optimism_of_two_continuations(sigma, bonus, tolerance):
    """E[V] - mean for Gaussian rewards, K = 2, eta = 1, by quadrature over their difference: sigma^2 / 4 - sigma^4 / 16 while that is
    small, half of what the soft value itself adds; 0.64 where rewards differ by 2."""
    x, weight = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(80))
    pair = torch.stack([x, -x], 1) * sigma / math.sqrt(2)
    got = (middle_return(pair, "log_mean_exp") * weight).sum() / weight.sum()
    assert got.item() == pytest.approx(bonus, abs=tolerance)


# ---- where to cut


@pytest.mark.parametrize(
    ("config", "layout", "m"),
    [
        (MiddleStep(resolution=0.25), NEXTFLOW, 12),
        (MiddleStep(token_share=0.0893), NEXTFLOW, 12),
        (MiddleStep(resolution=0.125), NEXTFLOW, 8),
        (MiddleStep(resolution=0.25), VAR_256, 4),
        (MiddleStep(token_share=0.089), VAR_256, 5),
        (MiddleStep(index=7), VAR_256, 7),
        (MiddleStep(resolution=1.0), VAR_256, 10),
        (MiddleStep(token_share=1.0), VAR_256, 10),
        (MiddleStep(resolution=0.5), Layout(grids=((1, 1), (1, 4), (2, 8), (4, 16)), steps=4), 3),
        (MiddleStep(token_share=0.25), RASTER, 64),
        (MiddleStep(index=20), MASKED, 20),
    ],
)
def test_middle_steps(config, layout, m):
    assert middle_step(config, layout) == m


@pytest.mark.parametrize(
    ("config", "layout", "says"),
    [
        (MiddleStep(index=0), VAR_256, "at step 0"),
        (MiddleStep(index=11), VAR_256, "this model has 10"),
        (MiddleStep(resolution=0.01), VAR_256, "at step 0"),
        (MiddleStep(resolution=0.25), RASTER, "grid of their own"),
        (MiddleStep(token_share=0.25), MASKED, "nothing says"),
    ],
)
def test_impossible_middle_steps_are_refused(config, layout, says):
    with pytest.raises(ConfigError, match=says):
        middle_step(config, layout)


# ---- does it pay?


def test_variance_parts_by_hand():
    """Two prefixes worth 0 and 1, continuations +-0.5 around them: of means 1/2, within 1/2."""
    value = torch.tensor([[[-0.5, 0.5], [0.5, 1.5]]])
    assert variance_parts(value) == pytest.approx((0.5 - 0.25, 0.5))
    assert variance_share(0.25, 0.5) == pytest.approx(1 / 3)


def test_variance_parts_are_unbiased():
    """Prefixes worth 0 or 1, continuations +-1 around them, each with probability 1/2: over all 2^6 draws of N = 2, K = 2 the estimates
    average to Var(E[R|s]) = 1/4 and E Var(R|s) = 1."""
    coins = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    value = coins[:, :2, None] + 2 * coins[:, 2:].reshape(-1, 2, 2) - 1
    parts = torch.tensor([variance_parts(row[None]) for row in value])
    torch.testing.assert_close(parts.mean(0), torch.tensor([0.25, 1.0]))
    assert (parts[:, 0] < 0).any()
    assert variance_share(-0.2, 1.0) == 0


def test_a_failed_continuation_takes_its_prefix_out():
    value = torch.tensor([[[-0.5, 0.5], [0.5, 1.5], [NAN, 9.0]]])
    assert variance_parts(value) == pytest.approx(variance_parts(value[:, :2]))
    assert math.isnan(variance_parts(value[:, [0, 2]])[0])
    with pytest.raises(ValueError, match="at least 2"):
        variance_parts(value[:, :, :1])


@pytest.mark.parametrize("b", [0.0, 0.05, 0.25, 0.4])
def test_noise_at_equal_images(b):
    """The closed forms for 96 images of a prompt set: K=2 G=8 costs 1.071 (1 + b), K=4 G=4 1.25 (1 + 3b), of K=1 G=16."""
    plain = prefix_noise(b, 1 - b, 96, 1, 16)
    assert prefix_noise(b, 1 - b, 96, 2, 8) / plain == pytest.approx(15 / 14 * (1 + b))
    assert prefix_noise(b, 1 - b, 96, 4, 4) / plain == pytest.approx(1.25 * (1 + 3 * b))
    assert suffix_noise(1 - b, 96, 16) / plain == pytest.approx(1 - b)
    assert suffix_noise(1 - b, 96, 2) / plain == pytest.approx((1 - b) * 2 * 15 / 16)


@pytest.mark.parametrize(("b", "cost", "best"), [(0.050, 0.13, 1.6), (0.246, 0.19, 0.8), (0.385, 0.38, 0.8)])
def test_best_number_of_continuations(b, cost, best):
    assert best_continuations(b, 1 - b, cost, 1.0) == pytest.approx(best, abs=0.05)


def test_two_continuations_pay_exactly_where_k_star_exceeds_sqrt_2():
    b, prefixes = 0.2, 16
    for cost in (0.45, 0.55):  # 2 Vb / Vw = 0.5
        noise = {K: (K * b + 1 - b) / (prefixes * K) * prefixes * (cost + K) for K in (1, 2)}  # noise x cost of as many prefixes
        assert (noise[2] < noise[1]) == (best_continuations(b, 1 - b, cost, 1.0) > math.sqrt(2))
    assert best_continuations(0.0, 1.0, 1.0, 1.0) == math.inf


@pytest.mark.parametrize(
    ("shares", "m"),
    [
        ({}, 1),
        ({4: 0.1}, 5),
        ({4: 0.4}, 3),
        ({1: 0.4}, 1),
        ({9: 0.1}, 9),
        ({3: 0.1, 6: 0.5}, 4),
        ({3: 0.22, 4: 0.5}, 3),
        ({3: 0.1, 4: 0.3}, 4),
    ],
)
def test_the_search_for_a_quarter_of_the_variance(shares, m):
    assert next_middle_step(shares, steps=10) == m
