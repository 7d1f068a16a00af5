"""Detectors of objects as `transformers` has them, looking at pictures that stay on their device."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from varl.errors import ConfigError
from varl.models.vision import Scaling, scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Detection:
    """An object that a detector saw in a picture."""

    label: str
    """Its class, by the name that was asked for."""
    score: float
    """How sure it is, 0 to 1."""
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in shares of the picture, y downwards."""
    mask: Bool[Tensor, "H W"] | None = None
    """Its pixels, where the detector tells them."""
    colour: str | None = None
    """Where somebody looked."""


@runtime_checkable
class Detector(Protocol):
    """Something that looks for objects."""

    def require(self, names: Sequence[str]) -> None:
        """Raises unless it can look for every one of these classes."""
        ...

    def detect(
        self, images: Float[Tensor, "B 3 H W"], names: Sequence[Sequence[str]], least: Sequence[float]
    ) -> list[tuple[Detection, ...]]:
        """What it saw in each picture of the classes `names` of that picture and was surer of than `least`, surest first."""
        ...


SYNONYMS = (
    ("computer mouse", "mouse"),
    ("tv remote", "remote"),
    ("computer keyboard", "keyboard"),
    ("motorcycle", "motorbike"),
    ("airplane", "aeroplane"),
    ("couch", "sofa"),
    ("potted plant", "pottedplant"),
    ("dining table", "diningtable"),
    ("tv", "tvmonitor"),
)
"""COCO's classes where GenEval or a released detector has another name for them."""


def vocabulary(id2label: Mapping[Any, str]) -> dict[str, int]:
    """The classes of a detector, with every name that is theirs, and their places among its logits."""
    known = {name.lower(): int(place) for place, name in id2label.items()}
    for one, other in SYNONYMS:
        for name, same in ((one, other), (other, one)):
            if same in known:
                known.setdefault(name, known[same])
    return known


def require_known(known: Mapping[str, int], names: Sequence[str], whose: str) -> None:
    """ConfigError for the first class that is not among the known ones, with those nearest to it."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"Its nearest: {', '.join(near)}" if near else f"It knows {len(known)}, such as {', '.join(sorted(known)[:8])}"
            raise ConfigError(
                f"class {name!r}: {whose} does not know it. {hint}. Name it so, or take a detector that reads, grounding_dino."
            )


def corners(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """(x0, y0, x1, y1) of (centre x, centre y, width, height), kept within the picture; in shares of it."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], -1).clamp(0, 1)


class ClosedDetector(nn.Module, ABC):
    """A detector of `transformers` that knows a fixed list of classes; frozen, in fp32."""

    def __init__(self, model: Any, scaling: Scaling, batch: int) -> None:
        super().__init__()
        self.model, self.scaling, self.batch = model.eval().requires_grad_(False), scaling, batch
        self.known = vocabulary(model.config.id2label)

    def require(self, names: Sequence[str]) -> None:
        require_known(self.known, names, f"this {self.model.config.model_type}")

    @torch.no_grad()
    def detect(
        self, images: Float[Tensor, "B 3 H W"], names: Sequence[Sequence[str]], least: Sequence[float]
    ) -> list[tuple[Detection, ...]]:
        model = self.model.to(images.device)
        found: list[tuple[Detection, ...]] = []
        for start in range(0, len(images), self.batch):
            some = slice(start, start + self.batch)
            out = model(pixel_values=scale(images[some], self.scaling))
            for row, (asked, limit) in enumerate(zip(names[some], least[some], strict=True)):
                self.require(asked)
                places = {self.known[name]: name for name in asked}
                found.append(surest(self.read(out, row, places, limit, (images.shape[2], images.shape[3]))))
        return found

    @abstractmethod
    def read(self, out: Any, row: int, places: Mapping[int, str], least: float, size: tuple[int, int]) -> list[Detection]:
        """What picture `row` shows of the classes at `places`, by the model's outputs."""


