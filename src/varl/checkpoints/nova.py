"""NOVA's released folders (arXiv 2412.14169; BAAI/nova-d48w1024-sd512 and others), as diffusers keeps them, as our modules:
model_index.json, and transformer/, vae/, scheduler/, each with its config. diffusers is not needed. The text encoder in them is Phi-2,
which `transformers` reads. The transformer's names are ours; the autoencoder's are not, and its attention keeps q, k and v apart."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from varl.checkpoints.folder import Shapes, shapes_of, strict_load
from varl.checkpoints.released import count, expect, fill_from_parts, read_weights
from varl.config import AncestralConfig, FlowConfig, KLConfig, NOVAConfig, NOVAHeadConfig, ViTConfig
from varl.errors import CheckpointError, ConfigError
from varl.models.nova import NOVA
from varl.tokenizers.kl import KL

INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model"
HEADS: dict[int, int] = {768: 12, 1024: 16, 1536: 16}
"""Attention heads of every released width."""
TRAINED = 1000
"""Steps of every scheduler here."""
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What older diffusers call the autoencoder's attention."""


def is_nova(folder: Path) -> bool:
    """Whether a folder is a NOVA as it was released."""
    file = folder / INDEX
    return file.is_file() and _told(file).get("_class_name") == "NOVAPipeline"


def load_nova(folder: Path | str, transformer: Path | str | None = None, *, heads: int | None = None) -> tuple[NOVA, KL]:
    """The transformer and the autoencoder in `folder`, in fp32 on the CPU; `transformer` is another file or folder of weights for it, such
    as a training run's. Every key is accounted for. Sizes are read off the weights, but
    for the picture's size, the positions, the sampler and the scale of the latents, which the configs tell; and but for `heads`, of a
    transformer of no released width."""
    folder = Path(folder)
    if not is_nova(folder):
        raise CheckpointError(f"{folder}: {INDEX} tells of no NOVAPipeline. Give a folder such as BAAI/nova-d48w1024-sd512, copied whole.")
    drawn = sampler_config(_told(folder / "scheduler" / "scheduler_config.json"), str(folder / "scheduler"))
    told_vae, told = (_told(folder / part / "config.json") for part in ("vae", "transformer"))
    where_vae = str(folder / "vae")
    refuse_other_autoencoders(told_vae, where_vae)
    weights = folder / "transformer" if transformer is None else Path(transformer)
    where, state = str(weights), read_weights(_weights(weights) if weights.is_dir() else weights)
    vae = diffusers_names(read_weights(_weights(folder / "vae")))
    tokenizer = tokenizer_config(shapes_of(vae), where_vae, scale=told_vae.get("scaling_factor"), shift=told_vae.get("shift_factor"))
    config = transformer_config(shapes_of(state), told, tokenizer, drawn, where, heads)
    model, kl = NOVA.unfilled(config), KL(config.tokenizer)
    strict_load(model, state, where)
    fill_tokenizer(kl, vae, where_vae)
    return model, kl


def _told(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}). Was the folder copied whole?") from error
    return told if isinstance(told, dict) else {}


