"""CLIP and DINOv2 for rewards: where their files lie, and the networks in them. HPS v2.1 comes with open_clip's names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import torch
from safetensors import SafetensorError
from torch import Tensor

from varl.checkpoints.folder import require_fit, shapes_of
from varl.checkpoints.hugging_face import find_file, find_folder, find_kind, require_transformers, transformers
from varl.checkpoints.released import read_weights
from varl.config import (
    AestheticConfig,
    CLIPScoreConfig,
    DINOConfig,
    HPSConfig,
    HPSv3Config,
    ImageRewardConfig,
    NetworkRewardConfig,
    PickScoreConfig,
)
from varl.errors import CheckpointError, ConfigError
from varl.models.vision import CLIP, DINO, Preprocessing

HPS_FILE, IMAGE_REWARD_FILE, HPSV3_FILE = "HPS_v2.1_compressed.pt", "ImageReward.pt", "HPSv3.safetensors"
BICUBIC = 3
"""Of PIL's filters."""
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt")


class Files(NamedTuple):
    """Where a reward's network lies."""

    weights: Path
    """A folder of `transformers`, or a file."""
    processor: Path
    """A folder with the tokenizer and what it wants of pictures."""


def files_of(config: NetworkRewardConfig) -> Files:
    """Where everything lies that this reward needs. Nothing is read; ConfigError says what is missing and how to get it."""
    require_transformers()
    match config:
        case CLIPScoreConfig():
            folder = find_kind(config.model, "clip_score.model", "clip")
            return Files(folder, with_processor(folder, "clip_score.model", PREPROCESSING, TOKENIZER))
        case PickScoreConfig():
            folder = find_kind(config.model, "pick_score.model", "clip")
            setting = "pick_score.processor"
            return Files(folder, with_processor(find_folder(config.processor, setting), setting, PREPROCESSING, TOKENIZER))
        case HPSConfig():
            file = find_file(config.weights, HPS_FILE, "hps.weights")
            folder = find_folder(config.processor, "hps.processor")
            return Files(file, with_processor(folder, "hps.processor", ("config.json",), PREPROCESSING, TOKENIZER))
        case ImageRewardConfig():
            file = find_file(config.weights, IMAGE_REWARD_FILE, "image_reward.weights")
            setting = "image_reward.tokenizer"
            return Files(file, with_processor(find_folder(config.tokenizer, setting), setting, TOKENIZER))
        case HPSv3Config():
            file = find_file(config.weights, HPSV3_FILE, "hpsv3.weights")
            if not Path(config.template).is_file():
                raise ConfigError(
                    f"hpsv3.template={config.template!r}: there is no such file. Get hpsv3/dataset/data_collator_qwen.py from "
                    "github.com/MizzenAI/HPSv3, and give its path."
                )
            setting = "hpsv3.processor"
            return Files(file, with_processor(find_folder(config.processor, setting), setting, ("config.json",), TOKENIZER))
        case AestheticConfig():
            folder = find_kind(config.model, "aesthetic.model", "clip")
            if not Path(config.head).is_file():
                raise ConfigError(
                    f"aesthetic.head={config.head!r}: there is no such file. Get sac+logos+ava1-l14-linearMSE.pth from "
                    "github.com/christophschuhmann/improved-aesthetic-predictor, and give its path."
                )
            return Files(folder, with_processor(folder, "aesthetic.model", PREPROCESSING, TOKENIZER))
        case DINOConfig():
            folder = find_kind(config.model, "dino.model", "dinov2")
            return Files(folder, with_processor(folder, "dino.model", PREPROCESSING))
    assert_never(config)


def with_processor(folder: Path, setting: str, *wanted: Sequence[str]) -> Path:
    """`folder`, if it holds one file of each of `wanted`."""
    for names in wanted:
        if not any((folder / name).is_file() for name in names):
            raise ConfigError(f"{setting}: {folder} holds no {' or '.join(names)}. Give the whole folder of the released model.")
    return folder


# ---- folders of transformers ------------------------------------------------------------------------------------------------------------


def load_clip(files: Files) -> CLIP:
    """In fp32 on the CPU; all its weights must be there."""
    return CLIP(whole("CLIPModel", files.weights), *processor_of(files.processor))


def load_dino(files: Files) -> DINO:
    """In fp32 on the CPU; all its weights must be there."""
    return DINO(whole("Dinov2Model", files.weights), preprocessing_of(files.processor))


