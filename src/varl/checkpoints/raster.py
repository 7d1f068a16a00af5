"""A raster model and its tokenizer as a model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varl.checkpoints.folder import load_config, load_tensors, save_model, strict_load
from varl.config import RasterConfig
from varl.errors import CheckpointError
from varl.models.raster import Raster
from varl.settings import model_from_yaml, model_to_yaml
from varl.tokenizers.vq import VQ


def save(path: Path | str, model: Raster, tokenizer: VQ, notes: Mapping[str, Any]) -> Path:
    """config.yaml (of `kind: raster`), model.safetensors, tokenizer.safetensors, manifest.json; written whole or not at all."""
    return save_model(path, model_to_yaml(model.config), {"model": model.state_dict(), "tokenizer": tokenizer.state_dict()}, notes)


def load(path: Path | str) -> tuple[Raster, VQ]:
    """Strict: every key accounted for, every hash checked, the config checked before any weight is read."""
    config = model_from_yaml(load_config(path))
    if not isinstance(config, RasterConfig):
        raise CheckpointError(f"{path}: holds no raster model; its config is a {type(config).__name__}. Give a folder of `kind: raster`.")
    model, tokenizer = Raster.unfilled(config), VQ(config.tokenizer)
    strict_load(model, load_tensors(path, "model"), f"{path}/model.safetensors")
    strict_load(tokenizer, load_tensors(path, "tokenizer"), f"{path}/tokenizer.safetensors")
    return model, tokenizer
