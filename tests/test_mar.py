import json
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from varl.checkpoints import model as model_folder
from varl.checkpoints.convert import load_released
from varl.checkpoints.mar import load_mar, released, tokenizer_config, transformer_config
from varl.config import DiffusionHeadConfig, KLConfig, MARConfig, ViTConfig, settled_counts
from varl.errors import CheckpointError, ConfigError
from varl.models.mar import MAR, known, masked
from varl.models.masked import MaskedModel
from varl.tokenizers.kl import KL

GOLDEN = Path(__file__).parent.parent.parent / "shared" / "golden"
KEYS = sorted((GOLDEN / "keys").glob("mar-*.json"))
recorded = pytest.mark.skipif(not KEYS, reason="the lists of released names (../shared/golden) are not beside this repository")

TINY = MARConfig(
    encoder=ViTConfig(depth=2, width=16, heads=2),
    decoder=ViTConfig(depth=1, width=12, heads=2),
    head=DiffusionHeadConfig(depth=1, width=8),
    grid=(3, 3),
    num_classes=4,
    buffer=5,
    tokenizer=KLConfig(channels=3, width=8, multipliers=(1, 2), blocks=1),
)

State = dict[str, torch.Tensor]


def tiny(config: MARConfig = TINY) -> MAR:
    """A model whose every weight matters."""
    torch.manual_seed(0)
    model = MAR(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval().requires_grad_(False)


def orders(batch: int, tokens: int = 9) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)).argsort(1)


# ---- orders and schedules


def test_masks_follow_the_order_from_its_end():
    order = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    assert masked(order, 2).tolist() == [[True, False, True, False], [True, True, False, False]]
    assert known(masked(order, 2), 2).tolist() == [[1, 3], [2, 3]]
    assert known(masked(order, 4), 0).shape == (2, 0)
    assert known(masked(order, 0), 4).tolist() == [[0, 1, 2, 3]] * 2
    assert known(masked(order, 2).to("meta"), 2).shape == (2, 2), "another device is not waited for"
    for missing in ([[True, False], [True, True]], [[True, True]] * 2, [[False, False]] * 2):
        with pytest.raises(ValueError, match=r"a picture of the batch knows [02] tokens, not 1"):
            known(torch.tensor(missing), 1)


def test_sets_are_disjoint_and_complete():
    order = orders(3)
    left = [9 - count for count in accumulate(settled_counts(9, 4), initial=0)]
    sets = [masked(order, before) & ~masked(order, after) for before, after in pairwise(left)]
    assert torch.equal(sum(s.int() for s in sets), torch.ones(3, 9, dtype=torch.int))


# ---- the model


def test_it_is_a_masked_model():
    model = tiny()
    assert isinstance(model, MaskedModel)
    assert (model.tokens, model.channels) == (9, 3)
    assert model.schedule(4) == settled_counts(9, 4)
    assert model.denoiser(7).moves == 7
    with pytest.raises(ConfigError, match="10 steps for 9 tokens"):
        model.schedule(10)


def test_what_is_masked_is_not_read():
    model, order = tiny(), orders(2)
    condition, tokens, missing = model.condition(torch.tensor([0, 3])), torch.randn(2, 9, 3), masked(order, 5)
    z = model(condition, tokens, known(missing, 4))
    assert z.shape == (2, 9, 12)
    assert torch.equal(model(condition, tokens.masked_fill(missing[..., None], 99.0), known(missing, 4)), z)
    other = tokens.clone()
    other[0, known(missing, 4)[0, 0]] += 1
    changed = (model(condition, other, known(missing, 4)) - z).abs().amax(2)
    assert (changed[0] > 1e-4).all(), "every place sees it"
    assert (changed[1] == 0).all(), "pictures do not see one another"


def test_known_tokens_may_come_in_any_order():
    model, tokens, places = tiny(), torch.randn(2, 9, 3), torch.tensor([[1, 4, 8], [0, 2, 3]])
    condition = model.condition(torch.tensor([1, 2]))
    torch.testing.assert_close(model(condition, tokens, places.flip(1)), model(condition, tokens, places), rtol=0, atol=1e-5)


