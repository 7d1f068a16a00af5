"""A MAR from scratch (arXiv 2406.11838): a KL autoencoder, and then a transformer whose diffusion head takes noise out of the tokens that
are masked."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from varl.config import PretrainConfig
from varl.models.diffusion_head import (
    STEPS,
    DiffusionHead,
    Process,
    noise_loss,
    noised,
    respaced,
    variance_loss,
    velocity_loss,
)
from varl.models.mar import MAR, known, masked
from varl.policies.acting import class_ids
from varl.pretrain.autoencoder import AutoencoderPhase
from varl.pretrain.data import Shown, batch_index, psnr, signed
from varl.pretrain.phase import Metrics, Stateless, descend
from varl.pretrain.transformer import precision, without_prompts
from varl.rng import generator
from varl.tokenizers.kl import KL, Posterior
from varl.train.optim import build_optimizer
from varl.types import Prompt

KL_WEIGHT = 1e-3
"""Of the posterior's KL, in nats per number of the latents, beside the squared error of pixels in [-1, 1]."""
STANDARD_PICTURES = 1024
"""By whose latents all are standardised."""
MASK_STD, LEAST_MASKED = 0.25, 0.7
"""Of the share of tokens that are masked: a normal around 1, cut off there and at this."""
TIMES = 2
"""Steps of the process that each masked token is trained at, with one z; 4 in MAR, whose head is a smaller part of the work."""

# ---- the autoencoder ------------------------------------------------------------------------------------------------------------------


class LatentsPhase(AutoencoderPhase):
    """Squared error of pictures decoded from draws, and a little of the posterior's KL. At its end the latents are standardised."""

    latents = "latents"

    def __init__(self, config: PretrainConfig, kl: KL, shown: Shown, device: torch.device) -> None:
        super().__init__(config, kl, shown, device)
        self.kl = kl

    def step(self, step: int) -> Metrics:
        config = self.config
        images = signed(self.images[batch_index(len(self.images), config.tokenizer_batch, step, config.seed, "tokenizer")], self.device)
        posterior = self.kl.encode(images)
        z = drawn(posterior, generator(config.seed, "latents", step))
        error = F.mse_loss(self.kl.decode(z), images)
        nats = posterior.kl().mean() / z[0].numel()
        loss = error + KL_WEIGHT * nats
        descend(self, loss, self.kl.parameters())
        if step + 1 == self.steps:
            standardise(self.kl, *latent_moments(self.kl, self.images[:STANDARD_PICTURES], self.device))

        def metrics(loss=loss.detach(), error=error.detach(), nats=nats.detach()) -> dict[str, Any]:
            return {"pretrain/loss": float(loss), "pretrain/psnr": psnr(float(error)), "pretrain/latent_kl": float(nats)}

        return metrics


def drawn(posterior: Posterior, rng: torch.Generator) -> Float[Tensor, "B C h w"]:
    return posterior.draw(torch.randn(posterior.mean.shape, generator=rng).to(posterior.mean.device))


@torch.no_grad()
def latent_moments(kl: KL, images: UInt8[Tensor, "N 3 H W"], device: torch.device) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and standard deviation of each channel of what is drawn for the pictures: the deviation of the means, and that of the noise."""
    whole = posteriors(kl, images, device)
    mean, log_variance = (map_.transpose(0, 1).flatten(1) for map_ in (whole.mean, whole.log_variance))
    return mean.mean(1), (mean.var(1, correction=0) + log_variance.exp().mean(1)).sqrt()


@torch.no_grad()
def standardise(kl: KL, mean: Float[Tensor, " C"], std: Float[Tensor, " C"]) -> None:
    """Makes latents of these moments have mean 0 and the deviation 1 / scale, so that tokens have deviation 1, which the head expects.
    What is decoded stays as it is: the two 1x1 convolutions beside the latents change in opposite ways."""
    by, inside, outside = std * kl.config.scale, kl.quant_conv, kl.post_quant_conv
    assert inside.bias is not None
    assert outside.bias is not None
    channels = len(mean)
    inside.weight[:channels] /= by[:, None, None, None]
    inside.bias[:channels] = (inside.bias[:channels] - mean) / by
    inside.bias[channels:] -= 2 * by.log()
    outside.bias += outside.weight[:, :, 0, 0] @ mean
    outside.weight *= by[:, None, None]


# ---- transformer and head -------------------------------------------------------------------------------------------------------------


def mask_share(quantile: float) -> float:
    """The share of tokens that is masked, at this quantile (0 .. 1) of the normal N(1, 0.25^2) between 0.7 and 1."""
    least = float(torch.special.ndtr(torch.tensor((LEAST_MASKED - 1) / MASK_STD, dtype=torch.float64)))
    place = torch.tensor(least + quantile * (0.5 - least), dtype=torch.float64)
    return 1 + MASK_STD * float(torch.special.ndtri(place))


def denoising_losses(
    head: DiffusionHead,
    process: Process,
    x_0: Float[Tensor, "n C"],
    z: Float[Tensor, "n D"],
    noise: Float[Tensor, "M n C"],
    t: Int[Tensor, "M n"],
) -> Float[Tensor, "M n"]:
    """MAR's loss of each token at M steps, each with noise of its own: `noise_loss` + `variance_loss`, or `velocity_loss`."""
    every = x_0.expand_as(noise)
    x_t = noised(process, every, noise, t)
    out = head.denoise(x_t, head.time_embed(process.timesteps[t]) + head.cond_embed(z.float()))
    if head.config.target == "velocity":
        return velocity_loss(process, out, every, noise, t)
    return noise_loss(out, noise) + variance_loss(process, out, every, x_t, t)


