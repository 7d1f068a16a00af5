"""LlamaGen's cases: tokenizer and transformer, by class and by caption."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varl.checkpoints import llamagen
from varl.checkpoints.folder import Shapes
from varl.config import (
    CaptionConfig,
    LawConfig,
    RasterConfig,
    VQConfig,
)
from varl.errors import ConfigError
from varl.eval.parity.case import Case, exponential_draw
from varl.models.janus import Janus
from varl.models.raster import Condition, Raster, attention_mask
from varl.policies.raster import RasterPolicy, pad_left
from varl.policies.sampling import guide, token_law, token_scores
from varl.rng import Stream
from varl.tokenizers.vq import VQ
from varl.types import Prompt


def results(case: Case) -> dict[str, Tensor]:
    if "codebook_size" in case.config:
        return tokenizer_results(case)
    if "model_type" in case.config:
        return _transformer(case)
    raise ConfigError(f"{case.file}: config has neither codebook_size (a tokenizer) nor model_type (a transformer).")


def fit(shapes: Shapes, where: str) -> None:
    """Names and shapes tell nothing of the pictures' size, so any will do."""
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if "tok_embeddings.weight" in shapes:
            config = llamagen.transformer_config(shapes, (16, 16), VQConfig(), where)
            llamagen.fill_transformer(Raster(config), state, where)
        else:
            llamagen.fill_tokenizer(VQ(llamagen.tokenizer_config(shapes, where)), state, where)


def tokenizer_results(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    vq = VQ(
        VQConfig(
            vocab=config["codebook_size"],
            channels=config["codebook_embed_dim"],
            latent=config["z_channels"],
            width=config["ch"],
            multipliers=tuple(config["ch_mult"]),
            blocks=config["num_res_blocks"],
        )
    ).eval()
    llamagen.fill_tokenizer(vq, case.part("sd."), str(case.file))
    z = vq.features(given["image"])
    ids, grid = vq.encode(given["image"]), (z.shape[2], z.shape[3])
    quant, codes = vq.codes(ids, grid), vq.codes(given["codes"], grid)
    return {
        "encoder": vq.encoder(given["image"]),
        "z": z,
        "indices": ids.flatten(),
        "quant": quant,
        "decode_quant": vq.render(quant),
        "code_entry": codes,
        "decode_code": vq.render(codes),
    }


def _transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    if config.get("norm_eps", 1e-5) != 1e-5 or config.get("rope_base", 10000) != 10000:
        raise ConfigError(f"{case.file}: norm_eps and rope_base are 1e-5 and 10000 in every released LlamaGen, and so in ours.")
    side, text = math.isqrt(config["block_size"]), config["model_type"] == "t2i"
    model = Raster(
        RasterConfig(
            depth=config["n_layer"],
            width=config["dim"],
            heads=config["n_head"],
            grid=(side, side),
            mlp_width=config["ffn_hidden"],
            num_classes=None if text else config["num_classes"],
            captions=CaptionConfig(tokens=config["cls_token_num"], width=config["caption_dim"]) if text else None,
            tokenizer=VQConfig(vocab=config["vocab_size"], channels=1, latent=1, width=1, multipliers=(1,), blocks=0, attention=False),
        )
    ).eval()
    llamagen.fill_transformer(model, case.part("sd."), str(case.file))
    results = {"freqs_cis": model.turns}
    if text:
        raw, lengths = given["caption_raw"], given["caption_mask_right"].sum(1).long().tolist()
        captions = {f"caption {i}": features[:length] for i, (features, length) in enumerate(zip(raw, lengths, strict=True))}
        features, there = pad_left(list(captions.values()))
        there = torch.ones(features.shape[:2], dtype=torch.bool) if there is None else there
        condition, masked = model.condition(features), model.condition(features, there)
        uncond = model.cls_embedding.uncond_embedding.expand(len(raw), -1, -1)  # type: ignore[union-attr]
        none, asked = model.condition(uncond), [Prompt(text=text) for text in captions]
        logits = _logits(model, masked, given["idx"])
        results |= {
            "cond": features,
            "emb_masks": there.float(),
            "train_attn_mask": attention_mask(there, model.tokens),
            "logits_masked": logits,
            "loss_valid": -_logp(model, logits, given["idx"])[:1].mean(),
        }
        policy = RasterPolicy(model, _no_tokenizer(model), captions=lambda texts: [captions[text] for text in texts])
        pair = (masked, Condition(tokens=none.tokens, there=there))
    else:
        condition = model.condition(given["labels"])
        none = model.condition(torch.full_like(given["labels"], config["num_classes"]))
        asked = [Prompt(label=label) for label in given["labels"].tolist()]
        policy, pair = RasterPolicy(model, _no_tokenizer(model)), (condition, none)
    hidden: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: hidden.append(call[-1])) for block in model.layers]
    logits = _logits(model, condition, given["idx"])
    for hook in hooks:
        hook.remove()
    logp = _logp(model, logits, given["idx"])
    return results | {
        "cond_embedding": condition.tokens,
        **{f"hidden{i}": h for i, h in enumerate(hidden)},
        "logits": logits,
        "token_logprob": logp,
        "loss": -logp.mean(),
        "logits_uncond": _logits(model, none, given["idx"]),
        **_generated(case, policy, asked, pair),
    }


