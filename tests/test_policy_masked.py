"""A tiny MAR behind the masked policy: what it draws, how it scores that, and what its gradient costs."""

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import Normal, kl_divergence

from varl.algorithms.mar_grpo import MARGRPO, narrowed
from varl.config import DiffusionHeadConfig, GRPOConfig, KLConfig, LawConfig, MARConfig, MARGRPOConfig, UnmaskingConfig, ViTConfig
from varl.errors import ConfigError, DataError, NumericsError
from varl.models.diffusion_head import log_density
from varl.models.mar import MAR
from varl.policies.masked import Latents, MaskedPolicy, settled_at, with_derivative
from varl.rewards.judge import RewardJudge
from varl.rng import Stream
from varl.tokenizers.kl import KL
from varl.types import Prompt, RedrawingPolicy

GUIDED = LawConfig(cfg_scale=(1.0, 2.0, 3.0), temperature=0.8)
PLAIN = LawConfig()


def make(seed: int = 0, target="noise", moves: int = 8, train_head: bool = False, **more) -> MaskedPolicy:
    torch.manual_seed(seed)
    half = ViTConfig(depth=1, width=16, heads=2)
    tokenizer = KLConfig(channels=3, width=32, multipliers=(1,), blocks=1, attention=False, patch=4, scale=0.5)
    model = MAR(
        MARConfig(
            encoder=half,
            decoder=half,
            head=DiffusionHeadConfig(depth=2, width=20, target=target, least_signal=2e-4 if target == "velocity" else 0.0),
            grid=(2, 3),
            num_classes=4,
            buffer=2,
            tokenizer=tokenizer,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at 0 too, so that all of it matters
            parameter.add_(0.2 * torch.randn_like(parameter))
    policy = MaskedPolicy(model, KL(tokenizer), unmasking=UnmaskingConfig(steps=3, denoise_steps=moves), **more)
    policy.train_head(train_head)
    return policy


def stream(count: int, first: int = 0) -> Stream:
    return Stream(seed=7, path=("test",), rows=tuple(range(first, first + count)))


PROMPTS = [Prompt(label=1), Prompt(label=3), Prompt(label=1), Prompt()]


def law_pairs():
    return pytest.mark.parametrize(
        ("sample", "score"),
        [(PLAIN, PLAIN), (GUIDED, GUIDED), (GUIDED, PLAIN), (LawConfig(temperature=0.9), LawConfig(cfg_scale=(2.0,)))],
        ids=["plain", "guided", "guided, scored without", "unguided, scored with"],
    )


# ---- acting


def test_it_is_a_redrawing_policy():
    assert isinstance(make(), RedrawingPolicy)


def test_tokens_are_settled_in_the_order_of_their_numbers():
    uniform = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.4, 0.6, 0.8]])
    assert settled_at(uniform, (1, 3)).tolist() == [[1, 0, 1, 1], [0, 1, 1, 1]]
    assert settled_at(uniform, (2, 1, 1)).tolist() == [[2, 0, 1, 0], [0, 0, 1, 2]]


def test_orders_are_as_likely_as_each_other():
    steps = settled_at(torch.rand(6000, 3, generator=torch.Generator().manual_seed(0)), (1, 1, 1))
    counts = Counter(map(tuple, steps.tolist()))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 4.5 * (6000 * 5 / 36) ** 0.5 for count in counts.values())


def test_every_token_is_settled_once():
    policy = make()
    rollout = policy.rollout(PROMPTS, stream(4))
    assert policy.counts == (1, 2, 3)
    assert rollout.actions.shape == (4, 6, 9, 3)
    for row in rollout.step.tolist():
        assert sorted(row) == [0, 1, 1, 2, 2, 2]
    assert rollout.sampled.all()
    assert len({tuple(row) for row in rollout.step.tolist()}) > 1


