"""Harmon: against `transformers`' own pass over caption and picture together, behind the policy, and as a folder."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny import status
from tiny_harmon import CONFIG, MAR, QWEN, make, make_words, save_harmon, their_state
from varl.build import new_policy
from varl.checkpoints import harmon, mar
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import damage, load_notes
from varl.config import LawConfig, UnmaskingConfig, settled_counts
from varl.errors import CheckpointError, ConfigError, DataError
from varl.models.harmon import Harmon
from varl.models.mar import known, masked
from varl.models.masked import MaskedModel
from varl.policies.masked import MaskedPolicy
from varl.rng import Stream
from varl.sample import config_of
from varl.tokenizers.kl import KL
from varl.types import Prompt

GOLDEN = Path(__file__).parent.parent.parent / "shared" / "golden"
KEYS = sorted((GOLDEN / "keys").glob("harmon-*.json"))
recorded = pytest.mark.skipif(not KEYS, reason="the lists of released names (../shared/golden) are not beside this repository")

TEXTS = ["a", "a big red sun", ""]
TOKENS = 16


@pytest.fixture
def model() -> Harmon:
    return make()[0]


def pictures(rows: int = 3, missing: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the places of those that are known."""
    draw = torch.Generator().manual_seed(1)
    tokens, order = torch.randn(rows, TOKENS, 3, generator=draw), torch.rand(rows, TOKENS, generator=draw).argsort(1)
    return tokens, known(masked(order, missing), TOKENS - missing)


