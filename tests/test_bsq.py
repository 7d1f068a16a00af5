from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from varl.config import BSQConfig
from varl.errors import ConfigError
from varl.tokenizers.bsq import BSQ

SQUARE, WIDE = ((1, 1), (2, 2), (4, 4)), ((1, 1), (1, 2), (2, 4), (2, 8))
TINY = BSQConfig(channels=4, width=8, multipliers=(1, 2), blocks=1)
VARIANTS = {
    "square": (TINY, SQUARE),
    "wide": (TINY, WIDE),
    "four cells a token": (replace(TINY, cells=2), SQUARE),
    "wide, nine cells, patches": (replace(TINY, cells=3, patch=2), WIDE),
}


def tiny(config: BSQConfig = TINY, grids=SQUARE) -> BSQ:
    torch.manual_seed(0)
    return BSQ(config, grids).eval().requires_grad_(False)


def pictures(bsq: BSQ, batch: int = 3) -> torch.Tensor:
    h, w = (side * bsq.config.stride for side in bsq.grids[-1])
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


def some_bits(bsq: BSQ, batch: int = 2) -> torch.Tensor:
    return torch.randint(2, (batch, bsq.ends[-1], bsq.config.bits), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def bsq(request) -> BSQ:
    return tiny(*request.param)


# ---- bits, codes, tokens


def test_a_code_lies_on_the_unit_sphere():
    bsq = tiny()
    code = bsq.codes(torch.tensor([[[0, 1, 1, 0]]]), 0)
    assert code[0, :, 0, 0].tolist() == [-0.5, 0.5, 0.5, -0.5]


def test_two_scales_by_hand():
    """What is left after the first bit is 1 - 1 and -3 - (-1) and so on; a bit is 1 where that is above 0, and 0 is not."""
    bsq = tiny(replace(TINY, channels=1), ((1, 1), (2, 2)))
    f = torch.tensor([[[[1.0, 2.0], [0.5, -3.0]]]])
    bits, sums = bsq.residual_bits(f)
    assert bits.flatten().tolist() == [1, 0, 1, 0, 0]  # the mean is 0.125; 0, 1, -0.5, -4 are left
    assert sums[0].flatten().tolist() == [1, 1, 1, 1]
    assert sums[1].flatten().tolist() == [0, 2, 0, 0]


def test_the_cells_of_a_token_lie_together():
    bsq = tiny(replace(TINY, channels=2, cells=2), ((1, 1), (1, 2)))
    cells = torch.arange(2 * 2 * 4).view(1, 2, 2, 4)
    tokens = bsq.tokens(cells)
    assert tokens.tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]
    assert torch.equal(bsq.cells(tokens, 1), cells)


# ---- the sum over scales


def test_a_bit_is_the_sign_of_what_is_left(bsq):
    f = bsq.features(pictures(bsq))
    bits, sums = bsq.residual_bits(f)
    assert bits.shape == (3, bsq.ends[-1], bsq.config.bits)
    assert 0.2 < bits.float().mean() < 0.8
    for scale, part in enumerate(bsq.split(bits)):
        rest = F.adaptive_avg_pool2d(f - (sums[scale - 1] if scale else 0), bsq.maps[scale])
        signs = F.pixel_unshuffle(rest, bsq.config.cells).flatten(2).transpose(1, 2) > 0
        assert torch.equal(part.bool(), signs)
        code = torch.where(F.pixel_shuffle(signs.float().transpose(1, 2).unflatten(2, bsq.grids[scale]), bsq.config.cells) > 0, 0.5, -0.5)
        up = F.interpolate(code[:, :, None], size=(1, *bsq.maps[-1]), mode="trilinear")[:, :, 0]
        torch.testing.assert_close(sums[scale], (sums[scale - 1] if scale else 0) + up, rtol=0, atol=1e-6)


def test_inputs_are_the_partial_pictures_resized(bsq):
    bits = some_bits(bsq)
    sums = bsq.partial_sums(bits)
    small = [F.interpolate(f[:, :, None], size=(1, *size), mode="trilinear")[:, :, 0] for f, size in zip(sums, bsq.maps[1:], strict=False)]
    want = [F.pixel_unshuffle(f, bsq.config.cells).flatten(2).transpose(1, 2) for f in small]
    torch.testing.assert_close(bsq.inputs(bits), torch.cat(want, 1), rtol=0, atol=1e-6)
    assert torch.equal(bsq.f_hat(bits), sums[-1])


def test_inputs_of_a_prefix_are_the_first_of_all(bsq):
    bits = some_bits(bsq)
    whole = bsq.inputs(bits)
    for end in bsq.ends:
        part = bsq.inputs(bits[:, :end])
        assert part.shape == (2, end - 1, bsq.config.bits)
        assert torch.equal(part, whole[:, : end - 1])


def test_a_picture_does_not_depend_on_its_batch(bsq):
    images = pictures(bsq, 4)
    bits = bsq.encode(images)
    assert torch.equal(torch.cat([bsq.encode(image[None]) for image in images]), bits)
    alone = torch.cat([bsq.render(bsq.f_hat(row[None])) for row in bits])
    torch.testing.assert_close(alone, bsq.render(bsq.f_hat(bits)), rtol=0, atol=1e-5)
    assert alone.shape == images.shape


# ---- self-correction


def test_no_flips_is_plain(bsq):
    f = bsq.features(pictures(bsq))
    plain, never = bsq.residual_bits(f), bsq.residual_bits(f, lambda scale: torch.zeros(3, *bsq.split(some_bits(bsq))[scale].shape[1:]) > 0)
    assert torch.equal(plain[0], never[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], never[1], strict=True))


def test_flipped_bits_are_seen_and_later_ones_correct_them(bsq):
    """The truth of a scale is not touched by its own flips; f_hat and all finer scales are."""
    f = bsq.features(pictures(bsq))
    plain, clean = bsq.residual_bits(f)
    wrong, noisy = bsq.residual_bits(f, lambda scale: torch.ones(3, 1, bsq.config.bits).bool() if scale == 0 else None)
    assert torch.equal(wrong[:, :1], plain[:, :1])
    torch.testing.assert_close(noisy[0], -clean[0])
    assert not torch.equal(wrong[:, 1:], plain[:, 1:])
    assert torch.equal(bsq.inputs_of(noisy)[:, : bsq.ends[1] - 1], bsq.next_input(noisy[0], 1))
    assert (noisy[-1] - f).square().mean() < (noisy[0] - f).square().mean()


# ---- settings


def test_settings_that_make_no_quantizer():
    for wrong in ({"channels": 0}, {"multipliers": ()}, {"cells": 0}):
        with pytest.raises(ConfigError, match="must be 1 or more each"):
            replace(TINY, **wrong)


def test_stride_and_bits():
    assert (BSQConfig().stride, BSQConfig().bits) == (16, 32)
    eight = BSQConfig(channels=14, multipliers=(1, 2, 4, 4), cells=2)
    assert (eight.stride, eight.bits) == (16, 56)
