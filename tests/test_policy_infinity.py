from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch

from tiny_infinity import SQUARE, TOKENIZER, captions, make_model
from varl.config import InfinityConfig, LawConfig
from varl.errors import ConfigError, DataError
from varl.policies import sampling
from varl.policies.infinity import InfinityPolicy
from varl.rng import Stream
from varl.tokenizers.bsq import BSQ
from varl.types import BranchingPolicy, Prompt, Rollout

WIDE = replace(SQUARE, grids=((1, 1), (1, 3), (2, 8)), reach=(3, 12), tokenizer=replace(TOKENIZER, channels=2, cells=2))
SIX_BITS = replace(SQUARE, depth=2, grids=((1, 1), (1, 2)), tokenizer=replace(TOKENIZER, channels=2))
"""3 tokens of 2 bits: 64 pictures."""
PROMPTS = [Prompt(text="a red cube"), Prompt(text="two"), Prompt(), Prompt(text="a red cube")]
LAWS = {
    "plain": LawConfig(),
    "hot": LawConfig(temperature=1.7),
    "guided": LawConfig(cfg_scale=(2.5,)),
    "ramps": LawConfig(cfg_scale=(1.0, 2.0, 3.0), temperature=0.9, temperature_ramp=(2.0, 1.0, 0.5)),
    "top-p": LawConfig(top_p=0.9),
    "all": LawConfig(cfg_scale=(3.0, 2.0, 1.5), temperature=0.7, temperature_ramp=(1.5,), top_p=0.95),
}


def make(config: InfinityConfig = SQUARE, law: LawConfig = LawConfig(), score_law: LawConfig | None = None, **rest) -> InfinityPolicy:
    torch.manual_seed(5)
    bsq = BSQ(config.tokenizer, config.grids)
    return InfinityPolicy(make_model(config), bsq, captions=captions, sample_law=law, score_law=score_law or law, **rest)


def stream(rows: Sequence[int], seed: int = 0) -> Stream:
    return Stream(seed=seed, path=("rollout", 0), rows=tuple(rows))


def rollout_of(policy: InfinityPolicy, seed: int = 0) -> Rollout:
    return policy.rollout(PROMPTS, stream(range(4), seed))


def gap(policy: InfinityPolicy, rollout: Rollout) -> float:
    """In units of the largest log-probability, or of 1 nat: that of a token is a sum over many bits."""
    error = (policy.score(rollout).logp - rollout.logp).abs().max()
    return (error / rollout.logp.abs().max().clamp(min=1)).item()


@pytest.fixture(params=[SQUARE, WIDE], ids=["square", "wide, cells"])
def policy(request) -> InfinityPolicy:
    return make(request.param)


# ---- all pictures there are


def every_picture(policy: InfinityPolicy, prompt: Prompt) -> Rollout:
    """All 64, as if they had been drawn."""
    bits = torch.tensor(list(product((0, 1), repeat=6))).view(64, 3, 2)
    return replace(
        policy.rollout([prompt] * 64, stream(range(64))),
        actions=bits,
        logp=torch.zeros(64, 3),
        step=torch.tensor([[0, 1, 1]]).expand(64, 3),
    )


TWO_SCALES = {name: law for name, law in LAWS.items() if name not in ("ramps", "all")} | {
    "ramps": LawConfig(cfg_scale=(3.0, 2.0), temperature=0.9, temperature_ramp=(2.0, 0.5)),
    "filtered": LawConfig(cfg_scale=(1.5,), temperature_ramp=(1.0, 0.7), top_p=0.9),
}


@pytest.mark.parametrize("prompt", [Prompt(text="a red cube"), Prompt()], ids=["caption", "none"])
@pytest.mark.parametrize("law", TWO_SCALES.values(), ids=TWO_SCALES.keys())
def test_the_probabilities_of_all_pictures_sum_to_one(law, prompt):
    policy = make(SIX_BITS, law)
    p = policy.score(every_picture(policy, prompt)).logp.double().sum(1).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert p.max() < 0.9


@pytest.mark.parametrize("law", [TWO_SCALES["plain"], TWO_SCALES["ramps"]], ids=["plain", "ramps"])
def test_pictures_are_drawn_as_often_as_they_are_likely(law):
    policy, prompt, count = make(SIX_BITS, law), Prompt(text="two"), 4096
    p = policy.score(every_picture(policy, prompt)).logp.sum(1).exp()
    drawn = policy.rollout([prompt] * count, stream(range(count))).actions.flatten(1)
    worth = 2 ** torch.arange(6).flip(0)
    seen = torch.bincount((drawn * worth).sum(1), minlength=64) / count
    error = (p * (1 - p) / count).sqrt()
    assert ((seen - p).abs() <= 4.5 * error + 1e-6).all()