class BoxDetector(ClosedDetector):
    """DETR (arXiv 2005.12872) and its kin, RT-DETR (arXiv 2304.08069) too."""

    def read(self, out: Any, row: int, places: Mapping[int, str], least: float, size: tuple[int, int]) -> list[Detection]:
        """A query's likeliest class where the softmax has a class for nothing; else, of as many best pairs of a query and a class as there
        are queries, each."""
        logits, boxes = out.logits[row], corners(out.pred_boxes[row])
        if logits.shape[-1] == self.model.config.num_labels + 1:
            scores, labels = logits.softmax(-1)[:, :-1].max(-1)
        else:
            scores, best = logits.sigmoid().flatten().topk(len(logits))
            labels, boxes = best % logits.shape[-1], boxes[best // logits.shape[-1]]
        return [
            Detection(label=places[label], score=score, box=(x0, y0, x1, y1))
            for score, label, (x0, y0, x1, y1) in zip(scores.tolist(), labels.tolist(), boxes.tolist(), strict=True)
            if label in places and score > least
        ]


class Segmenter(ClosedDetector):
    """Mask2Former (arXiv 2112.01527), for instances."""

    def read(self, out: Any, row: int, places: Mapping[int, str], least: float, size: tuple[int, int]) -> list[Detection]:
        """Of as many best pairs of a query and a class as there are queries, each: its probability times the mean one of its mask's pixels,
        all at the size of the picture, and the box around them."""
        probabilities = out.class_queries_logits[row].softmax(-1)[:, :-1]
        scores, best = probabilities.flatten().topk(len(probabilities))
        found = []
        for score, place in zip(scores.tolist(), best.tolist(), strict=True):
            query, label = divmod(place, probabilities.shape[1])
            if label not in places or score <= least:  # a mask makes no one surer
                continue
            logits = out.masks_queries_logits[row, query][None, None]
            for to in (self.scaling.of(size), size):
                logits = F.interpolate(logits, to, mode="bilinear", align_corners=False)
            mask = logits[0, 0] > 0
            if not mask.any():
                continue
            score *= float(logits[0, 0].sigmoid()[mask].mean())
            if score > least:
                found.append(Detection(label=places[label], score=score, box=around(mask), mask=mask))
        return found


def around(mask: Bool[Tensor, "H W"]) -> tuple[float, float, float, float]:
    """The box of a mask that is not empty, in shares of the picture."""
    rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
    height, width = mask.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def surest(detections: Iterable[Detection]) -> tuple[Detection, ...]:
    """The same, surest first."""
    return tuple(sorted(detections, key=lambda detection: -detection.score))


class GroundingDetector(nn.Module):
    """GroundingDINO (arXiv 2303.05499), which looks for what it is told in words; frozen, in fp32.

    All classes of a picture are one caption, "dog . traffic light.", and a query's score for one of them is the mean probability of the
    class's tokens. T2I-R1's takes those of the first and the last word of a class, which differs from three words on."""

    def __init__(self, model: Any, tokenizer: Any, scaling: Scaling, batch: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.scaling, self.batch = model.eval().requires_grad_(False), tokenizer, scaling, batch
        self._captions: dict[tuple[str, ...], tuple[list[int], dict[str, slice]]] = {}

    def require(self, names: Sequence[str]) -> None:
        for name in names:
            if not name.strip() or "." in name:
                raise ConfigError(f"class {name!r}: GroundingDINO reads classes between full stops. Give it a name, without one.")

    def caption(self, names: tuple[str, ...]) -> tuple[list[int], dict[str, slice]]:
        """Tokens of the caption, and where in it each class stands."""
        if names not in self._captions:
            ids, places = [self.tokenizer.cls_token_id], {}
            for name in names:
                own = self.tokenizer(name.lower(), add_special_tokens=False)["input_ids"]
                places[name] = slice(len(ids), len(ids) + len(own))
                ids += [*own, self.tokenizer.convert_tokens_to_ids(".")]
            self._captions[names] = ([*ids, self.tokenizer.sep_token_id], places)
        return self._captions[names]

    @torch.no_grad()
    def detect(
        self, images: Float[Tensor, "B 3 H W"], names: Sequence[Sequence[str]], least: Sequence[float]
    ) -> list[tuple[Detection, ...]]:
        model = self.model.to(images.device)
        found: list[tuple[Detection, ...]] = []
        for start in range(0, len(images), self.batch):
            some = slice(start, start + self.batch)
            for asked in names[some]:
                self.require(asked)
            captions = [self.caption(tuple(dict.fromkeys(asked))) for asked in names[some]]
            ids = pad_sequence([torch.tensor(ids) for ids, _ in captions], batch_first=True, padding_value=self.tokenizer.pad_token_id)
            length = torch.tensor([len(ids) for ids, _ in captions])
            told = (torch.arange(ids.shape[1]) < length[:, None]).long()
            out = model(
                pixel_values=scale(images[some], self.scaling), input_ids=ids.to(images.device), attention_mask=told.to(images.device)
            )
            probabilities, boxes = out.logits.sigmoid().cpu(), corners(out.pred_boxes).tolist()
            for row, (_, places) in enumerate(captions):
                seen = []
                for name, place in places.items():
                    scores = probabilities[row, :, place].mean(1)
                    for query in (scores > least[start + row]).nonzero()[:, 0].tolist():
                        x0, y0, x1, y1 = boxes[row][query]
                        seen.append(Detection(label=name, score=float(scores[query]), box=(x0, y0, x1, y1)))
                found.append(surest(seen))
        return found