def _weights(folder: Path) -> Path:
    """The one file of weights. Those of an fp16 copy have another name."""
    files = [folder / f"{WEIGHTS}{kind}" for kind in (".safetensors", ".bin")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: has neither {files[0].name} nor {files[1].name}. Was the folder copied whole?")
    return found


# ---- sizes ----------------------------------------------------------------------------------------------------------------------------


def transformer_config(
    shapes: Shapes,
    told: Mapping[str, Any],
    tokenizer: KLConfig,
    drawn: AncestralConfig | FlowConfig,
    where: str,
    heads: int | None = None,
) -> NOVAConfig:
    """The config that NOVA weights of these shapes were made with, and of what config.json has `told`: `image_base_size` (h, w in tokens),
    `video_base_size` (frames, h, w of the prefix), `rotary_pos_embed`, `text_token_len`. Raises CheckpointError where that contradicts the
    weights, or its tokens are not those of `tokenizer`."""
    picture, video, inner = (f"{part}.patch_embed.proj.weight" for part in ("image_encoder", "video_encoder", "image_decoder"))
    expect(shapes, (picture, video, inner, "text_embed.weight", "mask_embed.mask_token"), "a NOVA transformer", where)
    if missing := [name for name in ("image_base_size", "video_base_size", "text_token_len") if name not in told]:
        raise CheckpointError(f"{where}: config.json does not tell {', '.join(missing)}. Copy the folder again.")
    width, channels, fold, _ = shapes[picture]
    if channels != tokenizer.channels:
        raise CheckpointError(
            f"{where} draws cells of {channels} channels, the autoencoder's have {tokenizer.channels}. Give the one it was trained with."
        )
    sizes = [told["image_base_size"], told["video_base_size"]]
    if [len(size) if isinstance(size, list | tuple) else 0 for size in sizes] != [2, 3]:
        raise CheckpointError(
            f"{where}: config.json tells image_base_size={sizes[0]} and video_base_size={sizes[1]}: must be [h, w] and [frames, h, w] in "
            "tokens. Copy the folder again."
        )
    (h, w), (_, *places) = sizes
    if [2 * side for side in places] != [h, w]:
        raise CheckpointError(
            f"{where}: a picture of {h} x {w} tokens and a prefix of {places} places; here it has one for every 2 x 2 tokens."
        )
    rotary = bool(told.get("rotary_pos_embed", False))
    if rotary == ("video_pos_embed.norm.weight" in shapes):
        holds = "holds no" if not rotary else "holds"
        raise CheckpointError(f"{where}: config.json says rotary_pos_embed={rotary}, and the file {holds} `video_pos_embed`.")
    if told.get("video_mixer_rank"):
        raise CheckpointError(f"{where}: video_mixer_rank={told['video_mixer_rank']}: a mixer of frames is made for videos. Give another.")
    heads = heads or HEADS.get(width)
    if heads is None:
        raise CheckpointError(
            f"{where}: width {width} is of no released size ({', '.join(map(str, HEADS))}), and no weight tells the heads. Give `heads`."
        )
    depths = [count(shapes, rf"{part}\.blocks\.(\d+)\.") for part in ("video_encoder", "image_encoder", "image_decoder")]
    captions = NOVAConfig().captions
    try:
        return NOVAConfig(
            prefix=ViTConfig(depth=depths[0], width=shapes[video][0], heads=heads),
            encoder=ViTConfig(depth=depths[1], width=width, heads=heads),
            head=NOVAHeadConfig(depth=depths[2], width=shapes[inner][0], drawn=drawn),
            grid=(h, w),
            rotary=rotary,
            motion="motion_embed.fps_proj.0.weight" in shapes,
            captions=replace(captions, tokens=told["text_token_len"], width=shapes["text_embed.weight"][1]),
            tokenizer=replace(tokenizer, fold=fold),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def sampler_config(told: Mapping[str, Any], where: str) -> AncestralConfig | FlowConfig:
    """Of a scheduler_config.json; what it does not tell is as diffusers has it. `clip_sample` is not heeded, nor does NOVA's own
    scheduler heed it: latents go far beyond 1."""
    kind = told.get("_class_name")
    settled: dict[str, Any] = {"num_train_timesteps": TRAINED}
    if kind == "DDPMScheduler":
        settled |= {"prediction_type": "epsilon", "variance_type": "fixed_small", "thresholding": False, "rescale_betas_zero_snr": False}
        settled |= {"trained_betas": None}
    elif kind == "FlowMatchEulerDiscreteScheduler":
        settled |= {"use_dynamic_shifting": False}
    else:
        raise CheckpointError(f"{where}: {kind!r} is no scheduler of a NOVA. They are DDPMScheduler and FlowMatchEulerDiscreteScheduler.")
    if other := [f"{name}={told[name]!r}" for name, value in settled.items() if told.get(name, value) != value]:
        raise CheckpointError(
            f"{where}: {', '.join(other)}: every released NOVA has {', '.join(f'{n}={v!r}' for n, v in settled.items())}."
        )
    try:
        if kind == "FlowMatchEulerDiscreteScheduler":
            return FlowConfig(shift=float(told.get("shift", 1.0)))
        schedule, spacing = told.get("beta_schedule", "linear"), told.get("timestep_spacing", "leading")
        if schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2") or spacing not in ("leading", "trailing", "linspace"):
            raise CheckpointError(f"{where}: beta_schedule={schedule!r}, timestep_spacing={spacing!r}: one of them is not known here.")
        return AncestralConfig(
            beta_schedule=schedule,
            beta_start=told.get("beta_start", 1e-4),
            beta_end=told.get("beta_end", 0.02),
            timestep_spacing=spacing,
            steps_offset=told.get("steps_offset", 0),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def refuse_other_autoencoders(told: Mapping[str, Any], where: str) -> None:
    if told.get("_class_name") != "AutoencoderKL":
        raise CheckpointError(
            f"{where}: {told.get('_class_name')!r} is not read; pictures need an AutoencoderKL. Give a model for pictures."
        )


def tokenizer_config(shapes: Shapes, where: str, *, scale: float | None, shift: float | None = None) -> KLConfig:
    """The config that diffusers' KL autoencoder weights of these shapes were made with, one cell to a token. No weight tells the scale."""
    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    outputs = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(max(levels, 1))]
    expect(shapes, ("encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight", *outputs), "a KL autoencoder", where)
    if scale is None:
        raise CheckpointError(f"{where}: config.json does not tell scaling_factor. Copy the folder again.")
    width = shapes["encoder.conv_in.weight"][0]
    return KLConfig(
        channels=shapes["post_quant_conv.weight"][1],
        width=width,
        multipliers=tuple(shapes[name][0] // width for name in outputs),
        blocks=count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
        levels_attend=False,
        shift=shift or 0.0,
        scale=scale,
    )


# ---- weights --------------------------------------------------------------------------------------------------------------------------


def diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's `state` with the names that diffusers now gives its attention, whose weights become convolutions."""
    old = re.compile(rf"(\.attentions\.0\.)({'|'.join(OLD_NAMES)})\.")
    named = {old.sub(lambda part: f"{part[1]}{OLD_NAMES[part[2]]}.", name): tensor for name, tensor in state.items()}
    return {name: tensor[..., None, None] if ".to_" in name and tensor.ndim == 2 else tensor for name, tensor in named.items()}


def fill_tokenizer(kl: KL, state: Mapping[str, Tensor], where: str) -> None:
    """`kl` with a `state` of `diffusers_names`. What does not fit is listed under these."""
    fill_from_parts(kl, state, {ours: released_names(ours, len(kl.config.multipliers)) for ours in kl.state_dict()}, where)


def released_names(ours: str, levels: int) -> tuple[str, ...]:
    """diffusers' names of the equal parts of one of the autoencoder's tensors. Its decoder counts from the smallest pictures."""
    name = re.sub(r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets.", ours)
    name = re.sub(r"\bup\.(\d+)\.", lambda level: f"up_blocks.{levels - 1 - int(level[1])}.", name)
    name = re.sub(r"\b(up_blocks\.\d+)\.block\.", r"\1.resnets.", name)
    name = re.sub(r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.", name)
    name = re.sub(r"\b(up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0.", name)
    name = re.sub(r"\bmid\.block_(\d)\.", lambda block: f"mid_block.resnets.{int(block[1]) - 1}.", name)
    name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    name = name.replace("mid.attn_1.norm.", "mid_block.attentions.0.group_norm.").replace(
        "mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."
    )
    if ".qkv." in name:
        return tuple(name.replace("mid.attn_1.qkv.", f"mid_block.attentions.0.to_{part}.") for part in "qkv")
    return (name,)
