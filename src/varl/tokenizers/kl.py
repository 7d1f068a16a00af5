"""KL autoencoders, MAR's (arXiv 2406.11838, KL-16) and Stable Diffusion's (arXiv 2112.10752): a Gaussian over a vector per cell, from which
the picture is decoded.

    z ~ N(mean, exp(log_variance))        tokens = scale (z - shift), row by row, which is what masked models draw

Pictures are [-1, 1] inside, as trained; `policies` converts."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from varl.config import KLConfig
from varl.tokenizers.autoencoder import Decoder, Encoder

LOG_VARIANCE = (-30.0, 20.0)
"""To which log variances are clamped, as released."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """A diagonal Gaussian over maps."""

    mean: Float[Tensor, "B C h w"]
    log_variance: Float[Tensor, "B C h w"]

    def draw(self, noise: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """mean + exp(log_variance / 2) * noise; the noise is N(0, 1)."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Float[Tensor, " B"]:
        """To N(0, 1), in nats, summed over the map: (mean^2 + variance - 1 - log variance) / 2."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance).flatten(1).sum(1)


def folded(maps: Float[Tensor, "B C h w"], fold: int) -> Float[Tensor, "B L d"]:
    """The cells of each `fold` x `fold` patch as one token, vector after vector; patches and their cells row by row."""
    cells = maps.unflatten(3, (-1, fold)).unflatten(2, (-1, fold))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unfolded(tokens: Float[Tensor, "B L d"], grid: tuple[int, int], fold: int) -> Float[Tensor, "B C h w"]:
    """And back; `grid` (h, w) is the tokens'."""
    cells = tokens.unflatten(2, (fold, fold, -1)).unflatten(1, grid)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class KL(nn.Module):
    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, 2 * config.channels, levels_attend=config.levels_attend)
        self.decoder = Decoder(config, config.channels, levels_attend=False)
        self.quant_conv = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Posterior:
        """Of pictures in [-1, 1]; not scaled."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return Posterior(mean=mean, log_variance=log_variance.clamp(*LOG_VARIANCE))

    def decode(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """The picture of an unscaled map, in [-1, 1] but for overshoot: not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def scaled(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return (z - self.config.shift) * self.config.scale

    def unscaled(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return z / self.config.scale + self.config.shift

    def tokens(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B L d"]:
        """A map's tokens, scaled, row by row."""
        return folded(self.scaled(z), self.config.fold)

    def maps(self, tokens: Float[Tensor, "B L d"], grid: tuple[int, int]) -> Float[Tensor, "B C h w"]:
        """The unscaled map of tokens, `grid` being theirs."""
        return self.unscaled(unfolded(tokens, grid, self.config.fold))

    def forward(
        self, images: Float[Tensor, "B 3 H W"], noise: Float[Tensor, "B C h w"] | None = None
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, " B"]]:
        """Reconstruction (not clamped) from a draw with this noise, or from the mean, and the posterior's KL in nats."""
        posterior = self.encode(images)
        return self.decode(posterior.mean if noise is None else posterior.draw(noise)), posterior.kl()
