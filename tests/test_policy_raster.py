from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from PIL import Image
from scipy.stats import chisquare

from varl.build import build_policy
from varl.checkpoints import model as model_folder
from varl.config import CaptionConfig, LawConfig, PicturesConfig, RasterConfig, RunConfig, VQConfig
from varl.data.pictures import read_pictures
from varl.errors import ConfigError, DataError
from varl.models.raster import Raster
from varl.policies import sampling
from varl.policies.acting import first_of_each
from varl.policies.raster import RasterPolicy, corrupt, pad_left
from varl.rng import Stream
from varl.tokenizers.vq import VQ
from varl.types import BranchingPolicy, Prompt, Rollout, TeacherForcedPolicy

TOKENIZER = VQConfig(vocab=10, channels=4, latent=4, width=8, multipliers=(1, 2), blocks=1, attention=False)
CLASSES = RasterConfig(depth=2, width=16, heads=2, grid=(2, 3), mlp_width=24, num_classes=5, tokenizer=TOKENIZER)
CAPTIONS = replace(CLASSES, num_classes=None, captions=CaptionConfig(tokens=4, width=6))
PROMPTS = {
    "classes": [Prompt(label=0), Prompt(label=4), Prompt(), Prompt(label=0)],
    "captions": [Prompt(text="a b c"), Prompt(text="d"), Prompt(), Prompt(text="a b c")],
}
LAWS = {
    "plain": LawConfig(),
    "hot": LawConfig(temperature=1.7),
    "guided": LawConfig(cfg_scale=(2.5,)),
    "interval": LawConfig(cfg_scale=(3.0, 3.0, 1.0, 1.0, 1.0, 2.0)),
    "top-k": LawConfig(top_k=3),
    "top-p": LawConfig(top_p=0.7),
    "all": LawConfig(cfg_scale=(2.0,), temperature=0.8, top_k=6, top_p=0.8),
}


def features_of(texts: Sequence[str]) -> list[torch.Tensor]:
    """A word is a vector."""
    return [torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(ord(word[0]))) for word in text.split()]) for text in texts]


