"""Is this machine ready? One finding for each thing that a run needs."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from varl.config import WordsConfig
from varl.data.fonts import FACES, load_font
from varl.data.words import render, split, word_list
from varl.errors import VarlError
from varl.rewards.ocr import open_engine

ENGINES = ("tesseract", "rapidocr")
WORD = "VARL"
PICTURES = 8
"""Pictures that each engine reads."""
SCARCE, NONE_LEFT = 5e9, 5e8
"""Bytes free on the disk under which to warn, and to fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    name: str
    verdict: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<5} {self.name:<12} {self.text}{' -> ' if self.fix else ''}{self.fix}"


def examine(out: Path) -> Iterator[Finding]:
    """Findings, as they are made. `out` is where run directories shall lie."""
    yield python()
    yield torch_()
    yield torchvision()
    yield fonts()
    yield words()
    engines = [engine(name) for name in ENGINES]
    if any(finding.verdict == "ok" for finding in engines):
        yield from engines
    else:
        yield from (Finding(name=f.name, verdict="fail", text=f.text, fix=f.fix) for f in engines)
    yield disk(out)
    yield writable(out)
    yield gloo()


def python() -> Finding:
    return Finding(name="python", verdict="ok", text=f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def torch_() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "no CUDA device"
    text = f"{torch.__version__}, {torch.get_num_threads()} threads on {cores} cores, {gpus}"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= (2, 8):
        return Finding(name="torch", verdict="ok", text=text)
    return Finding(name="torch", verdict="fail", text=text, fix="pip install 'torch>=2.8'")


def torchvision() -> Finding:
    """VARL does not use it, but other packages import it where it is installed, and fail with it where it is made for another torch."""
    if find_spec("torchvision") is None:
        return Finding(name="torchvision", verdict="ok", text="not installed, not needed")
    done = subprocess.run([sys.executable, "-c", "import torchvision; torchvision.ops.nms"], capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return Finding(name="torchvision", verdict="ok", text="installed, can be imported")
    last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return Finding(
        name="torchvision",
        verdict="warn",
        text=f"installed, cannot be imported ({last})",
        fix="pip uninstall torchvision, or install the one made for this torch",
    )


def fonts() -> Finding:
    return _from(lambda: f"{len([load_font(name, 12) for name in FACES])} bundled faces", "fonts", "fail")


def words() -> Finding:
    def found() -> str:
        parts = split(word_list(WordsConfig()), WordsConfig())
        return f"{len(parts.pretrain)} to pre-train, {len(parts.rl)} for RL, {len(parts.heldout)} held out"

    return _from(found, "word list", "fail")


def engine(name: str) -> Finding:
    """Whether an OCR engine reads a drawn word, and how fast. One engine is enough, so a missing one is a warning."""

    def reads() -> str:
        picture, prompt = render([WORD], "sans", "ink", (16, 64))
        pictures = np.stack([picture] * PICTURES)
        boxes = [[region.box for region in prompt.regions if region.box is not None]] * PICTURES
        reader = open_engine(name)
        reader.read_batch(pictures[:1], boxes[:1])
        start = time.perf_counter()
        readings = reader.read_batch(pictures, boxes)
        each = (time.perf_counter() - start) / PICTURES
        seen = readings[0][0].text
        if seen != WORD:
            raise VarlError(f"reads {seen!r} where {WORD!r} is drawn. Install another version of the engine or of its language data.")
        return f"reads a drawn word, {each * 1000:.1f} ms a picture"

    return _from(reads, name, "warn")


def disk(out: Path) -> Finding:
    place = _standing(out)
    free = shutil.disk_usage(place).free
    verdict = "fail" if free < NONE_LEFT else "warn" if free < SCARCE else "ok"
    fix = "" if verdict == "ok" else "make room, or give another --out"
    return Finding(name="disk", verdict=verdict, text=f"{free / 1e9:.1f} GB free in {place}", fix=fix)


def writable(out: Path) -> Finding:
    place = _standing(out)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding(name="runs", verdict="ok", text=f"{place} can be written")
    except OSError as error:
        text = f"{place} cannot be written ({error.strerror})"
        return Finding(name="runs", verdict="fail", text=text, fix="give a folder of yours with --out")


def gloo() -> Finding:
    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        return Finding(name="distributed", verdict="ok", text="torch.distributed with gloo")
    return Finding(name="distributed", verdict="warn", text="no gloo: one process only", fix="install a torch that has torch.distributed")


def _standing(out: Path) -> Path:
    """The nearest folder above `out` that exists and can be looked into, or `out` itself."""
    return next(folder for folder in (out.absolute(), *out.absolute().parents) if os.path.isdir(folder))  # Path.is_dir may raise


def _from(look: Callable[[], str], name: str, otherwise: Literal["warn", "fail"]) -> Finding:
    try:
        return Finding(name=name, verdict="ok", text=look())
    except VarlError as error:
        return Finding(name=name, verdict=otherwise, text=str(error))
    except Exception as error:  # a broken package may raise anything; that it does is the finding
        return Finding(name=name, verdict=otherwise, text=f"{type(error).__name__}: {error}")


def commit() -> str | None:
    """Of the checkout that this code lies in, with `-dirty` where it was changed; None outside of one, or without git."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
