"""The sampler: every prompt once an epoch, and no state."""

import pytest

from varl.data.sampler import PromptSampler, permutation, shard
from varl.errors import DataError
from varl.types import Prompt

PROMPTS = [Prompt(text=str(i)) for i in range(7)]


def names(prompts):
    return [prompt.text for prompt in prompts]


@pytest.mark.parametrize("per_step", [1, 2, 3, 7, 10])
def test_each_epoch_holds_each_prompt_once(per_step):
    sampler = PromptSampler(PROMPTS, seed=3, per_step=per_step)
    drawn = [name for step in range(70) for name in names(sampler.at(step))]
    epochs = [drawn[i : i + 7] for i in range(0, len(drawn) - 6, 7)]
    assert all(sorted(epoch) == list("0123456") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_step_does_not_depend_on_the_steps_before():
    ahead = PromptSampler(PROMPTS, seed=3, per_step=3)
    late = [ahead.at(step) for step in (9, 4, 0)]
    again = PromptSampler(PROMPTS, seed=3, per_step=3)
    assert [again.at(step) for step in (0, 4, 9)] == late[::-1]


def test_per_step_does_not_change_the_order():
    one, three = (PromptSampler(PROMPTS, seed=3, per_step=n) for n in (1, 3))
    assert [one.at(step)[0] for step in range(21)] == [prompt for step in range(7) for prompt in three.at(step)]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {permutation(100, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_more_prompts_a_step_than_there_are():
    assert names(PromptSampler(PROMPTS[:1], seed=0, per_step=4).at(2)) == ["0"] * 4


def test_no_prompts_is_an_error():
    with pytest.raises(DataError, match="no prompts"):
        PromptSampler([], seed=0, per_step=1)


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 5, 8, 16])
def test_shards_are_contiguous_even_and_whole(count, world):
    items = list("abcdefghijklmnop")[:count]
    shards = [shard(items, rank, world) for rank in range(world)]
    assert [item for part, _ in shards for item in part] == items
    assert [slot for _, slots in shards for slot in slots] == list(range(count))
    assert all([items[slot] for slot in slots] == part for part, slots in shards)
    sizes = [len(part) for part, _ in shards]
    assert max(sizes) - min(sizes) <= 1
