import math
from dataclasses import replace
from itertools import combinations_with_replacement, permutations, product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tabular import InstantJudge, TabularPolicy, brightness, gradients, pick
from teacher_forced import TeacherForcedTabular, tokens_as_picture
from varl.algorithms.advantages import group_advantages, sibling_advantages
from varl.algorithms.va_pi import VAPI, shuffled
from varl.build import build_algorithm
from varl.config import GRPOConfig, LawConfig, RasterConfig, ReconstructionConfig, RunConfig, VAPIConfig, VQConfig
from varl.errors import ConfigError
from varl.models.raster import Raster
from varl.policies import sampling
from varl.policies.raster import RasterPolicy, corrupt
from varl.rewards.reconstruction import ReconstructionReward, mean_squared_error
from varl.rng import Stream
from varl.tokenizers import vq
from varl.tokenizers.vq import VQ
from varl.types import Algorithm, Judgement, Prompt, Score, TeacherForcedPolicy

NAN = torch.nan
OWN = torch.tensor([[0, 1, 2], [2, 2, 1], [1, 0, 0]])
"""Tokens of the three real pictures."""
REAL = {f"{i}": tokens_as_picture(OWN, 3)[i] for i in range(3)}
PROMPTS = [Prompt(label=1, image="0"), Prompt(label=2, image="1"), Prompt(label=1, image="2")]
RNG = Stream(seed=5, path=("rollout", 0), rows=(0, 1, 2))
GRPO4 = GRPOConfig(num_generations=4)


def pictures(prompts):
    return torch.stack([REAL[prompt.image] for prompt in prompts])


def va_pi(grpo=GRPO4, **config):
    return VAPI(VAPIConfig(grpo=grpo, **{"drop_condition": 0.0, **config}), pictures)


def collected(algorithm, policy, reward=brightness, prompts=PROMPTS, rng=RNG):
    return list(algorithm.collect(policy, prompts, InstantJudge(reward), rng, 0))


def total(algorithm, policy, pieces):
    """What the loop does: the sum of the pieces' objectives over the sum of their sizes."""
    return sum(algorithm.objective(policy, piece)[0] for piece in pieces) / sum(piece.size.sum() for piece in pieces)


def constant(images, prompts):
    return torch.ones(len(prompts))


def close(got, want, rtol):
    """Gradients, each within `rtol` of the largest entry of all."""
    scale = max(float(part.abs().max()) for part in want)
    assert scale > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * scale)


def own_nll(policy, context):
    """Mean cross-entropy of the pictures' own tokens in a context, nats per token."""
    return -pick(policy.law(policy.module, PROMPTS, context), OWN).mean()


# ---- what a step learns from


def test_protocols():
    assert isinstance(TeacherForcedTabular(), TeacherForcedPolicy)
    assert not isinstance(TabularPolicy(), TeacherForcedPolicy)
    assert isinstance(va_pi(), Algorithm)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_a_picture_is_g_draws_and_its_own_tokens_in_one_context(noise):
    policy = TeacherForcedTabular()
    (piece,) = collected(va_pi(prefix_noise=noise), policy)
    rollout = piece.rollout
    context = rollout.context.reshape(3, 5, 3)
    assert torch.equal(context, context[:, :1].expand_as(context))
    assert torch.equal(rollout.actions.reshape(3, 5, 3)[:, 4], OWN)  # clean, whatever their context
    assert rollout.sampled.reshape(3, 5, 3).all(2).tolist() == [[True] * 4 + [False]] * 3
    assert [prompt.image for prompt in rollout.prompts] == ["0"] * 5 + ["1"] * 5 + ["2"] * 5
    assert rollout.index.tolist() == [0, 1, 2, 3, 0, 4, 5, 6, 7, 1, 8, 9, 10, 11, 2]
    changed = (context[:, 0] != OWN)[:, :2]
    assert not (noise == 0 and changed.any())
    assert not (noise == 1 and not changed.all())
    for part in (piece.weight, piece.kl_weight, piece.advantage, rollout.logp):
        assert part[4::5].eq(0).all()
        assert part.reshape(3, 5, 3)[:, :4].ne(0).all()
    assert piece.size.tolist() == [3, 3, 3, 3, 0] * 3
    assert piece.judgement.value.isnan().tolist() == [False] * 4 * 1 + [True] + ([False] * 4 + [True]) * 2
    assert piece.metrics["judged"] == 12