def make_model(config: RasterConfig, seed: int = 0) -> Raster:
    torch.manual_seed(seed)
    model = Raster(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def make(config: RasterConfig = CLASSES, law: LawConfig = LawConfig(), score_law: LawConfig | None = None, **rest) -> RasterPolicy:
    model = make_model(config)
    tokenizer = VQ(config.tokenizer)
    return RasterPolicy(model, tokenizer, captions=features_of, sample_law=law, score_law=score_law or law, **rest)


def prompts_for(policy: RasterPolicy) -> list[Prompt]:
    return PROMPTS["classes" if policy.module.config.captions is None else "captions"]


def stream(rows: Sequence[int], seed: int = 0) -> Stream:
    return Stream(seed=seed, path=("rollout", 0), rows=tuple(rows))


def rollout_of(policy: RasterPolicy, seed: int = 0) -> Rollout:
    return policy.rollout(prompts_for(policy), stream(range(4), seed))


def given_to(policy: RasterPolicy) -> Rollout:
    ids = torch.randint(policy.vocab, (4, policy.layout.tokens), generator=torch.Generator().manual_seed(3))
    return policy.given(ids, prompts_for(policy))


def draws_of(policy: RasterPolicy, noise: float = 0.5, copies: int = 3) -> Rollout:
    return policy.draw(given_to(policy), stream(range(4)).repeat(copies), prefix_noise=noise)


def gap(policy: RasterPolicy, rollout: Rollout) -> float:
    return (policy.score(rollout).logp - rollout.logp).abs().max().item()


@pytest.fixture(params=[CLASSES, CAPTIONS], ids=["classes", "captions"])
def policy(request) -> RasterPolicy:
    return make(request.param)


# ---- it scores what it did


def test_its_powers(policy):
    assert isinstance(policy, BranchingPolicy)
    assert isinstance(policy, TeacherForcedPolicy)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("config", [CLASSES, CAPTIONS], ids=["classes", "captions"])
def test_replay_under_every_law(law, config):
    policy = make(config, law)
    rollout, draws = rollout_of(policy), draws_of(policy)
    assert gap(policy, rollout) <= 1e-5
    assert gap(policy, draws) <= 1e-5
    assert rollout.logp.isfinite().all()
    assert rollout.sample_logp is None
    assert rollout.sampled.all()
    assert rollout.step.tolist() == [list(range(6))] * 4
    assert policy.score(rollout).kl is None


@torch.no_grad()
def law_by_hand(policy: RasterPolicy, prompts: Sequence[Prompt], read: torch.Tensor, law: LawConfig) -> torch.Tensor:
    """[B, L, V]: each row and its "none" alone, and the definition of each step of the law."""
    model, rows = policy.module, []
    for prompt, ids in zip(prompts, read, strict=True):
        if model.config.captions is None:
            asked, none = torch.tensor([5 if prompt.label is None else prompt.label]), torch.tensor([5])
        else:
            nothing = model.cls_embedding.uncond_embedding
            asked = features_of([prompt.text])[0][None] if prompt.text else nothing[None]
            none = nothing[None, -asked.shape[1] :]
        cond, uncond = (model.logits(model(model.condition(given), ids[None])) for given in (asked, none))
        scale = torch.tensor([law.guidance(s) for s in range(len(ids))])[:, None]
        logits = (uncond + scale * (cond - uncond)) / law.temperature
        if law.top_k:
            logits = logits.masked_fill(logits < logits.sort(-1, descending=True).values[..., law.top_k - 1, None], -torch.inf)
        p, order = logits.softmax(-1).sort(-1, descending=True)
        keep = p.cumsum(-1) - p < law.top_p
        rows.append(logits.masked_fill(~keep.gather(-1, order.argsort(-1)), -torch.inf).log_softmax(-1))
    return torch.cat(rows)


def picked(logp: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logp.gather(-1, ids[..., None])[..., 0]


@pytest.mark.parametrize(("config", "law"), [*((CLASSES, law) for law in LAWS), (CAPTIONS, "guided"), (CAPTIONS, "all")])
def test_recorded_logp_is_that_of_the_law_by_hand(config, law):
    law = LAWS[law]
    policy = make(config, law)
    for rollout in (rollout_of(policy), draws_of(policy)):
        want = law_by_hand(policy, rollout.prompts, rollout.actions if rollout.context is None else rollout.context, law)
        torch.testing.assert_close(rollout.logp, picked(want, rollout.actions), rtol=0, atol=2e-5)
        entropy = torch.distributions.Categorical(logits=want).entropy()
        torch.testing.assert_close(policy.score(rollout).entropy, entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("drawn", "scored"), [("all", "plain"), ("interval", "hot"), ("plain", "guided")])
def test_two_laws_are_both_recorded(drawn, scored):
    policy = make(CLASSES, LAWS[drawn], LAWS[scored])
    for rollout in (rollout_of(policy), draws_of(policy)):
        assert rollout.sample_logp is not None
        read = rollout.actions if rollout.context is None else rollout.context
        for logp, law in ((rollout.sample_logp, LAWS[drawn]), (rollout.logp, LAWS[scored])):
            torch.testing.assert_close(logp, picked(law_by_hand(policy, rollout.prompts, read, law), rollout.actions), rtol=0, atol=2e-5)
        assert gap(policy, rollout) <= 1e-5
        assert (rollout.logp - rollout.sample_logp).abs().max() > 0.1


def test_greedy_does_not_hear_the_dice():
    policy = make(CLASSES, LawConfig(top_k=1))
    assert torch.equal(rollout_of(policy, 0).actions, rollout_of(policy, 1).actions)
    assert rollout_of(policy).logp.abs().max() == 0


# ---- what is drawn, against enumeration


SMALL = replace(CLASSES, grid=(1, 2), tokenizer=replace(TOKENIZER, vocab=3))


@pytest.mark.parametrize("law", [LAWS["plain"], LawConfig(cfg_scale=(2.0,), temperature=0.7, top_k=2)], ids=["plain", "all"])
def test_pictures_come_as_often_as_their_probability(law):
    policy, rows = make(SMALL, law), 2000
    pictures = torch.tensor(list(product(range(3), repeat=2)))
    want = picked(law_by_hand(policy, [Prompt(label=1)] * 9, pictures, law), pictures).sum(1).exp()
    assert want.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = policy.rollout([Prompt(label=1)] * rows, stream(range(rows))).actions
    seen = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    assert seen[want == 0].sum() == 0
    possible = want > 0
    assert chisquare(seen[possible], want[possible].double() / want.double().sum() * rows).pvalue > 1e-3


def test_teacher_forced_draws_come_as_often_as_their_probability_and_independently():
    policy, rows = make(SMALL), 2000
    given = policy.given(torch.tensor([[2, 1]]), [Prompt(label=1)])
    drawn = policy.draw(given, stream([0]).repeat(rows), prefix_noise=0.0)
    first, second = law_by_hand(policy, given.prompts, given.actions, LawConfig())[0].exp()
    want = torch.outer(first, second).flatten().double()  # the second reads the given first token, not the one that was drawn
    seen = torch.bincount(drawn.actions[:, 0] * 3 + drawn.actions[:, 1], minlength=9)
    assert chisquare(seen, want / want.sum() * rows).pvalue > 1e-3


# ---- addresses


@pytest.mark.parametrize("law", [LAWS["plain"], LAWS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("config", [CLASSES, CAPTIONS], ids=["classes", "captions"])
def test_the_same_address_is_the_same_picture_whatever_the_batch(config, law):
    policy = make(config, law)
    prompts, whole, given, draws = prompts_for(policy), rollout_of(policy), given_to(policy), draws_of(policy)
    for rows in ([0], [1, 2], [3, 0, 2]):
        part = policy.rollout([prompts[i] for i in rows], stream(rows))
        assert torch.equal(part.actions, whole.actions[rows])
        torch.testing.assert_close(part.logp, whole.logp[rows], rtol=0, atol=1e-5)
        assert part.index.tolist() == rows
        drawn = policy.draw(given.rows(rows), stream(rows).repeat(3), prefix_noise=0.5)
        same = draws.rows([3 * row + copy for row in rows for copy in range(3)])
        assert torch.equal(drawn.actions, same.actions)
        assert torch.equal(drawn.context, same.context)
        assert torch.equal(drawn.index, same.index)


def test_different_rows_are_different_pictures(policy):
    rollout = policy.rollout([prompts_for(policy)[0]] * 8, stream(range(8)))
    assert len({tuple(ids) for ids in rollout.actions.tolist()}) == 8
    assert not torch.equal(rollout_of(policy, 0).actions, rollout_of(policy, 1).actions)


def test_the_batch_does_not_change_a_score(policy):
    for rollout in (rollout_of(policy), draws_of(policy)):
        alone = torch.cat([policy.score(rollout.rows([i])).logp for i in range(len(rollout))])
        torch.testing.assert_close(alone, policy.score(rollout).logp, rtol=0, atol=1e-5)


# ---- what is shared is computed once


def rows_through(policy: RasterPolicy) -> list[tuple[int, ...]]:
    """Fills with the rows and positions of each pass."""
    seen: list[tuple[int, ...]] = []
    policy.module.layers[0].register_forward_hook(lambda block, args, out: seen.append(tuple(out.shape[:2])))
    return seen


def test_a_group_reads_its_prompt_once():
    policy = make(CLASSES, LAWS["guided"])
    seen = rows_through(policy)
    policy.rollout([Prompt(label=2)] * 5 + [Prompt(label=3)] * 5, stream(range(10)))
    assert seen == [(3, 1), *[(20, 1)] * 5], "two classes and one none; then both halves of ten rows, token by token"


@pytest.mark.parametrize("law", [LAWS["plain"], LAWS["guided"]], ids=["plain", "guided"])
def test_draws_that_share_a_context_share_a_pass_and_its_logits(law):
    policy = make(CLASSES, law)
    seen, heads = rows_through(policy), []
    policy.module.output.register_forward_hook(lambda head, args, out: heads.append(out.shape[0]))
    draws = draws_of(policy, copies=8)
    both = 2 if law.guided else 1
    assert (seen, heads) == ([(4 * both, 6)], [4] * both)
    policy.score(draws.rows([31, 2, 3, 30, 9, 17]))
    assert (seen[1:], heads[both:]) == ([(4 * both, 6)], [4] * both)


def test_scores_of_shared_rows_are_those_of_each_row_and_so_is_their_gradient():
    policy = make(CLASSES, LAWS["guided"])
    draws = draws_of(policy).rows([11, 0, 3, 1, 10, 5, 2])
    weight = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))

    def results(rollouts: list[Rollout]) -> list[torch.Tensor]:
        policy.module.zero_grad()
        logp = torch.cat([policy.score(rollout).logp for rollout in rollouts])
        (logp * weight).sum().backward()
        return [logp, *(p.grad.clone() for p in policy.module.parameters())]

    for got, want in zip(results([draws]), results([draws.rows([i]) for i in range(7)]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_first_of_each_by_hand():
    a, b = Prompt(label=1), Prompt(label=2)
    read = torch.tensor([[1, 2], [1, 2], [1, 3], [1, 2]])
    assert first_of_each([a, b, a, a], read) == ([0, 1, 2], [0, 1, 2, 0])


# ---- prefixes


@pytest.mark.parametrize("law", [LAWS["plain"], LawConfig(cfg_scale=(3.0,), top_k=8)], ids=["plain", "guided"])
@pytest.mark.parametrize("config", [CLASSES, CAPTIONS], ids=["classes", "captions"])
def test_fork_at_every_token(config, law):
    policy, copies = make(config, law), 3
    prompts, whole = prompts_for(policy), rollout_of(policy)
    for steps in range(1, policy.layout.steps):
        prefix = policy.prefix(prompts, stream(range(4)), steps=steps)
        assert torch.equal(prefix.actions, whole.actions[:, :steps]), "a prefix is the beginning of the whole"
        assert gap(policy, prefix) <= 1e-5
        rest = stream(range(4)).at("suffix").repeat(copies)
        done = policy.complete(prefix, rest)
        assert gap(policy, done) <= 1e-5
        assert torch.equal(done.actions[:, :steps], prefix.actions.repeat_interleave(copies, 0))
        assert done.prompts == tuple(p for p in prompts for _ in range(copies))
        assert not done.sampled[:, :steps].any()
        assert done.sampled[:, steps:].all()
        assert done.index.tolist() == list(range(12))
        assert torch.equal(policy.complete(prefix, rest).actions, done.actions), "a prefix may be completed more than once"


def test_completions_with_two_laws_keep_both():
    policy = make(CLASSES, LAWS["interval"], LAWS["plain"])
    prefix = policy.prefix(prompts_for(policy), stream(range(4)), steps=2)
    done = policy.complete(prefix, stream(range(8)).at("suffix"))
    want = law_by_hand(policy, done.prompts, done.actions, LAWS["interval"])
    torch.testing.assert_close(done.sample_logp, picked(want, done.actions), rtol=0, atol=2e-5)
    assert gap(policy, done) <= 1e-5


@pytest.mark.parametrize("steps", [0, -1, 7])
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


# ---- a real picture


def test_a_picture_is_read_as_its_tokens(policy):
    images = torch.rand(4, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    given = policy.encode(images, prompts_for(policy))
    assert torch.equal(given.actions, policy.tokenizer.encode(images * 2 - 1))
    assert not given.sampled.any()
    assert given.logp.isnan().all()
    want = law_by_hand(policy, given.prompts, given.actions, LawConfig())
    torch.testing.assert_close(policy.score(given).logp, picked(want, given.actions), rtol=0, atol=2e-5)
    again = policy.given(given.actions, given.prompts)
    assert again.logp.isnan().all()
    assert torch.equal(again.actions, given.actions)


def encoded(policy: RasterPolicy) -> list[int]:
    """Fills with the number of pictures of each pass of the encoder."""
    seen: list[int] = []
    policy.tokenizer.encoder.register_forward_hook(lambda encoder, args, out: seen.append(len(out)))
    return seen


def of_pictures(tmp_path, tokenizer_seed: int = 0) -> tuple[RasterPolicy, torch.Tensor]:
    """Built as a run builds it: a model folder, four pictures of noise, and a folder to keep tokens in."""
    raster = make_model(CLASSES)
    torch.manual_seed(tokenizer_seed)
    model = model_folder.save(tmp_path / f"base-{tokenizer_seed}", raster, VQ(TOKENIZER), {})
    (tmp_path / "real").mkdir(exist_ok=True)
    noise = (torch.rand(4, 4, 6, 3, generator=torch.Generator().manual_seed(1)) * 256).byte().numpy()
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "real" / f"{i}.png")
    data = PicturesConfig(path=str(tmp_path / "real"), image_size=(4, 6), tokens=str(tmp_path / "tokens"))
    policy = build_policy(RunConfig(model=str(model), data=data, rewards={}), torch.device("cpu"), reference=False)
    pictures = read_pictures(data)
    return policy, pictures.images(pictures.prompts)


def test_kept_tokens_are_those_of_the_tokenizer_and_a_second_run_encodes_nothing(tmp_path):
    for run in range(2):
        policy, images = of_pictures(tmp_path)
        seen = encoded(policy)
        given = [policy.encode(images[rows], [PROMPTS["classes"][row] for row in rows]) for rows in ([0, 1, 2], [2, 3])]
        assert seen == ([3, 1] if run == 0 else [])
        policy.tokens = None
        for kept, rows in zip(given, ([0, 1, 2], [2, 3]), strict=True):
            plain = policy.encode(images[rows], [PROMPTS["classes"][row] for row in rows])
            assert torch.equal(kept.actions, plain.actions)
            a, b = (policy.draw(known, stream(rows).repeat(2), prefix_noise=0.5) for known in (kept, plain))
            assert torch.equal(a.actions, b.actions)
            assert torch.equal(a.logp, b.logp)
            assert torch.equal(a.context, b.context)


def test_tokens_that_another_tokenizer_left_are_refused_by_name(tmp_path):
    policy, images = of_pictures(tmp_path)
    policy.encode(images, PROMPTS["classes"])
    with pytest.raises(DataError, match=r"tokens of the tokenizer '.*base-0'.*, not of '.*base-1'.*Give another folder"):
        of_pictures(tmp_path, tokenizer_seed=1)


def test_draws_read_the_picture_and_not_one_another(policy):
    given = given_to(policy)
    draws = policy.draw(given, stream(range(4)).repeat(5), prefix_noise=0.0)
    assert torch.equal(draws.context, given.actions.repeat_interleave(5, 0))
    assert draws.prompts == tuple(p for p in given.prompts for _ in range(5))
    assert draws.sampled.all()
    assert draws.index.tolist() == list(range(20))
    assert len({tuple(ids) for ids in draws.actions[:5].tolist()}) == 5


def test_noise_is_one_for_all_draws_of_a_picture():
    policy = make(CLASSES)
    context, given = draws_of(policy, noise=0.7).context.unflatten(0, (4, 3)), given_to(policy).actions
    assert torch.equal(context[:, 0], context[:, 1])
    assert torch.equal(context[:, 0], context[:, 2])
    assert 0 < (context[:, 0] != given).sum() < given.numel()
    assert torch.equal(context[:, 0, -1], given[:, -1])


def test_the_kernel_by_hand():
    ids = torch.tensor([[0, 1, 2, 3]])
    dice = torch.tensor([[[0.49, 0.0], [0.49, 0.999], [0.5, 0.0], [0.0, 0.0]]])
    assert corrupt(ids, dice, 0.5, 4).tolist() == [[1, 0, 2, 3]], "the third's die is too high; the last is never read"
    assert torch.equal(corrupt(ids, dice, 0.0, 4), ids)
    dice[..., 0] = 0.9999
    assert (corrupt(ids, dice, 1.0, 4) != ids).tolist() == [[True, True, True, False]]


def test_the_kernel_takes_each_other_token_as_often():
    """Over a grid of the second die, each of the others exactly as often, and never the token itself."""
    vocab, each = 5, 25
    place = (torch.arange((vocab - 1) * each) + 0.5) / ((vocab - 1) * each)
    for token in range(vocab):
        dice = torch.stack([torch.zeros_like(place), place], -1)[:, None].expand(-1, 2, -1)
        new = corrupt(torch.full((len(place), 2), token), dice, 0.5, vocab)[:, 0]
        assert torch.bincount(new, minlength=vocab).tolist() == [0 if other == token else each for other in range(vocab)]


def test_the_share_of_noise():
    ids = torch.zeros(2000, 11, dtype=torch.long)
    changed = corrupt(ids, stream(range(2000)).uniform(11, 2), 0.3, 7) != ids
    assert changed[:, :-1].float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 20000) ** 0.5)


@pytest.mark.parametrize("noise", [-0.1, 1.1])
def test_a_share_that_is_none(noise):
    with pytest.raises(ConfigError, match=f"prefix_noise={noise}"):
        draws_of(make(CLASSES), noise=noise)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (torch.full((1, 6), 10), "6 tokens between 10 and 10: a picture of this model has 6 between 0 and 9"),
        (torch.zeros(1, 5, dtype=torch.long), "5 tokens"),
        (torch.full((1, 6), -1), "another tokenizer"),
    ],
)
def test_tokens_of_another_tokenizer(ids, named):
    with pytest.raises(DataError, match=named):
        make(CLASSES).given(ids, [Prompt(label=0)])