@pytest.mark.parametrize("target", ["noise", "velocity"])
def test_each_move_is_the_heads_own(target):
    """Every picture drawn again by hand, one token at a time, with guidance and temperature."""
    policy = make(target=target, sample_law=GUIDED, score_law=GUIDED)
    rollout = policy.rollout(PROMPTS, stream(4))
    noise, model = stream(4).at("path").normal(6, 9, 3), policy.module
    denoiser = model.denoiser(8)
    with torch.no_grad():
        for b, prompt in enumerate(PROMPTS):
            labels = torch.tensor([4 if prompt.label is None else prompt.label, 4])
            for l in range(6):
                i = int(rollout.step[b, l])
                seen = (rollout.step[b] < i).nonzero()[:, 0]
                tokens = rollout.actions[b, :, -1][None].expand(2, -1, -1)
                z = model(model.condition(labels), tokens, seen[None].expand(2, -1))[:, l]
                read, scale = denoiser.read(z), torch.tensor([[GUIDED.cfg_scale[i]]])
                x, logp = noise[b, l, :1], []
                for n in range(8):
                    mean, log_std = denoiser.law(x, torch.tensor([n]), read[:1], read[1:], scale)
                    x = mean + (0.8 * log_std.exp() * noise[b, l, n + 1] if n < 7 else 0)
                    torch.testing.assert_close(rollout.actions[b, l, n + 1], x[0], atol=2e-4, rtol=1e-4)
                    logp.append(float(log_density(x, mean, 2 * log_std, 0.8).sum()))
                assert rollout.logp[b, l].item() == pytest.approx(sum(logp[1:6]), abs=5e-3, rel=1e-3)


