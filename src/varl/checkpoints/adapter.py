"""Adapters as peft keeps them, in a folder: adapter_model.safetensors, and adapter_config.json, which says whose they are."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from varl.checkpoints.folder import (
    MANIFEST,
    bytes_of,
    damage,
    fill_folder,
    read_part,
    read_tensors,
    refuse_strange,
    require_fit,
    seal,
    shapes_of,
    write_tensors,
)
from varl.config import LoraConfig
from varl.errors import CheckpointError
from varl.models.janus import Janus
from varl.models.lora import ADAPTER, adapters, peft

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS = ("lora_A", "lora_B")


def save(path: Path, module: nn.Module, config: LoraConfig, *, base: str) -> Path:
    """The adapters of a model that came from `base`; written whole or not at all. `peft.PeftModel` loads them too, onto the module or, of a
    Janus, onto what `transformers` made of its folder."""
    refuse_strange(path)
    weights = {name: part.weight for name, part in _parts(module).items()}
    settings = peft().LoraConfig(r=config.r, lora_alpha=config.lora_alpha, base_model_name_or_path=base, inference_mode=True)
    settings.target_modules = [name for name, _ in adapters(_root(module))]

    def fill(beside: Path) -> dict[str, str]:
        settings.save_pretrained(beside)
        return {WEIGHTS: write_tensors(beside / WEIGHTS, weights), SETTINGS: seal(beside / SETTINGS)}

    return fill_folder(path, fill, bytes_of(weights))


def base_of(path: Path) -> str | None:
    """The model whose adapters a folder holds, if it says so. CheckpointError for one that is damaged, or holds no LoRA."""
    if (path / MANIFEST).is_file() and (problems := damage(path)):
        raise CheckpointError(f"{path}: {'; '.join(problems)}. Copy the folder again.")
    try:
        told: dict[str, Any] = json.loads(read_part(path, SETTINGS))
    except ValueError as error:
        raise CheckpointError(f"{path}: {SETTINGS} cannot be read as JSON ({error}). Was the folder copied whole?") from error
    if told.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: holds adapters of the kind {told.get('peft_type')!r}, and only LORA is read. Merge them with peft.")
    return told.get("base_model_name_or_path")


def load(path: Path, module: nn.Module) -> None:
    """Puts the adapters of a folder on a model, in place. CheckpointError unless every name and shape fits."""
    package, tensors = peft(), read_tensors(path / WEIGHTS)
    try:
        package.inject_adapter_in_model(package.LoraConfig.from_pretrained(path), _root(module), ADAPTER, low_cpu_mem_usage=True)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: fits no layer of {type(module).__name__} ({error}). Give the model that it was trained on."
        ) from error
    parts = _parts(module)
    require_fit(shapes_of(tensors), {name: tuple(part.weight.shape) for name, part in parts.items()}, type(module).__name__, str(path))
    for name, part in parts.items():
        part.weight = nn.Parameter(tensors[name], requires_grad=False)


def _root(module: nn.Module) -> nn.Module:
    """What names are counted from."""
    return module.whole if isinstance(module, Janus) else module


def _parts(module: nn.Module) -> dict[str, nn.Linear]:
    """A and B of every adapted layer, by peft's names."""
    layers = adapters(_root(module))
    return {f"base_model.model.{name}.{part}.weight": getattr(layer, part)[ADAPTER] for name, layer in layers for part in PARTS}
