import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gaussian_chain import GaussianPolicy, score_of_paths, token_mean, token_std
from tabular import InstantJudge, TabularPolicy, brightness, gradients
from varl.algorithms.grpo import GRPO, k3
from varl.algorithms.mar_grpo import (
    MARGRPO,
    approach,
    consistent,
    damping,
    nested_advantages,
    shares,
    stratified,
    uncertain_mask,
    uncertainty,
)
from varl.algorithms.panw import token_weights
from varl.config import GRPOConfig, MARGRPOConfig
from varl.errors import ConfigError
from varl.rng import Stream
from varl.types import Algorithm, Judgement, Policy, Prompt, RedrawingPolicy

NAN = torch.nan
PROMPTS = [Prompt(label=0), Prompt(label=1), Prompt(label=0)]
RNG = Stream(seed=5, path=("rollout", 0), rows=(0, 1, 2))
GRPO4 = GRPOConfig(num_generations=4)
MODES = ("release", "include_primary", "precision_weight", "rewarded")
RELEASE = {"trajectories": "release", "support": "unknown", "grpo": replace(GRPO4, loss_type="grpo")}


def mar_grpo(**config):
    return MARGRPO(MARGRPOConfig(**{"grpo": GRPO4, "ar_steps": 0, "denoise_moves": 0, "num_trajectories": 2, **config}))


def collected(algorithm, policy, reward=brightness, prompts=PROMPTS, rng=RNG):
    return list(algorithm.collect(policy, prompts, InstantJudge(reward), rng, 0))


def total(algorithm, policy, pieces):
    """What the loop does: the sum of the pieces' objectives over the sum of their sizes."""
    return sum(algorithm.objective(policy, piece)[0] for piece in pieces) / sum(piece.size.sum() for piece in pieces)


def far_from_flat(images, prompts):
    """Another value for every picture, of which the tokens know nothing."""
    return torch.arange(len(prompts)).float()


def same(got, want, rtol=1e-10):
    assert max(float(part.abs().max()) for part in want) > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


# ---- which steps and moves


@pytest.mark.parametrize(("total", "count"), [(64, 12), (63, 12), (25, 10), (5, 5), (7, 1)])
def test_exactly_so_many_each_as_often_as_the_others(total, count):
    """Over a fine grid of the number that decides, every one of them is chosen a share count / total of the time."""
    chosen = stratified((torch.arange(6300) + 0.5) / 6300, total, count)
    assert chosen.shape == (6300, total)
    assert chosen.sum(1).eq(count).all()
    torch.testing.assert_close(chosen.float().mean(0), torch.full((total,), count / total), rtol=0, atol=1 / 3000)


def test_chosen_by_hand():
    assert stratified(torch.tensor([0.0, 0.5, 0.99]), 4, 2).int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [1, 0, 1, 0]]
    assert stratified(torch.tensor([[0.3]]), 3, 3).all()


@pytest.mark.parametrize("support", ["committed", "unknown"])
def test_k_of_the_steps_and_of_the_admissible_moves(support):
    policy = GaussianPolicy(tokens=6, steps=3)
    grpo = replace(GRPO4, loss_type="grpo")
    (piece,) = collected(mar_grpo(ar_steps=2, denoise_moves=2, num_trajectories=0, support=support, grpo=grpo), policy)
    scored = piece.rollout.chain.scored
    assert not scored[..., -1].any(), "the last move has no noise"
    assert set(scored.sum(-1).flatten().tolist()) == {0, 2}
    assert len(scored[scored.any(-1)].unique(dim=0)) == 3, "every token has a choice of its own"
    assert torch.equal(scored.any(-1), piece.rollout.sampled)
    assert torch.equal(piece.weight > 0, piece.rollout.sampled)
    if support == "committed":
        steps = [set(row[on].tolist()) for row, on in zip(piece.rollout.step, piece.rollout.sampled, strict=True)]
        assert [len(row) for row in steps] == [2] * 12
        assert set().union(*steps) == {0, 1, 2}
        assert piece.rollout.sampled.sum(1).tolist() == [4] * 12
    else:
        assert [len(set(row)) for row in piece.rollout.step.tolist()] == [1] * 24
        assert torch.equal(piece.rollout.sampled, piece.rollout.chain.settled >= piece.rollout.step)


# ---- uncertainty and selection, by hand


