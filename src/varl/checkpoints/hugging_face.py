"""Folders as `transformers` keeps them: where they lie, and which one it is. Nothing is fetched from the network: the errors say how."""

import hashlib
import importlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from varl.checkpoints.folder import MANIFEST, file_sha256
from varl.errors import CheckpointError, ConfigError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def transformers() -> Any:
    """The package, imported when it is first needed: it takes seconds."""
    require_transformers()
    return importlib.import_module("transformers")


def require_transformers() -> None:
    """ConfigError where the package is not installed."""
    if find_spec("transformers") is None:
        raise ConfigError("this needs the package transformers, which is not installed. Run `pip install 'varl[hf]'`.")


def find(name: str, setting: str) -> Path:
    """The folder `name`, or the newest snapshot of the hub's model of that name in the local Hugging Face cache. `setting` says in an
    error what was set to it."""
    path = _folder(name, setting, _fetch(name))
    if not (path / "config.json").is_file():
        raise ConfigError(f"{setting}={name!r}: no config.json in {path}. Give a folder that transformers saved, or a hub name.")
    if not any(weights for kind in WEIGHTS for weights in path.glob(kind)):
        raise ConfigError(f"{setting}={name!r}: {path} holds no weights ({', '.join(WEIGHTS)}). {_fetch(name)}")
    return path


def find_kind(name: str, setting: str, *kinds: str) -> Path:
    """`find` of a model of one of these kinds, which its config.json calls `model_type`."""
    folder = find(name, setting)
    if (kind := told_by(folder).get("model_type")) not in kinds:
        raise ConfigError(f"{setting}={name!r}: {folder} holds a {kind}. Give a folder with one of these: {', '.join(kinds)}.")
    return folder


def find_folder(name: str, setting: str) -> Path:
    """The same, whatever the folder holds; its weights are not needed."""
    return _folder(name, setting, _fetch(name, *WEIGHTS))


def find_file(name: str, file: str, setting: str) -> Path:
    """The file `name`, or `file` of the hub's model of that name in the local Hugging Face cache."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if not is_hub_name(name):
        raise ConfigError(f"{setting}={name!r}: there is no such file. Give {file}, or a hub name.")
    require_transformers()
    found = importlib.import_module("huggingface_hub").try_to_load_from_cache(name, file)
    if not isinstance(found, str):
        raise ConfigError(
            f"{setting}={name!r}: there is no such file, and the Hugging Face cache holds no {file} of a model of that name. "
            f"Run `hf download {name} {file}` where there is a network, or give the path of the file."
        )
    return Path(found)


def told_by(folder: Path) -> dict[str, Any]:
    """What the folder's config.json holds; nothing, where there is none. CheckpointError for one that cannot be read."""
    file = folder / "config.json"
    try:
        told: Any = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}). Was the folder copied whole?") from error
    return told if isinstance(told, dict) else {}


def is_hub_name(name: str) -> bool:
    """Whether it could be one: OWNER/NAME."""
    return _HUB_NAME.fullmatch(name) is not None


def _folder(name: str, setting: str, advice: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not is_hub_name(name):
        raise ConfigError(f"{setting}={name!r}: there is no such folder. Give one, or a hub name, OWNER/NAME.")
    require_transformers()
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{setting}={name!r}: there is no such folder, and the Hugging Face cache holds no model of that name. {advice}"
        ) from error


def _fetch(name: str, *unwanted: str) -> str:
    exclude = " ".join(f"'{files}'" for files in ("*.h5", "*.msgpack", *unwanted))
    download = f"Run `hf download {name} --exclude {exclude}` where there is a network"
    return f"{download if is_hub_name(name) else 'Copy it whole'}, or give the path of a folder."


def identity(folder: Path) -> str:
    """What tells a folder's contents from others': the sha256 of its manifest if VARL wrote it, the revision of a snapshot from the hub,
    else the sha256 of its files' names and hashes."""
    if (folder / MANIFEST).is_file():
        return file_sha256(folder / MANIFEST)
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()
