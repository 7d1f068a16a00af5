import math
from dataclasses import replace

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
    mixed,
    noise_loss,
    noised,
    posterior_mean,
    predicted_start,
    respaced,
    reverse_step,
    sinusoid,
    variance_loss,
    velocity,
    velocity_loss,
    velocity_step,
)
from varl.models.masked import Denoiser

FULL = respaced(range(STEPS))
TEN = respaced(range(0, STEPS, 100))
Normal = torch.distributions.Normal


SMALL = DiffusionHeadConfig(depth=2, width=12)
VELOCITY = replace(SMALL, target="velocity", least_signal=2e-4)


def tiny(config: DiffusionHeadConfig = SMALL) -> DiffusionHead:
    """A head whose every weight matters: a fresh one puts out 0."""
    torch.manual_seed(0)
    head = DiffusionHead(config, channels=3, condition=5)
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
        with pytest.raises(ConfigError, match=f"^{steps} denoising steps of 1000: set 1 to 1000"):
            tiny().chain(steps)


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


def test_the_least_signal_by_hand():
    """All of a is lifted, and falls still at each of the 1000 steps."""
    lifted = respaced(range(STEPS), 0.25)
    torch.testing.assert_close(lifted.signal.square(), 0.25 + 0.75 * FULL.signal.square(), rtol=1e-12, atol=0)
    torch.testing.assert_close(lifted.signal[-1].item(), 0.5, rtol=1e-8, atol=0)
    assert (lifted.betas > 0).all()
    assert lifted.log_variances.isfinite().all()
    assert torch.equal(respaced(evenly(25), 0.0).betas, respaced(evenly(25)).betas)
    ten = respaced(evenly(25), 2e-4)
    assert ten.signal[-1].square().item() == pytest.approx(2e-4, rel=1e-4)
    assert ten.start_of_eps.max() < 71, "where unlifted it magnifies errors twenty thousand times"
    assert respaced(evenly(25)).start_of_eps.max() > 2e4


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


def test_guidance_of_each_row():
    cond, uncond = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    assert mixed(cond, uncond, torch.tensor([[3.0], [0.0]])).tolist() == [[-3.0, 4.0], [3.0, 1.0]]
    assert guided(cond, uncond, torch.tensor([[3.0], [0.0]])).tolist() == [[-3.0, 2.0], [3.0, 2.0]]


def test_a_velocity_by_hand():
    """All signal: the noise. Half of the variance: (noise - x_0) / sqrt(2). No signal: -x_0."""
    a = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    by_hand = replace(respaced(range(3)), signal=a.sqrt(), noise=(1 - a).sqrt())
    x_0, noise = torch.full((3, 1), 3.0), torch.full((3, 1), 5.0)
    assert velocity(by_hand, x_0, noise, index(0, 1, 2))[:, 0].tolist() == pytest.approx([5.0, 2 / math.sqrt(2), -3.0])


def test_the_right_velocity_leads_back_to_the_start():
    x_0, noise, t = torch.randn(10, 3), torch.randn(10, 3), torch.arange(10)
    x_t = noised(TEN, x_0, noise, t)
    mean, log_variance = velocity_step(TEN, velocity(TEN, x_0, noise, t), x_t, t)
    torch.testing.assert_close(mean, posterior_mean(TEN, x_0, x_t, t), rtol=0, atol=1e-6)
    assert torch.equal(log_variance, TEN.log_variances.float()[:, None].expand(10, 3))


