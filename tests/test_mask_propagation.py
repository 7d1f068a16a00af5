import pytest
import torch

from tabular import InstantJudge, TabularPolicy, brightness, gradients
from varl.algorithms.advantages import group_advantages
from varl.algorithms.grpo import GRPO
from varl.algorithms.mask_propagation import chained_mask, dilate, direct_mask, judged_boxes, overlaps, region_advantages, region_reach
from varl.config import GRPOConfig
from varl.rng import Stream
from varl.types import Found, Judgement, Layout, Prompt

NAN = torch.nan
NEXTFLOW = tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64))
PROMPTS = [Prompt(label=0), Prompt(label=1)]
RNG = Stream(seed=3, rows=(0, 1))


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_direct_by_hand():
    """A box inside the lower left quarter of a 1x1, 2x2, 1x4 pyramid."""
    mask = direct_mask(boxes([[0.1, 0.6, 0.3, 0.9]]), [(1, 1), (2, 2), (1, 4)])
    assert mask.int().tolist() == [[1, 0, 0, 1, 0, 1, 1, 0, 0]]


def test_touching_at_an_edge_is_no_overlap():
    grid = [(1, 3)]
    assert direct_mask(boxes([[1 / 3, 0.0, 2 / 3, 1.0]]), grid).tolist() == [[False, True, False]]
    widened = dilate(boxes([[0.0, 0.0, 1 / 3, 1.0]]), (1, 12), 4)
    assert direct_mask(widened, grid).tolist() == [[True, True, False]]


def test_dilation_is_in_cells_of_the_finest_grid():
    got = dilate(boxes([0.5, 0.5, 0.75, 0.75]), (4, 8), 2)
    torch.testing.assert_close(got, boxes([0.25, 0.0, 1.0, 1.25]))


def test_chained_spreads_where_grids_do_not_nest():
    """1x3 on top of 1x2: the middle third lies under both halves, so chaining switches both on where projection needs only one."""
    grids, box = [(1, 2), (1, 3)], boxes([[0.4, 0.0, 0.45, 1.0]])
    assert direct_mask(box, grids).int().tolist() == [[1, 0, 0, 1, 0]]
    assert chained_mask(box, grids).int().tolist() == [[1, 1, 0, 1, 0]]


def test_nested_grids_chain_to_the_direct_mask():
    grids = [(n, n) for n in (1, 2, 4, 8)]
    box = torch.rand(20, 3, 2, 2, generator=torch.Generator().manual_seed(0)).sort(-2).values.flatten(2)
    assert torch.equal(chained_mask(box, grids), direct_mask(box, grids))


def test_chained_covers_direct_and_smears_on_the_papers_schedule():
    noise = torch.Generator().manual_seed(0)
    corner = torch.rand(40, 3, 2, generator=noise) * 0.7
    box = torch.cat([corner, corner + torch.tensor([0.25, 0.1])], -1)
    direct, chained = direct_mask(box, NEXTFLOW), chained_mask(box, NEXTFLOW)
    assert (chained | ~direct).all()
    sizes = [n * n for n, _ in NEXTFLOW]
    occupancy = [[part.float().mean().item() for part in mask.split(sizes, 1)] for mask in (direct, chained)]
    at_8x8 = [row[7] for row in occupancy]
    assert at_8x8[0] < 0.4 < 0.65 < at_8x8[1]
    assert occupancy[0][-1] == occupancy[1][-1]


@pytest.mark.parametrize("rule", [direct_mask, chained_mask])
def test_limits_of_both_rules(rule):
    grids = [(1, 1), (2, 3), (5, 7)]
    whole, nowhere, void = [[0.0, 0.0, 1.0, 1.0]], [[NAN] * 4], [[0.5, 0.5, 0.5, 0.5]]
    assert rule(boxes(whole, nowhere, void), grids).all()
    assert rule(boxes([[0.01, 0.01, 0.02, 0.02]]), grids)[:, 0].all()


