"""The probe's numbers against enumeration, and against hand calculation."""

import json
import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from scipy import stats
from torch import Tensor

from tabular import InstantJudge, TabularPolicy, brightness
from teacher_forced import TeacherForcedTabular, tokens_as_picture
from tiny import TINY, WIDE_RASTER, save_tiny, write_pictures
from varl.algorithms.va_pi import VAPI
from varl.checkpoints import model as model_folder
from varl.checkpoints.model import fresh
from varl.config import (
    GRPOConfig,
    MiddleStep,
    PicturesConfig,
    PythonRewardConfig,
    ReconstructionConfig,
    RunConfig,
    TrainConfig,
    VAPIConfig,
    VARRLConfig,
    WeightedReward,
    WordsConfig,
)
from varl.errors import NumericsError
from varl.eval.gradients import (
    Estimate,
    Projection,
    alignment,
    batch_gradient,
    best_group,
    best_weights,
    continuation_noise,
    cosine,
    estimate,
    group_noise,
    images_for_unit_snr,
    moments,
    noise_shares,
    overlap,
    paired_ratio,
    power,
    rho2,
    rho2_ratio,
    signal_shares,
    sketch,
    snr,
    step_scores,
    student,
)
from varl.models.raster import Raster
from varl.policies import sampling
from varl.policies.next_scale import NextScalePolicy
from varl.policies.raster import RasterPolicy
from varl.probe import (
    GROUP,
    PROMPTS,
    Compared,
    Nested,
    Probe,
    contradictions,
    findings,
    groups,
    leave_one_out,
    measure,
    mildest,
    model_identity,
    number,
    probe,
    say_alpha,
    settled,
)
from varl.report.summary import probe as report_section
from varl.rng import Stream, generator
from varl.tokenizers.vq import VQ
from varl.types import Prompt

LABELS = (Prompt(label=0), Prompt(label=1))


def tiny_policy() -> NextScalePolicy:
    torch.manual_seed(0)
    return NextScalePolicy(*fresh(TINY))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test"), dtype=torch.float64)


# ---- scores


def test_scores_are_each_rows_own_gradient_of_every_linear_weight():
    policy = tiny_policy()
    prompts = [Prompt(text="CAT"), Prompt(text="CAT"), Prompt(text="DOG", style=("mono",))]
    rollout = policy.rollout(prompts, Stream(seed=0, rows=(0, 1, 2)))
    projection = Projection(policy.module, size=1000)
    scores = step_scores(policy, rollout, rollout.step, 3, projection)
    linear = [m.weight for m in policy.module.modules() if isinstance(m, torch.nn.Linear)]
    assert projection.width == sum(w.numel() for w in linear)
    for row in range(3):
        logp = policy.score(rollout.rows([row])).logp[0]
        for step in range(3):
            own = torch.autograd.grad(logp[rollout.step[0] == step].sum(), linear, retain_graph=True, materialize_grads=True)
            torch.testing.assert_close(scores[row, step], torch.cat([g.flatten() for g in own]), rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_who_else_is_in_the_batch():
    policy = tiny_policy()
    rollout = policy.rollout([Prompt(text="CAT")] * 4, Stream(seed=0, rows=(0, 1, 2, 3)))
    projection = Projection(policy.module, size=4)
    both = step_scores(policy, rollout, rollout.step, 3, projection)
    alone = step_scores(policy, rollout.rows([2]), rollout.step[2:3], 3, projection)
    torch.testing.assert_close(both[2:3], alone, rtol=1e-4, atol=1e-5)


def test_a_policy_that_scores_few_rows_at_a_time_leaves_no_layer_out(monkeypatch):
    """Its logits are large, so the head sees slices of the batch: of whole pictures two rows at a time, of their first tokens all."""
    policy = tiny_policy()
    rollout = policy.rollout([Prompt(text="CAT")] * 5, Stream(seed=0, rows=tuple(range(5))))
    projection = Projection(policy.module, size=4)
    at_once = step_scores(policy, rollout, rollout.step, 3, projection)
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 2 * TINY.tokenizer.vocab * policy.layout.tokens)
    torch.testing.assert_close(step_scores(policy, rollout, rollout.step, 3, projection), at_once, rtol=1e-4, atol=1e-5)
    head = projection.places[id(policy.module.head.weight)][0]
    assert bool(at_once[:, :, head].any(-1).all())


