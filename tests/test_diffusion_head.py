import math

import pytest
import torch

from varl.config import DiffusionHeadConfig
from varl.errors import ConfigError
from varl.models.diffusion_head import (
    STEPS,
    DiffusionHead,
    cosine_betas,
    drawn,
    evenly,
    gaussian_kl,
    guided,
    learned_log_variance,
    log_density,
    log_mass,
    noise_loss,
    noised,
    posterior_mean,
    predicted_start,
    respaced,
    reverse_step,
    sinusoid,
    variance_loss,
)

FULL = respaced(range(STEPS))
TEN = respaced(range(0, STEPS, 100))
Normal = torch.distributions.Normal


def tiny() -> DiffusionHead:
    """A head whose every weight matters: a fresh one puts out 0."""
    torch.manual_seed(0)
    head = DiffusionHead(DiffusionHeadConfig(depth=2, width=12), channels=3, condition=5)
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return head.eval().requires_grad_(False)


def index(*t: int) -> torch.Tensor:
    return torch.tensor(t)


# ---- the process


def test_released_betas():
    betas = cosine_betas()
    assert betas[0].item() == pytest.approx(4.12842248e-5, rel=1e-8)
    assert betas[-1].item() == 0.999
    assert (betas.diff() >= 0).all()


def test_the_released_hundred_steps():
    kept, process = evenly(100), respaced(evenly(100))
    assert (*kept[:4], *kept[-3:]) == (0, 10, 20, 30, 979, 989, 999)
    assert process.betas[0].item() == pytest.approx(4.12842248e-5, rel=1e-8)
    assert process.betas[1].item() == pytest.approx(6.79840e-4, rel=1e-5)
    assert process.betas[-1].item() == pytest.approx(0.99999, abs=1e-5)
    assert process.log_variances[1].exp().item() == pytest.approx(3.89222e-5, rel=1e-5)
    assert process.signal[-1].square().item() == pytest.approx(2.42877e-9, rel=1e-5)


def test_even_steps_by_hand():
    assert evenly(1) == (0,)
    assert evenly(2) == (0, 999)
    assert evenly(4) == (0, 333, 666, 999)
    assert evenly(1000) == tuple(range(1000))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"{steps} denoising steps"):
            evenly(steps)


@pytest.mark.parametrize("kept", [(), (3, 2), (1, 1), (-1, 4), (0, 1000)])
def test_steps_that_are_no_steps(kept):
    with pytest.raises(ValueError, match="in ascending order"):
        respaced(kept)


def test_a_step_that_is_left_out_is_taken_at_once():
    """x_t given x_0 is the same law, whichever steps lie between."""
    torch.testing.assert_close(TEN.signal, FULL.signal[::100], rtol=1e-12, atol=0)
    torch.testing.assert_close(FULL.betas, cosine_betas(), rtol=1e-9, atol=0)
    torch.testing.assert_close(TEN.signal.square() + TEN.noise.square(), torch.ones(10, dtype=torch.float64))
    assert len(TEN) == 10


