"""A multi-scale VQ from scratch: first a plain autoencoder, then a codebook started from its real residuals and kept by moving averages."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from varl.rng import generator
from varl.tokenizers.multiscale_vq import MultiScaleVQ

DECAY = 0.98
"""Of the code averages, per step."""
DEAD = 0.02
"""A code used less often than this share of the mean is put on a vector of the batch."""


@dataclass(slots=True)
class CodeAverages:
    """Running use count [V] and vector sum [V, C] of each code."""

    count: Float[Tensor, " V"]
    total: Float[Tensor, "V C"]

    def update(self, asked: Float[Tensor, "n C"], ids: Int[Tensor, " n"], rng: torch.Generator) -> Float[Tensor, "V C"]:
        """The new codebook: each code the mean of what it stood for; dead codes restarted on random vectors that were asked for."""
        count = torch.zeros_like(self.count).index_add_(0, ids, torch.ones_like(asked[:, 0]))
        total = torch.zeros_like(self.total).index_add_(0, ids, asked)
        self.count.lerp_(count, 1 - DECAY)
        self.total.lerp_(total, 1 - DECAY)
        mean = self.count.mean()
        dead = (self.count < DEAD * mean).nonzero()[:, 0]
        if len(dead):
            pick = torch.randint(len(asked), (len(dead),), generator=rng)
            self.count[dead], self.total[dead] = mean, asked[pick] * mean
        return self.total / self.count.unsqueeze(1)


def start_codebook(vq: MultiScaleVQ, f: Float[Tensor, "B C h w"], rng: torch.Generator) -> CodeAverages:
    """Codes drawn from the residuals of real features at every scale, scale by scale, half of them from the finest."""
    codes, scales = vq.quantize.embedding.weight.data, len(vq.grids)
    vocab, f_hat, start = len(codes), torch.zeros_like(f), 0
    share = [vocab // (2 * (scales - 1))] * (scales - 1) if scales > 1 else []
    share.append(vocab - sum(share))
    codes.fill_(1e4)  # not yet placed: never nearest
    for scale, (grid, count) in enumerate(zip(vq.grids, share, strict=True)):
        z = F.interpolate(f - f_hat, size=grid, mode="area").flatten(2).transpose(1, 2)
        asked = z.flatten(0, 1)
        codes[start : start + count] = asked[torch.randint(len(asked), (count,), generator=rng)]
        start += count
        ids = vq.quantize.nearest(asked).view(len(f), -1)
        f_hat = f_hat + vq.quantize.contribution(vq.quantize.embedding(ids), scale)
    return CodeAverages(torch.ones_like(codes[:, 0]), codes.clone())


def batch_index(pictures: int, batch: int, step: int, seed: int, purpose: str) -> Int[Tensor, " b"]:
    """Rows of one training batch: a seeded permutation per epoch, walked without replacement; a function of the step alone."""
    per_epoch = pictures // batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(pictures, generator=generator(seed, purpose, epoch))
    return order[place * batch : (place + 1) * batch]


def tokenizer_loss(
    vq: MultiScaleVQ, images: Float[Tensor, "B 3 H W"], quantised: bool
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor] | None]:
    """(loss, squared pixel error, ids, asked vectors) for pictures in [-1, 1]. Before the codebook exists, the plain autoencoder's."""
    if not quantised:
        f = vq.features(images)
        error = F.mse_loss(vq.render(f), images)
        return error + 1e-3 * f.square().mean(), error, None, None
    reconstruction, vq_loss, ids, asked = vq(images)
    error = F.mse_loss(reconstruction, images)
    return error + vq_loss, error, ids, asked
