from dataclasses import replace

import pytest
import torch

from tabular import InstantJudge, TabularPolicy, brightness, gradients
from varl.algorithms.grpo import GRPO
from varl.algorithms.var_rl import FURTHER, VARRL, of_prefixes
from varl.algorithms.vmr import variance_parts
from varl.config import GRPOConfig, MiddleStep, VARRLConfig
from varl.errors import ConfigError
from varl.rng import Stream
from varl.types import Algorithm, Found, Judgement, Prompt

NAN = torch.nan
PROMPTS = [Prompt(label=0), Prompt(label=1), Prompt(label=0)]
RNG = Stream(seed=11, path=("rollout", 0), rows=(0, 1, 2))
PLAIN = GRPOConfig(num_generations=4, rollouts_per_chunk=8)


def var_rl(grpo=PLAIN, m=2, **config):
    return VARRL(VARRLConfig(grpo=grpo, middle_step=MiddleStep(index=m), **config))


def prefix_only(grpo=PLAIN, m=2, **config):
    return var_rl(grpo, m, prefix_updates=1, suffix_updates=0, **config)


def suffix_only(grpo=PLAIN, m=2, **config):
    return var_rl(grpo, m, prefix_updates=0, suffix_updates=1, **config)


def collected(algorithm, policy=None, reward=brightness, prompts=PROMPTS, rng=RNG):
    return list(algorithm.collect(policy or TabularPolicy(), prompts, InstantJudge(reward), rng, 0))


def update(algorithm, policy, reward=brightness, **where):
    pieces = collected(algorithm, policy, reward, **where)
    objective = sum(algorithm.objective(policy, piece)[0] for piece in pieces) / sum(piece.size.sum() for piece in pieces)
    return objective, gradients(policy, objective)


# ---- S10: what the training code must be