def test_before_the_first_update_the_replay_is_exact():
    policy = TeacherForcedTabular()
    algorithm = va_pi(prefix_noise=0.3, drop_condition=0.5)
    (piece,) = collected(algorithm, policy)
    objective, metrics = algorithm.objective(policy, piece)
    assert metrics["sampling/sampling_logp_difference/max"] == 0
    assert metrics["clip_ratio/region_mean"] == 0
    drawn = piece.rollout.sampled.any(1)
    assert metrics["entropy"] == pytest.approx(policy.score(piece.rollout).entropy[drawn].mean().item(), rel=1e-6)
    assert objective.isfinite()


def test_one_forward_pass_for_each_picture():
    policy, algorithm = TeacherForcedTabular(), va_pi(prefix_noise=0.5)
    (piece,) = collected(algorithm, policy)
    policy.contexts_read = 0
    algorithm.objective(policy, piece)
    assert policy.contexts_read == 3
    for part in piece.split(5):
        algorithm.objective(policy, part)
    assert policy.contexts_read == 6


def test_parts_of_the_reward_are_reported_of_the_draws_alone():
    def parts(images, prompts):
        value = brightness(images, prompts)
        return Judgement(value=value, parts={"half": value / 2})

    (piece,) = collected(va_pi(), TeacherForcedTabular(), parts)
    value = piece.judgement.value.reshape(3, 5)[:, :4]
    assert piece.metrics["reward"] == pytest.approx(value.mean().item())
    assert piece.metrics["rewards/half/mean"] == pytest.approx(value.mean().item() / 2)
    assert piece.judgement.parts["half"][4::5].isnan().all()


def test_a_failed_judgement_keeps_the_prior():
    def half_blind(images, prompts):
        return brightness(images, prompts).masked_fill(torch.arange(len(prompts)) % 2 == 0, NAN)

    policy, algorithm = TeacherForcedTabular(), va_pi()
    (piece,) = collected(algorithm, policy, half_blind)
    assert piece.metrics["reward_failed"] == 0.5
    assert piece.weight.sum(1).tolist() == [0, 3, 0, 3, 0] * 3
    (blind,) = collected(algorithm, policy, lambda images, prompts: torch.full((len(prompts),), NAN))
    torch.testing.assert_close(total(algorithm, policy, [blind]), -0.1 * own_nll(policy, OWN))


# ---- the condition


def test_the_condition_is_dropped_once_for_a_picture_and_the_judge_knows_the_prompt():
    shown = []

    def reward(images, prompts):
        shown.extend(prompts)
        return brightness(images, prompts)

    prompts, rng = PROMPTS * 20, Stream(seed=5, path=("rollout", 0), rows=tuple(range(60)))
    gone = rng.at("condition").uniform() < 0.4
    assert 10 < gone.sum() < 50
    pieces = collected(va_pi(drop_condition=0.4), TeacherForcedTabular(), reward, prompts, rng)
    seen = [prompt for piece in pieces for prompt in piece.rollout.prompts]
    expected = [Prompt(image=p.image) if away else p for p, away in zip(prompts, gone.tolist(), strict=True)]
    assert seen == [prompt for prompt in expected for _ in range(5)]
    assert shown == [prompt for prompt in prompts for _ in range(4)]


# ---- the policy gradient, by enumeration

SEQUENCES = torch.cartesian_prod(*[torch.arange(2)] * 3)


def problem():
    """(law [L, V], reward of each of the 8 sequences, their probabilities, gradient of log-probability by logits [8, L, V]), fp64."""
    policy = TeacherForcedTabular(vocab=2, spread=1.0, dtype=torch.float64)
    real = torch.rand(1, 3, 1, 3, generator=torch.Generator().manual_seed(4))
    own = policy.encode(real, [Prompt(label=1)])
    law = policy.law(policy.module, own.prompts, own.actions)[0].detach()
    every = policy.given([Prompt(label=1)] * 8, SEQUENCES, range(8))
    reward = -mean_squared_error(policy.decode(every).double(), real.double().expand(8, -1, -1, -1))
    logp = pick(law.expand(8, -1, -1), SEQUENCES).sum(1)
    return law, reward, logp.exp(), torch.nn.functional.one_hot(SEQUENCES, 2) - law.exp()