def test_a_picture_of_another_size():
    with pytest.raises(DataError, match="pictures of 6x4 pixels: the model was trained on 4x6"):
        make(CLASSES).encode(torch.zeros(1, 3, 6, 4), [Prompt(label=0)])


# ---- reference and gradient


@pytest.mark.parametrize("law", [LAWS["plain"], LAWS["guided"]], ids=["plain", "guided"])
def test_kl_by_hand(law):
    policy = make(CLASSES, law)
    rollout = draws_of(policy)
    policy.reference = make_model(CLASSES).eval().requires_grad_(False)
    same = policy.score(rollout)
    assert same.kl.abs().max() == 0, "at equal weights"
    assert torch.equal(same.ref_logp, same.logp)
    policy.reference = make_model(CLASSES, seed=1).eval().requires_grad_(False)
    score = policy.score(rollout)
    p = law_by_hand(policy, rollout.prompts, rollout.context, law)
    q = law_by_hand(RasterPolicy(policy.reference, policy.tokenizer), rollout.prompts, rollout.context, law)
    torch.testing.assert_close(score.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score.ref_logp, picked(q, rollout.actions), rtol=0, atol=2e-5)


def test_gradient_flows_to_the_policy_alone(policy):
    policy.reference = make_model(policy.module.config, seed=1).eval()
    score = policy.score(draws_of(policy))
    assert not score.entropy.requires_grad
    assert not score.ref_logp.requires_grad
    (score.logp.sum() + score.kl.sum()).backward()
    assert all(p.grad is not None for p in policy.module.parameters())
    assert all(p.grad is None for module in (policy.reference, policy.tokenizer) for p in module.parameters())


