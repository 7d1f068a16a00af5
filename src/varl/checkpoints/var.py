"""Released VAR files (arXiv 2404.02905; `var_d16.pth` and `vae_ch160v4096z32.pth`), or a training run's, as our modules. Their names are
ours; besides weights they hold buffers that the architecture implies, which are verified and left out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from varl.checkpoints.folder import Shapes, shapes_of, strict_load
from varl.checkpoints.released import ReleasedFile, count, expect, read_file
from varl.config import NextScaleConfig, TokenizerConfig
from varl.errors import CheckpointError
from varl.models.next_scale import NextScale
from varl.tokenizers.multiscale_vq import Grid, MultiScaleVQ

SCHEDULES: dict[int, tuple[Grid, ...]] = {
    sum(n * n for n in sides): tuple((n, n) for n in sides)
    for sides in [(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)]
}
"""The released schedules, 256 and 512 pixels, by their number of tokens."""
HEAD_WIDTH = 64
"""Channels per head of every released model."""
TRANSFORMER, TOKENIZER = "trainer/var_wo_ddp", "trainer/vae_local"
"""Where a training run's file holds them."""
HITS = "quantize.ema_vocab_hit_SV"


def load_var(path_var: Path | str, path_vae: Path | str) -> tuple[NextScale, MultiScaleVQ]:
    """The transformer in `path_var` with the tokenizer in `path_vae`, in fp32 on the CPU, sizes read off the weights. Files are `.pth`
    (flat, or a training run's, which holds both: give it twice) or `.safetensors`. Every key is accounted for. The share of phi's
    convolution is the one number that no weight tells: 0.5, as released."""
    return var_pair(read_file(Path(path_var)), read_file(Path(path_vae)))


def var_pair(file_var: ReleasedFile, file_vae: ReleasedFile) -> tuple[NextScale, MultiScaleVQ]:
    """`load_var` of files that were read already."""
    var, vae = file_var.weights(TRANSFORMER), file_vae.weights(TOKENIZER)
    path_var, path_vae = file_var.path, file_vae.path
    tokenizer = tokenizer_config(shapes_of(vae), str(path_vae))
    config = transformer_config(shapes_of(var), _grids(var, str(path_var)), tokenizer, str(path_var))
    if (tokenizer.vocab, tokenizer.channels) != (len(var["head.weight"]), var["word_embed.weight"].shape[1]):
        raise CheckpointError(
            f"{path_var} was trained with a tokenizer of {len(var['head.weight'])} codes of {var['word_embed.weight'].shape[1]} channels, "
            f"{path_vae} has {tokenizer.vocab} of {tokenizer.channels}. Give the tokenizer that it was trained with."
        )
    vq = MultiScaleVQ(tokenizer, config.grids)
    fill_tokenizer(vq, vae, str(path_vae))
    model = NextScale.unfilled(config)
    fill_transformer(model, var, str(path_var))
    return model, vq


# ---- sizes ----------------------------------------------------------------------------------------------------------------------------


def transformer_config(shapes: Shapes, grids: Sequence[Grid], tokenizer: TokenizerConfig, where: str) -> NextScaleConfig:
    """The config that VAR weights of these shapes were made with. Heads are counted in their temperatures; where there are none
    (attn_l2_norm off) they are 64 channels wide, as released."""
    expect(shapes, ("head.weight", "word_embed.weight", "class_emb.weight", "blocks.0.ffn.fc1.weight"), "a VAR transformer", where)
    vocab, width = shapes["head.weight"]
    temperatures = shapes.get("blocks.0.attn.scale_mul_1H11")
    return NextScaleConfig(
        depth=count(shapes, r"blocks\.(\d+)\."),
        width=width,
        heads=temperatures[1] if temperatures else width // HEAD_WIDTH,
        grids=tuple(grids),
        mlp_ratio=shapes["blocks.0.ffn.fc1.weight"][0] / width,
        shared_adaln="shared_ada_lin.1.weight" in shapes,
        attn_l2_norm=temperatures is not None,
        num_classes=shapes["class_emb.weight"][0] - 1,
        tokenizer=replace(tokenizer, vocab=vocab, channels=shapes["word_embed.weight"][1]),
    )


