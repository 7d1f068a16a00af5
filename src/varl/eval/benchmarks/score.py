"""What judges say of a benchmark's pictures, as numbers by category with their intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from varl.eval.benchmarks.benchmark import Answers, Share
from varl.eval.benchmarks.gallery import Gallery
from varl.types import RewardFn

OVERALL = "overall"


def clustered(shares: Sequence[tuple[int, Share]]) -> tuple[float, float]:
    """A ratio of sums over pictures, each with its prompt, and the half-width of its 95 % interval. Pictures of one prompt are not
    independent, prompts are:

        R = sum n / sum d        half = 1.96 sqrt( P / (P - 1) sum_p (n_p - R d_p)^2 ) / sum d

    n_p and d_p are a prompt's sums, P the number of prompts. Failed pictures (NaN) are left out. NaN where nothing is left, or for the
    half-width one prompt."""
    sums: dict[int, Share] = {}
    for prompt, (n, d) in shares:
        if not math.isnan(n):
            before = sums.get(prompt, (0.0, 0.0))
            sums[prompt] = before[0] + n, before[1] + d
    total, prompts = sum(d for _, d in sums.values()), len(sums)
    if total == 0:
        return math.nan, math.nan
    ratio = sum(n for n, _ in sums.values()) / total
    square = sum((n - ratio * d) ** 2 for n, d in sums.values())
    return ratio, 1.96 * math.sqrt(square * prompts / (prompts - 1)) / total if prompts > 1 else math.nan


def ask_all(
    judges: Mapping[str, RewardFn],
    gallery: Gallery,
    *,
    batch: int,
    device: torch.device,
    tick: Callable[[int], None] = lambda n: None,
) -> Answers:
    """What every judge says of every picture, in the order of the items; `batch` pictures at once, or one prompt's if these are more."""
    answers: dict[str, list[Mapping[str, Share]]] = {}
    together = max(1, batch // gallery.samples)
    for start in range(0, len(gallery.items), together):
        some = range(start, min(start + together, len(gallery.items)))
        images = torch.cat([gallery.load(i) for i in some]).to(device).float() / 255
        items = [gallery.items[i] for i in some for _ in range(gallery.samples)]
        told = {m: found for name, judge in judges.items() for m, found in gallery.benchmark.ask(name, judge, images, items).items()}
        for measure, found in {**told, **gallery.benchmark.join(judges, told)}.items():
            answers.setdefault(measure, []).extend(found)
        tick(len(images))
    return answers


def score_rows(answers: Answers, gallery: Gallery) -> list[dict[str, Any]]:
    """A row for each category and, where the benchmark has one, one of all: how many prompts and pictures, and each measure that is known
    of it with its `_ci95`, the half-width of the 95 % interval; `_failed` is the share of pictures that a judge could say nothing of.

    Over all categories either pictures count alike, or the means of categories do, which vary independently."""
    rows: dict[str, dict[str, Any]] = {}
    for item in gallery.items:
        rows.setdefault(item.category, {"category": item.category, "prompts": 0, "pictures": 0})
        rows[item.category]["prompts"] += 1
        rows[item.category]["pictures"] += gallery.samples
    overall = {"category": OVERALL, "prompts": len(gallery.items), "pictures": len(gallery.items) * gallery.samples}
    for measure, pictures in answers.items():
        by_category: dict[str, list[tuple[int, Share]]] = {}
        for at, shares in enumerate(pictures):
            for category, share in shares.items():
                by_category.setdefault(category, []).append((at // gallery.samples, share))
        found = {category: clustered(shares) for category, shares in by_category.items()}
        for category, shares in by_category.items():
            row = rows.setdefault(category, {"category": category})
            row |= _told(measure, *found[category], [share for _, share in shares])
        everything = [share for shares in by_category.values() for _, share in shares]
        if gallery.benchmark.overall == "pictures":
            pairs = [pair for shares in by_category.values() for pair in shares]
            overall |= _told(measure, *clustered(pairs), everything)
        elif gallery.benchmark.overall == "categories":
            mean = sum(value for value, _ in found.values()) / len(found)
            half = math.sqrt(sum(half**2 for _, half in found.values())) / len(found)
            overall |= _told(measure, mean, half, everything)
    rows.pop("", None)
    return [*rows.values(), *([] if gallery.benchmark.overall == "none" else [overall])]


def _told(measure: str, value: float, half: float, shares: Sequence[Share]) -> dict[str, float]:
    failed = sum(math.isnan(n) for n, _ in shares) / len(shares)
    return {measure: value, f"{measure}_ci95": half, f"{measure}_failed": failed}
