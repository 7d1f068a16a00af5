"""What the demos on letters do alike: post-train, draw letters under several laws, and hold them against real ones in the features of a
network that had no part in training."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from varl.build import AnyPolicy, model_path
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import replace_file
from varl.config import GlyphsConfig, LawConfig, RunConfig
from varl.data import glyphs
from varl.demo import Tick, available_cores, copy_gallery, threads
from varl.eval.distances import frechet_replicates, moments
from varl.eval.features import extract, open_pictures
from varl.eval.fid import GROUPS, compare_sets
from varl.eval.gradients import estimate
from varl.eval.words import Sample, draw_sample, token_diversity
from varl.models.classifier import Classifier
from varl.run import train
from varl.train.record import save_picture
from varl.types import Prompt

REFERENCES = 4104
"""Real pictures that those drawn are compared with: fresh ones of the fonts that were trained on, as FID's reference is of ImageNet's
training pictures, and as many of held-out fonts."""
REFERENCE_SEED, EVAL_SEED = 77, 4321
GALLERY = 24
PLAIN = {"T1.0": LawConfig()}

Results = dict[str, dict[str, float]]
"""What was measured of one model: under each law, and what else its demo measures."""


def post_train(config: RunConfig, out: Path, phase: str, tick: Tick) -> Path | None:
    """The trained model; None if the run was asked to stop."""
    with threads(available_cores()):
        outcome = train(
            config,
            out,
            lambda metrics: tick({**metrics, "phase": phase, "total": config.train.steps}),
            processes=min(available_cores(), 4),
        )
    return outcome.model if outcome.done else None


def measure(
    policy: AnyPolicy,
    laws: Mapping[str, LawConfig],
    data: GlyphsConfig,
    *,
    copies: int,
    cache: Path,
    tick: Tick,
    also: Callable[[Sample], Mapping[str, float]] = lambda sample: {},
) -> Results:
    """`copies` pictures of each letter from every law, drawn freely, against real ones in the judge's features; with `also` of the same
    pictures. Some of the plain law are kept in `cache`."""
    judge = model_folder.load_classifier(model_path("bundled:glyphs_judge"))
    letters = [Prompt(text=letter, label=label) for label, letter in enumerate(data.letters)]
    kept, real = cache.parent / "features", {s: glyphs.pictures(data, s, REFERENCES, REFERENCE_SEED) for s in ("train", "heldout")}
    reference, others = (pictures.pixels(pictures.prompts) for pictures in real.values())
    heldout = moments(extract(open_pictures(others), judge, batch=512, cache=kept)).gaussian()
    drawn, results = 0, Results()

    def count(rows: int) -> None:
        nonlocal drawn
        drawn += rows
        tick({"phase": f"pictures {cache.name}", "step": drawn, "total": len(laws) * copies * len(letters)})

    for name, law in laws.items():
        sample = draw_sample(policy.under(law), letters, copies=copies, seed=EVAL_SEED, batch=256, tick=count)
        right = named(judge, sample.images, sample.prompts)
        features = extract(open_pictures(sample.images), judge, batch=512, cache=kept)
        other = estimate(frechet_replicates(features, heldout, torch.arange(len(features)) % GROUPS))
        results[name] = {
            **compare_sets(sample.images, reference, judge, EVAL_SEED, batch=512, cache=kept),
            "fd_heldout": other.value,
            "fd_heldout_ci95": other.high - other.value,
            "accuracy": float(right.float().mean()),
            "accuracy_ci95": half_width(right.float()),
            "token_diversity": token_diversity(sample.tokens, copies),
            **also(sample),
        }
        if name in PLAIN:
            keep_pictures(cache, sample.images[:: copies // 2], sample.prompts[:: copies // 2], right[:: copies // 2])
    return results


def half_width(values: Tensor) -> float:
    """Of the 95% interval of the mean of independent pictures' values."""
    return float(1.96 * values.std() / len(values) ** 0.5)


@torch.no_grad()
def named(judge: Classifier, images: Tensor, prompts: tuple[Prompt, ...]) -> Tensor:
    """Whether the judge sees in each picture what was asked for."""
    said = torch.cat([judge.classify(judge(some)).argmax(1) for some in images.split(512)])
    return said == torch.tensor([prompt.label for prompt in prompts])


def keep_pictures(folder: Path, images: Tensor, prompts: tuple[Prompt, ...], right: Tensor) -> None:
    """Some pictures, and whether the judge knows them."""
    told = []
    for place, (image, prompt) in enumerate(list(zip(images, prompts, strict=True))[:GALLERY]):
        save_picture(folder / f"{place:02d}.png", image)
        told.append({"text": prompt.text, "found": [], "correct": bool(right[place])})
    replace_file(folder / "index.json", json.dumps(told).encode())


def gallery(out: Path) -> None:
    """What the report shows side by side."""
    before, after = copy_gallery(out)
    rows = [{"text": b["text"], "style": [], "before": b, "after": a} for b, a in zip(before, after, strict=True)]
    replace_file(out / "gallery" / "index.json", json.dumps(rows).encode())


def best(results: Results, measure: Callable[[Mapping[str, float]], float], laws: Mapping[str, LawConfig]) -> tuple[str, float]:
    """The law with the smallest `measure`, and that."""
    name = min((name for name in results if name in laws), key=lambda name: measure(results[name]))
    return name, measure(results[name])


def row(metrics: Mapping[str, float], shown: tuple[str, ...]) -> dict[str, object]:
    """The measures `shown` with their intervals, for the page."""
    intervals = {
        f"{name}_interval": [metrics[name] - metrics[f"{name}_ci95"], metrics[name] + metrics[f"{name}_ci95"]]
        for name in shown
        if f"{name}_ci95" in metrics
    }
    return {**{name: metrics[name] for name in shown}, **intervals}
