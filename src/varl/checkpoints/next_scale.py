"""A next-scale model and its tokenizer as a model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varl.checkpoints.folder import load_config, load_tensors, save_model, strict_load
from varl.config import NextScaleConfig
from varl.models.next_scale import NextScale
from varl.settings import from_yaml, to_yaml
from varl.tokenizers.multiscale_vq import MultiScaleVQ


def save(path: Path | str, model: NextScale, tokenizer: MultiScaleVQ, notes: Mapping[str, Any]) -> Path:
    """config.yaml, model.safetensors, tokenizer.safetensors, manifest.json; written whole or not at all."""
    return save_model(path, to_yaml(model.config), {"model": model.state_dict(), "tokenizer": tokenizer.state_dict()}, notes)


def load(path: Path | str) -> tuple[NextScale, MultiScaleVQ]:
    """Strict: every key accounted for, every hash checked, the config checked before any weight is read."""
    config = from_yaml(load_config(path), NextScaleConfig)
    model, tokenizer = NextScale.unfilled(config), MultiScaleVQ(config.tokenizer, config.grids)
    strict_load(model, load_tensors(path, "model"), f"{path}/model.safetensors")
    strict_load(tokenizer, load_tensors(path, "tokenizer"), f"{path}/tokenizer.safetensors")
    return model, tokenizer
