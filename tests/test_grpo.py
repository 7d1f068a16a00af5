import math
from dataclasses import replace

import pytest
import torch

from tabular import InstantJudge, TabularPolicy, brightness, gradients
from varl.algorithms.advantages import group_advantages, nan_std, part_advantages, sibling_advantages
from varl.algorithms.grpo import GRPO, by_step, clipped_surrogate, judged, k1, k2, k3, log_ratio, normaliser
from varl.config import GRPOConfig
from varl.errors import ConfigError
from varl.rng import Stream
from varl.types import Algorithm, BranchingPolicy, Judge, Judgement, Prompt

NAN = torch.nan
PROMPTS = [Prompt(label=0), Prompt(label=1), Prompt(label=0)]
RNG = Stream(seed=7, path=("rollout", 0), rows=(0, 1, 2))


def total(algorithm, policy, pieces):
    """What the loop does: the sum of the pieces' objectives over the sum of their sizes."""
    return sum(algorithm.objective(policy, piece)[0] for piece in pieces) / sum(piece.size.sum() for piece in pieces)


# ---- advantages


def test_advantages_by_hand():
    got = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    torch.testing.assert_close(got, torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]) / (1 + 1e-4))


def test_failed_pictures_leave_their_group_and_get_nothing():
    got = group_advantages(torch.tensor([[1.0, NAN, 3.0], [NAN, 4.0, NAN], [NAN, NAN, NAN]]))
    spread = math.sqrt(2) + 1e-4
    torch.testing.assert_close(got, torch.tensor([[-1 / spread, 0.0, 1 / spread], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("size", [3, 7, 12, 16])
def test_equal_rewards_teach_nothing_however_large(size):
    """The fp32 mean of twelve times 1234.56 is not 1234.56."""
    for value in (0.1, 100.1, 1234.56):
        assert group_advantages(torch.full((1, size), value)).tolist() == [[0.0] * size]


def test_scales_of_advantages():
    value = torch.tensor([[0.0, 2.0], [10.0, 14.0], [3.0, 3.0]])
    assert group_advantages(value, "none").tolist() == [[-1.0, 1.0], [-2.0, 2.0], [0.0, 0.0]]
    batch_std = torch.tensor([0.0, 2, 10, 14, 3, 3]).std() + 1e-4
    torch.testing.assert_close(group_advantages(value, "batch"), group_advantages(value, "none") / batch_std)


def test_a_reward_in_other_units_teaches_the_same():
    value = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) * 100
    torch.testing.assert_close(group_advantages(value), group_advantages(1000 * value - 7), rtol=1e-4, atol=1e-5)


def test_nan_std_is_torch_std_of_what_is_left():
    value = torch.tensor([1.0, NAN, 4.0, 9.0])
    torch.testing.assert_close(nan_std(value), torch.tensor([1.0, 4.0, 9.0]).std())
    assert nan_std(torch.tensor([3.0, NAN])) == 0


def test_one_part_is_the_whole_and_parts_that_trade_off_still_teach():
    value = torch.tensor([[1.0, 2.0, 4.0]])
    assert torch.equal(part_advantages(value[..., None], "group")[..., 0], group_advantages(value))
    trade = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    sigma = 1 + 1e-4  # two parts of variance 1/2
    torch.testing.assert_close(part_advantages(trade, "group"), torch.tensor([[[0.5, -0.5], [-0.5, 0.5]]]) / sigma)
    assert group_advantages(trade.sum(-1)).tolist() == [[0.0, 0.0]]


def test_siblings_against_one_another():
    value = torch.tensor([[[0.0, 2.0], [5.0, NAN]]])[..., None]
    assert sibling_advantages(value, "none").flatten().tolist() == [-2.0, 2.0, 0.0, 0.0]
    three = torch.tensor([[[0.0, 3.0, 9.0]]])[..., None]
    assert sibling_advantages(three, "none").flatten().tolist() == [0 - 6, 3 - 4.5, 9 - 1.5]
    sigma = torch.tensor([0.0, 2.0, 5.0]).std() + 1e-4
    torch.testing.assert_close(sibling_advantages(value), sibling_advantages(value, "none") / sigma)
    torch.testing.assert_close(sibling_advantages(value, "batch"), sibling_advantages(value, "group"))


# ---- ratio, clip, normaliser


def test_ratio_levels_by_hand():
    logp = torch.tensor([[0.1, 0.2, 0.6, 1.0]])
    old, step = torch.zeros(1, 4), torch.tensor([[0, 1, 1, 1]])
    active = torch.tensor([[True, True, True, False]])
    assert torch.equal(log_ratio(logp, old, step, active), logp)
    torch.testing.assert_close(log_ratio(logp, old, step, active, "step"), torch.tensor([[0.1, 0.4, 0.4, 0.4]]))
    torch.testing.assert_close(log_ratio(logp, old, step, active, "sequence"), torch.full((1, 4), 0.3))


@pytest.mark.parametrize("level", ["token", "step", "sequence"])
def test_on_policy_gradient_is_advantage_times_score(level):
    logp = torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-0.1, -0.2, -0.3, -0.4]], requires_grad=True)
    active = torch.tensor([[True, True, True, False], [True, True, True, True]])
    advantage = torch.tensor([[2.0], [-3.0]]).expand(2, 4)
    ratio = log_ratio(logp, logp.detach(), torch.tensor([[0, 1, 1, 1]] * 2), active, level)
    (clipped_surrogate(ratio, advantage, 0.2, 0.2) * active).sum().backward()
    torch.testing.assert_close(logp.grad, advantage * active)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [(1.5, 1.0, 1.3, 0.0), (1.5, -1.0, -1.5, -1.5), (0.5, 1.0, 0.5, 0.5), (0.5, -1.0, -0.8, 0.0), (1.25, 2.0, 2.5, 2.5)],
)
def test_clip_low_and_high(ratio, advantage, value, slope):
    log = torch.tensor([[math.log(ratio)]], requires_grad=True)
    out = clipped_surrogate(log, torch.tensor([[advantage]]), 0.2, 0.3)
    out.sum().backward()
    assert out.item() == pytest.approx(value, rel=1e-6)
    assert log.grad.item() == pytest.approx(slope, rel=1e-6)


