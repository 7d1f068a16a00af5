import numpy as np
import pytest
import torch
import torch.nn.functional as F

from varl.config import TokenizerConfig
from varl.tokenizers.multiscale_vq import MultiScaleVQ, phi_index

SQUARE, WIDE, BLOCK = ((1, 1), (2, 2), (4, 4)), ((1, 2), (1, 4), (2, 4), (4, 16)), ((2, 2), (3, 3), (4, 4))
TINY = TokenizerConfig(vocab=16, channels=4, width=8, multipliers=(1, 2), blocks=1)


def tiny(grids=SQUARE, **changes) -> MultiScaleVQ:
    torch.manual_seed(0)
    vq = MultiScaleVQ(TokenizerConfig(**{**{f: getattr(TINY, f) for f in TINY.__slots__}, **changes}), grids)
    return vq.eval().requires_grad_(False)


def pictures(vq: MultiScaleVQ, batch: int = 3) -> torch.Tensor:
    h, w = vq.grids[-1]
    return torch.rand(batch, 3, h * vq.config.stride, w * vq.config.stride, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---- phi


def numpy_phi(scale: int, scales: int, phis: int) -> int:
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    return int(np.argmin(np.abs(np.linspace(margin, 1 - margin, phis) - scale / (scales - 1))))


def test_phi_of_the_released_schedule():
    """Scale 2 of 10 lies midway between two ticks."""
    assert [phi_index(i, 10, 4) for i in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("phis", range(1, 15))
def test_phi_breaks_ties_as_it_was_trained(phis):
    for scales in range(2, 16):
        assert [phi_index(i, scales, phis) for i in range(scales)] == [numpy_phi(i, scales, phis) for i in range(scales)]


def test_one_phi_per_scale_is_each_scale_its_own():
    assert all([phi_index(i, s, s) for i in range(s)] == list(range(s)) for s in range(1, 15))


@pytest.mark.parametrize(
    ("shared", "names"),
    [
        (0, {"0", "1", "2"}),
        (1, {"qresi"}),
        (2, {"qresi_ls.0", "qresi_ls.1"}),
        (5, {f"qresi_ls.{i}" for i in range(5)}),
    ],
)
def test_names_of_shared_phis(shared, names):
    found = {name for name in tiny(shared_phi=shared).state_dict() if "quant_resi" in name}
    assert found == {f"quantize.quant_resi.{name}.{part}" for name in names for part in ("weight", "bias")}


@pytest.mark.parametrize("shared", [0, 1, 2, 4])
def test_phi_ratio_zero_leaves_codes_as_they_are(shared):
    vq = tiny(shared_phi=shared, phi_ratio=0.0)
    assert not [name for name in vq.state_dict() if "quant_resi" in name]
    codes = torch.randn(2, 16, 4)
    assert torch.equal(vq.quantize.contribution(codes, 2), codes.transpose(1, 2).unflatten(2, (4, 4)))


def test_phi_by_hand():
    vq = tiny(shared_phi=1, phi_ratio=-0.25)  # the sign is dropped, as in the released code
    phi, h = vq.quantize.phi(0), torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(phi(h), 0.75 * h + 0.25 * F.conv2d(h, phi.weight, phi.bias, padding=1))


# ---- the sum over scales


@pytest.mark.parametrize("grids", [SQUARE, WIDE, BLOCK], ids=str)
def test_encoding_is_the_nearest_code_of_what_is_left(grids):
    vq = tiny(grids)
    f, book = vq.features(pictures(vq)), vq.quantize.embedding.weight
    ids, sums, asked = vq.residual_codes(f)
    assert ids.shape == (3, vq.ends[-1])
    for scale, part in enumerate(vq.split(ids)):
        rest = f - (sums[scale - 1] if scale else 0)
        z = F.adaptive_avg_pool2d(rest, grids[scale]).flatten(2).transpose(1, 2)
        torch.testing.assert_close(asked[scale].view_as(z), z, rtol=0, atol=1e-5)
        assert torch.equal(part, torch.cdist(z.double(), book.double()).argmin(-1))
        up = book[part].transpose(1, 2).unflatten(2, grids[scale])
        up = F.interpolate(up, size=grids[-1], mode="bicubic") if scale < len(grids) - 1 else up
        torch.testing.assert_close(sums[scale], (sums[scale - 1] if scale else 0) + vq.quantize.phi(scale)(up), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grids", [SQUARE, WIDE, BLOCK], ids=str)
def test_inputs_are_the_partial_pictures_scaled_down(grids):
    vq = tiny(grids)
    ids = torch.randint(vq.config.vocab, (2, vq.ends[-1]))
    sums = vq.partial_sums([vq.quantize.embedding(part) for part in vq.split(ids)])
    want = [F.adaptive_avg_pool2d(f, grid).flatten(2).transpose(1, 2) for f, grid in zip(sums, grids[1:], strict=False)]
    torch.testing.assert_close(vq.inputs(ids), torch.cat(want, 1), rtol=0, atol=1e-6)
    assert torch.equal(vq.f_hat(ids), sums[-1])


@pytest.mark.parametrize("grids", [SQUARE, WIDE, BLOCK], ids=str)
def test_inputs_of_a_prefix_are_the_first_of_all(grids):
    vq = tiny(grids)
    ids = torch.randint(vq.config.vocab, (2, vq.ends[-1]))
    whole = vq.inputs(ids)
    for end in vq.ends:
        part = vq.inputs(ids[:, :end])
        assert part.shape[1] == end - vq.ends[0]
        assert torch.equal(part, whole[:, : part.shape[1]])


def test_split_holds_only_the_scales_that_are_there():
    vq = tiny(SQUARE)
    assert [part.shape[1] for part in vq.split(torch.zeros(1, 5))] == [1, 4]


def test_a_picture_does_not_depend_on_its_batch():
    vq = tiny(WIDE)
    images = pictures(vq, 5)
    ids = vq.encode(images)
    assert torch.equal(torch.cat([vq.encode(image[None]) for image in images]), ids)
    torch.testing.assert_close(torch.cat([vq.render(vq.f_hat(row[None])) for row in ids]), vq.render(vq.f_hat(ids)), rtol=0, atol=1e-5)


def test_the_reconstruction_is_the_picture_of_its_codes_and_its_gradient_passes_straight_through():
    vq = tiny()
    images = pictures(vq).requires_grad_()
    reconstruction, loss, ids, _ = vq(images)
    torch.testing.assert_close(reconstruction, vq.render(vq.f_hat(ids)), rtol=0, atol=1e-5)
    (through,) = torch.autograd.grad(reconstruction.sum(), images, retain_graph=True)
    f = vq.features(images)
    (straight,) = torch.autograd.grad(vq.render(f + (vq.f_hat(ids) - f).detach()).sum(), images)
    torch.testing.assert_close(through, straight)
    assert through.abs().max() > 0
    assert loss.item() > 0


def test_vq_loss_by_hand():
    vq = tiny()
    images = pictures(vq)
    f = vq.features(images)
    _, sums, _ = vq.residual_codes(f)
    assert vq(images)[1].item() == pytest.approx(1.25 * torch.stack([(s - f).square().mean() for s in sums]).mean().item(), rel=1e-5)


# ---- sizes


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("attention", [True, False])
def test_sizes(patch, attention):
    vq = tiny(WIDE, patch=patch, attention=attention)
    assert vq.config.stride == 2 * patch
    images = pictures(vq, 2)
    assert images.shape[2:] == (4 * 2 * patch, 16 * 2 * patch)
    ids = vq.encode(images)
    assert vq.render(vq.f_hat(ids)).shape == images.shape
    assert any("attn" in name for name in vq.state_dict()) == attention


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2)])
def test_levels_halve(multipliers):
    vq = tiny(SQUARE, multipliers=multipliers)
    assert vq.features(torch.zeros(1, 3, 4 * vq.config.stride, 4 * vq.config.stride)).shape == (1, 4, 4, 4)