@torch.no_grad()
def theirs(model: Harmon, ids: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What a picture's encoder says, by one pass of `transformers` over caption, known tokens and buffer, with its own masks, positions and
    no cache."""
    seen = model.mar.encode(model.mar.fake_latent, tokens[None], places[None])
    asked = model.proj_in(seen)
    x = torch.cat([model.whole.get_input_embeddings()(ids[None]), asked[:, MAR.buffer :], asked[:, : MAR.buffer]], 1)
    heard = model.whole.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, len(ids) :]
    return seen + model.proj_out(torch.cat([heard[:, -MAR.buffer :], heard[:, : -MAR.buffer]], 1))


# ---- against transformers


@pytest.mark.parametrize("missing", [16, 9, 1])
def test_the_language_model_hears_what_transformers_hears(model, missing):
    """Each picture alone and in one pass there; all together, padded and from the captions' keys here."""
    captions, (tokens, places) = model.read(TEXTS), pictures(missing=missing)
    said = model.encode(model.condition(captions), tokens, places)
    assert said.shape == (3, MAR.buffer + TOKENS - missing, 12)
    for row, ids in enumerate(captions):
        torch.testing.assert_close(said[row : row + 1], theirs(model, ids, tokens[row], places[row]), rtol=0, atol=2e-5)


def test_captions_are_read_in_the_chat_format(model):
    one, none = model.read(["a big sun", ""])
    words = make_words()
    assert words.decode(one).replace(" ", "") == "<|im_start|>user\nGenerateanimage:abigsun<|im_end|>\n<|im_start|>assistant\n"
    assert words.decode(none).replace(" ", "") == "<|im_start|>user\nGenerateanimage.<|im_end|>\n<|im_start|>assistant\n"
    asked = "<|im_start|>user\nGenerate an image: a big sun<|im_end|>\n<|im_start|>assistant\n"
    assert one.tolist() == words(asked).input_ids
    assert (one == words.unk_token_id).sum() == 0
    assert len(one) == len(none) + 10, "': a big sun' stands where '.' does"


# ---- what a caption leaves behind


def test_a_caption_is_the_same_alone_and_beside_longer_ones(model):
    captions, (tokens, places) = model.read(TEXTS), pictures()
    together = model.condition(captions)
    assert together.there.sum(1).tolist() == [len(ids) for ids in captions]
    for row in range(3):
        alone = model.condition(captions[row : row + 1])
        assert alone.there.all()
        z, beside = (model(of, tokens[row : row + 1], places[row : row + 1]) for of in (alone, together[row : row + 1]))
        torch.testing.assert_close(z, beside, rtol=0, atol=1e-4)


def test_padding_is_not_seen(model):
    """Whatever stands there."""
    condition, (tokens, places) = model.condition(model.read(TEXTS)), pictures()
    z = model(condition, tokens, places)
    padding = ~condition.there[:, None, :, None].expand_as(condition.keys[0])
    other = replace(condition, keys=condition.keys.masked_fill(padding, 9.0), values=condition.values.masked_fill(padding, -9.0))
    assert padding.any()
    assert torch.equal(model(other, tokens, places), z)


def test_captions_are_indexed_by_rows(model):
    condition, (tokens, places) = model.condition(model.read(TEXTS)), pictures()
    z = model(condition, tokens, places)
    rows = torch.tensor([2, 0, 0])
    assert len(condition[rows]) == 3
    assert len(condition[1:]) == 2
    again = model(condition[rows], tokens[rows], places[rows])
    torch.testing.assert_close(again, z[rows], rtol=0, atol=1e-5)
    assert (again[1] - z[1]).abs().max() > 1e-3, "and not that of another caption"


def test_captions_neither_grow_nor_change(model):
    """MAR-GRPO's release appends each training pass to them: the second pass sees the first."""
    condition, (tokens, places) = model.condition(model.read(TEXTS)), pictures()
    before = [tensor.clone() for tensor in (condition.keys, condition.values, condition.there)]
    first = model(condition, tokens, places)
    for _ in range(2):
        z = model(condition, tokens, places)
        z.sum().backward()
        assert torch.equal(z, first)
        model(condition, tokens.flip(1), places[:, :4])
    assert all(torch.equal(a, b) for a, b in zip(before, (condition.keys, condition.values, condition.there), strict=True))


# ---- what a picture leaves open


def test_what_is_masked_is_not_read(model):
    condition, (tokens, places) = model.condition(model.read(TEXTS)), pictures()
    missing = torch.ones(3, TOKENS, dtype=torch.bool).scatter(1, places, False)
    z = model(condition, tokens, places)
    assert z.shape == (3, TOKENS, 12)
    assert torch.equal(model(condition, tokens.masked_fill(missing[..., None], 99.0), places), z)
    other = tokens.clone()
    other[0, places[0, 0]] += 1
    changed = (model(condition, other, places) - z).abs().amax(2)
    assert (changed[0] > 1e-4).all(), "every place sees it"
    assert (changed[1:] == 0).all(), "pictures do not see one another"


def test_known_tokens_may_come_in_any_order(model):
    """The language model reads them row by row, as released."""
    condition, (tokens, places) = model.condition(model.read(TEXTS)), pictures()
    assert torch.equal(model(condition, tokens, places.flip(1)), model(condition, tokens, places))
    one, other = (model.encode(condition, tokens, order)[:, MAR.buffer :] for order in (places, places.flip(1)))
    assert (one - other.flip(1)).abs().max() > 1e-3


def test_the_language_model_is_frozen_and_passes_gradients_on(model):
    tokens, places = pictures()
    model(model.condition(model.read(TEXTS)), tokens, places).square().sum().backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == {
        name for name in model.state_dict() if name.startswith("llm.") or name == "mar.class_emb.weight"
    }
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad and "diffloss" not in name}
    model.zero_grad()
    model.hear(model.condition(model.read(TEXTS)), model.proj_in(model.see(tokens, places)).roll(-3, 1)).square().sum().backward()
    assert model.mar.encoder_blocks[0].attn.qkv.weight.grad.abs().sum() > 0, "it reaches the encoder through the language model alone"


# ---- as a masked model


def test_it_is_a_masked_model(model):
    assert isinstance(model, MaskedModel)
    assert (model.tokens, model.channels, model.config.image_size, model.config.num_classes) == (16, 3, (8, 8), None)
    assert model.schedule(5) == settled_counts(16, 5)
    assert model.denoiser(6).moves == 6
    assert model.head is model.mar.diffloss["net"]
    assert len(model.blocks) == 2 + 2 + 2
    assert model.longest == 120 - 16 - 3
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}, "each tensor once"


