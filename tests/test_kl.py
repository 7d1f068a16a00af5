import math
from dataclasses import replace

import pytest
import torch

from varl.config import KLConfig, MARConfig
from varl.errors import ConfigError
from varl.tokenizers.kl import KL, Posterior

TINY = KLConfig(channels=3, width=8, multipliers=(1, 2), blocks=1)


def tiny(**changes) -> KL:
    torch.manual_seed(0)
    return KL(replace(TINY, **changes)).eval().requires_grad_(False)


def pictures(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_posterior_by_hand():
    posterior = Posterior(mean=torch.full((1, 1, 1, 1), 2.0), log_variance=torch.full((1, 1, 1, 1), math.log(9.0)))
    assert posterior.draw(torch.full((1, 1, 1, 1), -0.5)).item() == pytest.approx(0.5)
    assert posterior.kl().item() == pytest.approx((4 + 9 - 1 - math.log(9)) / 2)


def test_kl_is_torchs_and_sums_over_the_map():
    mean, log_variance = torch.randn(2, 2, 3, 4, 5).unbind(0)
    normal = torch.distributions.Normal
    each = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(Posterior(mean=mean, log_variance=log_variance).kl(), each.sum((1, 2, 3)))


def test_tokens_are_scaled_and_come_row_by_row():
    kl, z = tiny(scale=0.25), torch.randn(2, 3, 4, 6)
    tokens = kl.tokens(z)
    assert tokens.shape == (2, 24, 3)
    assert torch.equal(tokens[1, 6 * 2 + 5], z[1, :, 2, 5] * 0.25)
    assert torch.equal(kl.maps(tokens, (4, 6)), z), "a power of 2 loses nothing"


def test_the_released_scale():
    assert KLConfig().scale == 0.2325
    assert KLConfig().stride == 16
    for scale in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=rf"scale={scale}: must be above 0 and finite"):
            KLConfig(scale=scale)


def test_log_variances_are_clamped():
    kl = tiny()
    with torch.no_grad():
        kl.quant_conv.bias[3:] = torch.tensor([-100.0, 0.0, 100.0])
    log_variance = kl.encode(pictures()).log_variance
    assert (log_variance[:, 0] == -30).all()
    assert (log_variance[:, 2] == 20).all()
    assert log_variance[:, 1].abs().max() < 20


def test_only_the_encoder_attends_at_a_level():
    names = [name for name, _ in tiny().named_parameters() if name.endswith("qkv.weight")]
    assert names == ["encoder.down.1.attn.0.qkv.weight", "encoder.mid.attn_1.qkv.weight", "decoder.mid.attn_1.qkv.weight"]
    assert not [name for name, _ in tiny(attention=False).named_parameters() if "qkv" in name]


def test_a_reconstruction_is_of_the_mean_or_of_a_draw():
    kl, images = tiny(), pictures()
    posterior = kl.encode(images)
    assert posterior.mean.shape == (2, 3, 4, 6)
    plain, nats = kl(images)
    assert torch.equal(plain, kl.decode(posterior.mean))
    assert torch.equal(nats, posterior.kl())
    assert torch.equal(kl(images, torch.zeros(2, 3, 4, 6))[0], plain)
    noise = torch.randn(2, 3, 4, 6)
    assert torch.equal(kl(images, noise)[0], kl.decode(posterior.draw(noise)))
    assert plain.shape == images.shape


def test_tokens_of_several_cells_hold_them_one_after_the_other():
    kl, z = tiny(fold=2, scale=0.25, shift=1.0), torch.randn(2, 3, 4, 6)
    tokens = kl.tokens(z)
    assert tokens.shape == (2, 6, 12)
    cells = z[1, :, 2:4, 4:6]  # of the last token: row 1, column 2
    assert torch.equal(tokens[1, 1 * 3 + 2].view(2, 2, 3), (cells.permute(1, 2, 0) - 1.0) * 0.25)
    torch.testing.assert_close(kl.maps(tokens, (2, 3)), z)
    assert (kl.config.token_width, kl.config.stride) == (12, 4)
    with pytest.raises(ConfigError, match="fold=0: must be 1 or more"):
        replace(TINY, fold=0)
    with pytest.raises(ConfigError, match="fold=2: must be 1"):
        MARConfig(tokenizer=replace(TINY, fold=2))


def test_attention_in_the_middle_alone():
    more = tiny().state_dict().keys() - tiny(levels_attend=False).state_dict().keys()
    assert {name.rpartition(".")[0] for name in more} == {f"encoder.down.1.attn.0.{part}" for part in ("norm", "qkv", "proj_out")}