def test_a_picture_alone_and_in_a_batch():
    model, tokens, places = tiny(), torch.randn(3, 9, 3), known(masked(orders(3), 4), 5)
    condition = model.condition(torch.tensor([1, 2, 4]))
    whole = model(condition, tokens, places)
    torch.testing.assert_close(model(condition[1:2], tokens[1:2], places[1:2]), whole[1:2], rtol=0, atol=1e-5)


def test_no_class_is_the_learned_vector():
    model = tiny()
    assert torch.equal(model.condition(torch.tensor([4, 2])), torch.cat([model.fake_latent, model.class_emb.weight[2:3]]))


def test_positions_at_another_grid():
    """Resized between the middles of cells; the buffer's stay, and so does a table for the grid that it was made for."""
    config = replace(TINY, grid=(1, 2), buffer=1)
    model = MAR(config, (1, 4))
    table = torch.tensor([[[7.0], [0.0], [4.0]]])
    assert model.positions(table).flatten().tolist() == [7.0, 0.0, 1.0, 3.0, 4.0]
    assert model.positions(table[:, 1:]).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    assert MAR(config).positions(table) is table
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {n: t.shape for n, t in MAR(config).state_dict().items()}
    z = model(model.condition(torch.tensor([0])), torch.randn(1, 4, 3), torch.tensor([[3]]))
    assert (model.tokens, z.shape) == (4, (1, 4, 12))


def test_blocks_are_those_of_both_halves():
    model = tiny()
    assert len(model.blocks) == 3
    assert {id(p) for block in model.blocks for p in block.parameters()} < {id(p) for p in model.parameters()}


def test_gradients_reach_every_weight_of_the_transformer():
    model = tiny().requires_grad_(True)
    z = model(model.condition(torch.tensor([0, 4])), torch.randn(2, 9, 3), known(masked(orders(2), 5), 4))
    z.square().sum().backward()
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert all(name.startswith("diffloss.") for name in lacking)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: ViTConfig(width=10, heads=3), "width=10, heads=3: .*multiple of heads"),
        (lambda: replace(TINY, grid=(0, 3)), r"grid=\[0, 3\]"),
        (lambda: replace(TINY, buffer=0), "buffer=0 must be 1 or more"),
    ],
)
def test_sizes_that_cannot_be(change, named):
    with pytest.raises(ConfigError, match=named):
        change()


# ---- released files

EVEN = replace(TINY, decoder=TINY.encoder)
"""Encoder and decoder have as many heads, which `heads` gives."""


def files(config: MARConfig = EVEN) -> tuple[State, State]:
    """The two state dicts as the authors' code saves them."""
    theirs: State = {}
    torch.manual_seed(0)
    for ours, tensor in KL(config.tokenizer).state_dict().items():
        names = [ours.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in ours else [ours]
        theirs |= {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return tiny(config).state_dict(), theirs


def written(folder: Path, mar, kl) -> tuple[Path, Path]:
    torch.save(mar, folder / "mar.pth")
    torch.save({"model": kl}, folder / "kl.ckpt")
    return folder / "mar.pth", folder / "kl.ckpt"


@pytest.mark.parametrize(
    "config",
    [
        EVEN,
        replace(EVEN, encoder=ViTConfig(depth=1, width=8, heads=2), grid=(2, 2), buffer=2, num_classes=7),
        replace(EVEN, tokenizer=replace(TINY.tokenizer, multipliers=(1, 1, 2), blocks=2, attention=False)),
    ],
    ids=["plain", "other sizes", "other autoencoder"],
)
def test_sizes_are_read_off_the_weights(tmp_path, config):
    mar, kl = files(config)
    model, module = load_mar(*written(tmp_path, mar, kl), heads=2)
    assert model.config == config
    assert all(torch.equal(tensor, mar[name]) for name, tensor in model.state_dict().items())
    torch.manual_seed(0)
    images = torch.rand(2, 3, *config.image_size)
    torch.manual_seed(0)
    assert torch.equal(module.encode(images).mean, KL(config.tokenizer).encode(images).mean)


@recorded
@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.stem)
def test_released_files_have_the_sizes_that_they_are_named_after(file):
    shapes = json.loads(file.read_text())["state_dict"]
    if file.stem == "mar-kl16":
        assert tokenizer_config(shapes, file.stem) == KLConfig(), "the defaults are the released autoencoder"
    else:
        size = {"base": "B", "large": "L", "huge": "H"}[file.stem.split("_")[1]]
        assert transformer_config(shapes, KLConfig(), file.stem) == released(size)


def test_sizes_by_name():
    assert released("B") == MARConfig()
    with pytest.raises(CheckpointError, match="B, L, H, there is no 'XL'"):
        released("XL")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_ema": state, "model": {n: t + 1 for n, t in state.items()}, "epoch": 3},
        lambda state: {"model_ema": state},
        lambda state: {"model": state},
        lambda state: state,
    ],
    ids=["averaged first", "averaged", "latest", "bare"],
)
def test_every_wrapping(tmp_path, wrap):
    mar, kl = files()
    for load in (load_mar, load_released):
        model, _ = load(*written(tmp_path, wrap(mar), kl), heads=2)
        assert isinstance(model, MAR)
        assert all(torch.equal(tensor, mar[name]) for name, tensor in model.state_dict().items())


