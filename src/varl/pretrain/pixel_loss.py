"""VA-pi's baselines (arXiv 2512.19680, appendix C): the pixels of what a model says in the context of a real picture, by gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from varl.config import PretrainConfig
from varl.policies.sampling import draw
from varl.pretrain.data import Shown, batch_index
from varl.pretrain.family import fit_of
from varl.pretrain.phase import Metrics, Stateless, descend
from varl.pretrain.raster import RasterFamily
from varl.pretrain.transformer import Known, known, precision, without_prompts
from varl.rewards.networks import open_network
from varl.rewards.reconstruction import distances, reconstruction_value, require_network
from varl.rng import generator
from varl.train.optim import build_optimizer


def straight_through(logits: Float[Tensor, "B L V"], codes: Float[Tensor, "V C"], temperature: float) -> Float[Tensor, "B L C"]:
    """The code of the most probable token, with the gradient of the mean code under softmax(logits / temperature): VA-pi C.1. Biased: it
    is that of no law's expected loss. The release draws from a Gumbel-softmax instead, and multiplies with the stored codes, though the
    decoder knows unit vectors."""
    soft = (logits / temperature).softmax(-1)
    hard = F.one_hot(logits.argmax(-1), logits.shape[-1]).type_as(soft)
    return (hard + (soft - soft.detach())) @ codes


class PixelLossPhase(Stateless):
    def __init__(self, config: PretrainConfig, family: RasterFamily, shown: Shown, device: torch.device) -> None:
        assert config.pixel_loss is not None
        self.config, self.pixel_loss, self.family, self.shown, self.device = config, config.pixel_loss, family, shown, device
        self.stage, self.steps, self.optim = self.pixel_loss.trains, config.steps, config.optim
        self.features, self.distance = open_network(self.pixel_loss.reconstruction)
        require_network(self.pixel_loss.reconstruction, self.features)
        for part in (self.features, self.distance):
            if isinstance(part, nn.Module):
                part.to(device)
        vq = family.tokenizer
        decoder = nn.ModuleDict({"decoder": vq.decoder, "post_quant_conv": vq.post_quant_conv})
        self.trained = family.model if self.pixel_loss.trains == "transformer" else decoder
        for module in (family.model, vq):
            module.requires_grad_(False)
        self.optimizer = build_optimizer(self.trained.requires_grad_(True), config.optim)

    def begin(self) -> None:
        self.known = known(self.family, self.shown.images, self.family.read(self.shown.prompts), self.device)
        self.held = known(self.family, self.shown.held_images, self.family.read(self.shown.held_prompts), self.device)

    def step(self, step: int) -> Metrics:
        config = self.config
        batch = batch_index(len(self.known.kept), config.batch, step, config.seed, "pixels")
        said = self.known.said[batch]
        said = without_prompts(said, self.family.nothing(said), config, step)
        rng = generator(config.seed, "draws", step)
        loss, parts = self.loss(self.shown.images[batch], Known(self.known.kept[batch], said), rng)
        norm = descend(self, loss, self.trained.parameters())

        def metrics(loss=loss.detach()) -> dict[str, Any]:
            return {"pretrain/loss": float(loss), **_named("pretrain", parts), "grad_norm": float(norm), **self._heldout()}

        return metrics

    def loss(self, images: Tensor, rows: Known, rng: torch.Generator) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Minus the mean reconstruction reward, plus prior_weight times the cross-entropy of the pictures' own tokens; and what it is made
        of. What leaves the decoder is not cut to [0, 1]: beyond it a cut has no gradient."""
        vq, model, real = self.family.tokenizer, self.family.model, images.to(self.device).float() / 255
        with precision(self.config, self.device):
            logits = self.family.logits(rows.said, rows.kept).float()
        if self.pixel_loss.trains == "transformer":
            every = vq.quantize(torch.arange(logits.shape[-1], device=self.device))
            codes = straight_through(logits, every, self.pixel_loss.temperature).transpose(1, 2).unflatten(2, model.config.grid)
        else:
            codes = vq.codes(drawn(logits, rng), model.config.grid)
        with torch.no_grad():
            maps = [] if self.features is None else self.features(real)
        parts = distances(vq.render(codes).add(1).div(2), real, maps, self.features, self.distance)
        loss = -reconstruction_value(parts, self.pixel_loss.reconstruction.lpips_weight).mean()
        nll = fit_of(logits, rows.kept)[0].mean()
        if self.pixel_loss.prior_weight > 0:
            loss = loss + self.pixel_loss.prior_weight * nll
        return loss, {**{name: part.mean().detach() for name, part in parts.items()}, "nll": nll.detach()}

    @torch.no_grad()
    def _heldout(self) -> dict[str, float]:
        """With the same draws each time."""
        loss, parts = self.loss(self.shown.held_images, self.held, generator(self.config.seed, "draws", "heldout"))
        return _named("pretrain/heldout", {"loss": loss, **parts})


def drawn(logits: Float[Tensor, "B L V"], rng: torch.Generator) -> Int[Tensor, "B L"]:
    return draw(logits.log_softmax(-1), torch.rand(logits.shape[:2], generator=rng).to(logits.device))


def _named(before: str, parts: dict[str, Tensor]) -> dict[str, float]:
    join = "/" if before == "pretrain" else "_"
    return {f"{before}{join}{name}": float(part) for name, part in parts.items()}
