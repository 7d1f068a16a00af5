"""Released LlamaGen files (arXiv 2406.06525; `c2i_XL_384.pt`, `t2i_XL_stage1_256.pt`, `vq_ds16_c2i.pt`), or a training run's, as our
modules. The transformer's names are ours; the tokenizer's convolutions are named and counted in another way, and are renamed."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from varl.checkpoints.folder import Shapes, shapes_of, strict_load
from varl.checkpoints.released import ReleasedFile, count, expect, fill_from_parts, read_file
from varl.config import CaptionConfig, RasterConfig, VQConfig
from varl.errors import CheckpointError
from varl.models.raster import Raster
from varl.tokenizers.vq import VQ

SIZES: dict[str, tuple[int, int, int]] = {
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (36, 1280, 20),
    "XXL": (48, 1536, 24),
    "3B": (24, 3200, 32),
}
"""Depth, width and heads of every released transformer."""
USED = "quantize.codebook_used"
"""The codes that training last used; of no use after it."""
CAPTION = "cls_embedding.uncond_embedding"
"""The caption that stands for none, of a transformer that reads captions."""
ROTATIONS = "freqs_cis"
"""What the grid implies; some files hold it."""
WRAPPINGS = ("model", "module", "state_dict")
"""Where files hold the weights, if not at their top."""


def load_llamagen(
    path_gpt: Path | str, path_vq: Path | str, *, image_size: int | None = None, heads: int | None = None, ema: bool = False
) -> tuple[Raster, VQ]:
    """The transformer in `path_gpt` with the tokenizer in `path_vq`, in fp32 on the CPU. Files are `.pt` (flat, or a training run's, of
    which `ema` chooses the averaged weights: the transformer's must be there) or `.safetensors`. Every key is accounted for. Sizes are read
    off the weights, but for two that no weight tells: `image_size`, the side of its pictures in pixels, unless the file holds `freqs_cis`;
    and the heads of a transformer that is of no released size."""
    return llamagen_pair(read_file(Path(path_gpt)), read_file(Path(path_vq)), image_size=image_size, heads=heads, ema=ema)


def llamagen_pair(
    file_gpt: ReleasedFile, file_vq: ReleasedFile, *, image_size: int | None = None, heads: int | None = None, ema: bool = False
) -> tuple[Raster, VQ]:
    """`load_llamagen` of files that were read already."""
    path_gpt, path_vq = file_gpt.path, file_vq.path
    if ema and not isinstance(file_gpt.at("ema"), dict):
        raise CheckpointError(f"{path_gpt}: holds no averaged weights (`ema`). Leave `ema` (--ema) out.")
    gpt, vq = unwrapped(file_gpt, ema), unwrapped(file_vq, ema)
    tokenizer = tokenizer_config(shapes_of(vq), str(path_vq))
    if image_size is not None and (image_size < tokenizer.stride or image_size % tokenizer.stride):
        raise CheckpointError(
            f"image_size={image_size}: the tokenizer in {path_vq} makes one token of {tokenizer.stride} x {tokenizer.stride} pixels. "
            "Give the side of the pictures that the transformer was trained on, 256, 384 or 512."
        )
    side = side_of(shapes_of(gpt), str(path_gpt)) if image_size is None else image_size // tokenizer.stride
    config = transformer_config(shapes_of(gpt), (side, side), tokenizer, str(path_gpt), heads)
    if config.tokenizer.vocab != tokenizer.vocab:
        raise CheckpointError(
            f"{path_gpt} was trained with a tokenizer of {config.tokenizer.vocab} codes, {path_vq} has {tokenizer.vocab}. "
            "Give the tokenizer that it was trained with."
        )
    model, module = Raster.unfilled(config), VQ(tokenizer)
    fill_transformer(model, gpt, str(path_gpt))
    fill_tokenizer(module, vq, str(path_vq))
    return model, module


def unwrapped(file: ReleasedFile, ema: bool = False) -> dict[str, Tensor]:
    """A file's weights, the averaged ones if `ema` and there are any, without the prefix that wrappers of modules put before every name."""
    state = file.weights(*(("ema", *WRAPPINGS) if ema else (*WRAPPINGS, "ema")))
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


# ---- sizes ----------------------------------------------------------------------------------------------------------------------------


def released(size: str, *, image_size: int, text: bool = False) -> RasterConfig:
    """The config of a released transformer with VQ-16: class-conditional, or reading captions. Raises CheckpointError for a size that was
    never released."""
    if size not in SIZES:
        raise CheckpointError(f"LlamaGen's sizes are {', '.join(SIZES)}, there is no {size!r}.")
    (depth, width, heads), side = SIZES[size], image_size // VQConfig().stride
    config = RasterConfig(depth=depth, width=width, heads=heads, grid=(side, side), num_classes=1000)
    return replace(config, num_classes=None, captions=CaptionConfig()) if text else config


def transformer_config(shapes: Shapes, grid: tuple[int, int], tokenizer: VQConfig, where: str, heads: int | None = None) -> RasterConfig:
    """The config that LlamaGen weights of these shapes were made with, for pictures of `grid`; its tokenizer is the one that is given, with
    as many codes as the head has."""
    caption, label = CAPTION, "cls_embedding.embedding_table.weight"
    hidden = "layers.0.feed_forward.w1.weight"
    expect(
        shapes, ("tok_embeddings.weight", "output.weight", hidden, caption if caption in shapes else label), "a LlamaGen transformer", where
    )
    vocab, width = shapes["output.weight"]
    depth = count(shapes, r"layers\.(\d+)\.")
    heads = heads or next((h for d, w, h in SIZES.values() if (d, w) == (depth, width)), None)
    if heads is None:
        raise CheckpointError(
            f"{where}: {depth} layers of width {width} are of no released size ({', '.join(SIZES)}), and no weight tells the heads. "
            "Give `heads` (--heads)."
        )
    config = RasterConfig(
        depth=depth,
        width=width,
        heads=heads,
        grid=grid,
        num_classes=None if caption in shapes else shapes[label][0] - 1,
        captions=CaptionConfig(tokens=shapes[caption][0], width=shapes[caption][1]) if caption in shapes else None,
        tokenizer=replace(tokenizer, vocab=vocab),
    )
    return config if config.hidden == shapes[hidden][0] else replace(config, mlp_width=shapes[hidden][0])


def side_of(shapes: Shapes, where: str) -> int:
    """Tokens along a side of the pictures that the transformer was trained on, which `freqs_cis` counts where the file holds it."""
    if ROTATIONS not in shapes:
        raise CheckpointError(
            f"{where}: no weight tells the size of its pictures. Give `image_size` (--image-size), the side in pixels: 384 for "
            "c2i_XL_384.pt, 256 for t2i_XL_stage1_256.pt."
        )
    tokens = shapes[ROTATIONS][0] - (shapes[CAPTION][0] if CAPTION in shapes else 1)
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side**2 != tokens:
        raise CheckpointError(
            f"{where}: `{ROTATIONS}` has shape {list(shapes[ROTATIONS])}, so pictures of {tokens} tokens, which are no square. The file is "
            "damaged, or of another model."
        )
    return side


def tokenizer_config(shapes: Shapes, where: str) -> VQConfig:
    """The config that LlamaGen tokenizer weights of these shapes were made with."""
    levels = count(shapes, r"encoder\.conv_blocks\.(\d+)\.")
    outputs = [f"encoder.conv_blocks.{i}.res.0.conv1.weight" for i in range(max(levels, 1))]
    expect(shapes, ("encoder.conv_in.weight", "quantize.embedding.weight", "quant_conv.weight", *outputs), "a LlamaGen tokenizer", where)
    vocab, channels = shapes["quantize.embedding.weight"]
    width = shapes["encoder.conv_in.weight"][0]
    return VQConfig(
        vocab=vocab,
        channels=channels,
        latent=shapes["quant_conv.weight"][1],
        width=width,
        multipliers=tuple(shapes[name][0] // width for name in outputs),
        blocks=count(shapes, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        attention="encoder.mid.1.q.weight" in shapes,
    )


# ---- weights --------------------------------------------------------------------------------------------------------------------------


def fill_transformer(model: Raster, state: Mapping[str, Tensor], where: str) -> None:
    """`model` with LlamaGen's transformer `state`. On the meta device names and shapes are checked, values are not."""
    positions, due = state.get(ROTATIONS), tuple(model.turns.shape)
    if positions is not None and tuple(positions.shape) != due:
        raise CheckpointError(
            f"{where}: `{ROTATIONS}` has shape {list(positions.shape)}, where {list(due)} is due for {model.prefix} + {model.tokens} "
            "tokens. The weights were made for pictures of another size, or with other heads."
        )
    strict_load(model, {name: tensor for name, tensor in state.items() if name != ROTATIONS}, where)


def fill_tokenizer(vq: VQ, state: Mapping[str, Tensor], where: str) -> None:
    """`vq` with LlamaGen's tokenizer `state`. What does not fit is listed under LlamaGen's names."""
    theirs = {name: tensor for name, tensor in state.items() if name != USED}
    fill_from_parts(vq, theirs, {ours: released_names(ours, len(vq.config.multipliers)) for ours in vq.state_dict()}, where)


def released_names(ours: str, levels: int) -> tuple[str, ...]:
    """What LlamaGen calls a tensor of our tokenizer; three names where we keep q, k and v as one. Its decoder counts its levels from the
    smallest pictures, ours from the largest."""
    name = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", ours)
    name = re.sub(r"^decoder\.up\.(\d+)", lambda level: f"decoder.conv_blocks.{levels - 1 - int(level[1])}", name)
    name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
    for place, part in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{part}.", f".mid.{place}.")
    return tuple(name.replace(".qkv.", f".{part}.") for part in "qkv") if ".qkv." in name else (name,)