def test_a_row_does_not_depend_on_its_neighbours():
    policy = make(sample_law=GUIDED, score_law=GUIDED)
    whole, alone = policy.rollout(PROMPTS, stream(4)), policy.rollout(PROMPTS[2:3], stream(1, first=2))
    torch.testing.assert_close(alone.actions[0], whole.actions[2], atol=1e-4, rtol=1e-4)
    assert torch.equal(alone.step[0], whole.step[2])


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    policy = make()
    torch.set_rng_state(before)
    rollout = policy.rollout(PROMPTS, stream(4))
    policy.score(policy.redraw(rollout, stream(8)))
    policy.preview(rollout, stream(8), torch.tensor([[0, 2]] * 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_pictures_are_what_the_tokenizer_makes_of_the_last_vectors():
    policy = make()
    rollout = policy.rollout(PROMPTS, stream(4))
    images = policy.decode(rollout)
    assert images.shape == (4, 3, 8, 12)
    kl = policy.tokenizer
    by_hand = kl.decode(rollout.actions[:, :, -1].mT.reshape(4, 3, 2, 3) / 0.5)
    torch.testing.assert_close(images, ((by_hand + 1) / 2).clamp(0, 1))


# ---- scoring


@law_pairs()
@pytest.mark.parametrize("target", ["noise", "velocity"])
def test_the_score_of_what_was_drawn_is_what_was_stored(sample, score, target):
    policy = make(target=target, sample_law=sample, score_law=score)
    rollout = policy.rollout(PROMPTS, stream(4))
    assert (rollout.sample_logp is None) == (sample == score)
    scored = policy.score(rollout)
    torch.testing.assert_close(scored.logp, rollout.logp, atol=2e-4, rtol=2e-5)
    if rollout.sample_logp is not None:
        drawn = replace(rollout, chain=replace(rollout.chain, logp=rollout.chain.sample_logp, sample_logp=None))
        torch.testing.assert_close(policy.under(sample).score(drawn).logp, rollout.sample_logp, atol=2e-4, rtol=2e-5)


def test_latents_are_made_again_bit_for_bit(monkeypatch):
    """z of the score equals z of the rollout exactly, at every step, with guidance and in both halves."""
    policy, seen = make(sample_law=GUIDED, score_law=GUIDED), []
    rollout = policy.rollout(PROMPTS, stream(4))
    own = MaskedPolicy._latents

    def watched(self, *args):
        seen.append(own(self, *args))
        return seen[-1]

    monkeypatch.setattr(MaskedPolicy, "_latents", watched)
    policy.score(rollout)
    assert len(seen) == 3
    for i, z in enumerate(seen):
        now = rollout.step == i
        for again, drawn in zip(z.parts, rollout.state.parts, strict=True):
            assert torch.equal(again[now], drawn[now])


def test_only_the_moves_that_count_are_scored():
    policy = make()
    rollout = policy.rollout(PROMPTS, stream(4))
    moves = torch.zeros(4, 6, 8, dtype=torch.bool)
    moves[:, ::2, 3] = True
    moves[0, 1, 2:5] = True
    some = narrowed(rollout, moves)
    score = policy.score(some)
    torch.testing.assert_close(score.logp, (rollout.chain.logp * moves).sum(-1), atol=2e-4, rtol=2e-5)
    assert (score.logp[1:, 1::2] == 0).all()
    assert (score.entropy[1:, 1::2] == 0).all()


@pytest.mark.parametrize("referred", [False, True])
def test_rows_without_a_scored_move_add_nothing(referred):
    policy = make()
    if referred:
        policy.reference = make(seed=1).module
    rollout = policy.rollout(PROMPTS, stream(4))
    score = policy.score(narrowed(rollout, torch.zeros_like(rollout.chain.scored)))
    assert (score.logp == 0).all()
    assert (score.kl is not None) == referred
    score.logp.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.module.parameters())


def test_ill_conditioned_moves_are_not_admitted():
    rollout = make().rollout(PROMPTS, stream(4))
    assert rollout.chain.scored[0, 0].tolist() == [False, True, True, True, True, True, False, False]


def test_entropy_is_that_of_the_gaussians():
    policy = make(target="velocity")
    rollout = policy.rollout(PROMPTS, stream(4))
    process = policy.module.denoiser(8).process
    log_std = 0.5 * process.log_variances.flip(0)[1:6]
    expected = 3 * float((log_std + 0.5 * torch.tensor(2 * torch.pi * torch.e).log()).sum())
    torch.testing.assert_close(policy.score(rollout).entropy, torch.full((4, 6), expected), atol=1e-4, rtol=1e-5)


def gradient(policy: MaskedPolicy, rollout, weight) -> list[torch.Tensor]:
    policy.module.zero_grad()
    score = policy.score(rollout)
    value = (score.logp * weight).sum() - (0.3 * score.kl.sum() if score.kl is not None else 0)
    value.backward()
    return [p.grad.clone() for name, p in policy.module.named_parameters() if not name.startswith("diffloss") and p.grad is not None]


@law_pairs()
@pytest.mark.parametrize("referred", [False, True])
def test_the_two_level_gradient_is_the_gradient(sample, score, referred):
    """The same parameters' gradients through a frozen head as through one that learns, which goes by autograd alone."""
    weight, grads = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), []
    for train_head in (False, True):
        policy = make(sample_law=sample, score_law=score, train_head=train_head)
        if referred:
            policy.reference = make(seed=1).module.requires_grad_(False)
        grads.append(gradient(policy, policy.rollout(PROMPTS, stream(4)), weight))
    assert len(grads[0]) == len(grads[1]) > 20
    for two_level, plain in zip(*grads, strict=True):
        torch.testing.assert_close(two_level, plain, atol=2e-4, rtol=1e-4)
    assert max(float(grad.abs().max()) for grad in grads[0]) > 0.1


def test_gradient_by_finite_differences():
    policy = make(target="velocity", sample_law=GUIDED, score_law=GUIDED)
    rollout, parameter = policy.rollout(PROMPTS, stream(4)), policy.module.decoder_embed.weight
    policy.score(rollout).logp.sum().backward()
    step = 3e-3
    direction = parameter.grad.sign() / parameter.numel() ** 0.5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
            values.append(policy.score(rollout).logp.double().sum().item())
            parameter.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=2e-2)


def test_a_frozen_head_is_not_touched():
    policy = make()
    rollout = policy.rollout(PROMPTS, stream(4))
    policy.score(rollout).logp.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in policy.module.head.parameters())
    assert policy.module.decoder_embed.weight.grad.abs().max() > 0
    trained = make(train_head=True)
    trained.score(rollout).logp.sum().backward()
    assert all(p.grad is not None for p in trained.module.head.parameters())


class Kept:
    """A tensor that autograd keeps, as long as it keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def held(policy: MaskedPolicy, rollout) -> int:
    """Bytes that autograd keeps after a score for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Kept:
        one = Kept(tensor)
        kept.add(one)
        return one

    with saved_tensors_hooks(keep, lambda one: one.tensor):
        score = policy.score(rollout)
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage().nbytes() for one in kept}
    del score
    return sum(size for place, size in storages.items() if place not in weights)