def test_entropy_and_kl_are_those_of_the_whole_picture():
    """By the chain rule, H = E[sum of the tokens' entropies] and KL = E[sum of the tokens' divergences]."""
    policy = make(SIX_BITS)
    policy.reference = make_model(SIX_BITS, seed=1).requires_grad_(False)
    score = policy.score(every_picture(policy, Prompt(text="two")))
    logp, ref_logp = score.logp.double().sum(1), score.ref_logp.double().sum(1)
    p = logp.exp()
    assert (p * score.entropy.sum(1)).sum().item() == pytest.approx(-(p * logp).sum().item(), abs=1e-5)
    assert (p * score.kl.sum(1)).sum().item() == pytest.approx((p * (logp - ref_logp)).sum().item(), abs=1e-5)
    assert ref_logp.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_the_policy_gradient_of_a_constant_is_zero():
    policy = make(SIX_BITS, TWO_SCALES["ramps"])
    logp = policy.score(every_picture(policy, Prompt(text="two"))).logp.sum(1)
    (logp.detach().exp() * logp).sum().backward()
    one = policy.module.head.weight.grad.clone()
    policy.module.zero_grad()
    policy.score(every_picture(policy, Prompt(text="two"))).logp.sum(1)[:8].sum().backward()
    assert one.abs().max() < 1e-4 * policy.module.head.weight.grad.abs().max()


# ---- it scores what it did


def test_it_branches(policy):
    assert isinstance(policy, BranchingPolicy)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("config", [SQUARE, WIDE], ids=["square", "wide, cells"])
def test_replay_under_every_law(law, config):
    policy = make(config, law)
    rollout = rollout_of(policy)
    bits = config.tokenizer.bits
    assert gap(policy, rollout) <= 1e-5
    assert rollout.logp.isfinite().all()
    assert rollout.actions.shape == (4, policy.layout.tokens, bits)
    assert rollout.actions.unique().tolist() == [0, 1]
    assert rollout.logp.shape == rollout.sampled.shape == rollout.step.shape == (4, policy.layout.tokens)
    assert rollout.sampled.all()
    assert rollout.sample_logp is None


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("config", [SQUARE, WIDE], ids=["square", "wide, cells"])
def test_replay_of_one_scale_is_bit_exact(law, config):
    """The same sums in the same order. Of several scales, a matrix product is over more rows than when they were drawn."""
    policy = make(config, law)
    prefix = policy.prefix(PROMPTS, stream(range(4)), steps=1)
    assert torch.equal(policy.score(prefix).logp, prefix.logp)


@torch.no_grad()
def law_by_hand(policy: InfinityPolicy, rollout: Rollout, law: LawConfig) -> torch.Tensor:
    """Log-probabilities of both values of every bit, [B, L, d, 2]: two teacher-forced passes a picture, and each step of the law as it is
    defined. The empty prompt is its own "none"."""
    model, rows = policy.module, []
    for prompt, bits in zip(rollout.prompts, rollout.actions, strict=True):
        none = model.cfg_uncond[: len(prompt.text.split())] if prompt.text else model.cfg_uncond
        asked = captions([prompt.text])[0] if prompt.text else none
        inputs = policy.tokenizer.inputs(bits[None])
        pair = [model.condition(features[None]) for features in (asked, none)]
        cond, uncond = (model.logits(model(condition, inputs), condition).view(*bits.shape, 2) for condition in pair)
        step = rollout.step[0].tolist()
        scale = torch.tensor([law.cfg_scale[s % len(law.cfg_scale)] for s in step])[:, None, None]
        heat = torch.tensor([law.temperature * law.temperature_ramp[s % len(law.temperature_ramp)] for s in step])[:, None, None]
        p = ((uncond + scale * (cond - uncond)) / heat).softmax(-1)
        if law.top_p < 1:  # of two, the likelier alone where it has as much
            p = torch.where(p.amax(-1, keepdim=True) >= law.top_p, (p == p.amax(-1, keepdim=True)).float(), p)
        rows.append(p.log())
    return torch.stack(rows)


