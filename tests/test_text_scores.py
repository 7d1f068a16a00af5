"""Text scores, by hand."""

from itertools import product

import pytest

from varl.rewards.text_scores import comp, edit_distance, letter_scores, ned_similarity, paper_reward, pen, sim, word_accuracy


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("cat", "", 3), ("", "cat", 3), ("cat", "cat", 0), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "cab", 2)],
)
def test_edit_distance_by_hand(a, b, distance):
    assert edit_distance(a, b) == distance


def test_edit_distance_is_a_metric_on_all_short_words():
    words = ["".join(letters) for n in range(4) for letters in product("ab", repeat=n)]
    for a, b in product(words, repeat=2):
        d = edit_distance(a, b)
        assert d == edit_distance(b, a)
        assert (d == 0) == (a == b)
        assert abs(len(a) - len(b)) <= d <= max(len(a), len(b))
        assert all(d <= edit_distance(a, c) + edit_distance(c, b) for c in words)


@pytest.mark.parametrize(
    ("a", "b", "similarity"),
    [("", "", 1.0), ("CAT", "", 0.0), ("CAT", "cat", 1.0), ("CAT", "CAR", 2 / 3), ("CAT", "DOG", 0.0), ("AB", "ABCD", 0.5)],
)
def test_ned_similarity_by_hand(a, b, similarity):
    assert ned_similarity(a, b) == pytest.approx(similarity, abs=1e-12)


@pytest.mark.parametrize(
    ("targets", "read", "accuracy"),
    [
        (["RED", "FOX"], ["fox", "red"], 1.0),
        (["RED", "FOX"], ["RED", "RED"], 0.5),
        (["RED", "RED"], ["RED"], 0.5),
        (["RED"], [], 0.0),
        ([], ["RED"], 1.0),
    ],
)
def test_word_accuracy_counts_each_reading_once(targets, read, accuracy):
    assert word_accuracy(targets, read) == accuracy


def test_paper_reward_by_hand():
    targets, found = ["RED", "FOX"], [("red", 0.9), ("fix", 0.6)]
    assert comp(targets, found) == pytest.approx(0.9 / 2)
    assert sim(targets, found) == pytest.approx((0.9 + 2 / 3 * 0.6) / 2, abs=1e-8)
    assert pen(targets, found, 0.6) == pytest.approx(0.6 * 2 / 12)  # an O is missing, an I is too many
    assert paper_reward(targets, found) == pytest.approx(0.45 + 0.65 - 0.1, abs=1e-8)


def test_a_perfect_picture_scores_two_and_an_empty_one_minus_lambda():
    assert paper_reward(["CAT"], [("CAT", 1.0)]) == pytest.approx(2.0, abs=1e-7)
    assert paper_reward(["CAT"], []) == -0.6
    assert paper_reward(["CAT"], [], lambda_=0.25) == -0.25


def test_a_repeated_word_pays_its_least_confidence_and_its_letters():
    once, twice = [("CAT", 0.9)], [("CAT", 0.9), ("CAT", 0.4)]
    assert comp(["CAT"], twice) == 0.4
    assert pen(["CAT"], twice, 0.6) == pytest.approx(0.6 * 3 / 9)
    assert paper_reward(["CAT"], twice) < paper_reward(["CAT"], once)


def test_letters_in_another_order_cost_no_penalty_but_no_completeness():
    found = [("TAC", 1.0)]
    assert pen(["CAT"], found, 0.6) == 0.0
    assert comp(["CAT"], found) == 0.0
    assert sim(["CAT"], found) == pytest.approx(1 / 3, abs=1e-8)


def test_unsure_readings_are_worth_less():
    assert paper_reward(["CAT"], [("CAT", 0.3)]) == pytest.approx(0.6, abs=1e-7)
    assert sim(["CAT"], [("CAR", 1.0), ("CAT", 0.5)]) == pytest.approx(0.5, abs=1e-7)  # the likest, not the best paid


@pytest.mark.parametrize(
    ("target", "read", "scores"),
    [
        ("CAT", "cat", [1, 1, 1]),
        ("CAT", "CXT", [1, 0, 1]),
        ("CAT", "AT", [0, 1, 1]),
        ("CAT", "CAAT", [0, 1, 1]),  # an insertion takes 1 from the letter before it
        ("CAT", "XCAT", [0, 1, 1]),  # ... or from the first
        ("CAT", "", [0, 0, 0]),
        ("HOUSE", "MOUSES", [0, 1, 1, 1, 0]),
    ],
)
def test_letter_scores_by_hand(target, read, scores):
    assert letter_scores(target, read) == scores


def test_letter_scores_mean_is_ned_where_nothing_is_inserted():
    for read in ("", "A", "HOSE", "MOUSE", "HXXSE"):
        assert sum(letter_scores("HOUSE", read)) / 5 == pytest.approx(ned_similarity("HOUSE", read))
