"""Two processes are one: the same pictures, rewards and weights, whoever drew them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import toy_run
from varl.run import train
from varl.settings import to_yaml

WORKER = Path(toy_run.__file__)


def torchrun(config, out: Path) -> subprocess.CompletedProcess:
    file = out.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), str(file), str(out)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    toy_run.make(folder)
    return folder


@pytest.mark.parametrize("name", ["grpo", pytest.param("var_rl", marks=pytest.mark.slow)])
def test_two_ranks_are_one(home, name):
    # three prompts: one rank has one of them, the other two
    config = toy_run.config(home, name, steps=2 if name == "grpo" else 3, prompts_per_step=3, image_every=2)
    alone, both = home / f"{name}-alone", home / f"{name}-both"
    train(config, alone)
    done = torchrun(config, both)
    assert done.returncode == 0, done.stderr[-4000:]

    one, two = toy_run.metrics(alone), toy_run.metrics(both)
    assert len(one) == len(two) == config.train.steps
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert {k: v for k, v in a.items() if isinstance(v, int | str)} == {k: v for k, v in b.items() if isinstance(v, int | str)}
        for metric, value in a.items():
            if isinstance(value, float):
                assert b[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    weights, base = load_file(alone / "model" / "model.safetensors"), load_file(home / "base" / "model.safetensors")
    assert max(float((tensor - base[name]).abs().max()) for name, tensor in weights.items()) > 1e-4
    torch.testing.assert_close(load_file(both / "model" / "model.safetensors"), weights, rtol=0, atol=1e-5)
    for picture in (alone / "pictures").rglob("step-000000/*.png"):
        assert picture.read_bytes() == (both / picture.relative_to(alone)).read_bytes()
    stops = [line for line in (both / "events.jsonl").read_text().splitlines() if "stop" in line]
    assert len(stops) == 1


def test_more_ranks_than_prompts_is_an_error_before_anything_is_loaded(home):
    config = replace(toy_run.config(home, prompts_per_step=1), model=str(home / "no such model"))
    done = torchrun(config, home / "none")
    assert done.returncode != 0
    assert "train.prompts_per_step=1: 2 processes would share them" in done.stderr
    assert not (home / "none").exists()