@pytest.mark.parametrize("grpo", [PLAIN, replace(PLAIN, loss_type="grpo", scale_rewards="batch"), replace(PLAIN, beta=0.1)], ids=str)
def test_s10_one_continuation_of_a_whole_prefix_is_grpo_to_the_bit(grpo):
    policy = TabularPolicy(vocab=3).with_reference()
    ours, plain = update(prefix_only(grpo, m=3), policy), update(GRPO(grpo), policy)
    assert torch.equal(ours[0], plain[0])
    for a, b in zip(ours[1], plain[1], strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0


@pytest.mark.parametrize("config", [{}, {"num_continuations": 2}, {"num_continuations": 2, "middle_return": "log_mean_exp"}], ids=str)
def test_s10_each_stage_leaves_the_other_alone(config):
    """A step's parameters are its own here: weights and biases of steps 0 and 1, then of step 2."""
    policy = TabularPolicy()
    live = [part.abs().max() > 0 for part in update(prefix_only(**config), policy)[1]]
    assert live == [True] * 4 + [False] * 2
    live = [part.abs().max() > 0 for part in update(suffix_only(**config), policy)[1]]
    assert live == [False] * 4 + [True] * 2


def test_the_prefix_is_all_that_is_trained_on():
    for piece in collected(prefix_only(num_continuations=2)):
        assert piece.stage == "prefix"
        assert piece.rollout.actions.shape[1] == piece.weight.shape[1] == 3
        assert piece.rollout.state is None


@pytest.mark.parametrize("make", [prefix_only, suffix_only])
def test_prefix_and_continuations_draw_from_different_addresses(make):
    """A policy need not name its draws by step; one that asks for all of a call's numbers at once must not get the same twice."""
    asked = set()

    class Listening(TabularPolicy):
        def prefix(self, prompts, rng, *, steps):
            asked.update((rng.path, row) for row in rng.rows)
            return super().prefix(prompts, rng, steps=steps)

        def complete(self, prefix, rng):
            assert not asked & {(rng.path, row) for row in rng.rows}
            asked.update((rng.path, row) for row in rng.rows)
            return super().complete(prefix, rng)

    collected(make(replace(PLAIN, rollouts_per_chunk=1), num_continuations=2), Listening())
    assert len(asked) == (3 * 4 + 3 * 8 if make is prefix_only else 3 + 12)


def test_protocol_and_cycle():
    algorithm = var_rl()
    assert isinstance(algorithm, Algorithm)
    assert [algorithm.stage(step) for step in range(8)] == ["prefix", "prefix", "prefix", "suffix"] * 2
    coarse = var_rl(prefix_updates=300, suffix_updates=100)
    assert [coarse.stage(step) for step in (0, 299, 300, 399, 400)] == ["prefix", "prefix", "suffix", "suffix", "prefix"]


# ---- S7: on-policy, each stage's expected gradient is its block of the full gradient. Many groups, against enumeration


def exact_gradient(policy, eta=0.0):
    """Of E[R] - eta KL(policy || reference), over all 128 pictures."""
    rollout = policy.every_picture(PROMPTS[0])
    score = policy.score(rollout)
    logp = score.logp.sum(1)
    value = brightness(policy.decode(rollout), ())
    if eta:
        value = value - eta * (logp - score.ref_logp.sum(1))
    return gradients(policy, (logp.exp() * value).sum())


def relative_error(got, want):
    return (sum((a - b).square().sum() for a, b in zip(got, want, strict=True)) / sum(b.square().sum() for b in want)).sqrt().item()


GROUPS = {"prompts": [Prompt(label=0)] * 256, "rng": Stream(seed=5, rows=tuple(range(256)))}
RAW = GRPOConfig(num_generations=8, rollouts_per_chunk=10_000, scale_rewards="none")


def per_picture(algorithm, policy, stage, factor):
    """The mean over pictures of the stage's gradient; `factor` undoes the baseline's share of each picture in its own mean."""
    pieces = [piece for piece in collected(algorithm, policy, **GROUPS) if piece.stage == stage]
    rows = sum(len(piece) for piece in pieces)
    return gradients(policy, factor * sum(algorithm.objective(policy, piece)[0] for piece in pieces) / rows)


@pytest.mark.parametrize(
    ("algorithm", "stage", "factor"),
    [
        (prefix_only(RAW), "prefix", 8 / 7),
        (prefix_only(RAW, num_continuations=2), "prefix", 8 / 7),
        (suffix_only(RAW), "suffix", 8 / 7),
        (suffix_only(RAW, shared_prefix_baseline=False), "suffix", 8 / 7),
        (prefix_only(RAW, num_continuations=2, tree_reuse=True), "suffix", 1.0),
    ],
    ids=["prefix", "prefix K=2", "suffix, shared prefix", "suffix, whole pictures", "tree"],
)
def test_s7_stages_are_blocks_of_the_full_gradient(algorithm, stage, factor):
    policy = TabularPolicy()
    block = slice(0, 4) if stage == "prefix" else slice(4, 6)
    want = exact_gradient(policy)[block]
    assert relative_error(per_picture(algorithm, policy, stage, factor)[block], want) < 0.1
    assert relative_error([torch.zeros_like(part) for part in want], want) == 1


@pytest.mark.parametrize("stage", ["prefix", "suffix"])
def test_exact_mode_ascends_the_papers_objective_off_the_reference(stage):
    """The policy has left the reference. The log-ratio in the return gives the gradient of E[R] - eta KL over whole pictures; the same
    reward without it does not."""
    policy = TabularPolicy(spread=0.8)
    policy.with_reference()
    with torch.no_grad():
        for weight in policy.module.parameters():
            weight.mul_(0.2)
    block = slice(0, 4) if stage == "prefix" else slice(4, 6)
    make = prefix_only if stage == "prefix" else suffix_only
    want = exact_gradient(policy, eta=1.5)[block]
    exact = make(RAW, middle_return="importance", eta=1.5, shared_prefix_baseline=False)
    assert relative_error(per_picture(exact, policy, stage, 8 / 7)[block], want) < 0.1
    assert relative_error(per_picture(make(RAW, shared_prefix_baseline=False), policy, stage, 8 / 7)[block], want) > 0.3


def test_a_shared_prefix_makes_suffix_updates_quieter():
    """E|g|^2 over 24 single-prompt updates; the share of the variance that prefixes settle drops out."""
    policy = TabularPolicy(spread=0.2)

    def weighty_prefix(images, prompts):
        return brightness(images, prompts) + 3 * images[:, 0, 0, 0]

    def noise(shared):
        algorithm = suffix_only(RAW, shared_prefix_baseline=shared)
        total = 0.0
        for i in range(24):
            grads = update(algorithm, policy, weighty_prefix, prompts=PROMPTS[:1], rng=Stream(seed=i, rows=(0,)))[1]
            total += sum(part.square().sum().item() for part in grads)
        return total

    assert noise(True) < 0.6 * noise(False)


# ---- credit


def test_values_are_middle_returns_over_the_group():
    policy, algorithm = TabularPolicy(), prefix_only(num_continuations=2)
    prefix = policy.prefix([p for p in PROMPTS for _ in range(4)], RNG.repeat(4), steps=2)
    reward = brightness(policy.decode(policy.complete(prefix, RNG.at(FURTHER).repeat(8))), ())
    value = reward.reshape(3, 4, 2).mean(-1)
    advantage = (value - value.mean(1, keepdim=True)) / (value.std(1, keepdim=True) + 1e-4)
    pieces = collected(algorithm, policy)
    assert [len(piece) for piece in pieces] == [4, 4, 4]
    torch.testing.assert_close(torch.cat([piece.judgement.value for piece in pieces]), value.flatten())
    torch.testing.assert_close(torch.cat([piece.advantage for piece in pieces]), advantage.reshape(12, 1).expand(12, 3))
    assert pieces[0].metrics["reward"] == pytest.approx(reward[:8].mean().item())
    assert pieces[0].metrics["judged"] == 8
    assert pieces[0].metrics["middle_step"] == 2
    between, within = variance_parts(reward.reshape(3, 4, 2))
    for name, want in (("settled", between), ("open", within)):
        assert sum(piece.metrics[f"reward_variance/{name}"] for piece in pieces) / 3 == pytest.approx(want, rel=1e-5)


def test_log_mean_exp_is_never_below_the_mean():
    mean, soft = (collected(prefix_only(num_continuations=2, middle_return=mode, eta=0.2)) for mode in ("mean", "log_mean_exp"))
    gap = torch.cat([a.judgement.value - b.judgement.value for a, b in zip(soft, mean, strict=True)])
    assert (gap > -1e-6).all()
    assert gap.max() > 0.01


def test_failed_continuations_leave_their_prefix():
    """Of each pair of continuations the first fails, and of the first prefix both do."""

    def patchy(images, prompts):
        failed = torch.arange(len(prompts)) % 2 == 0
        failed[1] = True
        return brightness(images, prompts).masked_fill(failed, NAN)

    piece = collected(prefix_only(num_continuations=2), reward=patchy, prompts=PROMPTS[:1], rng=RNG.select([0]))[0]
    assert piece.judgement.value.isnan().tolist() == [True, False, False, False]
    assert piece.weight.sum(1).tolist() == [0, 3, 3, 3]
    assert piece.advantage[0].tolist() == [0, 0, 0]
    assert piece.metrics["reward_failed"] == 5 / 8
    assert "reward_variance/settled" not in piece.metrics


def test_panw_is_normalised_inside_each_stage():
    grpo = replace(PLAIN, panw_alpha=1.0)
    prefix, suffix = collected(prefix_only(grpo))[0], collected(suffix_only(grpo))[0]
    torch.testing.assert_close(prefix.weight[0], torch.tensor([1.5, 0.75, 0.75]))
    assert suffix.weight[0].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert suffix.size.tolist() == [4.0] * 8


def test_the_mask_of_a_prefix_is_the_union_over_its_continuations():
    left, right, nowhere = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], [NAN] * 4

    def sided(images, prompts):
        """Prefix by prefix: left and right; left twice; right and nothing found; right and failed."""
        box = torch.tensor([left, right, left, left, right, nowhere, right, left])[:, None]
        value = torch.arange(8.0)
        value[7] = NAN
        return Judgement(value=value, region_box=box)

    grpo = replace(PLAIN, mask="direct", mask_dilation=0)
    piece = collected(prefix_only(grpo, num_continuations=2), reward=sided)[0]
    assert piece.weight.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 1]]
    assert piece.kl_weight.int().tolist() == [[1, 1, 1]] * 4


