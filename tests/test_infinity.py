import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_infinity import CAPTIONS, SQUARE, TOKENIZER, caption, make_model
from varl.checkpoints import model as model_folder
from varl.checkpoints.convert import load_released
from varl.checkpoints.folder import shapes_of
from varl.checkpoints.infinity import MASKS, implied_buffers, load_infinity, released, released_name, tokenizer_config, transformer_config
from varl.config import BSQConfig, CaptionConfig, InfinityConfig, infinity_grids
from varl.errors import CheckpointError, ConfigError
from varl.models.infinity import Infinity, turns_of
from varl.models.raster import rotations
from varl.policies.raster import pad_left
from varl.settings import model_from_yaml, model_to_yaml
from varl.tokenizers.bsq import BSQ

KEYS = Path(__file__).parent.parent.parent / "shared" / "golden" / "keys"
VARIANTS = {
    "square": SQUARE,
    "wide": replace(SQUARE, grids=((1, 1), (1, 3), (2, 8)), reach=(3, 12)),
    "cells": replace(SQUARE, tokenizer=replace(TOKENIZER, cells=2), chunks=4),
    "one scale": replace(SQUARE, grids=((1, 1),), chunks=1),
}
TEXTS = ["a red cube", "two", "on a table by the sea"]


def condition_of(model: Infinity):
    return model.condition(*pad_left([caption(text) for text in TEXTS]))


def inputs_for(model: Infinity, batch: int = 3) -> torch.Tensor:
    shape = (batch, model.ends[-1] - 1, model.config.tokenizer.bits)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request) -> Infinity:
    return make_model(request.param)


# ---- one computation, three ways


