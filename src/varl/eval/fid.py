"""Are pictures like the real ones? Every number of the usual protocol from one pass over the pictures, each with its interval."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from varl.errors import DataError
from varl.eval.distances import (
    Gaussian,
    frechet_replicates,
    inception_score,
    jackknife_bias,
    kernel_distance,
    leave_group_out,
    moments,
    precision_recall,
)
from varl.eval.features import Classifier, Extractor, PictureSet, device_of, extract, npz_rows, npz_shapes, open_pictures
from varl.eval.gradients import estimate
from varl.eval.inception import Inception
from varl.rng import generator

GROUPS = 20
"""Groups of pictures that are left out one by one for the intervals."""
SPLIT = 5000
"""Pictures in a part for Inception score, as in the ADM evaluator; fewer pictures are one part."""

BIAS_FROM = 4
"""Pictures per feature from which on the jackknife finds the bias of the Frechet distance to a tenth of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What pictures are held against."""

    gaussian: Gaussian
    features: Float[Tensor, "R D"] | None
    """Of single pictures; none where a file holds statistics alone."""


def reference_pictures(source: Path | str | Tensor) -> PictureSet | None:
    """The pictures in what `read_reference` takes; none in an npz file of statistics or of features."""
    path = None if isinstance(source, Tensor) else Path(source)
    shapes = npz_shapes(path) if path is not None and path.suffix == ".npz" else {}
    if shapes and len(shapes.get("arr_0", (0, 0))) == 2:
        return None
    return open_pictures(source)


def read_reference(
    source: Path | str | Tensor, extractor: Extractor, *, batch: int, cache: Path | str | None, tick: Callable[[int], None]
) -> Reference:
    """Anything that `open_pictures` takes, or an npz file with `mu` and `sigma`, with `arr_0`, or with all three, as the ADM evaluator's
    files have: then `mu` and `sigma` are of more pictures than `arr_0` holds. An `arr_0` of two axes is features, not pictures."""
    path = None if isinstance(source, Tensor) else Path(source)
    shapes = npz_shapes(path) if path is not None and path.suffix == ".npz" else {}
    features, pictures = None, reference_pictures(source)
    if pictures is not None:
        features = extract(pictures, extractor, batch=batch, cache=cache, tick=tick)
    elif path is not None and "arr_0" in shapes:
        features = _array(path, "arr_0").float()
    if path is not None and {"mu", "sigma"} <= shapes.keys():
        length = math.prod(shapes["mu"])
        if shapes["sigma"] != (length, length):
            raise DataError(
                f"{path}: `mu` is {list(shapes['mu'])} and `sigma` {list(shapes['sigma'])}, must be [D] and [D, D]. Make it again."
            )
        return Reference(gaussian=Gaussian(mean=_array(path, "mu").view(-1), cov=_array(path, "sigma")), features=features)
    if features is None:
        raise DataError(f"{path}: holds {', '.join(shapes)}, where `mu` and `sigma`, or `arr_0`, are due. Is it a reference file?")
    return Reference(gaussian=moments(features).gaussian(), features=features)


def _array(path: Path, name: str) -> Tensor:
    """A whole array of numbers, in fp64."""
    array = torch.cat([torch.from_numpy(rows).double() for rows in npz_rows(path, name, SPLIT)])
    if not array.isfinite().all():
        raise DataError(f"{path}: `{name}` holds numbers that are not finite. Make the file again.")
    return array


def demand_comparable(where: str, count: int, size: tuple[int, int], reference: PictureSet | None) -> None:
    """DataError unless so many pictures of `size` can be held against the reference's, if it has any."""
    if count < 2 * GROUPS:
        raise DataError(f"{where}: {count} pictures, but {GROUPS} groups for intervals need at least {2 * GROUPS}. Draw more.")
    if reference is not None and reference.size != size:
        (h, w), (rh, rw) = size, reference.size
        raise DataError(
            f"{where}: is {h}x{w} (height x width), the reference {rh}x{rw}; traces of resizing would be measured too. Bring both to one "
            "size."
        )


def compare_sets(
    pictures: Path | str | Tensor,
    reference: Path | str | Tensor,
    extractor: Extractor,
    seed: int,
    *,
    batch: int = 64,
    cache: Path | str | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, float]:
    """How `pictures` compare with `reference` in the extractor's features:

    fd         Frechet distance, `fid` where the extractor is `Inception`; lower is better
    fd_bias    what is in it only because pictures are few; fd - fd_bias is for infinitely many, against the same reference; left out below
               BIAS_FROM pictures per feature, where it would be wrong
    is         Inception score, where the extractor is a `Classifier`
    precision  share of pictures that lie among the reference's, recall the share of the reference that lies among the pictures
    kid        kernel distance, unbiased: may come out below 0
    *_ci95     half-width of the 95 % interval over other pictures of the same model, the reference held fixed: jackknife over GROUPS
               groups; for fd up to twice too wide where pictures are fewer than some 6 per feature
    pictures, reference_pictures    how many; precision, recall and kid need the latter

    The same seed gives the same numbers; it says which pictures form a group. At unequal numbers of pictures compare nothing but kid."""
    shown = open_pictures(pictures)
    demand_comparable(shown.where, shown.count, shown.size, reference_pictures(reference))
    against = read_reference(reference, extractor, batch=batch, cache=cache, tick=tick)
    features, device = extract(shown, extractor, batch=batch, cache=cache, tick=tick), device_of(extractor)
    if features.shape[1] != len(against.gaussian.mean):
        raise DataError(
            f"reference: holds {len(against.gaussian.mean)} features, the extractor gives {features.shape[1]}. Use the extractor that the "
            "reference was made with."
        )
    order = torch.randperm(shown.count, generator=generator(seed, "eval", "groups"))
    features, group = features[order].to(device), (torch.arange(shown.count) % GROUPS).to(device)
    gaussian = Gaussian(mean=against.gaussian.mean.to(device), cov=against.gaussian.cov.to(device))
    distance = "fid" if isinstance(extractor, Inception) else "fd"
    replicates = {distance: frechet_replicates(features, gaussian, group)}
    counts = {"pictures": float(shown.count)}
    if isinstance(extractor, Classifier):
        with torch.no_grad():
            logp = extractor.classify(features)
        replicates["is"] = leave_group_out(lambda rows: inception_score(rows, max(1, shown.count // SPLIT)), logp, group)
    if against.features is not None:
        real = against.features.to(device)
        replicates["precision"], replicates["recall"] = precision_recall(features, real, group)
        replicates["kid"] = kernel_distance(features, real, group)
        counts["reference_pictures"] = float(len(real))
    found: dict[str, float] = {}
    for name, replicate in replicates.items():
        value = estimate(replicate)
        found |= {name: value.value, f"{name}_ci95": value.high - value.value}
    if shown.count >= BIAS_FROM * features.shape[1]:
        found[f"{distance}_bias"] = jackknife_bias(replicates[distance])
    return found | counts