def test_region_credit_reaches_the_prefix():
    halves = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])

    def regions(images, prompts):
        value = images.sum(2).flatten(1)[:, :2] + images[:, 2].sum(1)
        return Judgement(value=value.sum(1), region_value=value, region_box=halves.expand(len(images), 2, 4))

    grpo = replace(PLAIN, region_credit=True, mask_dilation=0)
    for piece in collected(prefix_only(grpo, num_continuations=2, tree_reuse=True), reward=regions):
        torch.testing.assert_close(piece.advantage[:, 0], piece.advantage[:, 1] + piece.advantage[:, 2])
        assert not torch.allclose(piece.advantage[:, 1], piece.advantage[:, 2])


def test_a_failed_continuation_lends_its_prefix_no_reach():
    """It has no box, and a region without a box may be anywhere; but its value is not in the mean either."""

    def left_or_failed(images, prompts):
        box = torch.tensor([[0.0, 0.0, 0.5, 1.0], [NAN] * 4]).repeat(len(images) // 2, 1)[:, None]
        value = brightness(images, prompts).masked_fill(box[:, 0, 0].isnan(), NAN)
        return Judgement(value=value, region_value=value[:, None], region_box=box)

    grpo = replace(PLAIN, region_credit=True, mask_dilation=0)
    for piece in collected(prefix_only(grpo, num_continuations=2), reward=left_or_failed):
        assert piece.advantage[:, :2].abs().amin(1).gt(0).all()
        assert piece.advantage[:, 2].eq(0).all()


def test_tree_siblings_by_hand():
    """K = 2: each continuation against the other, measured by the deviation of the prompt's eight pictures."""
    pieces = collected(prefix_only(num_continuations=2, tree_reuse=True))
    assert [piece.stage for piece in pieces] == ["prefix", "suffix"] * 3
    assert [len(piece) for piece in pieces] == [4, 8] * 3
    for piece in pieces[1::2]:
        pair = piece.judgement.value.reshape(4, 2)
        want = (pair - pair.flip(1)).flatten() / (pair.std() + 1e-4)
        torch.testing.assert_close(piece.advantage[:, 0], want)
        assert torch.equal(piece.weight, piece.rollout.sampled.float())
        assert piece.weight.sum(1).tolist() == [4.0] * 8


def test_judgement_of_prefixes():
    box = torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[0.0, 0.3, 0.2, 0.6]], [[0.5, 0.5, 0.6, 0.6]], [[NAN] * 4]])
    seen = Found(text="A", confidence=1.0, box=(0.0, 0.0, 1.0, 1.0))
    judgement = Judgement(
        value=torch.zeros(4),
        parts={"ocr": torch.tensor([1.0, 2.0, NAN, 4.0])},
        region_value=torch.tensor([[1.0], [3.0], [NAN], [NAN]]),
        region_box=box,
        found=((seen,), (), (seen,), (seen, seen)),
    )
    got = of_prefixes(judgement, torch.tensor([5.0, 6.0]), 2)
    assert got.value.tolist() == [5.0, 6.0]
    assert got.parts["ocr"].tolist() == [1.5, 4.0]
    torch.testing.assert_close(got.region_value, torch.tensor([[2.0], [NAN]]), equal_nan=True)
    torch.testing.assert_close(got.region_box, torch.tensor([[[0.0, 0.2, 0.3, 0.6]], [[0.5, 0.5, 0.6, 0.6]]]))
    assert [len(row) for row in got.found] == [1, 3]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("make", [prefix_only, suffix_only])