def test_memory_for_the_backward_pass_does_not_grow_with_moves():
    few, many = (make(moves=moves) for moves in (8, 64))
    sizes = [held(policy, policy.rollout(PROMPTS, stream(4))) for policy in (few, many)]
    assert sizes[0] == sizes[1]


def test_further_paths_cost_one_vector_a_token():
    """And not a pass of the transformer."""
    policy = make()
    rollout = policy.rollout(PROMPTS, stream(4))
    rollout = replace(rollout, context=rollout.actions[:, :, -1])
    wide = rollout.beside(policy.redraw(rollout, stream(32)))
    width, floats = policy.module.config.decoder.width, 4
    more = held(policy, wide) - held(policy, rollout)
    assert 0 < more <= 32 * 6 * (2 * width + 8) * floats


def test_derivatives_that_are_known():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    value = with_derivative(torch.tensor([5.0, 6.0]), (x, torch.tensor([[0.5, 0.25], [2.0, 1.0]])))
    assert value.tolist() == [5.0, 6.0]
    (value * torch.tensor([1.0, 10.0])).sum().backward()
    assert x.grad.tolist() == [[0.5, 0.25], [20.0, 10.0]]


# ---- a reference


@pytest.mark.parametrize("target", ["velocity", "noise"])
def test_kl_to_itself_is_nothing_and_to_another_is_that_of_the_gaussians(target):
    """From the policy to the reference, which is another number than back where the head says the variance too."""
    policy = make(target=target)
    rollout = policy.rollout(PROMPTS, stream(4))
    policy.reference = make(target=target).module
    score = policy.score(rollout)
    assert (score.kl == 0).all()
    torch.testing.assert_close(score.ref_logp, score.logp)

    policy.reference = make(seed=1, target=target).module
    policy.reference.diffloss.load_state_dict(policy.module.diffloss.state_dict())
    score, there, back = policy.score(rollout), torch.zeros(4, 6), torch.zeros(4, 6)
    with torch.no_grad():
        for i in range(3):
            now, laws = rollout.step == i, []
            for model in (policy.module, policy.reference):
                z = policy._latents(model, *policy._condition(model, rollout.prompts), rollout.actions[:, :, -1], rollout.step, i)
                head, moves = model.denoiser(8), torch.arange(1, 6).expand(int(now.sum()), -1)
                read = head.read(z.asked[now]).repeat_interleave(5, 0)
                mean, log_std = head.law(rollout.actions[now][:, 1:6].flatten(0, 1), moves.flatten(), read, None, None)
                laws.append(Normal(mean, log_std.exp()))
            there[now] = kl_divergence(*laws).sum(-1).unflatten(0, (-1, 5)).sum(1)
            back[now] = kl_divergence(*laws[::-1]).sum(-1).unflatten(0, (-1, 5)).sum(1)
    torch.testing.assert_close(score.kl.detach(), there, atol=1e-4, rtol=1e-4)
    assert there.min() > 0
    if target == "noise":
        assert (there - back).abs().max() > 1e-3 * there.max()


# ---- drawing again


def test_further_paths_from_the_same_latents():
    policy = make(sample_law=GUIDED, score_law=GUIDED)
    rollout = policy.rollout(PROMPTS, stream(4))
    further = policy.redraw(rollout, stream(12))
    again = policy.redraw(rollout.rows(range(4)), stream(12))  # rows drop the state, and latents are made anew
    torch.testing.assert_close(further.actions, again.actions, atol=1e-4, rtol=1e-4)
    assert torch.equal(further.context, rollout.actions[:, :, -1].repeat_interleave(3, 0))
    assert torch.equal(further.step, rollout.step.repeat_interleave(3, 0))
    assert (further.actions[0] != further.actions[1]).all(-1).all(-1).all()
    torch.testing.assert_close(policy.score(further).logp, further.logp, atol=2e-4, rtol=2e-5)
    torch.testing.assert_close(policy.score(rollout.beside(further)).logp[0::4], rollout.logp, atol=2e-4, rtol=2e-5)