def test_acting_and_showing_leave_no_graph(policy):
    rollout, draws = rollout_of(policy), draws_of(policy)
    assert not rollout.logp.requires_grad
    assert not draws.logp.requires_grad
    assert not policy.decode(rollout).requires_grad


@pytest.mark.parametrize("rows", [1, 3])
def test_in_slices_all_is_the_same(monkeypatch, rows):
    policy = make(CLASSES, LAWS["guided"])
    policy.reference = make_model(CLASSES, seed=1).eval().requires_grad_(False)

    def results() -> list[torch.Tensor]:
        policy.module.zero_grad()
        draws = draws_of(policy)
        score = policy.score(draws)
        (score.logp * torch.arange(12)[:, None] + score.kl.square()).sum().backward()
        grads = [p.grad.clone() for p in policy.module.parameters()]
        return [draws.actions, draws.logp, policy.decode(draws), score.logp, score.entropy, score.kl, score.ref_logp, *grads]

    whole = results()
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", rows * 6 * TOKENIZER.vocab)
    for got, want in zip(results(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_acts_and_scores_alike(policy):
    low = RasterPolicy(policy.module, policy.tokenizer, captions=features_of, dtype=torch.bfloat16)
    for rollout in (rollout_of(low), draws_of(low)):
        assert rollout.logp.dtype == torch.float32
        assert gap(low, rollout) < 0.1
    images = torch.rand(4, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(low.encode(images, prompts_for(low)).actions, policy.encode(images, prompts_for(low)).actions)
    low.score(rollout_of(low)).logp.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in low.module.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("config", [CLASSES, CAPTIONS], ids=["classes", "captions"])
def test_acting_forking_and_replay_on_cuda(config, dtype, allowed):
    law = LawConfig(cfg_scale=(3.0,), top_k=8)
    model, tokenizer = make_model(config).cuda(), VQ(TOKENIZER).cuda()
    policy = RasterPolicy(model, tokenizer, captions=features_of, sample_law=law, score_law=law, dtype=dtype)
    prefix = policy.prefix(prompts_for(policy), stream(range(4)), steps=2)
    done = policy.complete(prefix, stream(range(8)).at("suffix"))
    draws = draws_of(policy)
    assert done.actions.is_cuda
    assert max(gap(policy, rollout) for rollout in (prefix, done, draws, rollout_of(policy))) <= allowed
    assert policy.decode(draws).isfinite().all()


# ---- pictures, prompts, settings


def test_pictures_lie_in_the_unit_interval(policy):
    image = policy.decode(rollout_of(policy))
    assert image.shape == (4, 3, 4, 6)
    assert 0 <= image.min() < image.max() <= 1


def test_padding_by_hand():
    features, there = pad_left([torch.ones(1, 2), torch.full((3, 2), 2.0)])
    assert features.tolist() == [[[0, 0], [0, 0], [1, 1]], [[2, 2]] * 3]
    assert there.tolist() == [[False, False, True], [True] * 3]
    assert pad_left([torch.ones(2, 2)] * 3)[1] is None


def test_a_captions_picture_does_not_depend_on_longer_neighbours():
    policy = make(CAPTIONS, LAWS["guided"])
    alone = policy.rollout([Prompt(text="a")], stream([0]))
    beside = policy.rollout([Prompt(text="a"), Prompt(text="a b c d")], stream([0, 1]))
    assert torch.equal(alone.actions[0], beside.actions[0])
    torch.testing.assert_close(alone.logp[0], beside.logp[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "prompt", "error", "named"),
    [
        (CLASSES, Prompt(label=5), DataError, "label 5.*0 to 4"),
        (CLASSES, Prompt(text="a"), DataError, "'a': this model draws classes and reads no text.*0 to 4"),
        (CAPTIONS, Prompt(label=2), DataError, "label 2: this model reads text"),
        (CAPTIONS, Prompt(text="a b c d e"), DataError, "'a b c d e' has 5 tokens, the model takes 1 to 4"),
        (replace(CAPTIONS, captions=CaptionConfig(tokens=4, width=7)), Prompt(text="a"), ConfigError, "width 6.*trained on 7"),
    ],
)
def test_a_prompt_that_the_model_cannot_read(config, prompt, error, named):
    with pytest.raises(error, match=named):
        make(config).rollout([Prompt(), prompt], stream([0, 1]))


def test_captions_need_an_encoder():
    with pytest.raises(ConfigError, match="no encoder"):
        RasterPolicy(make_model(CAPTIONS), VQ(TOKENIZER))


@pytest.mark.parametrize("name", ["sample_law", "score_law"])
@pytest.mark.parametrize(("law", "named"), [(LawConfig(cfg_scale=(1.0, 2.0)), "2 values.*6 tokens"), (LawConfig(top_k=11), "top_k=11.*10")])
def test_laws_that_do_not_fit_the_model(name, law, named):
    with pytest.raises(ConfigError, match=f"{name}.*{named}"):
        RasterPolicy(make_model(CLASSES), VQ(TOKENIZER), **{name: law})
