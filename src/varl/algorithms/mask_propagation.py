"""Mask propagation and region credit: which tokens can have had a part in what was judged.

VAR-RL (arXiv 2601.02256) says no more than that a mask is built from the predicted boxes and carried from fine to coarse scales. Paper,
read literally: `chained_mask`. Ours: `direct_mask`, because any-overlap carried over grids that do not nest (12, 10, 8, 7) soon covers
everything. Attention is global, so either is a heuristic. A mask that depends on the outcome biases the gradient; boxes fixed by the prompt
do not."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from varl.algorithms.advantages import Scale, part_advantages
from varl.types import Judgement, Layout

TOUCH = 1e-6
"""Shares of the picture; overlaps narrower than this are rounding."""


def dilate(box: Float[Tensor, "*B 4"], grid: tuple[int, int], cells: int) -> Float[Tensor, "*B 4"]:
    """Boxes widened on each side by `cells` cells of `grid` (h, w). They may then reach past the picture's edge."""
    dx, dy = cells / grid[1], cells / grid[0]
    return box + box.new_tensor([-dx, -dy, dx, dy])


def overlaps(box: Float[Tensor, "*B 4"], cells: Float[Tensor, "L 4"]) -> Bool[Tensor, "*B L"]:
    """Whether box and cell share a positive area. A NaN box overlaps nothing."""
    box, cells = box[..., None, :].double(), cells.double()
    width = torch.minimum(box[..., 2], cells[:, 2]) - torch.maximum(box[..., 0], cells[:, 0])
    height = torch.minimum(box[..., 3], cells[:, 3]) - torch.maximum(box[..., 1], cells[:, 1])
    return (width > TOUCH) & (height > TOUCH)


def direct_mask(box: Float[Tensor, "B N 4"], grids: Sequence[tuple[int, int]]) -> Bool[Tensor, "B L"]:
    """Tokens whose cell any of the row's boxes overlaps, each grid projected from the picture on its own. A row without boxes is masked
    nowhere: silence there would hide the worst pictures, exactly those that found no text."""
    return _all_if_none(overlaps(box, _cells(grids)).any(1))


def chained_mask(box: Float[Tensor, "B N 4"], grids: Sequence[tuple[int, int]]) -> Bool[Tensor, "B L"]:
    """As `direct_mask` on the finest grid; a cell of a coarser grid is on if any cell that is on in the next finer grid overlaps it."""
    masks = [overlaps(box, _cells(grids[-1:])).any(1)]
    for i in range(len(grids) - 1, 0, -1):
        link = overlaps(_cells(grids[i : i + 1]), _cells(grids[i - 1 : i]))
        masks.insert(0, (masks[0][:, :, None] & link).any(1))
    return _all_if_none(torch.cat(masks, 1))


def judged_boxes(judgement: Judgement) -> Float[Tensor, "B N 4"]:
    """The boxes that a picture was judged by: its regions', or if it has none, those of the text that was read in it. NaN pads."""
    rows = []
    for i in range(len(judgement.value)):
        region = [] if judgement.region_box is None else [box for box in judgement.region_box[i].tolist() if box[0] == box[0]]
        rows.append(region or ([] if judgement.found is None else [list(found.box) for found in judgement.found[i]]))
    out = torch.full((len(rows), max([1, *map(len, rows)]), 4), torch.nan)
    for i, boxes in enumerate(rows):
        out[i, : len(boxes)] = torch.tensor(boxes).reshape(-1, 4)
    return out


def region_reach(box: Float[Tensor, "B R 4"], cells: Float[Tensor, "L 4"]) -> Bool[Tensor, "B R L"]:
    """Which tokens a region's box overlaps; a region with no known box may be anywhere, and reaches them all."""
    return overlaps(box, cells) | box[..., :1].isnan()


def spread(advantage: Float[Tensor, "B R"], reach: Bool[Tensor, "B R L"]) -> Float[Tensor, "B L"]:
    """Each token's advantage: the sum over the regions that reach it."""
    return torch.einsum("br,brl->bl", advantage, reach.to(advantage.dtype))


def region_advantages(
    region_value: Float[Tensor, "P G R"], reach: Bool[Tensor, "P G R L"], scale: Scale = "group"
) -> Float[Tensor, "P G L"]:
    """Per-token advantage of a reward that is a sum over regions, each of which `reach`es some of the tokens:

        A_l = sum_{r reaches l} (x_r - mean_G x_r) / (sigma + 1e-4),      sigma^2 = sum_r var(x_r)

    A token touched by several regions gets their sum, because the score-function gradient of E[sum_r x_r] is
    E[sum_l grad log pi_l * sum_r (x_r - b_r)], and the terms of regions that the token cannot influence are noise of expectation 0; to
    leave them out is the whole gain. Dividing each region by its own deviation would be the gradient of another reward, hence one sigma for
    all. A 1x1 grid is touched by every box and keeps the global advantage; a token that no region touches gets 0."""
    return spread(part_advantages(region_value, scale).flatten(0, 1), reach.flatten(0, 1)).unflatten(0, region_value.shape[:2])


def _cells(grids: Sequence[tuple[int, int]]) -> Float[Tensor, "L 4"]:
    return Layout(grids=tuple(grids), steps=len(grids)).cells()


def _all_if_none(mask: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    return mask | ~mask.any(1, keepdim=True)
