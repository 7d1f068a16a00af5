import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from varl.config import CaptionConfig, RasterConfig, VQConfig
from varl.errors import ConfigError
from varl.models.layers import rotate
from varl.models.raster import Condition, Raster, RMSNorm, attention_mask, rotations

TINY = RasterConfig(depth=2, width=16, heads=2, grid=(3, 3), mlp_width=24, num_classes=4, tokenizer=VQConfig(vocab=12, channels=4))
CAPTIONS = CaptionConfig(tokens=5, width=6)
VARIANTS = {
    "classes": TINY,
    "wide": replace(TINY, grid=(2, 5)),
    "one head": replace(TINY, heads=1),
    "captions": replace(TINY, num_classes=None, captions=CAPTIONS),
    "one token": replace(TINY, grid=(1, 1)),
}


def make(config: RasterConfig) -> Raster:
    """A model whose every weight matters: a fresh one's head is 0."""
    torch.manual_seed(0)
    model = Raster(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def condition_for(model: Raster) -> Condition:
    """Of three rows; captions of 2, 5 and 3 tokens."""
    if model.config.captions is None:
        return model.condition(torch.tensor([0, 4, 2]))
    features = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    there = torch.arange(5) >= torch.tensor([[3], [0], [2]])
    return model.condition(features * there[..., None], there)


def tokens_for(model: Raster, batch: int = 3) -> torch.Tensor:
    return torch.randint(model.config.tokenizer.vocab, (batch, model.tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request) -> Raster:
    return make(request.param)


def decode(model: Raster, condition: Condition, tokens: torch.Tensor) -> torch.Tensor:
    cache, seen = model.cache(condition, model.tokens), []
    for t in range(model.tokens):
        seen.append(model.step(condition, tokens[:, t - 1] if t else None, cache))
        assert cache.length == model.capacity(condition, t + 1)
    return torch.cat(seen, 1)


# ---- one computation, several ways


@torch.no_grad()
def test_cached_decode_equals_teacher_forcing(model):
    condition, tokens = condition_for(model), tokens_for(model)
    torch.testing.assert_close(decode(model, condition, tokens), model(condition, tokens), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_beginning_is_the_beginning_of_the_whole_and_costs_only_its_tokens(model):
    condition, tokens = condition_for(model), tokens_for(model)
    whole, seen = model(condition, tokens), []
    model.layers[0].feed_forward.register_forward_hook(lambda *call: seen.append(call[-1].shape[1]))
    for count in range(1, model.tokens + 1):
        torch.testing.assert_close(model(condition, tokens[:, :count]), whole[:, :count], rtol=0, atol=1e-5)
        assert seen.pop() == model.capacity(condition, count)


@torch.no_grad()
def test_a_forked_cache_goes_on_as_its_rows_would_have(model):
    condition, tokens = condition_for(model), tokens_for(model)
    whole, rows = model(condition, tokens), torch.tensor([2, 0, 0, 1])
    for drawn in range(1, model.tokens):
        cache = model.cache(condition, drawn)
        for t in range(drawn):
            model.step(condition, tokens[:, t - 1] if t else None, cache)
        before = [k.clone() for k in cache.keys]
        fork, mine = cache.fork(rows, model.capacity(condition, model.tokens)), condition.rows(rows)
        for t in range(drawn, model.tokens):
            got = model.step(mine, tokens[rows, t - 1], fork)
            torch.testing.assert_close(got, whole[rows, t : t + 1], rtol=0, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(before, cache.keys, strict=True)), "the fork leaves its source alone"


# ---- who sees whom


@torch.no_grad()
def test_a_token_moves_the_rows_after_it_and_no_others(model):
    """Row t predicts token t. Were rows shifted by one, as in a release, row t would see token t, and copy it."""
    condition, tokens = condition_for(model), tokens_for(model)
    whole = model(condition, tokens)
    assert whole.shape[:2] == tokens.shape
    for t in range(model.tokens):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.tokenizer.vocab
        moved = (model(condition, changed) - whole).abs().amax((0, 2))
        assert moved[: t + 1].max() == 0
        assert (moved[t + 1 :] > 0).all()


def test_the_first_token_is_learnt_from_the_condition(model):
    condition, tokens = condition_for(model), tokens_for(model)
    first = model.logits(model(condition, tokens))[:, 0].log_softmax(-1).gather(1, tokens[:, :1]).sum()
    (into,) = torch.autograd.grad(first, condition.tokens)
    assert (into[:, -1].abs().amax(-1) > 0).all()
    with torch.no_grad():
        elsewhere = model(condition.rows(torch.tensor([1, 2, 0])), tokens)
        assert ((elsewhere - model(condition, tokens))[:, 0].abs().amax(-1) > 0).all()


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_one_another(model):
    condition, tokens = condition_for(model), tokens_for(model)
    whole = model(condition, tokens)
    for row in range(3):
        alone = condition.rows(torch.tensor([row]))
        torch.testing.assert_close(model(alone, tokens[row : row + 1]), whole[row : row + 1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_caption_without_its_padding_is_the_same_caption():
    model = make(VARIANTS["captions"])
    features, tokens = torch.randn(1, 3, 6), tokens_for(model, 1)
    alone = model.condition(features)
    for junk in (0.0, 100.0):  # what padding holds does not matter
        padded = model.condition(F.pad(features, (0, 0, 2, 0), value=junk), torch.tensor([[False, False, True, True, True]]))
        torch.testing.assert_close(model(padded, tokens), model(alone, tokens), rtol=0, atol=1e-5)
        torch.testing.assert_close(decode(model, padded, tokens), decode(model, alone, tokens), rtol=0, atol=1e-5)


def test_mask_by_hand():
    seen = attention_mask(torch.tensor([[True, True], [False, True]]), 2).int().tolist()
    assert seen[0][0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen[1][0] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_every_weight_learns(model):
    condition, tokens = condition_for(model), tokens_for(model)
    model.logits(model(condition, tokens)).logsumexp(-1).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    if model.tokens == 1:  # of a picture of one token nothing is read
        silent = [name for name in silent if name != "tok_embeddings.weight"]
    assert silent == []


# ---- positions


def test_rotations_by_hand():
    """Heads of 8: two pairs for the row, at frequencies 1 and 1/100, and two for the column."""
    turns = rotations((2, 3), 8, 1)
    assert turns.shape == (7, 4, 2)
    assert turns[0].abs().max() == 0, "the condition: neither cosine nor sine"
    row, column = 1, 2
    angles = [row, row / 100, column, column / 100]
    want = torch.tensor([[math.cos(a), math.sin(a)] for a in angles])
    torch.testing.assert_close(turns[1 + row * 3 + column], want)


def test_a_rotation_turns_neighbouring_channels():
    quarter = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert rotate(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), quarter).tolist() == [[[[-2.0, 1.0, 3.0, 4.0]]]]


@torch.no_grad()
def test_the_condition_is_seen_through_its_values_alone():
    """Its queries and keys are 0: the first row's attention is even over the condition, and gives the mean of the values."""
    model = make(VARIANTS["captions"])
    attention = model.layers[0].attention
    x = torch.randn(1, 5, 16)
    got = attention(x, model.turns[:5], None)
    values = x @ attention.wqkv.weight[32:].T
    torch.testing.assert_close(got[:, 4], attention.wo(values.mean(1)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_by_hand():
    model = make(TINY)
    attention, x, d = model.layers[0].attention, torch.randn(1, 10, 16), 8
    q, k, v = ((x @ w.T).view(10, 2, d).transpose(0, 1) for w in attention.wqkv.weight.split(16))
    angle = torch.stack([torch.tensor([y, y / 100, z, z / 100]) for y in range(3) for z in range(3)])
    turn = torch.cat([torch.zeros(1, 4, dtype=torch.cfloat), torch.polar(torch.ones_like(angle), angle)])
    q, k = (torch.view_as_real(torch.view_as_complex(t.reshape(2, 10, 4, 2)) * turn).flatten(2) for t in (q, k))
    scores = (q @ k.transpose(1, 2) / d**0.5).masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf)
    want = attention.wo((scores.softmax(-1) @ v).transpose(0, 1).reshape(1, 10, 16))
    torch.testing.assert_close(attention(x, model.turns[:10], None), want, rtol=0, atol=1e-5)


# ---- layers, names and sizes


def test_norm_and_mlp_by_hand():
    norm = RMSNorm(2)
    norm.weight.data = torch.tensor([1.0, 2.0])
    root = math.sqrt(12.5 + 1e-5)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3 / root, 8 / root]))
    mlp, x = make(TINY).layers[0].feed_forward, torch.randn(3, 16)
    gate, up = x @ mlp.w1.weight.T, x @ mlp.w3.weight.T
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * up) @ mlp.w2.weight.T, rtol=0, atol=1e-5)


def test_a_fresh_model_is_uniform():
    """As released: its head is 0."""
    model = Raster(TINY)
    assert model.logits(model(condition_for(model), tokens_for(model))).abs().max() == 0


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2816), (1280, 3584), (1536, 4096), (3200, 8704)])
def test_released_widths_of_the_mlp(width, hidden):
    assert RasterConfig(width=width, heads=width // 64, num_classes=1).hidden == hidden


def test_an_unfilled_model_knows_where_its_tokens_are():
    assert torch.equal(Raster.unfilled(TINY).turns, Raster(TINY).turns)


def test_impossible_sizes_are_refused():
    for changes, named in [
        ({"heads": 3}, "heads"),
        ({"width": 18}, "4 x"),
        ({"grid": (0, 2)}, "grid"),
        ({"captions": CAPTIONS}, "exactly one"),
    ]:
        with pytest.raises(ConfigError, match=named):
            replace(TINY, **changes)
