"""Infinity's multi-scale binary spherical quantizer (arXiv 2412.04431): a picture is a sum over scales of maps of bits, each resized to the
full grid.

    bit_t = (area(f - f_hat_{t-1}) > 0)        f_hat_t = f_hat_{t-1} + linear((2 bit_t - 1) / sqrt(C))
    input of scale t+1 = linear(f_hat_t)       linear: bilinear, without smoothing where it makes smaller

The length of the residual matters for nothing but its training, so it is not normalised here. A token is the bits of a cell, or of
cells x cells neighbours, channel by channel. Module names are those of the released checkpoint but for the wrappers around its convolutions
and norms. Pictures are [-1, 1] inside, as trained; `policies` converts."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from varl.config import BSQConfig
from varl.tokenizers.autoencoder import Decoder, Encoder

Grid = tuple[int, int]
Flip = Callable[[int], Bool[Tensor, "B n d"] | None]
"""Which bits of a scale are turned round; None: none."""


class BSQ(nn.Module):
    def __init__(self, config: BSQConfig, grids: Sequence[Grid]) -> None:
        super().__init__()
        self.config, self.grids = config, tuple(grids)
        self.maps = tuple((h * config.cells, w * config.cells) for h, w in self.grids)
        """(h, w) of each scale in cells."""
        self.ends = tuple(accumulate(h * w for h, w in self.grids))
        self.encoder, self.decoder = Encoder(config, config.channels), Decoder(config, config.channels)

    # -- tokens and maps of cells ------------------------------------------------------------------------------------------------------

    def tokens(self, cells: Shaped[Tensor, "B C h w"]) -> Shaped[Tensor, "B n d"]:
        """Row by row, the cells of a token together."""
        return F.pixel_unshuffle(cells, self.config.cells).flatten(2).transpose(1, 2)

    def cells(self, tokens: Shaped[Tensor, "B n d"], scale: int) -> Shaped[Tensor, "B C h w"]:
        """And back."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grids[scale]), self.config.cells)

    def codes(self, bits: Int[Tensor, "B n d"], scale: int) -> Float[Tensor, "B C h w"]:
        """On the unit sphere: +-1 / sqrt(C)."""
        return (self.cells(bits, scale) * 2 - 1) / self.config.channels**0.5

    # -- scale by scale ----------------------------------------------------------------------------------------------------------------

    def spread(self, code: Float[Tensor, "B C _ _"]) -> Float[Tensor, "B C h w"]:
        """A scale's code, resized to the full grid."""
        return F.interpolate(code, size=self.maps[-1], mode="bilinear")

    def contribution(self, bits: Int[Tensor, "B n d"], scale: int) -> Float[Tensor, "B C h w"]:
        """What one scale's bits add to f_hat."""
        return self.spread(self.codes(bits, scale))

    def next_input(self, f_hat: Float[Tensor, "B C h w"], scale: int) -> Float[Tensor, "B n d"]:
        """What the transformer sees at `scale`, given the sum of all coarser ones."""
        return self.tokens(F.interpolate(f_hat, size=self.maps[scale], mode="bilinear"))

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What is quantised; images in [-1, 1]."""
        return self.encoder(images)

    def rest(self, f: Float[Tensor, "B C H W"], f_hat: Float[Tensor, "B C H W"], scale: int) -> Float[Tensor, "B C h w"]:
        """What is left of the features for `scale` to say, given the sum of all coarser ones."""
        rest = f - f_hat
        return rest if scale == len(self.maps) - 1 else F.interpolate(rest, size=self.maps[scale], mode="area")

    def residual_bits(self, f: Float[Tensor, "B C h w"], flip: Flip = lambda scale: None) -> tuple[Int[Tensor, "B L d"], list[Tensor]]:
        """Bits of all scales, and f_hat after each. `flip` says which bits of a scale enter f_hat the wrong way round, so that the finer
        scales, whose bits are those of what is then left, have errors to correct (bitwise self-correction, with which Infinity is
        trained)."""
        f_hat, parts, sums = torch.zeros_like(f), [], []
        for scale in range(len(self.maps)):
            parts.append((self.tokens(self.rest(f, f_hat, scale)) > 0).long())
            wrong = flip(scale)
            f_hat = f_hat + self.contribution(parts[-1] if wrong is None else parts[-1] ^ wrong.long(), scale)
            sums.append(f_hat)
        return torch.cat(parts, 1), sums

    # -- whole pictures ----------------------------------------------------------------------------------------------------------------

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B L d"]:
        """Bits of pictures in [-1, 1], scales concatenated."""
        return self.residual_bits(self.features(images))[0]

    def split(self, bits: Tensor) -> list[Tensor]:
        """[B, L, ...] into one piece per scale that is there."""
        return [bits[:, a:b] for a, b in pairwise((0, *self.ends)) if b <= bits.shape[1]]

    def partial_sums(self, bits: Int[Tensor, "B l d"]) -> list[Float[Tensor, "B C h w"]]:
        """f_hat after each scale that is there."""
        return list(accumulate(self.contribution(part, scale) for scale, part in enumerate(self.split(bits))))

    def inputs_of(self, sums: Sequence[Float[Tensor, "B C h w"]]) -> Float[Tensor, "B m d"]:
        """What the transformer sees of f_hat after each scale but the last."""
        parts = [self.next_input(f_hat, scale + 1) for scale, f_hat in enumerate(sums[:-1])]
        return torch.cat(parts, 1) if parts else sums[0].new_zeros(len(sums[0]), 0, self.config.bits)

    def inputs(self, bits: Int[Tensor, "B l d"]) -> Float[Tensor, "B m d"]:
        """Teacher-forcing inputs of scales 2 .. as many as `bits` holds: [B, l - 1, d]."""
        return self.inputs_of(self.partial_sums(bits))

    def f_hat(self, bits: Int[Tensor, "B L d"]) -> Float[Tensor, "B C h w"]:
        return self.partial_sums(bits)[-1]

    def render(self, f_hat: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """The picture of a latent, in [-1, 1] but for overshoot: not clamped."""
        return self.decoder(f_hat)
