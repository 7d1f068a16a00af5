"""Rooms open only where this table says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "varl"

MAY_IMPORT = {
    "__init__": "",
    "errors": "",
    "config": "errors",
    "rng": "",
    "settings": "config errors",
    "types": "errors rng",
    "models": "config errors rng",
    "tokenizers": "config errors",
    "policies": "types config rng errors models tokenizers",
    "algorithms": "types config rng errors",
    "rewards": "types config errors checkpoints models",
    "data": "types config rng errors",
    "checkpoints": "config errors models tokenizers types settings",
    "distributed": "errors",
    "train": "types config settings rng errors checkpoints distributed",
    "report": "errors",
    "eval": "types config rng errors checkpoints models tokenizers data rewards policies",
    "pretrain": "config rng errors models tokenizers types data checkpoints train policies rewards eval",
    "recipes": "config errors",
}
JOIN = {"build", "cli", "demo", "doctor", "plan", "probe", "run", "sample"}
"""Files that join the rooms, and the folder `plan`, may import all of them; no room imports these."""
NO_TORCH = {"config", "errors", "settings", "recipes", "report", "cli"}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path, *, top: bool = False) -> list[tuple[int, str]]:
    """Line and full name of every module that a file imports; `top`: only when it is itself imported, not inside functions."""
    tree = ast.parse(path.read_text())
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if top and id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it out"
            bare = node.module in ("varl", "torch")
            found += [(node.lineno, f"{node.module}.{alias.name}" if bare else str(node.module)) for alias in node.names]
    return found


def test_there_are_files():
    assert {room_of(path) for path in FILES} >= {"types", "models", "policies", "algorithms", "eval"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_open_only_where_the_table_says(path):
    room = room_of(path)
    if room not in MAY_IMPORT:
        assert room in JOIN, f"{room}: a new room needs a line in the table"
        return
    allowed = {room, *MAY_IMPORT[room].split()}
    for line, name in imports(path):
        if name.split(".")[0] == "varl" and "." in name:
            target = name.split(".")[1]
            assert target in allowed, f"{path}:{line}: {room} may not import {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_no_file_does(path):
    text = path.read_text()
    names = imports(path)
    for line, name in names:
        assert name.split(".")[0] not in ("torchvision", "pickle", "dill", "joblib", "cloudpickle"), f"{path}:{line}: imports {name}"
        if name.startswith("torch.distributed"):
            assert room_of(path) == "distributed", f"{path}:{line}: only distributed/ imports torch.distributed"
    if room_of(path) in NO_TORCH:
        assert not [name for _, name in imports(path, top=True) if name.split(".")[0] == "torch"], f"{path}: imports torch"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load":
            safe = [
                kw for kw in node.keywords if kw.arg == "weights_only" and isinstance(kw.value, ast.Constant) and kw.value.value is True
            ]
            assert safe, f"{path}:{node.lineno}: torch.load without weights_only=True"
        assert called != "print" or room_of(path) == "cli", f"{path}:{node.lineno}: prints"
        assert called not in ("eval", "exec"), f"{path}:{node.lineno}: {called}"


@pytest.mark.parametrize("module", ["build", "sample", "eval.parity"])
def test_transformers_is_imported_only_where_it_is_needed(module):
    code = f"import varl.{module}, sys; assert not {{'transformers', 'huggingface_hub', 'datasets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("module", sorted(NO_TORCH))
def test_what_must_start_fast_starts_without_torch(module):
    code = f"import varl.{module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_no_room_is_named_in_vain():
    assert {room_of(path) for path in FILES} >= set(MAY_IMPORT)


def test_the_table_has_no_circles():
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        ready = [room for room, allowed in MAY_IMPORT.items() if room not in order and set(allowed.split()) <= {*order, room}]
        assert ready, f"rooms that need one another: {sorted(set(MAY_IMPORT) - set(order))}"
        order += ready


def test_no_annotations_from_the_future():
    """They would hide shapes from the checker."""
    assert not [path for path in FILES if re.search(r"^from __future__ import annotations", path.read_text(), re.M)]
