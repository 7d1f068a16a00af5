"""NOVA's cases: autoencoder, transformer with diffusion head, moves of the flow sampler. The authors draw flows without noise."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varl.checkpoints import nova
from varl.checkpoints.folder import Shapes, strict_load
from varl.config import AncestralConfig, CaptionConfig, FlowConfig, KLConfig, NOVAConfig, NOVAHeadConfig, ViTConfig
from varl.errors import ConfigError
from varl.eval.parity.case import Case
from varl.models.diffusion_head import drawn, log_density, posterior_mean, predicted_start
from varl.models.flow import LEVELS, flow_levels, flow_move, shifted
from varl.models.nova import NOVA, FlowChain, ancestral
from varl.tokenizers.kl import KL, folded, unfolded

RELEASED = NOVAConfig().tokenizer
SEEN, SHOWN = 5, slice(5, 9)
"""How many tokens of the recorded order are known in the cases, and which the head is then asked for."""
REPEATS = 4
"""Noises of each token in the authors' loss."""


def results(case: Case) -> dict[str, Tensor]:
    for mark, recipe in (("block_out_channels", _tokenizer), ("image_base_size", _transformer), ("shape", _moves)):
        if mark in case.config:
            return recipe(case)
    raise ConfigError(f"{case.file}: config is neither an autoencoder's, nor a transformer's, nor a sampler's.")


def fit(shapes: Shapes, where: str) -> None:
    """A key list tells no picture's size and no sampler, on which no weight depends."""
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if "mask_embed.mask_token" in shapes:
            rotary = "video_pos_embed.norm.weight" not in shapes
            told = {"image_base_size": (2, 2), "video_base_size": (1, 1, 1), "text_token_len": 1, "rotary_pos_embed": rotary}
            strict_load(NOVA(nova.transformer_config(shapes, told, RELEASED, AncestralConfig(), where)), state, where)
        else:
            state = nova.diffusers_names(state)
            sizes = nova.tokenizer_config({name: tuple(tensor.shape) for name, tensor in state.items()}, where, scale=RELEASED.scale)
            nova.fill_tokenizer(KL(sizes), state, where)


# ---- autoencoder ----------------------------------------------------------------------------------------------------------------------


