"""GenEval (arXiv 2310.11513): does a picture show the objects that were asked for, as many, of these colours, and so placed?

The rule is that of its evaluation script, written down anew on detections: `correct` is what it counts, `graded` a share of it to learn
from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from varl.config import GenEvalConfig
from varl.errors import RewardError
from varl.models.detection import Detection, Detector
from varl.models.vision import CLIP
from varl.rewards.objects import asked, hulls, padded, reported, require_objects
from varl.types import Box, Judgement, Prompt, Wanted

MOST = 16
"""Objects of a class that are looked at, the surest."""
REACH = 0.1
"""Share of the two objects' sizes by which they must be apart to lie beside each other."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = 0.6
"""What lies around an object whose colour is looked at."""
COLOURED = 64
"""Objects at once through CLIP."""
POSITIONS = ("left of", "right of", "above", "below")
KINDS = ("count", "colour", "position", "unwanted")


def counts(prompt: Prompt) -> bool:
    """Whether the prompt says how many there shall be at most of something that it asks for: GenEval's tag `counting`, and no other."""
    return not {wanted.name for wanted in prompt.objects}.isdisjoint(unwanted.name for unwanted in prompt.unwanted)


def relations(a: Box, b: Box, size: tuple[int, int]) -> frozenset[str]:
    """Where `a` lies as seen from `b`, in a picture of `size` (H, W): left of or right of, above or below, one of each, or nothing.

        o = centre(a) - centre(b),  r = sign(o) max(|o| - 0.1 (size(a) + size(b)), 0);  left of where r_x / |o| < -1/2, and so on

    in pixels and for each axis; nothing where both r are less than 0.001 pixels."""
    offsets, apart = [], []
    for axis, pixels in ((0, size[1]), (1, size[0])):
        a0, a1, b0, b1 = (box[place] * pixels for box in (a, b) for place in (axis, axis + 2))
        offset = (a0 + a1 - b0 - b1) / 2
        offsets.append(offset)
        apart.append(math.copysign(max(abs(offset) - REACH * (a1 - a0 + b1 - b0), 0.0), offset))
    if max(map(abs, apart)) < 1e-3:
        return frozenset()
    x, y = (distance / math.hypot(*offsets) for distance in apart)
    names = (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
    return frozenset(name for name, holds in names if holds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One thing that a prompt demands of its picture."""

    kind: Literal["count", "colour", "position", "unwanted"]
    index: int
    """Of the object in `Prompt.objects`; of `unwanted`, in `Prompt.unwanted`."""
    share: float
    """To what share it is met, 0 to 1; 1 is met."""
    said: str
    """What was demanded, and what there is."""


def seen(detections: Sequence[Detection], wanted: Wanted) -> list[Detection]:
    """Those of that class that are looked at, surest first."""
    return sorted((d for d in detections if d.label == wanted.name), key=lambda d: -d.score)[:MOST]


def conditions(detections: Sequence[Detection], prompt: Prompt, size: tuple[int, int]) -> list[Condition]:
    """What the prompt demands and to what share it is met in a picture of `size` (H, W), by what a detector was sure enough of there.

    count: of `count` objects, the share that is there. colour: of `count` objects, the share of that colour among the `count` surest.
    position: of all pairs of the `count` surest with those that they are placed by, the share that lies so; 0 where some are missing.
    unwanted: 1, or of the objects that are there the share that there may be."""
    found = [seen(detections, wanted) for wanted in prompt.objects]
    told = []
    for index, wanted in enumerate(prompt.objects):
        name, own = wanted.name, found[index][: wanted.count]
        told.append(("count", index, len(own) / wanted.count, f"at least {wanted.count} {name}, {len(found[index])} there"))
        if wanted.colour is not None:
            right = sum(d.colour == wanted.colour for d in own)
            others = ", ".join(str(d.colour) for d in own if d.colour != wanted.colour)
            there = f"{right} there{f' ({others})' if others else ''}"
            told.append(("colour", index, right / wanted.count, f"{wanted.count} {wanted.colour} {name}, {there}"))
        if wanted.position is not None:
            relation, place = wanted.position
            target = prompt.objects[place]
            theirs = found[place][: target.count]
            whole = len(own) == wanted.count and len(theirs) == target.count
            pairs = [relations(a.box, b.box, size) for a in own for b in theirs] if whole else []
            right = sum(relation in pair for pair in pairs)
            there = f"so are {right} of {len(pairs)} pairs" if whole else "some are missing"
            told.append(("position", index, right / max(len(pairs), 1), f"{name} {relation} {target.name}, {there}"))
    for index, unwanted in enumerate(prompt.unwanted):
        there = len(seen(detections, unwanted))
        share = 1.0 if there < unwanted.count else (unwanted.count - 1) / there
        told.append(("unwanted", index, share, f"fewer than {unwanted.count} {unwanted.name}, {there} there"))
    return [Condition(kind=kind, index=index, share=share, said=said) for kind, index, share, said in told]


def correct(detections: Sequence[Detection], prompt: Prompt, size: tuple[int, int]) -> tuple[bool, str]:
    """Whether a picture of `size` (H, W) is what GenEval counts as correct, and a line about each condition that is not met.

    `detections` are those that the detector was sure enough of, with `colour` where the prompt demands one. All conditions
    must be met: of each class the `count` surest objects are looked at, all of these must have the colour, and lie so to all of the
    object's that they are placed by; there must be fewer of what is unwanted than its `count`."""
    missed = [condition.said for condition in conditions(detections, prompt, size) if condition.share < 1]
    return not missed, "\n".join(f"wanted {said}" for said in missed)


def graded(detections: Sequence[Detection], prompt: Prompt, size: tuple[int, int]) -> float:
    """Mean over the prompt's conditions of the share to which each is met, in [0, 1]; 1 where the picture is `correct` and only there."""
    shares = [condition.share for condition in conditions(detections, prompt, size)]
    return sum(shares) / len(shares)


# ---- colours ----------------------------------------------------------------------------------------------------------------------------


def looked_at(detections: Sequence[Detection], prompt: Prompt) -> list[int]:
    """Places of the detections whose colour the prompt demands: of each such class the `count` surest."""
    found = {id(d) for w in prompt.objects if w.colour is not None for d in seen(detections, w)[: w.count]}
    return [place for place, detection in enumerate(detections) if id(detection) in found]


def cut_out(image: Float[Tensor, "3 H W"], detection: Detection) -> Float[Tensor, "3 h w"]:
    """The object's box of the picture, to whole pixels and at least one; on grey, where its mask is known."""
    height, width = image.shape[1:]
    if detection.mask is not None:
        image = image.where(detection.mask.to(image.device), GREY)
    x0, y0, x1, y1 = (round(share * pixels) for share, pixels in zip(detection.box, (width, height, width, height), strict=True))
    left, top = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return image[:, top : max(y1, top + 1), left : max(x1, left + 1)]


class Colours:
    """Names the colour of an object by CLIP: the likest of ten, by the mean of the unit features of three texts for each, of which two name
    the object's class."""

    def __init__(self, clip: CLIP, batch: int) -> None:
        self.clip, self.batch = clip, batch

    @torch.no_grad()
    def features(self, name: str) -> Float[Tensor, "10 D"]:
        """Unit vectors of the colours of such objects."""
        texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in COLOUR_TEXTS]
        return F.normalize(self.clip.encode_texts(texts).view(len(COLOURS), len(COLOUR_TEXTS), -1).mean(1), dim=1)

    @torch.no_grad()
    def see(
        self, images: Float[Tensor, "B 3 H W"], found: Sequence[Sequence[Detection]], prompts: Sequence[Prompt]
    ) -> list[tuple[Detection, ...]]:
        """The same detections, with colour where the picture's prompt demands one. All pictures' objects go through CLIP together."""
        clip = self.clip.to(images.device)
        answer = [list(detections) for detections in found]
        places = [(row, at) for row, prompt in enumerate(prompts) for at in looked_at(found[row], prompt)]
        for start in range(0, len(places), self.batch):
            some = places[start : start + self.batch]
            pixels = torch.cat([clip.prepare(cut_out(images[row], answer[row][at])[None]) for row, at in some])
            for (row, at), unit in zip(some, clip.encode_prepared(pixels), strict=True):
                colour = COLOURS[int((self.features(answer[row][at].label) @ unit).argmax())]
                answer[row][at] = replace(answer[row][at], colour=colour)
        return [tuple(detections) for detections in answer]


# ---- the reward -------------------------------------------------------------------------------------------------------------------------


def shares(told: Sequence[Condition], prompt: Prompt) -> list[float]:
    """`graded`, divided among the prompt's objects: to each what its own conditions bring, and what is unwanted brings to those of its
    class, or, if there is none, to all alike."""
    found = [0.0] * len(prompt.objects)
    for condition in told:
        whose = [condition.index]
        if condition.kind == "unwanted":
            name = prompt.unwanted[condition.index].name
            whose = [place for place, wanted in enumerate(prompt.objects) if wanted.name == name] or list(range(len(found)))
        for place in whose:
            found[place] += condition.share / len(told) / len(whose)
    return found


class GenEval:
    """A RewardFn: the share of its prompt's conditions that a picture meets, or whether it is correct. Parts: `correct`, 0 or 1, and
    `count`, `colour`, `position` and `unwanted`, the mean share of these, NaN where the prompt has none.

    Each object is a region, at the box around all that was found of its class; its value is what `shares` gives it."""

    def __init__(self, config: GenEvalConfig, detector: Detector, clip: CLIP) -> None:
        self.config, self.detector, self.colours = config, detector, Colours(clip, COLOURED)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Judgement:
        require_objects(prompts)
        require_geneval(prompts)
        found = self.detect(images, prompts)
        size = (images.shape[2], images.shape[3])
        told = [conditions(detections, prompt, size) for detections, prompt in zip(found, prompts, strict=True)]
        right = torch.tensor([float(all(condition.share == 1 for condition in row)) for row in told])
        parts = {"correct": right}
        for kind in KINDS:
            own = [[condition.share for condition in row if condition.kind == kind] for row in told]
            parts[kind] = torch.tensor([sum(row) / len(row) if row else torch.nan for row in own])
        region_value = padded([shares(row, prompt) for row, prompt in zip(told, prompts, strict=True)])
        value = region_value.nansum(1)
        if self.config.score == "correct":
            value, region_value = right, None
        return Judgement(
            value=value,
            parts=parts,
            region_value=region_value,
            region_box=hulls(found, prompts),
            found=tuple(reported(detections) for detections in found),
        )

    def detect(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> list[tuple[Detection, ...]]:
        """What `correct` takes: all that the detector is sure enough of, with the colours that the prompts demand."""
        least = [self.config.counting_threshold if counts(prompt) else self.config.threshold for prompt in prompts]
        return self.colours.see(images, self.detector.detect(images, [asked(prompt) for prompt in prompts], least), prompts)


def require_geneval(prompts: Sequence[Prompt]) -> None:
    """RewardError for the first prompt that demands what GenEval's rule cannot see."""
    for wanted in (wanted for prompt in prompts for wanted in prompt.objects):
        if wanted.colour is not None and wanted.colour not in COLOURS:
            raise RewardError(
                f"colour {wanted.colour!r} of {wanted.name!r}: GenEval knows {', '.join(COLOURS)}. Take one of them, or the reward vqa."
            )
        if wanted.position is not None and wanted.position[0] not in POSITIONS:
            raise RewardError(
                f"position {wanted.position[0]!r} of {wanted.name!r}: GenEval knows {', '.join(POSITIONS)}. Take one of them, or the "
                "reward grounding_dino."
            )