def _no_tokenizer(model: Raster) -> VQ:
    return VQ(model.config.tokenizer)


def _logits(model: Raster, condition: Condition, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B n V"]:
    """Of all positions, the condition's too."""
    last: list[Tensor] = []
    hook = model.layers[-1].register_forward_hook(lambda *call: last.append(call[-1]))
    model(condition, ids)
    hook.remove()
    return model.logits(last[0])


def _logp(model: Raster, logits: Float[Tensor, "B n V"], ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    return token_scores(token_law(logits[:, -model.tokens :], None, LawConfig(), 1.0), ids)[0]


def _generated(case: Case, policy: RasterPolicy, asked: Sequence[Prompt], pair: tuple[Condition, Condition]) -> dict[str, Tensor]:
    """Greedy ids come from the policy itself, the logits on the way from a decode of the same tokens; sampled ids from a decode that draws
    as recorded."""
    config, model, results = case.config, policy.module, {}

    def greedy(law: LawConfig) -> Int[Tensor, "B L"]:
        greedily = RasterPolicy(model, policy.tokenizer, captions=policy.captions, sample_law=law, score_law=law)
        return greedily.rollout(asked, Stream(seed=0, rows=tuple(range(len(asked))))).actions

    for cfg in config.get("cfgs", ()):
        ids = results[f"greedy_cfg{cfg}"] = greedy(LawConfig(cfg_scale=(cfg,), top_k=1))
        results[f"greedy_cfg{cfg}_logits"] = decode(model, pair, cfg, lambda step, _, ids=ids: ids[:, step])[1]
    if "interval" in config:  # guidance for the first token and the decode steps up to `until`
        cfg, until = config["interval"]
        scales = tuple(cfg if token <= until + 1 else 1.0 for token in range(model.tokens))
        results[f"greedy_cfg{cfg}_interval{until}"] = greedy(LawConfig(cfg_scale=scales, top_k=1))
    for number, settings in enumerate(config.get("samples", ())):
        law = LawConfig(temperature=settings["temperature"], top_k=settings["top_k"], top_p=settings["top_p"])
        draws = case.draws(f"sample{number}")

        def pick(step: int, logits: Tensor, law: LawConfig = law, draws: Iterator[Tensor] = draws) -> Tensor:
            return exponential_draw(token_law(logits, None, law, 1.0), next(draws))

        results[f"sample{number}"] = decode(model, pair, settings["cfg_scale"], pick)[0]
    return results


def decode(
    model: Raster | Janus, pair: tuple[Condition, Condition], cfg: float, pick: Callable[[int, Float[Tensor, "B V"]], Int[Tensor, " B"]]
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L V"]]:
    """Ids and guided logits of a cached decode that draws as `pick` says, from the condition and its "none"."""
    caches, ids, seen = [model.cache(condition, model.tokens) for condition in pair], [], []
    for step in range(model.tokens):
        both = [model.logits(model.step(condition, ids[-1] if ids else None, cache)) for condition, cache in zip(pair, caches, strict=True)]
        seen.append(guide(both[0][:, 0], both[1][:, 0], cfg))
        ids.append(pick(step, seen[-1]))
    return torch.stack(ids, 1), torch.stack(seen, 1)