@pytest.mark.parametrize("law", [LawConfig(), LawConfig(cfg_scale=(3.0,), temperature=0.9)], ids=["plain", "guided"])
def test_it_scores_what_it_did(law):
    model, kl = make()
    policy = new_policy((model, kl), sample_law=law, score_law=law, unmasking=UnmaskingConfig(steps=4, denoise_steps=5))
    assert isinstance(policy, MaskedPolicy)
    prompts = [Prompt(text="a"), Prompt(text="a big red sun"), Prompt(text="a")]
    rollout = policy.rollout(prompts, Stream(seed=0, path=("rollout", 0), rows=(0, 1, 2)))
    score = policy.score(rollout)
    torch.testing.assert_close(score.logp, rollout.logp, rtol=1e-5, atol=1e-4)
    assert policy.decode(rollout).shape == (3, 3, 8, 8)
    score.logp.sum().backward()
    assert model.proj_in[0].weight.grad.abs().sum() > 0
    alone = policy.rollout(prompts[2:], Stream(seed=0, path=("rollout", 0), rows=(2,)))
    torch.testing.assert_close(alone.actions[0], rollout.actions[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make_error", "error", "named"),
    [
        (lambda model: model.read(["a" * 90]), DataError, r"'a{90}' has 128 tokens, the model takes 1 to 101"),
        (lambda model: model.condition([torch.tensor([1]), torch.tensor([], dtype=torch.long)]), ValueError, "a caption has no tokens"),
        (lambda model: model.schedule(17), ConfigError, "17 steps for 16 tokens"),
        (lambda model: replace(CONFIG, grid=(0, 4)), ConfigError, r"grid=\[0, 4\]"),
        (
            lambda model: replace(CONFIG, grid=(11, 11)),
            ConfigError,
            r"grid=\[11, 11\].*takes 125 positions or more, the language model has 120",
        ),
    ],
)
def test_what_cannot_be(model, make_error, error, named):
    with pytest.raises(error, match=named):
        make_error(model)


# ---- as a folder


def same(one: tuple[Harmon, KL], two: tuple[Harmon, KL]) -> bool:
    pairs = [(a.state_dict(), b.state_dict()) for a, b in zip(one, two, strict=True)]
    pairs.append((one[0].whole.state_dict(), two[0].whole.state_dict()))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_harmon(tmp_path_factory.mktemp("harmon"))


def test_the_authors_folder(folder):
    pair = model_folder.load(folder)
    assert isinstance(pair[0], Harmon)
    assert same(pair, make())
    assert pair[0].config == CONFIG, "sizes are read off the weights; pictures have twice the side that MAR was trained for"
    tokens, places = pictures()
    for one, two in zip(pair[0].read(TEXTS), make()[0].read(TEXTS), strict=True):
        assert torch.equal(one, two)
    z, want = (model(model.condition(model.read(TEXTS)), tokens, places) for model in (pair[0], make()[0]))
    torch.testing.assert_close(z, want, rtol=0, atol=1e-5)
    assert pair[0].whole.lm_head.weight is pair[0].whole.model.embed_tokens.weight


def test_without_memory(folder):
    model, kl = harmon.without_memory(folder)
    assert model.config == CONFIG
    assert {weight.device.type for weight in [*model.parameters(), *kl.parameters()]} == {"meta"}
    assert config_of(folder) == CONFIG


def test_weights_in_parts_of_low_precision(folder, tmp_path):
    copy = edited(folder, tmp_path, "config.json", lambda told: told)
    state = {name: tensor.bfloat16() for name, tensor in load_file(copy / "model.safetensors").items()}
    (copy / "model.safetensors").unlink()
    for part in range(2):
        save_file(dict([*state.items()][part::2]), copy / f"model-0000{part + 1}-of-00002.safetensors", metadata={"format": "pt"})
    model, _ = harmon.load(copy)
    assert torch.equal(model.mar.fake_latent, state["mar.fake_latent"].float())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_s_model_is_loaded_again(tmp_path, tied):
    model, kl = model_folder.load(save_harmon(tmp_path / "base", tied=tied, grid=[3, 5]))
    assert isinstance(model, Harmon)
    assert (model.config.grid, model.tokens, model.config.image_size) == ((3, 5), 15, (6, 10))
    with torch.no_grad():
        for weight in [*model.parameters(), *kl.parameters()]:
            weight.add_(0.1 * torch.randn(weight.shape))
    out = model_folder.save(tmp_path / "out", model, kl, {"step": 3})
    assert damage(out) == []
    assert load_notes(out) == {"step": 3}
    again = model_folder.load(out)
    assert same((model, kl), again)
    assert again[0].config == model.config
    assert torch.equal(again[0].read(["a"])[0], model.read(["a"])[0])
    want = their_state(model, kl)
    saved = load_file(out / "model.safetensors")
    assert set(want) - set(saved) == ({"llm.lm_head.weight"} if tied else set())
    assert all(torch.equal(saved[name], want[name]) for name in saved)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors has .* bytes where"):
        harmon.load(out)


def test_what_the_authors_code_asks_of_config_json(tmp_path):
    model, kl = make()
    told = json.loads((model_folder.save(tmp_path / "out", model, kl, {}) / "config.json").read_text())
    assert told["grid"] == [4, 4]
    assert {name: told["llm"][name] for name in QWEN if name not in ("torch_dtype", "_attn_implementation")} == {
        name: value for name, value in QWEN.items() if name not in ("torch_dtype", "_attn_implementation")
    }
    assert told["mar"] == {
        "img_size": 4,
        "vae_stride": 2,
        "patch_size": 1,
        "vae_embed_dim": 3,
        "class_num": 4,
        "buffer_size": 3,
        "diffloss_d": 1,
        "diffloss_w": 8,
        "num_sampling_steps": "100",
        "encoder_num_heads": 2,
    }


def test_a_folder_that_was_not_written_here_is_not_replaced(folder):
    with pytest.raises(CheckpointError, match="VARL did not write it"):
        model_folder.save(folder, *make(), {})


def edited(folder: Path, tmp_path: Path, name: str, change) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if name.endswith("json"):
        told = json.loads((copy / name).read_text())
        change(told)
        (copy / name).write_text(json.dumps(told))
    else:
        tensors = load_file(copy / name)
        change(tensors)
        save_file(tensors, copy / name, metadata={"format": "pt"})
    return copy


MODEL, EMBEDDING = "model.safetensors", "llm.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (MODEL, lambda state: state.pop("proj_out.2.bias"), r"missing \(1\):\n +`proj_out.2.bias`"),
        (MODEL, lambda state: state.pop("vae.decoder.mid.attn_1.k.bias"), r"missing \(1\):\n +`vae.decoder.mid.attn_1.k.bias`"),
        (MODEL, lambda state: state.update(extra=torch.zeros(1)), r"unexpected \(1\):\n +`extra`"),
        (
            MODEL,
            lambda state: state.update({"llm.model.norm.weight": torch.ones(8)}),
            r"`llm.model.norm.weight` \[8\], the model has \[16\]",
        ),
        (MODEL, lambda state: state.update({"mar.z_proj.weight": torch.zeros(12, 4)}), "vectors of 4 channels, the autoencoder's have 3"),
        (MODEL, lambda state: state.update({"llm.lm_head.weight": state[EMBEDDING] + 1}), "is not `llm.model.embed_tokens.weight`"),
        (MODEL, lambda state: [state.pop(name) for name in list(state) if name.startswith("vae.")], "no weights of a Harmon"),
        ("config.json", lambda told: told.pop("llm"), "does not tell the language model's config"),
        ("config.json", lambda told: told["llm"].update(num_hidden_layers=3), r"missing \(12\):\n +`llm.model.layers.2"),
        ("config.json", lambda told: told.update(mar=None), "no weight tells the heads"),
        ("tokenizer.json", lambda told: told.update(added_tokens=told.clear()), "no tokenizer can be read"),
    ],
)
def test_a_wrong_folder_is_told_what_is_wrong(folder, tmp_path, name, change, named):
    with pytest.raises(CheckpointError, match=f"(?s){named}"):
        model_folder.load(edited(folder, tmp_path, name, change))


