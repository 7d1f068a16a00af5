"""VAR's multi-scale residual VQ (arXiv 2404.02905): a picture is a sum over scales of code maps, each up-sampled to the full grid.

    f_hat_t = f_hat_{t-1} + phi_t(up(code_t))        up: bicubic, phi_t(h) = (1 - r) h + r conv3x3(h)
    input of scale t+1 = down(f_hat_t)               down: area

Module names are those of the released checkpoint. Pictures are [-1, 1] inside, as trained; `policies` converts."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from varl.config import TokenizerConfig
from varl.tokenizers.autoencoder import Decoder, Encoder

Grid = tuple[int, int]


class Phi(nn.Conv2d):
    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


class SharedPhis(nn.Module):
    def __init__(self, phis: Sequence[nn.Module]) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(phis)


class SharedPhi(nn.Module):
    def __init__(self, phi: nn.Module) -> None:
        super().__init__()
        self.qresi = phi


def phi_index(scale: int, scales: int, phis: int) -> int:
    """Which of the shared convolutions a scale uses: the nearest tick to its place in [0, 1]; of two as near, the one that rounding says
    (ten scales and four ticks have such a tie), so the ticks are summed in float64 in the order of numpy's linspace, as trained."""
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    step = (1 - margin - margin) / max(phis - 1, 1)
    ticks = [margin + i * step for i in range(phis - 1)] + [1 - margin]
    place = scale / max(scales - 1, 1)
    return min(range(phis), key=lambda i: abs(ticks[i] - place))


class Quantizer(nn.Module):
    def __init__(self, config: TokenizerConfig, grids: Sequence[Grid]) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.embedding = nn.Embedding(config.vocab, config.channels)
        count = config.shared_phi or len(self.grids)
        phis = [Phi(config.channels, config.phi_ratio) if config.phi_ratio else nn.Identity() for _ in range(count)]
        match config.shared_phi:
            case 0:
                self.quant_resi = nn.ModuleList(phis)
            case 1:
                self.quant_resi = SharedPhi(phis[0])
            case _:
                self.quant_resi = SharedPhis(phis)
        self._phis = tuple(phi_index(i, len(self.grids), count) for i in range(len(self.grids)))

    def phi(self, scale: int) -> nn.Module:
        match self.quant_resi:
            case nn.ModuleList():
                return self.quant_resi[self._phis[scale]]
            case SharedPhi():
                return self.quant_resi.qresi
        return self.quant_resi.qresi_ls[self._phis[scale]]

    def nearest(self, z: Float[Tensor, "n C"]) -> Int[Tensor, " n"]:
        codes = self.embedding.weight
        return (codes.square().sum(1) - 2 * z @ codes.T).argmin(1)

    def contribution(self, codes: Float[Tensor, "B n C"], scale: int) -> Float[Tensor, "B C h w"]:
        """What one scale's code vectors add to f_hat."""
        h = codes.transpose(1, 2).unflatten(2, self.grids[scale])
        if scale < len(self.grids) - 1:
            h = F.interpolate(h, size=self.grids[-1], mode="bicubic")
        return self.phi(scale)(h)

    def next_input(self, f_hat: Float[Tensor, "B C h w"], scale: int) -> Float[Tensor, "B n C"]:
        """What the transformer sees at `scale`, given the sum of all coarser ones."""
        return F.interpolate(f_hat, size=self.grids[scale], mode="area").flatten(2).transpose(1, 2)


class MultiScaleVQ(nn.Module):
    def __init__(self, config: TokenizerConfig, grids: Sequence[Grid]) -> None:
        super().__init__()
        self.config, self.grids = config, tuple(grids)
        self.maps = self.grids
        """(h, w) of each scale's map of vectors."""
        self.ends = tuple(accumulate(h * w for h, w in self.grids))
        self.encoder, self.decoder = Encoder(config, config.channels), Decoder(config, config.channels)
        self.quantize = Quantizer(config, grids)
        self.quant_conv = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 3, padding=1)

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What is quantised; images in [-1, 1]."""
        return self.quant_conv(self.encoder(images))

    def residual_codes(self, f: Float[Tensor, "B C h w"]) -> tuple[Int[Tensor, "B L"], list[Tensor], list[Tensor]]:
        """Ids of all scales, f_hat after each, and the vectors [B*n, C] that were looked up at each."""
        f_hat, ids, sums, asked = torch.zeros_like(f), [], [], []
        for scale, grid in enumerate(self.grids):
            rest = f - f_hat
            z = rest if scale == len(self.grids) - 1 else F.interpolate(rest, size=grid, mode="area")
            z = z.flatten(2).transpose(1, 2)
            asked.append(z.flatten(0, 1))
            ids.append(self.quantize.nearest(asked[-1]).view(len(f), -1))
            f_hat = f_hat + self.quantize.contribution(self.quantize.embedding(ids[-1]), scale)
            sums.append(f_hat)
        return torch.cat(ids, 1), sums, asked

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B L"]:
        """Token ids of pictures in [-1, 1], scales concatenated."""
        return self.residual_codes(self.features(images))[0]

    def contribution(self, ids: Int[Tensor, "B n"], scale: int) -> Float[Tensor, "B C h w"]:
        """What one scale's ids add to f_hat."""
        return self.quantize.contribution(self.quantize.embedding(ids), scale)

    def next_input(self, f_hat: Float[Tensor, "B C h w"], scale: int) -> Float[Tensor, "B n C"]:
        """What the transformer sees at `scale`, given the sum of all coarser ones."""
        return self.quantize.next_input(f_hat, scale)

    def split(self, ids: Tensor) -> list[Tensor]:
        """[B, L, ...] into one piece per scale that is there."""
        return [ids[:, a:b] for a, b in pairwise((0, *self.ends)) if b <= ids.shape[1]]

    def partial_sums(self, codes: Sequence[Float[Tensor, "B _ C"]]) -> list[Float[Tensor, "B C h w"]]:
        """f_hat after each of the given scales."""
        return list(accumulate(self.quantize.contribution(c, scale) for scale, c in enumerate(codes)))

    def inputs(self, ids: Int[Tensor, "B l"]) -> Float[Tensor, "B m C"]:
        """Teacher-forcing inputs of scales 2 .. as many as `ids` holds: [B, l - n_1, C]."""
        scales = [self.quantize.embedding(part) for part in self.split(ids)]
        sums = self.partial_sums(scales[:-1])
        parts = [self.quantize.next_input(f_hat, scale + 1) for scale, f_hat in enumerate(sums)]
        return torch.cat(parts, 1) if parts else self.quantize.embedding.weight.new_zeros(len(ids), 0, self.config.channels)

    def f_hat(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B C h w"]:
        return self.partial_sums([self.quantize.embedding(part) for part in self.split(ids)])[-1]

    def render(self, f_hat: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """The picture of a latent, in [-1, 1] but for overshoot: not clamped."""
        return self.decoder(self.post_quant_conv(f_hat))

    def forward(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, ""], Int[Tensor, "B L"], list[Tensor]]:
        """Reconstruction (straight-through, not clamped), VQ loss (mean over scales of 0.25 commitment + codebook term), ids, and the
        vectors looked up at each scale."""
        f = self.features(images)
        ids, sums, asked = self.residual_codes(f.detach())
        loss = torch.stack([0.25 * F.mse_loss(s.detach(), f) + F.mse_loss(s, f.detach()) for s in sums]).mean()
        return self.render(f + (sums[-1] - f).detach()), loss, ids, asked