def test_uncertainty_by_hand():
    """Two numbers that spread by 1 and by 3: deviations divided by M; a token that never changes; one path alone."""
    tokens = torch.tensor([[[[0.0, 1.0], [4.0, 4.0]], [[2.0, 7.0], [4.0, 4.0]]]])
    assert uncertainty(tokens).tolist() == [[2.0, 0.0]]
    assert uncertainty(tokens[:, :1]).tolist() == [[0.0, 0.0]]


def test_uncertain_tokens_by_hand():
    spread = torch.tensor([[0.1, 0.4, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0]])
    assert uncertain_mask(spread, 0.5).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert not uncertain_mask(spread, 0.0).any()
    assert uncertain_mask(spread, 1.0).all()
    assert uncertain_mask(torch.rand(1, 1024), 0.3).sum() == 307


def test_damping_by_hand():
    spread = torch.tensor([[0.1, 0.4, 0.2, 0.8]])
    assert damping(spread, torch.tensor([[False, True, True, True]])).tolist() == [[1.0, 0.25, 1.0, 0.0625]]
    assert damping(spread, torch.zeros(1, 4, dtype=torch.bool)).tolist() == [[1.0] * 4]
    every = torch.ones(1, 3, dtype=torch.bool)
    assert damping(torch.zeros(1, 3), every).tolist() == [[1.0] * 3]
    assert damping(torch.tensor([[0.0, 1e-30, 0.0]]), every).tolist() == [[1.0, 0.0, 1.0]], "the limit of u_min -> 0"
    assert damping(torch.tensor([[0.0, 1e-45, 2.0]]), every).tolist() == [[1.0, 0.0, 0.0]]
    assert damping(torch.tensor([[2e-40, 1e-40, 4e-40]]), every).tolist() == [pytest.approx([0.25, 1.0, 0.0625], rel=1e-4)]
    assert damping(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[False, True, True]])).tolist() == [[1.0, 1.0, 0.25]]


def test_shares_by_hand():
    spread, uncertain = torch.tensor([[1.0, 2.0]]), torch.tensor([[False, True]])

    def of(mode, mask=uncertain):
        return [part.tolist()[0] for part in shares(mode, spread, mask, 4)]

    assert of("release") == [[1, 0], [0, 0.25]]
    assert of("precision_weight") == [[1, 1], [0, 0]]
    assert of("precision_weight", torch.tensor([[True, True]])) == [[1, 0.25], [0, 0]]
    for mode in ("include_primary", "rewarded"):
        own, each = shares(mode, spread, uncertain, 4)
        torch.testing.assert_close(own, torch.tensor([[1, 0.2]]))
        torch.testing.assert_close(own + 4 * each, torch.ones(1, 2))