def whole(cls: str, folder: Path) -> Any:
    """The folder's model, of that class of `transformers`, in fp32; all its weights must be there, and no others."""
    package = transformers()
    wanted = getattr(package, cls)
    try:
        model, report = wanted.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read as a {cls} ({error}). Is it one, and was it copied whole?") from error
    wrong = {what: [name for name in sorted(map(str, names)) if not name.endswith("position_ids")] for what, names in report.items()}
    if any(wrong.values()):  # older folders hold position ids, which are counted anew
        lines = [f"{what.replace('_', ' ')}: {', '.join(names[:8])}" for what, names in wrong.items() if names]
        raise CheckpointError(f"{folder}: the weights do not fit {cls} ({'; '.join(lines)}). Copy the folder again.")
    return model


def processor_of(folder: Path) -> tuple[Any, Preprocessing]:
    return tokenizer_of(folder), preprocessing_of(folder)


def tokenizer_of(folder: Path) -> Any:
    """Whatever tokenizer lies there."""
    try:
        return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({error}). Was the folder copied whole?") from error


def image_processor_of(folder: Path) -> Any:
    """What the folder says of how its model wants pictures."""
    try:
        return transformers().AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its preprocessing cannot be read ({error}). Was the folder copied whole?") from error


def preprocessing_of(folder: Path) -> Preprocessing:
    """Scaled by the shorter side, cut and normalised; CheckpointError for any other."""
    told = image_processor_of(folder)
    side, crop = told.size["shortest_edge"], (told.crop_size["height"], told.crop_size["width"])
    if side is None or int(told.resample) != BICUBIC or not (told.do_resize and told.do_center_crop and told.do_normalize):
        raise CheckpointError(
            f"{folder}: its preprocessing does not scale the shorter side (bicubic), cut out the middle and normalise. It is {told} "
            "Give the reward's own model."
        )
    return Preprocessing(side=side, crop=crop, mean=tuple(told.image_mean), std=tuple(told.image_std))


# ---- open_clip --------------------------------------------------------------------------------------------------------------------------

RENAMED = (
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
)
"""From names of `transformers`' CLIPModel to open_clip's."""
TRANSPOSED = ("text_projection", "visual.proj")


def open_clip_name(name: str) -> str:
    """What open_clip calls a weight of a CLIPModel; queries, keys and values lie in one."""
    for pattern, theirs in RENAMED:
        name = re.sub(pattern, theirs, name)
    return name


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's state dict as open_clip has it."""
    parts: dict[str, list[str]] = {}
    for name in state:
        parts.setdefault(open_clip_name(name), []).append(name)
    found = {}
    for theirs, names in parts.items():
        tensors = [state[name] for name in sorted(names, key=_part)]
        found[theirs] = tensors[0].T if theirs in TRANSPOSED else torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return found


def from_open_clip(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """open_clip's state dict under the `names` of a CLIPModel."""
    found = {}
    for name in names:
        tensor = state[theirs := open_clip_name(name)]
        found[name] = tensor.T if theirs in TRANSPOSED else tensor.chunk(3)[_part(name)] if ".attn.in_proj_" in theirs else tensor
    return found


def _part(name: str) -> int:
    """Which third of open_clip's joint weight a projection is."""
    found = re.search(r"\.([qkv])_proj\.", name)
    return "qkv".index(found[1]) if found else 0


def load_hps(files: Files) -> CLIP:
    """HPS v2.1, in fp32 on the CPU: the released state dict in a CLIPModel of the processor folder's config. CheckpointError lists every
    weight that does not fit, under open_clip's names. As its package does, pictures that are not square are not cut but laid on black."""
    package = transformers()
    state = read_weights(files.weights, "state_dict")
    try:
        config = package.CLIPConfig.from_pretrained(files.processor, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{files.processor}: its config.json cannot be read as a CLIP's ({error}). Copy it again.") from error
    with torch.device("meta"):
        empty = package.CLIPModel(config).state_dict()
    require_fit(shapes_of(state), shapes_of(to_open_clip(empty)), "CLIPModel", str(files.weights))
    ours = from_open_clip({name: tensor.float() for name, tensor in state.items()}, list(empty))
    model = package.CLIPModel.from_pretrained(None, config=config, state_dict=ours, dtype=torch.float32)
    tokenizer, wanted = processor_of(files.processor)
    return CLIP(model, tokenizer, replace(wanted, whole=True))