def test_a_tokenizer_of_another_model(folder, tmp_path):
    copy = edited(folder, tmp_path, "config.json", lambda told: told)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_text((copy / name).read_text().replace("<|im_end|>", "<|end|>"))
    with pytest.raises(CheckpointError, match=r"does not know <\|im_end\|>"):
        harmon.load(copy)


def test_no_weights(folder, tmp_path):
    copy = edited(folder, tmp_path, "config.json", lambda told: told)
    (copy / MODEL).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        harmon.load(copy)


# ---- the raw files


def raw(folder: Path, change=lambda state: None) -> Sequence[Path]:
    """The `.pth`, the autoencoder's file, and the folder of the language model that was begun with."""
    state = their_state(*make())
    kl = {name.removeprefix("vae."): state.pop(name) for name in list(state) if name.startswith("vae.")}
    change(state)
    torch.save(state, folder / "harmon.pth")
    torch.save({"model": kl}, folder / "kl16.ckpt")
    make_words().save_pretrained(folder / "qwen")
    (folder / "qwen" / "config.json").write_text(json.dumps(QWEN))
    return folder / "harmon.pth", folder / "kl16.ckpt", folder / "qwen"


def test_raw_files(tmp_path):
    pair = harmon.load_raw(*raw(tmp_path), heads=2)
    assert same(pair, make())
    assert pair[0].config == CONFIG
    assert harmon.load_raw(*raw(tmp_path), heads=2, grid=(2, 3))[0].config.grid == (2, 3)


