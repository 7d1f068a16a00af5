"""An Infinity from scratch (arXiv 2412.04431): an autoencoder whose latents are bits on scales, and then a transformer that says the bits
of every scale after coarser ones of which some were turned round, so that it learns to correct what it drew wrong."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from varl.config import PretrainConfig
from varl.errors import ConfigError
from varl.models.infinity import Infinity
from varl.policies.acting import CaptionEncoder
from varl.policies.raster import pad_left, read_captions
from varl.pretrain.autoencoder import AutoencoderPhase
from varl.pretrain.data import Shown, batch_index, psnr, signed
from varl.pretrain.family import Fit, fit_of
from varl.pretrain.phase import Metrics, descend
from varl.pretrain.transformer import TransformerPhase
from varl.rng import Stream
from varl.tokenizers.bsq import BSQ, Flip
from varl.types import Prompt

COMMITMENT = 0.25
"""Weight of the squared distance between a direction and its code, as released, beside the squared error of pixels in [-1, 1]."""
ENTROPY = 1e-3
"""Of the entropy penalty, in nats per cell: the released 0.1, divided by the released inverse temperature of 100."""
SHARPNESS = 12.5
"""Log-odds of a bit whose number is that of its code: of the released tokenizer of 32 bits."""

# ---- the autoencoder ------------------------------------------------------------------------------------------------------------------


def straight_through(u: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """The code nearest to directions, sign(u) / sqrt(C) where 0 is below, with the derivative of u itself (BSQ, arXiv 2406.07548)."""
    return torch.where(u > 0, 1.0, -1.0) / u.shape[1] ** 0.5 + (u - u.detach())


def bit_probability(u: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """Of a 1 where the codes c of a direction have probabilities proportional to exp(t u.c): then the bits are independent, each with
    sigmoid(2 t u_d / sqrt(C)). BSQ's soft assignment, with t = SHARPNESS C / 2."""
    return torch.sigmoid(SHARPNESS * u.shape[1] ** 0.5 * u)


def bit_entropy(p: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """-p log p - (1 - p) log(1 - p), in nats. Without a derivative within 1e-6 of 0 and 1."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return torch.special.entr(p) + torch.special.entr(1 - p)


def entropy_penalty(p: Float[Tensor, "B C h w"]) -> Float[Tensor, ""]:
    """sum_d ( mean_cells H(p_d) - H(mean_cells p_d) ), in nats: C log 2 below 0 where all bits are certain and each is 1 half of the time,
    0 where all cells are alike. BSQ's factorised form."""
    return (bit_entropy(p).mean((0, 2, 3)) - bit_entropy(p.mean((0, 2, 3)))).sum()


def autoencode(
    bsq: BSQ, images: Float[Tensor, "B 3 H W"]
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, ""], list[Float[Tensor, "B C _ _"]]]:
    """Reconstruction (straight-through, not clamped), the mean over scales of commitment and entropy penalty, and the codes of each scale.
    What a scale leaves to the finer ones passes derivatives on, as released."""
    f = bsq.features(images)
    f_hat, codes, losses = torch.zeros_like(f), [], []
    for scale in range(len(bsq.maps)):
        u = F.normalize(bsq.rest(f, f_hat, scale), dim=1)
        codes.append(straight_through(u))
        losses.append(COMMITMENT * F.mse_loss(u, codes[-1].detach()) + ENTROPY * entropy_penalty(bit_probability(u)))
        f_hat = f_hat + bsq.spread(codes[-1])
    return bsq.render(f_hat), torch.stack(losses).mean(), codes


class BitsPhase(AutoencoderPhase):
    """Squared error of pictures decoded from their bits, and what makes the bits certain and varied."""

    latents = "bits"

    def __init__(self, config: PretrainConfig, bsq: BSQ, shown: Shown, device: torch.device) -> None:
        super().__init__(config, bsq, shown, device)
        self.bsq = bsq

    def step(self, step: int) -> Metrics:
        config = self.config
        images = signed(self.images[batch_index(len(self.images), config.tokenizer_batch, step, config.seed, "tokenizer")], self.device)
        reconstruction, extra, codes = autoencode(self.bsq, images)
        error = F.mse_loss(reconstruction, images)
        loss = error + extra
        descend(self, loss, self.bsq.parameters())

        def metrics(loss=loss.detach(), error=error.detach()) -> dict[str, Any]:
            ones = torch.stack([(code.detach() > 0).float().mean((0, 2, 3)) for code in codes])
            used = bit_entropy(ones).mean() / bit_entropy(torch.tensor(0.5))
            return {"pretrain/loss": float(loss), "pretrain/psnr": psnr(float(error)), "pretrain/bit_usage": float(used)}

        return metrics