def test_parts_add_up_to_the_whole():
    policy = tiny_policy()
    rollout = policy.rollout([Prompt(text="CAT")] * 2, Stream(seed=0, rows=(0, 1)))
    projection = Projection(policy.module, size=4)
    by_step = step_scores(policy, rollout, rollout.step, 3, projection)
    whole = step_scores(policy, rollout, torch.zeros_like(rollout.step), 1, projection)
    torch.testing.assert_close(by_step.sum(1), whole[:, 0], rtol=1e-4, atol=1e-5)


def test_tabular_steps_have_parameters_of_their_own():
    policy = TabularPolicy()
    rollout = policy.rollout(LABELS, Stream(seed=0, rows=(0, 1)))
    projection = Projection(policy.module)
    scores = step_scores(policy, rollout, rollout.step, 3, projection)
    for step, layer in enumerate(policy.module.children()):
        stretch = projection.places[id(layer.weight)][0]
        assert scores[:, step, stretch].any()
        assert not scores[:, step, : stretch.start].any()
        assert not scores[:, step, stretch.stop :].any()


def test_a_sketch_keeps_inner_products_in_expectation():
    """Relative error of the mean over R sketches of size k is about sqrt((1 + cos^-2) / (k R)): here 1 %."""
    x, y = noise(2, 100).float()
    y = x + 0.5 * y
    many = torch.stack([(s := sketch(100, 16, generator(seed))) @ x @ (s @ y) for seed in range(2000)])
    assert many.mean() == pytest.approx(float(x @ y), rel=0.05)
    assert torch.equal(sketch(16, 16, generator(0)), torch.eye(16))


def test_projected_products_estimate_exact_ones():
    policy = tiny_policy()
    rollout = policy.rollout([Prompt(text="CAT")] * 6, Stream(seed=0, rows=tuple(range(6))))

    def products(size: int, seed: int) -> Tensor:
        scores = step_scores(policy, rollout, torch.zeros_like(rollout.step), 1, Projection(policy.module, size=size, seed=seed))[:, 0]
        return scores @ scores.T

    exact, projected = products(1000, 0), torch.stack([products(8, seed) for seed in range(30)])
    error = (projected.mean(0) - exact).abs() / (projected.std(0) / 30**0.5)
    assert error.max() < stats.t.ppf(1 - 0.0005, 29)
    assert (projected[0] - exact).norm() > 0.01 * exact.norm()


def test_batch_gradient_by_hand():
    scores = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    assert batch_gradient(torch.tensor([3.0, -1.0]), scores).tolist() == [[1.5, -1.0]]


# ---- moments and their replicates


def test_moments_are_means_over_pairs_of_different_batches():
    g = noise(5, 2, 3)
    m = moments(g)
    pairs = torch.stack([g[i] @ g[j].T for i, j in permutations(range(5), 2)]).mean(0)
    torch.testing.assert_close(m.pairs[0], pairs)
    torch.testing.assert_close(m.own[0], (g @ g.mT).mean(0))


def test_replicates_leave_one_batch_out():
    g = noise(5, 2, 3)
    m = moments(g)
    for left_out in range(5):
        rest = moments(torch.cat([g[:left_out], g[left_out + 1 :]]))
        torch.testing.assert_close(m.pairs[1 + left_out], rest.pairs[0])
        torch.testing.assert_close(m.own[1 + left_out], rest.own[0])
    with pytest.raises(ValueError, match="2 batches"):
        moments(g[:2])


def test_without_noise_every_figure_is_exact():
    g = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]).double().expand(4, 2, 3)
    m, both, first = moments(g), torch.ones(2), torch.tensor([1.0, 0.0])
    assert overlap(m, both, both)[0] == pytest.approx(25)
    assert overlap(m, first, both)[0] == pytest.approx(9)
    assert power(m, first)[0] == pytest.approx(9)
    assert cosine(m, first, both)[0] == pytest.approx(0.6)
    assert rho2(m, first, both)[0] == pytest.approx(0.36)
    assert rho2_ratio(m, first, both, both).value == pytest.approx(0.36)
    assert signal_shares(m)[0].tolist() == pytest.approx([9 / 25, 16 / 25])


def test_rho2_of_the_reference_is_snr_over_one_plus_snr():
    m, w = moments(noise(20, 3, 4) + 0.5), torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(rho2(m, w, w), snr(m, w) / (1 + snr(m, w)))