def test_safetensors(tmp_path):
    mar, kl = files()
    for name, state in (("mar", mar), ("kl", kl)):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / f"{name}.safetensors")
    model, _ = load_mar(tmp_path / "mar.safetensors", tmp_path / "kl.safetensors", heads=2)
    assert torch.equal(model.fake_latent, mar["fake_latent"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda mar, kl: mar.pop("encoder_blocks.1.attn.qkv.bias"), r"missing \(1\):\n +`encoder_blocks.1.attn.qkv.bias`"),
        (lambda mar, kl: mar.update(extra=torch.zeros(1)), r"unexpected \(1\):\n +`extra`"),
        (lambda mar, kl: mar.update(mask_token=torch.zeros(1, 1, 4)), r"`mask_token` \[1, 1, 4\], the model has \[1, 1, 16\]"),
        (lambda mar, kl: mar.update(diffusion_pos_embed_learned=torch.zeros(1, 8, 16)), "has 8 places, which are no square"),
        (lambda mar, kl: mar.update({"z_proj.weight": torch.zeros(16, 4)}), "vectors of 4 channels, the autoencoder's have 3"),
        (lambda mar, kl: kl.pop("decoder.mid.attn_1.k.bias"), r"missing \(1\):\n +`decoder.mid.attn_1.k.bias`"),
        (
            lambda mar, kl: kl.update({"decoder.mid.attn_1.k.bias": torch.zeros(1)}),
            r"`decoder.mid.attn_1.k.bias` \[1\], the model has \[16\]",
        ),
        (lambda mar, kl: kl.update({"loss.lpips": torch.zeros(1)}), r"unexpected \(1\):\n +`loss.lpips`"),
        (lambda mar, kl: (mar.clear(), mar.update(kl)), "no weights of a MAR transformer"),
        (lambda mar, kl: (kl.clear(), kl.update(mar)), "no weights of a KL autoencoder"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(tmp_path, change, named):
    mar, kl = files()
    change(mar, kl)
    with pytest.raises(CheckpointError, match=f"(?s){named}"):
        load_mar(*written(tmp_path, mar, kl), heads=2)


def test_what_no_weight_tells_must_be_said(tmp_path):
    paths = written(tmp_path, *files())
    with pytest.raises(CheckpointError, match=r"2 \+ 2 layers of width 16 and 16 are of no released size.*Give `heads`"):
        load_mar(*paths)
    with pytest.raises(
        CheckpointError, match=r"is MAR's, whose weights tell all but the heads.*Leave image_size \(--image-size\) and ema \(--ema\) out"
    ):
        load_released(*paths, heads=2, image_size=6, ema=True)


def test_a_model_folder_gives_back_what_was_saved(tmp_path):
    model, kl = tiny(), KL(TINY.tokenizer)
    path = model_folder.save(tmp_path / "model", model, kl, {"from": "a test"})
    assert (path / "config.yaml").read_text().startswith("kind: mar\n")
    again, module = model_folder.load(path)
    assert isinstance(again, MAR)
    assert again.config == TINY
    for one, other in ((model, again), (kl, module)):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