def _tokenizer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    widths = config["block_out_channels"]
    kl = KL(
        KLConfig(
            channels=config["latent_channels"],
            width=widths[0],
            multipliers=tuple(width // widths[0] for width in widths),
            blocks=config["layers_per_block"],
            levels_attend=False,
            scale=config["scaling_factor"],
            shift=config["shift_factor"] or 0.0,
        )
    ).eval()
    nova.fill_tokenizer(kl, nova.diffusers_names(case.part("sd.")), str(case.file))
    posterior = kl.encode(given["image"])
    sample = posterior.draw(next(case.draws("sample")))
    return {
        "moments": kl.quant_conv(kl.encoder(given["image"])),
        "mean": posterior.mean,
        "logvar": posterior.log_variance,
        "sample": sample,
        "scaled": kl.scaled(sample),
        "unscaled": kl.unscaled(given["z"]),
        "decode": kl.decode(given["z"]),
    }


# ---- transformer ----------------------------------------------------------------------------------------------------------------------


def _transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    video, picture = (ViTConfig(depth=depth, width=width, heads=heads) for depth, width, heads in (config["venc"], config["ienc"]))
    model = NOVA(
        NOVAConfig(
            prefix=video,
            encoder=picture,
            head=NOVAHeadConfig(depth=config["idec"][0], width=config["idec"][1], drawn=FlowConfig(shift=config["shift"])),
            grid=tuple(config["image_base_size"]),
            rotary=config["rotary"],
            captions=CaptionConfig(tokens=config["text_token_len"], width=config["text_token_dim"]),
            tokenizer=KLConfig(channels=config["image_dim"], width=1, multipliers=(1,), blocks=0, attention=False, scale=1.0, fold=2),
        )
    ).eval()
    strict_load(model, case.part("sd."), str(case.file))
    captions = [features[:length] for features, length in zip(given["text_features"], config["lens"], strict=True)]
    batch, order = len(captions), given["order"]
    nothing = [features[:0] for features in captions]
    features = model.text_embed.filled([*captions, *nothing])
    condition, none = model.condition(captions), model.condition(nothing)
    tokens, x_t, known = folded(given["latent"], 2), folded(given["x_t"], 2), order[:, :SEEN]
    mask = torch.ones(batch, model.tokens, 1).scatter(1, known[..., None], 0.0)
    z = model(condition, tokens, known)
    out = model.head(x_t, given["t"][:, None].expand(-1, model.tokens), z)
    shown = torch.zeros_like(mask).scatter(1, order[:, SHOWN, None], 1.0).bool()
    found = {
        "prompt_embeds": features,
        "text_embed": model.text_embed(features),
        "video_patches": model.video_encoder.patch_embed(folded(given["latent"], 4)),
        "video_in": model.opening().expand(batch, -1, -1),
        "video_out": condition,
        "image_patches": model.image_encoder.patch_embed(tokens),
        "mask": mask,
        "image_out": z,
        "patchified": tokens,
        "decoder": out,
        "decoder_pred_ids": torch.where(shown, out, x_t),
        "loss": _loss(model, tokens, z, mask, config["shift"], case.draws("loss")),
    }
    for number, settings in enumerate(config["runs"]):
        generated = _generated(model, condition, none, settings, case.draws(f"gen{number}"))
        found |= {f"gen{number}{name}": tensor for name, tensor in generated.items()}
    return found | (_ancestral(model, config["ddpm"], x_t, z, shown, case.draws("ddpm")) if config["ddpm"] else {})


def _loss(
    model: NOVA,
    tokens: Float[Tensor, "B L d"],
    z: Float[Tensor, "B L D"],
    mask: Float[Tensor, "B L 1"],
    shift: float,
    draws: Iterator[Tensor],
) -> Float[Tensor, ""]:
    """Mean over the masked tokens of (velocity - (noise - x))^2, at a level that the sigmoid of a normal number chooses."""
    noise, choice = next(draws), next(draws)
    level = shifted((LEVELS - (LEVELS * choice.sigmoid()).long()) / LEVELS, shift)
    tokens, z, weight = (tensor.repeat(REPEATS, 1, 1) for tensor in (tokens, z, mask))
    x = level[..., None] * noise + (1 - level[..., None]) * tokens
    error = (model.head(x, LEVELS * level, z) - (noise - tokens)).square().mean(-1, keepdim=True)
    return (error * weight).sum() / (weight.sum() + 1e-5)


def _generated(
    model: NOVA, condition: Float[Tensor, "B p D"], none: Float[Tensor, "B p D"], settings: Mapping[str, Any], draws: Iterator[Tensor]
) -> dict[str, Tensor]:
    """Sets of tokens along recorded orders, each without noise: x + v (following - level). Guidance is left out below `guidance_trunc`."""
    chain, scale, trunc = model.denoiser(settings["diff"]), settings["guidance_scale"], settings.get("guidance_trunc", 0.0)
    assert isinstance(chain, FlowChain)
    order, counts = next(draws).argsort(1)[..., 0], model.schedule(settings["steps"])
    tokens, latents = torch.zeros(len(order), model.tokens, model.channels), []
    for known, now in _sets(order, counts):
        asked, unasked = model(condition, tokens, known), model(none, tokens, known)
        latents.append(torch.cat([asked, unasked]) if scale > 1 else asked)
        x = folded(next(draws), 2)[_at(now)]
        read, unread = chain.read(asked[_at(now)]), chain.read(unasked[_at(now)])
        for move, (level, following) in enumerate(pairwise(chain.levels.tolist())):
            guidance = torch.full((len(x), 1), scale if level * LEVELS >= trunc else 1.0)
            x = x + chain.says(x, torch.full((len(x),), move), read, unread, guidance) * (following - level)
        tokens[_at(now)] = x
    return {
        "_sigmas": chain.levels,
        "_timesteps": LEVELS * chain.levels[:-1].float(),
        "_num_preds": torch.tensor(counts),
        "_pred_ids": order[..., None],
        "_z0": latents[0],
        "_zlast": latents[-1],
        "": unfolded(tokens, model.config.grid, 2),
    }


def _sets(order: Int[Tensor, "B L"], counts: Sequence[int]) -> Iterator[tuple[Int[Tensor, "B n"], Int[Tensor, "B m"]]]:
    """The places that are known before each step, and those that it settles."""
    done = 0
    for count in counts:
        yield order[:, :done], order[:, done : done + count]
        done += count


def _at(places: Int[Tensor, "B n"]) -> tuple[Tensor, Tensor]:
    """The index of these places' rows, picture by picture."""
    return torch.arange(len(places)).repeat_interleave(places.shape[1]), places.flatten()


def _ancestral(
    model: NOVA, settings: Mapping[str, Any], x: Float[Tensor, "B L d"], z: Float[Tensor, "B L D"], shown: Tensor, draws: Iterator[Tensor]
) -> dict[str, Tensor]:
    """A chain of steps. Of the tokens that the head is not asked for the authors take x itself for the noise in it."""
    if settings["prediction_type"] != "epsilon":
        raise ConfigError(f"prediction_type={settings['prediction_type']!r}: every released NOVA that draws so says the noise.")
    process = ancestral(AncestralConfig(beta_schedule=settings["beta_schedule"]), settings["steps"])
    for step in reversed(range(len(process))):
        t = torch.full(x.shape[:2], step)
        eps = torch.where(shown, model.head(x, process.timesteps[t], z), x)
        mean = posterior_mean(process, predicted_start(process, x, eps, t), x, t)
        log_variance = process.log_variances[t].float()[..., None].expand_as(mean)
        x = drawn(mean, log_variance, folded(next(draws), 2)) if step else mean
    return {"ddpm_timesteps": process.timesteps.flip(0), "ddpm_denoise": x}


# ---- moves of the flow sampler --------------------------------------------------------------------------------------------------------


def _moves(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    levels = flow_levels(config["steps"], config["shift"])
    at, index = levels.tolist(), given["step_index"].tolist()
    pairs = [flow_move(given["sample"][i], given["model_output"][i], at[k], at[k + 1], at[1]) for i, k in enumerate(index)]
    mean, std = torch.stack([mean for mean, _ in pairs]), torch.tensor([std for _, std in pairs])
    spread = std.view(-1, *[1] * (mean.dim() - 1))
    log_variance = 2 * spread.log().expand_as(mean)
    new = drawn(mean, log_variance, next(case.draws("sde")))
    return {
        "sigmas": levels.float(),
        "timesteps": LEVELS * levels[:-1].float(),
        "mean": mean,
        "std": spread,
        "prev_sample": new,
        "log_prob": log_density(new, mean, log_variance),
        "log_prob_given": log_density(given["given_prev"], mean, log_variance),
    }