def test_redrawn_moves_are_standard_normal_around_their_mean():
    """The residual of every admissible move, of 400 paths of each token."""
    policy = make()
    rollout = policy.rollout(PROMPTS[:1], stream(1))
    further = policy.redraw(rollout, stream(400))
    denoiser, path = policy.module.denoiser(8), further.actions.flatten(0, 1)
    read = denoiser.read(rollout.state.asked.repeat(400, 1, 1).flatten(0, 1))
    residuals = []
    with torch.no_grad():
        for n in range(1, 6):
            mean, log_std = denoiser.law(path[:, n], torch.full((len(path),), n), read, None, None)
            residuals.append((path[:, n + 1] - mean) / log_std.exp())
    residual = torch.stack(residuals)
    count = residual.numel()
    assert float(residual.mean().abs()) < 4.5 / count**0.5
    assert float(residual.var()) == pytest.approx(1, abs=4.5 * (2 / count) ** 0.5)


def test_previews_keep_what_the_step_settled_and_draw_what_it_did_not():
    policy = make(sample_law=GUIDED, score_law=GUIDED)
    rollout = policy.rollout(PROMPTS, stream(4))
    steps = torch.tensor([[0, 2], [1, 2], [0, 1], [1, 2]])
    seen = policy.preview(rollout, stream(8), steps)
    settled, at = rollout.step.repeat_interleave(2, 0), steps.flatten()[:, None]
    first = rollout.actions.repeat_interleave(2, 0)
    same = (seen.actions == first).all(-1).all(-1)
    assert torch.equal(same, settled <= at)
    assert torch.equal(seen.sampled, settled >= at)
    assert torch.equal(seen.chain.settled, settled)
    torch.testing.assert_close(policy.score(seen).logp, seen.logp, atol=2e-4, rtol=2e-5)


# ---- with the algorithm


@pytest.mark.parametrize("trajectories", ["precision_weight", "include_primary"])
@pytest.mark.parametrize("ar_steps", [0, 2])
def test_panw_over_the_steps_weighs_the_gradient_of_each(trajectories, ar_steps):
    """Steps of 1, 2 and 3 tokens: with alpha, the gradient is that without it where the tokens of each trained step count n^-alpha, in
    such a unit that a picture's trained tokens weigh as much together as before."""
    exponent = 0.7
    grpo = GRPOConfig(num_generations=4, rollouts_per_chunk=16, beta=0.1)
    config = MARGRPOConfig(grpo=grpo, num_trajectories=2, ar_steps=ar_steps, denoise_moves=3, trajectories=trajectories)

    def gradient(alpha: float, factor: bool) -> list[torch.Tensor]:
        policy = make(target="velocity")
        policy.reference = make(seed=1, target="velocity").module
        algorithm = MARGRPO(replace(config, grpo=replace(grpo, panw_alpha=alpha)))
        judge = RewardJudge({"red": (1.0, lambda images, prompts: images[:, 0].mean((1, 2)))})
        (batch,) = algorithm.collect(policy, PROMPTS, judge, stream(4), 0)
        judge.close()
        if factor:
            rows = 1 + 2 * (trajectories == "include_primary")
            scale = torch.zeros_like(batch.weight)
            for row, (step, sampled) in enumerate(zip(batch.rollout.step[::rows], batch.rollout.sampled[::rows], strict=True)):
                sizes = {i: int((sampled & (step == i)).sum()) for i in range(3)}
                assert sorted(n for n in sizes.values() if n) == [i + 1 for i in range(3) if sizes[i]]
                unit = sum(sizes.values()) / sum(n * n**-exponent for n in sizes.values() if n)
                each = torch.tensor([unit * max(sizes[i], 1) ** -exponent for i in range(3)])[step]
                scale[row * rows : (row + 1) * rows] = each
            batch = replace(batch, weight=batch.weight * scale, kl_weight=batch.kl_weight * scale)
        algorithm.objective(policy, batch)[0].backward()
        return [p.grad for p in policy.module.parameters() if p.grad is not None]

    got, want, plain = gradient(exponent, False), gradient(0.0, True), gradient(0.0, False)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert any((a - b).abs().max() > 0.01 * b.abs().max() for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        MARGRPOConfig(num_trajectories=0, ar_steps=2, denoise_moves=3),
        MARGRPOConfig(num_trajectories=3, ar_steps=0, denoise_moves=0),
        MARGRPOConfig(num_trajectories=3, ar_steps=2, denoise_moves=3, trajectories="include_primary"),
        MARGRPOConfig(num_trajectories=2, ar_steps=2, denoise_moves=3, trajectories="rewarded"),
        MARGRPOConfig(
            grpo=GRPOConfig(num_generations=4, loss_type="grpo", beta=0.01),
            num_trajectories=3,
            ar_steps=2,
            denoise_moves=3,
            trajectories="release",
            support="unknown",
            consistency=0.0,
        ),
    ],
    ids=["plain", "damped", "joined", "rewarded", "release"],
)
def test_every_form_of_the_algorithm_learns_on_policy(config):
    """Ratio 1 before the first update (the drawn log-probs again), a gradient in the transformer, none in the head."""
    config = replace(config, grpo=replace(config.grpo, num_generations=4, rollouts_per_chunk=8))
    policy = make(target="velocity")
    policy.reference = make(target="velocity").module
    algorithm = MARGRPO(config)
    judge = RewardJudge({"red": (1.0, lambda images, prompts: images[:, 0].mean((1, 2)))})
    batches = list(algorithm.collect(policy, PROMPTS, judge, stream(4), 0))
    judge.close()
    assert len(batches) == 2
    for batch in batches:
        learns = batch.rollout.sampled
        torch.testing.assert_close(policy.score(batch.rollout).logp[learns], batch.rollout.logp[learns], atol=5e-4, rtol=2e-5)
        value, _ = algorithm.objective(policy, batch)
        value.backward()
    grad = policy.module.decoder_embed.weight.grad
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
    assert all(p.grad is None for p in policy.module.head.parameters())