def test_boxes_are_the_regions_or_else_what_was_read():
    found = (Found(text="A", confidence=1.0, box=(0.1, 0.1, 0.2, 0.2)), Found(text="B", confidence=0.5, box=(0.3, 0.3, 0.4, 0.4)))
    judgement = Judgement(
        value=torch.zeros(3), region_box=boxes([[0.0, 0.0, 0.5, 0.5]], [[NAN] * 4], [[NAN] * 4]), found=(found, found, ())
    )
    got = judged_boxes(judgement)
    torch.testing.assert_close(got[0, :1], boxes([0.0, 0.0, 0.5, 0.5]))
    torch.testing.assert_close(got[1], boxes(found[0].box, found[1].box))
    assert got[0, 1:].isnan().all()
    assert got[2].isnan().all()
    assert direct_mask(judged_boxes(Judgement(value=torch.zeros(2))), [(2, 2)]).all()


# ---- region credit

HALVES = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])


def test_regions_by_hand():
    """Two regions on a 1x1 and a 1x2 grid: each half learns from its own region, the whole from both."""
    value = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.5, 0.6]]])
    cells = Layout(grids=((1, 1), (1, 2)), steps=2).cells()
    reach = region_reach(HALVES.expand(3, 2, 4), cells)[None]
    centred = value - value.mean(1, keepdim=True)
    sigma = (0.25 + 0.12) ** 0.5 + 1e-4
    want = torch.stack([centred.sum(-1), centred[..., 0], centred[..., 1]], -1) / sigma
    torch.testing.assert_close(region_advantages(value, reach), want)


def test_one_region_that_reaches_all_is_grpo():
    value = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    got = region_advantages(value[..., None], torch.ones(4, 8, 1, 5, dtype=torch.bool))
    torch.testing.assert_close(got, group_advantages(value)[..., None].expand(4, 8, 5))


def test_a_region_without_a_box_may_be_anywhere_and_an_untouched_token_learns_nothing():
    cells = Layout(grids=((1, 2),), steps=1).cells()
    reach = region_reach(torch.stack([HALVES[0], torch.full((4,), NAN)])[None], cells)
    assert reach.tolist() == [[[True, False], [True, True]]]
    value = torch.tensor([[[1.0], [2.0]]])
    left_only = overlaps(HALVES[:1].expand(2, 1, 4), cells)[None]
    assert region_advantages(value, left_only)[..., 1].tolist() == [[0.0, 0.0]]


def local_reward(images, prompts):
    """The finest grid's left and right columns are two regions; NaN pads a third that no picture has."""
    region = torch.stack([images[:, 0, :, 0].sum(1), images[:, 0, :, 1].sum(1) * 0.3, torch.full((len(images),), NAN)], 1)
    box = torch.cat([HALVES, torch.full((1, 4), NAN)]).expand(len(images), 3, 4)
    return Judgement(value=region.nansum(1), region_value=region, region_box=box)


class FinestFirst(TabularPolicy):
    """Shows the finest grid in the first channel, and lets its tokens depend on nothing."""

    def decode(self, rollout):
        return super().decode(rollout).flip(1)


def independent():
    policy = FinestFirst(spread=0.4)
    with torch.no_grad():
        list(policy.module.children())[2].weight[:, policy.labels :] = 0
    return policy


def expected_gradient(policy, credit):
    """Exact over all 128 pictures: E[sum_l credit_l grad log pi_l]."""
    rollout = policy.every_picture(PROMPTS[0])
    probability = rollout.logp.sum(1).exp()
    return gradients(policy, (probability[:, None] * credit(rollout) * policy.score(rollout).logp).sum())


