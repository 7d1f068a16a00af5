import copy
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from varl.checkpoints.folder import load_config, load_tensors, save_model, strict_load
from varl.checkpoints.run_state import load, load_latest, save
from varl.config import OptimConfig
from varl.errors import CheckpointError
from varl.train.ema import EMA
from varl.train.optim import build_optimizer


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def saved(folder, *steps, keep=9):
    for step in steps:
        save(folder, step, {"model": {"w": torch.full((1000,), float(step))}}, {"at": step}, keep=keep)


def flip_last_byte(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def same(a, b) -> bool:
    """Equal in structure, type and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        x, y = (t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and x.equal(y)
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(x) is type(y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def test_nested_state_comes_back_bit_for_bit(tmp_path):
    state = {
        "flat": {"blocks.0.w": torch.randn(3, 4), "steps": torch.tensor(7)},
        "nested": {
            "state": {0: {"m": torch.randn(2, dtype=torch.float64)}, 10: {}, "x": {"half": torch.randn(3).bfloat16()}},
            "laid": [torch.randn(3, 2).T, torch.randn(0, 3), torch.tensor([True]), torch.arange(9, dtype=torch.int16)[::2]],
            "groups": [{"params": [0, 1], "betas": (0.9, 1 / 3), "lr": 1e-300, "on": True, "none": None, "inf": math.inf, "tensor": "no"}],
            "empty": ((), [], {}),
        },
    }
    extra = {"seconds": 0.1 + 0.2, "controllers": {"middle_step": [1, 2]}, "tracker": None, "worst": -math.inf}
    path = save(tmp_path, 3, state, extra)
    got = load(path)
    assert same(got.tensors, state)
    assert (got.step, got.extra, got.path, got.refused) == (3, extra, path, ())
    assert names(path) == ["flat.safetensors", "manifest.json", "nested.safetensors", "state.json"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_resumes_bit_identically_from_disk(tmp_path, name):
    def start():
        torch.manual_seed(0)
        model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 6)]), "head": nn.Linear(6, 1)})
        return model, build_optimizer(model, OptimConfig(name=name, lr=1e-2)), EMA(model, 0.9)

    def go(model, optimizer, ema, steps):
        for step in steps:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            model["head"](model["blocks"][0](x).tanh()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)

    model, optimizer, ema = start()
    go(model, optimizer, ema, range(4))
    save(tmp_path, 4, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}, {})
    go(model, optimizer, ema, range(4, 9))

    again, optimizer_again, ema_again = start()
    state = load_latest(tmp_path)
    assert state is not None
    again.load_state_dict(state.tensors["model"])
    optimizer_again.load_state_dict(state.tensors["optimizer"])
    ema_again.load_state_dict(state.tensors["ema"])
    go(again, optimizer_again, ema_again, range(4, 9))
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    assert same(ema_again.state_dict(), ema.state_dict())
    assert same(optimizer_again.state_dict(), optimizer.state_dict())


def test_newest_is_the_highest_step_and_old_ones_go(tmp_path):
    saved(tmp_path, 5, 20, 999_999, 1_000_000, keep=3)
    assert names(tmp_path) == ["step-000020", "step-1000000", "step-999999"]
    state = load_latest(tmp_path)
    assert state is not None
    assert (state.step, state.extra) == (1_000_000, {"at": 1_000_000})
    saved(tmp_path, 1_000_001, keep=1)
    assert names(tmp_path) == ["step-1000001"]


def test_nothing_saved_yet(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("harm", ["bit", "truncate", "manifest", "manifest's key", "manifest's shape", "missing"])
def test_a_damaged_newest_is_refused_by_name_and_the_last_good_one_used(tmp_path, harm, caplog):
    saved(tmp_path, 1, 2, 3)
    newest = tmp_path / "step-000003"
    match harm:
        case "bit":
            flip_last_byte(newest / "model.safetensors")
        case "truncate":
            os.truncate(newest / "model.safetensors", 100)
        case "manifest":
            (newest / "manifest.json").write_text("{")
        case "manifest's key":
            manifest = newest / "manifest.json"
            manifest.write_text(manifest.read_text().replace("sha256", "sha25v", 1))
        case "manifest's shape":
            (newest / "manifest.json").write_text("[1, 2]")
        case "missing":
            (newest / "state.json").unlink()
    with caplog.at_level(logging.WARNING, "varl"):
        state = load_latest(tmp_path)
    assert state is not None
    assert state.step == 2
    assert state.tensors["model"]["w"].eq(2).all()
    assert len(caplog.records) == 1
    assert "step-000003 is damaged and not used" in caplog.text
    assert [line.split(":")[0] for line in state.refused] == ["step-000003"]
    with pytest.raises(CheckpointError, match="step-000003 is damaged: "):
        load(newest)


def test_a_later_step_that_was_refused_does_not_outlive_the_next_save(tmp_path):
    saved(tmp_path, 10, 20)
    flip_last_byte(tmp_path / "step-000020" / "model.safetensors")
    saved(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-000015"]
    saved(tmp_path, 20)
    flip_last_byte(tmp_path / "step-000020" / "model.safetensors")
    saved(tmp_path, 20)
    state = load_latest(tmp_path)
    assert state is not None
    assert state.step == 20


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    saved(tmp_path, 1, 2)
    for path in tmp_path.iterdir():
        flip_last_byte(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged\.(.|\n)*step-000002: model(.|\n)*step-000001: model"):
        load_latest(tmp_path)


def test_kill_in_the_middle_of_a_save_leaves_the_previous_checkpoint(tmp_path):
    saved(tmp_path, 1)
    script = """
import sys, torch
from varl.checkpoints.run_state import save
save(sys.argv[1], 2, {f"part{i}": {"w": torch.zeros(2_000_000)} for i in range(40)}, {})
"""
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("step-000002.tmp-*/part1.safetensors")):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert names(tmp_path) == ["step-000001", f"step-000002.tmp-{child.pid}"]
    state = load_latest(tmp_path)
    assert state is not None
    assert state.tensors["model"]["w"].eq(1).all()
    assert names(tmp_path) == ["step-000001"]


def test_a_full_disk_leaves_earlier_checkpoints_whole_and_says_what_is_missing(tmp_path):
    saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 2, {"model": {"a": torch.zeros(200_000), "b": torch.zeros(200_000)}}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/step-000002: cannot be written (File too large). It needs 1,600,")
    assert f"are free in {tmp_path}. What was saved before is whole. Make room there" in message
    assert names(tmp_path) == ["step-000001"]
    state = load_latest(tmp_path)
    assert state is not None
    assert state.step == 1


def test_what_a_dead_process_left_of_the_same_folder_is_cleared_by_the_next_save(tmp_path):
    """One that was killed between its renames, and had the process id that this one has: so it is in a container that starts again."""
    whole, dead = tmp_path / "model", os.getpid()
    save_model(whole, "first", {}, {})
    whole.rename(tmp_path / f"model.old-{dead}")
    for other in (f"model.tmp-{dead}", f"model.ema.tmp-{dead}", "model.tmp-1"):
        (tmp_path / other).mkdir()
    save_model(whole, "second", {}, {})
    assert load_config(whole) == "second"
    assert names(tmp_path) == ["model", f"model.ema.tmp-{dead}", "model.tmp-1"], "another folder's, and that of a process that lives"


def test_a_full_disk_leaves_a_model_folder_as_it_was(tmp_path, monkeypatch):
    path = save_model(tmp_path / "model", "first", {"model": {"w": torch.ones(3)}}, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        save_model(path, "second", {"model": {"w": torch.zeros(3)}}, {})
    assert names(tmp_path) == ["model"]
    assert load_config(path) == "first"
    assert load_tensors(path, "model")["w"].tolist() == [1, 1, 1]


def test_weights_that_fit_nowhere_are_listed_in_part():
    """At the largest size the nearest name of every other would be searched for minutes."""
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(20))
    with pytest.raises(CheckpointError) as caught:
        strict_load(model, {f"module.{name}": tensor for name, tensor in model.state_dict().items()}, "x.pth")
    message = str(caught.value)
    assert message.startswith("x.pth: the weights do not fit ModuleList.\n  missing (40):\n    `0.weight` (nearest on the other")
    assert message.count("nearest") == 16
    assert message.count("... and 32 more") == 2


def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="a/0: a set cannot be saved"):
        save(tmp_path, 1, {"model": {"a": [{1}]}}, {})
    with pytest.raises(ValueError, match="both be called '0'"):
        save(tmp_path, 1, {"model": {0: torch.ones(1), "0": torch.ones(1)}}, {})
    assert names(tmp_path) == []


# ---- the moving average ---------------------------------------------------------------------------------------------------------------


def test_average_by_hand():
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    nn.init.constant_(model.weight, 0.0)
    ema = EMA(model, 0.75)
    for want in (0.25, 0.4375):
        nn.init.constant_(model.weight, 1.0)
        ema.update(model)
        assert ema.state_dict().keys() == {"weight"}
        assert ema.state_dict()["weight"].item() == want


def test_swap_gives_the_own_weights_back_even_after_an_error():
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    nn.init.constant_(model.weight, 3.0)
    average, own = copy.deepcopy(ema.state_dict()), copy.deepcopy(model.state_dict())

    def draw():
        with ema.swapped(model):
            assert torch.equal(model.weight, average["weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    assert same(dict(model.state_dict()), dict(own))
    assert same(ema.state_dict(), average)


def test_average_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match="other parameters: bias"):
        EMA(nn.Linear(2, 2), 0.5).load_state_dict({"weight": torch.ones(2, 2)})


def test_a_folder_of_somebody_else_is_not_replaced_by_a_model(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is there already, and VARL did not write it \(it has no manifest\.json\)"):
        save_model(tmp_path, "first", {}, {})
    assert (tmp_path / "prompts.jsonl").read_text() == "mine"
