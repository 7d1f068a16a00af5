"""Infinity's cases: tokenizer and transformer."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from varl.checkpoints.folder import Shapes
from varl.checkpoints.infinity import fill_tokenizer, fill_transformer, tokenizer_config, transformer_config
from varl.config import BSQConfig, CaptionConfig, InfinityConfig, LawConfig, infinity_grids
from varl.errors import ConfigError
from varl.eval.parity.case import Case, exponential_draw, tokenizer_case
from varl.models.infinity import CaptionAttention, Condition, Infinity
from varl.policies.infinity import InfinityPolicy
from varl.policies.raster import pad_left
from varl.policies.sampling import guide, token_law, token_scores
from varl.rng import Stream
from varl.tokenizers.bsq import BSQ, Grid
from varl.types import Prompt


def results(case: Case) -> dict[str, Tensor]:
    if "codebook_dim" in case.config:
        return _tokenizer(case)
    if "vae" in case.config:
        return _transformer(case)
    raise ConfigError(f"{case.file}: config has neither codebook_dim (a tokenizer) nor vae (a transformer).")


def fit(shapes: Shapes, where: str) -> None:
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if "word_embed.weight" in shapes:
            bits = BSQConfig(channels=shapes["word_embed.weight"][1])
            fill_transformer(Infinity(transformer_config(shapes, bits, where, grids=infinity_grids())), state, where)
        else:
            fill_tokenizer(BSQ(tokenizer_config(shapes, where), infinity_grids()), state, where)


# ---- tokenizer --------------------------------------------------------------------------------------------------------------------------


def _bsq(case: Case, grids: Sequence[Grid], cells: int = 1) -> BSQ:
    config = case.config
    sizes = BSQConfig(channels=config["codebook_dim"], width=config["base_ch"], multipliers=tuple(config["ch_mult"]), cells=cells)
    bsq = BSQ(sizes, grids).eval()
    fill_tokenizer(bsq, case.part("sd."), str(case.file))
    return bsq


def _tokenizer(case: Case) -> dict[str, Tensor]:
    given = case.part("in.")
    bsq = _bsq(case, [(side, side) for side in case.config["scales"]])
    several = _bsq(case, [(side // 2, side // 2) for side in (2 * s for s in case.config["patchify_scales"])], cells=2)
    h = bsq.features(given["image"])
    bits, sums = bsq.residual_bits(h)
    picture, drawn = bsq.render(sums[-1]), bsq.f_hat(given["random_bits"])
    results = {
        "h": h,
        "z": sums[-1],
        "bits": bits,
        "quantizer_var_input": _by_area(bsq, sums),
        "residual_norm": _small(bsq, h, sums),
        "decode": picture.clamp(-1, 1),
        "decode_unclamped": picture,
        "codes_last": bsq.codes(bsq.split(given["random_bits"])[-1], -1)[:, :, None],
        "summed_codes": drawn[:, :, None],
        "random_image": bsq.render(drawn).clamp(-1, 1),
    }
    for name, vq, f in (("bsc", bsq, h), ("bsc_patchify", several, given["raw_patchify"])):
        for layers in (0, 2):
            truth, seen = vq.residual_bits(f, _flips(vq, case.draws(f"{name}_noise{layers}"), layers))
            results |= {f"{name}_gt_noise{layers}": truth, f"{name}_input_noise{layers}": vq.inputs_of(seen)}
    return results


def _by_area(bsq: BSQ, sums: Sequence[Float[Tensor, "B C h w"]]) -> Float[Tensor, "B m d"]:
    """What the authors' quantizer itself gives as inputs, and nobody trains on."""
    later = zip(sums[:-1], bsq.maps[1:], strict=True)
    return torch.cat([bsq.tokens(F.interpolate(f_hat, size=size, mode="area")) for f_hat, size in later], 1)


