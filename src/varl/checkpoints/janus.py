"""Janus-Pro as `transformers` keeps it (deepseek-community/Janus-Pro-1B and -7B), into our modules and back."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from varl.checkpoints.folder import (
    MANIFEST,
    bytes_of,
    damage,
    disk_error,
    fill_folder,
    refuse_strange,
    seal,
    shapes_of,
    strict_load,
    write_bytes,
)
from varl.checkpoints.hugging_face import told_by, transformers
from varl.checkpoints.llamagen import fill_tokenizer, released_names, tokenizer_config
from varl.config import JanusConfig, VQConfig
from varl.errors import CheckpointError
from varl.models.janus import Janus
from varl.tokenizers.vq import VQ

ORIGINAL = "multi_modality"
"""What DeepSeek's own folders call themselves."""


def is_janus(folder: Path) -> bool:
    """Whether a folder is a Janus of `transformers`. CheckpointError for one in DeepSeek's own format."""
    kind = told_by(folder).get("model_type")
    if kind == ORIGINAL:
        raise CheckpointError(
            f"{folder}: is in DeepSeek's own format ({ORIGINAL}), which transformers does not read. Give deepseek-community/Janus-Pro-1B "
            "or -7B, which hold the same weights."
        )
    return kind == "janus"


def load(folder: Path) -> tuple[Janus, VQ]:
    """The model and its tokenizer, in fp32 on the CPU. Every key is accounted for; where VARL wrote the folder, so is every hash."""
    if (folder / MANIFEST).is_file() and (problems := damage(folder)):
        raise CheckpointError(f"{folder}: {'; '.join(problems)}. Copy or save the model folder again.")
    package = transformers()
    try:
        processor = package.JanusProcessor.from_pretrained(folder, local_files_only=True)
        whole, report = package.JanusForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read as a Janus ({error}). Is it one, and was it copied whole?") from error
    wrong: dict[str, list[str]] = {what: sorted(map(str, names)) for what, names in report.items() if names}
    if wrong:
        lines = [f"{what.replace('_', ' ')}: {', '.join(names[:8])}" for what, names in wrong.items()]
        raise CheckpointError(f"{folder}: the weights do not fit Janus ({'; '.join(lines)}). Copy or save the folder again.")
    return pair_of(whole, processor, str(folder))


def without_memory(folder: Path) -> tuple[Janus, VQ]:
    """The model and its tokenizer on the meta device, from the folder's config and processor alone."""
    package = transformers()
    try:
        config = package.JanusConfig.from_pretrained(folder, local_files_only=True)
        processor = package.JanusProcessor.from_pretrained(folder, local_files_only=True)
        settings = package.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be read as a Janus ({error}). Is it one, and was it copied whole?") from error
    with torch.device("meta"):
        whole = package.JanusForConditionalGeneration(config)
    whole.generation_config = settings
    return pair_of(whole, processor, str(folder))


def pair_of(whole: Any, processor: Any, where: str) -> tuple[Janus, VQ]:
    """Of a JanusForConditionalGeneration and its JanusProcessor. The tokenizer is a copy: `transformers`' own compares features and codes
    without normalising them, and so takes other codes than those that the model was trained on."""
    settings = whole.generation_config
    marks = {
        "bos_token_id": settings.bos_token_id,
        "pad_token_id": processor.tokenizer.pad_token_id if settings.pad_token_id is None else settings.pad_token_id,
        "boi_token_id": processor.tokenizer.convert_tokens_to_ids(processor.image_start_token),
    }
    if absent := [name for name, mark in marks.items() if mark is None]:
        raise CheckpointError(
            f"{where}: neither generation_config.json nor the tokenizer tells {', '.join(absent)}. Copy the folder again."
        )
    vq = tokenizer_of(whole, where)
    bos, pad, boi = marks.values()
    model = Janus(whole.eval(), processor, config_of(whole.config, vq.config, bos=bos, boi=boi, pad=pad))
    ids = model.read(["a"])[0].tolist()
    if (ids[0], ids[-1]) != (bos, boi):
        raise CheckpointError(f"{where}: its processor makes prompts from {ids[0]} to {ids[-1]}, where {bos} to {boi} are due.")
    return model, vq


def config_of(config: Any, tokenizer: VQConfig, *, bos: int, boi: int, pad: int) -> JanusConfig:
    """Of a `transformers` JanusConfig."""
    text, side = config.text_config, config.vq_config.num_patches
    return JanusConfig(
        depth=text.num_hidden_layers,
        width=text.hidden_size,
        kv_heads=text.num_key_value_heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        positions=text.max_position_embeddings,
        grid=(side, side),
        bos=bos,
        boi=boi,
        pad=pad,
        tokenizer=tokenizer,
    )


def save(folder: Path, model: Janus, vq: VQ, notes: Mapping[str, Any]) -> Path:
    """A folder that both `transformers` and VARL load: weights, config and processor as `save_pretrained` writes them, notes.json, and
    manifest.json with the hash of each; written whole or not at all."""
    refuse_strange(folder)
    levels = len(vq.config.multipliers)
    parts = {
        name: part
        for ours, tensor in vq.state_dict().items()
        for names in (released_names(ours, levels),)
        for name, part in zip(names, tensor.chunk(len(names)), strict=True)
    }
    tokenizer = model.whole.model.vqmodel
    strict_load(tokenizer, {name: parts[_llamagen_name(name, levels)] for name in tokenizer.state_dict()}, "the trained tokenizer")

    def fill(beside: Path) -> dict[str, str]:
        try:
            model.whole.save_pretrained(beside)
            model.processor.save_pretrained(beside)
        except SafetensorError as error:
            raise disk_error(error) from error
        write_bytes(beside / "notes.json", json.dumps(notes, indent=2).encode())
        return {str(file.relative_to(beside)): seal(file) for file in sorted(beside.rglob("*")) if file.is_file()}

    return fill_folder(folder, fill, bytes_of(model.whole.state_dict()))


# ---- the tokenizer ----------------------------------------------------------------------------------------------------------------------


def tokenizer_of(whole: Any, where: str) -> VQ:
    """LlamaGen's VQ-16 with Janus's weights."""
    named: dict[str, Tensor] = whole.model.vqmodel.state_dict()
    levels = len(whole.config.vq_config.channel_multiplier)
    state = {_llamagen_name(name, levels): tensor for name, tensor in named.items()}
    with whole.device:
        vq = VQ(tokenizer_config(shapes_of(state), where))
    fill_tokenizer(vq, state, where)
    return vq


def _llamagen_name(theirs: str, levels: int) -> str:
    """LlamaGen's name of a tensor of `transformers`' tokenizer. That is named as ours, but for q, k and v, and counts the decoder's levels
    from the smallest pictures, as LlamaGen does."""
    ours = re.sub(r"^decoder\.up\.(\d+)", lambda level: f"decoder.up.{levels - 1 - int(level[1])}", theirs)
    return released_names(ours, levels)[0]
