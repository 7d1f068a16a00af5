"""A folder of weights that is there whole or not at all: written beside its place, hashed, flushed to disk, and then renamed."""

import difflib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varl.errors import CheckpointError

Shapes = Mapping[str, Sequence[int]]
"""Of a file's tensors, by name."""

MANIFEST = "manifest.json"
_SHOWN = 8

# ---- model folders --------------------------------------------------------------------------------------------------------------------


def save_model(path: Path | str, config: str, files: Mapping[str, Mapping[str, Tensor]], notes: Mapping[str, Any]) -> Path:
    """A model folder at `path`: config.yaml (the text `config`), NAME.safetensors of each state dict, notes.json, and manifest.json with
    the hash of each. A model folder that stood there is replaced, as a whole; anything else is a CheckpointError."""
    refuse_strange(Path(path))
    parts: dict[str, bytes | Mapping[str, Tensor]] = {f"{name}.safetensors": tensors for name, tensors in files.items()}
    parts["config.yaml"] = config.encode()
    parts["notes.json"] = json.dumps(notes, indent=2).encode()
    return write_folder(Path(path), parts)


def load_config(path: Path | str) -> str:
    """The YAML text of a model folder's config."""
    return read_part(Path(path), "config.yaml").decode()


def load_notes(path: Path | str) -> dict[str, Any]:
    """What was noted when the model folder was saved."""
    return json.loads(read_part(Path(path), "notes.json"))


def load_tensors(path: Path | str, name: str) -> dict[str, Tensor]:
    """NAME.safetensors of a model folder, on the CPU, after its hash was found to be that of the manifest."""
    file = Path(path) / f"{name}.safetensors"
    problems = damage(Path(path), [file.name])
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}. Copy or save the model folder again.")
    return read_tensors(file)


