"""SSIM, MS-SSIM and DINOv2's likeness to reference pictures."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor
from transformers import AutoImageProcessor, Dinov2Model

from tiny_vision import save_dino
from varl.build import build_reward
from varl.config import DINOConfig, SSIMConfig
from varl.errors import ConfigError, DataError, RewardError
from varl.plan.missing import judge_of
from varl.rewards.similarity import SCALE_WEIGHTS, ms_ssim, ssim, structure
from varl.types import Prompt

NOISE = torch.Generator().manual_seed(0)


def smooth(count: int, side: int) -> Tensor:
    """The same ones at every call."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))
    return F.interpolate(coarse, (side, side), mode="bilinear")


REAL = {f"{name}.png": image for name, image in zip("abc", smooth(3, 40), strict=True)}
PROMPTS = [Prompt(image=f"{name}.png") for name in "aabbc"]


def pictures(prompts):
    return torch.stack([REAL[prompt.image] for prompt in prompts])


def by_scipy(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """SSIM and its contrast-structure of one channel in fp64, with scipy's Gaussian cut to 11 pixels."""

    def mean(x):
        return gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    cs = (2 * cov + 0.0009) / (va + vb + 0.0009)
    return float(((2 * ma * mb + 0.0001) / (ma**2 + mb**2 + 0.0001) * cs).mean()), float(cs.mean())


def test_ssim_is_that_of_scipys_windows():
    a, b = smooth(3, 30), torch.rand(3, 3, 30, 30, generator=NOISE)
    b[1] = (a[1] + 0.1 * b[1]).clamp(0, 1)
    channels = zip(a.flatten(0, 1).double().numpy(), b.flatten(0, 1).double().numpy(), strict=True)
    want = torch.tensor([by_scipy(x, y) for x, y in channels], dtype=torch.float64).view(3, 3, 2)
    whole, cs = structure(a, b)
    torch.testing.assert_close(torch.stack([whole, cs], 2).double(), want, rtol=0, atol=2e-5)
    torch.testing.assert_close(ssim(a, b).double(), want[..., 0].mean(1), rtol=0, atol=2e-5)
    assert want[1, :, 0].mean() > 0.5 > want[0, :, 0].mean()


def test_flat_pictures_by_hand():
    """Without contrast only luminance is left: (2 x .2 x .6 + C1) / (.04 + .36 + C1)."""
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    assert ssim(a, b).item() == pytest.approx(0.2401 / 0.4001, abs=1e-4)
    assert ssim(a, a).item() == pytest.approx(1.0, abs=1e-6)


def test_an_inverted_picture_is_below_zero():
    a = torch.rand(1, 3, 20, 20, generator=NOISE)
    assert ssim(a, 1 - a).item() < -0.5


def test_ms_ssim_scale_by_scale():
    a = smooth(2, 176)
    b = (a + 0.2 * torch.rand(2, 3, 176, 176, generator=NOISE)).clamp(0, 1)
    x, y, want = a.double().numpy(), b.double().numpy(), np.ones((2, 3))
    for scale, weight in enumerate(SCALE_WEIGHTS):
        for row in range(2):
            for channel in range(3):
                want[row, channel] *= by_scipy(x[row, channel], y[row, channel])[scale < 4] ** weight
        if scale < 4:
            x, y = (z.reshape(2, 3, len(z[0, 0]) // 2, 2, len(z[0, 0]) // 2, 2).mean((3, 5)) for z in (x, y))
    torch.testing.assert_close(ms_ssim(a, b).double(), torch.from_numpy(want.mean(1)), rtol=0, atol=2e-5)
    torch.testing.assert_close(ms_ssim(a, a), torch.ones(2), rtol=0, atol=1e-5)
    assert ms_ssim(a, 1 - a).tolist() == [0.0, 0.0]
    assert sum(SCALE_WEIGHTS) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_picture_is_compared_with_its_own(batch):
    reward = build_reward(SSIMConfig(batch=batch), pictures)
    drawn = torch.cat([pictures(PROMPTS[:4]), torch.rand(1, 3, 40, 40, generator=NOISE)])
    drawn[1] = drawn[1].flip(2)
    value = reward(drawn, PROMPTS)
    torch.testing.assert_close(value, ssim(drawn, pictures(PROMPTS)), rtol=0, atol=1e-6)
    assert value[0] > 0.999 > value[1]


def test_what_cannot_be_compared(caplog):
    with pytest.raises(ConfigError, match="ssim compares with real pictures, and this data has none"):
        build_reward(SSIMConfig())
    with pytest.raises(ConfigError, match="ssim compares with real pictures"):
        judge_of("mine", SSIMConfig(), None)
    assert judge_of("mine", SSIMConfig(multiscale=True), pictures) == "mine: MS-SSIM to the prompt's picture"
    with pytest.raises(RewardError, match=r"\[40, 40\] pixels: MS-SSIM needs 176 to a side"):
        build_reward(SSIMConfig(multiscale=True), pictures)(torch.rand(1, 3, 40, 40), PROMPTS[:1])
    with pytest.raises(RewardError, match=r"is \[40, 40\] pixels, those drawn are \[20, 20\]"):
        build_reward(SSIMConfig(), pictures)(torch.rand(1, 3, 20, 20), PROMPTS[:1])
    with pytest.raises(ConfigError, match=r"ssim.batch=0"):
        SSIMConfig(batch=0)

    def torn(prompts):
        if prompts[0].image == "a.png":
            raise DataError("torn")
        return pictures(prompts)

    with caplog.at_level(logging.WARNING):
        value = build_reward(SSIMConfig(batch=2), torn)(pictures(PROMPTS), PROMPTS)
    assert value.isnan().tolist() == [True, True, False, False, False]
    assert [record.message for record in caplog.records] == ["reference picture a.png cannot be read: torn"]


def test_dino_is_that_of_transformers(tmp_path):
    folder = save_dino(tmp_path / "dino")
    model, processor = Dinov2Model.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    drawn = (smooth(5, 40) * 255).round() / 255
    looked = []
    for images in (drawn, pictures(PROMPTS)):
        pixels = processor([(image * 255).round().byte().numpy() for image in images], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            looked.append(model(pixel_values=pixels).pooler_output)
    reward = build_reward(DINOConfig(model=str(folder), batch=2), pictures)
    value = reward(drawn, PROMPTS)
    torch.testing.assert_close(value, F.cosine_similarity(*looked), rtol=0, atol=2e-3)
    assert value.std() > 0.01
    torch.testing.assert_close(reward(pictures(PROMPTS), PROMPTS), torch.ones(5), rtol=0, atol=1e-5)
    assert judge_of("mine", DINOConfig(model=str(folder)), pictures) == f"mine: dino, by {folder}"
    with pytest.raises(ConfigError, match="dino compares with real pictures"):
        judge_of("mine", DINOConfig(model=str(folder)), None)
    with pytest.raises(ConfigError, match="hf download facebook/dinov2-base "):
        build_reward(DINOConfig(), pictures)