def test_normalisers_as_their_docstring_says():
    active = torch.tensor([[True, True, True, True], [True, False, False, False]])
    summand = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 0.0, 0.0, 0.0]])

    def result(loss_type):
        scale, size = normaliser(loss_type, active, tokens=8)
        return ((scale[:, None] * summand).sum() / size.sum()).item()

    assert result("dapo") == pytest.approx(20 / 5)
    assert result("grpo") == pytest.approx((10 / 4 + 10 / 1) / 2)
    assert result("dr_grpo") == pytest.approx(20 / 16)
    assert result("bnpo") == pytest.approx(20 / 5)


def test_bnpo_averages_pieces_where_dapo_averages_tokens():
    pieces = [(torch.ones(1, 4, dtype=torch.bool), 4.0), (torch.tensor([[True, False, False, False]]), 10.0)]
    sums = {}
    for loss_type in ("dapo", "bnpo"):
        parts = [(normaliser(loss_type, active, 4), value) for active, value in pieces]
        sums[loss_type] = sum((scale * value).sum() for (scale, _), value in parts) / sum(size.sum() for (_, size), _ in parts)
    assert sums["dapo"].item() == pytest.approx(14 / 5)
    assert sums["bnpo"].item() == pytest.approx((1 + 10) / 2)


# ---- KL estimators: expectation of value and of loss gradient, by enumeration


def laws():
    noise = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=noise, dtype=torch.float64, requires_grad=True)
    return logits, torch.randn(5, generator=noise, dtype=torch.float64).log_softmax(-1)


def expected_gradient(estimator):
    logits, ref = laws()
    logp = logits.log_softmax(-1)
    return torch.autograd.grad((logp.exp().detach() * estimator(logp, ref)).sum(), logits)[0]


def exact_gradient(kl):
    logits, ref = laws()
    return torch.autograd.grad(kl(logits.log_softmax(-1), ref), logits)[0]