def tokenizer_config(shapes: Shapes, where: str) -> TokenizerConfig:
    """The config that VAR tokenizer weights of these shapes were made with."""
    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    outputs = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(levels, 1))]
    expect(shapes, ("encoder.conv_in.weight", "quantize.embedding.weight", *outputs), "a VAR tokenizer", where)
    vocab, channels = shapes["quantize.embedding.weight"]
    width = shapes["encoder.conv_in.weight"][0]
    shared = count(shapes, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.") or int("quantize.quant_resi.qresi.weight" in shapes)
    return TokenizerConfig(
        vocab=vocab,
        channels=channels,
        width=width,
        multipliers=tuple(shapes[name][0] // width for name in outputs),
        blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        shared_phi=shared,
        phi_ratio=0.5 if any(name.startswith("quantize.quant_resi.") for name in shapes) else 0.0,
        attention="encoder.mid.attn_1.qkv.weight" in shapes,
    )


def _grids(state: Mapping[str, Tensor], where: str) -> tuple[Grid, ...]:
    """The square grids whose tokens `lvl_1L` counts."""
    expect(shapes_of(state), ("lvl_1L", "pos_1LC"), "a VAR transformer", where)
    sizes = torch.bincount(state["lvl_1L"].flatten().long()).tolist()
    if sum(sizes) != state["pos_1LC"].shape[1] or any(math.isqrt(n) ** 2 != n or n == 0 for n in sizes):
        raise CheckpointError(
            f"{where}: `lvl_1L` counts {sizes} tokens per scale, `pos_1LC` holds {state['pos_1LC'].shape[1]} positions. VAR's grids are "
            "square and fill the positions; this file is damaged, or of another model."
        )
    return tuple((math.isqrt(n), math.isqrt(n)) for n in sizes)


# ---- weights --------------------------------------------------------------------------------------------------------------------------


def implied_buffers(model: NextScale) -> dict[str, Tensor]:
    """What VAR saves beside the weights: the scale of each token, the block-causal bias (0 where a token sees another, -inf elsewhere), and
    each block's key bias, which is 0."""
    level = model.scale_of_token
    bias = torch.zeros(len(level), len(level), device=level.device).masked_fill(level[:, None] < level, -torch.inf)
    keys = {f"blocks.{i}.attn.zero_k_bias": model.pos_start.new_zeros(model.config.width) for i in range(len(model.blocks))}
    return {"lvl_1L": level[None], "attn_bias_for_masking": bias[None, None], **keys}


def fill_transformer(model: NextScale, state: Mapping[str, Tensor], where: str) -> None:
    """`model` with VAR's transformer `state`. On the meta device names and shapes are checked, values are not."""
    implied = implied_buffers(model)
    strict_load(model, {name: tensor for name, tensor in state.items() if name not in implied}, where)
    wrong = [
        f"`{name}`" + (" is missing" if name not in state else "")
        for name, want in implied.items()
        if name not in state or state[name].shape != want.shape or not (want.is_meta or torch.equal(state[name].to(want.dtype), want))
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: buffers that are not what grids {list(model.config.grids)} imply: {', '.join(wrong)}. "
            "The weights were made for another schedule or another attention."
        )


def fill_tokenizer(vq: MultiScaleVQ, state: Mapping[str, Tensor], where: str) -> None:
    """`vq` with VAR's tokenizer `state`. Its usage counter, of any number of scales, serves training only and is left out."""
    hits = state.get(HITS)
    if hits is None or hits.ndim != 2 or hits.shape[1] != vq.config.vocab:
        found = "is missing" if hits is None else f"has shape {list(hits.shape)}"
        raise CheckpointError(f"{where}: `{HITS}` {found}, where [scales, {vq.config.vocab}] is due. This is no tokenizer file of VAR.")
    strict_load(vq, {name: tensor for name, tensor in state.items() if name != HITS}, where)
