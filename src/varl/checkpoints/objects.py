"""Detectors of objects and models that answer questions: where their folders lie, and the networks in them."""

from pathlib import Path
from typing import Any, assert_never

from varl.checkpoints.hugging_face import find_kind, require_transformers, told_by
from varl.checkpoints.vision import (
    BICUBIC,
    PREPROCESSING,
    TOKENIZER,
    Files,
    image_processor_of,
    load_clip,
    preprocessing_of,
    tokenizer_of,
    whole,
    with_processor,
)
from varl.config import GenEvalConfig, GroundingDINOConfig, ObjectRewardConfig, VQAConfig
from varl.errors import CheckpointError
from varl.models.detection import BoxDetector, ClosedDetector, Detector, GroundingDetector, Segmenter, vocabulary
from varl.models.vision import CLIP, Scaling
from varl.models.vqa import BLIP, GIT, Asked

DETECTORS: dict[str, tuple[str, type[ClosedDetector] | type[GroundingDetector]]] = {
    "mask2former": ("Mask2FormerForUniversalSegmentation", Segmenter),
    "detr": ("DetrForObjectDetection", BoxDetector),
    "rt_detr": ("RTDetrForObjectDetection", BoxDetector),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", BoxDetector),
    "grounding-dino": ("GroundingDinoForObjectDetection", GroundingDetector),
}
"""By `model_type`: the class of `transformers`, and what looks with it."""
ANSWERERS = {"git": "GitForCausalLM", "blip": "BlipForQuestionAnswering"}
BILINEAR = 2
"""Of PIL's filters."""


def folders_of(config: ObjectRewardConfig) -> tuple[Path, ...]:
    """Where the networks lie that this reward needs, and first the one that looks or answers. No weight is read; ConfigError says what is
    missing and how to get it, or that a folder holds another kind of model."""
    require_transformers()
    match config:
        case GenEvalConfig():
            return find_detector(config.detector, "geneval.detector"), find_clip(config.clip, "geneval.clip")
        case GroundingDINOConfig():
            return (_find(config.model, "grounding_dino.model", ("grounding-dino",)),)
        case VQAConfig():
            return (_find(config.model, "vqa.model", tuple(ANSWERERS), TOKENIZER),)
    assert_never(config)


def find_detector(name: str, setting: str) -> Path:
    """The folder of a detector; `setting` says in an error what was set to it."""
    return _find(name, setting, tuple(DETECTORS))


def find_clip(name: str, setting: str) -> Path:
    """The folder of a CLIP."""
    return _find(name, setting, ("clip",), TOKENIZER)


def _find(name: str, setting: str, kinds: tuple[str, ...], *further: tuple[str, ...]) -> Path:
    folder = find_kind(name, setting, *kinds)
    wanted = (*further, TOKENIZER) if told_by(folder)["model_type"] == "grounding-dino" else further
    return with_processor(folder, setting, PREPROCESSING, *wanted)


def known_by(folder: Path) -> dict[str, int] | None:
    """The classes that the detector in this folder knows, every name of theirs, with their places; None where it reads what is asked."""
    told = told_by(folder)
    return None if told.get("model_type") == "grounding-dino" else vocabulary(told.get("id2label", {}))


def load_detector(folder: Path, batch: int) -> Detector:
    """In fp32 on the CPU; all its weights must be there. `batch` pictures at most go through it at once."""
    name, kind = DETECTORS[told_by(folder)["model_type"]]
    model, scaling = whole(name, folder), scaling_of(folder)
    if issubclass(kind, GroundingDetector):
        return kind(model, tokenizer_of(folder), scaling, batch)
    return kind(model, scaling, batch)


def load_colours(folder: Path) -> CLIP:
    """The CLIP in this folder, likewise."""
    return load_clip(Files(folder, folder))


def load_answerer(folder: Path, batch: int) -> Asked:
    """What answers questions, likewise."""
    kind = told_by(folder)["model_type"]
    model, tokenizer = whole(ANSWERERS[kind], folder), tokenizer_of(folder)
    if kind == "git":
        return GIT(model, tokenizer, preprocessing_of(folder), batch)
    return BLIP(model, tokenizer, scaling_of(folder), batch)


def scaling_of(folder: Path) -> Scaling:
    """Scaled whole and perhaps normalised; CheckpointError for any other."""
    told: Any = image_processor_of(folder)
    size, keep = told.size, bool(told.size["shortest_edge"])
    sides = (size["shortest_edge"], size["longest_edge"]) if keep else (size["height"], size["width"])
    cut = getattr(told, "do_center_crop", None)
    if None in sides or int(told.resample) not in (BILINEAR, BICUBIC) or cut or not (told.do_resize and told.do_rescale):
        raise CheckpointError(
            f"{folder}: its preprocessing does not scale the whole picture (bilinear or bicubic) to numbers in [0, 1]. It is {told} "
            "Give the reward's own model."
        )
    return Scaling(
        size=sides,
        keep=keep,
        multiple=getattr(told, "size_divisor", None) or 1,
        bicubic=int(told.resample) == BICUBIC,
        mean=tuple(told.image_mean) if told.do_normalize else (0.0, 0.0, 0.0),
        std=tuple(told.image_std) if told.do_normalize else (1.0, 1.0, 1.0),
    )