def test_velocity_and_noise_are_two_ways_to_say_a_step():
    """u = (eps - sqrt(1 - a) x_t) / sqrt(a), where x_t is known."""
    x_t, eps, t = torch.randn(8, 3), torch.randn(8, 3), torch.arange(8)
    u = (eps - TEN.noise[t].float()[:, None] * x_t) / TEN.signal[t].float()[:, None]
    want = reverse_step(TEN, torch.cat([eps, torch.full((8, 3), -1.0)], 1), x_t, t)
    for got, wanted in zip(velocity_step(TEN, u, x_t, t), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


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


def test_the_loss_of_a_velocity():
    x_0, noise, t = torch.randn(4, 2), torch.randn(4, 2), index(1, 3, 5, 9)
    u = velocity(TEN, x_0, noise, t)
    assert velocity_loss(TEN, u, x_0, noise, t).tolist() == [0.0] * 4
    torch.testing.assert_close(velocity_loss(TEN, u + torch.tensor([1.0, 2.0]), x_0, noise, t), torch.full((4,), 2.5))


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
    x_0, noise, t = torch.randn(2, 3), torch.randn(2, 3), index(0, 400)
    out = torch.cat([noise, torch.zeros(2, 3)], 1).requires_grad_()  # far from x_0, the least mass has no gradient
    variance_loss(FULL, out, x_0, noised(FULL, x_0, noise, t), t).sum().backward()
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
    head = DiffusionHead(SMALL, channels=3, condition=5)
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


# ---- the chain


@pytest.mark.parametrize("config", [SMALL, VELOCITY], ids=lambda config: config.target)
def test_the_law_is_the_reverse_step(config):
    """Rows at any move, in one call; guidance of each row."""
    head, x, z, none = tiny(config), torch.randn(6, 3), torch.randn(6, 5), torch.randn(6, 5)
    chain, process, move = head.chain(9), respaced(evenly(9), config.least_signal), index(0, 3, 3, 5, 7, 8)
    t, step, mix = 8 - move, velocity_step if config is VELOCITY else reverse_step, mixed if config is VELOCITY else guided
    cond, uncond = (head(x, process.timesteps[t], given) for given in (z, none))
    assert cond.shape == (6, 3 if config is VELOCITY else 6)
    scale = torch.tensor([[1.0], [0.0], [2.0], [3.5], [-1.0], [2.0]])
    for wanted, got in [
        (step(process, cond, x, t), chain.law(x, move, chain.read(z), None, None)),
        (step(process, mix(cond, uncond, scale), x, t), chain.law(x, move, chain.read(z), chain.read(none), scale)),
    ]:
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], wanted[1] / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "noisy", "admissible"),
    [(1, [], []), (2, [1], [1]), (3, [2, 1], [2, 1]), (4, [3, 2, 1], [2]), (6, [5, 4, 3, 2, 1], [4, 3, 2])],
)
def test_which_steps_are_noisy_and_which_are_scored(steps, noisy, admissible):
    """As t = N - 1 - move: 2 .. N - 2, and all that are noisy where there is none."""
    chain: Denoiser = tiny().chain(steps)
    assert chain.moves == steps
    assert [steps - 1 - move for move in chain.noisy.nonzero()[:, 0].tolist()] == noisy
    assert [steps - 1 - move for move in chain.admissible.nonzero()[:, 0].tolist()] == admissible
    assert not (chain.admissible & ~chain.noisy).any()


@pytest.mark.parametrize("config", [SMALL, VELOCITY], ids=lambda config: config.target)
def test_what_a_path_was_drawn_with_is_standard_normal(config):
    """And is not, when the path was drawn under guidance and is scored without."""
    head, rows, steps = tiny(config), 400, 12
    chain, draws = head.chain(steps), torch.Generator().manual_seed(3)
    read, none, scale = chain.read(torch.randn(rows, 5)), chain.read(torch.randn(rows, 5)), torch.full((rows, 1), 3.0)

    def residuals(drawn_with, scored_with) -> torch.Tensor:
        x, found = torch.randn(rows, 3, generator=draws), []
        for number in range(steps - 1):
            move = torch.full((rows,), number)
            mean, log_std = chain.law(x, move, read, *drawn_with)
            following = mean + log_std.exp() * torch.randn(rows, 3, generator=draws)
            mean, log_std = chain.law(x, move, read, *scored_with)
            found.append((following - mean) * (-log_std).exp())
            x = following
        return torch.stack(found)

    right = residuals((None, None), (None, None))
    assert right.mean().abs() < 4 / math.sqrt(right.numel())
    assert abs(right.var().item() - 1) < 4 * math.sqrt(2 / right.numel())
    assert residuals((none, scale), (None, None)).square().mean() > 1.5


def test_a_perfect_network_ends_where_the_token_lies():
    """The velocity of a single token x_0 is known: the chain ends there, whatever noise it took."""
    head, x_0, draws = tiny(VELOCITY), torch.tensor([[0.5, -1.0, 2.0]]), torch.Generator().manual_seed(0)
    chain = head.chain(25)
    x = torch.randn(1, 3, generator=draws)
    for number in range(25):
        t = index(24 - number)
        signal, noise = chain.process.signal[t].float(), chain.process.noise[t].float()
        u = signal * (x - signal * x_0) / noise - noise * x_0
        mean, log_variance = velocity_step(chain.process, u, x, t)
        x = mean + chain.noisy[number] * (log_variance / 2).exp() * torch.randn(1, 3, generator=draws)
    torch.testing.assert_close(x, x_0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, VELOCITY], ids=lambda config: config.target)
def test_a_chain_is_drawn_in_fp32_under_autocast(config):
    head, x, z, scale = tiny(config), torch.randn(4, 3), torch.randn(4, 5), torch.full((4, 1), 2.0)
    move, plain = index(0, 1, 2, 3), head.chain(5)
    want = plain.law(x, move, plain.read(z), plain.read(z + 1), scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chain = head.chain(5)
        assert chain.read(z).dtype == torch.float32
        got = chain.law(x, move, chain.read(z), chain.read(z + 1), scale)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("config", [SMALL, VELOCITY], ids=lambda config: config.target)
def test_a_frozen_head_passes_the_gradient_on(config):
    head, z = tiny(config), torch.randn(4, 5, requires_grad=True)
    chain = head.chain(5)
    for _ in range(2):  # of use for any number of chains
        chain.law(torch.randn(4, 3), index(0, 1, 2, 3), chain.read(z), None, None)[0].sum().backward()
    assert z.grad is not None
    assert (z.grad.abs().amax(1) > 0).all()
    assert all(weight.grad is None for weight in head.parameters())


def test_targets_and_floors_that_make_no_sense():
    for floor in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=f"head.least_signal={floor}"):
            DiffusionHeadConfig(least_signal=floor)