def expected_gradient(estimate, group):
    """Of (1/G) sum_g A_g grad log q(x_g), over all groups of G draws: as multisets, each with its multinomial probability."""
    _, reward, probability, score = problem()
    groups = torch.tensor(list(combinations_with_replacement(range(8), group)))
    count = torch.nn.functional.one_hot(groups, 8).sum(1)
    ways = math.lgamma(group + 1) - torch.lgamma(count.double() + 1).sum(1)
    weight = (ways + (count * probability.log()).sum(1)).exp()
    assert weight.sum().item() == pytest.approx(1, abs=1e-12)
    advantage = estimate(reward[groups])
    credit = torch.zeros(len(groups), 8, dtype=torch.float64).scatter_add(1, groups, advantage)
    return torch.einsum("n,nz,zlv->lv", weight, credit, score) / group


def exact_gradient():
    _, reward, probability, score = problem()
    return torch.einsum("z,z,zlv->lv", probability, reward, score)


def test_gradient_by_a_logit_is_what_that_token_is_worth():
    """dJ/dlogit[t, v] = p_t(v) (E[R | x_t = v] - J)."""
    law, reward, probability, _ = problem()
    mean = (probability * reward).sum()
    for t, v in product(range(3), range(2)):
        there = SEQUENCES[:, t] == v
        given = (probability * reward)[there].sum() / probability[there].sum()
        assert exact_gradient()[t, v].item() == pytest.approx((law[t, v].exp() * (given - mean)).item(), abs=1e-15)


