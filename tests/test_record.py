import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from varl.config import GRPOConfig, NextScaleConfig, OptimConfig, PretrainConfig, RunConfig, TextConfig, TrainConfig
from varl.errors import ConfigError
from varl.settings import from_yaml, override
from varl.train.record import METRICS, RunDirectory, definition, picture_grid, save_picture

CONFIG = RunConfig(model="m", algorithm=GRPOConfig())


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run.path / name).read_text().splitlines()]


def test_config_is_written_first_and_reads_back(tmp_path):
    run = RunDirectory(tmp_path / "a" / "b", CONFIG)
    assert from_yaml((run.path / "config.yaml").read_text()) == CONFIG
    run.close()


def test_metrics_are_lines_on_disk_at_once_and_what_is_not_finite_is_null(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.write(1, {"step": 1, "reward": 0.1 + 0.2, "kl": float("nan"), "grad_norm": float("inf"), "stage": "prefix", "tokens_trained": 3})
    run.write(2, {"rewards/ocr/mean": -1.0, "entropy/step_0": 0.5})
    assert lines(run) == [
        {"step": 1, "reward": 0.1 + 0.2, "kl": None, "grad_norm": None, "stage": "prefix", "tokens_trained": 3},
        {"step": 2, "rewards/ocr/mean": -1.0, "entropy/step_0": 0.5},
    ]
    with pytest.raises(KeyError, match="'rewrad' has no definition"):
        run.write(3, {"rewrad": 1.0})
    assert len(lines(run)) == 2
    run.close()


def test_resume_forgets_later_steps_and_torn_lines_and_goes_on(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    for step in range(6):
        run.write(step, {"reward": float(step)})
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 2, "rew')

    run = RunDirectory(tmp_path, CONFIG)
    run.truncate(3)
    run.write(4, {"reward": 40.0})
    run.close()
    assert [(line["step"], line["reward"]) for line in lines(run)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_has_the_finite_scalars(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    run = RunDirectory(tmp_path, CONFIG)
    run.truncate(0)
    run.write(1, {"reward": 0.25, "kl": float("nan"), "stage": "all"})
    run.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    values = [(event.step, value.tag) for event in loader.EventFileLoader(str(file)).Load() for value in event.summary.value]
    assert values == [(1, "reward")]


def begin(path: Path) -> None:
    """A run that was stopped after its first step."""
    run = RunDirectory(path, CONFIG)
    run.truncate(0)
    run.write(1, {"reward": 1.0})
    run.close()


def test_another_config_is_refused_with_the_difference(tmp_path):
    begin(tmp_path)
    with pytest.raises(ConfigError) as caught:
        RunDirectory(tmp_path, override(CONFIG, ["algorithm.beta=0.1", "train.steps=7", "seed=3"]))
    assert str(caught.value) == (
        f"{tmp_path} holds a run with other settings:\n  algorithm.beta: 0.0 -> 0.1\n  seed: 0 -> 3\n"
        "Give another --out, or the same settings to go on."
    )
    assert from_yaml((tmp_path / "config.yaml").read_text()) == CONFIG
    RunDirectory(tmp_path, CONFIG).close()


@pytest.mark.parametrize("left", ["nothing", "a checkpoint"])
def test_a_run_that_came_to_no_step_may_be_begun_with_another_config(tmp_path, left):
    RunDirectory(tmp_path, CONFIG).close()
    other = override(CONFIG, ["seed=3"])
    if left == "a checkpoint":  # stopped before the first step
        (tmp_path / "checkpoints" / "step-000000").mkdir(parents=True)
        with pytest.raises(ConfigError, match="seed: 0 -> 3"):
            RunDirectory(tmp_path, other)
    else:
        RunDirectory(tmp_path, other).close()
        assert from_yaml((tmp_path / "config.yaml").read_text()) == other


def test_what_may_change_is_taken_over(tmp_path):
    begin(tmp_path)
    longer = dataclasses.replace(CONFIG, train=TrainConfig(steps=7, max_seconds=5.0, save_every=1, image_every=2, keep=9))
    RunDirectory(tmp_path, longer).close()
    assert from_yaml((tmp_path / "config.yaml").read_text()) == longer
    with pytest.raises(ConfigError, match=r"train\.optim\.lr: 0\.0001 -> 0\.1"):
        RunDirectory(tmp_path, dataclasses.replace(longer, train=TrainConfig(optim=OptimConfig(lr=0.1))))


def test_one_picture_is_saved_to_the_pixel(tmp_path):
    image = torch.tensor([[[0.0, 1.0]], [[0.2, 0.5]], [[-1.0, 2.0]]])
    save_picture(tmp_path / "a" / "00.png", image)
    with Image.open(tmp_path / "a" / "00.png") as got:
        assert (got.size, got.getpixel((0, 0)), got.getpixel((1, 0))) == ((2, 1), (0, 51, 0), (255, 128, 255))


def test_other_ranks_are_silent_but_know_the_metrics(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG, writer=False)
    run.truncate(0)
    run.write(1, {"reward": 1.0})
    run.event("stop", "x")
    run.images(1, torch.zeros(1, 3, 2, 2), ["a"])
    run.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError):
        run.write(2, {"rewrad": 1.0})


def test_a_run_of_another_kind_is_refused(tmp_path):
    begin(tmp_path / "run")
    with pytest.raises(ConfigError, match="unknown key"):
        RunDirectory(tmp_path / "run", PretrainConfig(model=NextScaleConfig(text=TextConfig())))


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(tmp_path):
    script = """
import sys, time
from varl.config import RunConfig, GRPOConfig
from varl.train.record import RunDirectory
run = RunDirectory(sys.argv[1], RunConfig(model="m", algorithm=GRPOConfig()))
print("open", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match=f"is in use by process {child.pid}. Wait for it, stop it, or give another --out."):
            RunDirectory(tmp_path, CONFIG)
        child.kill()
    run = RunDirectory(tmp_path, CONFIG)
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    run.close()


def test_events(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    run.truncate(3)
    run.event("refused", "checkpoint step-000003: Ä")
    run.write(4, {"reward": 1.0})
    run.event("stop", "asked to stop")
    run.close()
    assert [(line["step"], line["kind"], line["message"]) for line in lines(run, "events.jsonl")] == [
        (3, "refused", "checkpoint step-000003: Ä"),
        (4, "stop", "asked to stop"),
    ]


def test_pictures_are_enlarged_without_blur_and_captioned():
    images = torch.zeros(5, 3, 16, 64)
    images[:, 0] = 1.0
    images[0, :, 0, 0] = torch.tensor([0.0, 0.5, 1.0])
    sheet = picture_grid(images, ["CAT", "", "", "", "a caption much longer than its picture, which is cut so that it does not run on"])
    assert sheet.size == (4 * 264 + 8, 2 * (64 + 18 + 8) + 8)
    assert {sheet.getpixel((8 + x, 8 + y)) for x in range(4) for y in range(4)} == {(0, 128, 255)}
    assert sheet.getpixel((12, 8)) == (255, 0, 0)
    under_first = sheet.crop((8, 72, 264, 90)).convert("L")
    under_second = sheet.crop((272, 72, 528, 90)).convert("L")
    assert under_first.getextrema()[0] < 128
    assert under_second.getextrema() == (255, 255)
    assert sheet.crop((264, 98, 272, 188)).convert("L").getextrema() == (255, 255)


def test_a_large_picture_is_not_enlarged(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    run.images(10, torch.rand(2, 3, 300, 300), ["a", "b"])
    run.close()
    with Image.open(tmp_path / "images" / "step-000010.png") as sheet:
        assert sheet.size == (2 * 308 + 8, 300 + 18 + 8 + 8)


def test_definitions_name_a_unit_or_a_share_and_patterns_reach_their_names():
    assert definition("rewards/my.own/mean") == METRICS["rewards/*/mean"]
    assert definition("pretrain/psnr") == METRICS["pretrain/psnr"]
    assert definition("pretrain/tokenizer_loss") == METRICS["pretrain/*"]
    with pytest.raises(KeyError):
        definition("reward/")
