"""A model and its tokenizer as a model folder, of whichever family; or a classifier."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from varl.checkpoints import harmon, hugging_face, janus
from varl.checkpoints.folder import load_config, load_tensors, save_model, strict_load
from varl.config import InfinityConfig, MARConfig, ModelConfig, NextScaleConfig, NOVAConfig, RasterConfig
from varl.errors import ConfigError
from varl.models.classifier import Classifier
from varl.models.harmon import Harmon
from varl.models.infinity import Infinity
from varl.models.janus import Janus
from varl.models.mar import MAR
from varl.models.next_scale import NextScale
from varl.models.nova import NOVA
from varl.models.raster import Raster
from varl.settings import classifier_from_yaml, model_from_yaml, model_to_yaml
from varl.tokenizers.bsq import BSQ
from varl.tokenizers.kl import KL
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.vq import VQ

OwnModel = NextScale | Infinity | Raster | MAR | NOVA
OwnPair = tuple[NextScale, MultiScaleVQ] | tuple[Infinity, BSQ] | tuple[Raster, VQ] | tuple[MAR, KL] | tuple[NOVA, KL]
"""A model that VARL can make, and the tokenizer that it was trained with."""
Pair = OwnPair | tuple[Janus, VQ] | tuple[Harmon, KL]
"""A model that a policy acts with, and its tokenizer."""


DRAWS = "a model folder (made by `varl pretrain` or `varl convert`), bundled:words, or a Janus-Pro or a Harmon from Hugging Face"
NAMES = "a classifier's folder (made by `varl pretrain`), or bundled:glyphs_reward"
"""What may be given."""


def model_path(name: str, setting: str = "model", wanted: str = DRAWS) -> Path:
    """Where a model folder lies: a path, `bundled:NAME` for one that comes with VARL, or a name on the Hugging Face hub. `setting` says in
    an error what was set to it, and `wanted` to what it may be set."""
    kind, _, bundled = name.partition(":")
    path = Path(str(files("varl") / "bundled" / bundled)) if kind == "bundled" else Path(name)
    if not path.exists() and hugging_face.is_hub_name(name):
        path = hugging_face.find(name, setting)
    if not is_model_folder(path):
        raise ConfigError(f"{setting}={name!r}: no config.yaml in {path}. Give {wanted}.")
    return path


def classifier_path(name: str, setting: str) -> Path:
    """The same of a classifier."""
    return model_path(name, setting, NAMES)


def save(path: Path | str, model: OwnModel | Janus | Harmon, tokenizer: nn.Module, notes: Mapping[str, Any]) -> Path:
    """config.yaml, model.safetensors, tokenizer.safetensors, notes.json, manifest.json; a Janus as `transformers` does and a Harmon as its
    authors do, with the last two. Written whole or not at all."""
    if isinstance(model, Janus):
        assert isinstance(tokenizer, VQ)
        return janus.save(Path(path), model, tokenizer, notes)
    if isinstance(model, Harmon):
        assert isinstance(tokenizer, KL)
        return harmon.save(Path(path), model, tokenizer, notes)
    return save_model(path, model_to_yaml(model.config), {"model": model.state_dict(), "tokenizer": tokenizer.state_dict()}, notes)


def save_classifier(path: Path | str, classifier: Classifier, notes: Mapping[str, Any]) -> Path:
    """The same, without a tokenizer."""
    return save_model(path, model_to_yaml(classifier.config), {"model": classifier.state_dict()}, notes)


def load(path: Path | str) -> Pair:
    """Strict: every key accounted for, every hash checked, the config checked before any weight is read."""
    if janus.is_janus(Path(path)):
        return janus.load(Path(path))
    if harmon.is_harmon(Path(path)):
        return harmon.load(Path(path))
    pair = unfilled(model_from_yaml(load_config(path)))
    for module, name in zip(pair, ("model", "tokenizer"), strict=True):
        strict_load(module, load_tensors(path, name), f"{path}/{name}.safetensors")
    return pair


def load_classifier(path: Path | str) -> Classifier:
    """As strictly; frozen, in eval mode."""
    try:
        classifier = Classifier(classifier_from_yaml(load_config(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    strict_load(classifier, load_tensors(path, "model"), f"{path}/model.safetensors")
    return classifier.eval().requires_grad_(False)


def is_model_folder(path: Path) -> bool:
    """Whether `load` would take it for one."""
    return (path / "config.yaml").is_file() or janus.is_janus(path) or harmon.is_harmon(path)


def unfilled(config: ModelConfig) -> OwnPair:
    """Both on the CPU, weights still to be loaded."""
    match config:
        case NextScaleConfig():
            return NextScale.unfilled(config), MultiScaleVQ(config.tokenizer, config.grids)
        case InfinityConfig():
            return Infinity.unfilled(config), BSQ(config.tokenizer, config.grids)
        case RasterConfig():
            return Raster.unfilled(config), VQ(config.tokenizer)
        case MARConfig():
            return MAR.unfilled(config), KL(config.tokenizer)
        case NOVAConfig():
            return NOVA.unfilled(config), KL(config.tokenizer)


def fresh(config: ModelConfig) -> OwnPair:
    """Both with weights from torch's global generator."""
    match config:
        case NextScaleConfig():
            return NextScale(config), MultiScaleVQ(config.tokenizer, config.grids)
        case InfinityConfig():
            return Infinity(config), BSQ(config.tokenizer, config.grids)
        case RasterConfig():
            return Raster(config), VQ(config.tokenizer)
        case MARConfig():
            return MAR(config), KL(config.tokenizer)
        case NOVAConfig():
            return NOVA(config), KL(config.tokenizer)