def reverse_kl(logp, ref):
    return (logp.exp() * (logp - ref)).sum()


def forward_kl(logp, ref):
    return (ref.exp() * (ref - logp)).sum()


def test_each_kl_estimator_has_the_gradient_its_docstring_names():
    torch.testing.assert_close(expected_gradient(k1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(expected_gradient(k2), exact_gradient(reverse_kl))
    torch.testing.assert_close(expected_gradient(k3), exact_gradient(forward_kl))
    assert not torch.allclose(exact_gradient(forward_kl), exact_gradient(reverse_kl), rtol=0.1)


def test_k1_and_k3_are_unbiased_values_and_k3_is_never_negative():
    logits, ref = laws()
    logp = logits.detach().log_softmax(-1)
    for estimator in (k1, k3):
        torch.testing.assert_close((logp.exp() * estimator(logp, ref)).sum(), reverse_kl(logp, ref))
    assert (k3(logp, ref) >= 0).all()


# ---- the algorithm


def test_protocols():
    policy = TabularPolicy()
    assert isinstance(policy, BranchingPolicy)
    assert isinstance(GRPO(GRPOConfig()), Algorithm)
    assert isinstance(InstantJudge(brightness), Judge)


def test_tabular_policy_scores_what_it_did_and_branches():
    policy = TabularPolicy(vocab=3)
    rollout = policy.rollout(PROMPTS, RNG)
    assert torch.equal(policy.score(rollout).logp, rollout.logp)
    prefix = policy.prefix(PROMPTS, RNG, steps=2)
    assert torch.equal(prefix.actions, rollout.actions[:, :3])
    assert torch.equal(policy.complete(prefix, RNG).actions, rollout.actions)
    whole = policy.complete(prefix, RNG.repeat(2))
    assert torch.equal(policy.score(whole).logp, whole.logp)
    assert whole.sampled.sum(1).tolist() == [4] * 6
    assert torch.equal(whole.actions[:, :3], prefix.actions.repeat_interleave(2, 0))
    assert policy.decode(whole).shape == (6, 3, 2, 2)


def test_pieces_are_whole_groups_in_the_order_of_the_prompts():
    policy = TabularPolicy()
    algorithm = GRPO(GRPOConfig(num_generations=4, rollouts_per_chunk=9))
    pieces = list(algorithm.collect(policy, PROMPTS, InstantJudge(brightness), RNG, 0))
    assert [len(piece) for piece in pieces] == [8, 4]
    assert torch.cat([piece.rollout.index for piece in pieces]).tolist() == list(range(12))
    assert [prompt.label for piece in pieces for prompt in piece.rollout.prompts] == [0] * 4 + [1] * 4 + [0] * 4


def test_one_chunk_is_drawn_while_another_is_judged():
    policy, events = TabularPolicy(), []

    def draw():
        for i in range(3):
            events.append("draw")
            rollout = policy.rollout(PROMPTS, RNG)
            yield i, rollout

    items = []
    for item, _ in judged(policy, InstantJudge(brightness, events.append), draw(), 1):
        events.append("train")
        items.append(item)
    assert items == [0, 1, 2]
    assert events == ["draw", "submit", "draw", "submit", "train", "draw", "submit", "train", "train"]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_chunks_and_micro_batches_change_nothing(loss_type, scale):
    policy = TabularPolicy().with_reference()
    grads = []
    for chunk, micro in ((4, 99), (12, 99), (12, 3)):
        algorithm = GRPO(GRPOConfig(num_generations=4, rollouts_per_chunk=chunk, loss_type=loss_type, scale_rewards=scale, beta=0.1))
        pieces = list(algorithm.collect(policy, PROMPTS, InstantJudge(brightness), RNG, 0))
        grads.append(gradients(policy, total(algorithm, policy, [part for piece in pieces for part in piece.split(micro)])))
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradient_by_hand():
    """On-policy and unweighted, GRPO is the mean over tokens of advantage * grad log pi."""
    policy = TabularPolicy()
    algorithm = GRPO(GRPOConfig(num_generations=4))
    (piece,) = algorithm.collect(policy, PROMPTS, InstantJudge(brightness), RNG, 0)
    reward = brightness(policy.decode(piece.rollout), PROMPTS).reshape(3, 4)
    advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).reshape(12, 1)
    want = gradients(policy, (advantage * policy.score(piece.rollout).logp).sum() / (12 * 7))
    for a, b in zip(gradients(policy, total(algorithm, policy, [piece])), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_failed_pictures_keep_their_kl_and_lose_their_reward():
    policy = TabularPolicy().with_reference()
    with torch.no_grad():
        for weight in policy.module.parameters():
            weight.add_(0.1)

    def half_blind(images, prompts):
        return brightness(images, prompts).masked_fill(torch.arange(len(prompts)) % 2 == 0, NAN)

    algorithm = GRPO(GRPOConfig(num_generations=4, beta=0.5))
    (piece,) = algorithm.collect(policy, PROMPTS, InstantJudge(half_blind), RNG, 0)
    assert piece.weight[::2].eq(0).all()
    assert piece.weight[1::2].eq(1).all()
    assert piece.kl_weight.eq(1).all()
    assert piece.advantage[::2].eq(0).all()
    assert piece.metrics["reward_failed"] == 0.5
    assert math.isfinite(piece.metrics["reward"])
    assert algorithm.objective(policy, piece)[0].isfinite()


def test_a_batch_that_failed_throughout_has_no_reward_metric():
    algorithm = GRPO(GRPOConfig(num_generations=4))
    judge = InstantJudge(lambda images, prompts: torch.full((len(prompts),), NAN))
    (piece,) = algorithm.collect(TabularPolicy(), PROMPTS, judge, RNG, 0)
    assert "reward" not in piece.metrics
    assert piece.metrics["frac_reward_zero_std"] == 1
    assert algorithm.objective(TabularPolicy(), piece)[0] == 0


def test_kl_alone_is_minus_beta_times_the_exact_kl():
    policy = TabularPolicy().with_reference()
    with torch.no_grad():
        next(policy.module.parameters()).add_(torch.tensor([[0.3], [-0.2]]))
    algorithm = GRPO(GRPOConfig(num_generations=4, beta=0.5))
    (piece,) = algorithm.collect(policy, PROMPTS, InstantJudge(lambda images, prompts: torch.ones(len(prompts))), RNG, 0)
    objective, metrics = algorithm.objective(policy, piece)
    kl = policy.score(piece.rollout).kl
    torch.testing.assert_close(objective, -0.5 * kl.sum())
    assert metrics["kl"] == pytest.approx(kl.mean().item(), rel=1e-6)
    assert metrics["kl"] > 1e-4


def test_metrics_of_a_first_step_and_of_a_far_one():
    policy = TabularPolicy()
    algorithm = GRPO(GRPOConfig(num_generations=4, epsilon=0.2, epsilon_high=0.3))
    (piece,) = algorithm.collect(policy, PROMPTS, InstantJudge(brightness), RNG, 0)
    metrics = algorithm.objective(policy, piece)[1]
    assert metrics["sampling/sampling_logp_difference/max"] == 0
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["entropy"] == pytest.approx(policy.score(piece.rollout).entropy.mean().item(), rel=1e-6)
    assert "sampling/law_difference/max" not in metrics
    by_step = [metrics[f"entropy/step_{i}"] for i in range(3)]
    assert sum(n * h for n, h in zip((1, 2, 4), by_step, strict=True)) / 7 == pytest.approx(metrics["entropy"], rel=1e-5)

    far = replace(piece, rollout=replace(piece.rollout, logp=piece.rollout.logp - 1.0, sample_logp=piece.rollout.logp))
    metrics = algorithm.objective(policy, far)[1]
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(1.0, rel=1e-5)
    assert metrics["clip_ratio/high_mean"] == pytest.approx((piece.advantage > 0).float().mean().item())
    assert metrics["clip_ratio/low_mean"] == 0
    assert metrics["sampling/law_difference/max"] == pytest.approx(1.0, rel=1e-5)


def test_parts_of_the_reward_are_reported():
    def parts(images, prompts):
        value = brightness(images, prompts)
        return Judgement(value=value, parts={"bright": value / 2, "void": torch.full_like(value, NAN)})

    (piece,) = GRPO(GRPOConfig(num_generations=4)).collect(TabularPolicy(), PROMPTS, InstantJudge(parts), RNG, 0)
    assert piece.metrics["rewards/bright/mean"] == pytest.approx(piece.metrics["reward"] / 2)
    assert piece.metrics["rewards/bright/std"] == pytest.approx(piece.metrics["reward_std"] / 2)
    assert "rewards/void/mean" not in piece.metrics
    assert piece.metrics["reward_std"] == pytest.approx(piece.judgement.value.reshape(3, 4).std(1).mean().item(), rel=1e-5)


def test_reward_metrics_do_not_depend_on_the_chunk():
    def parts(images, prompts):
        value = brightness(images, prompts)
        return Judgement(value=value, parts={"bright": value**2})

    def means(chunk):
        algorithm = GRPO(GRPOConfig(num_generations=4, rollouts_per_chunk=chunk))
        pieces = list(algorithm.collect(TabularPolicy(), PROMPTS, InstantJudge(parts), RNG, 0))
        return {name: sum(piece.metrics[name] * len(piece) for piece in pieces) / 12 for name in pieces[0].metrics}

    assert means(4) == pytest.approx(means(12), rel=1e-5)
    assert means(8) == pytest.approx(means(12), rel=1e-5)


def test_kl_without_a_reference_is_refused():
    policy, algorithm = TabularPolicy(), GRPO(GRPOConfig(num_generations=4, beta=0.1))
    (piece,) = algorithm.collect(policy, PROMPTS, InstantJudge(brightness), RNG, 0)
    with pytest.raises(ConfigError, match="without a reference"):
        algorithm.objective(policy, piece)


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(importance_sampling_level="sequence", panw_alpha=0.7),
        GRPOConfig(importance_sampling_level="sequence", region_credit=True),
        GRPOConfig(importance_sampling_level="step", region_credit=True),
    ],
)
def test_ratios_that_would_average_the_credit_out_are_refused(config):
    with pytest.raises(ConfigError, match="average"):
        GRPO(config)