def test_shares_with_known_signal_and_noise():
    """Step t has signal s_t^2 and noise v_t^2 D."""
    signal, deviation = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 1.0]).double()
    direction = torch.zeros(2, 50, dtype=torch.float64)
    direction[:, 0] = signal
    m = moments(direction + deviation[:, None] * noise(4000, 2, 50))
    assert signal_shares(m)[0].tolist() == pytest.approx([0.2, 0.8], abs=0.03)
    assert noise_shares(m)[0].tolist() == pytest.approx([0.9, 0.1], abs=0.005)
    assert snr(m, torch.tensor([0.0, 1.0]))[0] == pytest.approx(4 / 50, rel=0.05)
    best = best_weights(m, torch.ones(2))  # orthogonal noise, common direction: w_t ~ s_t / v_t^2
    assert (best[1] / best[0]).item() == pytest.approx(2 * 9 / 1, rel=0.2)


def test_own_of_subsampled_estimators_is_given_apart():
    g, own = noise(4, 1, 3), torch.full((4, 1, 1), 7.0).double()
    assert power(moments(g, own), torch.ones(1)).tolist() == [7.0] * 5


# ---- intervals


def test_jackknife_of_a_mean_is_its_textbook_error():
    x = noise(12)
    replicate = torch.cat([x.mean()[None], torch.stack([torch.cat([x[:i], x[i + 1 :]]).mean() for i in range(12)])])
    found = estimate(replicate)
    reach = stats.t.ppf(0.975, 11) * (x.std() / 12**0.5).item()
    assert (found.value, found.low, found.high) == pytest.approx((x.mean().item(), x.mean().item() - reach, x.mean().item() + reach), 1e-4)


@pytest.mark.parametrize(("freedom", "error"), [(2, 8e-3), (3, 2e-3), (5, 2e-4), (10, 1e-5), (100, 1e-6)])
def test_student_quantile(freedom, error):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=error)


def test_ratio_to_itself_is_exactly_one_however_noisy():
    m = moments(noise(6, 2, 50))
    w = torch.ones(2)
    assert rho2_ratio(m, w, w, w) == Estimate(value=1.0, low=1.0, high=1.0)


def test_ratio_is_unbounded_where_the_denominator_may_be_nothing():
    x = 1 + 0.01 * noise(9)
    y = x - x.mean() + 1e-4
    found = paired_ratio(*(torch.cat([v.mean()[None], (v.sum() - v) / 8]) for v in (x, y)))
    assert found.high == math.inf
    # at the lower end, numerator - R denominator is just significant
    rest = x - found.low * y
    assert found.low > 1
    assert rest.mean().item() == pytest.approx(student(8) * rest.std().item() / 3, rel=1e-6)
    assert paired_ratio(*(torch.cat([v.mean()[None], (v.sum() - v) / 8]) for v in (y, y - 1e-4))) == Estimate(
        value=math.inf, low=-math.inf, high=math.inf
    )


def test_fieller_interval_covers_95_percent():
    """True ratio 2, denominator 2.5 standard errors from 0. 800 trials: and where nothing at all is known, it
    covers more."""
    trials, n = 800, 20
    x = noise(trials, n)
    y = 0.5 * x + noise(trials, n, seed=1)
    x, y = x + 2.5 / n**0.5 * 2, y + 2.5 / n**0.5
    covered = 0
    for a, b in zip(x, y, strict=True):
        found = paired_ratio(*(torch.cat([v.mean()[None], (v.sum() - v) / (n - 1)]) for v in (a, b)))
        covered += found.low <= 2 <= found.high
    assert 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5 < covered / trials < 0.99


def test_images_for_unit_snr():
    assert images_for_unit_snr(Estimate(value=0.125, low=0.0625, high=0.25), 32) == Estimate(value=256.0, low=128.0, high=512.0)
    assert images_for_unit_snr(Estimate(value=0.1, low=-0.05, high=0.2), 32).high == math.inf


# ---- formulas by hand


def test_group_noise_is_least_at_best_group():
    assert best_group(90.0, 0.4) == 16.0
    assert best_group(1.0, 0.0) == math.inf
    costs = {group: group_noise(90.0, 0.4, 64, group) for group in range(2, 60)}
    assert min(costs, key=costs.__getitem__) == 16
    assert group_noise(3.0, 1.0, 8, 4) == pytest.approx((4 / 3 * 3 + 4) / 8)