# ---- bad input


def test_laws_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"sample_law.top_k=5, top_p=1.0: this model draws vectors, of which none can be cut away"):
        make(sample_law=LawConfig(top_k=5))
    with pytest.raises(ConfigError, match=r"score_law.cfg_scale has 2 values, the model 3 steps"):
        make(score_law=LawConfig(cfg_scale=(1.0, 2.0)))


def test_steps_that_cannot_be():
    policy = make()
    with pytest.raises(ConfigError, match="7 steps for 6 tokens"):
        MaskedPolicy(policy.module, policy.tokenizer, unmasking=UnmaskingConfig(steps=7))
    with pytest.raises(ConfigError, match=r"unmasking.denoise_steps=0: must be 1 to 1000"):
        UnmaskingConfig(denoise_steps=0)


def test_labels_that_are_none():
    with pytest.raises(DataError, match="prompt label 4: the model knows classes 0 to 3"):
        make().rollout([Prompt(label=4)], stream(1))


def test_latents_that_are_no_numbers():
    policy = make()
    with torch.no_grad():
        policy.module.class_emb.weight[3] = torch.inf
    policy.rollout(PROMPTS[:1], stream(1))
    with pytest.raises(NumericsError, match="1 of 4 pictures hold latents that are infinite or no numbers, the first from step 0"):
        policy.rollout(PROMPTS, stream(4))


def test_a_rollout_of_another_family():
    policy = make()
    rollout = policy.rollout(PROMPTS, stream(4))
    with pytest.raises(ConfigError, match="drawn at once, and not by chains of moves"):
        policy.score(replace(rollout, chain=None))


def test_more_moves_than_are_admissible():
    judge = RewardJudge({"red": (1.0, lambda images, prompts: images[:, 0].mean((1, 2)))})
    algorithm = MARGRPO(MARGRPOConfig(grpo=GRPOConfig(num_generations=2), num_trajectories=0, ar_steps=0, denoise_moves=6))
    with pytest.raises(ConfigError, match="denoise_moves=6: only 5 of the 8 moves are admissible"):
        list(algorithm.collect(make(), PROMPTS, judge, stream(4), 0))
    judge.close()


def test_latents_are_indexed_together():
    z = Latents(asked=torch.arange(6.0).view(3, 2), nothing=None)
    assert z[1:].asked.tolist() == [[2, 3], [4, 5]]
    assert z[1:].nothing is None