def _small(bsq: BSQ, f: Float[Tensor, "B C h w"], sums: Sequence[Float[Tensor, "B C h w"]]) -> Float[Tensor, " S"]:
    """Share of a scale's residuals below a twentieth of a code's component."""
    rests = zip([f, *(f - f_hat for f_hat in sums[:-1])], bsq.maps, strict=True)
    small = [F.interpolate(rest, size=size, mode="area").abs() < 0.05 / bsq.config.channels**0.5 for rest, size in rests]
    return torch.stack([part.float().mean() for part in small])


def _flips(bsq: BSQ, draws: Iterator[Tensor], scales: int) -> Callable[[int], Tensor | None]:
    """Bits turned round in the first `scales` scales, each with a probability in hundredths that is drawn too."""

    def flip(scale: int) -> Tensor | None:
        if scale >= scales:
            return None
        share = int(next(draws)) * 0.01
        return bsq.tokens((next(draws)[:, 0].permute(0, 3, 1, 2) < share).float()).bool()

    return flip


# ---- transformer ------------------------------------------------------------------------------------------------------------------------


def _transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    expected = {"norm_eps": 1e-6, "rope2d_normalized_by_hw": 2, "add_lvl_embeding_only_first_block": 1, "patchify": 0}
    if other := [f"{name}={config[name]}" for name, want in expected.items() if config[name] != want]:
        raise ConfigError(f"{case.file}: {', '.join(other)}; every released Infinity that this can be compared with has another.")
    grids = tuple((h, w) for _, h, w in config["schedule"])
    bsq = _bsq(tokenizer_case(case), grids)
    model = Infinity(
        InfinityConfig(
            depth=config["depth"],
            width=config["embed_dim"],
            heads=config["num_heads"],
            chunks=config["block_chunks"],
            mlp_width=config["mlp_hidden"],
            grids=grids,
            reach=infinity_grids("1M", config["h_div_w"])[-1],
            captions=CaptionConfig(tokens=config["text_maxlen"], width=config["text_channels"], lowercase=False),
            tokenizer=bsq.config,
        )
    ).eval()
    fill_transformer(model, case.part("sd."), str(case.file))
    captions = given["text"].split(config["lens"])
    results = _teacher_forced(model, captions, given["x_BLC_wo_prefix"], given["bits"])
    results["cu_seqlens"] = torch.tensor([0, *accumulate(config["lens"])])
    for number, settings in enumerate(config["greedy"]):
        greedy = _greedy(model, bsq, captions, settings)
        results |= {f"greedy{number}_{name}": tensor for name, tensor in greedy.items()}
    for number, settings in enumerate(config["samples"]):
        law, draws = LawConfig(temperature=settings["tau"], top_k=settings["top_k"], top_p=settings["top_p"]), case.draws(f"sample{number}")

        def pick(scale: int, logits: Tensor, law: LawConfig = law, draws: Iterator[Tensor] = draws) -> Tensor:
            return exponential_draw(token_law(logits, None, law, 1.0), next(draws))

        bits, _, f_hat = _decode(model, bsq, captions, settings, pick)
        results |= {f"sample{number}_bits": bits, f"sample{number}_codes": f_hat}
    return results


def _teacher_forced(
    model: Infinity, captions: Sequence[Float[Tensor, "_ C"]], inputs: Float[Tensor, "B m d"], bits: Int[Tensor, "B L d"]
) -> dict[str, Tensor]:
    hidden: list[Tensor] = []
    hooks = [model.blocks[i].register_forward_hook(lambda *call: hidden.append(call[-1])) for i in (0, -1)]
    condition = model.condition(*pad_left(captions))
    logits = model.logits(model(condition, inputs), condition)
    for hook in hooks:
        hook.remove()
    chosen, _ = token_scores(token_law(logits, None, LawConfig(), 1.0), bits.flatten(1))
    return {
        "rope": model.turns.permute(2, 0, 1),
        "cond_BD": condition.pooled,
        "ca_kv": model.text_proj_for_ca(model.text_norm(torch.cat(tuple(captions)))),
        "gss": condition.block_modulation,
        "hidden0": hidden[0][:, :64],
        "hidden3": hidden[1][:, :64],
        "logits": logits.view(*bits.shape[:2], -1),
        "logits_bf16_crossattn": _rounded_logits(model, captions, inputs).view(*bits.shape[:2], -1),
        "bit_ce": -chosen.view(bits.shape),
        "loss": -chosen.mean(),
    }


