"""MAR's cases: autoencoder, transformer with diffusion head."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varl.checkpoints import mar
from varl.checkpoints.folder import Shapes, strict_load
from varl.config import (
    DiffusionHeadConfig,
    KLConfig,
    MARConfig,
    ViTConfig,
    mar_guidance,
    settled_counts,
)
from varl.errors import ConfigError
from varl.eval.parity.case import Case
from varl.models.diffusion_head import (
    STEPS,
    DiffusionHead,
    Process,
    drawn,
    evenly,
    guided,
    log_density,
    noise_loss,
    noised,
    respaced,
    reverse_step,
    sinusoid,
    variance_loss,
)
from varl.models.harmon import Harmon
from varl.models.mar import MAR, known, masked
from varl.tokenizers.kl import KL


def results(case: Case) -> dict[str, Tensor]:
    if "embed_dim" in case.config:
        return _tokenizer(case)
    if "enc" in case.config:
        return _transformer(case)
    raise ConfigError(f"{case.file}: config has neither embed_dim (an autoencoder) nor enc (a transformer).")


def fit(shapes: Shapes, where: str) -> None:
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if "z_proj.weight" in shapes:
            strict_load(MAR(mar.transformer_config(shapes, KLConfig(), where)), state, where)
        else:
            mar.fill_tokenizer(KL(mar.tokenizer_config(shapes, where)), state, where)


def _tokenizer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    sizes = KLConfig(
        channels=config["embed_dim"], width=config["ch"], multipliers=tuple(config["ch_mult"]), blocks=config["num_res_blocks"]
    )
    kl = KL(sizes).eval()
    mar.fill_tokenizer(kl, case.part("sd."), str(case.file))
    posterior = kl.encode(given["image"])
    return {
        "moments": kl.quant_conv(kl.encoder(given["image"])),
        "mean": posterior.mean,
        "logvar": posterior.log_variance,
        "sample": posterior.draw(next(case.draws("sample"))),
        "kl": posterior.kl(),
        "decode": kl.decode(given["z"]),
    }


def _transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    if config["patch_size"] != 1:
        raise ConfigError(f"{case.file}: patch_size={config['patch_size']}; every released MAR has 1, and so has ours.")
    side = config["img_size"] // config["vae_stride"]
    encoder, decoder = (ViTConfig(width=width, depth=depth, heads=heads) for width, depth, heads in (config["enc"], config["dec"]))
    model = MAR(
        MARConfig(
            encoder=encoder,
            decoder=decoder,
            head=DiffusionHeadConfig(depth=config["diffloss_d"], width=config["diffloss_w"]),
            grid=(side, side),
            num_classes=config["class_num"],
            buffer=config["buffer_size"],
            tokenizer=KLConfig(channels=config["vae_embed_dim"], width=1, multipliers=(1,), blocks=0, attention=False, scale=1.0),
        )
    ).eval()
    strict_load(model, case.part("sd."), str(case.file))
    kl, full = KL(model.config.tokenizer), respaced(range(STEPS))
    tokens, missing = kl.tokens(given["latent"]), masked(given["orders"], config["n_mask"])
    seen, nothing = known(missing, model.tokens - config["n_mask"]), torch.full_like(given["labels"], config["class_num"])
    condition = model.condition(given["labels"])
    z = model(condition, tokens, seen)
    results = {
        "tokens": tokens,
        "unpatchified": kl.maps(tokens, model.config.grid),
        "mask": missing.float(),
        "encoder": model.encode(condition, tokens, seen),
        "decoder": z,
        "decoder_uncond": model(model.condition(nothing), tokens, seen),
        "decoder_allmasked": model(condition, torch.zeros_like(tokens), seen[:, :0]),
        "time_embedding": sinusoid(given["t"]),
        "net": model.head(given["x_t"], given["t"], given["cond"]),
        "net_cfg": _output(model.head, given["x_t"], given["t"], given["cond"], 2.5),
        **_tables("train_diffusion", full),
        **_tables("gen_diffusion", _process(config["num_sampling_steps"])),
        **_losses(case, model, full, z, tokens, missing),
        **_steps(case, model),
    }
    for number, settings in enumerate(config["runs"]):
        found = _generated(model, given["labels"], settings, config["num_sampling_steps"], case.draws(f"gen{number}"))
        results |= {f"gen{number}{name}": tensor for name, tensor in found.items()}
    return results


def _process(steps: str) -> Process:
    """MAR says "ddimN" for N steps at an equal stride from 0."""
    return respaced(range(0, STEPS, STEPS // int(steps[4:])) if steps.startswith("ddim") else evenly(int(steps)))


def _tables(name: str, process: Process) -> dict[str, Tensor]:
    return {
        f"{name}_timestep_map": process.timesteps,
        f"{name}_betas": process.betas,
        f"{name}_alphas_cumprod": process.signal.square(),
        f"{name}_posterior_log_variance_clipped": process.log_variances,
        f"{name}_posterior_mean_coef1": process.mean_of_start,
        f"{name}_posterior_mean_coef2": process.mean_of_x,
        f"{name}_sqrt_recip_alphas_cumprod": process.start_of_x,
        f"{name}_sqrt_recipm1_alphas_cumprod": process.start_of_eps,
    }


def _output(
    head: DiffusionHead, x: Float[Tensor, "n C"], timesteps: Int[Tensor, " n"], z: Float[Tensor, "n D"], cfg: float
) -> Float[Tensor, "n out"]:
    """Of the network; guided unless cfg is 1. Then the second half of z stands for no class, the second half of x is not read, and both
    halves have the guided eps."""
    if cfg == 1.0:
        return head(x, timesteps, z)
    cond, uncond = head(x[: len(x) // 2].repeat(2, 1), timesteps, z).chunk(2)
    both = guided(cond, uncond, cfg)
    return torch.cat([both, torch.cat([both.chunk(2, 1)[0], uncond.chunk(2, 1)[1]], 1)])


def _losses(
    case: Case, model: MAR, full: Process, z: Float[Tensor, "B L D"], tokens: Float[Tensor, "B L C"], missing: Bool[Tensor, "B L"]
) -> dict[str, Tensor]:
    given = case.part("in.")
    mse, vb = _terms(model.head, full, given["x_0"], given["t_loss"], given["cond"], given["noise"])
    return {
        "q_sample": noised(full, given["x_0"], given["noise"], given["t_loss"]),
        "loss_terms_mse": mse,
        "loss_terms_vb": vb,
        "loss_terms_loss": mse + vb,
        "forward_loss": loss(model.head, z, tokens, missing, case.config["batch_mul"], case.draws("forward_loss")),
    }


def loss(
    head: DiffusionHead,
    z: Float[Tensor, "B L D"],
    tokens: Float[Tensor, "B L C"],
    missing: Bool[Tensor, "B L"],
    repeat: int,
    draws: Iterator[Tensor],
) -> Float[Tensor, ""]:
    """What MAR is trained on: mean over the missing tokens, each noised `repeat` times."""
    full, t, noise = respaced(range(STEPS)), next(draws), next(draws)
    x_0, z = tokens.repeat(repeat, 1, 1).flatten(0, 1), z.repeat(repeat, 1, 1).flatten(0, 1)
    mse, vb = _terms(head, full, x_0, t, z, noise)
    weight = missing.repeat(repeat, 1).flatten().float()
    return ((mse + vb) * weight).sum() / weight.sum()


def _terms(head: DiffusionHead, full: Process, x_0: Tensor, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    x_t = noised(full, x_0, noise, t)
    out = head(x_t, t, z)
    return noise_loss(out, noise), variance_loss(full, out, x_0, x_t, t)


def _steps(case: Case, model: MAR) -> dict[str, Tensor]:
    """Each step by itself, and whole chains."""
    config, given, results = case.config, case.part("in."), {}
    for steps in (config["num_sampling_steps"], *config["other_steps"]):
        process, name = _process(steps), f"steps{steps}"
        every = torch.arange(len(process))[:, None].expand(-1, len(given["x_t"]))
        x, z = (given[part].expand(len(process), -1, -1) for part in ("x_t", "cond"))
        mean, log_variance = reverse_step(process, model.head(x, process.timesteps[every], z), x, every)
        scale = mean.abs().amax((1, 2))
        results |= {**_tables(name, process), f"{name}_mean": mean / scale[:, None, None], f"{name}_mean_scale": scale}
        results |= {f"{name}_logvar": log_variance}
    process, z = _process(config["num_sampling_steps"]), given["cond"]
    plain, _, _ = _chain(model.head, process, z, case.draws("loop"))
    both, _, _ = _chain(model.head, process, z, case.draws("loop_cfg"), cfg=3.0, temperature=0.9)
    path, density, std = _chain(model.head, process, z, case.draws("logp"), temperature=0.8)
    long, _, _ = _chain(model.head, _process("100"), z, case.draws("loop100"))
    return results | {
        "loop": plain[-1],
        "loop_trajectory": plain,
        "loop_cfg": both[-1],
        "loop_cfg_trajectory": both,
        "logp_prev": path,
        "logp_logprob": density,
        "logp_std": std,
        "loop100": long[-1],
    }


def _chain(
    head: DiffusionHead, process: Process, z: Float[Tensor, "n D"], draws: Iterator[Tensor], cfg: float = 1.0, temperature: float = 1.0
) -> tuple[Float[Tensor, "N n C"], Float[Tensor, "N n C"], Float[Tensor, "N n C"]]:
    """x after every step, its log-density and standard deviation, from the last step to the first. Guided, both halves go on from the same
    beginning, each with noise of its own, as the authors' do. At the first step noise is drawn, and not added."""
    x = next(draws)
    x = x if cfg == 1.0 else x.repeat(2, 1)
    path, density, std = [], [], []
    for index in reversed(range(len(process))):
        t = torch.full((len(x),), index)
        mean, log_variance = reverse_step(process, _output(head, x, process.timesteps[t], z, cfg), x, t)
        noise = next(draws)
        x = drawn(mean, log_variance, noise, temperature) if index else mean
        path.append(x)
        density.append(log_density(x, mean, log_variance, temperature))
        std.append(temperature * (0.5 * log_variance).exp())
    return torch.stack(path), torch.stack(density), torch.stack(std)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Pictures that were drawn, and what was on the way, at each of n steps."""

    tokens: Float[Tensor, "B L C"]
    missing: Bool[Tensor, "n B L"]
    """Before the step."""
    z: Float[Tensor, "n B L D"]
    scales: tuple[float, ...]


def generated(
    model: MAR | Harmon,
    condition: Any,
    nothing: Any,
    order: Int[Tensor, "B L"],
    settings: Mapping[str, Any],
    denoising: str,
    draws: Iterator[Tensor],
) -> Generated:
    """Token sets along a recorded order; of the two halves of a guided chain, the first is the picture's."""
    count, steps, process = model.tokens, settings["num_iter"], _process(denoising)
    ramp = mar_guidance(settings["cfg"], count, steps)
    scales = ramp if settings["cfg_schedule"] == "linear" else (settings["cfg"],) * steps
    tokens = torch.zeros(len(order), count, model.config.tokenizer.channels)
    missing, masks, latents = masked(order, count), [], []
    ends = accumulate(settled_counts(count, steps), initial=0)
    for cfg, (before, settled) in zip(scales, pairwise(ends), strict=True):
        masks.append(missing)
        seen, after = known(missing, before), masked(order, count - settled)
        latents.append(model(condition, tokens, seen))
        now = missing & ~after
        z = latents[-1][now]
        if settings["cfg"] != 1.0:
            z = torch.cat([z, model(nothing, tokens, seen)[now]])
        path, _, _ = _chain(model.head, process, z, draws, cfg, settings["temperature"])
        tokens[now] = path[-1][: int(now.sum())]
        missing = after
    return Generated(tokens=tokens, missing=torch.stack(masks), z=torch.stack(latents), scales=tuple(scales))


def _generated(
    model: MAR, labels: Int[Tensor, " B"], settings: Mapping[str, Any], denoising: str, draws: Iterator[Tensor]
) -> dict[str, Tensor]:
    order = torch.stack([next(draws) for _ in labels])
    condition = model.condition(labels)
    nothing = model.condition(torch.full_like(labels, model.config.num_classes))
    found = generated(model, condition, nothing, order, settings, denoising, draws)
    return {
        "": KL(model.config.tokenizer).maps(found.tokens, model.config.grid),
        "_masks": found.missing.float(),
        "_z": found.z,
        "_cfg": torch.tensor(found.scales),
    }
