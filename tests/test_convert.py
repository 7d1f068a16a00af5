"""Released files through the command line: whose they are is told from their names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from test_llamagen import CONFIG, SIDE, State, files
from test_parity import CONFIG as VAR
from test_parity import released
from tiny import status
from varl.checkpoints import model as model_folder
from varl.checkpoints.convert import load_released
from varl.checkpoints.folder import load_notes
from varl.errors import CheckpointError
from varl.models.raster import Raster


def write(folder: Path, **contents: object) -> list[Path]:
    """NAME.pt of each."""
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    return [folder / f"{name}.pt" for name in contents]


def with_rotations(gpt: State) -> State:
    return {**gpt, "freqs_cis": torch.zeros(10, 4, 2)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {}, "steps": 3},
        lambda state: {"ema": state},
        lambda state: state,
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
    ],
    ids=["model", "ema", "bare (FSDP)", "prefix", "compiled"],
)
def test_llamagen_in_every_wrapping(tmp_path, capfd, wrap):
    gpt, vq = files()
    paths = write(tmp_path, gpt=wrap(gpt), vq=wrap(vq))
    assert status("convert", *paths, "--image-size", SIDE, "--heads", 2, "--out", tmp_path / "model") == 0
    assert capfd.readouterr().out == f"{tmp_path}/model\n"
    model, _ = model_folder.load(tmp_path / "model")
    assert model.config == CONFIG
    assert all(torch.equal(tensor, gpt[name]) for name, tensor in model.state_dict().items())
    assert load_notes(tmp_path / "model") == {"converted": ["gpt.pt", "vq.pt"], "ema": False}


def test_var_flat_and_of_a_training_run(tmp_path):
    var, vae = released(VAR)
    save_file({name: tensor.contiguous() for name, tensor in var.items()}, tmp_path / "var.safetensors")
    run, flat = write(tmp_path, run={"epoch": 3, "trainer": {"var_wo_ddp": var, "vae_local": vae}}, vae=vae)
    for name, paths in (("a", (run, run)), ("b", (tmp_path / "var.safetensors", flat))):
        assert status("convert", *paths, "--out", tmp_path / name) == 0
        model, _ = model_folder.load(tmp_path / name)
        assert model.config == VAR
        assert all(torch.equal(tensor, var[key]) for key, tensor in model.state_dict().items())


def test_averaged_weights_are_taken_if_asked_for_and_must_then_be_there(tmp_path):
    gpt, vq = files()
    averaged = {name: tensor + 1 for name, tensor in gpt.items()}
    both, one, tokens = write(tmp_path, both={"model": gpt, "ema": averaged}, one={"model": gpt}, vq=vq)
    for ema, want in ((False, gpt), (True, averaged)):
        model, _ = load_released(both, tokens, image_size=SIDE, heads=2, ema=ema)
        assert torch.equal(model.state_dict()["output.weight"], want["output.weight"])
    with pytest.raises(CheckpointError, match=r"one\.pt: holds no averaged weights \(`ema`\)\. Leave `ema` \(--ema\) out\."):
        load_released(one, tokens, image_size=SIDE, heads=2, ema=True)


def test_the_size_of_pictures_is_read_where_the_file_tells_it(tmp_path):
    gpt, vq = files()
    told, silent, tokens = write(tmp_path, told=with_rotations(gpt), silent=gpt, vq=vq)
    model, _ = load_released(told, tokens, heads=2)
    assert isinstance(model, Raster)
    assert model.config == CONFIG
    with pytest.raises(CheckpointError, match=r"silent\.pt: no weight tells the size of its pictures. Give `image_size` \(--image-size\)"):
        load_released(silent, tokens, heads=2)
    with pytest.raises(CheckpointError, match="another size"):
        load_released(told, tokens, image_size=2 * SIDE, heads=2)
    odd, *_ = write(tmp_path, odd={**gpt, "freqs_cis": torch.zeros(11, 4, 2)})
    with pytest.raises(CheckpointError, match=r"`freqs_cis` has shape \[11, 4, 2\], so pictures of 10 tokens, which are no square"):
        load_released(odd, tokens, heads=2)


def test_captions_count_among_the_rotations(tmp_path):
    """A transformer that reads captions keeps a rotation for each of their tokens too."""
    from test_llamagen import VARIANTS

    gpt, vq = files(VARIANTS["captions"])
    paths = write(tmp_path, gpt={**gpt, "freqs_cis": torch.zeros(5 + 9, 4, 2)}, vq=vq)
    model, _ = load_released(*paths, heads=2)
    assert model.config == VARIANTS["captions"]


def test_files_of_no_known_family(tmp_path):
    gpt, vq = files()
    var, vae = released(VAR)
    strange, tokens, mixed = write(tmp_path, strange={"time_embed.weight": torch.zeros(1)}, vq=vq, mixed={**gpt, **var})
    with pytest.raises(
        CheckpointError, match=r"(?s)strange\.pt: is a transformer of no family.*holds: `time_embed.weight`\n.*VAR, with .*LlamaGen"
    ):
        load_released(strange, tokens)
    with pytest.raises(CheckpointError, match=r"vq\.pt: is a transformer of no family.* It is a tokenizer: name the transformer first"):
        load_released(tokens, strange)
    with pytest.raises(CheckpointError, match="of no family that is known"):
        load_released(mixed, tokens)
    (llama,) = write(tmp_path, llama=gpt)
    (other,) = write(tmp_path, other=vae)
    with pytest.raises(CheckpointError, match="no weights of a LlamaGen tokenizer"):
        load_released(llama, other, image_size=SIDE, heads=2)


def test_var_is_told_nothing(tmp_path):
    var, vae = released(VAR)
    paths = write(tmp_path, var=var, vae=vae)
    for given, named in (
        ({"image_size": 256}, "image_size"),
        ({"heads": 2}, "heads"),
        ({"ema": True}, "ema"),
        ({"language_model": "qwen"}, "language_model"),
    ):
        with pytest.raises(CheckpointError, match=rf"var\.pt: is VAR's, whose weights tell everything\. Leave {named} \("):
            load_released(*paths, **given)


def test_a_place_that_holds_something_else_is_refused_before_anything_is_read(tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    assert status("convert", tmp_path / "none.pt", tmp_path / "none.pt", "--out", tmp_path / "mine") == 2
    assert "mine: is there already, and VARL did not write it" in capfd.readouterr().err
