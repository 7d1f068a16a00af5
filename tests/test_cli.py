import json
import math
import subprocess
import sys
from io import StringIO

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from tiny import TINY_MAR, TINY_RASTER, save_tiny, status, write_config
from varl.checkpoints import model as model_folder
from varl.cli import Bar, command_line, load, measured_line, recipes_help, training_line, warn_against_probes, with_interval
from varl.config import ClassifierConfig, GRPOConfig, PretrainConfig, RunConfig
from varl.errors import ConfigError
from varl.eval.fid import compare_sets
from varl.models.classifier import Classifier
from varl.probe import model_identity
from varl.recipes import describe, recipe
from varl.rewards.toy import load_callable
from varl.settings import to_yaml

COMMANDS = [
    "train",
    "pretrain",
    "sample",
    "eval",
    "report",
    "compare",
    "plan",
    "reward-check",
    "probe",
    "doctor",
    "parity",
    "demo",
    "convert",
    "reward-serve",
]
WITNESSED = """
import os

def reward(images, prompts):
    with open("judges.txt", "a") as file:
        file.write(f"{os.getpid()}\\n")
    return images.mean((1, 2, 3))
"""
INTERRUPTING = """
import signal
asked = 0

def reward(images, prompts):
    global asked
    asked += 1
    if asked == 3:  # two chunks a step: in the second step
        signal.raise_signal(signal.SIGINT)
    return images.mean((1, 2, 3))
"""


# ---- without torch ----------------------------------------------------------------------------------------------------------------------


def test_help_comes_without_torch():
    code = "import sys\nfrom varl.cli import main\ntry:\n    main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, "eval words", "eval fid", "eval geneval"])
def test_every_command_has_help(command, capfd):
    assert status(*command.split(), "--help") == 0
    assert "Usage" in capfd.readouterr().out


def test_recipes_are_listed_in_the_help_of_what_takes_them():
    for name, line in describe().items():
        for kind in (RunConfig, PretrainConfig):
            assert (f"{name}  {line}" in recipes_help(kind)) == isinstance(recipe(name), kind)
            assert f"{name}  {line}" in recipes_help(RunConfig, PretrainConfig)


def test_a_bar_holds_its_count_and_its_end_however_long_the_line(monkeypatch):
    """Of what was measured, what does not fit is cut."""
    metrics = {"step": 110, "total": 220, **{f"measured_{i}": 0.5 for i in range(12)}}
    for width in (80, 120):
        shown = StringIO()
        monkeypatch.setattr("varl.cli.err_console", Console(file=shown, width=width, force_terminal=True, color_system=None))
        with Bar(None, measured_line, shown=True) as bar:
            bar.tick(metrics)
        line = [line for line in shown.getvalue().splitlines() if "step" in line][-1]
        assert all(part in line for part in ("step", "━" * 12, "110/220", "ETA", "-:--:--", "measured_0 0.5"))
        assert line.rstrip().endswith("…")
        assert "measured_11" not in line


def test_a_bar_follows_a_total_that_grows():
    with Bar(None, measured_line, shown=True) as bar:
        for step, total in ((5, 80), (10, 90)):
            bar.tick({"step": step, "total": total})
            assert bar.progress.tasks[0].total == total


def test_a_recipe_and_its_yaml_are_the_same_config(tmp_path):
    for name in ("grpo/words_cpu", "pretrain/words_cpu"):
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(recipe(name)))
        assert load(str(file), ["seed=3"]) == load(name, ["seed=3"])
        assert load(name, ["seed=3"]).seed == 3


def test_a_file_says_itself_what_it_is_for(tmp_path):
    file = tmp_path / "x.yml"
    file.write_text("model: m\nalgorithm: {kind: grpo}")
    assert load(str(file), ["algorithm.beta=1"]) == RunConfig(model="m", algorithm=GRPOConfig(beta=1.0))
    file.write_text("model: {num_classes: 10}")
    assert isinstance(load(str(file), []), PretrainConfig)