def test_raw_files_that_are_wrong(tmp_path):
    path, kl, qwen = raw(tmp_path)
    with pytest.raises(CheckpointError, match=r"of no released size.*Give `heads`"):
        harmon.load_raw(path, kl, qwen)
    with pytest.raises(CheckpointError, match="no weights of a Harmon"):
        harmon.load_raw(kl, kl, qwen, heads=2)
    path, kl, qwen = raw(tmp_path, lambda state: state.pop("mar.mask_token"))
    with pytest.raises(CheckpointError, match=r"missing \(1\):\n +`mar.mask_token`"):
        harmon.load_raw(path, kl, qwen, heads=2)
    (qwen / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"is no folder of a Qwen2 \(model_type 'llama'\)"):
        harmon.load_raw(path, kl, qwen, heads=2)


def test_raw_files_through_the_command_line(tmp_path, capfd):
    path, kl, qwen = raw(tmp_path)
    asked = ("convert", path, kl, "--heads", 2, "--out", tmp_path / "model")
    assert status(*asked) == 2
    said = capfd.readouterr().err
    assert "harmon.pth: is Harmon's" in said
    assert "Give `language_model` (--language-model), the folder of Qwen2.5-0.5B-Instruct" in said
    assert status(*asked, "--language-model", qwen, "--image-size", 8) == 2
    assert "Leave image_size (--image-size) out" in capfd.readouterr().err
    assert status(*asked, "--language-model", tmp_path / "none") == 2
    assert "none: is no folder of a Qwen2" in capfd.readouterr().err
    assert status(*asked, "--language-model", qwen) == 0
    assert same(model_folder.load(tmp_path / "model"), make())
    assert load_notes(tmp_path / "model") == {"converted": ["harmon.pth", "kl16.ckpt"], "ema": False}


def test_pictures_through_the_command_line(folder, tmp_path, capfd):
    asked = ("sample", folder, "-n", 2, "--steps", 4, "--denoise-steps", 5, "--cfg", 3)
    for name, prompt, seed in (("one", "a sun", 0), ("same", "a sun", 0), ("seed", "a sun", 1), ("other", "a big red sun", 0)):
        assert status(*asked, "--prompt", prompt, "--seed", seed, "--out", tmp_path / f"{name}.png") == 0
    one, same, seed, other = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("one", "same", "seed", "other"))
    assert one == same
    assert len({one, seed, other}) == 3
    capfd.readouterr()
    assert status(*asked, "--label", 3, "--out", tmp_path / "x.png") == 2
    assert "label 3: this model reads text and knows no classes" in capfd.readouterr().err


@recorded
@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.stem)
def test_released_files_have_the_sizes_that_they_are_named_after(file):
    size, width, inner, layers, heads = {"harmon-0.5b": ("B", 896, 4864, 24, 14), "harmon-1.5b": ("H", 1536, 8960, 28, 12)}[file.stem]
    qwen = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    told = QWEN | qwen | {"vocab_size": 151936, "max_position_embeddings": 32768}
    model, kl = harmon.empty(json.loads(file.read_text())["state_dict"], told, None, file.stem)
    assert model.config.mar == mar.released(size)
    assert (model.config.grid, model.config.image_size, model.config.width) == ((32, 32), (512, 512), width)
    assert kl.config == mar.released(size).tokenizer