def strict_load(module: nn.Module, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Fills `module` with `state_dict`, every name and shape accounted for; `where` says in an error whence the tensors came."""
    require_fit(shapes_of(state_dict), shapes_of(module.state_dict()), type(module).__name__, where)
    module.load_state_dict(dict(state_dict))


def shapes_of(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def require_fit(have: Shapes, want: Shapes, model: str, where: str) -> None:
    """CheckpointError, with every difference listed, unless names and shapes are the same."""
    missing = [name for name in want if name not in have]
    unexpected = [name for name in have if name not in want]
    shapes = [name for name in want if name in have and tuple(want[name]) != tuple(have[name])]
    if missing or unexpected or shapes:
        lines = [f"{where}: the weights do not fit {model}."]
        lines += _listed("missing", missing, lambda name: _nearest(name, unexpected))
        lines += _listed("unexpected", unexpected, lambda name: _nearest(name, missing))
        lines += _listed("of another shape", shapes, lambda name: f" {list(have[name])}, the model has {list(want[name])}")
        lines.append("Load them with the config that they were saved with, or convert them first.")
        raise CheckpointError("\n".join(lines))


def _listed(title: str, names: Sequence[str], remark: Callable[[str], str]) -> list[str]:
    if not names:
        return []
    more = [f"    ... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"  {title} ({len(names)}):", *(f"    `{name}`{remark(name)}" for name in names[:_SHOWN]), *more]


def _nearest(name: str, others: list[str]) -> str:
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
    return f" (nearest on the other side: `{near[0]}`)" if near else ""


# ---- any folder -----------------------------------------------------------------------------------------------------------------------


def write_folder(path: Path, parts: Mapping[str, bytes | Mapping[str, Tensor]]) -> Path:
    """`path` as a folder of these files and a manifest of their hashes. Tensors are written as safetensors."""

    def fill(folder: Path) -> dict[str, str]:
        return {
            name: write_bytes(folder / name, part) if isinstance(part, bytes) else write_tensors(folder / name, part)
            for name, part in parts.items()
        }

    return fill_folder(path, fill, sum(len(part) if isinstance(part, bytes) else bytes_of(part) for part in parts.values()))


def fill_folder(path: Path, fill: Callable[[Path], Mapping[str, str]], needed: int) -> Path:
    """`path` as a folder that `fill` wrote, about `needed` bytes, and a manifest; `fill` returns the sha256 of each file, by name. Until
    the last moment all of it lies in `path`.tmp-PID; if the disk fails, that is removed and what stood at `path` before still stands. What
    dead processes left of the same folder is cleared away first."""
    beside, aside = (path.with_name(f"{path.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        remove_leftovers(path.parent, path.name)
        beside.mkdir(parents=True)
        manifest = {name: {"sha256": digest, "bytes": (beside / name).stat().st_size} for name, digest in fill(beside).items()}
        write_bytes(beside / MANIFEST, json.dumps(manifest, indent=2).encode())
        _sync(beside)
        if path.exists():
            path.rename(aside)
        beside.rename(path)
        _sync(path.parent)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(_full(path, needed, error)) from error
    shutil.rmtree(aside, ignore_errors=True)
    return path


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def refuse_strange(path: Path) -> None:
    """CheckpointError where `path` holds something that was not written here, and would be lost."""
    if path.exists() and not (path / MANIFEST).is_file() and (path.is_file() or any(path.iterdir())):
        raise CheckpointError(f"{path}: is there already, and VARL did not write it (it has no {MANIFEST}). Give a new folder.")


def remove_leftovers(folder: Path, of: str | None = None) -> list[str]:
    """Names of the half-written folders of dead processes in `folder` (of the one named `of` alone, if given), which are removed; a folder
    that such a process had put aside, to replace it, is put back. This process must not be writing them."""
    gone, names = [], "*" if of is None else glob.escape(of)
    for left in sorted([*folder.glob(f"{names}.tmp-*"), *folder.glob(f"{names}.old-*")]):
        name, _, kind_and_pid = left.name.rpartition(".")
        kind, _, pid = kind_and_pid.partition("-")
        if not pid.isdigit() or (int(pid) != os.getpid() and process_lives(int(pid))):
            continue
        if kind == "old" and not (folder / name).exists():
            with suppress(FileNotFoundError):  # another process of this run was quicker
                left.rename(folder / name)
        else:
            shutil.rmtree(left, ignore_errors=True)
        gone.append(left.name)
    return gone


def process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def damage(path: Path, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with the folder's files (or those of them in `names`) when held against its manifest; empty if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        written = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # not there, no JSON, or JSON of another shape
        return [f"{MANIFEST} cannot be read ({type(error).__name__})"]
    problems = []
    for name in written if names is None else names:
        file = path / name
        if not file.is_file() or name not in written:
            problems.append(f"{name} is missing")
            continue
        size, digest = written[name]
        if file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes where {size} were written")
        elif file_sha256(file) != digest:
            problems.append(f"{name} is not what was written (its sha256 differs)")
    return problems


# ---- single files ---------------------------------------------------------------------------------------------------------------------


def write_bytes(file: Path, data: bytes) -> str:
    """sha256 of what was written, and flushed to the disk."""
    with file.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return hashlib.sha256(data).hexdigest()


def replace_file(file: Path, data: bytes) -> None:
    """`file` holds `data` from one moment to the next; folders are made as needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.tmp")
    write_bytes(beside, data)
    beside.replace(file)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the safetensors file that was written, and flushed to the disk."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(packed, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise disk_error(error) from error
    return seal(file)


def disk_error(error: SafetensorError) -> OSError:
    """What the operating system said, of which safetensors tells the number alone."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(errno.EIO, str(error))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file, on the CPU. Tensors are mapped from the file, so that it takes no memory to look at them or copy them elsewhere;
    what writes to one writes to a copy of its own."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error}). Is it there, and was it copied whole?") from error


def read_part(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror}). Is this a folder that VARL saved?") from error


def file_sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def seal(file: Path) -> str:
    """sha256 of a file that another wrote, and that is now flushed to the disk."""
    _sync(file)
    return file_sha256(file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _full(path: Path, needed: int, error: OSError) -> str:
    standing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(standing).free
    return (
        f"{path}: cannot be written ({error.strerror}). It needs {needed:,} bytes; {free:,} are free in {standing}. "
        "What was saved before is whole. Make room there, or choose another folder, and run the same command again."
    )
