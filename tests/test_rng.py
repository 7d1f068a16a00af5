import pytest
import torch

from varl.rng import Stream, generator


def test_an_address_is_worth_the_same_numbers_every_time():
    first, again = (torch.rand(5, generator=generator(7, "rollout", 3, 11)) for _ in range(2))
    assert torch.equal(first, again)


def test_addresses_are_not_confused():
    addresses = [(0,), (1,), (0, 1), (0, "1"), (0, 1, 2), (0, 12), (0, "1", 2), (0, "rollout"), (0, "rollout", 0), (0, "tokens", 0)]
    firsts = {torch.rand(1, generator=generator(*address)).item() for address in addresses}
    assert len(firsts) == len(addresses)


def test_the_numbers_are_pinned():
    """A run resumed with another version must draw what it would have drawn."""
    assert generator(0, "rollout", 0, 0).initial_seed() == generator(0, *("rollout", 0, 0)).initial_seed()
    assert torch.randint(0, 1 << 30, (3,), generator=generator(1, "a", 2)).tolist() == [14250717, 1039445048, 542590355]


def test_rows_do_not_depend_on_their_neighbours():
    whole = Stream(seed=3, path=("rollout", 5), rows=tuple(range(6)))
    together = whole.uniform(4)
    apart = torch.cat([whole.select([i]).uniform(4) for i in range(6)])
    assert torch.equal(together, apart)
    assert torch.equal(whole.select([4, 1]).normal(2, 3), whole.normal(2, 3)[[4, 1]])


def test_repeat_gives_each_row_its_own_neighbouring_copies():
    stream = Stream(seed=0, rows=(2, 5))
    assert stream.repeat(3).rows == (6, 7, 8, 15, 16, 17)
    assert len(stream.repeat(3)) == 6


def test_at_goes_down_and_says_so():
    stream = Stream(seed=0, path=("a",), rows=(0,))
    assert stream.at("b", 1).path == ("a", "b", 1)
    assert torch.equal(stream.at("b").at(1).uniform(2), stream.at("b", 1).uniform(2))
    assert not torch.equal(stream.at("b").uniform(2), stream.at("c").uniform(2))


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_shapes_and_types(kind):
    drawn = getattr(Stream(seed=0, rows=(0, 1, 2)), kind)(4, 5)
    assert drawn.shape == (3, 4, 5)
    assert drawn.dtype == torch.float32


def test_uniform_fills_the_unit_interval_and_normal_is_standard():
    stream = Stream(seed=0, rows=tuple(range(200)))
    u, n = stream.uniform(100), stream.normal(100)
    assert 0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=4 / 12**0.5 / 141)  # four standard errors of 20000 draws
    assert n.mean().item() == pytest.approx(0, abs=4 / 141)
    assert n.std().item() == pytest.approx(1, abs=4 / 2**0.5 / 141)