def test_chunks_change_nothing(make, scale):
    policy = TabularPolicy()
    config = {"num_continuations": 2, "tree_reuse": True}
    small, large = (update(make(replace(PLAIN, scale_rewards=scale, rollouts_per_chunk=size), **config), policy) for size in (1, 99))
    for a, b in zip(small[1], large[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---- the experiment that moves m


def test_the_middle_step_looks_for_a_quarter_of_the_variance():
    """Only the first token counts: b is 1 from step 1 on, so the search goes down and stays there. Only the last counts: it goes up."""
    for reward, path in ((lambda x, p: x[:, 0, 0, 0], [2, 1, 1]), (lambda x, p: x[:, 2, 0, 0], [1, 2, 2])):
        algorithm = prefix_only(RAW, m=path[0], num_continuations=2, adapt_middle_step=True)
        seen = [collected(algorithm, reward=reward, **GROUPS)[0].metrics["middle_step"] for _ in range(3)]
        assert seen == path
        resumed = prefix_only(m=path[0], num_continuations=2, adapt_middle_step=True)
        resumed.load_state_dict(algorithm.state_dict())
        assert resumed.middle(TabularPolicy().layout) == algorithm.middle(TabularPolicy().layout)


# ---- refusals


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: var_rl(middle_return="importance"), "scale_rewards"),
        (lambda: var_rl(replace(PLAIN, beta=0.1, scale_rewards="none"), middle_return="importance"), "beta=0"),
        (lambda: var_rl(replace(PLAIN, region_credit=True), middle_return="log_mean_exp"), "no sum"),
        (lambda: var_rl(adapt_middle_step=True), "num_continuations"),
        (lambda: collected(var_rl(m=3)), "whole picture a prefix"),
        (lambda: collected(prefix_only(m=3, num_continuations=2)), "whole picture a prefix"),
        (lambda: collected(prefix_only(RAW, middle_return="importance")), "without one"),
    ],
)
def test_contradictions_are_refused(build, says):
    with pytest.raises(ConfigError, match=says):
        build()
