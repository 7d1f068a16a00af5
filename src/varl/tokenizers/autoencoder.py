"""The convolutional autoencoder that the tokenizers share (VQGAN's, arXiv 2012.09841): residual blocks, each level half the size
of the one before, attention where pictures are smallest. Module names are those of VAR's released checkpoint."""

from itertools import pairwise
from math import gcd

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from varl.config import BSQConfig, KLConfig, TokenizerConfig, VQConfig


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(gcd(32, width), width, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj_out = norm(width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, with attention after each where asked, and then the change of resolution."""

    def __init__(self, before: int, after: int, blocks: int, attention: bool, name: str, resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(before if i == 0 else after, after) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(after) for _ in range(blocks if attention else 0))
        self.add_module(name, resample)
        self.resample = name

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.get_submodule(self.resample)(x)


class Middle(nn.Module):
    def __init__(self, width: int, attention: bool) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResBlock(width, width), ResBlock(width, width)
        self.attn_1 = Attention(width) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures to `channels` numbers per token, as a map. Where `levels_attend` is False, attention is in the middle alone."""

    def __init__(self, config: TokenizerConfig | BSQConfig | VQConfig | KLConfig, channels: int, *, levels_attend: bool = True) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        last = len(widths) - 1
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.width, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                before,
                after,
                config.blocks,
                config.attention and levels_attend and i == last,
                "downsample",
                Down(after) if i < last else nn.Identity(),
            )
            for i, (before, after) in enumerate(pairwise([config.width, *widths]))
        )
        self.mid = Middle(widths[-1], config.attention)
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """And back; what comes out is not clamped."""

    def __init__(self, config: TokenizerConfig | BSQConfig | VQConfig | KLConfig, channels: int, *, levels_attend: bool = True) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        last = len(widths) - 1
        self.patch = config.patch
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.attention)
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                widths[i],
                config.blocks + 1,
                config.attention and levels_attend and i == last,
                "upsample",
                Up(widths[i]) if i > 0 else nn.Identity(),
            )
            for i in range(len(widths))
        )
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3 * config.patch**2, 3, padding=1)

    def forward(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x
