"""T2I-R1's detector reward (arXiv 2505.00703), which MAR-GRPO has too: are the objects there, as many, and where they should be?"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from varl.config import GroundingDINOConfig
from varl.models.detection import Detection, Detector
from varl.rewards.geneval import counts
from varl.rewards.objects import asked, hulls, padded, reported, require_objects
from varl.types import Box, Judgement, Position, Prompt

OVERLAP = 0.1
"""IoU from which on a place is only partly right."""
DUPLICATE = 0.5
"""IoU above which the less sure of two boxes of a class is dropped before they are counted."""
NEAR = 150 / 512
"""Share of the picture's longer side: 150 pixels of 512. (T2I-CompBench's scorer takes 150 of 479, to which it brings pictures.)"""
PRESENT, PLACED, MISCOUNTED = 0.2, 0.5, 0.2
"""What it is worth that one of two objects is there, that they lie right, and that objects are there, but not as many."""


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(across, 0.0) * max(down, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union else 0.0


def placed(position: Position, a: Box, b: Box, size: tuple[int, int], *, near: float = NEAR, paper: bool = False) -> float:
    """To what share `a` lies in this position to `b`, in a picture of `size` (H, W).

        left of and the others: min(1, 0.1 / IoU) where the centres are further apart that way than the other, else 0
        next to: 1 where |x| < d or |y| < d, else d / max(|x|, |y|), centres' distances in shares of the longer side, d = `near`

    T2I-R1's determine_position, after T2I-CompBench. In its `paper` form "above" is 0, for it asks for other words, and d is 150 shares."""
    scale = [pixels / max(size) for pixels in (size[1], size[0])]
    x, y = (share * (b[axis] + b[axis + 2] - a[axis] - a[axis + 2]) / 2 for axis, share in enumerate(scale))
    if position == "next to":
        return 1.0 if paper or min(abs(x), abs(y)) < near else near / max(abs(x), abs(y))
    that_way = {"left of": x > abs(y), "right of": -x > abs(y), "above": y > abs(x) and not paper, "below": -y > abs(x)}
    return min(1.0, OVERLAP / max(iou(a, b), OVERLAP)) if that_way[position] else 0.0


def thinned(detections: Sequence[Detection], *, paper: bool = False) -> list[Detection]:
    """Those of which no surer one is a duplicate, surest first. In the `paper` form boxes are compared as if (centre x, centre y, width,
    height) were corners."""

    def corners(box: Box) -> Box:
        return ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]) if paper else box

    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if all(iou(corners(detection.box), corners(other.box)) <= DUPLICATE for other in kept):
            kept.append(detection)
    return kept


def object_shares(detections: Sequence[Detection], prompt: Prompt, size: tuple[int, int], *, paper: bool = False) -> dict[str, list[float]]:
    """What each object brings to the reward by being `present`, in the right `count` and `placed`; the reward is the sum of all.

        object:   1 if it is there
        count:    1 if there are as many, 0.2 if there are others, 0 if none; where the prompt wants more than one of something, or no more
        position: 0.2 for each of the two that is there, and 0.5 `placed` of the surest of each

    The mean over the prompt's objects that are not placed by another and by which none is placed, and its pairs of those that are: T2I-R1's
    prompts have either one pair or none."""
    found = [[detection for detection in detections if detection.label == wanted.name] for wanted in prompt.objects]
    pairs = [(place, wanted.position[1]) for place, wanted in enumerate(prompt.objects) if wanted.position is not None]
    single = sorted(set(range(len(found))) - {place for pair in pairs for place in pair})
    weight = 1 / (len(pairs) + len(single))
    told = {kind: [0.0] * len(found) for kind in ("present", "count", "placed")}
    exact = counts(prompt) or any(wanted.count > 1 for wanted in prompt.objects)
    for place in single:
        if exact and found[place]:
            right = len(thinned(found[place], paper=paper)) == prompt.objects[place].count
            told["count"][place] = weight * (1.0 if right else MISCOUNTED)
        elif found[place]:
            told["present"][place] = weight
    for place, other in pairs:
        for one in (place, other):
            told["present"][one] += weight * PRESENT * bool(found[one])
        position = prompt.objects[place].position
        if position is not None and found[place] and found[other]:
            a, b = (max(found[one], key=lambda detection: detection.score).box for one in (place, other))
            told["placed"][place] = weight * PLACED * placed(position[0], a, b, size, paper=paper)
    return told


class GroundingDINO:
    """A RewardFn: `object_shares`, added up. Parts: what being `present`, the right `count` and being `placed` bring to it.

    Each object is a region, at the box around all that was found of its class."""

    def __init__(self, config: GroundingDINOConfig, detector: Detector) -> None:
        self.config, self.detector = config, detector

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Judgement:
        require_objects(prompts)
        found = self.detector.detect(images, [asked(prompt) for prompt in prompts], [self.config.threshold] * len(prompts))
        size, paper = (images.shape[2], images.shape[3]), self.config.form == "paper"
        told = [object_shares(detections, prompt, size, paper=paper) for detections, prompt in zip(found, prompts, strict=True)]
        parts = {kind: padded([row[kind] for row in told]) for kind in ("present", "count", "placed")}
        region_value = parts["present"] + parts["count"] + parts["placed"]
        return Judgement(
            value=region_value.nansum(1),
            parts={kind: part.nansum(1) for kind, part in parts.items()},
            region_value=region_value,
            region_box=hulls(found, prompts),
            found=tuple(reported(detections) for detections in found),
        )
