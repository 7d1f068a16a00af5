"""Two processes are one: the same pictures, rewards and weights, whoever drew them."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import toy_run
from varl.errors import VarlError
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


def test_processes_of_one_machine_need_no_torchrun_and_are_one_too(home):
    config = toy_run.config(home, steps=2, prompts_per_step=3, image_every=0)
    alone, both = home / "alone", home / "side-by-side"
    train(config, alone)
    outcome = train(config, both, processes=2)
    assert (outcome.done, outcome.progress.reward_calls) == (True, 24)
    weights = load_file(alone / "model" / "model.safetensors")
    torch.testing.assert_close(load_file(both / "model" / "model.safetensors"), weights, rtol=0, atol=1e-5)
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_ends_the_run_with_its_number(home, tmp_path, monkeypatch):
    def strike(value):
        for other in multiprocessing.active_children():
            other.kill()

    monkeypatch.setattr(toy_run, "LISTENERS", [strike])
    with pytest.raises(VarlError, match="process 1 of this run ended early"):
        train(toy_run.config(home, image_every=0), tmp_path / "run", processes=2)
    assert multiprocessing.active_children() == []


def test_when_the_first_process_is_killed_the_others_end_by_themselves(home, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_RUN", str(tmp_path))
    config = toy_run.config(home, image_every=0)
    where = (to_yaml(config), tmp_path / "run", "in step 4, weights moved", 2)
    first = multiprocessing.get_context("spawn").Process(target=toy_run.run_and_die, args=where)
    first.start()
    first.join(120)
    assert first.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while (left := named(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    monkeypatch.delenv("TOY_RUN")
    assert train(config, tmp_path / "run").done  # in as many processes as one likes


def named(value: str) -> list[str]:
    """Processes with TOY_RUN=`value` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"TOY_RUN={value}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
    return found


def test_more_ranks_than_prompts_is_an_error_before_anything_is_loaded(home):
    config = replace(toy_run.config(home, prompts_per_step=1), model=str(home / "no such model"))
    done = torchrun(config, home / "none")
    assert done.returncode != 0
    assert "train.prompts_per_step=1: 2 processes would share them" in done.stderr
    assert not (home / "none").exists()
