"""Released Infinity files (arXiv 2412.04431; `infinity_2b_reg.pth` and `infinity_vae_d32reg.pth`), or a training run's, as our modules. The
transformer's names are ours, and its key biases, which are 0, are verified and left out; the tokenizer's convolutions and norms are wrapped
once more than ours."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from varl.checkpoints.folder import Shapes, shapes_of, strict_load
from varl.checkpoints.released import ReleasedFile, count, expect, fill_from_parts, read_file
from varl.config import BSQConfig, CaptionConfig, InfinityConfig, infinity_grids
from varl.errors import CheckpointError
from varl.models.infinity import Infinity
from varl.tokenizers.bsq import BSQ

SIZES: dict[str, InfinityConfig] = {
    "2B": InfinityConfig(),
    "8B": InfinityConfig(depth=40, width=3584, heads=28, tokenizer=BSQConfig(channels=14, multipliers=(1, 2, 4, 4), cells=2)),
    "125M": InfinityConfig(depth=12, width=768, heads=8, chunks=4, grids=infinity_grids("0.06M"), tokenizer=BSQConfig(channels=16)),
}
"""The config of every released size, for square pictures of the largest size that it was trained on."""
PIXELS = {256: "0.06M", 512: "0.25M", 1024: "1M"}
"""The schedule of square pictures, by their side."""
LATEST, AVERAGED = "trainer/gpt_fsdp", "trainer/gpt_ema_fsdp"
"""Where a training run's file holds the transformer. Released files are flat."""
TOKENIZERS = ("vae", "ema")
"""Where files hold the tokenizer, if not at their top."""
SCHEDULE = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
"""What some files say of the schedule that was trained on last; as released, nobody reads it."""
MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")
"""The worth of each bit in a number, which the tokenizer saves twice."""


def load_infinity(
    path_infinity: Path | str, path_vae: Path | str, *, pixels: str = "1M", ratio: float = 1.0, ema: bool = False
) -> tuple[Infinity, BSQ]:
    """The transformer in `path_infinity` with the tokenizer in `path_vae`, in fp32 on the CPU, sizes read off the weights. Files are `.pth`
    (flat, or a training run's, of which `ema` chooses the averaged weights: they must be there) or `.safetensors`. Every key is accounted
    for. No weight tells the schedule: it is that of pictures of so many `pixels` and this height / width (`config.infinity_grids`)."""
    return infinity_pair(read_file(Path(path_infinity)), read_file(Path(path_vae)), pixels=pixels, ratio=ratio, ema=ema)


def infinity_pair(
    file_infinity: ReleasedFile, file_vae: ReleasedFile, *, pixels: str = "1M", ratio: float = 1.0, ema: bool = False
) -> tuple[Infinity, BSQ]:
    """`load_infinity` of files that were read already."""
    if ema and not isinstance(file_infinity.at(AVERAGED), dict):
        raise CheckpointError(f"{file_infinity.path}: holds no averaged weights (`{AVERAGED}`). Leave `ema` (--ema) out.")
    infinity, vae = file_infinity.weights(AVERAGED if ema else LATEST), file_vae.weights(*TOKENIZERS)
    where, where_vae = str(file_infinity.path), str(file_vae.path)
    config = transformer_config(
        shapes_of(infinity), tokenizer_config(shapes_of(vae), where_vae), where, grids=infinity_grids(pixels, ratio), ratio=ratio
    )
    model, bsq = Infinity.unfilled(config), BSQ(config.tokenizer, config.grids)
    fill_transformer(model, infinity, where)
    fill_tokenizer(bsq, vae, where_vae)
    return model, bsq


# ---- sizes ----------------------------------------------------------------------------------------------------------------------------


def released(size: str) -> InfinityConfig:
    """The config of a released transformer and its tokenizer. Raises CheckpointError for a size that was never released."""
    if size not in SIZES:
        raise CheckpointError(f"Infinity's sizes are {', '.join(SIZES)}, there is no {size!r}.")
    return SIZES[size]


def pixels_of(side: int | None) -> str:
    """Which pictures those of this side are to `config.infinity_grids`; those of a megapixel, if none is given."""
    if side is not None and side not in PIXELS:
        raise CheckpointError(f"image_size={side}: Infinity was trained on square pictures of {', '.join(map(str, PIXELS))} pixels a side.")
    return PIXELS[side or 1024]