@torch.no_grad()
def test_cached_decode_equals_teacher_forcing(model):
    condition, inputs = condition_of(model), inputs_for(model)
    whole = model.logits(model(condition, inputs), condition)
    assert whole.shape == (3, model.ends[-1] * model.config.tokenizer.bits, 2)
    cache, pieces = model.cache(3), []
    for scale, end in enumerate(model.ends):
        start = model.ends[scale - 1] if scale else 0
        hidden = model.step(condition, inputs[:, start - 1 : end - 1] if scale else None, scale, cache)
        assert cache.length == end
        pieces.append(model.logits(hidden, condition))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_prefix_pass_is_the_first_part_of_the_whole_and_costs_only_its_tokens(model):
    condition, inputs = condition_of(model), inputs_for(model)
    whole = model(condition, inputs)
    for scales, end in enumerate(model.ends, 1):
        seen = []
        hooks = [block.ffn.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1].shape[1])) for block in model.blocks]
        part = model(condition, inputs[:, : end - 1], scales)
        torch.testing.assert_close(part, whole[:, :end], rtol=1e-5, atol=1e-5)
        assert seen == [end] * len(model.blocks)
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_a_forked_cache_goes_on_as_its_rows_would_have():
    model = make_model()
    condition, inputs = condition_of(model), inputs_for(model)
    whole, rows = model(condition, inputs), torch.tensor([2, 0, 0])
    cache = model.cache(3, 2)
    for scale in range(2):
        model.step(condition, inputs[:, 0:4] if scale else None, scale, cache)
    fork = cache.fork(rows, model.ends[-1])
    got = model.step(condition.rows(rows), inputs[rows, 4:], 2, fork)
    torch.testing.assert_close(got, whole[rows, 5:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_scale_sees_its_own_and_all_coarser_tokens_and_no_finer_ones(model):
    condition, inputs = condition_of(model), inputs_for(model)
    whole = model(condition, inputs)
    for start, end in zip(model.ends, model.ends[1:], strict=False):
        changed = inputs.clone()
        changed[:, end - 2] += 1  # the last token of this scale
        moved = (model(condition, changed) - whole).abs().amax((0, 2))
        assert moved[:start].max() == 0
        assert (moved[start:] > 0).all()


# ---- captions


@torch.no_grad()
def test_a_captions_padding_does_not_count(model):
    together, inputs = condition_of(model), inputs_for(model)
    whole = model.logits(model(together, inputs), together)
    for row, text in enumerate(TEXTS):
        alone = model.condition(caption(text)[None])
        assert alone.mask is None
        torch.testing.assert_close(model.logits(model(alone, inputs[row : row + 1]), alone)[0], whole[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_share_what_is_read_once():
    model = make_model()
    condition, inputs, rows = condition_of(model), inputs_for(model), torch.tensor([1, 1, 0, 2, 1])
    several = condition.rows(rows)
    assert several.memory is condition.memory
    torch.testing.assert_close(model(several, inputs[rows]), model(condition, inputs)[rows], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_word_counts():
    model = make_model()
    inputs, features = inputs_for(model, 1), caption("a red cube")
    whole = model(model.condition(features[None]), inputs)
    for word in range(3):
        changed = features.clone()
        changed[word] = -changed[word]
        assert ((model(model.condition(changed[None]), inputs) - whole).abs().amax((0, 2)) > 1e-4).all()


def test_none_is_as_long_as_asked_for():
    model = make_model()
    assert (model.longest, model.empty) == (6, 6)
    assert torch.equal(model.none(2), model.cfg_uncond[:2])


def test_pooling_by_hand():
    """One head, for its captions are 128 wide: softmax of q k / sqrt(16) over the words, of v + bias."""
    model = make_model()
    pool, read = model.text_proj_for_sos.ca, model.text_norm(caption("a red cube"))
    k, v = (read @ pool.mat_kv.weight.T).chunk(2, -1)
    weight = (k @ pool.mat_q[0, 0] / 4).softmax(0)
    want = pool.proj(weight @ (v + pool.v_bias))
    torch.testing.assert_close(model.condition(caption("a red cube")[None]).pooled[0], want, rtol=0, atol=1e-5)


# ---- positions


def test_places_are_stretched_to_the_reach():
    """1 of 3 rows is 8/3 = 2.67 of 8, hence 3; 2 of 3 is 5.33; a half goes to the even: 1 of 16 columns of 40 is 2.5, hence 2, 3 of 16
    7.5, hence 8."""
    table = rotations((8, 40), 8, 0).view(8, 40, 4, 2)
    found = turns_of([(1, 1), (3, 16)], (8, 40), 8)
    assert torch.equal(found[0], table[0, 0])
    grid = found[1:].view(3, 16, 4, 2)
    for row, whole in enumerate((0, 3, 5)):
        for column, place in ((0, 0), (1, 2), (2, 5), (3, 8)):
            assert torch.equal(grid[row, column], table[whole, place])


def test_a_head_turns_half_with_the_row_and_half_with_the_column():
    found = turns_of([(2, 2)], (2, 2), 8)
    still, one = torch.tensor([1.0, 0.0]), torch.tensor([[1.0], [0.01]])
    moved = torch.cat([one.cos(), one.sin()], -1)
    for token, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        want = torch.cat([moved if row else still.expand(2, 2), moved if column else still.expand(2, 2)])
        torch.testing.assert_close(found[token], want)


# ---- memory


def test_no_tensor_of_tokens_by_tokens():
    """A megapixel is 10,521 tokens, a mask would be 110 million numbers. Nothing that is made on the way is as large as one for a tenth
    of the tokens, with gradient neither."""
    config = replace(SQUARE, depth=1, width=4, heads=1, chunks=1, mlp_width=8, grids=infinity_grids(), reach=(64, 64))
    model = make_model(config)
    tokens, largest = model.ends[-1], 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        condition = model.condition(*pad_left([caption("a red cube"), caption("two")])).rows(slice(1, 2))
        model.logits(model(condition, inputs_for(model, 1)), condition).sum().backward()
    assert tokens == 10521
    assert tokens < largest < (tokens / 10) ** 2
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "cfg_uncond")


# ---- sizes


def test_released_sizes_count_as_published():
    with torch.device("meta"):
        sizes = {size: sum(p.numel() for p in Infinity(released(size)).parameters()) for size in ("2B", "8B", "125M")}
    assert {size: round(count / 1e9, 3) for size, count in sizes.items()} == {"2B": 2.205, "8B": 8.376, "125M": 0.125}
    with pytest.raises(CheckpointError, match="sizes are 2B, 8B, 125M, there is no '20B'"):
        released("20B")


@pytest.mark.skipif(not KEYS.is_dir(), reason="the lists of released files' names (../shared/golden) are not beside this repository")
@pytest.mark.parametrize(("size", "file"), [("2B", "2b"), ("8B", "8b")])
def test_released_configs_are_read_off_the_weights(size, file):
    shapes, vae = (json.loads((KEYS / f"infinity-{name}.json").read_text())["state_dict"] for name in (file, f"{file}-vae"))
    config = transformer_config(shapes, tokenizer_config(vae, "vae"), "here", grids=infinity_grids())
    assert config == released(size)
    with torch.device("meta"):
        model, bsq = Infinity(config), BSQ(config.tokenizer, config.grids)
    assert set(shapes) == set(model.state_dict()) | set(implied_buffers(model))
    assert set(vae) == {released_name(bsq, name) for name in bsq.state_dict()} | set(MASKS)


def test_an_unfilled_model_has_what_no_weight_holds():
    model, unfilled = make_model(), Infinity.unfilled(SQUARE)
    assert torch.equal(unfilled.turns, model.turns)
    assert torch.equal(unfilled.scale_of_token, model.scale_of_token)
    assert shapes_of(unfilled.state_dict()) == shapes_of(model.state_dict())


# ---- schedules


def test_schedules():
    assert infinity_grids("0.06M") == tuple((n, n) for n in (1, 2, 4, 6, 8, 12, 16))
    assert infinity_grids()[-1] == (64, 64)
    assert sum(h * w for h, w in infinity_grids()) == 10521
    assert infinity_grids("0.25M", 2.0)[-1] == (46, 23)
    assert infinity_grids("0.25M", 0.5)[-1] == (23, 46)
    ratios = [1.0, 1.25, 1.333, 1.5, 1.75, 2.0, 2.5, 3.0]
    for ratio in [*ratios, *(int(1000 / r) / 1000 for r in ratios[1:])]:
        for pixels, count, tokens in (("0.06M", 7, 16**2), ("0.25M", 10, 32**2), ("0.60M", 12, 48**2), ("1M", 13, 64**2)):
            grids = infinity_grids(pixels, ratio)
            h, w = grids[-1]
            assert len(grids) == count
            assert h / w == pytest.approx(ratio, abs=0.01)
            assert h * w == pytest.approx(tokens, rel=0.08 if pixels == "1M" else 0.3)
            InfinityConfig(grids=grids, reach=infinity_grids("1M", ratio)[-1])


@pytest.mark.parametrize(("pixels", "ratio"), [("2M", 1.0), ("1M", 1.1)])
def test_schedules_that_there_are_not(pixels, ratio):
    with pytest.raises(ConfigError, match=rf"no pictures of '{pixels}' pixels with height / width {ratio}.*0\.06M.*1\.333"):
        infinity_grids(pixels, ratio)


# ---- settings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"grids": ((2, 2), (4, 4))}, "the first is 1x1"),
        ({"grids": ((1, 1),) * 16}, "15 at most"),
        ({"grids": ((1, 1), (3, 3), (2, 4))}, "one is smaller than the one before it"),
        ({"reach": (2, 2)}, r"model.reach=\[2, 2\]"),
        ({"width": 20}, "model.width=20 is no multiple of 4 x model.heads=2"),
        ({"chunks": 3}, "model.depth=4 is no multiple of model.chunks=3"),
        ({"captions": CaptionConfig(width=100)}, "model.captions.width=100"),
        ({"width": 24, "captions": CaptionConfig(width=128 * 5)}, "model.width=24 must divide"),
    ],
)
def test_settings_that_make_no_model(change, named):
    with pytest.raises(ConfigError, match=named):
        replace(SQUARE, **change)


def test_the_mlp_is_four_times_as_wide_in_steps_of_256():
    assert [InfinityConfig(width=width, heads=8).hidden for width in (768, 1152, 2048, 3360)] == [3072, 4608, 8192, 13312]


# ---- files


def released_files(config: InfinityConfig = SQUARE) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """As the authors save them."""
    model = make_model(config)
    bsq = BSQ(config.tokenizer, config.grids)
    worth = 2 ** torch.arange(config.tokenizer.channels).flip(0)
    tokenizer = {released_name(bsq, name): tensor for name, tensor in bsq.state_dict().items()}
    return {**model.state_dict(), **implied_buffers(model)}, tokenizer | dict.fromkeys(MASKS, worth)


def write(folder: Path, infinity, vae) -> tuple[Path, Path]:
    torch.save(infinity, folder / "infinity.pth")
    torch.save(vae, folder / "vae.pth")
    return folder / "infinity.pth", folder / "vae.pth"


@pytest.mark.parametrize("cells", [1, 2])
@pytest.mark.parametrize("wrap", ["flat", "run", "inner level left out"])
def test_released_files(tmp_path, wrap, cells):
    config = replace(SQUARE, tokenizer=replace(TOKENIZER, cells=cells), grids=infinity_grids("0.06M"), reach=(64, 64))
    infinity, vae = released_files(config)
    theirs = dict(infinity)
    if wrap == "run":
        theirs, vae = (
            {"trainer": {"gpt_fsdp": infinity, "gpt_ema_fsdp": {name: t + (t != 0) for name, t in infinity.items()}}},
            {"vae": vae},
        )
    elif wrap == "inner level left out":
        vae = {name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias").replace(".norm.", "."): t for name, t in vae.items()}
        vae = {name.replace("sample.weight", "sample.conv.weight").replace("sample.bias", "sample.conv.bias"): t for name, t in vae.items()}
        theirs["lvl_1L"] = torch.zeros(1, 3)
    paths = write(tmp_path, theirs, vae)
    model, bsq = load_infinity(*paths, pixels="0.06M")
    assert model.config == config
    assert bsq.maps[-1] == (16 * cells, 16 * cells)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, infinity[name])
    if wrap == "run":
        averaged, _ = load_infinity(*paths, pixels="0.06M", ema=True)
        assert torch.equal(averaged.pos_start, model.pos_start + 1)
    else:
        with pytest.raises(CheckpointError, match=r"holds no averaged weights.*Leave `ema` \(--ema\) out"):
            load_infinity(*paths, ema=True)


def test_its_family_is_told_from_the_names(tmp_path):
    paths = write(tmp_path, *released_files(replace(SQUARE, grids=infinity_grids("0.06M"), reach=(64, 64))))
    model, bsq = load_released(*paths, image_size=256)
    assert isinstance(model, Infinity)
    assert len(model.ends) == 7
    assert load_released(*paths)[0].config.grids[-1] == (64, 64)
    with pytest.raises(CheckpointError, match=r"image_size=300: Infinity was trained on square pictures of 256, 512, 1024 pixels"):
        load_released(*paths, image_size=300)
    with pytest.raises(
        CheckpointError, match=r"is Infinity's, whose weights tell all but the size of the pictures\. Leave heads \(--heads\) out"
    ):
        load_released(*paths, heads=2)
    model_folder.save(tmp_path / "saved", model, bsq, {})
    again, tokenizer = model_folder.load(tmp_path / "saved")
    assert again.config == model.config
    for old, new in ((model, again), (bsq, tokenizer)):
        assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.state_dict().items())


def test_a_config_as_yaml_and_back():
    assert model_from_yaml(model_to_yaml(SQUARE)) == SQUARE
    assert model_to_yaml(SQUARE).startswith("kind: infinity\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda infinity, vae: infinity.pop("lvl_embed.weight"), "missing.*\n.*`lvl_embed.weight`"),
        (lambda infinity, vae: infinity.update(more=torch.zeros(1)), "unexpected.*\n.*`more`"),
        (
            lambda infinity, vae: infinity["block_chunks.1.module.0.sa.zero_k_bias"].fill_(1),
            "1 biases of keys.*chunks.1.module.0.sa.zero_k",
        ),
        (lambda infinity, vae: infinity.pop("text_proj_for_sos.ca.zero_k_bias"), "1 biases of keys are missing or not 16 zeros"),
        (lambda infinity, vae: vae[MASKS[0]].fill_(1), "`quantizer.lfq.mask` is not 3 powers of two"),
        (lambda infinity, vae: vae.pop("encoder.conv_out.conv.bias"), "`encoder.conv_out.conv.bias`"),
        (lambda infinity, vae: (infinity.clear(), infinity.update(vae)), "these are no weights of an Infinity transformer"),
        (lambda infinity, vae: (vae.clear(), vae.update(infinity)), "these are no weights of an Infinity tokenizer"),
        (
            lambda infinity, vae: (vae.clear(), vae.update(released_files(replace(SQUARE, tokenizer=BSQConfig(channels=2, width=8)))[1])),
            "draws tokens of 3 bits, the tokenizer's have 2",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, named):
    infinity, vae = ({name: tensor.clone() for name, tensor in part.items()} for part in released_files())
    change(infinity, vae)
    with pytest.raises(CheckpointError, match=f"(?s){named}"):
        load_infinity(*write(tmp_path, infinity, vae), pixels="0.06M")


def test_attention_with_a_prompt_is_plain_attention():
    """Against softmax(q k / sqrt d) v, written out."""
    model = make_model()
    ca, x, text = model.blocks[0].ca, torch.randn(1, 4, 16), torch.randn(1, 3, 16)
    q = ca.mat_q(x).view(4, 2, 8)
    k, v = (text[0] @ ca.mat_kv.weight.T + F.pad(ca.v_bias, (16, 0))).view(3, 2, 2, 8).unbind(1)
    weight = torch.einsum("lhd,nhd->hln", q, k).div(8**0.5).softmax(-1)
    want = ca.proj(torch.einsum("hln,nhd->lhd", weight, v).flatten(1))
    torch.testing.assert_close(ca(x, ca.remember(text), None)[0], want, rtol=0, atol=1e-5)


def test_captions_are_those_of_the_config():
    assert InfinityConfig().captions == CaptionConfig(tokens=512, width=2048, encoder="google/flan-t5-xl", lowercase=False)
    assert CAPTIONS.tokens == make_model().longest