@pytest.mark.parametrize(("group", "factor"), [(2, 0.5), (4, 0.75), (8, 0.875)])
def test_the_groups_mean_as_baseline_shrinks_the_gradient_by_one_part_in_g(group, factor):
    got = expected_gradient(lambda value: group_advantages(value, "none"), group)
    torch.testing.assert_close(got, factor * exact_gradient(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_the_mean_of_the_others_as_baseline_is_unbiased(group):
    got = expected_gradient(lambda value: sibling_advantages(value[:, None, :, None], "none")[:, 0, :, 0], group)
    torch.testing.assert_close(got, exact_gradient(), rtol=1e-9, atol=1e-12)


def test_dividing_by_the_groups_deviation_turns_the_gradient_a_little_and_less_for_larger_groups():
    """Biased: right only in direction, and that nearly."""
    exact = exact_gradient().flatten()
    cosines = [torch.cosine_similarity(expected_gradient(group_advantages, group).flatten(), exact, dim=0).item() for group in (2, 4, 8)]
    assert cosines == pytest.approx([0.98198, 0.99643, 0.99921], abs=1e-5)


class Scripted(TeacherForcedTabular):
    """Draws what it is told to."""

    script: torch.Tensor

    def draw(self, given, rng, *, prefix_noise):
        drawn = super().draw(given, rng, prefix_noise=prefix_noise)
        law = self.law(self.module, drawn.prompts, drawn.context)
        return replace(drawn, actions=self.script, logp=pick(law, self.script).detach())


def test_expected_gradient_of_the_algorithm_itself():
    """Every pair of draws once, each weighed by its probability: the gradient is (G - 1) / G of E[R]'s."""
    policy = Scripted(vocab=2, spread=1.0, dtype=torch.float64)
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    policy.script = SEQUENCES[pairs.flatten()]
    real = tokens_as_picture(torch.tensor([[1, 0, 1]]), 2)
    algorithm = VAPI(
        VAPIConfig(
            grpo=GRPOConfig(num_generations=2, scale_rewards="none", rollouts_per_chunk=128),
            prefix_noise=0.0,
            prior_weight=0.0,
            drop_condition=0.0,
        ),
        lambda prompts: real.expand(len(prompts), -1, -1, -1),
    )
    prompt = Prompt(label=2, image="real")
    (piece,) = collected(algorithm, policy, brightness, [prompt] * 64, Stream(seed=0, rows=tuple(range(64))))
    law = policy.law(policy.module, [prompt], torch.tensor([[1, 0, 1]]))[0]
    probability = pick(law.expand(8, -1, -1), SEQUENCES).sum(1).exp()
    reward = brightness(policy.decode(policy.given([prompt] * 8, SEQUENCES, range(8))), [prompt] * 8)
    weight = probability.detach()[pairs].prod(1).repeat_interleave(3)[:, None]
    objective, _ = algorithm.objective(policy, replace(piece, weight=piece.weight * weight))
    got = gradients(policy, objective / 2)
    close(got, [0.5 * part for part in gradients(policy, (probability * reward).sum())], rtol=1e-6)


# ---- one forward pass against G


def released_loss(logits, ids, own, advantage, old_logp, clip, prior_weight):
    """The loss that is minimised in the release, from logits [P*G, L, V] of contexts that were forwarded G times: PPO's larger of two, mean
    over tokens then sequences, and the cross-entropy of each picture's own tokens once for each draw."""
    logp = logits.log_softmax(-1)
    ratio = (pick(logp, ids) - old_logp).exp()
    losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return losses.mean(1).mean() + prior_weight * torch.nn.functional.cross_entropy(logits.flatten(0, 1), own.flatten())


def sparse_loss(logits, ids, own, advantage, prior_weight):
    """The same where nothing was updated yet: logits [P, L, V] of contexts forwarded once, ids and advantage [P, G, L]. With sum_g A = 0
    the softmax drops out, and only the logits of what was drawn are needed."""
    chosen = logits.gather(-1, ids.transpose(1, 2)).transpose(1, 2)
    prior = logits.logsumexp(-1) - pick(logits, own)
    return -(advantage * chosen).mean() + prior_weight * prior.mean()


@pytest.mark.parametrize("updates", [0, 1], ids=["on-policy", "off-policy"])
def test_gradient_equals_the_released_form(updates):
    policy = TeacherForcedTabular(vocab=5, dtype=torch.float64)
    algorithm = va_pi(prefix_noise=0.5, prior_weight=0.3)
    (piece,) = collected(algorithm, policy)
    if updates:
        with torch.no_grad():
            for weight in policy.module.parameters():
                weight.add_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype))
        assert algorithm.objective(policy, piece)[1]["clip_ratio/region_mean"] > 0.05
    drawn = piece.rows([row for row in range(15) if row % 5 < 4])
    logits = policy.law(policy.module, drawn.rollout.prompts, drawn.rollout.context) + 1.7  # any logits of that law
    own = piece.rollout.actions[4::5].repeat_interleave(4, 0)
    loss = released_loss(logits, drawn.rollout.actions, own, drawn.advantage, drawn.rollout.logp, 0.2, 0.3)
    want = gradients(policy, -loss)
    close(gradients(policy, total(algorithm, policy, [piece])), want, rtol=1e-6)
    if not updates:
        once = policy.law(policy.module, PROMPTS, drawn.rollout.context[::4]) - 0.4
        shape = (3, 4, 3)
        sparse = sparse_loss(once, drawn.rollout.actions.reshape(shape), own[::4], drawn.advantage.reshape(shape), 0.3)
        close(gradients(policy, -sparse), want, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_chunks_micro_batches_and_ranks_change_nothing(beta):
    policy = TeacherForcedTabular(dtype=torch.float64).with_reference()
    with torch.no_grad():
        next(policy.module.parameters()).add_(torch.tensor([[0.3], [-0.2], [0.1]]))

    def gradient(chunk, micro, order=(0, 1, 2), ranks=1):
        algorithm = va_pi(GRPOConfig(num_generations=4, rollouts_per_chunk=chunk, beta=beta), prefix_noise=0.5, drop_condition=0.5)
        pieces = []
        for rank in range(ranks):
            mine = order[rank::ranks]
            pieces += collected(algorithm, policy, prompts=[PROMPTS[i] for i in mine], rng=RNG.select(mine))
        return gradients(policy, total(algorithm, policy, [part for piece in pieces for part in piece.split(micro)]))

    whole = gradient(99, 99)
    for chunk, micro in ((4, 99), (8, 5), (99, 10), (99, 3), (99, 1)):
        close(gradient(chunk, micro), whole, rtol=1e-6)
    close(gradient(99, 99, order=(2, 0, 1)), whole, rtol=1e-6)
    close(gradient(99, 99, ranks=2), whole, rtol=1e-6)


def raster_policy(vocab):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = VQConfig(vocab=vocab, channels=4, latent=4, width=8, multipliers=(1, 2), blocks=1, attention=False)
        config = RasterConfig(depth=2, width=16, heads=2, grid=(2, 3), mlp_width=24, num_classes=5, tokenizer=tokenizer)
        policy = RasterPolicy(Raster(config), VQ(tokenizer))
        for weight in policy.module.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return policy


def va_pi_on_noise():
    real = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    return VAPI(VAPIConfig(grpo=GRPO4, prefix_noise=0.5), lambda prompts: real[: len(prompts)])


def test_a_raster_model_has_the_gradient_of_one_forward_pass_for_each_row():
    policy, algorithm = raster_policy(vocab=10), va_pi_on_noise()
    (piece,) = collected(algorithm, policy)
    objective, metrics = algorithm.objective(policy, piece)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["prior/nll"] > 0.5
    rows = total(algorithm, policy, piece.split(1))
    close(gradients(policy, objective / 72), gradients(policy, rows), rtol=1e-5)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in tree_flatten(out)[0]:
            if isinstance(part, torch.Tensor):
                self.numbers = max(self.numbers, part.numel())
        return out


@pytest.mark.parametrize("sliced", [False, True])
def test_no_tensor_holds_the_logits_of_every_draw(monkeypatch, sliced):
    vocab, tokens, pictures = 512, 6, 3
    policy, algorithm = raster_policy(vocab), va_pi_on_noise()
    weights = vocab * 16
    if sliced:
        monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", tokens * vocab)
        monkeypatch.setattr(vq, "SEARCH_ELEMENTS", tokens * vocab)
    with Largest() as step:
        (piece,) = collected(algorithm, policy)
        total(algorithm, policy, [piece]).backward()
    assert step.numbers == (weights if sliced else pictures * tokens * vocab)
    drawn = policy.rollout(piece.rollout.prompts, RNG.repeat(5))
    with Largest() as apart:
        policy.score(drawn).logp.sum().backward()
    assert apart.numbers == (weights if sliced else 15 * tokens * vocab), "what it would be, had every row a context of its own"


# ---- the two terms alone


def test_equal_rewards_leave_the_prior():
    policy, algorithm = TeacherForcedTabular(), va_pi(prefix_noise=0.5, prior_weight=0.3)
    (piece,) = collected(algorithm, policy, constant)
    assert piece.advantage.eq(0).all()
    want = -0.3 * own_nll(policy, piece.rollout.context[::5])
    value = total(algorithm, policy, [piece])
    torch.testing.assert_close(value, want)
    close(gradients(policy, value), gradients(policy, want), rtol=1e-6)
    assert algorithm.objective(policy, piece)[1]["prior/nll"] == pytest.approx(-want.item() / 0.3, rel=1e-6)


def test_a_great_prior_weight_is_next_token_learning():
    policy, algorithm = TeacherForcedTabular(), va_pi(prior_weight=1e6)
    pieces = collected(algorithm, policy)
    close(gradients(policy, total(algorithm, policy, pieces) / 1e6), gradients(policy, -own_nll(policy, OWN)), rtol=1e-5)


def test_without_prior_the_own_tokens_teach_nothing():
    policy = TeacherForcedTabular()
    algorithm, other = va_pi(prior_weight=0.0), va_pi(prior_weight=0.7)
    (piece,) = collected(algorithm, policy)
    drawn = piece.rows([row for row in range(15) if row % 5 < 4])
    torch.testing.assert_close(algorithm.objective(policy, piece)[0], algorithm.objective(policy, drawn)[0])
    torch.testing.assert_close(
        (other.objective(policy, piece)[0] - algorithm.objective(policy, piece)[0]) / 36, -0.7 * own_nll(policy, OWN)
    )
    assert "prior/nll" not in algorithm.objective(policy, drawn)[1]


def test_prior_as_kl_is_that_of_the_shared_context():
    policy = TeacherForcedTabular().with_reference()
    with torch.no_grad():
        next(policy.module.parameters()).add_(torch.tensor([[0.3], [-0.2], [0.1]]))
    algorithm = va_pi(GRPOConfig(num_generations=4, beta=0.5), prefix_noise=0.5, prior_weight=0.0)
    (piece,) = collected(algorithm, policy, constant)
    context = piece.rollout.context[::5]
    law, reference = (policy.law(module, PROMPTS, context) for module in (policy.module, policy.reference))
    kl = (law.exp() * (law - reference)).sum(-1).mean()
    torch.testing.assert_close(total(algorithm, policy, [piece]), -0.5 * kl)
    assert algorithm.objective(policy, piece)[1]["kl"] == pytest.approx(kl.item(), rel=1e-5)


# ---- clip


class Told(TeacherForcedTabular):
    """Whose scores are given."""

    def __init__(self, logp):
        super().__init__()
        self.logp = logp

    def score(self, rollout):
        return Score(logp=self.logp, entropy=torch.zeros_like(self.logp))


def test_a_token_learns_nothing_just_where_the_clip_stops_it():
    algorithm = va_pi(prior_weight=0.3)
    (piece,) = collected(algorithm, TeacherForcedTabular())
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])[torch.arange(45) % 7].reshape(15, 3)
    logp = (piece.rollout.logp + ratio.log()).requires_grad_()
    algorithm.objective(Told(logp), piece)[0].backward()
    stopped = (piece.advantage > 0) & (ratio > 1.2) | (piece.advantage < 0) & (ratio < 0.8)
    drawn = piece.rollout.sampled
    assert torch.equal(logp.grad[drawn] == 0, stopped[drawn])
    assert 0 < stopped.sum() < drawn.sum()
    going = drawn & ~stopped
    torch.testing.assert_close(logp.grad[going], (ratio * piece.advantage)[going])
    torch.testing.assert_close(logp.grad[~drawn], torch.full((9,), 0.3 * 4))


