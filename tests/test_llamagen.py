import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from varl.checkpoints import model as model_folder
from varl.checkpoints.llamagen import SIZES, load_llamagen, released, released_names, tokenizer_config, transformer_config
from varl.config import CaptionConfig, NextScaleConfig, RasterConfig, TokenizerConfig, VQConfig
from varl.errors import CheckpointError, ConfigError
from varl.models.next_scale import NextScale
from varl.models.raster import Raster
from varl.settings import model_from_yaml, model_to_yaml, to_yaml
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.vq import VQ

GOLDEN = Path(__file__).parent.parent.parent / "shared" / "golden"
KEYS = sorted((GOLDEN / "keys").glob("llamagen-*.json"))
recorded = pytest.mark.skipif(not KEYS, reason="the lists of released names (../shared/golden) are not beside this repository")

TOKENIZER = VQConfig(vocab=16, channels=4, latent=6, width=8, multipliers=(1, 2), blocks=1)
CONFIG = RasterConfig(depth=2, width=16, heads=2, grid=(3, 3), num_classes=5, tokenizer=TOKENIZER)
SIDE = 6
"""Pixels: 3 tokens of 2."""

State = dict[str, torch.Tensor]


def files(config: RasterConfig = CONFIG) -> tuple[State, State]:
    """The two state dicts as the authors' code saves them."""
    torch.manual_seed(0)
    model, vq = Raster(config), VQ(config.tokenizer)
    torch.nn.init.normal_(model.output.weight)
    theirs: State = {"quantize.codebook_used": torch.zeros(65536)}
    for ours, tensor in vq.state_dict().items():
        names = released_names(ours, len(config.tokenizer.multipliers))
        theirs |= {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return model.state_dict(), theirs


def written(folder: Path, gpt, vq) -> tuple[Path, Path]:
    torch.save(gpt, folder / "gpt.pt")
    torch.save({"model": vq}, folder / "vq.pt")
    return folder / "gpt.pt", folder / "vq.pt"


# ---- sizes

VARIANTS = {
    "classes": CONFIG,
    "captions": replace(CONFIG, num_classes=None, captions=CaptionConfig(tokens=5, width=6)),
    "narrow": replace(CONFIG, mlp_width=24),
    "three levels": replace(CONFIG, grid=(2, 2), tokenizer=replace(TOKENIZER, multipliers=(1, 1, 2), blocks=2)),
    "no attention": replace(CONFIG, tokenizer=replace(TOKENIZER, attention=False)),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_sizes_are_read_off_the_weights(tmp_path, config):
    gpt, vq = files(config)
    model, module = load_llamagen(*written(tmp_path, gpt, vq), image_size=config.image_size[0], heads=2)
    assert model.config == config
    assert all(torch.equal(tensor, gpt[name]) for name, tensor in model.state_dict().items())
    torch.manual_seed(0)
    Raster(config)
    want = VQ(config.tokenizer)
    images = torch.rand(2, 3, *config.image_size)
    assert torch.equal(module.features(images), want.features(images))
    assert torch.equal(model.turns, Raster(config).turns)


@recorded
@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.stem)
def test_released_files_have_the_sizes_that_they_are_named_after(file):
    shapes = json.loads(file.read_text())["state_dict"]
    if "VQ" in file.stem:
        assert tokenizer_config(shapes, file.stem) == (VQConfig(multipliers=(1, 2, 2, 4)) if file.stem.endswith("8") else VQConfig())
    else:
        config = released(file.stem.split("-")[-1], image_size=384, text="t2i" in file.stem)
        assert transformer_config(shapes, (24, 24), VQConfig(), file.stem) == config


def test_sizes_by_name():
    assert released("3B", image_size=384).heads == 32
    assert released("XL", image_size=256, text=True).grid == (16, 16)
    with pytest.raises(CheckpointError, match="B, L, XL, XXL, 3B, there is no 'XS'"):
        released("XS", image_size=256)
    assert len({size[:2] for size in SIZES.values()}) == len(SIZES), "depth and width tell the heads"


def test_names_by_hand():
    assert released_names("encoder.down.3.block.1.norm1.weight", 5) == ("encoder.conv_blocks.3.res.1.norm1.weight",)
    assert released_names("decoder.up.4.attn.2.proj_out.bias", 5) == ("decoder.conv_blocks.0.attn.2.proj_out.bias",)
    assert released_names("decoder.up.1.upsample.conv.bias", 5) == ("decoder.conv_blocks.3.upsample.conv.bias",)
    assert released_names("encoder.mid.block_2.conv1.bias", 5) == ("encoder.mid.2.conv1.bias",)
    assert released_names("encoder.mid.attn_1.qkv.bias", 5) == tuple(f"encoder.mid.1.{part}.bias" for part in "qkv")


# ---- wrappings


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {"lr": 1.0}, "steps": 3, "args": argparse.Namespace(lr=1.0)},
        lambda state: {"module": state},
        lambda state: {"state_dict": state},
        lambda state: {"ema": state},
        lambda state: state,
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {**state, "freqs_cis": torch.zeros(10, 4, 2)},
    ],
    ids=["model", "module", "state_dict", "ema", "bare (FSDP)", "prefix", "compiled", "with freqs_cis"],
)
def test_every_wrapping(tmp_path, wrap):
    gpt, vq = files()
    model, _ = load_llamagen(*written(tmp_path, wrap(gpt), vq), image_size=SIDE, heads=2)
    assert all(torch.equal(tensor, gpt[name]) for name, tensor in model.state_dict().items())