def test_consistency_by_hand():
    """Cosines to the final token before and after: 0 -> 1, 1 -> 0, 0.6 -> 0.8, twice the same."""
    final = torch.tensor([[[1.0, 0.0]] * 4])
    before = torch.tensor([[[0.0, 2.0], [3.0, 0.0], [3.0, 4.0], [0.0, 1.0]]])
    now = torch.tensor([[[5.0, 0.0], [0.0, 1.0], [4.0, 3.0], [0.0, 9.0]]])
    gain = approach(now, before, final)
    torch.testing.assert_close(gain, torch.tensor([[1.0, -1.0, 0.2, 0.0]]))
    step, later = torch.full((1, 4), 2), torch.full((1, 4), 3)
    kept = [consistent(gain, step, later, threshold)[0].int().tolist() for threshold in (-2.0, -0.5, 0.0, 0.5, 2.0)]
    assert kept == [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert consistent(gain, step, torch.tensor([[2, 2, 3, 3]]), 2.0)[0].int().tolist() == [1, 1, 0, 0], "settled now: always"
    assert consistent(gain, torch.zeros_like(step), later, 2.0).all(), "nothing comes before step 0"


@pytest.mark.parametrize("config", [{"trajectories": mode} for mode in MODES] + [RELEASE], ids=str)
def test_the_spread_is_shown_on_every_row_of_its_picture(config):
    """And is that of the further paths of the plain form, whose rows are pictures."""
    (plain,) = collected(mar_grpo(), GaussianPolicy())
    (piece,) = collected(mar_grpo(ar_steps=2, **config), GaussianPolicy())
    assert plain.shown["spread"].shape == (12, 4)
    assert plain.metrics["trajectory_spread"] == pytest.approx(plain.shown["spread"].mean().item())
    assert torch.equal(piece.shown["spread"], plain.shown["spread"].repeat_interleave(len(piece) // 12, 0))
    (without,) = collected(mar_grpo(num_trajectories=0), GaussianPolicy())
    assert not without.shown


# ---- the policy of these tests


def test_protocols():
    assert isinstance(GaussianPolicy(), RedrawingPolicy)
    assert not isinstance(TabularPolicy(), RedrawingPolicy)
    assert isinstance(mar_grpo(), Algorithm)


def test_residuals_of_paths_are_standard_normal():
    policy = GaussianPolicy(tokens=8, steps=1)
    prompts, rng = [Prompt(label=1)] * 400, Stream(seed=1, rows=tuple(range(400)))
    rollout = policy.redraw(policy.rollout(prompts, rng), rng.at("again"))
    zeros = torch.zeros_like(rollout.actions[:, :, -1])
    law = policy.law(rollout.actions, policy.z(policy.module, prompts, zeros, rollout.step < 0).detach())
    residual = (rollout.actions[:, :, 1:-1] - law.loc) / law.scale
    spread = math.sqrt(2 / residual[:, :, 0].numel())
    torch.testing.assert_close(residual.mean((0, 1, 3)), torch.zeros(3).double(), rtol=0, atol=4 * spread)
    torch.testing.assert_close(residual.var((0, 1, 3)), torch.ones(3).double(), rtol=0, atol=4 * spread)


@pytest.mark.parametrize("config", [{"trajectories": mode} for mode in MODES] + [RELEASE, {**RELEASE, "consistency": 0.0}], ids=str)
def test_before_the_first_update_the_replay_is_exact(config):
    policy, algorithm = GaussianPolicy().with_reference(), mar_grpo(denoise_moves=2, **config)
    (piece,) = collected(algorithm, policy)
    objective, metrics = algorithm.objective(policy, piece)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-12
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["kl"] == 0
    assert objective.isfinite()
    assert piece.rollout.logp.abs().max() > 1


def test_only_what_learns_is_scored():
    """One of four tokens is uncertain: two further paths of it, and 3 moves each."""
    policy, algorithm = GaussianPolicy(), mar_grpo(trajectories="release", uncertain_fraction=0.25)
    (piece,) = collected(algorithm, policy)
    policy.moves_scored = 0
    algorithm.objective(policy, piece)
    assert policy.moves_scored == 12 * (4 + 2 * 1) * 3


# ---- limiting cases


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_without_trajectories_and_with_all_steps_and_moves_it_is_grpo(loss_type):
    policy, config = GaussianPolicy().with_reference(), replace(GRPO4, loss_type=loss_type, panw_alpha=0.7, beta=0.1)
    (plain,), (piece,) = collected(GRPO(config), policy), collected(mar_grpo(num_trajectories=0, grpo=config), policy)
    for name in ("advantage", "weight", "kl_weight"):
        assert torch.equal(getattr(piece, name), getattr(plain, name))
    torch.testing.assert_close(piece.size, plain.size * 9)
    assert torch.equal(piece.rollout.logp, plain.rollout.logp)
    objective, metrics = mar_grpo(grpo=config).objective(policy, piece)
    expected, of_plain = GRPO(config).objective(policy, plain)
    assert objective == expected
    assert metrics == of_plain
    assert piece.metrics == plain.metrics


@pytest.mark.parametrize("mode", MODES)
def test_with_no_uncertain_token_it_is_grpo(mode):
    policy = GaussianPolicy()
    (plain,), (piece,) = collected(GRPO(GRPO4), policy), collected(mar_grpo(trajectories=mode, uncertain_fraction=0.0), policy)
    assert len(piece) == 12
    for name in ("advantage", "weight", "kl_weight"):
        assert torch.equal(getattr(piece, name), getattr(plain, name))


def test_where_all_are_uncertain_the_release_forgets_the_path_that_made_the_picture():
    (piece,) = collected(mar_grpo(trajectories="release", uncertain_fraction=1.0), GaussianPolicy())
    weight = piece.weight.reshape(12, 3, 4)
    assert weight[:, 0].eq(0).all()
    assert weight[:, 1:].eq(0.5).all()
    assert torch.equal(piece.advantage.reshape(12, 3, 4)[:, 0], piece.advantage.reshape(12, 3, 4)[:, 2])
    assert piece.kl_weight.reshape(12, 3, 4)[:, 0].eq(1).all()
    assert piece.kl_weight.reshape(12, 3, 4)[:, 1:].eq(0).all()
    assert piece.size.tolist() == [36, 0, 0] * 12
    assert piece.judgement.value.isnan().tolist() == [False, True, True] * 12


def test_a_filter_that_nobody_fails_changes_nothing():
    policy = GaussianPolicy(tokens=6, steps=3)
    (all_,), (kept,) = collected(mar_grpo(**RELEASE), policy), collected(mar_grpo(**RELEASE, consistency=-3.0), policy)
    assert kept.metrics["consistent"] == 1
    for name in ("advantage", "weight", "kl_weight", "size"):
        assert torch.equal(getattr(all_, name), getattr(kept, name))
    assert torch.equal(all_.rollout.logp, kept.rollout.logp)


def test_a_filter_that_all_fail_leaves_what_the_step_settled():
    policy = GaussianPolicy(tokens=6, steps=3)
    (piece,) = collected(mar_grpo(**{**RELEASE, "num_trajectories": 0}, consistency=3.0), policy)
    rollout = piece.rollout
    settled = rollout.chain.settled == rollout.step
    torch.testing.assert_close(piece.weight, torch.where(rollout.step == 0, 1 / 6, settled / 2))
    torch.testing.assert_close(piece.kl_weight.sum(1), torch.ones(36))
    assert torch.equal(piece.kl_weight > 0, rollout.chain.settled >= rollout.step), "the KL sees all unknown tokens"
    shown = {name: value for name, value in piece.metrics.items() if name.startswith("consistent")}
    assert shown == pytest.approx({"consistent": 10 / 12, "consistent/step_0": 1, "consistent/step_1": 0.5, "consistent/step_2": 1})


def test_a_committed_token_has_the_same_path_in_both_supports():
    policy = GaussianPolicy(tokens=6, steps=3)
    (committed,) = collected(mar_grpo(num_trajectories=0), policy)
    (unknown,) = collected(mar_grpo(**{**RELEASE, "num_trajectories": 0}), policy)
    rollout = unknown.rollout
    own = rollout.chain.settled == rollout.step
    assert torch.equal((rollout.logp * own).reshape(12, 3, 6).sum(1), committed.rollout.logp)
    assert (rollout.logp != 0)[rollout.sampled].all()


# ---- what composes


def test_panw_weighs_the_steps_of_all_paths():
    """Steps of 2 and 3 tokens: the trained tokens of a picture keep PANW's weights, shared between the paths."""
    policy, grpo = GaussianPolicy(tokens=5, steps=2), replace(GRPO4, panw_alpha=0.7)
    (piece,) = collected(mar_grpo(grpo=grpo, trajectories="include_primary", uncertain_fraction=0.4), policy)
    rollout = piece.rollout
    panw = token_weights(rollout.step[::3], torch.ones_like(rollout.sampled[::3]), 0.7)
    assert len(panw.unique()) == 2
    torch.testing.assert_close(piece.weight.reshape(12, 3, 5).sum(1), panw)
    torch.testing.assert_close(piece.kl_weight[::3], panw)
    assert (piece.weight[1::3] > 0).sum(1).tolist() == [2] * 12


def test_region_credit_and_masks_reach_further_pictures():
    """Two regions, left and right half; the picture's advantage in each is its own."""

    def halves(images, prompts):
        part = images.mean((1, 2)).unflatten(1, (2, 2)).sum(-1).float()
        box = torch.tensor([[0.0, 0, 0.5, 1], [0.5, 0, 1, 1]]).expand(len(part), -1, -1).clone()
        return Judgement(value=part.sum(1), region_value=part, region_box=box)

    grpo = replace(GRPO4, region_credit=True, mask_dilation=0, scale_rewards="none")
    (piece,) = collected(mar_grpo(grpo=grpo, trajectories="rewarded", uncertain_fraction=1.0), GaussianPolicy(), halves)
    advantage, part = piece.advantage.reshape(3, 4, 3, 4), piece.judgement.region_value.reshape(3, 4, 3, 2)
    assert torch.equal(advantage[..., 0], advantage[..., 1])
    nested = 1.5 * (part - part.mean(2, keepdim=True))
    torch.testing.assert_close(advantage[:, :, 1:, ::2], nested[:, :, 1:])
    torch.testing.assert_close(advantage[:, :, 0, ::2], part[:, :, 0] - part[:, :, 0].mean(1, keepdim=True))


def test_nested_advantages_by_hand():
    part = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])[:, None]
    got = nested_advantages(part, group=1, paths=3, scale="none")
    assert got.flatten().tolist() == pytest.approx([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0])


def test_a_further_picture_that_could_not_be_judged_learns_nothing():
    def half_blind(images, prompts):
        return brightness(images, prompts).float().masked_fill(torch.arange(len(prompts)) % 3 == 1, NAN)

    (piece,) = collected(mar_grpo(trajectories="rewarded", uncertain_fraction=1.0), GaussianPolicy(), half_blind)
    assert piece.weight.reshape(12, 3, 4).sum((0, 2)).tolist() == pytest.approx([16, 0, 16])
    assert piece.metrics["judged"] == 36
    assert piece.metrics["reward_failed"] == 0, "of the pictures that were drawn, not of their further paths"


@pytest.mark.parametrize("config", [{"trajectories": mode} for mode in MODES] + [{**RELEASE, "consistency": 0.0}], ids=str)
def test_chunks_and_micro_batches_change_nothing(config):
    policy = GaussianPolicy(tokens=5, steps=2).with_reference()
    with torch.no_grad():
        for weight in policy.module.parameters():
            weight.add_(0.05)
    want = None
    for chunk, piece_rows in ((32, 99), (4, 99), (32, 7)):
        grpo = replace(config.get("grpo", GRPO4), rollouts_per_chunk=chunk, beta=0.1)
        algorithm = mar_grpo(**{**config, "ar_steps": 1, "denoise_moves": 2, "grpo": grpo})
        before = torch.random.get_rng_state()
        pieces = collected(algorithm, policy)
        assert torch.equal(torch.random.get_rng_state(), before)
        parts = [part for piece in pieces for part in piece.split(piece_rows)]
        got = gradients(policy, total(algorithm, policy, parts))
        same(got, want or got)
        want = got


# ---- what is left alone


def test_gradient_reaches_the_latents_of_the_support_and_no_other():
    policy, algorithm = GaussianPolicy(tokens=6, steps=3), mar_grpo(ar_steps=1, trajectories="release")
    (piece,) = collected(algorithm, policy)
    algorithm.objective(policy, piece)[0].backward()
    for i, latent in enumerate(policy.latents):
        here = (piece.rollout.step == i) & (piece.weight > 0)
        assert torch.equal(latent.grad.ne(0).any(-1), here)
    assert piece.weight.gt(0).reshape(12, 3, 6).any(1).sum(1).tolist() == [2] * 12


@pytest.mark.parametrize("config", [{"trajectories": mode} for mode in MODES] + [{**RELEASE, "consistency": 0.0}], ids=str)
def test_gradient_by_finite_differences(config):
    """Of the objective at ratio 1, along a random direction."""
    policy = GaussianPolicy().with_reference()
    algorithm = mar_grpo(denoise_moves=2, **{**config, "grpo": replace(config.get("grpo", GRPO4), beta=0.1)})
    pieces = collected(algorithm, policy)
    gradient = gradients(policy, total(algorithm, policy, pieces))
    direction = [torch.randn(part.shape, generator=torch.Generator().manual_seed(1), dtype=part.dtype) for part in gradient]
    slope = sum((a * b).sum() for a, b in zip(gradient, direction, strict=True)).item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, part in zip(policy.module.parameters(), direction, strict=True):
                weight.add_(sign * 1e-5 * part)
            values.append(total(algorithm, policy, pieces).item())
            for weight, part in zip(policy.module.parameters(), direction, strict=True):
                weight.sub_(sign * 1e-5 * part)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


# ---- KL


def test_kl_of_moved_latents_is_that_of_gaussians_and_k3s_mean():
    """Latents moved by delta: b^2 delta^2 / (2 sigma^2) for each number and move, wherever the path is. k3 on the log-densities has that
    mean."""
    policy = GaussianPolicy(tokens=1, numbers=1, steps=1).with_reference()
    with torch.no_grad():
        policy.module.bias += 0.3
    rows = 5000
    rollout = policy.rollout([Prompt(label=1)] * rows, Stream(seed=2, rows=tuple(range(rows))))
    score = policy.score(rollout)
    exact = sum((b * 0.3) ** 2 / (2 * sigma**2) for b, sigma in zip(policy.drive[:3], policy.sigma[:3], strict=True))
    torch.testing.assert_close(score.kl, torch.full_like(score.kl, exact))
    sample = k3(score.logp, score.ref_logp).detach()
    assert abs(sample.mean().item() - exact) < 4 * sample.std().item() / math.sqrt(rows)
    assert kl_divergence(Normal(0.0, 2.0), Normal(1.0, 2.0)).item() == pytest.approx(1 / 8)


# ---- what further paths are worth: a single token, its latent a constant, 2048 pictures of one prompt

COUNT = 2048


@pytest.fixture(scope="module")
def single():
    policy = GaussianPolicy(tokens=1, numbers=1, steps=1)
    policy.sigma = (0.5, 1.0, 0.3, 0.0)
    return policy


def estimates(policy, reward=far_from_flat, fixed=False, **config):
    """[P * G] contributions of each picture, with its further paths, to the gradient by the latent; checked against autograd elsewhere."""
    grpo = GRPOConfig(num_generations=4, scale_rewards="none", rollouts_per_chunk=COUNT)
    algorithm = mar_grpo(grpo=grpo, **{"uncertain_fraction": 1.0, **config})
    prompts = [Prompt(label=1)] * (COUNT // 4)
    (piece,) = collected(algorithm, policy, reward, prompts, Stream(seed=3, rows=tuple(range(len(prompts)))))
    advantage = torch.ones_like(piece.advantage) if fixed else piece.advantage
    each = (piece.weight * advantage)[:, 0] * score_of_paths(policy, piece.rollout)[:, 0, 0]
    return each.reshape(COUNT, -1).sum(1)


def test_the_closed_form_of_the_score_is_autograds(single):
    rollout = single.rollout([Prompt(label=1)], Stream(seed=3, rows=(0,)))
    single.score(rollout).logp.sum().backward()
    torch.testing.assert_close(single.latents[0].grad, score_of_paths(single, rollout))


def within(value, expected, errors=4.0):
    """Its mean, by its own standard error."""
    return abs(value.mean().item() - expected) < errors * value.std().item() / math.sqrt(len(value))


@pytest.mark.parametrize("paths", [1, 4, 16, 48])
def test_the_release_silences_a_token_and_leaves_one_mth_of_the_noise(single, paths):
    """A fixed: the mean is 0 for any M, and the mean square that of a single path over M (within 4 standard errors, 13 % here)."""
    fisher = sum((b / sigma) ** 2 for b, sigma in zip(single.drive[:3], single.sigma[:3], strict=True))
    got = estimates(single, fixed=True, trajectories="release", num_trajectories=paths)
    assert within(got, 0.0)
    assert (got.square().mean() * paths / fisher).item() == pytest.approx(1, abs=4 * math.sqrt(2 / COUNT))


def test_precision_weight_keeps_the_direction_of_each_token():
    """For the same paths, its term is the single path's times a weight that the path had no part in."""
    policy = GaussianPolicy(tokens=4, steps=1)
    (plain,), (piece,) = collected(GRPO(GRPO4), policy), collected(mar_grpo(num_trajectories=3), policy)
    assert torch.equal(piece.rollout.actions, plain.rollout.actions)
    (other,) = collected(mar_grpo(num_trajectories=3), policy, far_from_flat)
    assert torch.equal(piece.weight, other.weight)
    assert 0 < piece.weight.min() <= piece.weight.max() == 1
    (wide,) = collected(mar_grpo(num_trajectories=3, uncertain_fraction=1.0), policy)
    assert wide.weight.lt(1).sum() == 12 * 3, "all but the least uncertain of each picture"


def reward_is_the_token(images, prompts):
    return (images[:, 0, 0, 0] - 0.5) * 8


def test_only_a_path_that_is_paid_for_its_own_picture_has_the_gradient_of_the_reward(single):
    """R is the token, so dE[R]/dz is known; groups of four keep 3/4 of it for paths set against their group. Within 4 standard errors; the
    release's and the true value lie further apart than that."""
    true = token_mean(single)
    primary = estimates(single, reward_is_the_token, num_trajectories=0)
    assert within(primary, 0.75 * true)
    release = estimates(single, reward_is_the_token, trajectories="release", num_trajectories=4)
    assert within(release, 0.0)
    assert not within(release, 0.75 * true)
    joined = estimates(single, reward_is_the_token, trajectories="include_primary", num_trajectories=3)
    assert within(joined, 0.75 * true / 4)
    assert not within(joined, 0.75 * true)
    rewarded = estimates(single, reward_is_the_token, trajectories="rewarded", num_trajectories=3)
    assert within(rewarded, (0.75 + 3) / 4 * true)
    assert rewarded.var() < 0.5 * primary.var()


def test_uncertainty_finds_the_spread_of_tokens(single):
    rng = Stream(seed=4, rows=tuple(range(8)))
    rollout = single.rollout([Prompt(label=1)] * 8, rng)
    paths = single.redraw(rollout, rng.repeat(500))
    spread = uncertainty(paths.actions[:, :, -1].unflatten(0, (8, 500)))
    torch.testing.assert_close(spread, torch.full_like(spread, token_std(single)), rtol=4 / math.sqrt(1000), atol=0)


def test_an_early_look_is_drawn_towards_the_later_latent():
    """The release on unknown tokens: paths from the latent that made the picture, scored under an earlier one, have the expected score
    (z_later - z_early) times sum b^2 / sigma^2. On settled tokens it is 0."""
    policy, count = GaussianPolicy(tokens=2, numbers=1, steps=2), 2000
    grpo = replace(GRPO4, loss_type="grpo", rollouts_per_chunk=8)
    algorithm = mar_grpo(**{**RELEASE, "grpo": grpo}, ar_steps=0, uncertain_fraction=1.0, num_trajectories=count)
    (piece,) = collected(algorithm, policy, far_from_flat, [Prompt(label=1)], Stream(seed=3, rows=(0,)))
    metrics = algorithm.objective(policy, piece)[1]
    assert metrics["sampling/law_difference/max"] > 0.1, "two laws, and the metrics say so"
    rows = piece.rollout.rows(range(count + 1))
    assert rows.step.eq(0).all()
    score = score_of_paths(policy, rows)[1:, :, 0]
    policy.score(rows)
    early, late = (latent[0, :, 0].detach() for latent in policy.latents)
    fisher = sum((b / sigma) ** 2 for b, sigma in zip(policy.drive[:3], policy.sigma[:3], strict=True))
    for token, settled in enumerate(rows.chain.settled[0].tolist()):
        expected = fisher * (late - early)[token].item() if settled == 1 else 0.0
        assert within(score[:, token], expected)
        assert settled == 0 or not within(score[:, token], 0.0)


# ---- bad input


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"ar_steps": -1}, "ar_steps=-1"),
        ({"denoise_moves": -1}, "denoise_moves=-1"),
        ({"num_trajectories": -1}, "num_trajectories=-1"),
        ({"uncertain_fraction": 1.1}, "uncertain_fraction=1.1"),
        ({"num_trajectories": 1, "trajectories": "release"}, "does not spread"),
        ({"num_trajectories": 1, "uncertain_fraction": 1.0}, "does not spread"),
        ({"consistency": 0.0}, "does nothing"),
        ({"support": "unknown"}, "loss_type='dapo'"),
        ({"support": "unknown", "grpo": replace(GRPO4, loss_type="grpo", panw_alpha=0.7)}, "panw_alpha=0.7"),
        ({**RELEASE, "trajectories": "rewarded"}, "no picture"),
    ],
    ids=str,
)
def test_settings_that_contradict_one_another_are_refused(config, says):
    with pytest.raises(ConfigError, match=says):
        MARGRPOConfig(**config)


@pytest.mark.parametrize(
    ("config", "policy", "says"),
    [
        ({"ar_steps": 3}, GaussianPolicy(), "ar_steps=3: this model has 2 steps"),
        ({"denoise_moves": 4}, GaussianPolicy(), "only 3 of the 4 moves are admissible"),
        ({}, TabularPolicy(), "masked model"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(config, policy: Policy, says):
    with pytest.raises(ConfigError, match=says):
        collected(mar_grpo(**config), policy)
