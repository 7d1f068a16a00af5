"""Several rewards in one sum, worked by hand."""

import math

import pytest
import torch

from tabular import TabularPolicy
from varl.algorithms.advantages import group_advantages
from varl.algorithms.mixing import standardised
from varl.build import build_judge, build_mixing
from varl.config import GRPOConfig, PythonRewardConfig, RunConfig, WeightedReward
from varl.rewards.judge import RewardJudge
from varl.rng import Stream
from varl.types import Judgement, Prompt

NAN = float("nan")
ONE, TWO = Prompt(text="one"), Prompt(text="two")


def same(got, *want):
    """To the 1e-4 that is added to a deviation."""
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=5e-4, equal_nan=True)


def told(*values, **parts):
    return Judgement(value=torch.tensor(values), **{name: torch.tensor(part) for name, part in parts.items()})


def test_differences_in_standard_deviations_around_the_mean_as_it_was():
    judgement = told(10.0, 20.0, 30.0, 5.0, 5.0, 5.0)
    same(standardised(judgement, [ONE] * 3 + [TWO] * 3).value, 19.0, 20.0, 21.0, 5.0, 5.0, 5.0)


def test_a_failed_picture_is_in_no_mean_and_no_deviation():
    same(standardised(told(1.0, NAN, 3.0), [ONE] * 3).value, 2 - 1 / math.sqrt(2), NAN, 2 + 1 / math.sqrt(2))
    same(standardised(told(NAN, NAN, 3.0, 4.0), [ONE, ONE, TWO, ONE]).value, NAN, NAN, 3.0, 4.0)


def test_regions_keep_summing_to_the_value():
    judgement = told(1.0, 3.0, 9.0, NAN, region_value=[[0.5, 0.5], [1.0, 2.0], [9.0, NAN], [NAN, NAN]])
    mixed = standardised(judgement, [ONE, ONE, TWO, TWO])
    same(mixed.value, 2 - math.sqrt(0.5), 2 + math.sqrt(0.5), 9.0, NAN)
    same(mixed.region_value[:3].nansum(1), *mixed.value[:3].tolist())
    same(mixed.region_value[0] - mixed.region_value[1], *(torch.tensor([-0.5, -1.5]) / math.sqrt(2)).tolist())
    assert mixed.region_value[2].isnan().tolist() == [False, True]


SMALL, LARGE = [0.0, 1.0, 0.0, 1.0], [300.0, 100.0, 100.0, 300.0]


def run_of(how):
    """A run with the reward of pixels `bright`, summed as `how` says."""
    return RunConfig(
        model="none",
        rewards={"bright": WeightedReward(reward=PythonRewardConfig(target="varl.rewards.toy:brightness"))},
        algorithm=GRPOConfig(num_generations=4, multi_objective_aggregation=how),
    )


def judged(how, *weights):
    values = iter((SMALL, LARGE))
    parts = {name: (w, lambda i, p, v=next(values): torch.tensor(v)) for name, w in zip("ab", weights, strict=True)}
    judge = RewardJudge(parts, build_mixing(run_of(how)))
    answer = judge.submit(torch.zeros(4, 3, 2, 2), [ONE] * 4).result()
    judge.close()
    return answer


def test_by_sum_the_larger_units_rule_and_by_deviations_the_weights():
    """Picture 1 is best by a and worst by b. Summed as they are b decides; in deviations equal weights leave pictures 0 and 1 alike."""
    summed, mixed = judged("sum_then_normalize", 1.0, 1.0), judged("normalize_then_sum", 1.0, 1.0)
    same(summed.value, 300.0, 101.0, 100.0, 301.0)
    deviation = math.sqrt(4 * 0.25 / 3)
    same(mixed.value - mixed.value.mean(), 0.0, 0.0, -1 / deviation, 1 / deviation)
    assert mixed.value.mean().item() == pytest.approx(summed.value.mean().item())
    for answer in (summed, mixed):
        assert answer.parts["a"].tolist() == SMALL
        assert answer.parts["b"].tolist() == LARGE
    weighed = judged("normalize_then_sum", 3.0, 1.0).value
    same(weighed - weighed.mean(), *(torch.tensor([-2.0, 2.0, -4.0, 4.0]) * 0.5 / deviation).tolist())


def test_the_advantages_are_those_of_the_sum_of_z_scores():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.rand(3, 5, generator=draw), 100 * torch.rand(3, 5, generator=draw)
    z = [(x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4) for x in (a, b)]
    prompts = [prompt for prompt in (ONE, TWO, ONE) for _ in range(5)]
    mixed = sum(w * standardised(Judgement(value=x.flatten()), prompts).value for w, x in ((1.0, a), (0.5, b)))
    torch.testing.assert_close(group_advantages(mixed.reshape(3, 5)), group_advantages(z[0] + 0.5 * z[1]), rtol=1e-4, atol=1e-4)


def test_one_reward_alone_teaches_the_same_either_way():
    value = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    mixed = standardised(Judgement(value=value.flatten()), [ONE] * 6 + [TWO] * 6).value.reshape(2, 6)
    torch.testing.assert_close(group_advantages(mixed), group_advantages(value), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("how", "alike"), [("sum_then_normalize", True), ("normalize_then_sum", False), ("running_scale", False)])
def test_the_config_chooses(how, alike):
    policy = TabularPolicy(vocab=3)
    images = policy.decode(policy.rollout([ONE] * 4, Stream(seed=0, path=("draw",), rows=(0, 1, 2, 3))))
    judge = build_judge(run_of(how), None)
    answer = judge.submit(images, [ONE] * 4).result()
    judge.close()
    assert torch.equal(answer.value, answer.parts["bright"]) is alike
    assert answer.value.mean().item() == pytest.approx(images.mean().item())
