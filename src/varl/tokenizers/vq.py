"""LlamaGen's VQ (arXiv 2406.06525): one code per cell, row by row.

    id = argmax_k <z / |z|, e_k / |e_k|>        the decoder sees the unit vector e_id / |e_id|, whatever the length of the stored row

Pictures are [-1, 1] inside, as trained; `policies` converts."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from varl.config import VQConfig
from varl.tokenizers.autoencoder import Decoder, Encoder

SEARCH_ELEMENTS = 1 << 26
"""Similarities held at once while looking for the nearest code: 256 MiB."""
COMMITMENT = 0.25
"""As released. The release's entropy term has weight 0."""


class Codebook(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.channels)
        with torch.no_grad():  # directions as released: those of points in a cube
            self.embedding.weight.uniform_(-1, 1).div_(self.embedding.weight.norm(dim=-1, keepdim=True))

    def nearest(self, z: Float[Tensor, "n C"]) -> Int[Tensor, " n"]:
        """The code in whose direction each vector points, found in fp32: bf16 would take another one for every fourteenth vector."""
        with torch.autocast(z.device.type, enabled=False):
            z, codes = F.normalize(z.float(), dim=-1), F.normalize(self.embedding.weight.float(), dim=-1)
            return torch.cat([(part @ codes.T).argmax(1) for part in z.split(max(1, SEARCH_ELEMENTS // len(codes)))])

    def forward(self, ids: Int[Tensor, "*B"]) -> Float[Tensor, "*B C"]:
        """Unit vectors."""
        return F.normalize(self.embedding(ids), dim=-1)


class VQ(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config, config.latent), Decoder(config, config.latent)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent, config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.latent, 1)

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What is quantised; images in [-1, 1]. Not normalised."""
        return self.quant_conv(self.encoder(images))

    def ids(self, z: Float[Tensor, "B C h w"]) -> Int[Tensor, "B L"]:
        return self.quantize.nearest(z.flatten(2).transpose(1, 2).flatten(0, 1)).view(len(z), -1)

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B L"]:
        """Token ids of pictures in [-1, 1], row by row."""
        return self.ids(self.features(images))

    def codes(self, ids: Int[Tensor, "B L"], grid: tuple[int, int]) -> Float[Tensor, "B C h w"]:
        """The unit vectors of the ids, as a map."""
        return self.quantize(ids).transpose(1, 2).unflatten(2, grid)

    def render(self, codes: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """The picture of a map of codes, in [-1, 1] but for overshoot: not clamped."""
        return self.decoder(self.post_quant_conv(codes))

    def forward(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, ""], Int[Tensor, "B L"], list[Tensor]]:
        """Reconstruction (straight-through, not clamped), VQ loss (0.25 commitment + codebook term, between unit vectors), ids, and the
        unit vectors [B*L, C] that were looked up (in a list: one scale)."""
        features = self.features(images)
        z, ids = F.normalize(features, dim=1), self.ids(features.detach())
        codes = self.codes(ids, (z.shape[2], z.shape[3]))
        loss = COMMITMENT * F.mse_loss(codes.detach(), z) + F.mse_loss(codes, z.detach())
        return self.render(z + (codes - z).detach()), loss, ids, [z.detach().flatten(2).transpose(1, 2).flatten(0, 1)]