# ---- the transformer ------------------------------------------------------------------------------------------------------------------


class InfinityFamily:
    """A `Family`. Rows are captions, as places among the different ones that were read; or -n, for "none" in the place of a caption of n
    tokens. Of pictures features are kept, whose bits depend on those that were turned round before."""

    def __init__(self, model: Infinity, tokenizer: BSQ, captions: CaptionEncoder | None) -> None:
        if captions is None:
            raise ConfigError("this model reads captions, and there is no encoder for them. Give `captions`, from texts to features.")
        self.model, self.tokenizer, self.captions = model, tokenizer, captions
        self.features: list[Float[Tensor, "_ C"]] = []
        """Of the captions that were read."""

    def keep(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return self.tokenizer.features(images)

    def read(self, prompts: Sequence[Prompt]) -> Int[Tensor, " N"]:
        features, keys, _ = read_captions(prompts, self.model, self.captions)
        places: dict[str | int, int] = {}
        for key in dict.fromkeys(keys):
            if isinstance(key, int):
                places[key] = -key
            else:
                places[key] = len(self.features)
                self.features.append(features[key])
        return torch.tensor([places[key] for key in keys])

    def nothing(self, said: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return torch.tensor([-len(self.caption(row)) for row in said.tolist()])

    def caption(self, row: int) -> Float[Tensor, "n C"]:
        return self.features[row] if row >= 0 else self.model.none(-row)

    def fit(self, said: Int[Tensor, " b"], kept: Float[Tensor, "b C h w"], flip: Flip = lambda scale: None) -> Fit:
        """Of every bit of every scale, each given all coarser ones as they are after `flip`: the right bits of a scale are those of what
        these leave of the features."""
        with torch.no_grad(), torch.autocast(kept.device.type, enabled=False):
            bits, sums = self.tokenizer.residual_bits(kept, flip)
            inputs = self.tokenizer.inputs_of(sums)
        rows, of = said.unique(return_inverse=True)
        condition = self.model.condition(*pad_left([self.caption(row) for row in rows.tolist()])).rows(of)
        return fit_of(self.model.logits(self.model(condition, inputs), condition), bits.flatten(1))

    def parts(self, losses: Float[Tensor, "N m"]) -> dict[str, float]:
        """By scale."""
        tokens = losses.unflatten(1, (self.tokenizer.ends[-1], -1))
        return {f"scale{s}": float(part.mean()) for s, part in enumerate(self.tokenizer.split(tokens))}


def flips(bsq: BSQ, most: float, rows: Stream, device: torch.device) -> Flip:
    """Of each picture and scale a share of the bits, itself drawn uniformly from [0, `most`]; which bits, at (..., "bits", row). Bitwise
    self-correction as the paper says it; its release draws one share for all pictures of a batch, of whole hundredths."""
    scales = torch.arange(len(bsq.ends)).repeat_interleave(torch.tensor([h * w for h, w in bsq.grids]))
    share = most * rows.at("shares").uniform(len(bsq.ends))[:, scales, None]
    parts = bsq.split((rows.at("bits").uniform(bsq.ends[-1], bsq.config.bits) < share).to(device))
    return lambda scale: parts[scale]


class CorrectingPhase(TransformerPhase):
    """With bits turned round; held-out pictures are as they are. All bits count alike: the release gives a scale's the weight
    1 / sqrt(h w)."""

    family: InfinityFamily

    def fit(self, said: Int[Tensor, " b"], batch: Int[Tensor, " b"], step: int) -> Fit:
        rows = Stream(seed=self.config.seed, path=("flips", step), rows=tuple(batch.tolist()))
        return self.family.fit(said, self.known.kept[batch], flips(self.family.tokenizer, self.config.flipped, rows, self.device))
