"""What a user gets wrong, through the command line: exit status 2, the value, the reason and the fix on stderr, and nothing touched."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tiny import TINY_RASTER, WIDE_RASTER, save_tiny, snapshot, status, write_config, write_pictures
from varl.cli import run_folder
from varl.data.folder import write_folder
from varl.data.token_cache import TokenCache
from varl.types import Prompt

MODEL_SETTINGS = """
model:
  depth: 1
  width: 32
  heads: 2
  grids: [[1, 1], [1, 2], [2, 4]]
  text: {alphabet: ABC}
data: {kind: words, image_size: [16, 32]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a config, and a run of one step."""
    folder = tmp_path_factory.mktemp("made")
    write_config(folder)
    assert status("train", folder / "run.yaml", "--set", "train.steps=1", "--out", folder / "out", "--quiet") == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it that the test may break, as the working folder."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    file = folder / "run.yaml"
    file.write_text(file.read_text().replace(str(made), str(folder)))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(here, capfd):
    """The message with which a command is refused."""

    def refuse(*arguments):
        before = snapshot(here)
        capfd.readouterr()
        code = status(*arguments)
        said = capfd.readouterr()
        assert code == 2, said.err
        assert snapshot(here) == before, "something that was saved has changed"
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
        assert said.out == ""
        return said.err

    return refuse


def test_unknown_recipe(refused):
    said = refused("train", "grpo/words_cp")
    assert "unknown recipe `grpo/words_cp`. Did you mean `grpo/words_cpu`?" in said
    assert "\n  var_rl/words_cpu  " in said


def test_a_shell_sees_the_status_and_no_traceback():
    done = subprocess.run([sys.executable, "-m", "varl.cli", "train", "grpo/words_cp"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown recipe `grpo/words_cp`. Did you mean `grpo/words_cpu`?")
    assert "Traceback" not in done.stderr


def test_a_config_file_that_is_not_there(refused):
    assert "there is no file rnu.yaml. Give a YAML file, or the name of a recipe: " in refused("train", "rnu.yaml")


def test_a_config_that_is_not_yaml(refused, here, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [a")
    assert "this is not YAML: " in refused("train", tmp_path / "bad.yaml")


def test_a_config_that_is_not_utf8(refused, tmp_path):
    (tmp_path / "bad.yaml").write_bytes("name: Çat\n".encode("latin-1"))
    for command in ("train", "plan"):
        said = refused(command, tmp_path / "bad.yaml")
        assert f"{tmp_path}/bad.yaml: is not UTF-8 (" in said
        assert "Save it as UTF-8." in said


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        (0, "--processes 0: the first process is the run itself. Give 1 or more."),
        (3, "--processes 3: they share train.prompts_per_step=2, and a process without a prompt has nothing to do. Give 2 or fewer"),
        (2, "--processes 2: torchrun has started 2 already. Leave --processes out."),
    ],
)
def test_processes(refused, monkeypatch, processes, said):
    if processes == 2:
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert said in refused("train", "run.yaml", "--processes", processes, "--out", "new")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.stepz=10", "unknown key `train.stepz`. Did you mean `steps`? Known: steps, "),
        ("train.steps=ten", "train.steps='ten': expected a whole number."),
        ("train.steps", "'train.steps' is no assignment. Write path=value, for example train.steps=10."),
        (
            "algorithm.num_generations=1",
            "num_generations=1: a group of one is its own baseline, every advantage is 0. Set it to 2",
        ),
        ("sample_law.temperature=0", "temperature=0.0: must be above 0. For greedy decoding set top_k=1."),
        ("score_law.top_p=1.5", "top_p=1.5: must lie in (0, 1]; 1 keeps all tokens."),
        ("sample_law.top_k=-1", "top_k=-1: must be 0 (keep all) or more."),
        ("sample_law.top_k=17", "sample_law.top_k=17 is more than the vocabulary of 16. Set 0 to keep all tokens."),
        ("sample_law.cfg_scale=[1.0, 2.0]", "sample_law.cfg_scale has 2 values, the model 3 scales. Give one, or one per scale."),
        ("algorithm={kind: var_rl, middle_step: {index: 9}}", "at step 9; this model has 3. Set 1 to 3."),
        ("algorithm={kind: var_rl, middle_step: {}}", "set exactly one of index, resolution and token_share."),
        ("data.fonts=[comic]", "font 'comic': neither a bundled face (sans, serif, "),
        ("data.fonts=[serif]", "asks for style ['serif'], which the encoder lacks. It knows ['sans', 'mono', 'ink', 'sea']."),
        ("data.word_list=no.txt", "word_list 'no.txt': neither `wonderwords` nor a file."),
        ("rewards.bright.reward.target=no.py:f", "there is no file "),
        ("rewards.bright.reward.target=varl.rewards.toy:dark", "has no callable 'dark'. It has: "),
        ("model=nowhere", "model='nowhere': no config.yaml in nowhere. Give a model folder (made by `varl pretrain` or `varl convert`)"),
        ("model=bundled:wrods", "model='bundled:wrods': no config.yaml in "),
    ],
)
def test_settings(refused, setting, said):
    assert said in refused("train", "run.yaml", "--set", setting, "--out", "new")


def test_everything_that_is_missing_at_once(refused):
    said = refused("train", "run.yaml", "--set", "model=nowhere", "--set", "data.fonts=[comic]", "--out", "new")
    assert "2 things stand in the way:\n- model='nowhere'" in said
    assert "\n- font 'comic'" in said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "model.grids=[[2, 4], [1, 1]]",
            "model.grids=[(2, 4), (1, 1)]: a later scale is smaller than an earlier one. Order them coarse to fine.",
        ),
        ("model.grids=[[0, 1]]", "model.grids=[(0, 1)]: every scale needs at least 1x1 token."),
        ("model.heads=5", "model.width=32 is no multiple of model.heads=5. Change one of the two."),
        ("model.num_classes=3", "set exactly one of num_classes (class-conditional) and text (text-conditional)."),
        ("data.image_size=[16, 64]", "data.image_size=(16, 64), but the model's grids and stride make (32, 64) pixels. Make them equal."),
    ],
)
def test_impossible_models(refused, here, setting, said):
    (here / "base.yaml").write_text(MODEL_SETTINGS)
    assert said in refused("pretrain", "base.yaml", "--set", setting, "--out", "new")


def test_the_other_command(refused):
    assert "pretrain/words_cpu is for `varl pretrain`" in refused("train", "pretrain/words_cpu")
    assert "run.yaml is for `varl train`" in refused("pretrain", "run.yaml")


# ---- data -------------------------------------------------------------------------------------------------------------------------------


def data_folder(here):
    write_folder(here / "mine", torch.zeros(2, 3, 16, 32, dtype=torch.uint8), [Prompt(text="CAT"), Prompt(text="DOG")])
    return "data={kind: folder, path: mine}"


def test_a_picture_that_cannot_be_read(refused, here):
    setting = data_folder(here)
    (here / "mine/images/000001.png").write_bytes(b"not a picture")
    said = refused("train", "run.yaml", "--set", setting, "--out", "new")
    assert "mine/prompts.jsonl:2: image 'images/000001.png': cannot be read" in said
    assert "write it again." in said


def test_a_line_that_is_not_json(refused, here):
    setting = data_folder(here)
    (here / "mine/prompts.jsonl").write_text('{"text": "CAT"}\n{"text": \n')
    assert "mine/prompts.jsonl:2: " in refused("train", "run.yaml", "--set", setting, "--out", "new")


def test_a_data_folder_that_is_not_there(refused):
    said = refused("train", "run.yaml", "--set", "data={kind: folder, path: nowhere}", "--out", "new")
    assert "data folder 'nowhere': has no prompts.jsonl. Write one JSON object a line" in said


def test_characters_that_the_encoder_lacks(refused, here):
    assert "prompt 'Çat' holds ['a', 't', 'Ç'], which the encoder lacks. It knows 'ABC" in refused(
        "sample", "base", "--prompt", "Çat", "--out", "x.png"
    )
    setting = data_folder(here)
    (here / "mine/prompts.jsonl").write_text('{"text": "CAT"}\n{"text": "cat"}\n')
    assert "prompt 'cat' holds ['a', 'c', 't']" in refused("train", "run.yaml", "--set", setting, "--out", "new")


def test_a_prompt_that_is_too_long(refused):
    said = refused("sample", "base", "--prompt", "ABCDEFGHIJKLM", "--out", "x.png")
    assert "has 13 characters, the encoder takes 12. Shorten it" in said


# ---- real pictures ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real(here):
    """va_pi.yaml, a raster model of three classes, and pictures of each."""
    save_tiny(here / "raster", WIDE_RASTER)
    write_pictures(here / "pictures")
    (here / "va_pi.yaml").write_text("""
name: tiny
model: raster
data: {kind: pictures, path: pictures, image_size: [16, 32]}
rewards: {mse: {reward: {kind: reconstruction, lpips_weight: 0}}}
algorithm: {kind: va_pi, grpo: {num_generations: 3, rollouts_per_chunk: 6}}
train: {steps: 1, prompts_per_step: 3, rollouts_per_backward: 8, image_every: 0, device: cpu}
""")
    return here


def test_the_run_that_the_others_break_is_fine(real, capfd):
    assert status("plan", "va_pi.yaml") == 0
    assert "nothing is missing" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model=base", "va_pi reads real pictures; NextScalePolicy cannot. Use a raster model or GRPOConfig()."),
        ("algorithm.grpo.num_generations=1", "num_generations=1: a group of one is its own baseline, every advantage is 0. Set it to 2"),
        ("algorithm.prefix_noise=1.5", "va_pi.prefix_noise=1.5: must be a share of the context's tokens, 0 to 1."),
        ("algorithm.prefix_noise=-0.1", "va_pi.prefix_noise=-0.1: must be a share of the context's tokens, 0 to 1."),
        ("algorithm.grpo.loss_type=grpo", "va_pi.grpo.loss_type='grpo': every draw learns from all of its tokens"),
        ("sample_law.top_k=17", "sample_law.top_k=17 is more than the vocabulary of 16. Set 0 to keep all tokens."),
        ("sample_law.top_p=0", "top_p=0.0: must lie in (0, 1]; 1 keeps all tokens."),
        ("sample_law.cfg_scale=[1.0, 2.0]", "sample_law.cfg_scale has 2 values, the model 8 tokens. Give one, or one per token."),
        (
            "score_law.top_k=4",
            "top_k=4, top_p=1.0 with va_pi.prior_weight=0.1: the cross-entropy of a token that was cut away is",
        ),
        ("data.path=nowhere", "pictures.path='nowhere': there is no such folder. Give a folder of pictures."),
        ("data.path=.", "has no picture, but would be label"),
        ("data.share=0", "pictures.share=0.0: must be above 0 and at most 1."),
        ("data.heldout=nowhere", "pictures.path='nowhere': there is no such folder."),
        ("data.image_size=[24, 24]", "data.image_size=(24, 24), but the model's grids and stride make (16, 32) pixels. Make them equal."),
        ("eval.every=1", "eval.every=1, but the data holds no prompts for evaluation. Set data.heldout, or eval.every=0."),
        ("rewards.mse.reward.lpips_weight=1", "lpips_weight=1.0: there is no network to look with. Set vgg and heads (LPIPS), or features"),
        ("rewards.mse.reward={kind: reconstruction, vgg: no.pth, heads: no.pth}", "rewards.mse: there is no file no.pth. Put the released"),
        (
            "algorithm={kind: var_rl, middle_step: {resolution: 0.5}}",
            "middle_step.resolution=0.5: the 8 steps of this model do not",
        ),
    ],
)
def test_settings_of_va_pi(real, refused, setting, said):
    assert said in refused("train", "va_pi.yaml", "--set", setting, "--out", "new")


def test_data_without_pictures(real, refused):
    said = refused(
        "train", "va_pi.yaml", "--set", f"data={{kind: words, image_size: [16, 32], word_list: {real}/words.txt}}", "--out", "new"
    )
    assert "reconstruction compares with real pictures, and this data has none. Set data to pictures." in said
    assert "va_pi compares with real pictures, and this data has none. Set data to pictures." in said


def test_labels_that_the_model_lacks(real, refused):
    write_pictures(real / "four", classes=4)
    said = refused("train", "va_pi.yaml", "--set", "data.path=four", "--out", "new")
    assert "prompt label 3: the model knows classes 0 to 2. Give one of them." in said


def test_pictures_that_cannot_be_used(real, refused):
    """Cut off, or of more bits than a picture has."""
    file = real / "pictures/a/0.png"
    file.write_bytes(file.read_bytes()[:200])
    Image.fromarray(torch.zeros(16, 32, dtype=torch.int32).numpy()).save(real / "pictures/b/deep.tiff")
    said = refused("train", "va_pi.yaml", "--out", "new")
    assert "2 things stand in the way:" in said
    assert "pictures/a/0.png: cannot be read" in said
    assert "pictures/b/deep.tiff: has mode I, more than 8 bits for each colour. Save it with 8 bits, as grey or RGB." in said


def test_tokens_that_another_tokenizer_made(real, capfd):
    """Which weights made them is known once these are loaded, before anything is drawn."""
    TokenCache(real / "kept", tokenizer="0" * 64, name="models/other")
    assert status("train", "va_pi.yaml", "--set", "data.tokens=kept", "--out", "new", "--quiet") == 2
    said = capfd.readouterr().err
    assert "kept: holds tokens of the tokenizer 'models/other' (000000000000), not of 'raster' (" in said
    assert "their ids mean other things. Give another folder, or delete this one." in said


@pytest.mark.parametrize("change", [{"tokenizer": replace(WIDE_RASTER.tokenizer, vocab=8)}, {"grid": (2, 2)}, {"num_classes": 5}], ids=str)
def test_weights_of_another_raster_model(real, refused, change):
    """A codebook, a grid or classes that are not those of the weights beside the config, which a plan does not look at."""
    other = save_tiny(real / "other", replace(WIDE_RASTER, **change))
    for name in ("model.safetensors", "tokenizer.safetensors"):
        shutil.copy(real / "raster" / name, other / name)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest |= {name: part for name, part in json.loads((real / "raster/manifest.json").read_text()).items() if name != "config.yaml"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    if "grid" in change:  # no weight of this family tells its grid: pictures are then of another size
        assert "data.image_size=(16, 32), but the model's grids and stride make (16, 16)" in refused(
            "train", "va_pi.yaml", "--set", "model=other", "--out", "new"
        )
        return
    said = refused("sample", "other", "--label", "0", "--out", "x.png")
    assert "the weights do not fit Raster" in said
    assert ("output.weight" if "tokenizer" in change else "cls_embedding.embedding_table.weight") in said


# ---- what was saved ---------------------------------------------------------------------------------------------------------------------


def test_the_run_directory_of_another_config(refused):
    said = refused("train", "run.yaml", "--set", "seed=7", "--set", "train.optim.lr=0.5", "--out", "out", "--quiet")
    assert "out holds a run with other settings:\n" in said
    assert "  seed: 0 -> 7\n" in said
    assert "  train.optim.lr: 0.0001 -> 0.5\n" in said
    assert "Give another --out, or the same settings to go on." in said


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.safetensors"])
def test_a_truncated_model(refused, here, file):
    whole = (here / "base" / file).read_bytes()
    (here / "base" / file).write_bytes(whole[:-100])
    for command in (["train", "run.yaml", "--out", "new"], ["sample", "base", "--prompt", "CAT", "--out", "x.png"]):
        said = refused(*command)
        assert file in said
        assert f"{len(whole) - 100}" in said.replace(",", "")
        assert "Copy or save the model folder again." in said


def test_a_model_that_was_changed(refused, here):
    file = here / "base/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "model.safetensors is not what was written" in refused("sample", "base", "--prompt", "CAT", "--out", "x.png")


def test_a_model_that_is_not_there(refused):
    for command in (["sample", "nowhere", "--prompt", "CAT", "--out", "x.png"], ["eval", "words", "nowhere"]):
        assert "model='nowhere': no config.yaml in nowhere. Give a model folder" in refused(*command)


def test_an_out_that_is_a_file(refused):
    assert "--out run.yaml: is a file. Give a folder" in refused("train", "run.yaml", "--out", "run.yaml")


def test_an_out_that_is_no_place_for_a_run(refused, here):
    """Of somebody else, of a model, or below a file; what a run left before its first step is one."""
    (here / "mine").mkdir()
    (here / "mine/thesis.tex").write_text("")
    (here / "other").mkdir()
    (here / "other/config.yaml").write_text("port: 80")
    for out, said in (
        ("mine", "--out mine: is not empty and not a run. Give a new folder, or that of a run to go on."),
        (".", "--out .: is not empty and not a run."),
        ("base", "--out base: is a model folder. Give a folder of its own to the run."),
        ("other", "--out other: its config.yaml is not a run's. Give a new folder, or mend it: unknown key `port`."),
        ("run.yaml/below", f"--out run.yaml/below: {here}/run.yaml is a file, so nothing can lie in it."),
        ("/proc/mine", "--out /proc/mine: /proc cannot be written"),
    ):
        assert said in refused("train", "run.yaml", "--out", out)
    for entry, marks in (("lock", ()), ("command.txt", ()), ("probe.json", ()), ("eval", ("eval",))):
        folder = here / f"begun with {entry}"
        folder.mkdir()
        (folder / entry).write_text("")
        assert run_folder(folder, "tiny", *marks) == folder


def test_an_out_that_is_no_place_for_a_file(refused, here):
    """Said before the model is loaded, which is broken here."""
    (here / "base/model.safetensors").write_bytes(b"")
    for command in (["sample", "base", "--prompt", "CAT"], ["eval", "words", "base"]):
        assert "--out out: is a folder. Give the name of a file, for example out/out." in refused(*command, "--out", "out")
        assert "--out /proc/x: /proc cannot be written" in refused(*command, "--out", "/proc/x")
        assert f"--out run.yaml/x: {here}/run.yaml is a file" in refused(*command, "--out", "run.yaml/x")


def test_a_probe_that_is_none(refused, here):
    (here / "mine.json").write_text(json.dumps([1]))
    assert "--probe no.json: there is no such file. Make one with `varl probe`." in refused("train", "run.yaml", "--probe", "no.json")
    assert "mine.json: is not what `varl probe` writes" in refused("train", "run.yaml", "--out", "new", "--probe", "mine.json")


# ---- other commands ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "0"], "temperature=0.0: must be above 0. For greedy decoding set top_k=1."),
        (["--top-p", "0"], "top_p=0.0: must lie in (0, 1]; 1 keeps all tokens."),
        (["--top-k", "99"], "top_k=99 is more than the vocabulary of 16. Set 0 to keep all tokens."),
        (["--cfg", "1,2"], "cfg_scale has 2 values, the model 3 scales. Give one, or one per scale."),
        (["--cfg", "much"], "--cfg 'much': must be a number, numbers with commas between them, or VAR's ramp, as var:4 is."),
        (["--style", "mono,sea,ink"], "has 3 attributes ['mono', 'sea', 'ink']; at most 2 fit. Drop some."),
        (["--style", "gothic"], "asks for style ['gothic'], which the encoder lacks."),
        (["--label", "3"], "label 3: this model reads text and knows no classes. Give --prompt."),
    ],
)
def test_sampling(refused, arguments, said):
    assert said in refused("sample", "base", "--prompt", "CAT", "--out", "x.png", *arguments)


def test_nothing_to_draw(refused):
    assert "nothing to draw: give --prompt, --label or --prompts." in refused("sample", "base", "--out", "x.png")


def test_evaluation(refused):
    assert "--judges 'tesserac': unknown tesserac. Use tesseract, rapidocr or auto." in refused(
        "eval", "words", "base", "--judges", "tesserac"
    )
    assert "--judges 'auto,': a name is missing beside a comma. Use" in refused("eval", "words", "base", "--judges", "auto,")
    assert "--temperatures 'hot': must be numbers" in refused("eval", "words", "base", "--temperatures", "hot")
    assert "--temperatures '1,0': each must be above 0 and finite" in refused("eval", "words", "base", "--temperatures", "1,0")


def test_evaluation_of_a_run_without_held_out_prompts(refused, here):
    data_folder(here)
    config = yaml.safe_load((here / "out/config.yaml").read_text())
    (here / "out/config.yaml").write_text(yaml.safe_dump(config | {"data": {"kind": "folder", "path": "mine"}}))
    said = refused("eval", "words", "out")
    assert "out: has no held-out prompts, because data.heldout was not set. Evaluate its model on drawn words instead, with " in said
    assert "`varl eval words out/model`, or look at it with `varl sample`." in said


def test_evaluation_of_a_run_whose_prompts_hold_no_words(refused, here):
    write_folder(here / "labels", None, [Prompt(label=3)])
    config = yaml.safe_load((here / "out/config.yaml").read_text())
    (here / "out/config.yaml").write_text(yaml.safe_dump(config | {"data": {"kind": "folder", "path": "labels", "heldout": "labels"}}))
    assert "out: its held-out prompts hold no words to be read. Hold its pictures against real ones" in refused("eval", "words", "out")


# ---- a model of classes -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def raster(here):
    """And pictures to hold it against, with a network to judge by."""
    save_tiny(here / "raster", TINY_RASTER)
    np.savez(here / "real.npz", arr_0=np.zeros((48, 12, 12, 3), np.uint8))
    (here / "judge.py").write_text("def means(images):\n    return images.mean((2, 3))\n")
    return here / "raster"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--label", "5"], "prompt label 5: the model knows classes 0 to 4. Give one of them."),
        (["--prompt", "CAT"], "prompt 'CAT': this model draws classes and reads no text. Give --label, 0 to 4."),
        (["--prompts", "mine"], "prompt 'CAT': this model draws classes and reads no text. Give --label, 0 to 4."),
        (["--label", "1", "--cfg", "1,2"], "cfg_scale has 2 values, the model 9 tokens. Give one, or one per token."),
        (["--label", "1", "--top-k", "17"], "top_k=17 is more than the vocabulary of 16. Set 0 to keep all tokens."),
        (["--prompt", "CAT", "--style", "mono"], "style mono: this model knows no attributes. Leave --style out."),
    ],
)
def test_sampling_from_classes(refused, here, raster, arguments, said):
    data_folder(here)
    assert said in refused("sample", "raster", "--out", "x.png", *arguments)


def test_words_of_a_model_that_reads_none(refused, raster):
    said = refused("eval", "words", "raster")
    assert "this model reads no characters, so there are no words to evaluate it on. Use one that does, or `varl eval fid`." in said


JUDGE = ["--features", "judge.py:means", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "real.npz"], "nowhere: is neither a model folder nor a run directory, nor a folder or an npz file of pictures."),
        (["gone.npz", "real.npz"], "gone.npz: there is no such file."),
        (["raster", "gone.npz"], "gone.npz: there is no such file."),
        (["raster", "gone"], "pictures 'gone': there is no such file or folder."),
        (["raster", "real.npz", "--samples", "39"], "raster: 39 pictures, but 20 groups for intervals need at least 40. Draw more."),
        (["raster", "real.npz", "--size", "24"], "raster: is 24x24 (height x width), the reference 12x12;"),
        (
            ["base", "real.npz", "--prompts", "mine", "--size", "12"],
            "--size 12: this model's pictures are 16x32 (height x width), no squares.",
        ),
        (["base", "real.npz"], "this model reads text and knows no classes that could be drawn at random. Give --prompts, a folder with"),
        (["real.npz", "real.npz", "--cfg", "2"], "real.npz: is no model but pictures, which are there already. Leave out what says how"),
        (["raster", "real.npz", "--cfg", "1,2"], "cfg_scale has 2 values, the model 9 tokens."),
        (["raster", "real.npz", "--inception", "x.pth"], "--features judge.py:means, --inception x.pth: are two networks to judge by."),
        (["raster", "real.npz", "--features", "judge.py:none"], "judge.py has no callable 'none'. It has: means."),
        (["raster", "real.npz", "--out", "base"], "--out base: is a folder. Give the name of a file"),
    ],
)
def test_comparison_with_real_pictures(refused, here, raster, arguments, said):
    data_folder(here)
    assert said in refused("eval", "fid", *JUDGE, *arguments)


def test_inception_weights_that_are_not_there(refused, raster, here, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(here))
    assert "Download https://" in refused("eval", "fid", "raster", "real.npz")
    assert "Inception weights: there is no file x.pth." in refused("eval", "fid", "raster", "real.npz", "--inception", "x.pth")


def test_reports(refused):
    assert "nowhere: there is no such run directory." in refused("report", "nowhere")
    assert "a comparison needs at least two run directories. Name another." in refused("compare", "out")
    assert "nowhere: there is no such folder. Give one with recorded cases" in refused("parity", "nowhere")


def test_conversion(refused, here):
    (here / "a.pth").write_bytes(b"not weights")
    said = refused("convert", "a.pth", "b.pth", "--out", "converted")
    assert "a.pth" in said
    assert "b.pth" in refused("convert", "b.pth", "b.pth", "--out", "converted")
