from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from varl.config import VQConfig
from varl.tokenizers import vq as room
from varl.tokenizers.vq import VQ

TINY = VQConfig(vocab=16, channels=4, latent=6, width=8, multipliers=(1, 2), blocks=1)


def tiny(**changes) -> VQ:
    torch.manual_seed(0)
    vq = VQ(replace(TINY, **changes))
    with torch.no_grad():  # rows of any length, as in a released codebook
        vq.quantize.embedding.weight.mul_(torch.rand(vq.config.vocab, 1) * 3 + 0.1)
    return vq.eval().requires_grad_(False)


def pictures(vq: VQ, batch: int = 3, grid: tuple[int, int] = (4, 6)) -> torch.Tensor:
    h, w = (side * vq.config.stride for side in grid)
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---- codes


def test_the_nearest_code_is_the_nearest_unit_vector():
    vq = tiny()
    z, book = torch.randn(200, 4) * 5, vq.quantize.embedding.weight
    unit = book.double() / book.double().norm(dim=1, keepdim=True)
    want = torch.cdist(z.double() / z.double().norm(dim=1, keepdim=True), unit).argmin(1)
    assert torch.equal(vq.quantize.nearest(z), want)
    raw = torch.cdist(z.double(), book.double()).argmin(1)
    assert (raw != want).float().mean() > 0.2, "lengths of rows would tell, were they looked at"


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_search_in_slices_is_the_search(monkeypatch, rows):
    vq = tiny()
    z = torch.randn(50, 4)
    want = vq.quantize.nearest(z)
    monkeypatch.setattr(room, "SEARCH_ELEMENTS", rows * 16)
    assert torch.equal(vq.quantize.nearest(z), want)


def test_the_search_is_in_fp32_whatever_the_rest_computes_in():
    vq = tiny(vocab=4096, channels=8)
    z = torch.randn(500, 8)
    want = vq.quantize.nearest(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vq.quantize.nearest(z), want)
    low, book = z.bfloat16(), vq.quantize.embedding.weight.bfloat16()
    assert ((F.normalize(low, dim=-1) @ F.normalize(book, dim=-1).T).argmax(1) != want).float().mean() > 0.02


def test_the_decoder_sees_unit_vectors_row_by_row():
    vq = tiny()
    ids = torch.arange(6)[None]
    codes, book = vq.codes(ids, (2, 3)), vq.quantize.embedding.weight
    assert codes.shape == (1, 4, 2, 3)
    torch.testing.assert_close(codes[0, :, 1, 0], book[3] / book[3].norm())
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(1, 2, 3))


def test_encoding_reads_row_by_row():
    vq = tiny()
    images = pictures(vq)
    z, ids = vq.features(images), vq.encode(images)
    assert ids.shape == (3, 24)
    assert ids[1, 6 * 2 + 5] == vq.quantize.nearest(z[1, :, 2, 5][None])[0]


def test_codes_that_are_already_there_are_found_again():
    vq = tiny()
    ids = torch.arange(16)[None]
    assert torch.equal(vq.ids(vq.codes(ids, (4, 4)) * 7.0), ids)


def test_a_picture_does_not_depend_on_its_batch():
    vq = tiny()
    images = pictures(vq, 5)
    ids = vq.encode(images)
    assert torch.equal(torch.cat([vq.encode(image[None]) for image in images]), ids)
    alone = torch.cat([vq.render(vq.codes(row[None], (4, 6))) for row in ids])
    torch.testing.assert_close(alone, vq.render(vq.codes(ids, (4, 6))), rtol=0, atol=1e-5)


# ---- training


def test_the_reconstruction_is_the_picture_of_its_codes_and_its_gradient_passes_straight_through():
    vq = tiny()
    images = pictures(vq).requires_grad_()
    reconstruction, loss, ids, (asked,) = vq(images)
    codes = vq.codes(ids, (4, 6))
    torch.testing.assert_close(reconstruction, vq.render(codes), rtol=0, atol=1e-5)
    (through,) = torch.autograd.grad(reconstruction.sum(), images, retain_graph=True)
    z = F.normalize(vq.features(images), dim=1)
    (straight,) = torch.autograd.grad(vq.render(z + (codes - z).detach()).sum(), images)
    torch.testing.assert_close(through, straight)
    assert through.abs().max() > 0
    assert torch.equal(asked.view(3, 4, 6, 4).permute(0, 3, 1, 2), z.detach())
    assert loss.item() == pytest.approx(1.25 * (codes - z).square().mean().item(), rel=1e-5)


def test_each_term_of_the_loss_moves_its_own_side():
    vq = tiny().requires_grad_(True)
    loss = vq(pictures(vq))[1]
    encoder, book = vq.quant_conv.weight, vq.quantize.embedding.weight
    got = torch.autograd.grad(loss, [encoder, book])
    features = vq.features(pictures(vq))
    z, codes = F.normalize(features, dim=1), vq.codes(vq.ids(features), (4, 6))
    (commitment,) = torch.autograd.grad(0.25 * (codes.detach() - z).square().mean(), encoder)
    (codebook,) = torch.autograd.grad((codes - z.detach()).square().mean(), book)
    torch.testing.assert_close(got[0], commitment)
    torch.testing.assert_close(got[1], codebook)


def test_fresh_codes_are_unit_vectors_of_many_directions():
    torch.manual_seed(0)
    book = VQ(TINY).quantize.embedding.weight
    torch.testing.assert_close(book.norm(dim=1), torch.ones(16))
    assert torch.pdist(book).min() > 0.05


# ---- sizes


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2)], ids=str)
def test_sizes(patch, attention, multipliers):
    vq = tiny(patch=patch, attention=attention, multipliers=multipliers)
    assert vq.config.stride == patch * {1: 1, 2: 2, 3: 4}[len(multipliers)]
    images = pictures(vq, 2)
    ids = vq.encode(images)
    assert ids.shape == (2, 24)
    assert vq.render(vq.codes(ids, (4, 6))).shape == images.shape
    assert any("attn" in name for name in vq.state_dict()) == attention


def test_the_defaults_are_vq_16():
    assert VQConfig().stride == 16
    assert VQConfig(multipliers=(1, 2, 2, 4)).stride == 8