def transformer_config(
    shapes: Shapes, tokenizer: BSQConfig, where: str, *, grids: tuple[tuple[int, int], ...], ratio: float = 1.0
) -> InfinityConfig:
    """The config that Infinity weights of these shapes were made with, for pictures of these `grids`; raises CheckpointError where its
    bits are not those of `tokenizer`, of which it may see several cells as one token."""
    first = "block_chunks.0.module.0"
    expect(
        shapes,
        ("cfg_uncond", "word_embed.weight", f"{first}.sa.scale_mul_1H11", f"{first}.ffn.fc1.weight"),
        "an Infinity transformer",
        where,
    )
    width, bits = shapes["word_embed.weight"]
    cells = math.isqrt(bits // tokenizer.channels)
    if tokenizer.channels * cells**2 != bits:
        raise CheckpointError(
            f"{where} draws tokens of {bits} bits, the tokenizer's have {tokenizer.channels}, or 4 x as many. "
            "Give the one it was trained with."
        )
    tokens, features = shapes["cfg_uncond"]
    chunks = count(shapes, r"block_chunks\.(\d+)\.")
    config = InfinityConfig(
        depth=chunks * count(shapes, r"block_chunks\.0\.module\.(\d+)\."),
        width=width,
        heads=max(shapes[f"{first}.sa.scale_mul_1H11"]),
        chunks=chunks,
        grids=grids,
        reach=infinity_grids("1M", ratio)[-1],
        captions=CaptionConfig(tokens=tokens, width=features, lowercase=False),
        tokenizer=replace(tokenizer, cells=cells),
    )
    hidden = shapes[f"{first}.ffn.fc1.weight"][0]
    return config if config.hidden == hidden else replace(config, mlp_width=hidden)


def tokenizer_config(shapes: Shapes, where: str) -> BSQConfig:
    """The config that Infinity tokenizer weights of these shapes were made with, one cell a token."""
    inner = "conv." if "encoder.conv_in.conv.weight" in shapes else ""
    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    outputs = [f"encoder.down.{i}.block.0.conv1.{inner}weight" for i in range(max(levels, 1))]
    first, last = f"encoder.conv_in.{inner}weight", f"encoder.conv_out.{inner}weight"
    expect(shapes, (first, last, MASKS[0], *outputs), "an Infinity tokenizer", where)
    width = shapes[first][0]
    return BSQConfig(
        channels=shapes[last][0],
        width=width,
        multipliers=tuple(shapes[name][0] // width for name in outputs),
        blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
    )


# ---- weights --------------------------------------------------------------------------------------------------------------------------


def implied_buffers(model: Infinity) -> dict[str, Tensor]:
    """What Infinity saves beside the weights: the bias of every attention's keys, which is 0."""
    names = [name for name, part in model.named_modules() if hasattr(part, "v_bias")]
    return {f"{name}.zero_k_bias": model.pos_start.new_zeros(model.config.width) for name in names}


def fill_transformer(model: Infinity, state: Mapping[str, Tensor], where: str) -> None:
    """`model` with Infinity's transformer `state`. On the meta device names and shapes are checked, values are not."""
    implied = implied_buffers(model)
    strict_load(model, {name: tensor for name, tensor in state.items() if name not in implied and name not in SCHEDULE}, where)
    wrong = [name for name, want in implied.items() if name not in state or not _is(state[name], want)]
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} biases of keys are missing or not {model.config.width} zeros, `{wrong[0]}` first. The file is damaged, "
            "or of another model."
        )


def fill_tokenizer(bsq: BSQ, state: Mapping[str, Tensor], where: str) -> None:
    """`bsq` with the released tokenizer's `state`, whose convolutions and norms may be wrapped. What does not fit is listed under its
    names."""
    worth = 2 ** torch.arange(bsq.config.channels, device=bsq.encoder.conv_in.weight.device).flip(0)
    if wrong := [name for name in MASKS if name in state and not _is(state[name], worth)]:
        raise CheckpointError(
            f"{where}: `{wrong[0]}` is not {bsq.config.channels} powers of two. The file is damaged, or of another model."
        )
    wrapped = "encoder.conv_in.conv.weight" in state
    names = {ours: (released_name(bsq, ours) if wrapped else ours,) for ours in bsq.state_dict()}
    fill_from_parts(bsq, {name: tensor for name, tensor in state.items() if name not in MASKS}, names, where)


def released_name(bsq: BSQ, ours: str) -> str:
    """What Infinity calls a tensor of our tokenizer."""
    module, _, tensor = ours.rpartition(".")
    return f"{module}.{'conv' if isinstance(bsq.get_submodule(module), nn.Conv2d) else 'norm'}.{tensor}"


def _is(tensor: Tensor, want: Tensor) -> bool:
    return tensor.shape == want.shape and (want.is_meta or torch.equal(tensor.to(want.dtype), want))
