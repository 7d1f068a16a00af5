import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tiny import status
from varl.data.fonts import load_font
from varl.doctor import ENGINES, Finding, disk, engine, examine, fonts, torchvision, writable
from varl.rewards.ocr import find_tessdata


def test_a_finding_is_a_line():
    assert str(Finding(name="disk", verdict="ok", text="9 GB free")) == "ok    disk         9 GB free"
    assert str(Finding(name="disk", verdict="fail", text="full", fix="make room")) == "fail  disk         full -> make room"


def test_everything_is_looked_at_once(tmp_path):
    found = list(examine(tmp_path))
    names = ["python", "torch", "torchvision", "fonts", "word list", *ENGINES, "disk", "runs", "distributed"]
    assert [finding.name for finding in found] == names
    assert all(finding.fix or finding.verdict == "ok" or finding.name in ("fonts", "word list", *ENGINES) for finding in found)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_reads_a_drawn_word(name):
    there = find_spec("tesserocr") and find_tessdata() if name == "tesseract" else find_spec("rapidocr") and find_spec("onnxruntime")
    finding = engine(name)
    assert finding.verdict == ("ok" if there else "warn")
    assert "ms a picture" in finding.text or not there


def test_an_engine_that_is_not_there():
    assert engine("nothing").verdict == "warn"
    assert "engine 'nothing': unknown" in engine("nothing").text


def test_an_engine_that_is_broken_is_a_finding(monkeypatch):
    monkeypatch.setattr("varl.doctor.open_engine", lambda name: {}[name])
    assert str(engine("tesseract")) == "warn  tesseract    KeyError: 'tesseract'"


def test_fonts_without_their_package(monkeypatch):
    monkeypatch.setattr("varl.data.fonts.find_spec", lambda name: None)
    load_font.cache_clear()
    finding = fonts()
    assert finding.verdict == "fail"
    assert "pip install 'varl[words]'" in finding.text


@pytest.mark.parametrize(
    ("source", "verdict", "text"),
    [
        ("class ops:\n    nms = 1\n", "ok", "can be imported"),
        ("raise RuntimeError('operator torchvision::nms does not exist')\n", "warn", "operator torchvision::nms does not exist"),
    ],
)
def test_torchvision_whole_and_broken(tmp_path, monkeypatch, source, verdict, text):
    (tmp_path / "torchvision.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = torchvision()
    assert finding.verdict == verdict
    assert text in finding.text


@pytest.mark.parametrize(("free", "verdict"), [(4e8, "fail"), (4e9, "warn"), (6e9, "ok")])
def test_disk(tmp_path, monkeypatch, free, verdict):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - int(free), int(free)))
    assert disk(tmp_path / "runs/x").verdict == verdict
    assert f"{free / 1e9:.1f} GB free in {tmp_path}" in disk(tmp_path / "runs/x").text


def test_a_place_that_can_be_written_and_one_that_cannot(tmp_path):
    assert writable(tmp_path / "a/b").verdict == "ok"
    assert list(tmp_path.iterdir()) == []
    assert writable(Path("/proc/runs")).verdict == "fail"


def test_the_command_fails_where_something_does(capfd):
    assert status("doctor", "--out", "/proc/runs") == 1
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 10
    assert [line for line in lines if line.startswith("fail")] == [
        line for line in lines if line.startswith("fail  runs         /proc cannot be written") or line.split()[1] == "disk"
    ]
