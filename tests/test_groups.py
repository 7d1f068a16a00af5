"""Rewards to which groups matter, and what is measured on pictures beside the reward."""

import math

import pytest
import torch

from gaussian_chain import GaussianPolicy
from tabular import InstantJudge, TabularPolicy, brightness
from teacher_forced import TeacherForcedTabular
from varl.algorithms.grpo import GRPO
from varl.algorithms.mar_grpo import MARGRPO
from varl.algorithms.va_pi import VAPI
from varl.algorithms.var_rl import VARRL
from varl.build import build_reward, build_served
from varl.config import GRPOConfig, MARGRPOConfig, MiddleStep, PythonRewardConfig, RunConfig, VAPIConfig, VARRLConfig, WeightedReward
from varl.errors import ConfigError
from varl.rewards.groups import Groupwise, Watched, background_edges, edge_density, pixel_diversity
from varl.rewards.judge import RewardJudge, judge_now
from varl.rng import Stream
from varl.types import GroupRewardFn, Judgement, Prompt, Region, groups

ONE, TWO = Prompt(label=0), Prompt(label=1)
NAN = math.nan


def same(got, *want):
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-6, equal_nan=True)


def flat(*levels):
    """Pictures of one level each, 2x2 pixels."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 2, 2)


# ---- groups


def test_groups_are_told_or_found_by_their_prompts():
    prompts = [ONE, ONE, TWO, TWO, TWO, TWO]
    assert groups(prompts, None) == [range(2), range(2, 6)]
    assert groups(prompts, 2) == [range(2), range(2, 4), range(4, 6)]
    assert groups([], 2) == groups([], None) == []


def rank(images, prompts):
    """How many of the pictures that it sees are darker: of no meaning for one alone, and another for more."""
    level = images.mean((1, 2, 3))
    return (level[:, None] > level).float().sum(1)


def test_a_groupwise_reward_sees_one_group_at_a_time():
    images, prompts = flat(0.1, 0.4, 0.9, 0.2, 0.3, 0.0), [ONE] * 6
    reward = Groupwise(rank)
    assert isinstance(reward, GroupRewardFn)
    same(judge_now(reward, images, prompts, 2).value, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)
    same(judge_now(reward, images, prompts, 3).value, 0.0, 1.0, 2.0, 1.0, 2.0, 0.0)
    same(judge_now(reward, images, prompts).value, 1.0, 4.0, 5.0, 2.0, 3.0, 0.0)
    judge = RewardJudge({"rank": (2.0, reward), "level": (1.0, lambda images, prompts: images.mean((1, 2, 3)))})
    same(judge.submit(images, prompts, 2).result().value, 0.1, 2.4, 2.9, 0.2, 2.3, 0.0)
    judge.close()


def test_the_config_makes_a_callable_groupwise():
    build = [build_reward(PythonRewardConfig(target="test_groups:rank", groupwise=groupwise)) for groupwise in (False, True)]
    images = flat(0.1, 0.4, 0.9, 0.2)
    assert [judge_now(reward, images, [ONE] * 4, 2).value.tolist() for reward in build] == [[0, 2, 3, 1], [0, 1, 1, 0]]


def test_a_groupwise_reward_is_not_served():
    rewards = {"rank": WeightedReward(reward=PythonRewardConfig(target="test_groups:rank", groupwise=True))}
    with pytest.raises(ConfigError, match=r"rewards\.rank: compares the pictures of a group, and a service is not told"):
        build_served(RunConfig(model="none", rewards=rewards), "rank")


class Told(InstantJudge):
    """Remembers what it was asked."""

    def submit(self, images, prompts, group=None):
        self.seen = [*getattr(self, "seen", []), (list(prompts), group)]
        return super().submit(images, prompts, group)


TWICE = [ONE, TWO, TWO, ONE, ONE]
"""Neighbours that are alike: by prompts alone they would be one group, where a chunk holds both."""
PIXELS = torch.rand(1, 3, 1, 3, generator=torch.Generator().manual_seed(0))
PREFIX, SUFFIX = {"prefix_updates": 1, "suffix_updates": 0}, {"prefix_updates": 0, "suffix_updates": 1}
ALGORITHMS = {
    "grpo": (lambda g: GRPO(g), TabularPolicy, 4),
    "prefix": (lambda g: VARRL(VARRLConfig(grpo=g, middle_step=MiddleStep(index=1), num_continuations=2, **PREFIX)), TabularPolicy, 8),
    "suffix": (lambda g: VARRL(VARRLConfig(grpo=g, middle_step=MiddleStep(index=1), **SUFFIX)), TabularPolicy, 4),
    "va_pi": (lambda g: VAPI(VAPIConfig(grpo=g), lambda prompts: PIXELS.expand(len(prompts), -1, -1, -1)), TeacherForcedTabular, 4),
    "rewarded": (
        lambda g: MARGRPO(MARGRPOConfig(grpo=g, ar_steps=0, denoise_moves=0, num_trajectories=2, trajectories="rewarded")),
        GaussianPolicy,
        12,
    ),
    "damped": (lambda g: MARGRPO(MARGRPOConfig(grpo=g, ar_steps=0, denoise_moves=0, num_trajectories=2)), GaussianPolicy, 4),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_every_algorithm_asks_about_whole_groups_and_says_which(name, chunk):
    make, policy, size = ALGORITHMS[name]
    judge = Told(brightness)
    rng = Stream(seed=5, path=("rollout", 0), rows=tuple(range(len(TWICE))))
    list(make(GRPOConfig(num_generations=4, rollouts_per_chunk=chunk)).collect(policy(), TWICE, judge, rng, 0))
    seen = [prompts[rows.start : rows.stop] for prompts, group in judge.seen for rows in groups(prompts, group)]
    assert {group for _, group in judge.seen} == {size}
    assert [[prompt.label for prompt in some] for some in seen] == [[prompt.label] * size for prompt in TWICE]


@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_chunks_cut_no_group_and_join_none(chunk):
    """Equal prompts side by side in a step: what a groupwise reward says of their pictures does not depend on who shares a chunk."""

    def advantages(chunk):
        judge = RewardJudge({"apart": (1.0, Groupwise(pixel_diversity)), "rank": (0.1, Groupwise(rank))})
        rng = Stream(seed=5, path=("rollout", 0), rows=tuple(range(len(TWICE))))
        algorithm = GRPO(GRPOConfig(num_generations=4, rollouts_per_chunk=chunk))
        pieces = list(algorithm.collect(TabularPolicy(vocab=3), TWICE, judge, rng, 0))
        judge.close()
        return torch.cat([piece.advantage for piece in pieces])

    whole = advantages(4)
    assert whole.abs().max() > 0.5
    assert torch.equal(advantages(chunk), whole)


# ---- watched


def test_what_is_watched_looks_at_the_first_of_each_group_and_tells_a_value_alone():
    asked = []

    def reward(images, prompts):
        asked.append(len(prompts))
        value = images.mean((1, 2, 3))
        return Judgement(value=value, parts={"x": value}, region_value=value[:, None], region_box=torch.zeros(len(value), 1, 4))

    images, prompts = flat(0.1, 0.4, 0.9, 0.2, 0.3, 0.0), [ONE] * 6
    told = judge_now(Watched(reward, 2), images, prompts, 3)
    same(told.value, 0.1, 0.4, NAN, 0.2, 0.3, NAN)
    assert asked == [4]
    assert (told.parts, told.region_value, told.region_box) == ({}, None, None)
    same(judge_now(Watched(Groupwise(rank), 2), images, prompts, 3).value, 0.0, 1.0, NAN, 0.0, 1.0, NAN)
    same(judge_now(Watched(reward, 8), images, [ONE] * 2 + [TWO] * 4).value, 0.1, 0.4, 0.9, 0.2, 0.3, 0.0)


# ---- measures of pictures


def test_diversity_by_hand():
    same(pixel_diversity(flat(0.0, 1.0, 0.5), [ONE] * 3), 0.75, 0.75, 0.5)
    same(pixel_diversity(flat(0.25, 0.25), [ONE] * 2), 0.0, 0.0)
    assert pixel_diversity(flat(0.25), [ONE]).isnan().all()
    half = torch.zeros(2, 3, 2, 2)
    half[1, :, 0] = 1.0  # differs in half of its pixels
    same(pixel_diversity(half, [ONE] * 2), math.sqrt(0.5), math.sqrt(0.5))


def test_edges_by_hand():
    picture = torch.zeros(1, 3, 5, 5)
    picture[:, :, :, 2:] = 0.2  # one step to the right, seen from column 1 of 4 rows
    same(edge_density(picture, [()]), 4 / 16)
    same(edge_density(picture / 2.5, [()]), 0.0)  # .08 is not strong
    picture[:, :, 3:] = 1.0  # and one downwards, from row 2, of which column 1 has both
    same(edge_density(picture, [()]), (3 + 3) / 16)
    slope = torch.zeros(1, 3, 2, 2)
    slope[:, :, 0, 1] = slope[:, :, 1, 0] = 0.08  # neither is strong alone; together .113
    same(edge_density(slope, [()]), 1.0)
    green = torch.zeros(1, 3, 2, 2)
    green[:, 1, 0, 1] = 0.18  # .106 of luma
    same(edge_density(torch.cat([green, green[:, [1, 0, 2]]]), [(), ()]), 1.0, 0.0)  # of red it is .054


def test_edges_in_a_box_and_of_a_box_do_not_count():
    picture = torch.full((1, 3, 8, 8), 0.5)
    picture[:, :, 2:6, 2:6] = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)).round()
    box = (0.25, 0.25, 0.75, 0.75)
    assert edge_density(picture, [()]).item() > 0.1
    same(edge_density(picture, [[box]]), 0.0)
    picture[:, :, 6, 6] = 1.0  # seen from its left, from above and from itself
    same(edge_density(picture, [[box]]), 3 / (49 - 16 - 4 - 4))  # 16 places lie in the box, 4 left of it, 4 above
    assert edge_density(picture, [[(0.0, 0.0, 1.0, 1.0)]]).isnan().all()
    prompts = [Prompt(text="A", regions=(Region(text="A", box=box),)), Prompt(text="A", regions=(Region(text="A"),))]
    both = picture.repeat(2, 1, 1, 1)
    torch.testing.assert_close(background_edges(both, prompts), edge_density(both, [[box], ()]), rtol=0, atol=0)