def test_the_posterior_is_bayes():
    """Of x_t-1 given x_t and x_0, from the two Gaussians that it follows from, in float64."""
    a, beta = TEN.signal.square(), TEN.betas
    x_0, x_t = torch.randn(10, 3), torch.randn(10, 3)
    precision = (1 - beta[1:]) / beta[1:] + 1 / (1 - a[:-1])
    weighted = ((1 - beta[1:]).sqrt() / beta[1:])[:, None] * x_t[1:] + (a[:-1].sqrt() / (1 - a[:-1]))[:, None] * x_0[1:]
    torch.testing.assert_close(
        posterior_mean(TEN, x_0, x_t, torch.arange(10))[1:], (weighted / precision[:, None]).float(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(TEN.log_variances[1:], -precision.log(), rtol=1e-9, atol=1e-12)
    assert torch.equal(posterior_mean(TEN, x_0[:1], x_t[:1], index(0)), x_0[:1]), "the first step ends at x_0"


# ---- one step


def test_the_right_noise_leads_back_to_the_start():
    x_0, noise, t = torch.randn(7, 3), torch.randn(7, 3), index(0, 3, 100, 400, 600, 800, 900)
    x_t = noised(FULL, x_0, noise, t)
    torch.testing.assert_close(predicted_start(FULL, x_t, noise, t), x_0, rtol=0, atol=1e-5)
    mean, _ = reverse_step(FULL, torch.cat([noise, torch.zeros(7, 3)], 1), x_t, t)
    torch.testing.assert_close(mean, posterior_mean(FULL, x_0, x_t, t), rtol=0, atol=1e-5)


def test_the_learned_variance_lies_between_its_ends():
    t = index(0, 4, 9)
    ends = [learned_log_variance(TEN, torch.full((3, 1), v), t)[:, 0] for v in (-1.0, 0.0, 1.0)]
    torch.testing.assert_close(ends[0], TEN.log_variances[t].float())
    torch.testing.assert_close(ends[2], TEN.betas[t].log().float())
    torch.testing.assert_close(ends[1], (ends[0] + ends[2]) / 2)
    assert ends[0][0] == TEN.log_variances[1].float(), "the first step, which has none, borrows the second's"


@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_step_has_the_density_of_its_gaussian(v, temperature):
    x, out = torch.randn(9, 2), torch.cat([torch.randn(9, 2), torch.full((9, 2), v)], 1)
    mean, log_variance = reverse_step(TEN, out, x, torch.arange(1, 10))
    noise = torch.randn(9, 2)
    new = drawn(mean, log_variance, noise, temperature)
    want = Normal(mean.double(), temperature * (log_variance.double() / 2).exp()).log_prob(new.double())
    torch.testing.assert_close(log_density(new, mean, log_variance, temperature), want.float(), rtol=1e-4, atol=1e-3)
    standard = Normal(0.0, 1.0).log_prob(noise) - log_variance / 2 - math.log(temperature)
    torch.testing.assert_close(log_density(new, mean, log_variance, temperature), standard, rtol=1e-4, atol=1e-3)


def test_a_density_by_hand():
    two, zero = torch.tensor([2.0]), torch.tensor([0.0])
    assert log_density(two, zero, zero).item() == pytest.approx(-2 - 0.5 * math.log(2 * math.pi))
    assert log_density(two, zero, torch.tensor([math.log(4.0)])).item() == pytest.approx(-0.5 - math.log(2) - 0.5 * math.log(2 * math.pi))
    assert log_density(two, zero, zero, 2.0).item() == pytest.approx(-0.5 - math.log(2) - 0.5 * math.log(2 * math.pi))
    assert log_density(two.bfloat16(), zero.bfloat16(), zero.bfloat16()).dtype == torch.float32


def test_guidance_mixes_eps_and_leaves_the_variance():
    cond, uncond = torch.tensor([1.0, 2.0, 30.0, 40.0]), torch.tensor([3.0, 1.0, -7.0, -8.0])
    assert guided(cond, uncond, 3.0).tolist() == [-3.0, 4.0, 30.0, 40.0]
    assert guided(cond, uncond, 1.0).tolist() == cond.tolist()
    assert guided(cond, uncond, 0.0).tolist() == [3.0, 1.0, 30.0, 40.0]


# ---- what it is trained on


def test_gaussian_kl_is_torchs():
    mean, log_variance, other, other_log = torch.randn(4, 6, 2).unbind(0)
    want = torch.distributions.kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(other, (other_log / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean, log_variance, other, other_log), want)
    assert gaussian_kl(mean, log_variance, mean, log_variance).abs().max() == 0


def test_the_mass_of_a_bin():
    x, mean = torch.tensor([0.2, 0.2, -1.5, 1.5]), torch.tensor([0.1, 0.2, -1.0, 1.0])
    normal = Normal(mean.double(), 0.5)
    side = torch.tensor(1 / 255, dtype=torch.float64)
    inside = normal.cdf(x + side) - normal.cdf(x - side)
    want = torch.stack([inside[0], inside[1], normal.cdf(x + side)[2], 1 - normal.cdf(x - side)[3]]).log()
    got = log_mass(x, mean, torch.full((4,), 2 * math.log(0.5)))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-3)  # the approximation's own error
    assert log_mass(torch.zeros(1), torch.full((1,), 50.0), torch.zeros(1)).item() == pytest.approx(math.log(1e-12))


def test_the_loss_of_noise():
    out, noise = torch.tensor([[1.0, 2.0, 9.0, 9.0]]), torch.tensor([[0.0, 4.0]])
    assert noise_loss(out, noise).tolist() == [2.5]


def test_the_true_noise_and_the_smallest_variance_have_no_bound_to_pay():
    x_0, noise, t = torch.randn(5, 2), torch.randn(5, 2), index(2, 50, 300, 500, 700)
    x_t = noised(FULL, x_0, noise, t)
    right = torch.cat([noise, torch.full((5, 2), -1.0)], 1)
    torch.testing.assert_close(variance_loss(FULL, right, x_0, x_t, t), torch.zeros(5), rtol=0, atol=1e-3)
    wrong = torch.cat([noise, torch.full((5, 2), 1.0)], 1)
    ratio = (FULL.betas.log() - FULL.log_variances)[t]
    torch.testing.assert_close(
        variance_loss(FULL, wrong, x_0, x_t, t), (0.5 * (ratio - 1 + (-ratio).exp()) / math.log(2)).float(), rtol=1e-2, atol=1e-3
    )


def test_the_bound_teaches_the_variance_alone():
    x_0, out, t = torch.randn(2, 3), torch.randn(2, 6, requires_grad=True), index(0, 400)
    variance_loss(FULL, out, x_0, noised(FULL, x_0, torch.randn(2, 3), t), t).sum().backward()
    assert out.grad is not None
    assert (out.grad[:, :3] == 0).all()
    assert (out.grad[:, 3:] != 0).all()


# ---- the network


def test_the_sinusoid_by_hand():
    wave = sinusoid(index(0, 7))
    assert wave.shape == (2, 256)
    assert wave[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert wave[1, 0].item() == pytest.approx(math.cos(7))
    assert wave[1, 128].item() == pytest.approx(math.sin(7))
    assert wave[1, 128 + 64].item() == pytest.approx(math.sin(7 / 100), abs=1e-6)


def test_a_fresh_head_puts_out_nothing():
    head = DiffusionHead(DiffusionHeadConfig(depth=2, width=12), channels=3, condition=5)
    assert (head(torch.randn(4, 3), index(0, 1, 500, 999), torch.randn(4, 5)) == 0).all()


def test_rows_do_not_see_one_another():
    head, x, t, z = tiny(), torch.randn(4, 3), index(0, 30, 500, 999), torch.randn(4, 5)
    whole = head(x, t, z)
    assert whole.shape == (4, 6)
    torch.testing.assert_close(head(x[2:3], t[2:3], z[2:3]), whole[2:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(head(x.view(2, 2, 3), t.view(2, 2), z.view(2, 2, 5)), whole.view(2, 2, 6), rtol=0, atol=1e-5)
    for changed in (head(x + 1, t, z), head(x, t.roll(1), z), head(x, t, z + 1)):
        assert ((changed - whole).abs().amax(1) > 1e-3).all()


def test_what_a_chain_keeps_may_be_added_beforehand():
    head, x, t, z = tiny(), torch.randn(4, 3), index(5, 5, 5, 5), torch.randn(4, 5)
    embedded = head.cond_embed(z)
    torch.testing.assert_close(head.denoise(x, head.time_embed(t[:1]) + embedded), head(x, t, z), rtol=0, atol=1e-5)


def test_an_empty_head_is_refused():
    with pytest.raises(ConfigError, match="depth=0 and width=8"):
        DiffusionHeadConfig(depth=0, width=8)
