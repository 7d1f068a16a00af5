"""Janus-Pro's cases: tokenizer, and transformer with its generation side."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from varl.checkpoints import janus, llamagen
from varl.checkpoints.folder import Shapes, require_fit, shapes_of
from varl.checkpoints.hugging_face import transformers
from varl.checkpoints.released import count, expect
from varl.config import (
    LawConfig,
    VQConfig,
)
from varl.errors import ConfigError
from varl.eval.parity.case import Case, exponential_draw
from varl.eval.parity.llamagen import decode, tokenizer_results
from varl.models.janus import Janus
from varl.policies.raster import RasterPolicy
from varl.policies.sampling import token_law
from varl.rng import Stream
from varl.tokenizers.vq import VQ
from varl.types import Prompt

NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "gen_embed.": "model.generation_embeddings.",
    "gen_aligner.layers.0.": "model.generation_aligner.fc1.",
    "gen_aligner.layers.2.": "model.generation_aligner.hidden_layers.0.",
    "gen_head.output_mlp_projector.": "model.generation_head.proj_out.",
    "gen_head.vision_head.": "model.generation_head.vision_head.",
}
"""DeepSeek's beginnings of names, and those of `transformers`, for what draws pictures, and the head that draws words."""

TOKENIZER, SIGHT = "gen_vision_model.", ("vision_model.", "aligner.")


def results(case: Case) -> dict[str, Tensor]:
    if "codebook_size" in case.config:  # the same module as LlamaGen's
        return tokenizer_results(case)
    if "image_token_size" in case.config:
        return _transformer(case)
    raise ConfigError(f"{case.file}: config has neither codebook_size (a tokenizer) nor image_token_size (a transformer).")


def fit(shapes: Shapes, where: str) -> None:
    """What understands pictures is left as `transformers` has it, so its names are not compared."""
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items() if not name.startswith(SIGHT)}
    tokenizer = {name.removeprefix(TOKENIZER): tensor for name, tensor in state.items() if name.startswith(TOKENIZER)}
    drawing = {name: tensor for name, tensor in state.items() if not name.startswith(TOKENIZER)}
    read, made, hidden = "gen_embed.weight", "gen_head.vision_head.weight", "language_model.model.layers.0.mlp.gate_proj.weight"
    words = "language_model.model.embed_tokens.weight"
    expect(shapes, (read, made, hidden, words), "a Janus-Pro", where)
    with torch.device("meta"):
        config = llamagen.tokenizer_config({name: tuple(tensor.shape) for name, tensor in tokenizer.items()}, where)
        llamagen.fill_tokenizer(VQ(config), tokenizer, where)
        whole = _whole(
            vocab=shapes[words][0],
            hidden=shapes[words][1],
            inter=shapes[hidden][0],
            layers=count(shapes, r"language_model\.model\.layers\.(\d+)\."),
            heads=shapes[words][1] // 128,  # as released; no weight tells
            codes=shapes[made][0],
            code_width=shapes[read][1],
            head=shapes[made][1],
            side=24,
        )
        _fill(whole, drawing, where)


def _whole(
    *, vocab: int, hidden: int, inter: int, layers: int, heads: int, codes: int, code_width: int, head: int, side: int, theta: float = 1e4
) -> Any:
    """A `JanusForConditionalGeneration` that draws pictures of side x side tokens through a head of inner width `head`; its eyes and its
    tokenizer are as small as can be."""
    package = transformers()
    text = package.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    sight = package.JanusVisionConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16 * side, projection_dim=hidden
    )
    tokenizer = package.JanusVQVAEConfig(
        embed_dim=code_width,
        num_embeddings=codes,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1],
        num_res_blocks=1,
        projection_dim=hidden,
        image_token_embed_dim=hidden,
    )
    config = package.JanusConfig(text_config=text, vision_config=sight, vq_config=tokenizer, tie_word_embeddings=False)
    whole = package.JanusForConditionalGeneration(config)
    tokenizer.projection_dim = head
    whole.model.generation_head = type(whole.model.generation_head)(tokenizer)
    return whole.eval()


def _fill(whole: Any, state: Mapping[str, Tensor], where: str) -> None:
    """What draws pictures, and the head that draws words, from a state dict under DeepSeek's names."""
    named = {}
    for theirs, tensor in state.items():
        start = next((start for start in NAMES if theirs.startswith(start)), "")
        named[NAMES.get(start, "") + theirs.removeprefix(start)] = tensor
    own = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith(tuple(NAMES.values()))}
    require_fit(shapes_of(named), shapes_of(own), type(whole).__name__, where)
    whole.load_state_dict(named, strict=False)


def _transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    if config.get("rms_norm_eps", 1e-6) != 1e-6 or config["kv_heads"] != config["heads"]:
        raise ConfigError(f"{case.file}: rms_norm_eps is 1e-6 and kv_heads are heads in every released Janus-Pro.")
    whole = _whole(
        vocab=config["vocab"],
        hidden=config["hidden"],
        inter=config["inter"],
        layers=config["layers"],
        heads=config["heads"],
        codes=config["image_token_size"],
        code_width=config["n_embed"],
        head=config["image_token_embed"],
        side=math.isqrt(config["n_tokens"]),
        theta=config["theta"],
    )
    _fill(whole, case.part("sd."), str(case.file))
    prompt, copies = given["prompt"], config["parallel"]
    no_tokenizer = VQConfig(vocab=config["image_token_size"], channels=1, latent=1, width=1, multipliers=(1,), blocks=0, attention=False)
    marks = {"bos": int(prompt[0]), "boi": int(prompt[-1]), "pad": config["pad_id"]}
    model = Janus(whole, None, janus.config_of(whole.config, no_tokenizer, **marks)).eval()
    both = torch.stack([prompt, model.none(len(prompt))]).repeat(copies, 1)
    condition = model.condition(both)
    pair = condition.rows(slice(0, None, 2)), condition.rows(slice(1, None, 2))
    forced = model(condition, given["forced"].repeat_interleave(2, 0))
    results = {
        "gen_embeds": model.embed(given["image_ids"]),
        "gen_logits": model.logits(given["hidden"]),
        "tokens": both,
        "prefill_hidden": model.language_model(inputs_embeds=condition.tokens, use_cache=False).last_hidden_state,
        "forced_logits": model.logits(forced),
    }
    for cfg in config["greedy"]:
        law = LawConfig(cfg_scale=(cfg,), top_k=1)
        policy = RasterPolicy(model, VQ(no_tokenizer), captions=lambda texts: [prompt for _ in texts], sample_law=law, score_law=law)
        ids = policy.rollout([Prompt(text="prompt")] * copies, Stream(seed=0, rows=tuple(range(copies)))).actions
        results[f"greedy_cfg{cfg}"] = ids
        results[f"greedy_cfg{cfg}_logits"] = decode(model, pair, cfg, lambda step, _, ids=ids: ids[:, step])[1]
    for number, settings in enumerate(config["samples"]):
        law, draws = LawConfig(temperature=settings["temperature"]), case.draws(f"sample{number}")

        def pick(step: int, logits: Tensor, law: LawConfig = law, draws: Iterator[Tensor] = draws) -> Tensor:
            return exponential_draw(token_law(logits, None, law, 1.0), next(draws))

        results[f"sample{number}"] = decode(model, pair, settings["cfg"], pick)[0]
    return results