def test_the_command_is_quoted_for_a_shell(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    said = command_line("train", "a b.yaml", ["train.optim.betas=[0.5, 0.6]"], tmp_path)
    assert said == f"varl train 'a b.yaml' --set 'train.optim.betas=[0.5, 0.6]' --out {tmp_path}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command_line("train", "r", None, tmp_path) == f"torchrun --nproc-per-node 4 -m varl.cli train r --out {tmp_path}"


def test_the_line_of_a_step():
    metrics = {"step": 3, "reward": 0.5, "rewards/ocr/word_accuracy/mean": 0.25, "images_per_second": 12.34, "seconds/total": 2.0}
    phases = {"seconds/rollout": 0.5, "seconds/decode": 0.1, "seconds/reward_wait": 0.0, "seconds/train": 1.0}
    assert training_line(metrics | phases) == "reward 0.500  words 25%  12.3 images/s  rollout 25% decode 5% reward 0% train 50%"
    assert training_line({"step": 1, "reward": None}) == ""
    assert measured_line({"step": 3, "pretrain/psnr": 21.234, "pretrain/loss": 0.5, "phase": "tokenizer"}) == "psnr 21.2  loss 0.5"
    assert measured_line({"step": 90.5, "total": 180, "pictures": 5600}) == "pictures 5,600"


def test_a_resumed_run_is_not_taken_for_a_fast_one(capfd):
    with Bar(100, measured_line, shown=True) as bar:
        bar.tick({"step": 90, "loss": 1.0})
        assert bar.task is not None
        task = bar.progress.tasks[0]
        assert (task.completed, task.total) == (90, 100)
        assert task.speed is None
    assert "step 90/100  loss 1" in capfd.readouterr().err


def test_a_quiet_bar_says_nothing(capfd):
    with Bar(3, measured_line, shown=False) as bar:
        bar.tick({"step": 1, "loss": 1.0})
    assert capfd.readouterr() == ("", "")


# ---- a run, from first to last ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that Ctrl-C stopped in its second step, and what was said."""
    folder = tmp_path_factory.mktemp("cli run")
    (folder / "mine.py").write_text(INTERRUPTING)
    file = write_config(folder)
    config = yaml.safe_load(file.read_text())
    config["rewards"] = {"bright": {"reward": {"kind": "python", "target": f"{folder}/mine.py:reward"}}}
    file.write_text(yaml.safe_dump(config))
    arguments = ["train", file, "--set", "train.steps=3", "--out", folder / "out", "--quiet"]
    assert status(*arguments) == 0
    return folder, arguments


def test_ctrl_c_saves_and_the_same_command_goes_on(made, capfd):
    folder, arguments = made
    out = folder / "out"
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert (out / "command.txt").read_text() == f"varl train '{folder}/run.yaml' --set train.steps=3 --out '{out}'\n"
    assert "To go on" not in capfd.readouterr().out
    assert status(*arguments) == 0
    said = capfd.readouterr().out
    assert "all 3 steps done; 3 steps, 24 pictures judged\n" in said
    assert f"model   {out}/model\n" in said
    assert f"report  {out}/report.html\n" in said
    assert "To go on" not in said
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_processes_share_a_step_and_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(WITNESSED)
    file = write_config(tmp_path)
    asked = ["train", file, "--set", "train.steps=1", "--set", "rewards.bright.reward.target=mine.py:reward", "--out", "out", "--quiet"]
    assert status(*asked, "--processes", 2) == 0
    assert len(set((tmp_path / "judges.txt").read_text().split())) == 2
    assert (tmp_path / "out/command.txt").read_text().endswith(" --out out --processes 2\n")


def test_a_probe_of_the_same_model_warns(tmp_path, capfd):
    """Beside the run, wherever it lies; one of another model says nothing."""
    base = save_tiny(tmp_path / "base")
    config = RunConfig(model=str(base), algorithm=GRPOConfig(panw_alpha=0.0))
    bounds = {"panw_alpha": 0.7, "panw_alpha_range": [0.6, 0.8], "num_generations": None}
    probe = {"model": model_identity(base), "recommend": bounds, "grids": [[1, 1], [1, 2], [2, 4]], "cost": {}}
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    warn_against_probes(config, tmp_path / "out", None)
    said = capfd.readouterr().err
    assert said.startswith("warning: panw_alpha")
    assert f"({tmp_path}/probe.json)" in said
    (tmp_path / "probe.json").write_text(json.dumps(probe | {"model": "another"}))
    warn_against_probes(config, tmp_path / "out", None)
    assert capfd.readouterr().err == ""
    with pytest.raises(ConfigError, match="is of another model than model="):
        warn_against_probes(config, tmp_path / "out", tmp_path / "probe.json")


def test_the_same_seed_draws_the_same_pictures(made, tmp_path, capfd):
    model = made[0] / "base"
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        wanted = ["--prompt", "CAT", "--prompt", "DOG", "--style", "mono,sea", "-n", 2, "--temperature", 0.9, "--top-k", 8]
        assert status("sample", model, *wanted, "--seed", seed, "--out", tmp_path / f"new/{name}.png") == 0
    a, b, c = ((tmp_path / f"new/{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert a.startswith(b"\x89PNG")
    assert capfd.readouterr().out.splitlines()[0] == str(tmp_path / "new/a.png")


def test_prompts_of_a_folder_and_the_model_of_a_run(made, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"text": "CAT"}\n{"text": "DOG"}\n')
    assert status("sample", made[0] / "out", "--prompts", tmp_path, "-n", 1, "--out", tmp_path / "x.png") == 0
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size[0] > 2 * 256


def test_evaluation_of_a_run_and_of_a_model(made, tmp_path, capfd):
    for target, file, out in (
        ("out", made[0] / "out/eval.json", ()),
        ("base", tmp_path / "new/x.json", ("--out", tmp_path / "new/x.json")),
    ):
        assert status("eval", "words", made[0] / target, "--samples", 4, "--temperatures", "1.0,0.5", *out) == 0
        found = json.loads(file.read_text())
        assert [row["temperature"] for row in found["rows"]] == [1.0, 0.5]
        assert all(0 <= row["word_accuracy"] <= 1 and row["failed"] == 0 for row in found["rows"])
        assert "word accuracy" in capfd.readouterr().out


# ---- a model of classes -----------------------------------------------------------------------------------------------------------------

JUDGE = """
import torch

class Judge(torch.nn.Module):
    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    def classify(self, features):
        return (10 * features).log_softmax(-1)

judge = Judge()
"""


@pytest.fixture(scope="module")
def raster(tmp_path_factory):
    """A model of classes in `model`, pictures in `real.npz`, a network to judge by in `judge.py`."""
    folder = tmp_path_factory.mktemp("raster")
    save_tiny(folder / "model", TINY_RASTER)
    noise = np.random.default_rng(0)
    np.savez(folder / "real.npz", arr_0=noise.integers(0, 256, (48, 12, 12, 3), dtype=np.uint8))
    (folder / "judge.py").write_text(JUDGE)
    return folder


def test_classes_are_drawn(raster, tmp_path):
    """By label, or as a folder asks for; guidance is one number, or one for each token."""
    (tmp_path / "prompts.jsonl").write_text('{"label": 4}\n{"label": 0}\n')
    asked = ["--label", 4, "--label", 0], ["--prompts", tmp_path], ["--label", 4, "--label", 0, "--cfg", "1,1,1,1,1,1,1,1,4"]
    for name, arguments in zip("abc", asked, strict=True):
        law = ["--temperature", 0.9, "--top-k", 12, "--top-p", 0.9, "--seed", 5, "-n", 8]
        assert status("sample", raster / "model", *arguments, *law, "--out", tmp_path / f"{name}.png") == 0
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "b.png") as two, Image.open(tmp_path / "c.png") as three:
        assert one == two
        assert one != three


def drawn_by_var(folder, out, *arguments):
    words = ["--prompt", "AB", "-n", 2, "--seed", 3]
    code = status("sample", folder, *words, *arguments, "--out", out)
    return Image.open(out).tobytes() if code == 0 else code


def test_vars_own_sampler(raster, tmp_path, capfd):
    """Its ramp is 1 + S i / (n - 1) at scale i of n; mixtures of codes are other pictures; no other model has them."""
    model = save_tiny(tmp_path / "var")
    ramp = drawn_by_var(model, tmp_path / "a.png", "--cfg", "var:3")
    assert ramp == drawn_by_var(model, tmp_path / "b.png", "--cfg", "1,2.5,4")
    assert ramp != drawn_by_var(model, tmp_path / "c.png", "--cfg", "var:3", "--more-smooth")
    for wrong, reason in (("var:1,2", "one number after var:"), ("3;4", "must be a number"), ("var:", "must be a number")):
        assert drawn_by_var(model, tmp_path / "d.png", "--cfg", wrong) == 2
        assert reason in capfd.readouterr().err
    for wrong in (["--cfg", "var:3"], ["--more-smooth"]):
        assert status("sample", raster / "model", "--label", 1, *wrong, "--out", tmp_path / "e.png") == 2
        assert {"--cfg": "For another model", "--more-smooth": "this model is none"}[wrong[0]] in capfd.readouterr().err


@pytest.mark.parametrize(
    ("option", "count", "says"),
    [
        ("--denoise-steps", 100_000, "unmasking.denoise_steps=100000: must be 1 to 1000"),
        ("--steps", 9, "9 steps for 8 tokens: every step settles a token or more"),
    ],
)
def test_steps_that_cannot_be_are_refused_before_a_weight_is_read(option, count, says, tmp_path, capfd):
    model = save_tiny(tmp_path / "mar", TINY_MAR)
    for file in model.glob("*.safetensors"):
        file.write_bytes(b"")
    assert status("sample", model, "--label", 0, option, count, "--out", tmp_path / "x.png") == 2
    assert says in capfd.readouterr().err


def compared(folder, *arguments):
    """The row of `varl eval fid`, and its whole JSON."""
    out = folder / "out/fid.json"
    judge = ["--features", f"{folder}/judge.py:judge", "--seed", 3, "--out", out, "--quiet"]
    assert status("eval", "fid", *arguments, *judge) == 0
    found = json.loads(out.read_text())
    return found["rows"][0], found


def test_pictures_of_a_model_against_real_ones(raster, capfd):
    """The numbers are those of the pictures that were kept, and those of the pictures alone."""
    drawn, told = compared(raster, raster / "model", raster / "real.npz", "--samples", 44, "--cfg", 2, "--batch", 16)
    said = capfd.readouterr().out
    assert all(name in said for name in ("fd ", "is ", "precision", "recall", "kid", "pictures", f"{raster}/out/fid.json"))
    file = raster / "out/fid-pictures/pictures.npz"
    assert told["pictures"] == str(file)
    assert (told["cfg_scale"], told["size"], told["dtype"], told["seed"]) == ([2.0], [12, 12], "float32", 3)
    judge = load_callable(f"{raster}/judge.py:judge").eval()  # type: ignore[attr-defined]
    want = compare_sets(file, raster / "real.npz", judge, 3)  # type: ignore[arg-type]
    assert drawn == want
    assert drawn["pictures"] == 44
    kept = file.read_bytes()
    again, _ = compared(raster, raster / "model", raster / "real.npz", "--samples", 44, "--cfg", 2, "--batch", 5)
    assert again == drawn
    assert file.read_bytes() == kept
    alone, told = compared(raster, file, raster / "real.npz")
    assert alone == drawn
    assert "cfg_scale" not in told
    capfd.readouterr()
    command = ["eval", "fid", raster / "model", raster / "real.npz", "--samples", 44, "--features", f"{raster}/judge.py:judge", "--seed", 3]
    assert status(*command, "--out", raster / "out/fid.json", "--quiet") == 2
    assert "holds pictures that were drawn otherwise: cfg_scale was [2.0], is [1.0]." in capfd.readouterr().err


def test_a_classifier_judges(raster, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Classifier(ClassifierConfig(num_classes=5, image_size=(12, 12), widths=(4, 8))).eval()
    model_folder.save_classifier(tmp_path / "judge", judge, {})
    arguments = ["eval", "fid", raster / "real.npz", raster / "real.npz", "--features", tmp_path / "judge", "--out", tmp_path / "x.json"]
    assert status(*arguments, "--quiet") == 0
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [compare_sets(raster / "real.npz", raster / "real.npz", judge, 1234)]


def test_pictures_of_a_run_against_real_ones(made, tmp_path, capfd):
    """A model that reads is asked for the prompts of a folder; pictures are brought to the size asked for, features kept."""
    (tmp_path / "prompts.jsonl").write_text('{"text": "CAT"}\n{"text": "DOG"}\n')
    (tmp_path / "judge.py").write_text(JUDGE)
    np.savez(tmp_path / "real.npz", arr_0=np.full((40, 16, 32, 3), 128, np.uint8))
    judge = ["--features", f"{tmp_path}/judge.py:judge", "--cache", tmp_path / "cache"]
    arguments = [made[0] / "out", tmp_path / "real.npz", "--prompts", tmp_path, "--samples", 40, "--dtype", "bfloat16", *judge]
    assert status("eval", "fid", *arguments) == 0
    assert json.loads((made[0] / "out/fid.json").read_text())["rows"][0]["fd"] > 0
    assert len(list((tmp_path / "cache").iterdir())) == 2
    said = capfd.readouterr()
    assert said.out.endswith("/out/fid.json\n")


def test_reports(made, capfd):
    out = made[0] / "out"
    assert status("report", out) == 0
    assert capfd.readouterr().out == f"{out}/report.html\n"
    assert status("compare", out, out) == 0
    assert "The configurations agree." in capfd.readouterr().out
    assert (made[0] / "compare.html").is_file()


def test_plan_says_what_is_missing(made, capfd):
    assert status("plan", made[0] / "run.yaml") == 0
    assert "nothing is missing" in capfd.readouterr().out
    assert status("plan", made[0] / "run.yaml", "--set", "model=nowhere") == 2
    assert capfd.readouterr().out.startswith("problem     model='nowhere'")


def test_parity_without_a_case_fails(tmp_path):
    assert status("parity", tmp_path) == 1


def test_a_single_prompt_has_no_interval():
    assert [with_interval(0.5, 0.0123), with_interval(0.5, math.nan)] == ["0.5 ± 0.012", "0.5"]
