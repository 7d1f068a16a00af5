"""A model and its tokenizer as a model folder, of whichever family; or a classifier."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from varl.checkpoints.folder import load_config, load_tensors, save_model, strict_load
from varl.config import ModelConfig, NextScaleConfig, RasterConfig
from varl.errors import ConfigError
from varl.models.classifier import Classifier
from varl.models.next_scale import NextScale
from varl.models.raster import Raster
from varl.settings import classifier_from_yaml, model_from_yaml, model_to_yaml
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.vq import VQ

Pair = tuple[NextScale, MultiScaleVQ] | tuple[Raster, VQ]
"""A model and the tokenizer that it was trained with."""


def model_path(name: str) -> Path:
    """Where a model folder lies: a path, or `bundled:NAME` for one that comes with VARL."""
    kind, _, bundled = name.partition(":")
    path = Path(str(files("varl") / "bundled" / bundled)) if kind == "bundled" else Path(name)
    if not (path / "config.yaml").is_file():
        raise ConfigError(
            f"model={name!r}: no config.yaml in {path}. Give a model folder (made by `varl pretrain` or `varl convert`), or bundled:words."
        )
    return path


def save(path: Path | str, model: NextScale | Raster, tokenizer: nn.Module, notes: Mapping[str, Any]) -> Path:
    """config.yaml, model.safetensors, tokenizer.safetensors, manifest.json; written whole or not at all."""
    return save_model(path, model_to_yaml(model.config), {"model": model.state_dict(), "tokenizer": tokenizer.state_dict()}, notes)


def save_classifier(path: Path | str, classifier: Classifier, notes: Mapping[str, Any]) -> Path:
    """The same, without a tokenizer."""
    return save_model(path, model_to_yaml(classifier.config), {"model": classifier.state_dict()}, notes)


def load(path: Path | str) -> Pair:
    """Strict: every key accounted for, every hash checked, the config checked before any weight is read."""
    pair = unfilled(model_from_yaml(load_config(path)))
    for module, name in zip(pair, ("model", "tokenizer"), strict=True):
        strict_load(module, load_tensors(path, name), f"{path}/{name}.safetensors")
    return pair


def load_classifier(path: Path | str) -> Classifier:
    """As strictly; frozen, in eval mode."""
    classifier = Classifier(classifier_from_yaml(load_config(path)))
    strict_load(classifier, load_tensors(path, "model"), f"{path}/model.safetensors")
    return classifier.eval().requires_grad_(False)


def unfilled(config: ModelConfig) -> Pair:
    """Both on the CPU, weights still to be loaded."""
    match config:
        case NextScaleConfig():
            return NextScale.unfilled(config), MultiScaleVQ(config.tokenizer, config.grids)
        case RasterConfig():
            return Raster.unfilled(config), VQ(config.tokenizer)


def fresh(config: ModelConfig) -> Pair:
    """Both with weights from torch's global generator."""
    match config:
        case NextScaleConfig():
            return NextScale(config), MultiScaleVQ(config.tokenizer, config.grids)
        case RasterConfig():
            return Raster(config), VQ(config.tokenizer)