def test_continuation_noise_by_hand():
    assert continuation_noise(0.25, 1, 0.3) == 1.0
    assert continuation_noise(0.25, 2, 1.0) == pytest.approx((0.5 + 0.75) * 3 / (2 * 2))


def test_best_continuations_by_hand():
    """b = 0.2 in every prompt: K* = sqrt(0.8 / 0.2 * c_p / c_c)."""
    dear = Nested(between=[1.0] * 5, within=[4.0] * 5, prefix_seconds=[4.0, 4.0, 9.0], continuation_seconds=[1.0])
    found = settled(dear)
    assert (found.share.value, found.best.value, found.continuations) == (pytest.approx(0.2), pytest.approx(4.0), 4)
    cheap = Nested(between=[1.0] * 5, within=[4.0] * 5, prefix_seconds=[0.25], continuation_seconds=[1.0])
    assert (settled(cheap).best.value, settled(cheap).continuations) == (pytest.approx(1.0), 1)


def test_nested_samples_that_all_had_one_reward_say_nothing():
    """0 of 0 is settled: without this, K* would be unbounded and K the most that is allowed."""
    assert not Nested(between=[0.0] * 8, within=[0.0] * 8).resolved
    assert not Nested(between=[1.0] * 2, within=[4.0] * 2).resolved
    assert Nested(between=[0.0] * 8, within=[0.0] * 7 + [1.0]).resolved
    assert Nested(between=[1.0] * 8, within=[0.0] * 8).resolved


def test_numbers_in_words():
    assert [number(x) for x in (0.00891, 1.96, 99.4, 99.6, 12345.6, math.inf)] == ["0.0089", "2", "99", "100", "12,346", "unbounded"]


def test_an_advice_without_evidence_gives_no_number():
    same, unknown = Estimate(value=1.0, low=1.0, high=1.0), Estimate(value=1.2, low=0.0, high=math.inf)
    rows = {0.0: Compared(to_plain=same, to_best=unknown), 0.6: Compared(to_plain=unknown, to_best=same)}
    assert say_alpha(rows, None).startswith("panw_alpha: no exponent was told apart from plain GRPO. 0.7 is")
    rows[0.6] = Compared(to_plain=Estimate(value=1.2, low=0.5, high=2.0), to_best=same)
    assert "GRPO (best 0.6: progress per batch x1.2 (95 %: 0.5 to 2))." in say_alpha(rows, None)


def test_more_continuations_need_proof():
    unsure = Nested(between=[2.0, -1.0, 3.0, 0.0], within=[4.0] * 4, prefix_seconds=[4.0], continuation_seconds=[1.0])
    found = settled(unsure)
    assert found.best.low < math.sqrt(2) < found.best.value
    assert found.continuations == 1


def test_group_size_from_simulated_prompts():
    """Prompts' own gradients vary by B, pictures by W; half groups of G/2 pictures."""
    n, d, within, between = 1500, 40, 3.0, 0.05
    own = (between / d) ** 0.5 * noise(n, PROMPTS, 1, 1, d) + 0.1
    halves = own + (within / d / (GROUP / 2 - 1)) ** 0.5 * noise(n, PROMPTS, 2, 1, d, seed=1)
    cross = (halves[:, :, 0] @ halves[:, :, 1].mT).mean(1)
    # two half groups meet more as one group of G: W / (G - 1) instead of W / 2 / (G / 2 - 1)
    whole = own[:, :, 0] + (within / d / (GROUP - 1)) ** 0.5 * noise(n, PROMPTS, 1, d, seed=2)
    found = groups(moments(whole.mean(1)), cross, torch.ones(1))
    assert found.low < best_group(within, between) < found.high < 1.3 * found.low


@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [
        ({0.0: (1, 1), 0.3: (2, 1.5), 0.6: (3, 2), 0.8: (3.2, 2)}, 0.6),
        ({0.0: (1, 1), 0.3: (2.95, 1.5), 0.6: (3, 2)}, 0.3),
        ({0.0: (1, 1), 0.3: (2, 0.5), 0.6: (3, 0.9)}, None),
        ({0.0: (1, 1), 0.3: (0.8, 0.5)}, None),
    ],
)
def test_the_mildest_of_those_that_help(ratios, chosen):
    rows = {
        key: Compared(
            to_plain=Estimate(value=float(v), low=float(low), high=9.0),
            to_best=Estimate(value=v / max(v for v, _ in ratios.values()), low=0.5, high=1.5),
        )
        for key, (v, low) in ratios.items()
    }
    assert mildest(rows, 0.0) == chosen