class MaskedPhase(Stateless):
    """The tokens of all pictures are drawn anew at each step, and so is what is masked: as many in all pictures of a batch, any of them."""

    stage = "transformer"

    def __init__(self, config: PretrainConfig, model: MAR, kl: KL, shown: Shown, device: torch.device) -> None:
        self.config, self.model, self.kl, self.shown, self.device = config, model, kl, shown, device
        self.steps, self.optim = config.steps, config.optim
        self.optimizer = build_optimizer(model, config.optim)
        self.process = respaced(range(STEPS), model.config.head.least_signal).to(device)
        self.said, self.held_said = (self._read(prompts) for prompts in (shown.prompts, shown.held_prompts))

    def _read(self, prompts: Sequence[Prompt]) -> Int[Tensor, " N"]:
        return class_ids(prompts, self.model.config.num_classes).to(self.device)

    def begin(self) -> None:
        self.kl.requires_grad_(False)
        self.latents, self.held = (posteriors(self.kl, images, self.device) for images in (self.shown.images, self.shown.held_images))

    def step(self, step: int) -> Metrics:
        config = self.config
        batch = batch_index(len(self.said), config.batch, step, config.seed, "transformer")
        said = without_prompts(self.said[batch], torch.tensor(self.model.config.num_classes), config, step)
        loss = self.losses(rows(self.latents, batch), said, generator(config.seed, "masks", step)).mean()
        norm = descend(self, loss, self.model.parameters())

        def metrics(loss=loss.detach()) -> dict[str, Any]:
            return {"pretrain/loss": float(loss), "grad_norm": float(norm), "pretrain/heldout_loss": self.heldout_loss()}

        return metrics

    def losses(self, latents: Posterior, said: Int[Tensor, " b"], rng: torch.Generator) -> Float[Tensor, "M n"]:
        """Of the masked tokens, whose tokens, places, steps and noise are drawn here."""
        tokens = self.kl.tokens(drawn(latents, rng))
        order = torch.rand(tokens.shape[:2], generator=rng).argsort(1).to(self.device)
        count = math.ceil(self.model.tokens * mask_share(float(torch.rand((), generator=rng))))
        missing = masked(order, count)
        with precision(self.config, self.device):
            z = self.model(self.model.condition(said), tokens, known(missing, self.model.tokens - count))
        x_0 = tokens[missing]
        t = torch.randint(STEPS, (TIMES, len(x_0)), generator=rng).to(self.device)
        noise = torch.randn(TIMES, *x_0.shape, generator=rng).to(self.device)
        return denoising_losses(self.model.head, self.process, x_0, z[missing], noise, t)

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """With the same draws each time."""
        rng = generator(self.config.seed, "masks", "heldout")
        pieces = torch.arange(len(self.held_said)).split(64)
        losses = [self.losses(rows(self.held, piece), self.held_said[piece], rng).flatten() for piece in pieces]
        return float(torch.cat(losses).mean())


def rows(posterior: Posterior, index: Int[Tensor, " b"]) -> Posterior:
    return Posterior(mean=posterior.mean[index], log_variance=posterior.log_variance[index])


@torch.no_grad()
def posteriors(kl: KL, images: UInt8[Tensor, "N 3 H W"], device: torch.device) -> Posterior:
    parts = [kl.encode(signed(part, device)) for part in images.split(256)]
    return Posterior(mean=torch.cat([part.mean for part in parts]), log_variance=torch.cat([part.log_variance for part in parts]))
