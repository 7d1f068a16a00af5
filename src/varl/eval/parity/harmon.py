"""Harmon's case: MAR with a language model, from captions to pictures."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from varl.checkpoints import harmon
from varl.checkpoints.folder import Shapes, shapes_of
from varl.checkpoints.released import count, expect
from varl.errors import ConfigError
from varl.eval.parity.case import Case, tokenizer_case
from varl.eval.parity.mar import generated, loss
from varl.models.harmon import Harmon
from varl.models.mar import known, masked
from varl.tokenizers.kl import KL

HEAD_WIDTHS = {896: 64, 1536: 128}
"""Of a released language model, by its width; no weight tells."""
PAD = 3
"""What the recorded captions are padded with. Nothing reads it."""


def fit(shapes: Shapes, where: str) -> None:
    read, hidden, key = harmon.EMBEDDING, "llm.model.layers.0.mlp.gate_proj.weight", "llm.model.layers.0.self_attn.k_proj.weight"
    expect(shapes, (read, hidden, key), "a Harmon", where)
    vocab, width = shapes[read]
    if width not in HEAD_WIDTHS:
        raise ConfigError(f"{where}: a language model of width {width} is of no released Harmon; those have {[*HEAD_WIDTHS]}.")
    qwen = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": shapes[hidden][0],
        "num_hidden_layers": count(shapes, r"llm\.model\.layers\.(\d+)\."),
        "num_attention_heads": width // HEAD_WIDTHS[width],
        "num_key_value_heads": shapes[key][0] // HEAD_WIDTHS[width],
        "tie_word_embeddings": True,
    }
    harmon.empty(shapes, qwen, None, where)


def results(case: Case) -> dict[str, Tensor]:
    if "llm" not in case.config:
        raise ConfigError(f"{case.file}: config has no llm (a language model).")
    config, given, (model, kl) = case.config, case.part("in."), _pair(case)
    ids, tokens = given["input_ids"], given["latent"].flatten(1, 2)
    captions = [row[:length] for row, length in zip(ids, config["lens"], strict=True)]
    missing = masked(given["orders"].flip(1), model.tokens - config["n_visible"])
    seen, condition = known(missing, config["n_visible"]), model.condition(captions)
    sight, encoded = model.see(tokens, seen), model.encode(condition, tokens, seen)
    z = model(condition, tokens, seen)
    oblong, _ = _pair(case, (3, 5))
    found = {
        "attention_mask": condition.there,
        "mask": missing.float(),
        "visual_x_enc": sight,
        "visual_z_enc": model.proj_in(sight).roll(-config["buffer_size"], 1),
        "x_enc": encoded,
        "z": z,
        "loss": loss(model.head, z, tokens, missing, config["batch_mul"], case.draws("loss")),
        "pos_embed_enc_3x5": oblong.mar.positions(oblong.mar.encoder_pos_embed_learned),
        "pos_embed_diff_3x5": oblong.mar.positions(oblong.mar.diffusion_pos_embed_learned),
        "encode": (kl.encode(given["image"]).mean * kl.config.scale).permute(0, 2, 3, 1),
    }
    for number, settings in enumerate(config["runs"]):
        drawn = _drawn(case, captions, settings, number)
        found |= {f"gen{number}_{name}": tensor for name, tensor in drawn.items()}
    return found


def _pair(case: Case, grid: tuple[int, int] = (4, 4)) -> tuple[Harmon, KL]:
    config, text = case.config, dict(case.config["llm"])
    qwen = text | {"tie_word_embeddings": text.pop("tie"), "rms_norm_eps": config["rms_norm_eps"], "rope_theta": config["rope_theta"]}
    state = case.part("sd.") | {harmon.VAE + name: tensor for name, tensor in tokenizer_case(case).part("sd.").items()}
    pair = harmon.empty(shapes_of(state), qwen, None, str(case.file), grid=grid, heads=config["enc"][2])
    model, kl = harmon.filled(pair, state, str(case.file))
    return model.eval(), kl.eval()


def _drawn(case: Case, captions: list[Int[Tensor, " _"]], settings: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    """The first caption twice, guided by the second if at all; then the second half of a batch is drawn as the first."""
    model, kl = _pair(case, tuple(settings["image_shape"]))
    one, none = captions
    rows, asked = 2, [one, one, none, none] if settings["cfg"] != 1.0 else [one, one]
    condition, draws = model.condition(asked), case.draws(f"gen{number}")
    order = torch.stack([next(draws) for _ in asked])[:rows]
    drawn = generated(model, condition[:rows], condition[rows:], order, settings, case.config["num_sampling_steps"], draws)
    copies = len(asked) // rows
    last = known(drawn.missing[-1], model.tokens - int(drawn.missing[-1, 0].sum())).repeat(copies, 1)
    tokens = drawn.tokens.repeat(copies, 1, 1)
    return {
        "input_ids": pad_sequence(asked, batch_first=True, padding_value=PAD),
        "attention_mask": condition.there,
        "x_enc0": model.encode(condition, tokens, last[:, :0]),
        "x_enc_last": model.encode(condition, tokens, last),
        "tokens": tokens.unflatten(1, model.config.grid),
        "image": kl.decode(kl.maps(drawn.tokens, model.config.grid)),
    }