def test_ascent_improves_the_exact_return():
    """The worked example: 40 steps of plain GRPO raise E[reward], summed over all 128 pictures."""
    policy = TabularPolicy()
    algorithm = GRPO(GRPOConfig(num_generations=16))
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=2.0)

    def expected():
        rollout = policy.every_picture(PROMPTS[0])
        return (rollout.logp.sum(1).exp() * brightness(policy.decode(rollout), ())).sum().item()

    before = expected()
    for step in range(40):
        pieces = list(algorithm.collect(policy, PROMPTS, InstantJudge(brightness), RNG.at(step), step))
        optimizer.zero_grad()
        (-total(algorithm, policy, pieces)).backward()
        optimizer.step()
    best = torch.linspace(0.1, 1.2, 12).sum().item()
    assert before < 0.6 * best
    assert expected() > 0.9 * best


def test_many_steps_are_told_in_blocks():
    """40 steps in 8 blocks of 5, each under the name of its first; up to 32, one by one."""
    step = torch.arange(40).flip(0)[None]
    value, where = step.float(), step[0, :] != 7
    told = by_step("x", value, where[None], step, 40)
    assert list(told) == [f"x/step_{i}" for i in range(0, 40, 5)]
    assert told["x/step_10"] == 12.0
    assert told["x/step_5"] == pytest.approx((5 + 6 + 8 + 9) / 4)
    assert by_step("x", value[:, 35:], where[None, 35:], step[:, 35:], 40) == {"x/step_0": 2.0}  # those of a prefix: the same blocks
    assert by_step("x", value[:, 38:], where[None, 38:], step[:, 38:], 32) == {"x/step_0": 0.0, "x/step_1": 1.0}
