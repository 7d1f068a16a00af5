"""Can the picture be read? Each text region is looked for, read, and compared with what the prompt asked for."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from varl.config import OCRConfig
from varl.errors import RewardError
from varl.rewards.ocr import choose_engine
from varl.rewards.pool import ReaderPool
from varl.rewards.text_scores import letter_scores, ned_similarity, paper_reward, word_accuracy
from varl.types import Box, Found, Judgement, Prompt

log = logging.getLogger(__name__)

NOT_READ = Found(text="", confidence=0.0, box=(0.0, 0.0, 1.0, 1.0))


def region_score(target: str, read: str, score: str) -> float:
    """One region's score in [0, 1], case ignored: `exact` 0 or 1, `ned` the NED similarity, `mixed` half of each."""
    exact = float(target.upper().split() == read.upper().split())
    match score:
        case "exact":
            return exact
        case "ned":
            return ned_similarity(target, read)
    return 0.5 * exact + 0.5 * ned_similarity(target, read)


def match_regions(targets: Sequence[str], found: Sequence[Found]) -> list[Found]:
    """For each target what was read of it: to each of its words the word that is it, the likest pair first and each word once, joined in
    the order in which they were read; `NOT_READ` where none is left. By words, because engines cut lines apart as they please."""
    wanted = [(r, word) for r, target in enumerate(targets) for word in target.split()]
    read = [replace(piece, text=word) for piece in found for word in piece.text.split()]
    pairs = [(-ned_similarity(word, piece.text), i, j) for i, (_, word) in enumerate(wanted) for j, piece in enumerate(read)]
    matched: dict[int, int] = {}
    for _, i, j in sorted(pairs):
        if i not in matched.values() and j not in matched:
            matched[j] = i
    return [join([read[j] for j in sorted(matched) if wanted[matched[j]][0] == r]) for r in range(len(targets))]


def join(found: Sequence[Found]) -> Found:
    """Pieces of one line as one: their texts with spaces between, mean confidence, common box."""
    if not found:
        return NOT_READ
    x0, y0, x1, y1 = zip(*(piece.box for piece in found), strict=True)
    confidence = sum(piece.confidence for piece in found) / len(found)
    return Found(text=" ".join(piece.text for piece in found), confidence=confidence, box=(min(x0), min(y0), max(x1), max(y1)))


def to_pixels(images: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"]) -> UInt8[np.ndarray, "B H W 3"]:
    """Pixels for a reader: [0, 1] to 0 .. 255, rounded; channels last."""
    if images.dtype != torch.uint8:
        images = (images.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class OCRReward:
    """A RewardFn: how well the prompts' text can be read, per region where the score is a mean over regions.

    Where every region of a prompt has a box, each is read at its box, and text elsewhere in the picture is not seen; else the whole picture
    is read, and words are matched to regions by likeness. `mixed`, `exact`, `ned`: value is the mean over regions, region_value its shares,
    which sum to it. `letters`: the same with every letter a region. `paper`: VAR-RL's Comp + Sim - Pen of all that was read, which is no
    sum. NaN where the reader failed. Parts: word_accuracy, ned (similarity, mean over regions), confidence (mean over regions).

    region_box is the prompt's, and where the prompt knows none, that of what was read (`letters`: none). Credit by boxes that the outcome
    moves is a biased gradient, by the prompt's it is not, and a region that could not be read still has its place. `paper` alone puts what
    was read first, because the paper's masks are made of predicted boxes."""

    def __init__(self, config: OCRConfig) -> None:
        self.score = config.score
        self.engine, self.reason = choose_engine(config.engine)
        log.info(self.reason)
        self._known = set(config.letters.upper())
        self.pool = ReaderPool(self.engine, "".join(sorted(self._known)), workers=config.workers, timeout=config.timeout)

    def __call__(self, images: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Judgement:
        for prompt in prompts:
            if not prompt.words:
                raise RewardError(f"prompt {prompt.text!r}: no text region, so nothing to read. Give it regions, or use another reward.")
        if strange := {letter for prompt in prompts for word in prompt.words for letter in word.upper()} - self._known:
            missing = "".join(sorted(strange))
            log.warning("prompts ask for %s, which the reader does not answer with: add them to the OCR reward's `letters`.", missing)
            self._known |= strange  # each is said once
        pictures = self.pool.read(to_pixels(images), [_boxes(prompt) for prompt in prompts])
        letters = self.score == "letters"
        places = [letter_boxes(prompt) if letters else [region.box for region in prompt.regions] for prompt in prompts]
        most = max(map(len, places))
        value = torch.full((len(prompts),), math.nan)
        parts = {name: value.clone() for name in ("word_accuracy", "ned", "confidence")}
        region_value = torch.full((len(prompts), most), math.nan)
        region_box = torch.full((len(prompts), most, 4), math.nan)
        finite = images.isfinite().flatten(1).all(1).tolist()
        for b, (prompt, found) in enumerate(zip(prompts, pictures, strict=True)):
            for r, box in enumerate(places[b]):
                if box is not None:
                    region_box[b, r] = torch.tensor(box)
            if found is None or not finite[b]:
                continue
            targets = [region.text for region in prompt.regions]
            if _boxes(prompt) is not None:
                lines = list(found)
            else:
                lines = match_regions(targets, found) if len(targets) > 1 else [join(found)]
            for r, line in enumerate(lines):
                if line.text and not letters and (self.score == "paper" or places[b][r] is None):
                    region_box[b, r] = torch.tensor(line.box)
            words = [(word, piece.confidence) for piece in found for word in piece.text.split()]
            parts["word_accuracy"][b] = word_accuracy(prompt.words, [word for word, _ in words])
            parts["ned"][b] = sum(ned_similarity(target, line.text) for target, line in zip(targets, lines, strict=True)) / len(lines)
            parts["confidence"][b] = sum(line.confidence for line in lines) / len(lines)
            if self.score == "paper":
                value[b] = paper_reward(prompt.words, words)
                continue
            if letters:
                scores = [score for target, line in zip(targets, lines, strict=True) for score in letter_scores(target, line.text)]
            else:
                scores = [region_score(target, line.text, self.score) for target, line in zip(targets, lines, strict=True)]
            region_value[b, : len(scores)] = torch.tensor(scores) / len(scores)
            value[b] = region_value[b, : len(scores)].sum()
        return Judgement(
            value=value,
            parts=parts,
            region_value=None if self.score == "paper" else region_value,
            region_box=region_box,
            found=tuple(tuple(piece for piece in found or () if piece.text) for found in pictures),
        )

    def close(self) -> None:
        """Ends the reader processes."""
        self.pool.close()


def letter_boxes(prompt: Prompt) -> list[Box | None]:
    """A box for every letter of every region: the region's box in equal parts. Fixed by the prompt, so credit by them has no bias."""
    boxes: list[Box | None] = []
    for region in prompt.regions:
        if region.box is None:
            boxes += [None] * len(region.text)
            continue
        x0, y0, x1, y1 = region.box
        width = (x1 - x0) / len(region.text)
        boxes += [(x0 + i * width, y0, x0 + (i + 1) * width, y1) for i in range(len(region.text))]
    return boxes


def _boxes(prompt: Prompt) -> list[Box] | None:
    boxes = [region.box for region in prompt.regions if region.box is not None]
    return boxes if len(boxes) == len(prompt.regions) else None
