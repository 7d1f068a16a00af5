"""Reading metrics and the evaluation's pictures."""

import math

import pytest
import torch

from tabular import TabularPolicy
from varl.eval.words import draw_sample, reading_metrics, share_interval, token_diversity
from varl.types import Prompt

NAN = math.nan


def test_the_interval_is_clustered_by_prompt():
    """Two equal pictures of each of four words are four observations, not eight."""
    mean, half = share_interval(torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 1]), 2)
    assert mean == 0.75
    assert half == pytest.approx(1.96 * 0.5 / 2)


def test_failed_readings_are_left_out_and_counted():
    parts = {"word_accuracy": torch.tensor([1.0, NAN, 0, 0, NAN, NAN]), "ned": torch.tensor([0.8, NAN, 0.4, 0.2, NAN, NAN])}
    found = reading_metrics(parts, 2)
    assert found["failed"] == 0.5
    assert found["word_accuracy"] == 0.5
    assert found["ned"] == pytest.approx((0.8 + 0.3) / 2)
    assert found["word_accuracy_ci95"] == pytest.approx(1.96 * 0.5**0.5 / 2**0.5)


def test_too_few_readings_have_no_interval():
    assert math.isnan(share_interval(torch.tensor([1.0, 0.0]), 2)[1])
    assert all(map(math.isnan, share_interval(torch.tensor([NAN, NAN]), 1)))


def test_diversity_by_hand():
    """Three pictures of a prompt: pairs differ in 2, 4 and 2 of 4 tokens; those of the other prompt are equal."""
    first, second = [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], [[5, 6, 7, 8]] * 3
    assert token_diversity(torch.tensor(first + second), 3) == pytest.approx((2 + 4 + 2) / 3 / 4 / 2)


def test_diversity_of_vectors_is_their_root_mean_square_difference():
    """Two pictures of two tokens of two numbers: differences 3, 4, 0, 0, so sqrt(25 / 4); another pair that is equal."""
    pair, equal = [[[1.0, 1.0], [2.0, 2.0]], [[4.0, 5.0], [2.0, 2.0]]], [[[7.0, 7.0], [7.0, 7.0]]] * 2
    assert token_diversity(torch.tensor(pair), 2) == pytest.approx(2.5)
    assert token_diversity(torch.tensor(pair + equal), 2) == pytest.approx(1.25)


def test_the_same_pictures_in_batches_of_any_size():
    policy, prompts = TabularPolicy(), [Prompt(label=0), Prompt(label=1), Prompt(label=0)]
    ticks: list[int] = []
    whole = draw_sample(policy, prompts, copies=2, seed=3)
    parts = draw_sample(policy, prompts, copies=2, seed=3, batch=4, tick=ticks.append)
    assert ticks == [4, 2]
    assert torch.equal(whole.images, parts.images)
    assert torch.equal(whole.tokens, parts.tokens)
    assert [p.label for p in whole.prompts] == [0, 0, 1, 1, 0, 0]
    assert not torch.equal(whole.tokens, draw_sample(policy, prompts, copies=2, seed=4).tokens)