def test_leave_one_out_by_hand():
    assert leave_one_out(torch.tensor([[0.0, 1.0, 5.0]])).tolist() == [[-3.0, -1.5, 4.5]]


# ---- against enumeration


def covers(found: Estimate, exact: float) -> bool:
    """1.8 times the 95 % interval, or 3.5 standard errors: of the dozen figures below none should fall out by chance."""
    return found.value - 1.8 * (found.value - found.low) < exact < found.value + 1.8 * (found.high - found.value)


def enumerated(policy: TabularPolicy, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, rewards and scores [Z, S, D] of all pictures."""
    every = policy.every_picture(prompt)
    scores = step_scores(policy, every, every.step, 3, Projection(policy.module)).double()
    return every.logp.sum(1).exp().double(), brightness(policy.decode(every), ()).double(), scores


def exact_gradient(policy: TabularPolicy, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """(E h_t [S, D], Var h_t [S]) of the leave-one-out gradient h of one prompt's group: a U-statistic of the kernel
    (R_a - R_b)(s_a - s_b) / 2, whose variance is 2 (2 (G - 2) zeta_1 + zeta_2) / (G (G - 1))."""
    p, reward, s = enumerated(policy, prompt)
    return exact_of(p, reward, s)


def exact_of(p: Tensor, reward: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """`exact_gradient` of the probabilities [Z], rewards [Z] and scores [Z, S, D] of all pictures."""
    mean = torch.einsum("z,z,zsd->sd", p, reward, s)
    one = 0.5 * ((reward - p @ reward)[:, None, None] * s + mean)
    first = torch.einsum("z,zsd->s", p, one.square()) - mean.square().sum(1)
    norm, cross = s.square().sum(2), torch.einsum("asd,bsd->abs", s, s)
    apart = norm[:, None] + norm[None] - 2 * cross
    second = 0.25 * torch.einsum("a,b,ab,abs->s", p, p, (reward[:, None] - reward).square(), apart) - mean.square().sum(1)
    return mean, 2 * (2 * (GROUP - 2) * first + second) / (GROUP * (GROUP - 1))


@pytest.fixture(scope="module")
def measured() -> Probe:
    found = Probe(TabularPolicy(), InstantJudge(brightness), LABELS)
    for _ in range(160):
        found.round()
    return found


def test_snr_and_shares_cover_what_enumeration_says(measured):
    """Every batch holds both prompts, so their difference is no noise."""
    (mean0, var0), (mean1, var1) = (exact_gradient(measured.policy, prompt) for prompt in LABELS)
    signal, variance = ((mean0 + mean1) / 2).square().sum(1), (var0 + var1) / 4
    m = measured.moments()
    for step in range(3):
        found = estimate(snr(m, torch.eye(3)[step]))
        assert covers(found, float(signal[step] / variance[step]))
        assert found.high - found.low < 0.7 * found.value
        share = estimate(noise_shares(m)[:, step])
        assert covers(share, float(variance[step] / variance.sum()))
    total = estimate(snr(m, torch.ones(3)))  # steps' parameters are their own, so signal and noise add up
    assert covers(total, float(signal.sum() / variance.sum()))


def test_progress_ratio_covers_what_enumeration_says(measured):
    (mean0, var0), (mean1, var1) = (exact_gradient(measured.policy, prompt) for prompt in LABELS)
    signal, variance = ((mean0 + mean1) / 2).square().sum(1), (var0 + var1) / 4

    def rho2_exact(w: Tensor) -> float:
        w = w.double()
        return float((w @ signal) ** 2 / (w.square() @ (signal + variance) * signal.sum()))

    m, plain = measured.moments(), torch.ones(3)
    for w in (measured.alpha_weights(0.7), measured.alpha_weights(1.2), measured.prefix_weights(2)):
        found, exact = rho2_ratio(m, w, plain, plain), rho2_exact(w) / rho2_exact(plain)
        assert covers(found, float(exact))
        assert found.high - found.low < 0.3 * exact
    assert alignment(m, plain, plain)[0] > 0


def test_settled_share_covers_what_enumeration_says(measured):
    for m, drawn in ((1, 1), (2, 3)):
        shares = []
        for prompt in LABELS:
            p, reward, _ = enumerated(measured.policy, prompt)
            p, reward = p.view(2**drawn, -1), reward.view(2**drawn, -1)
            value = (p * reward).sum(1) / p.sum(1)
            overall = (p * reward).sum()
            shares.append((float(p.sum(1) @ (value - overall).square()), float((p * (reward - overall).square()).sum())))
        exact = sum(between for between, _ in shares) / sum(total for _, total in shares)
        found = settled(measured.nested[m]).share
        assert covers(found, float(exact))
        assert found.high - found.low < 0.35


def test_panw_weights_of_parts(measured):
    assert measured.tokens() == [1.0, 2.0, 4.0]
    weights = measured.alpha_weights(1.0)
    assert (weights / weights[2]).tolist() == pytest.approx([4.0, 2.0, 1.0])
    assert measured.alpha_weights(0.0).tolist() == [1.0, 1.0, 1.0]
    assert measured.prefix_weights(2).tolist() == [1.0, 1.0, 0.0]


# ---- the whole


class WholePictures:
    """A policy that can only draw whole pictures."""

    def __init__(self, policy: TabularPolicy) -> None:
        self.module, self.layout = policy.module, policy.layout
        self.rollout, self.score, self.decode = policy.rollout, policy.score, policy.decode


def test_findings_of_what_was_measured(measured):
    content = findings(measured)
    json.dumps(content, allow_nan=False)
    assert [row["tokens"] for row in content["steps"]] == [1, 2, 4]
    assert sum(row["noise_share"] for row in content["steps"]) == pytest.approx(1)
    assert content["alpha"][0] == {"alpha": 0.0, "rho2_ratio": 1.0, "interval": [1.0, 1.0]}
    assert [row["m"] for row in content["variance_share"]] == [1, 2]
    assert content["prefix"][-1]["rho2_ratio"] == 1.0
    assert content["images"] == 160 * 32 + 40 * 4 * 8 * 4
    said = content["recommendations"]
    assert len(said) == 5
    assert all(sentence.endswith(".") and "nan" not in sentence for sentence in said)
    drawn = {chart["name"] for chart in report_section(content)["charts"]}
    assert {"signal_share", "noise_share", "variance_share"} <= drawn


def test_the_same_rounds_give_the_same_numbers():
    first, second = (Probe(TabularPolicy(), InstantJudge(brightness), LABELS, rows=rows) for rows in (32, 5))
    for found in (first, second):
        measure(found, 0.0)
    assert first.rounds == first.least_rounds == 8
    torch.testing.assert_close(torch.stack(first.gradients), torch.stack(second.gradients), rtol=1e-5, atol=1e-7)
    assert first.nested[1].between == second.nested[1].between


def test_a_policy_that_cannot_branch_says_so():
    found = Probe(WholePictures(TabularPolicy()), InstantJudge(brightness), LABELS)
    content = measure(found, 0.0)
    assert content["variance_share"] == []
    assert content["recommend"]["num_continuations"] == 1
    assert "WholePictures cannot stop half-way" in content["recommendations"][-1]


def test_a_constant_reward_stops_with_a_reason():
    found = Probe(TabularPolicy(), InstantJudge(lambda images, prompts: torch.ones(len(images))), LABELS)
    with pytest.raises(NumericsError, match="no gradient to measure"):
        measure(found, 0.0)


def test_failed_rewards_are_left_out():
    def sometimes(images: Tensor, prompts: object) -> Tensor:
        value = brightness(images, ())
        return torch.where(images.flatten(1).sum(1) > 6, torch.nan, value)

    content = measure(Probe(TabularPolicy(), InstantJudge(sometimes), LABELS), 0.0)
    assert all(row["signal_share"] is not None for row in content["steps"])


# ---- a raster model


def raster_policy(grid: tuple[int, int] = (2, 2)) -> RasterPolicy:
    torch.manual_seed(0)
    model, tokenizer = fresh(replace(WIDE_RASTER, grid=grid))
    assert isinstance(model, Raster)
    assert isinstance(tokenizer, VQ)
    with torch.no_grad():
        for weight in model.parameters():  # a fresh one is uniform, and its scores of most layers 0
            weight.add_(0.1 * torch.randn(weight.shape))
    return RasterPolicy(model, tokenizer)


def test_scores_of_a_raster_model_are_each_rows_own_gradient():
    """Of draws that share a context too, whose forward pass they then do not share."""
    policy = raster_policy()
    given = policy.encode(torch.rand(1, 3, 16, 16, generator=generator(0, "test")), [Prompt(label=1)])
    drawn = policy.draw(given, Stream(seed=0, rows=(0, 1, 2)), prefix_noise=0.5)
    projection = Projection(policy.module, size=1000)
    scores = step_scores(policy, drawn, torch.zeros_like(drawn.step), 1, projection)
    linear = [m.weight for m in policy.module.modules() if isinstance(m, torch.nn.Linear)]
    for row in range(3):
        own = torch.autograd.grad(policy.score(drawn.rows([row])).logp.sum(), linear)
        torch.testing.assert_close(scores[row, 0], torch.cat([g.flatten() for g in own]), rtol=1e-4, atol=1e-5)


def test_tokens_of_a_raster_are_measured_in_stretches():
    found = Probe(raster_policy((3, 6)), InstantJudge(brightness), LABELS)
    found.plain(0)
    assert found.starts == [0, 2, 4, 6, 9, 11, 13, 15]
    assert found.tokens() == [2.0, 2.0, 2.0, 3.0, 2.0, 2.0, 2.0, 3.0]
    assert found.gradients[0].shape[0] == 8
    assert not found.uneven


def test_findings_of_a_raster_model():
    content = measure(Probe(raster_policy((1, 2)), InstantJudge(brightness), LABELS), 0.0)
    json.dumps(content, allow_nan=False)
    assert [row["tokens"] for row in content["steps"]] == [1, 1]
    assert [row["m"] for row in content["variance_share"]] == [1]
    assert content["alpha"] == []
    assert (content["all_steps"], content["recommend"]["panw_alpha"]) == (2, None)
    assert "panw_alpha: every step draws as many tokens, so no exponent changes anything." in content["recommendations"]


# ---- draws in context


def in_context(noise: float = 0.25) -> Probe:
    """Of two pictures, which the policy reads as their labels' tokens."""
    policy = TeacherForcedTabular(tokens=3, vocab=3, spread=1.0)
    own = torch.tensor([[0, 1, 2], [2, 2, 0]])

    def pictures(prompts):
        return tokens_as_picture(own[[prompt.label - 1 for prompt in prompts]], 3)

    algorithm = VAPI(VAPIConfig(prefix_noise=noise, drop_condition=0.0), pictures)
    return Probe(policy, InstantJudge(brightness), (Prompt(label=1), Prompt(label=2)), in_context=algorithm)


def test_signal_and_noise_in_context_cover_what_enumeration_says():
    """Of every context that the noise can make with a picture's tokens, all 27 draws. A batch holds both pictures, in one context each."""
    found = in_context(noise=0.0)
    policy, signal, variance = found.policy, [], []
    assert isinstance(policy, TeacherForcedTabular)
    for prompt in found.plain_prompts.prompts:
        assert found.in_context is not None
        given = policy.encode(found.in_context.pictures([prompt]), [prompt])
        actions = torch.cartesian_prod(*[torch.arange(3)] * 3)
        every = replace(policy.given([prompt] * 27, actions, range(27)), context=given.actions.repeat(27, 1), state=None)
        scores = step_scores(policy, every, torch.zeros_like(every.step), 1, Projection(policy.module)).double()
        p = policy.score(every).logp.detach().sum(1).exp().double()
        mean, var = exact_of(p, brightness(policy.decode(every), ()).double(), scores)
        signal.append(mean)
        variance.append(var)
    for _ in range(120):
        found.round()
    exact = ((signal[0] + signal[1]) / 2).square().sum() / (torch.stack(variance).sum() / 4)
    ratio = estimate(snr(found.moments(), torch.ones(1)))
    assert covers(ratio, float(exact))
    assert ratio.high - ratio.low < 0.7 * ratio.value


def test_findings_in_context():
    content = measure(in_context(), 0.0)
    json.dumps(content, allow_nan=False)
    assert content["in_context"]
    assert content["batches"] == 6
    assert content["images"] == 6 * PROMPTS * GROUP
    assert content["steps"] == content["variance_share"] == content["alpha"] == []
    assert content["recommend"]["middle_step"] is None
    said = content["recommendations"]
    assert len(said) == 4
    assert said[0].startswith("A plain batch of 32 pictures has SNR")
    assert said[2].startswith("num_generations")
    assert said[3].startswith("All tokens of a picture were drawn at once in the context of a real one")
    assert report_section(content)["charts"] == []


def test_probe_of_va_pi(tmp_path):
    config = RunConfig(
        model=str(save_tiny(tmp_path / "model", WIDE_RASTER)),
        data=PicturesConfig(path=str(write_pictures(tmp_path / "pictures")), image_size=(16, 32)),
        rewards={"mse": WeightedReward(reward=ReconstructionConfig(lpips_weight=0.0))},
        algorithm=VAPIConfig(),
        train=TrainConfig(device="cpu"),
    )
    content = probe(config, tmp_path / "run", minutes=0.0)
    assert content["in_context"]
    found = {**content, "recommend": {**content["recommend"], "num_generations": 32, "num_generations_range": [20.0, 40.0]}}
    (said,) = contradictions(config, found)
    assert said == "num_generations=8: the probe of this model found 10 to 80 better."
    assert contradictions(replace(config, algorithm=GRPOConfig(num_generations=8)), found) == [], "of other draws than these"


def words_config(folder, algorithm: GRPOConfig | VARRLConfig = GRPOConfig()) -> RunConfig:
    return RunConfig(
        model=str(folder),
        data=WordsConfig(image_size=TINY.image_size, fonts=("sans", "mono"), palettes=("ink", "sea"), max_length=4),
        rewards={"left": WeightedReward(reward=PythonRewardConfig(target="varl.rewards.toy:left_brightness"))},
        algorithm=algorithm,
        train=TrainConfig(device="cpu"),
    )


def test_probe_of_a_model_folder(tmp_path):
    policy = tiny_policy()
    folder = model_folder.save(tmp_path / "model", policy.module, policy.tokenizer, {})
    heard = []
    config = words_config(folder)
    content = probe(config, tmp_path / "run", minutes=0.0, tick=heard.append)
    assert json.loads((tmp_path / "run" / "probe.json").read_text()) == json.loads(json.dumps(content))
    assert content["model"] == model_identity(folder)
    assert [metrics["rounds"] for metrics in heard] == [1, 2, 3, 4, 5, 6, 7, 8]
    for metrics in heard:  # it takes the least that it can, and says so from the first round on
        assert metrics["total"] == pytest.approx(metrics["seconds"] * 8 / metrics["rounds"])
    assert not any("region_credit" in sentence for sentence in content["recommendations"])
    assert isinstance(contradictions(config, content), list)
    again = model_folder.save(tmp_path / "other", tiny_policy().module.requires_grad_(False).double(), policy.tokenizer, {})
    assert contradictions(words_config(again, GRPOConfig(panw_alpha=9.0)), content) == []


def test_what_the_probe_does_not_measure_is_said(tmp_path):
    config = words_config(save_tiny(tmp_path / "model"), GRPOConfig(region_credit=True))
    assert "region_credit and mask" in probe(config, tmp_path, minutes=0.0)["recommendations"][-1]


def test_contradictions_name_setting_and_range(tmp_path):
    folder = save_tiny(tmp_path / "model")
    found = {
        "model": model_identity(folder),
        "grids": [[1, 1], [1, 2], [2, 4]],
        "recommend": {
            "panw_alpha": 0.7,
            "panw_alpha_range": [0.6, 1.2],
            "num_generations": 16,
            "num_generations_range": [12.0, None],
            "middle_step_range": [2, 3],
        },
        "cost": {"1": {"num_continuations": 1, "best_continuations_interval": [0.5, 0.9]}},
    }
    assert contradictions(words_config(folder, GRPOConfig(panw_alpha=0.6)), found) == []
    (said,) = contradictions(words_config(folder, GRPOConfig(panw_alpha=0.0)), found)
    assert said == "panw_alpha=0: the probe of this model found 0.6 to 1.2 better."
    (said,) = contradictions(words_config(folder, GRPOConfig(panw_alpha=0.7, num_generations=4)), found)
    assert said.startswith("num_generations=4")
    two_stage = VARRLConfig(grpo=GRPOConfig(panw_alpha=0.7), middle_step=MiddleStep(index=1), num_continuations=2)
    said = contradictions(words_config(folder, two_stage), found)
    assert [sentence.split("=")[0] for sentence in said] == ["middle_step", "num_continuations"]
