from dataclasses import replace

import pytest
import torch

from varl.config import NextScaleConfig, TextConfig, TokenizerConfig
from varl.errors import ConfigError, DataError
from varl.models.next_scale import NextScale, text_slots, text_vocabulary
from varl.tokenizers.text import encode_text

SQUARE, WIDE, BLOCK = ((1, 1), (2, 2), (3, 3)), ((1, 2), (1, 4), (2, 8)), ((2, 2), (2, 3), (4, 4))
TINY = NextScaleConfig(depth=2, width=16, heads=2, grids=SQUARE, num_classes=3, tokenizer=TokenizerConfig(vocab=12, channels=4))
TEXT = TextConfig(alphabet="ABC", styles=("bold", "ink"), max_length=6)
VARIANTS = {
    "square": TINY,
    "wide": replace(TINY, grids=WIDE),
    "first grid 2x2": replace(TINY, grids=BLOCK),
    "one scale": replace(TINY, grids=((2, 3),)),
    "shared adaln": replace(TINY, shared_adaln=True),
    "no l2 norm": replace(TINY, attn_l2_norm=False),
    "mlp ratio": replace(TINY, mlp_ratio=1.5),
    "text": replace(TINY, num_classes=None, text=TEXT),
    "text, wide, shared": replace(TINY, num_classes=None, text=replace(TEXT, layers=0), grids=WIDE, shared_adaln=True),
}


def make(config: NextScaleConfig) -> NextScale:
    """A model whose every weight matters: fresh ones begin almost silent."""
    torch.manual_seed(0)
    model = NextScale(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def ids_for(config: NextScaleConfig) -> torch.Tensor:
    if config.text is None:
        return torch.tensor([0, 2, 3])
    return encode_text(["AB|C", "", "CCCAAB"], [("bold",), (), ("ink", "bold")], config.text)


def inputs_for(model: NextScale, batch: int = 3) -> torch.Tensor:
    shape = (batch, model.ends[-1] - model.ends[0], model.config.tokenizer.channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request) -> NextScale:
    return make(request.param)


# ---- one computation, three ways


@torch.no_grad()
def test_cached_decode_equals_teacher_forcing(model):
    condition, inputs = model.condition(ids_for(model.config)), inputs_for(model)
    whole = model.logits(model(condition, inputs), condition)
    cache, pieces, first = model.cache(3), [], model.ends[0]
    for scale, end in enumerate(model.ends):
        start = model.ends[scale - 1] if scale else 0
        hidden = model.step(condition, inputs[:, start - first : end - first] if scale else None, scale, cache)
        assert cache.length == end
        pieces.append(model.logits(hidden, condition))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_prefix_pass_is_the_first_part_of_the_whole(model):
    condition, inputs = model.condition(ids_for(model.config)), inputs_for(model)
    whole = model(condition, inputs)
    for scales, end in enumerate(model.ends, 1):
        part = model(condition, inputs[:, : end - model.ends[0]], scales)
        torch.testing.assert_close(part, whole[:, :end], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_prefix_pass_costs_only_its_tokens(model):
    condition, inputs = model.condition(ids_for(model.config)), inputs_for(model)
    for scales, end in enumerate(model.ends, 1):
        seen = []
        hooks = [block.ffn.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1].shape[1])) for block in model.blocks]
        model(condition, inputs[:, : end - model.ends[0]], scales)
        assert seen == [end] * len(model.blocks)
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_a_forked_cache_goes_on_as_its_rows_would_have():
    model = make(TINY)
    condition, inputs = model.condition(ids_for(TINY)), inputs_for(model)
    whole, rows = model(condition, inputs), torch.tensor([2, 0, 0])
    for scales in range(1, len(model.ends)):
        cache = model.cache(3, scales)
        for scale in range(scales):
            start, end = (model.ends[scale - 1], model.ends[scale]) if scale else (0, 1)
            model.step(condition, inputs[:, start - 1 : end - 1] if scale else None, scale, cache)
        before = [k.clone() for k in cache.keys]
        fork = cache.fork(rows, model.ends[-1])
        for scale in range(scales, len(model.ends)):
            start, end = model.ends[scale - 1], model.ends[scale]
            got = model.step(condition.rows(rows), inputs[rows, start - 1 : end - 1], scale, fork)
            torch.testing.assert_close(got, whole[rows, start:end], rtol=0, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(before, cache.keys, strict=True)), "the fork leaves its source alone"


@torch.no_grad()
def test_a_scale_sees_its_own_and_all_coarser_tokens_and_no_finer_ones(model):
    condition, inputs = model.condition(ids_for(model.config)), inputs_for(model)
    whole = model(condition, inputs)
    for scale in range(1, len(model.ends)):
        start, end, first = model.ends[scale - 1], model.ends[scale], model.ends[0]
        changed = inputs.clone()
        changed[:, end - 1 - first] += 1  # the last token of this scale
        moved = (model(condition, changed) - whole).abs().amax((0, 2))
        assert moved[:start].max() == 0
        assert (moved[start:] > 0).all()


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_one_another(model):
    ids, inputs = ids_for(model.config), inputs_for(model)
    condition = model.condition(ids)
    whole = model.logits(model(condition, inputs), condition)
    for row in range(3):
        alone = ids[row : row + 1]
        if model.config.text is not None:  # unpadded
            alone = alone[:, : max(3, int(alone[0].nonzero().max()) + 1)]
        condition = model.condition(alone)
        got = model.logits(model(condition, inputs[row : row + 1]), condition)
        torch.testing.assert_close(got, whole[row : row + 1], rtol=0, atol=1e-5)


