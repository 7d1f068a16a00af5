"""VAR's cases: tokenizer and transformer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varl.checkpoints.folder import Shapes
from varl.checkpoints.var import SCHEDULES, fill_tokenizer, fill_transformer, tokenizer_config, transformer_config
from varl.config import (
    LawConfig,
    NextScaleConfig,
    TokenizerConfig,
    var_guidance,
)
from varl.errors import CheckpointError, ConfigError
from varl.eval.parity.case import Case, exponential_draw, tokenizer_case
from varl.models.next_scale import NextScale
from varl.policies.next_scale import NextScalePolicy
from varl.policies.sampling import guide, smooth_weights, token_law, token_scores
from varl.rng import Stream
from varl.tokenizers.multiscale_vq import Grid, MultiScaleVQ
from varl.types import Prompt


def results(case: Case) -> dict[str, Tensor]:
    if "vocab_size" in case.config:
        return _tokenizer(case)
    if "vae" in case.config:
        return _transformer(case)
    raise ConfigError(f"{case.file}: config has neither vocab_size (a tokenizer) nor vae (a transformer).")


def fit(shapes: Shapes, where: str) -> None:
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if "pos_1LC" not in shapes:
            fill_tokenizer(MultiScaleVQ(tokenizer_config(shapes, where), SCHEDULES[680]), state, where)
        elif shapes["pos_1LC"][1] not in SCHEDULES:
            raise CheckpointError(f"{where}: {shapes['pos_1LC'][1]} tokens are of no released schedule; those have {[*SCHEDULES]}.")
        else:
            config = transformer_config(shapes, SCHEDULES[shapes["pos_1LC"][1]], TokenizerConfig(), where)
            fill_transformer(NextScale(config), state, where)


def _grids(config: dict[str, Any]) -> tuple[Grid, ...]:
    return tuple((side, side) if isinstance(side, int) else (side[0], side[1]) for side in config["patch_nums"])


def _vq(case: Case, grids: Sequence[Grid]) -> MultiScaleVQ:
    config = case.config
    vq = MultiScaleVQ(
        TokenizerConfig(
            vocab=config["vocab_size"],
            channels=config["z_channels"],
            width=config["ch"],
            multipliers=tuple(config["ch_mult"]),
            blocks=config["num_res_blocks"],
            shared_phi=config["share_quant_resi"],
            phi_ratio=float(config["quant_resi"]),
        ),
        grids,
    ).eval()
    fill_tokenizer(vq, case.part("sd."), str(case.file))
    return vq


def _tokenizer(case: Case) -> dict[str, Tensor]:
    vq, given = _vq(case, _grids(case.config)), case.part("in.")
    results = {}
    if "image" in given:
        f = vq.features(given["image"])
        ids, sums, _ = vq.residual_codes(f)
        reconstruction, loss, _, _ = vq(given["image"])
        results |= {
            "f": f,
            "idx": ids,
            "fhat_scales": torch.stack(sums, 1),
            "var_input": vq.inputs(ids),
            "embed_to_fhat": vq.f_hat(ids),
            "reconstruction": vq.render(vq.f_hat(ids)).clamp(-1, 1),
            "forward_reconstruction": reconstruction,
            "forward_vq_loss": loss,
        }
    if "random_idx" in given:
        sums = vq.partial_sums([vq.quantize.embedding(part) for part in vq.split(given["random_idx"])])
        image = vq.render(sums[-1])
        results |= {
            "random_fhat": sums[-1],
            "random_image_unclamped": image,
            "random_image": image.clamp(-1, 1),
            "random_image_scales": torch.stack([vq.render(f_hat).clamp(-1, 1) for f_hat in sums], 1),
        }
    return results


def _transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    if config.get("norm_eps", 1e-6) != 1e-6:
        raise ConfigError(f"{case.file}: norm_eps={config['norm_eps']}; every released VAR has 1e-6, and so has ours.")
    owner = tokenizer_case(case)
    vq = _vq(owner, _grids(config if "patch_nums" in config else owner.config))
    model = NextScale(
        NextScaleConfig(
            depth=config["depth"],
            width=config["embed_dim"],
            heads=config["num_heads"],
            grids=vq.grids,
            mlp_ratio=float(config.get("mlp_ratio", 4)),
            shared_adaln=config.get("shared_aln", False),
            attn_l2_norm=config.get("attn_l2_norm", True),
            num_classes=config["num_classes"],
            tokenizer=vq.config,
        )
    ).eval()
    fill_transformer(model, case.part("sd."), str(case.file))
    results = {}
    if "idx" in given:
        results |= _teacher_forced(model, vq, given["labels"], given["idx"])
    for cfg in config.get("cfgs", ()):
        results |= {f"greedy_cfg{cfg}_{name}": tensor for name, tensor in _greedy(model, vq, given["labels"], cfg).items()}
    for number, settings in enumerate(config.get("samples", ())):
        draws = case.draws(f"sample{number}")
        sampled = _sampled(model, vq, given["labels"], settings, draws)
        results |= {f"sample{number}_{name}": tensor for name, tensor in sampled.items()}
    if config.get("smooth") is not None:
        smooth = _smooth(model, vq, given["labels"], config["smooth"], case.draws("smooth"))
        results |= {f"smooth_{name}": tensor for name, tensor in smooth.items()}
    return results


def _teacher_forced(model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], ids: Int[Tensor, "B L"]) -> dict[str, Tensor]:
    hidden: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: hidden.append(call[-1])) for block in model.blocks]
    inputs, condition = vq.inputs(ids), model.condition(labels)
    logits = model.logits(model(condition, inputs), condition)
    for hook in hooks:
        hook.remove()
    none = model.condition(torch.full_like(labels, model.class_emb.num_embeddings - 1))
    chosen, _ = token_scores(token_law(logits, None, LawConfig(), 1.0), ids)
    return {
        "var_input": inputs,
        **{f"hidden{i}": h for i, h in enumerate(hidden)},
        "logits": logits,
        "logits_uncond": model.logits(model(none, inputs), none),
        "token_logprob": chosen,
        "loss": -chosen.mean(),
    }


Pick = Callable[[int, Float[Tensor, "B n V"]], tuple[Int[Tensor, "B n"], Float[Tensor, "B n C"]]]
"""From a scale and its guided logits to ids, and the code vectors to go on with."""


def _decode(
    model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], cfg: float, pick: Pick
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L V"], Float[Tensor, "B C h w"]]:
    """Ids, guided logits and f_hat of a cached decode that draws as `pick` says."""
    batch, guidance = len(labels), var_guidance(cfg, len(vq.grids))
    none = torch.full_like(labels, model.class_emb.num_embeddings - 1)
    condition, cache = model.condition(torch.cat([labels, none])), model.cache(2 * batch)
    f_hat = torch.zeros(batch, vq.config.channels, *vq.grids[-1])
    ids, seen = [], []
    for scale in range(len(vq.grids)):
        inputs = vq.quantize.next_input(f_hat, scale).repeat(2, 1, 1) if scale else None
        both = model.logits(model.step(condition, inputs, scale, cache), condition)
        logits = guide(both[:batch], both[batch:], guidance[scale])
        chosen, codes = pick(scale, logits)
        f_hat = f_hat + vq.quantize.contribution(codes, scale)
        ids.append(chosen)
        seen.append(logits)
    return torch.cat(ids, 1), torch.cat(seen, 1), f_hat


def _picture(vq: MultiScaleVQ, f_hat: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
    return vq.render(f_hat).clamp(-1, 1).add(1).div(2)


def _greedy(model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], cfg: float) -> dict[str, Tensor]:
    """Ids and picture come from the policy itself, the logits and f_hat on the way from a decode of the same tokens."""
    law = LawConfig(cfg_scale=var_guidance(cfg, len(vq.grids)), top_k=1)
    policy = NextScalePolicy(model, vq, sample_law=law, score_law=law)
    rollout = policy.rollout([Prompt(label=label) for label in labels.tolist()], Stream(seed=0, rows=tuple(range(len(labels)))))
    parts = vq.split(rollout.actions)
    _, logits, f_hat = _decode(model, vq, labels, cfg, lambda scale, _: (parts[scale], vq.quantize.embedding(parts[scale])))
    return {
        "idx": rollout.actions,
        "logits": logits,
        "fhat": f_hat,
        "image_unclamped": vq.render(f_hat),
        "image": policy.decode(rollout),
    }


def _law(settings: Mapping[str, Any]) -> LawConfig:
    """VAR says 0 where top-p keeps all."""
    return LawConfig(top_k=settings["top_k"], top_p=float(settings["top_p"]) or 1.0)


def _sampled(
    model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], settings: Mapping[str, Any], draws: Iterator[Tensor]
) -> dict[str, Tensor]:
    law = _law(settings)

    def pick(scale: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = exponential_draw(token_law(logits, None, law, 1.0), next(draws))
        return ids, vq.quantize.embedding(ids)

    ids, _, f_hat = _decode(model, vq, labels, settings["cfg"], pick)
    return {"idx": ids, "image": _picture(vq, f_hat)}


def _smooth(
    model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], settings: Mapping[str, Any], draws: Iterator[Tensor]
) -> dict[str, Tensor]:
    """VAR's `more_smooth`: the decode goes on with Gumbel-softmax mixtures of codes, colder from scale to scale, over the filtered logits;
    the ids that it draws too are not used."""
    law, last, mixtures = _law(settings), max(len(vq.grids) - 1, 1), []

    def pick(scale: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        logp, ratio = token_law(logits, None, law, 1.0), scale / last
        ids = exponential_draw(logp, next(draws))
        gumbel = -next(draws).log().view_as(logp)
        mixtures.append(smooth_weights(logp, gumbel, ratio) @ vq.quantize.embedding.weight)
        return ids, mixtures[-1]

    ids, _, f_hat = _decode(model, vq, labels, settings["cfg"], pick)
    return {"idx": ids, "h": torch.cat(mixtures, 1), "image": _picture(vq, f_hat)}
