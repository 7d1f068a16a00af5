import math

import pytest
import torch
from scipy.stats import chisquare

from varl.config import LawConfig, var_guidance
from varl.policies import sampling
from varl.policies.sampling import analytic_kl, draw, guide, in_row_chunks, keep_top_k, keep_top_p, smooth_weights, token_law, token_scores

LAST = 1 - 2**-24
"""The largest fp32 number below 1 is this one; torch.rand never gives more."""


def law_of(*p: float) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64).log().float()


def kept(logits: torch.Tensor) -> list[bool]:
    return (logits > -torch.inf).tolist()


# ---- filters


def test_top_k_by_hand():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert kept(keep_top_k(logits, 1)) == [False, True, False, False]
    assert kept(keep_top_k(logits, 3)) == [False, True, True, True]


@pytest.mark.parametrize("k", [0, 4, 9])
def test_top_k_of_all_or_zero_keeps_all(k):
    logits = torch.randn(3, 4)
    assert torch.equal(keep_top_k(logits, k), logits)


def test_top_k_keeps_ties():
    assert kept(keep_top_k(torch.tensor([1.0, 2.0, 1.0, 0.0]), 2)) == [True, True, True, False]


def test_top_p_by_hand():
    logits = law_of(0.1, 0.5, 0.15, 0.25)
    assert kept(keep_top_p(logits, 0.4)) == [False, True, False, False]
    assert kept(keep_top_p(logits, 0.6)) == [False, True, False, True]
    assert kept(keep_top_p(logits, 0.8)) == [False, True, True, True]
    assert kept(keep_top_p(logits, 0.95)) == [True, True, True, True]


def test_top_p_limits():
    logits = torch.randn(5, 7)
    assert torch.equal(keep_top_p(logits, 1.0), logits)
    best = keep_top_p(logits, 1e-6)
    assert torch.equal((best > -torch.inf).sum(-1), torch.ones(5, dtype=torch.long)), "never nothing"
    assert torch.equal(best.argmax(-1), logits.argmax(-1))


# ---- the law


def test_guidance_by_hand():
    cond, uncond = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])
    assert guide(cond, uncond, 3.0).tolist() == [4.0, 1.0]
    assert guide(cond, uncond, 1.0).tolist() == cond.tolist()
    assert guide(cond, uncond, 0.0).tolist() == uncond.tolist()


def test_var_guidance_is_none_at_first_and_all_at_last():
    assert var_guidance(4.0, 5) == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert var_guidance(4.0, 1) == (1.0,)
    assert not LawConfig(cfg_scale=var_guidance(0.0, 4)).guided


def test_order_is_guidance_temperature_top_k_top_p():
    cond, uncond = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[0.0, 2.0, 1.0, 4.0]])
    law = token_law(cond, uncond, LawConfig(cfg_scale=(2.0,), temperature=2.0, top_k=3, top_p=0.6), 2.0)
    # guided 6 2 1 -4; halved 3 1 0.5 -2; three kept; of e^3 e^1 e^0.5 the first holds 0.82 of the mass, more than 0.6
    assert law.exp().tolist() == [[1, 0, 0, 0]]
    law = token_law(cond, uncond, LawConfig(cfg_scale=(2.0,), temperature=2.0, top_k=3, top_p=0.9), 2.0)
    share = math.exp(2) / (1 + math.exp(2))
    torch.testing.assert_close(law.exp(), torch.tensor([[share, 1 - share, 0, 0]]), rtol=0, atol=1e-6)


def test_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(token_law(logits, None, LawConfig(temperature=0.5), 1.0), (2 * logits).log_softmax(-1))
    hot = token_law(logits, None, LawConfig(temperature=1e6), 1.0).exp()
    torch.testing.assert_close(hot, torch.full((3,), 1 / 3), rtol=0, atol=1e-6)
    cold = token_law(logits, None, LawConfig(temperature=1e-3), 1.0).exp()
    assert cold.tolist() == [0, 0, 1]


def test_a_plain_law_is_log_softmax_in_fp32():
    logits = torch.randn(4, 9, dtype=torch.bfloat16)
    law = token_law(logits, None, LawConfig(), 1.0)
    assert law.dtype == torch.float32
    assert torch.equal(law, logits.float().log_softmax(-1))


def test_guidance_may_differ_by_token():
    cond, uncond = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    scales = torch.tensor([[1.0], [2.0], [4.0]])
    law = token_law(cond, uncond, LawConfig(), scales)
    for token, scale in enumerate([1.0, 2.0, 4.0]):
        torch.testing.assert_close(law[:, token], token_law(cond[:, token], uncond[:, token], LawConfig(), scale))


# ---- drawing


def test_a_grid_of_uniforms_reproduces_the_law():
    """Of N evenly spaced uniforms each token gets its share, to one in N."""
    n, logp = 4096, torch.randn(11, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    uniform = (torch.arange(n) + 0.5) / n
    counts = draw(logp.expand(n, -1), uniform).bincount(minlength=11)
    assert ((counts / n - logp.exp()).abs() <= 1.01 / n).all()


def test_draws_follow_the_law():
    n, p = 20000, torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04])
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1))
    counts = draw(p.log().expand(n, -1), uniform).bincount(minlength=5)
    assert chisquare(counts.numpy(), (p * n).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [2, 7, 1000, 4096])