def test_the_papers_ratio_of_whole_pictures_has_l_times_the_gradient():
    """Before an update, and without a clip to reach: exp(sum of log-ratios) A, mean over pictures."""
    policy, algorithm = TeacherForcedTabular(), va_pi(prior_weight=0.0)
    (piece,) = collected(algorithm, policy)
    drawn = piece.rows([row for row in range(15) if row % 5 < 4])
    whole = ((policy.score(drawn.rollout).logp - drawn.rollout.logp).sum(1).exp() * drawn.advantage[:, 0]).mean()
    token = gradients(policy, total(algorithm, policy, [piece]))
    close(gradients(policy, whole), [3 * part for part in token], rtol=1e-6)


# ---- the kernel


def transitions(share, vocab, levels):
    """[V, V]: how often each token becomes each other, over a grid of uniforms that is even in both directions."""
    first, second = (torch.arange(levels) + 0.5) / levels, (torch.arange(4 * (vocab - 1)) + 0.5) / (4 * (vocab - 1))
    uniform = torch.cartesian_prod(first, second)
    ids = torch.arange(vocab)[:, None].expand(vocab, len(uniform) + 1)  # the last token is never replaced
    padded = torch.cat([uniform, torch.zeros(1, 2)]).expand(vocab, -1, -1)
    found = corrupt(ids, padded, share, vocab)[:, :-1]
    return torch.nn.functional.one_hot(found, vocab).double().mean(1)