def _rounded_logits(model: Infinity, captions: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """As the authors run it: what attention over the caption is given, and what it gives, is rounded to bf16."""
    rounded = copy.deepcopy(model)

    def rounding(part: CaptionAttention) -> Callable[..., Tensor]:
        def attend(q: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
            q, k, v = (tensor.bfloat16().float() for tensor in (q, *memory))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).bfloat16().float()
            return part.proj(out.transpose(1, 2).flatten(2))

        return attend

    for part in rounded.modules():
        if isinstance(part, CaptionAttention):
            part.attend = rounding(part)
    condition = rounded.condition(*pad_left(captions))
    return rounded.logits(rounded(condition, inputs), condition)


Pick = Callable[[int, Float[Tensor, "B m 2"]], Int[Tensor, "B m"]]
"""From a scale and its guided logits to its bits."""


def _both(model: Infinity, captions: Sequence[Tensor]) -> Condition:
    """The captions, then the "none" of each."""
    return model.condition(*pad_left([*captions, *(model.none(len(caption)) for caption in captions)]))


def _decode(
    model: Infinity, bsq: BSQ, captions: Sequence[Tensor], settings: Mapping[str, Any], pick: Pick
) -> tuple[Int[Tensor, "B L d"], Float[Tensor, "B L d 2"], Float[Tensor, "B C h w"]]:
    """Bits, guided logits and f_hat of a cached decode that draws as `pick` says. Guidance mixes the logits, or what comes out of the block
    that is counted from the end, with which both halves go on."""
    batch, cfg, (place,) = len(captions), settings["cfg"], settings["cfg_insertion_layer"]

    def mixed(block: Any, given: Any, out: Tensor) -> Tensor:
        return guide(out[:batch], out[batch:], cfg).repeat(2, 1, 1)

    hook = model.blocks[place].register_forward_hook(mixed) if place else None
    condition, cache = _both(model, captions), model.cache(2 * batch)
    f_hat = torch.zeros(batch, bsq.config.channels, *bsq.maps[-1])
    bits, seen = [], []
    for scale in range(len(bsq.grids)):
        inputs = bsq.next_input(f_hat, scale).repeat(2, 1, 1) if scale else None
        both = model.logits(model.step(condition, inputs, scale, cache), condition)
        logits = both[:batch] if place else guide(both[:batch], both[batch:], cfg)
        bits.append(pick(scale, logits).unflatten(1, (-1, bsq.config.bits)))
        seen.append(logits.unflatten(1, (-1, bsq.config.bits)))
        f_hat = f_hat + bsq.contribution(bits[-1], scale)
    if hook is not None:
        hook.remove()
    return torch.cat(bits, 1), torch.cat(seen, 1), f_hat


def _greedy(model: Infinity, bsq: BSQ, captions: Sequence[Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where guidance mixes logits, bits and picture come from the policy itself."""
    bits, logits, f_hat = _decode(model, bsq, captions, settings, lambda scale, logits: logits.argmax(-1))
    picture = bsq.render(f_hat)
    if settings["cfg_insertion_layer"] == [0]:
        law = LawConfig(cfg_scale=(settings["cfg"],), temperature=settings["tau"], top_k=1)
        named = {f"caption {i}": caption for i, caption in enumerate(captions)}
        policy = InfinityPolicy(model, bsq, captions=lambda texts: [named[text] for text in texts], sample_law=law, score_law=law)
        rollout = policy.rollout([Prompt(text=name) for name in named], Stream(seed=0, rows=tuple(range(len(named)))))
        bits, picture = rollout.actions, policy.render(rollout)
    decoded = picture.clamp(-1, 1)
    return {
        "bits": bits,
        "logits": logits / settings["tau"],
        "codes": f_hat,
        "decoded": decoded,
        "image": ((decoded + 1) / 2).permute(0, 2, 3, 1).mul(255).to(torch.uint8).flip(-1),
    }