def test_every_weight_learns(model):
    condition, inputs = model.condition(ids_for(model.config)), inputs_for(model)
    model.logits(model(condition, inputs), condition).logsumexp(-1).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    if len(model.ends) == 1:  # nothing comes in from coarser scales
        silent = [name for name in silent if not name.startswith("word_embed")]
    assert silent == []


# ---- attention


@torch.no_grad()
def test_cosine_attention_by_hand():
    attn = make(TINY).blocks[0].attn
    attn.scale_mul_1H11[0, 0] = 50.0  # clamped to log 100
    x, d = torch.randn(1, 4, 16), 8
    q, k, v = ((x @ w.T + b).view(4, 2, d).transpose(0, 1) for w, b in zip(attn.mat_qkv.weight.split(16), biases(attn), strict=True))
    heat = torch.tensor([100.0, attn.scale_mul_1H11[0, 1].exp().item()]).view(2, 1, 1)
    weights = (heat * torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).transpose(1, 2)).softmax(-1)
    want = attn.proj((weights @ v).transpose(0, 1).reshape(1, 4, 16))
    torch.testing.assert_close(attn(x, (4,)), want, rtol=0, atol=2e-5)


@torch.no_grad()
def test_dot_product_attention_by_hand():
    """Without l2 norm logits are a quarter of the usual ones."""
    attn = make(replace(TINY, attn_l2_norm=False)).blocks[0].attn
    assert "scale_mul_1H11" not in attn.state_dict()
    x, d = torch.randn(1, 4, 16), 8
    q, k, v = ((x @ w.T + b).view(4, 2, d).transpose(0, 1) for w, b in zip(attn.mat_qkv.weight.split(16), biases(attn), strict=True))
    weights = (0.25 / d**0.5 * q @ k.transpose(1, 2)).softmax(-1)
    want = attn.proj((weights @ v).transpose(0, 1).reshape(1, 4, 16))
    torch.testing.assert_close(attn(x, (4,)), want, rtol=0, atol=1e-5)


def biases(attn) -> tuple[torch.Tensor, ...]:
    return attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias


# ---- names and sizes


def test_names_and_shapes_by_variant():
    shapes = {name: tuple(p.shape) for name, p in NextScale(replace(TINY, mlp_ratio=1.5, grids=BLOCK)).state_dict().items()}
    assert shapes["blocks.1.ffn.fc1.weight"] == (24, 16)
    assert shapes["pos_start"] == (1, 4, 16)
    assert shapes["pos_1LC"] == (1, 4 + 6 + 16, 16)
    assert shapes["class_emb.weight"] == (4, 16)
    assert shapes["blocks.0.ada_lin.1.weight"] == (96, 16)
    shared = NextScale(replace(TINY, shared_adaln=True)).state_dict()
    assert tuple(shared["blocks.0.ada_gss"].shape) == (1, 1, 6, 16)
    assert tuple(shared["shared_ada_lin.1.weight"].shape) == (96, 16)
    assert not [name for name in shared if name.startswith("blocks.0.ada_lin")]


def test_scales_of_tokens():
    assert NextScale.scales_of_tokens(BLOCK).tolist() == [0] * 4 + [1] * 6 + [2] * 16


# ---- prompts of characters


def test_text_by_hand():
    ids = encode_text(["A|B C", ""], [("ink",), ()], TEXT)
    assert ids.tolist() == [[1, 8, 0, 4, 2, 5, 3, 6], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_the_longest_prompt_of_the_last_symbols_fills_the_encoder():
    """The two rooms that must agree do not import one another."""
    ids = encode_text(["C" * TEXT.max_length], [("ink", "ink")], TEXT)
    assert ids.shape[1] == text_slots(TEXT)
    assert ids.max() == text_vocabulary(TEXT) - 1


@pytest.mark.parametrize(
    ("text", "style", "named"),
    [
        ("AXB", (), "X"),
        ("ab", (), "a"),
        ("A", ("slanted",), "slanted"),
        ("ABCABCA", (), "7 characters"),
        ("A", ("bold", "ink", "bold"), "3 attributes"),
    ],
)
def test_what_the_encoder_lacks_is_named(text, style, named):
    with pytest.raises(DataError, match=named):
        encode_text([text], [style], TEXT)


@torch.no_grad()
def test_prompts_that_differ_are_told_apart():
    config = VARIANTS["text"]
    model = make(config)
    texts = ["", "A", "B", "AB", "BA", "A|B", "A B", "AA"]
    pooled = model.condition(encode_text(texts, [()] * len(texts), TEXT)).pooled
    styled = model.condition(encode_text(["A"] * 3, [("bold",), ("ink",), ("bold", "ink")], TEXT)).pooled
    apart = torch.pdist(torch.cat([pooled, styled]))
    assert apart.min() > 1e-3


def test_impossible_sizes_are_refused():
    for changes, named in [({"heads": 3}, "heads"), ({"grids": ((2, 2), (1, 1))}, "grids"), ({"text": TEXT}, "exactly one")]:
        with pytest.raises(ConfigError, match=named):
            replace(TINY, **changes)