@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 0.5, LAST])
def test_what_cannot_happen_is_never_drawn(vocab, uniform):
    """Every second token is impossible, and the first and last runs of tokens too."""
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(2))
    possible = torch.zeros(vocab, dtype=torch.bool)
    possible[1::2] = True
    if vocab > 100:
        possible[: vocab // 4] = possible[-vocab // 4 :] = False
    logp = logits.masked_fill(~possible, -torch.inf).log_softmax(-1)
    assert possible[draw(logp, torch.full((64,), uniform))].all()


@pytest.mark.gpu
def test_what_cannot_happen_is_never_drawn_on_cuda():
    logits = torch.randn(1 << 14, 4096, device="cuda")
    possible = torch.rand_like(logits) < 0.3
    logp = logits.masked_fill(~possible, -torch.inf).log_softmax(-1)
    for _ in range(64):
        drawn = draw(logp, torch.rand(1 << 14, device="cuda"))
        assert possible.gather(1, drawn[:, None]).all()


def test_extreme_uniforms_draw_the_first_and_the_last_possible_token():
    logp = law_of(0.0, 0.25, 0.5, 0.25, 0.0)
    assert draw(logp, torch.tensor(0.0)).item() == 1
    assert draw(logp, torch.tensor(LAST)).item() == 3
    assert draw(logp, torch.tensor(0.25)).item() == 2, "a stretch holds its left end"


def test_a_certain_token_is_drawn_whatever_the_uniform():
    logp = torch.full((3, 6), -torch.inf)
    logp[:, 4] = 0.0
    assert draw(logp, torch.tensor([0.0, 0.5, LAST])).tolist() == [4, 4, 4]


# ---- scores


def test_scores_by_hand():
    logp = law_of(0.5, 0.25, 0.25)[None]
    chosen, entropy = token_scores(logp, torch.tensor([1]))
    assert chosen.item() == pytest.approx(math.log(0.25))
    assert entropy.item() == pytest.approx(1.5 * math.log(2))


def test_entropy_where_a_token_cannot_happen():
    _, entropy = token_scores(law_of(0.5, 0.5, 0.0), torch.tensor(0))
    assert entropy.item() == pytest.approx(math.log(2))


def test_kl_by_hand():
    p, q = law_of(0.75, 0.25), law_of(0.5, 0.5)
    assert analytic_kl(p, q).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert analytic_kl(p, p).item() == 0
    assert analytic_kl(law_of(1.0, 0.0), q).item() == pytest.approx(math.log(2)), "what cannot happen counts nothing"


def test_kl_has_the_gradient_of_its_definition():
    logits, ref = torch.randn(5, requires_grad=True), torch.randn(5).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (got,) = torch.autograd.grad(analytic_kl(logp, ref), logits)
    p, rest = logp.exp().detach(), (logp - ref).detach()
    torch.testing.assert_close(got, p * (rest - (p * rest).sum()), rtol=1e-5, atol=1e-6)


def test_kl_of_filtered_laws_has_a_gradient():
    logits, ref = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    both = [token_law(x, None, LawConfig(top_k=6), 1.0).masked_fill(torch.arange(6) > 3, -torch.inf).log_softmax(-1) for x in (logits, ref)]
    short = [x[:, :4].log_softmax(-1) for x in (logits, ref)]
    torch.testing.assert_close(analytic_kl(*both), analytic_kl(*short))
    got, want = (torch.autograd.grad(analytic_kl(*laws).sum(), logits, retain_graph=True)[0] for laws in (both, short))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# ---- chunks


@pytest.mark.parametrize("limit", [1, 20, 45, 1000])
def test_chunks_give_what_the_whole_gives(monkeypatch, limit):
    x, w = torch.randn(7, 10), torch.randn(10, requires_grad=True)
    calls = []

    def rows(piece: slice) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(piece)
        return (x[piece] * w).sum(1), x[piece]

    want = torch.autograd.grad((x * w).sum(1).square().sum(), w)[0]
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", limit)
    total, same = in_row_chunks(rows, 7, 10)
    assert torch.equal(same, x)
    assert len(calls) == math.ceil(7 / max(1, limit // 10))
    torch.testing.assert_close(torch.autograd.grad(total.square().sum(), w)[0], want)


def test_smooth_weights_by_hand():
    """At the first scale tau is .27, so noise of .27 log 2 doubles a weight; at the last one log p counts twice, and tau is .0135."""
    even = torch.tensor([0.5, 0.5, 0.0]).log()
    first = smooth_weights(even, torch.tensor([0.0, 0.27 * math.log(2), 5.0]), 0.0)
    torch.testing.assert_close(first, torch.tensor([1 / 3, 2 / 3, 0.0]))
    last = smooth_weights(torch.tensor([1.0, math.exp(0.0135)]).log() - 9, torch.tensor([0.0, 0.0]), 1.0)
    torch.testing.assert_close(last, torch.tensor([1.0, math.e**2]) / (1 + math.e**2), rtol=2e-4, atol=0)