def test_of_two_sets_of_weights_ema_chooses(tmp_path):
    gpt, vq = files()
    averaged = {name: tensor + 1 for name, tensor in gpt.items()}
    paths = written(tmp_path, {"model": gpt, "ema": averaged}, vq)
    for ema, want in ((False, gpt), (True, averaged)):
        model, _ = load_llamagen(*paths, image_size=SIDE, heads=2, ema=ema)
        assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def test_safetensors_and_half_precision(tmp_path):
    gpt, vq = files()
    save_file({name: tensor.bfloat16() for name, tensor in gpt.items()}, tmp_path / "gpt.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in vq.items()}, tmp_path / "vq.safetensors")
    model, _ = load_llamagen(tmp_path / "gpt.safetensors", tmp_path / "vq.safetensors", image_size=SIDE, heads=2)
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.output.weight, gpt["output.weight"].bfloat16().float())


# ---- what is wrong


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda gpt, vq: gpt.pop("layers.1.attention.wo.weight"), r"missing \(1\):\n +`layers.1.attention.wo.weight`"),
        (lambda gpt, vq: gpt.update(extra=torch.zeros(1)), r"unexpected \(1\):\n +`extra`"),
        (lambda gpt, vq: gpt.update({"norm.weight": torch.zeros(4)}), r"`norm.weight` \[4\], the model has \[16\]"),
        (
            lambda gpt, vq: gpt.update(freqs_cis=torch.zeros(17, 4, 2)),
            r"`freqs_cis` has shape \[17, 4, 2\], where \[10, 4, 2\].*another size",
        ),
        (lambda gpt, vq: vq.pop("encoder.mid.1.k.bias"), r"missing \(1\):\n +`encoder.mid.1.k.bias`"),
        (lambda gpt, vq: vq.update({"encoder.mid.1.k.bias": torch.zeros(1)}), r"`encoder.mid.1.k.bias` \[1\], the model has \[16\]"),
        (lambda gpt, vq: vq.update({"encoder.conv_blocks.9.res.0.x": torch.zeros(1)}), r"missing: `encoder.conv_blocks.2"),
        (lambda gpt, vq: vq.update({"loss.lpips": torch.zeros(1)}), r"unexpected \(1\):\n +`loss.lpips`"),
        (lambda gpt, vq: (gpt.clear(), gpt.update(vq)), "no weights of a LlamaGen transformer"),
        (lambda gpt, vq: (vq.clear(), vq.update(gpt)), "no weights of a LlamaGen tokenizer"),
        (
            lambda gpt, vq: gpt.update({"output.weight": torch.zeros(17, 16), "tok_embeddings.weight": torch.zeros(17, 16)}),
            "17 codes.*has 16",
        ),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(tmp_path, change, named):
    gpt, vq = files()
    change(gpt, vq)
    with pytest.raises(CheckpointError, match=f"(?s){named}"):
        load_llamagen(*written(tmp_path, gpt, vq), image_size=SIDE, heads=2)


def test_what_no_weight_tells_must_be_said(tmp_path):
    paths = written(tmp_path, *files())
    with pytest.raises(CheckpointError, match=r"2 layers of width 16 are of no released size.*Give `heads`"):
        load_llamagen(*paths, image_size=SIDE)
    for size in (7, 0):
        with pytest.raises(CheckpointError, match=f"image_size={size}: the tokenizer in .* makes one token of 2 x 2 pixels"):
            load_llamagen(*paths, image_size=size, heads=2)


def test_what_is_no_file_of_weights(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"model": [1, 2]}, tmp_path / "list.pt")
    torch.save({"model": {"code": print}}, tmp_path / "code.pt")
    for name, why in [
        ("none.pt", "cannot be read"),
        ("text.pt", "cannot be read"),
        ("list.pt", "no state dict"),
        ("code.pt", "cannot be read"),
    ]:
        with pytest.raises(CheckpointError, match=f"{name}.*{why}"):
            load_llamagen(tmp_path / name, tmp_path / name, image_size=SIDE)


# ---- model folders


@pytest.mark.parametrize("config", [VARIANTS["classes"], VARIANTS["captions"]], ids=["classes", "captions"])
def test_a_model_folder_gives_back_what_was_saved(tmp_path, config):
    torch.manual_seed(0)
    model, vq = Raster(config), VQ(config.tokenizer)
    path = model_folder.save(tmp_path / "model", model, vq, {"from": "a test"})
    assert (path / "config.yaml").read_text().startswith("kind: raster\n")
    again, tokens = model_folder.load(path)
    assert again.config == config
    for one, other in ((model, again), (vq, tokens)):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert torch.equal(again.turns, model.turns)


def test_folders_say_of_which_family_they_are(tmp_path):
    sizes = NextScaleConfig(
        depth=1, width=8, heads=2, grids=((1, 1), (2, 2)), num_classes=3, tokenizer=TokenizerConfig(vocab=8, channels=4, width=8, blocks=1)
    )
    other = model_folder.save(tmp_path / "var", NextScale(sizes), MultiScaleVQ(sizes.tokenizer, sizes.grids), {})
    assert (other / "config.yaml").read_text().startswith("kind: next_scale\n")
    assert model_from_yaml(to_yaml(sizes)) == sizes, "without a kind"
    assert model_from_yaml(model_to_yaml(sizes)) == sizes
    assert model_from_yaml(model_to_yaml(CONFIG)) == CONFIG
    assert isinstance(model_folder.load(other)[0], NextScale)
    with pytest.raises(ConfigError, match=r"kind='rastr'.*Did you mean `raster`"):
        model_from_yaml("kind: rastr")


def test_a_damaged_folder_is_refused(tmp_path):
    path = model_folder.save(tmp_path / "mine", Raster(CONFIG), VQ(TOKENIZER), {})
    file = path / "tokenizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors is not what was written"):
        model_folder.load(path)