def test_a_token_is_replaced_by_every_other_alike_and_never_by_itself():
    for share in (0.0, 0.25, 1.0):
        off = (1 - torch.eye(5, dtype=torch.float64)) * share / 4
        torch.testing.assert_close(transitions(share, 5, 16), off + (1 - share) * torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_released_kernel_is_ours_at_a_smaller_share():
    """Replaced with probability 1/2 by any of 4, the true one included: a token differs with probability 3/8."""
    released = 0.5 * torch.eye(4, dtype=torch.float64) + 0.5 / 4
    torch.testing.assert_close(transitions(0.5 * (1 - 1 / 4), 4, 16), released, rtol=0, atol=1e-12)
    assert not torch.allclose(transitions(0.5, 4, 16), released, atol=0.05)


# ---- the bound


def test_the_bound_holds_and_its_gap_is_the_kl_to_the_posterior():
    """log p(I) >= E_q[log p(I|x)] - KL(q || policy), q the teacher-forced law; every sum over all 27 pictures."""
    policy = TeacherForcedTabular(spread=1.0, dtype=torch.float64)
    prompt, own, variance = Prompt(label=1), torch.tensor([[0, 2, 1]]), 0.3
    every = policy.every_picture(prompt)
    real = torch.rand(1, 3, 1, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    free = every.logp.sum(1)
    forced = pick(policy.law(policy.module, [prompt], own).detach().expand(27, -1, -1), every.actions).sum(1)
    for logp in (free, forced):
        assert logp.exp().sum().item() == pytest.approx(1)
    reward = -mean_squared_error(policy.decode(every).double(), real.expand(27, -1, -1, -1))
    values = real.numel()
    shown = values / (2 * variance) * reward - values / 2 * math.log(2 * math.pi * variance)  # a Gaussian on pixels in [-1, 1]
    evidence = (shown + free).logsumexp(0)
    bound = (forced.exp() * (shown + free - forced)).sum()
    posterior = shown + free - evidence
    gap = (forced.exp() * (forced - posterior)).sum()
    assert bound < evidence
    torch.testing.assert_close(evidence - bound, gap)


def test_kl_of_the_bound_is_a_sum_over_tokens_and_0_where_nobody_reads_the_context():
    policy = TeacherForcedTabular(spread=1.0, dtype=torch.float64)
    prompt, own = Prompt(label=1), torch.tensor([[0, 2, 1]])

    def both(policy):
        every = policy.every_picture(prompt)
        law = policy.law(policy.module, [prompt], own).detach()
        forced = pick(law.expand(27, -1, -1), every.actions).sum(1)
        free = policy.law(policy.module, every.prompts, every.actions).detach()
        brute = (forced.exp() * (forced - every.logp.sum(1))).sum()
        by_token = (forced.exp()[:, None] * (law.exp() * (law - free)).sum(-1)).sum()
        return brute, by_token

    brute, by_token = both(policy)
    torch.testing.assert_close(brute, by_token)
    assert brute > 0.01
    with torch.no_grad():
        for head in policy.module.children():
            head.weight[:, policy.labels :] = 0
    assert both(policy)[0].abs() < 1e-12


# ---- a control


def test_shuffled_rewards_are_the_groups_own_in_another_order():
    policy = TeacherForcedTabular(vocab=5)
    rng, prompts = Stream(seed=1, rows=tuple(range(30))), PROMPTS * 10
    plain = collected(va_pi(), policy, prompts=prompts, rng=rng)
    control = collected(va_pi(shuffle_rewards=True), policy, prompts=prompts, rng=rng)
    moved = 0
    for a, b in zip(plain, control, strict=True):
        assert torch.equal(a.rollout.actions, b.rollout.actions)
        one, other = (piece.advantage[:, 0].reshape(-1, 5)[:, :4] for piece in (a, b))
        torch.testing.assert_close(one.sort(1).values, other.sort(1).values)
        moved += (one != other).any(1).sum()
        assert a.metrics["reward"] == pytest.approx(b.metrics["reward"])
    assert moved > 20
    again = collected(va_pi(GRPOConfig(num_generations=4, rollouts_per_chunk=4), shuffle_rewards=True), policy, prompts=prompts, rng=rng)
    torch.testing.assert_close(torch.cat([p.advantage for p in control]), torch.cat([p.advantage for p in again]))


def test_the_mean_over_all_orders_is_no_gradient():
    value = torch.tensor([[1.0, 2.0, 5.0], [0.0, 3.0, 4.0]]).double()
    sums = torch.zeros(2, 3).double()
    for order in permutations((0.1, 0.5, 0.9)):
        dealt = shuffled(Judgement(value=value.flatten()), torch.tensor([order, order])).value.reshape(2, 3)
        assert torch.equal(dealt.sort(1).values, value.sort(1).values)
        sums += group_advantages(dealt)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)


# ---- it learns


def trained(policy, algorithm, prompts, reward, steps, lr):
    """Metrics of each step."""
    optimizer, told = torch.optim.Adam(policy.module.parameters(), lr=lr), []
    for step in range(steps):
        rng = Stream(seed=0, path=("rollout", step), rows=tuple(range(len(prompts))))
        pieces = collected(algorithm, policy, reward, prompts, rng)
        optimizer.zero_grad()
        (-total(algorithm, policy, pieces)).backward()
        optimizer.step()
        told.append(pieces[0].metrics | algorithm.objective(policy, pieces[0])[1])
    return told


@pytest.mark.parametrize(("prior_weight", "winner"), [(0.0, 2), (20.0, 1)])
def test_a_bandit_finds_the_code_that_rebuilds_best_unless_the_prior_holds_it(prior_weight, winner):
    """One token of four values: 1 is the picture's own, 2 would look more like it."""
    real = torch.tensor([0.3, 1.0, 0.0]).reshape(1, 3, 1, 1)
    policy, prompt = TeacherForcedTabular(tokens=1, vocab=4, spread=0.1), Prompt(label=1, image="real")
    given = policy.encode(real, [prompt])
    assert given.actions.tolist() == [[1]]
    every = policy.given([prompt] * 4, torch.arange(4)[:, None], range(4))
    assert mean_squared_error(policy.decode(every), real.expand(4, -1, -1, -1)).argmin() == 2

    config = VAPIConfig(grpo=GRPOConfig(num_generations=16), prior_weight=prior_weight, drop_condition=0.0)
    algorithm = VAPI(config, lambda prompts: real)
    reward = ReconstructionReward(ReconstructionConfig(lpips_weight=0.0), lambda prompts: real)
    before = policy.score(given).entropy.item()
    trained(policy, algorithm, [prompt], reward, steps=40, lr=0.1)
    law = policy.law(policy.module, [prompt], given.actions)[0, 0].exp()
    assert law[winner] > 0.85
    assert policy.score(given).entropy.item() < 0.6 * before


def test_draws_rebuild_better_and_the_own_tokens_stay_likely():
    noise, policy = torch.Generator().manual_seed(3), TeacherForcedTabular(tokens=5, vocab=4)
    ids = torch.randint(4, (6, 5), generator=noise)
    clean = policy.decode(policy.given([Prompt()] * 6, ids, range(6)))
    real = (clean + 0.1 * torch.randn(clean.shape, generator=noise)).clamp(0, 1)

    def show(prompts):
        return torch.stack([real[int(prompt.image)] for prompt in prompts])

    config = VAPIConfig(grpo=GRPOConfig(num_generations=8, rollouts_per_chunk=48), prefix_noise=0.25, prior_weight=0.1)
    prompts = [Prompt(label=1 + i % 2, image=str(i)) for i in range(6)]
    reward = ReconstructionReward(ReconstructionConfig(lpips_weight=0.0), show)
    told = trained(policy, VAPI(config, show), prompts, reward, steps=40, lr=0.05)

    def mean(name, some):
        return sum(metrics[name] for metrics in some) / len(some)

    assert mean("reward", told[-5:]) > 0.6 * mean("reward", told[:5])  # both are below 0
    assert mean("prior/nll", told[-5:]) < mean("prior/nll", told[:5])


# ---- settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prefix_noise": 1.5}, r"va_pi.prefix_noise=1\.5: must be a share"),
        ({"prefix_noise": -0.1}, r"va_pi.prefix_noise=-0\.1: must be a share"),
        ({"prior_weight": -1.0}, r"va_pi.prior_weight=-1\.0: must be 0"),
        ({"drop_condition": 2.0}, r"va_pi.drop_condition=2\.0: must be a share"),
        ({"grpo": GRPOConfig(loss_type="grpo")}, "loss_type='grpo': every draw learns from all of its tokens"),
    ],
)
def test_settings_out_of_range_are_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        VAPIConfig(**settings)


def test_a_prior_needs_a_law_without_filter():
    filtered = LawConfig(top_k=10)
    with pytest.raises(ConfigError, match=r"score_law.top_k=10, top_p=1\.0 with va_pi.prior_weight=0\.1"):
        RunConfig(model="m", algorithm=VAPIConfig(), score_law=filtered)
    with pytest.raises(ConfigError, match=r"with grpo.beta=0\.1: the KL"):
        RunConfig(model="m", algorithm=VAPIConfig(grpo=GRPOConfig(beta=0.1), prior_weight=0.0), score_law=filtered)
    RunConfig(model="m", algorithm=VAPIConfig(prior_weight=0.0), score_law=filtered)


def test_what_it_needs_is_named():
    policy = TeacherForcedTabular()
    with pytest.raises(ConfigError, match="va_pi reads real pictures; TabularPolicy cannot"):
        build_algorithm(VAPIConfig(), TabularPolicy(), pictures)
    with pytest.raises(ConfigError, match="va_pi compares with real pictures, and this data has none"):
        build_algorithm(VAPIConfig(), policy)
    assert isinstance(build_algorithm(VAPIConfig(), policy, pictures), VAPI)
