import hashlib
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from varl.checkpoints.folder import (
    load_config,
    load_notes,
    load_tensors,
    read_tensors,
    remove_leftovers,
    save_model,
    strict_load,
    write_tensors,
)
from varl.errors import CheckpointError


def every_dtype() -> dict[str, torch.Tensor]:
    base = torch.arange(6).reshape(2, 3)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    tensors = {str(dtype): base.to(dtype) for dtype in dtypes}
    return {"flags": base > 2, "scalar": torch.tensor(0.1), "none": torch.empty(0, 4), "strided": torch.randn(4, 6).T[::2], **tensors}


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_tensors_come_back_bit_for_bit_and_others_can_read_them(tmp_path):
    tensors = every_dtype() | {"odd": torch.tensor([float("nan"), float("inf"), -0.0])}
    write_tensors(tmp_path / "x.safetensors", tensors)
    for read in (read_tensors, load_file):
        got = read(tmp_path / "x.safetensors")
        assert got.keys() == tensors.keys()
        for name, want in tensors.items():
            assert got[name].dtype == want.dtype
            assert got[name].shape == want.shape
            assert got[name].contiguous().reshape(-1).view(torch.uint8).equal(want.contiguous().reshape(-1).view(torch.uint8))


def test_model_folder_round_trip_and_replacement(tmp_path):
    for bias in (1.0, 2.0):
        path = save_model(tmp_path / "base", "depth: 3\n", {"model": {"b": torch.tensor([bias])}, "tokenizer": {}}, {"loss": bias})
        assert load_config(path) == "depth: 3\n"
        assert load_notes(path) == {"loss": bias}
        assert load_tensors(path, "model")["b"].tolist() == [bias]
        assert load_tensors(path, "tokenizer") == {}
        assert {file.name for file in path.iterdir()} == {
            "config.yaml",
            "manifest.json",
            "model.safetensors",
            "notes.json",
            "tokenizer.safetensors",
        }
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_damage_is_named(tmp_path):
    path = save_model(tmp_path / "base", "", {"model": {"w": torch.ones(100)}}, {})
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"base: model\.safetensors is not what was written"):
        load_tensors(path, "model")
    file.write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match=rf"has {len(whole) - 40} bytes where {len(whole)} were written"):
        load_tensors(path, "model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors is missing"):
        load_tensors(path, "tokenizer")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        load_tensors(tmp_path / "nowhere", "model")
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="as safetensors"):
        read_tensors(file)


def test_a_failed_replacement_leaves_the_old_folder(tmp_path):
    save_model(tmp_path / "base", "", {"model": {"w": torch.ones(10)}}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"File too large\)\. It needs 400,002 bytes"):
            save_model(tmp_path / "base", "", {"model": {"w": torch.ones(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]
    assert load_tensors(tmp_path / "base", "model")["w"].tolist() == [1.0] * 10


def test_leftovers_of_the_dead_are_removed_and_what_they_put_aside_is_put_back(tmp_path):
    dead = dead_pid()
    save_model(tmp_path / "base", "aside", {}, {}).rename(tmp_path / f"base.old-{dead}")
    for name in (f"base.tmp-{dead}", f"other.tmp-{os.getppid()}", f"mine.tmp-{os.getpid()}", "v1.2-alpha"):
        (tmp_path / name).mkdir()
    assert remove_leftovers(tmp_path) == [f"base.old-{dead}", f"base.tmp-{dead}", f"mine.tmp-{os.getpid()}"]
    assert load_config(tmp_path / "base") == "aside"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", f"other.tmp-{os.getppid()}", "v1.2-alpha"]


def test_manifest_is_plain_json(tmp_path):
    path = save_model(tmp_path / "base", "a: 1\n", {}, {})
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["config.yaml"] == {"sha256": hashlib.sha256(b"a: 1\n").hexdigest(), "bytes": 5}
    assert manifest.keys() == {"config.yaml", "notes.json"}


def test_strict_load_fills_or_says_why_not():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    want = {name: torch.full_like(value, 0.5) for name, value in module.state_dict().items()}
    strict_load(module, want, "a.safetensors")
    assert all(value.eq(0.5).all() for value in module.state_dict().values())

    wrong = dict(want) | {"0.weight": torch.zeros(5, 2), "extra": torch.zeros(1)}
    wrong["1.weights"] = wrong.pop("1.weight")
    with pytest.raises(CheckpointError) as caught:
        strict_load(module, wrong, "a.safetensors")
    assert str(caught.value).splitlines()[:-1] == [
        "a.safetensors: the weights do not fit Sequential.",
        "  missing (1):",
        "    `1.weight` (nearest on the other side: `1.weights`)",
        "  unexpected (2):",
        "    `extra`",
        "    `1.weights` (nearest on the other side: `1.weight`)",
        "  of another shape (1):",
        "    `0.weight` [5, 2], the model has [3, 2]",
    ]


def test_a_long_difference_is_cut():
    with pytest.raises(CheckpointError, match=r"unexpected \(20\)(.|\n)*and 12 more"):
        strict_load(nn.Sequential(), {f"x{i}": torch.zeros(1) for i in range(20)}, "a")