def of_bits(law: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    return law.gather(-1, bits[..., None])[..., 0].sum(-1)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_recorded_logp_is_that_of_the_law_by_hand(law):
    policy = make(SQUARE, law)
    rollout = rollout_of(policy)
    want = law_by_hand(policy, rollout, law)
    torch.testing.assert_close(rollout.logp, of_bits(want, rollout.actions), rtol=0, atol=5e-5)
    entropy = torch.distributions.Categorical(logits=want).entropy().sum(-1)
    torch.testing.assert_close(policy.score(rollout).entropy, entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("drawn", "scored"), [("all", "plain"), ("ramps", "hot"), ("plain", "guided"), ("plain", "ramps")])
def test_two_laws_are_both_recorded(drawn, scored):
    policy = make(SQUARE, LAWS[drawn], LAWS[scored])
    rollout = rollout_of(policy)
    for logp, law in ((rollout.sample_logp, LAWS[drawn]), (rollout.logp, LAWS[scored])):
        torch.testing.assert_close(logp, of_bits(law_by_hand(policy, rollout, law), rollout.actions), rtol=0, atol=5e-5)
    assert gap(policy, rollout) <= 1e-5
    assert (rollout.logp - rollout.sample_logp).abs().max() > 0.1


def test_greedy_does_not_hear_the_dice():
    policy = make(SQUARE, LawConfig(top_k=1, cfg_scale=(3.0,)))
    assert torch.equal(rollout_of(policy, 0).actions, rollout_of(policy, 1).actions)
    assert rollout_of(policy).logp.abs().max() == 0


def test_another_law_with_the_same_weights(policy):
    cold = policy.under(LAWS["ramps"])
    assert cold.module is policy.module
    assert gap(cold, rollout_of(cold)) <= 1e-5
    assert not torch.equal(rollout_of(cold).actions, rollout_of(policy).actions)


# ---- addresses


def test_the_same_address_is_the_same_picture_whatever_the_batch(policy):
    whole = rollout_of(policy)
    for rows in ([0], [1, 2], [3, 0, 2]):
        part = policy.rollout([PROMPTS[i] for i in rows], stream(rows))
        assert torch.equal(part.actions, whole.actions[rows])
        torch.testing.assert_close(part.logp, whole.logp[rows], rtol=0, atol=1e-5)
        assert part.index.tolist() == rows


def test_different_rows_are_different_pictures(policy):
    rollout = policy.rollout([PROMPTS[0]] * 8, stream(range(8)))
    assert len({tuple(bits) for bits in rollout.actions.flatten(1).tolist()}) == 8


# ---- prefixes


@pytest.mark.parametrize("law", [LAWS["plain"], LAWS["ramps"]], ids=["plain", "guided"])
@pytest.mark.parametrize("config", [SQUARE, WIDE], ids=["square", "wide, cells"])
def test_fork_at_every_scale(config, law):
    policy, copies = make(config, law), 3
    for steps in range(1, policy.layout.steps):
        prefix = policy.prefix(PROMPTS, stream(range(4)), steps=steps)
        drawn = policy.module.ends[steps - 1]
        assert prefix.actions.shape[1] == drawn
        assert gap(policy, prefix) <= 1e-5
        whole = policy.complete(prefix, stream(range(4)).at("suffix").repeat(copies))
        assert gap(policy, whole) <= 1e-5
        assert torch.equal(whole.actions[:, :drawn], prefix.actions.repeat_interleave(copies, 0))
        assert not whole.sampled[:, :drawn].any()
        assert whole.sampled[:, drawn:].all()
        assert whole.prompts == tuple(p for p in PROMPTS for _ in range(copies))
        assert len({tuple(bits) for bits in whole.actions.flatten(1).tolist()}) > 4, "siblings go different ways"


def test_a_fork_is_the_whole(policy):
    """Completed with the dice that the whole picture was drawn with, the prefix becomes it."""
    whole, bits = rollout_of(policy), policy.tokenizer.config.bits

    class Later(Stream):
        """The uniforms of the whole, from a place on."""

        def uniform(self, *shape: int) -> torch.Tensor:
            return stream(self.rows).at("tokens").uniform(policy.layout.tokens * bits)[:, -shape[0] :]

        def at(self, *path: int | str) -> Stream:
            return self

    for steps in range(1, policy.layout.steps):
        prefix = policy.prefix(PROMPTS, stream(range(4)), steps=steps)
        assert torch.equal(prefix.actions, whole.actions[:, : prefix.actions.shape[1]])
        again = policy.complete(prefix, Later(seed=0, rows=(0, 1, 2, 3)))
        assert torch.equal(again.actions, whole.actions)
        torch.testing.assert_close(again.logp, whole.logp, rtol=0, atol=1e-5)


def test_scoring_a_prefix_costs_only_its_tokens(policy):
    prefix = policy.prefix(PROMPTS, stream(range(4)), steps=2)
    seen: list[int] = []
    policy.module.head.register_forward_hook(lambda head, args, out: seen.append(out.shape[1]))
    policy.score(prefix)
    assert seen == [policy.module.ends[1]]


# ---- gradient, memory, precision


def test_gradient_flows_to_the_policy_alone(policy):
    policy.reference = make_model(policy.module.config, seed=1)
    score = policy.score(rollout_of(policy))
    assert not score.entropy.requires_grad
    assert not score.ref_logp.requires_grad
    (score.logp.sum() + score.kl.sum()).backward()
    assert all(p.grad is not None for p in policy.module.parameters())
    assert all(p.grad is None for p in policy.reference.parameters())
    assert all(p.grad is None for p in policy.tokenizer.parameters())


def test_at_equal_weights_there_is_no_divergence(policy):
    policy.reference = make_model(policy.module.config)
    score = policy.score(rollout_of(policy))
    assert score.kl.abs().max() == 0
    assert torch.equal(score.ref_logp, score.logp)


@pytest.mark.parametrize("law", [LAWS["plain"], LAWS["ramps"]], ids=["plain", "ramps"])
@pytest.mark.parametrize("rows", [1, 3])
def test_chunked_scoring_is_scoring(monkeypatch, law, rows):
    policy = make(SQUARE, law)
    rollout = rollout_of(policy)

    def results() -> list[torch.Tensor]:
        policy.module.zero_grad()
        score = policy.score(rollout)
        (score.logp * torch.arange(4)[:, None]).sum().backward()
        return [score.logp, score.entropy, *(p.grad.clone() for p in policy.module.parameters() if p.grad is not None)]

    whole = results()
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", rows * rollout.actions[0].numel() * 2)
    for got, want in zip(results(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_pictures_are_rendered_some_at_a_time(monkeypatch, policy):
    rollout = rollout_of(policy)
    whole = policy.decode(rollout)
    assert whole.shape == (4, 3, *policy.module.config.image_size)
    assert 0 <= whole.min() < whole.max() <= 1
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(policy.decode(rollout), whole, rtol=0, atol=1e-5)


def test_bfloat16_acts_and_scores_alike(policy):
    low = InfinityPolicy(policy.module, policy.tokenizer, captions=captions, dtype=torch.bfloat16)
    rollout = rollout_of(low)
    assert rollout.logp.dtype == torch.float32
    assert gap(low, rollout) < 0.3
    score = low.score(rollout)
    score.logp.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in low.module.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)], ids=str)
