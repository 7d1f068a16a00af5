from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from varl.config import LawConfig, NextScaleConfig, TextConfig, TokenizerConfig
from varl.errors import ConfigError, DataError
from varl.models.next_scale import NextScale
from varl.policies import sampling
from varl.policies.next_scale import NextScalePolicy
from varl.rng import Stream
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.types import BranchingPolicy, Prompt, Rollout

TOKENIZER = TokenizerConfig(vocab=24, channels=4, width=8, multipliers=(1, 2), blocks=1, attention=False)
TEXT = NextScaleConfig(
    depth=2,
    width=16,
    heads=2,
    grids=((1, 1), (1, 2), (2, 4), (2, 8)),
    text=TextConfig(alphabet="ABC", styles=("ink",), max_length=6),
    tokenizer=TOKENIZER,
)
CLASSES = replace(TEXT, text=None, num_classes=5, grids=((1, 1), (2, 2), (3, 3)))
BLOCK = replace(CLASSES, grids=((2, 2), (3, 3), (4, 4)))
PROMPTS = {
    "text": [Prompt(text="AB", style=("ink",)), Prompt(text="C|AB"), Prompt(), Prompt(text="AB", style=("ink",))],
    "classes": [Prompt(label=0), Prompt(label=4), Prompt(), Prompt(label=0)],
}
LAWS = {
    "plain": LawConfig(),
    "hot": LawConfig(temperature=1.7),
    "guided": LawConfig(cfg_scale=(2.5,)),
    "ramp": LawConfig(cfg_scale=(1.0, 2.0, 4.0)),
    "top-k": LawConfig(top_k=3),
    "top-p": LawConfig(top_p=0.7),
    "all": LawConfig(cfg_scale=(1.0, 2.0, 3.0), temperature=0.8, top_k=8, top_p=0.8),
}


def make_model(config: NextScaleConfig, seed: int = 0) -> NextScale:
    torch.manual_seed(seed)
    model = NextScale(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.15 * torch.randn(weight.shape))
    return model


def make(config: NextScaleConfig = CLASSES, law: LawConfig = LawConfig(), score_law: LawConfig | None = None, **rest) -> NextScalePolicy:
    model = make_model(config)
    return NextScalePolicy(model, MultiScaleVQ(TOKENIZER, config.grids), sample_law=law, score_law=score_law or law, **rest)


def prompts_for(policy: NextScalePolicy) -> list[Prompt]:
    return PROMPTS["classes" if policy.module.config.text is None else "text"]


def stream(rows: Sequence[int], seed: int = 0) -> Stream:
    return Stream(seed=seed, path=("rollout", 0), rows=tuple(rows))


def rollout_of(policy: NextScalePolicy, seed: int = 0) -> Rollout:
    prompts = prompts_for(policy)
    return policy.rollout(prompts, stream(range(len(prompts)), seed))


def gap(policy: NextScalePolicy, rollout: Rollout) -> float:
    return (policy.score(rollout).logp - rollout.logp).abs().max().item()


@pytest.fixture(params=[TEXT, CLASSES, BLOCK], ids=["text, wide", "classes, square", "first grid 2x2"])
def policy(request) -> NextScalePolicy:
    return make(request.param)


# ---- it scores what it did


def test_it_branches(policy):
    assert isinstance(policy, BranchingPolicy)


def test_replay(policy):
    rollout = rollout_of(policy)
    assert gap(policy, rollout) <= 1e-5
    assert rollout.sample_logp is None
    assert rollout.sampled.all()
    assert rollout.step[0].tolist() == [s for s, (h, w) in enumerate(policy.layout.grids) for _ in range(h * w)]
    assert rollout.logp.shape == rollout.actions.shape == (4, policy.layout.tokens)
    assert policy.score(rollout).kl is None


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("config", [CLASSES, replace(TEXT, grids=TEXT.grids[1:])], ids=["classes", "text"])
def test_replay_under_every_law(law, config):
    policy = make(config, law)
    rollout = rollout_of(policy)
    assert gap(policy, rollout) <= 1e-5
    assert rollout.logp.isfinite().all()


