"""How like its reference picture is a picture? Structural similarity, and that of DINOv2's features."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from varl.config import DINOConfig, SSIMConfig
from varl.errors import RewardError
from varl.models.vision import DINO
from varl.rewards.references import References
from varl.types import Prompt

WINDOW, SIGMA = 11, 1.5
"""Pixels of the Gaussian window to a side, and its deviation."""
C1, C2 = 0.01**2, 0.03**2
"""Of pixels in [0, 1]."""
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of MS-SSIM's scales, fine to coarse."""


def local_means(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
    """Means under the Gaussian window, wherever it lies wholly in the picture."""
    at = torch.arange(WINDOW, device=images.device) - WINDOW // 2
    window = (-at.square() / (2 * SIGMA**2)).exp()
    window = (window / window.sum()).to(images.dtype).expand(images.shape[1], 1, 1, -1)
    rows = F.conv2d(images, window, groups=images.shape[1])
    return F.conv2d(rows, window.transpose(2, 3), groups=images.shape[1])


def structure(a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Mean over places of SSIM, and of its contrast and structure alone, for each channel of pictures in [0, 1].

        SSIM = (2 m_a m_b + C1) / (m_a^2 + m_b^2 + C1) x CS,  CS = (2 s_ab + C2) / (s_a^2 + s_b^2 + C2)

    Wang et al. 2004 (IEEE TIP 13(4)), means m and covariances s under a Gaussian window, nothing padded."""
    mean_a, mean_b = local_means(a), local_means(b)
    var_a, var_b = local_means(a * a) - mean_a.square(), local_means(b * b) - mean_b.square()
    cs = (2 * (local_means(a * b) - mean_a * mean_b) + C2) / (var_a + var_b + C2)
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    return (luminance * cs).mean((2, 3)), cs.mean((2, 3))


def ssim(a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """SSIM of pictures in [0, 1], the mean of their channels': 1 for equal ones, and never more."""
    return structure(a, b)[0].mean(1)


def ms_ssim(a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """MS-SSIM of pictures in [0, 1], the mean of their channels': 1 for equal ones, and never less than 0.

        prod_j CS_j^w_j x SSIM_5^w_5  over scales j < 5, each half as large as the one before; factors below 0 count as 0

    Wang et al. 2003 (Asilomar), who leave negative factors open."""
    product = torch.ones(a.shape[:2], device=a.device)
    for scale, weight in enumerate(SCALE_WEIGHTS, 1):
        whole, cs = structure(a, b)
        product = product * (whole if scale == len(SCALE_WEIGHTS) else cs).clamp(min=0).pow(weight)
        if scale < len(SCALE_WEIGHTS):
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean(1)


class SSIM:
    """A RewardFn: SSIM or MS-SSIM to the prompt's own picture, of RGB in [0, 1]. NaN where that cannot be read. `pictures` gives the real
    pictures of prompts."""

    def __init__(self, config: SSIMConfig, pictures: Callable[[Sequence[Prompt]], Float[Tensor, "B 3 H W"]]) -> None:
        self.config = config
        self._references = References(pictures, lambda picture: picture[0], config.keep)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
        many = self.config.multiscale
        least = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1) if many else WINDOW
        if min(images.shape[2:]) < least:
            name = "MS-SSIM" if many else "SSIM"
            raise RewardError(f"pictures of {list(images.shape[2:])} pixels: {name} needs {least} to a side. Use another reward.")
        value = torch.full((len(prompts),), torch.nan)
        for rows, references in self._references.batches(images, prompts, self.config.batch):
            value[rows] = (ms_ssim if many else ssim)(images[rows].float(), torch.stack(references)).cpu()
        return value


class DINOSimilarity:
    """A RewardFn: cosine of DINOv2's class tokens of the picture and of the prompt's own picture. NaN where that cannot be read."""

    def __init__(self, config: DINOConfig, dino: DINO, pictures: Callable[[Sequence[Prompt]], Float[Tensor, "B 3 H W"]]) -> None:
        self.config, self.dino = config, dino
        self._references = References(pictures, lambda picture: self.dino.encode_images(picture)[0], config.keep)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
        dino = self.dino.to(images.device)
        value = torch.full((len(prompts),), torch.nan)
        for rows, references in self._references.batches(images, prompts, self.config.batch):
            value[rows] = (dino.encode_images(images[rows]) * torch.stack(references)).sum(1).cpu()
        return value