def test_acting_forking_and_replay_on_cuda(dtype, allowed):
    policy = make(WIDE, LAWS["ramps"])
    policy = InfinityPolicy(
        policy.module.cuda(), policy.tokenizer.cuda(), captions=captions, sample_law=LAWS["ramps"], score_law=LAWS["ramps"], dtype=dtype
    )
    prefix = policy.prefix(PROMPTS, stream(range(4)), steps=2)
    whole = policy.complete(prefix, stream(range(8)).at("suffix"))
    assert whole.actions.is_cuda
    assert max(gap(policy, prefix), gap(policy, whole), gap(policy, rollout_of(policy))) <= allowed
    assert policy.decode(whole).isfinite().all()


# ---- prompts, settings


def test_a_prompts_picture_does_not_depend_on_longer_neighbours():
    policy = make()
    alone = policy.rollout([Prompt(text="two")], stream([0]))
    beside = policy.rollout([Prompt(text="two"), Prompt(text="on a table by the sea")], stream([0, 1]))
    assert torch.equal(alone.actions[0], beside.actions[0])
    torch.testing.assert_close(alone.logp[0], beside.logp[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (Prompt(label=2), "label 2: this model reads text"),
        (Prompt(text="one two three four five six seven"), "has 7 tokens, the model takes 1 to 6"),
    ],
)
def test_a_prompt_that_the_model_cannot_read(prompt, named):
    with pytest.raises(DataError, match=named):
        make().rollout([Prompt(), prompt], stream([0, 1]))


@pytest.mark.parametrize("name", ["sample_law", "score_law"])
@pytest.mark.parametrize(
    ("law", "named"),
    [
        (LawConfig(cfg_scale=(1.0, 2.0)), "cfg_scale has 2 values, the model 3 scales"),
        (LawConfig(temperature_ramp=(1.0, 2.0)), "temperature_ramp has 2 values, the model 3 scales"),
        (LawConfig(top_k=3), "top_k=3 is more than the vocabulary of 2"),
    ],
)
def test_laws_that_do_not_fit_the_model(name, law, named):
    with pytest.raises(ConfigError, match=f"{name}.{named}"):
        InfinityPolicy(make_model(), BSQ(TOKENIZER, SQUARE.grids), captions=captions, **{name: law})


@pytest.mark.parametrize("steps", [0, 4])
def test_a_prefix_that_the_model_cannot_draw(steps):
    with pytest.raises(ConfigError, match=f"prefix of {steps} steps: the model has 3 scales"):
        make().prefix(PROMPTS, stream(range(4)), steps=steps)