@torch.no_grad()
def law_by_hand(policy: NextScalePolicy, rollout: Rollout, law: LawConfig) -> torch.Tensor:
    """[B, L, V]: two separate teacher-forced passes, and the definition of each step of the law."""
    model, inputs = policy.module, policy.tokenizer.inputs(rollout.actions)
    condition, none = (model.condition(policy.ids(p)) for p in (rollout.prompts, [Prompt()] * len(rollout)))
    cond, uncond = model.logits(model(condition, inputs), condition), model.logits(model(none, inputs), none)
    scale = torch.tensor([law.guidance(s) for s in rollout.step[0].tolist()])[:, None]
    logits = (uncond + scale * (cond - uncond)) / law.temperature
    if law.top_k:
        logits = logits.masked_fill(logits < logits.sort(-1, descending=True).values[..., law.top_k - 1, None], -torch.inf)
    p, order = logits.softmax(-1).sort(-1, descending=True)
    keep = p.cumsum(-1) - p < law.top_p
    return logits.masked_fill(~keep.gather(-1, order.argsort(-1)), -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_recorded_logp_is_that_of_the_law_by_hand(law):
    policy = make(CLASSES, law)
    rollout = rollout_of(policy)
    want = law_by_hand(policy, rollout, law)
    torch.testing.assert_close(rollout.logp, want.gather(-1, rollout.actions[..., None])[..., 0], rtol=0, atol=2e-5)
    entropy = torch.distributions.Categorical(logits=want).entropy()
    torch.testing.assert_close(policy.score(rollout).entropy, entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("drawn", "scored"), [("all", "plain"), ("ramp", "hot"), ("plain", "guided")])
def test_two_laws_are_both_recorded(drawn, scored):
    policy = make(CLASSES, LAWS[drawn], LAWS[scored])
    rollout = rollout_of(policy)
    assert rollout.sample_logp is not None
    for logp, law in ((rollout.sample_logp, LAWS[drawn]), (rollout.logp, LAWS[scored])):
        want = law_by_hand(policy, rollout, law).gather(-1, rollout.actions[..., None])[..., 0]
        torch.testing.assert_close(logp, want, rtol=0, atol=2e-5)
    assert gap(policy, rollout) <= 1e-5
    assert (rollout.logp - rollout.sample_logp).abs().max() > 0.1


def test_a_law_drawn_from_is_the_same_picture_whatever_is_scored():
    plain, other = make(CLASSES), make(CLASSES, LawConfig(), LAWS["guided"])
    assert torch.equal(rollout_of(plain).actions, rollout_of(other).actions)


def test_greedy_does_not_hear_the_dice():
    policy = make(CLASSES, LawConfig(top_k=1))
    assert torch.equal(rollout_of(policy, 0).actions, rollout_of(policy, 1).actions)
    assert rollout_of(policy).logp.abs().max() == 0


# ---- addresses


def test_the_same_address_is_the_same_picture_whatever_the_batch(policy):
    prompts = prompts_for(policy)
    whole = rollout_of(policy)
    for rows in ([0], [1, 2], [3, 0, 2]):
        part = policy.rollout([prompts[i] for i in rows], stream(rows))
        assert torch.equal(part.actions, whole.actions[rows])
        torch.testing.assert_close(part.logp, whole.logp[rows], rtol=0, atol=1e-5)
        assert part.index.tolist() == rows


def test_different_rows_are_different_pictures(policy):
    rollout = policy.rollout([prompts_for(policy)[0]] * 8, stream(range(8)))
    assert len({tuple(ids) for ids in rollout.actions.tolist()}) == 8
    assert not torch.equal(rollout_of(policy, 0).actions, rollout_of(policy, 1).actions)


def test_the_batch_does_not_change_a_score(policy):
    rollout = rollout_of(policy)
    alone = torch.cat([policy.score(rollout.rows([i])).logp for i in range(4)])
    torch.testing.assert_close(alone, policy.score(rollout).logp, rtol=0, atol=1e-5)


# ---- prefixes


@pytest.mark.parametrize("law", [LAWS["plain"], LawConfig(cfg_scale=(3.0,), top_k=8)], ids=["plain", "guided"])
@pytest.mark.parametrize("config", [TEXT, BLOCK], ids=["text, wide", "first grid 2x2"])
def test_fork_at_every_scale(config, law):
    policy = make(config, law)
    prompts, copies = prompts_for(policy), 3
    for steps in range(1, policy.layout.steps):
        prefix = policy.prefix(prompts, stream(range(4)), steps=steps)
        drawn = policy.module.ends[steps - 1]
        assert prefix.actions.shape == (4, drawn)
        assert gap(policy, prefix) <= 1e-5
        whole = policy.complete(prefix, stream(range(4)).at("suffix").repeat(copies))
        assert len(whole) == 4 * copies
        assert gap(policy, whole) <= 1e-5
        assert torch.equal(whole.actions[:, :drawn], prefix.actions.repeat_interleave(copies, 0))
        assert whole.prompts == tuple(p for p in prompts for _ in range(copies))
        assert not whole.sampled[:, :drawn].any()
        assert whole.sampled[:, drawn:].all()
        assert prefix.sampled.all()
        assert whole.index.tolist() == list(range(12))
        assert len({tuple(ids) for ids in whole.actions.tolist()}) == 12, "siblings go different ways"
        again = policy.complete(prefix, stream(range(4)).at("suffix").repeat(copies))
        assert torch.equal(again.actions, whole.actions), "a prefix may be completed more than once"


def test_a_prefix_is_the_beginning_of_the_whole(policy):
    whole = rollout_of(policy)
    for steps in range(1, policy.layout.steps + 1):
        prefix = policy.prefix(prompts_for(policy), stream(range(4)), steps=steps)
        # rows of uniforms are drawn in one go, so a shorter row is a longer one's beginning
        assert torch.equal(prefix.actions, whole.actions[:, : prefix.actions.shape[1]])


def test_completions_with_two_laws_keep_both():
    policy = make(CLASSES, LAWS["ramp"], LAWS["plain"])
    prefix = policy.prefix(prompts_for(policy), stream(range(4)), steps=2)
    whole = policy.complete(prefix, stream(range(8)).at("suffix"))
    want = law_by_hand(policy, whole, LAWS["ramp"]).gather(-1, whole.actions[..., None])[..., 0]
    torch.testing.assert_close(whole.sample_logp, want, rtol=0, atol=2e-5)
    assert gap(policy, whole) <= 1e-5


def test_scoring_a_prefix_costs_only_its_tokens(policy):
    prefix = policy.prefix(prompts_for(policy), stream(range(4)), steps=2)
    seen: list[int] = []
    policy.module.head.register_forward_hook(lambda head, args, out: seen.append(out.shape[1]))
    policy.score(prefix)
    assert seen == [policy.module.ends[1]]


@pytest.mark.parametrize("steps", [0, -1, 4])
def test_a_prefix_that_the_model_cannot_draw(steps):
    policy = make(CLASSES)
    with pytest.raises(ConfigError, match=f"prefix of {steps} steps"):
        policy.prefix(prompts_for(policy), stream(range(4)), steps=steps)


def test_a_sliced_prefix_cannot_go_on():
    policy = make(CLASSES)
    prefix = policy.prefix(prompts_for(policy), stream(range(4)), steps=1)
    with pytest.raises(ConfigError, match="no state"):
        policy.complete(prefix.rows([0, 1]), stream(range(2)))
    whole = policy.prefix(prompts_for(policy), stream(range(4)), steps=policy.layout.steps)
    with pytest.raises(ConfigError, match=rf"have all of their {policy.layout.tokens} tokens\. Take a prefix of fewer steps"):
        policy.complete(whole, stream(range(4)))


# ---- reference and gradient


@pytest.mark.parametrize("law", [LAWS["plain"], LAWS["all"]], ids=["plain", "all"])
def test_kl_by_hand(law):
    policy = make(CLASSES, law)
    rollout = rollout_of(policy)
    policy.reference = make_model(CLASSES).eval().requires_grad_(False)
    same = policy.score(rollout)
    assert same.kl is not None
    assert same.ref_logp is not None
    assert same.kl.abs().max() == 0, "at equal weights"
    assert torch.equal(same.ref_logp, same.logp)

    policy.reference = make_model(CLASSES, seed=1).eval().requires_grad_(False)
    if law.top_k:  # where the reference's filter drops a token that the policy keeps, the divergence is truly infinite
        return
    score = policy.score(rollout)
    p = law_by_hand(policy, rollout, law)
    q = law_by_hand(NextScalePolicy(policy.reference, policy.tokenizer), rollout, law)
    torch.testing.assert_close(score.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score.ref_logp, q.gather(-1, rollout.actions[..., None])[..., 0], rtol=0, atol=2e-5)
    assert (score.kl > 0).all()


def test_gradient_flows_to_the_policy_alone():
    policy = make(TEXT)
    policy.reference = make_model(TEXT, seed=1).eval()
    score = policy.score(rollout_of(policy))
    assert not score.entropy.requires_grad
    assert not score.ref_logp.requires_grad
    (score.logp.sum() + score.kl.sum()).backward()
    assert all(p.grad is not None for p in policy.module.parameters())
    assert all(p.grad is None for p in policy.reference.parameters())
    assert all(p.grad is None for p in policy.tokenizer.parameters())


def test_acting_and_showing_leave_no_graph(policy):
    rollout = rollout_of(policy)
    assert not rollout.logp.requires_grad
    assert not policy.decode(rollout).requires_grad


@pytest.mark.parametrize("law", [LAWS["plain"], LAWS["guided"]], ids=["plain", "guided"])
@pytest.mark.parametrize("rows", [1, 3])
def test_chunked_scoring_is_scoring(monkeypatch, law, rows):
    policy = make(CLASSES, law)
    rollout = rollout_of(policy)
    policy.reference = make_model(CLASSES, seed=1).eval().requires_grad_(False)

    def results() -> list[torch.Tensor]:
        policy.module.zero_grad()
        score = policy.score(rollout)
        (score.logp * torch.arange(4)[:, None] + score.kl.square()).sum().backward()
        return [score.logp, score.entropy, score.kl, score.ref_logp, *(p.grad.clone() for p in policy.module.parameters())]

    whole = results()
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", rows * rollout.actions.shape[1] * TOKENIZER.vocab)
    for got, want in zip(results(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_acts_and_scores_alike(policy):
    low = NextScalePolicy(policy.module, policy.tokenizer, dtype=torch.bfloat16)
    rollout = rollout_of(low)
    assert rollout.logp.dtype == torch.float32
    assert gap(low, rollout) < 0.1
    prefix = low.prefix(prompts_for(low), stream(range(4)), steps=2)
    assert gap(low, low.complete(prefix, stream(range(8)).at("suffix"))) < 0.1
    score = low.score(rollout)
    score.logp.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in low.module.parameters())


def test_in_bfloat16_the_model_sees_what_it_will_see_in_its_replay(policy):
    """The partial pictures are summed in fp32 in both, so they are equal but for the order of a sum; in bf16 they would be off by 4e-3."""
    low = NextScalePolicy(policy.module, policy.tokenizer, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    low.module.word_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rollout = rollout_of(low)
    torch.testing.assert_close(torch.cat(seen, 1), low.tokenizer.inputs(rollout.actions), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("config", [TEXT, BLOCK], ids=["text, wide", "first grid 2x2"])
def test_acting_forking_and_replay_on_cuda(config, dtype, allowed):
    law = LawConfig(cfg_scale=(3.0,), top_k=8)
    model, tokenizer = make_model(config).cuda(), MultiScaleVQ(TOKENIZER, config.grids).cuda()
    policy = NextScalePolicy(model, tokenizer, sample_law=law, dtype=dtype)
    policy.reference = make_model(config, seed=1).cuda().eval().requires_grad_(False)
    prefix = policy.prefix(prompts_for(policy), stream(range(4)), steps=2)
    whole = policy.complete(prefix, stream(range(8)).at("suffix"))
    assert whole.actions.is_cuda
    assert max(gap(policy, prefix), gap(policy, whole), gap(policy, rollout_of(policy))) <= allowed
    assert policy.score(whole).kl.isfinite().all()
    assert policy.decode(whole).isfinite().all()


# ---- pictures, prompts, settings


def test_pictures_lie_in_the_unit_interval(policy):
    image = policy.decode(rollout_of(policy))
    h, w = policy.module.config.image_size
    assert image.shape == (4, 3, h, w)
    assert 0 <= image.min() < image.max() <= 1


@pytest.mark.parametrize("label", [-1, 5, 1000])
def test_a_class_that_the_model_does_not_know(label):
    with pytest.raises(DataError, match=f"label {label}.*0 to 4"):
        make(CLASSES).rollout([Prompt(label=label)], stream([0]))


@pytest.mark.parametrize(
    ("config", "prompt", "named"),
    [
        (TEXT, Prompt(text="x"), "'x'"),
        (TEXT, Prompt(label=2), "label 2: this model reads text"),
        (CLASSES, Prompt(text="AB"), "'AB': this model draws classes and reads no text.*0 to 4"),
    ],
)
def test_a_prompt_that_the_model_cannot_read(config, prompt, named):
    """It would be drawn as the empty prompt, and nobody would know."""
    with pytest.raises(DataError, match=named):
        make(config).rollout([Prompt(), prompt], stream([0, 1]))


def test_a_prompts_picture_does_not_depend_on_longer_neighbours():
    policy = make(TEXT)
    alone = policy.rollout([Prompt(text="A")], stream([0]))
    beside = policy.rollout([Prompt(text="A"), Prompt(text="ABCABC")], stream([0, 1]))
    assert torch.equal(alone.actions[0], beside.actions[0])
    torch.testing.assert_close(alone.logp[0], beside.logp[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sample_law", "score_law"])
@pytest.mark.parametrize(("law", "named"), [(LawConfig(cfg_scale=(1.0, 2.0)), "2 values.*3 scales"), (LawConfig(top_k=25), "top_k=25.*24")])
def test_laws_that_do_not_fit_the_model(name, law, named):
    with pytest.raises(ConfigError, match=f"{name}.*{named}"):
        NextScalePolicy(make_model(CLASSES), MultiScaleVQ(TOKENIZER, CLASSES.grids), **{name: law})


# ---- mixtures of codes, for show


def test_smooth_with_one_code_left_is_greedy():
    policy = make(CLASSES, LawConfig(cfg_scale=(1.0, 2.0, 4.0), top_k=1))
    prompts = prompts_for(policy)
    greedy = policy.decode(policy.rollout(prompts, stream(range(4))))
    torch.testing.assert_close(policy.smooth(prompts, stream(range(4))), greedy, rtol=0, atol=1e-5)


def test_smooth_pictures_have_addresses_and_differ_from_drawn_ones(policy):
    prompts = prompts_for(policy)
    whole = policy.smooth(prompts, stream(range(4)))
    torch.testing.assert_close(policy.smooth(prompts[2:], stream([2, 3])), whole[2:], rtol=0, atol=1e-5)
    assert (whole - policy.decode(rollout_of(policy))).abs().max() > 0.01
    assert (whole - policy.smooth(prompts, stream(range(4), seed=1))).abs().max() > 0.01
