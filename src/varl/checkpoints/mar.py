"""Released MAR files (arXiv 2406.11838; `mar_base/checkpoint-last.pth`, `kl16.ckpt`), or a training run's, as our modules. The
transformer's names are ours; the autoencoder keeps q, k and v apart, where ours are one."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from varl.checkpoints.folder import Shapes, shapes_of, strict_load
from varl.checkpoints.released import ReleasedFile, count, expect, fill_from_parts, read_file
from varl.config import DiffusionHeadConfig, KLConfig, MARConfig, ViTConfig
from varl.errors import CheckpointError
from varl.models.mar import MAR
from varl.tokenizers.kl import KL

SIZES: dict[str, tuple[int, int, int]] = {"B": (24, 768, 12), "L": (32, 1024, 16), "H": (40, 1280, 16)}
"""Depth of encoder and decoder together, width and heads of every released transformer."""
HEADS: dict[str, tuple[int, int]] = {"B": (6, 1024), "L": (8, 1280), "H": (12, 1536)}
"""Depth and width of their diffusion heads."""
AVERAGED, LATEST = "model_ema", "model"
"""Where files hold the weights, if not at their top. The authors draw with the averaged ones."""


def load_mar(path_mar: Path | str, path_kl: Path | str, *, heads: int | None = None) -> tuple[MAR, KL]:
    """The transformer in `path_mar` with the autoencoder in `path_kl`, in fp32 on the CPU. Files are `.pth` (flat, or a training run's, of
    which the averaged weights are taken) or `.safetensors`. Every key is accounted for. Sizes are read off the weights, but for `heads`, of
    encoder and decoder, of a transformer that is of no released size. The scale of the latents is the one number that no weight tells:
    0.2325, as released."""
    return mar_pair(read_file(Path(path_mar)), read_file(Path(path_kl)), heads=heads)


def mar_pair(file_mar: ReleasedFile, file_kl: ReleasedFile, *, heads: int | None = None) -> tuple[MAR, KL]:
    """`load_mar` of files that were read already."""
    mar, kl = file_mar.weights(AVERAGED, LATEST), file_kl.weights(LATEST)
    path_mar, path_kl = str(file_mar.path), str(file_kl.path)
    tokenizer = tokenizer_config(shapes_of(kl), path_kl)
    config = transformer_config(shapes_of(mar), tokenizer, path_mar, heads)
    model, module = MAR.unfilled(config), KL(tokenizer)
    strict_load(model, mar, path_mar)
    fill_tokenizer(module, kl, path_kl)
    return model, module


# ---- sizes ----------------------------------------------------------------------------------------------------------------------------


def released(size: str) -> MARConfig:
    """The config of a released transformer with KL-16, for 256 x 256 pixels. Raises CheckpointError for a size that was never released."""
    if size not in SIZES:
        raise CheckpointError(f"MAR's sizes are {', '.join(SIZES)}, there is no {size!r}.")
    (depth, width, heads), (head_depth, head_width) = SIZES[size], HEADS[size]
    half = ViTConfig(depth=depth // 2, width=width, heads=heads)
    return MARConfig(encoder=half, decoder=half, head=DiffusionHeadConfig(depth=head_depth, width=head_width))


def transformer_config(shapes: Shapes, tokenizer: KLConfig, where: str, heads: int | None = None) -> MARConfig:
    """The config that MAR weights of these shapes were made with, for square pictures; raises CheckpointError where its tokens are not
    those of `tokenizer`."""
    before, after, read = "encoder_pos_embed_learned", "diffusion_pos_embed_learned", "z_proj.weight"
    inner, labels = "diffloss.net.input_proj.weight", "class_emb.weight"
    expect(shapes, (before, after, read, inner, labels), "a MAR transformer", where)
    (width, channels), (_, places, _), (_, tokens, decoder) = shapes[read], shapes[before], shapes[after]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise CheckpointError(f"{where}: `{after}` has {tokens} places, which are no square. The file is damaged, or of another model.")
    if channels != tokenizer.channels:
        raise CheckpointError(
            f"{where} draws vectors of {channels} channels, the autoencoder's have {tokenizer.channels}. Give the one it was trained with."
        )
    depths = [count(shapes, rf"{part}_blocks\.(\d+)\.") for part in ("encoder", "decoder")]
    heads = heads or next((h for d, w, h in SIZES.values() if (d, w, w) == (sum(depths), width, decoder)), None)
    if heads is None:
        raise CheckpointError(
            f"{where}: {depths[0]} + {depths[1]} layers of width {width} and {decoder} are of no released size ({', '.join(SIZES)}), and "
            "no weight tells the heads. Give `heads` (--heads)."
        )
    return MARConfig(
        encoder=ViTConfig(depth=depths[0], width=width, heads=heads),
        decoder=ViTConfig(depth=depths[1], width=decoder, heads=heads),
        head=DiffusionHeadConfig(depth=count(shapes, r"diffloss\.net\.res_blocks\.(\d+)\."), width=shapes[inner][0]),
        grid=(side, side),
        num_classes=shapes[labels][0],
        buffer=places - tokens,
        tokenizer=tokenizer,
    )


def tokenizer_config(shapes: Shapes, where: str) -> KLConfig:
    """The config that KL autoencoder weights of these shapes were made with."""
    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    outputs = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(levels, 1))]
    expect(shapes, ("encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight", *outputs), "a KL autoencoder", where)
    width = shapes["encoder.conv_in.weight"][0]
    return KLConfig(
        channels=shapes["post_quant_conv.weight"][1],
        width=width,
        multipliers=tuple(shapes[name][0] // width for name in outputs),
        blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        attention="encoder.mid.attn_1.q.weight" in shapes,
    )


# ---- weights --------------------------------------------------------------------------------------------------------------------------


def fill_tokenizer(kl: KL, state: Mapping[str, Tensor], where: str) -> None:
    """`kl` with the released autoencoder's `state`. What does not fit is listed under its names."""
    fill_from_parts(kl, state, {ours: released_names(ours) for ours in kl.state_dict()}, where)


def released_names(ours: str) -> tuple[str, ...]:
    """Of one of the autoencoder's tensors: of the released ones that it is put together of."""
    return tuple(ours.replace(".qkv.", f".{part}.") for part in "qkv") if ".qkv." in ours else (ours,)