def test_s9_a_fixed_mask_keeps_the_expected_gradient_of_a_local_reward():
    """The reward looks at the left column of the finest grid, whose tokens depend on no earlier ones: to leave all other tokens out changes
    no expectation."""
    policy = independent()

    def reward(rollout):
        return policy.decode(rollout)[:, 0, :, 0].sum(1, keepdim=True)

    mask = torch.tensor([[0, 0, 0, 1, 0, 1, 0]])
    full = expected_gradient(policy, lambda rollout: reward(rollout).expand(-1, 7))
    masked = expected_gradient(policy, lambda rollout: reward(rollout) * mask)
    for a, b in zip(full, masked, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert max(part.abs().max().item() for part in full) > 0.1


def test_s9_a_mask_that_depends_on_the_outcome_does_not():
    """The same reward, but only pictures whose upper left pixel is lit mask at all, as boxes of what was found would."""
    policy = independent()

    def credit(rollout):
        reward = policy.decode(rollout)[:, 0, :, 0].sum(1, keepdim=True)
        lit = policy.decode(rollout)[:, 0, 0, 0:1] > 0
        return reward * torch.where(lit, torch.tensor([[0, 0, 0, 1, 0, 0, 0]]), 1)

    full = expected_gradient(policy, lambda rollout: policy.decode(rollout)[:, 0, :, 0].sum(1, keepdim=True).expand(-1, 7))
    assert max((a - b).abs().max().item() for a, b in zip(full, expected_gradient(policy, credit), strict=True)) > 0.05


def test_region_credit_keeps_the_expected_gradient_of_a_sum_of_local_rewards():
    policy = independent()

    def credit(rollout):
        judgement = local_reward(policy.decode(rollout), ())
        reach = region_reach(judgement.region_box, policy.layout.cells())
        return torch.einsum("br,brl->bl", judgement.region_value.nan_to_num(), reach.float())

    full = expected_gradient(policy, lambda rollout: local_reward(policy.decode(rollout), ()).value[:, None].expand(-1, 7))
    for a, b in zip(full, expected_gradient(policy, credit), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert max(part.abs().max().item() for part in full) > 0.1


def collected(judge=local_reward, **config):
    policy = FinestFirst()
    config = GRPOConfig(num_generations=8, rollouts_per_chunk=8, mask_dilation=0, **config)
    return list(GRPO(config).collect(policy, PROMPTS, InstantJudge(judge), RNG, 0))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_region_credit_end_to_end(scale):
    for piece in collected(region_credit=True, scale_rewards=scale):
        left, right = piece.advantage[:, [1, 3, 5]], piece.advantage[:, [2, 4, 6]]
        assert torch.equal(left, left[:, :1].expand(-1, 3))
        assert torch.equal(right, right[:, :1].expand(-1, 3))
        torch.testing.assert_close(piece.advantage[:, 0], left[:, 0] + right[:, 0])
        regions = piece.judgement.region_value[:, :2]
        for side, column in ((left, 0), (right, 1)):
            centred = regions[:, column] - regions[:, column].mean()
            ratio = (side[:, 0] * centred).sum() / centred.square().sum()
            torch.testing.assert_close(side[:, 0], ratio * centred)


def test_region_credit_falls_back_where_the_reward_is_global():
    plain, local = collected(brightness), collected(brightness, region_credit=True)
    for a, b in zip(plain, local, strict=True):
        assert torch.equal(a.advantage, b.advantage)


def test_a_mask_silences_the_reward_but_neither_kl_nor_size():
    def left(images, prompts):
        box = HALVES[:1].expand(len(images), 1, 4)
        return Judgement(value=brightness(images, prompts), region_box=box)

    for piece in collected(left, mask="direct", panw_alpha=0.7):
        on = torch.tensor([1, 1, 0, 1, 0, 1, 0])
        assert torch.equal(piece.weight, piece.kl_weight * on)
        assert (piece.kl_weight > 0).all()
        assert piece.size.tolist() == [7.0] * 8
        assert piece.metrics["mask_occupancy"] == pytest.approx(4 / 7)
        assert [piece.metrics[f"mask_occupancy/step_{i}"] for i in range(3)] == [1.0, 0.5, 0.5]
