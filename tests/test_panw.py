import pytest
import torch

from varl.algorithms.panw import panw_weights, token_weights

VAR_256 = torch.tensor([float(n * n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)])
NEXTFLOW_PREFIX = torch.tensor([float(n * n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)])


def test_by_hand():
    """k = 1, 1/2, 1/4 on 1, 4, 16 tokens: sum k n = 1 + 2 + 4 = 7 of 21."""
    torch.testing.assert_close(panw_weights(torch.tensor([1.0, 4.0, 16.0]), 0.5), torch.tensor([3.0, 1.5, 0.75]))


def test_alpha_zero_is_plain_grpo_to_the_bit():
    assert panw_weights(VAR_256, 0.0).tolist() == [1.0] * 10


def test_alpha_one_gives_every_step_the_same_share():
    torch.testing.assert_close(panw_weights(VAR_256, 1.0) * VAR_256, torch.full((10,), 68.0))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.7, 1.0, 1.2])
def test_total_weight_is_the_number_of_tokens(alpha):
    assert (panw_weights(VAR_256, alpha) * VAR_256).sum().item() == pytest.approx(680, rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "alpha", "percent"),
    [
        (VAR_256, 0.0, [0.1, 0.6, 1.3, 2.4, 3.7, 5.3, 9.4, 14.7, 24.9, 37.6]),
        (VAR_256, 0.6, [2.2, 3.9, 5.4, 6.8, 8.1, 9.4, 11.9, 14.2, 17.5, 20.6]),
        (VAR_256, 0.8, [4.9, 6.5, 7.7, 8.6, 9.4, 10.1, 11.4, 12.4, 13.8, 15.0]),
        (VAR_256, 1.2, [18.1, 13.7, 11.7, 10.4, 9.5, 8.9, 7.9, 7.2, 6.5, 6.0]),
        (NEXTFLOW_PREFIX, 0.6, [1.8, 3.1, 4.2, 5.3, 6.3, 7.3, 8.3, 9.2, 11.1, 12.8, 14.5, 16.1]),
    ],
)
def test_shares_of_the_loss(sizes, alpha, percent):
    """Percent, of the paper's schedules, to a tenth."""
    share = 100 * panw_weights(sizes, alpha) * sizes / sizes.sum()
    torch.testing.assert_close(share, torch.tensor(percent), rtol=0, atol=0.06)


def test_extremes_per_token_of_var_256():
    for alpha, first, last in ((0.6, 15.3, 0.55), (0.8, 33.7, 0.40), (1.0, 68.0, 0.27)):
        weight = panw_weights(VAR_256, alpha)
        assert weight[0].item() == pytest.approx(first, abs=0.05)
        assert weight[-1].item() == pytest.approx(last, abs=0.006)


def test_a_stage_is_weighted_among_its_own_steps():
    step = torch.tensor([[0, 1, 1, 2, 2, 2, 2]])
    prefix, suffix = step < 2, step >= 2
    torch.testing.assert_close(token_weights(step, prefix, 1.0), torch.tensor([[1.5, 0.75, 0.75, 0, 0, 0, 0]]))
    assert token_weights(step, suffix, 1.0).tolist() == [[0, 0, 0, 1, 1, 1, 1]]


def test_rows_may_differ_as_in_masked_models():
    """Row 0 unmasks 1 then 3 tokens, row 1 two and two, in any order."""
    step = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]])
    got = token_weights(step, torch.ones(2, 4, dtype=torch.bool), 1.0)
    torch.testing.assert_close(got, torch.tensor([[2 / 3, 2.0, 2 / 3, 2 / 3], [1.0, 1.0, 1.0, 1.0]]))


def test_raster_models_are_left_alone():
    step = torch.arange(6)[None]
    assert token_weights(step, torch.ones(1, 6, dtype=torch.bool), 0.7).tolist() == [[1.0] * 6]


def test_a_row_without_active_tokens_weighs_nothing():
    assert token_weights(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool), 0.7).tolist() == [[0.0] * 3]
