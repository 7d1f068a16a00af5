"""`make demo-va-pi`: the bundled letters model, aligned with pixels by VA-pi; measured by a network and fonts that had no part in it,
before, after, and against sharper sampling, cross-entropy alone, and rewards dealt out at random."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varl.build import build_judge, build_prompts, model_path, new_policy
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import load_notes, replace_file
from varl.config import GlyphsConfig, LawConfig, PretrainConfig, RunConfig
from varl.data import glyphs
from varl.demo import Say, Tick, available_cores, commit, copy_gallery, threads
from varl.eval.distances import frechet_replicates, moments
from varl.eval.features import extract, open_pictures
from varl.eval.fid import GROUPS, compare_sets
from varl.eval.gradients import estimate
from varl.eval.pictures import teacher_forced_metrics
from varl.eval.words import draw_sample, token_diversity
from varl.models.classifier import Classifier
from varl.pretrain.run import pretrain
from varl.recipes import va_pi
from varl.report import write_report
from varl.run import train
from varl.train.record import METRICS, save_picture
from varl.types import Prompt

COPIES = 342
"""Pictures of each of the twelve letters, for each law: 4104."""
REFERENCES = 4104
"""Real pictures that they are compared with: fresh ones of the fonts that were trained on, as FID's reference is of ImageNet's training
pictures, and as many of held-out fonts."""
REFERENCE_SEED, EVAL_SEED = 77, 4321
SHARPER = {"T0.9": LawConfig(temperature=0.9), "T0.8": LawConfig(temperature=0.8), "top_p0.95": LawConfig(top_p=0.95)}
"""Laws other than the plain one, under which the base may already be better."""
PLAIN = {"T1.0": LawConfig()}
LAWS = {**PLAIN, **SHARPER}
TEACHER_FORCED = 384
"""Held-out pictures that are drawn again in their own context."""
GALLERY = 24

Results = dict[str, dict[str, float]]
"""What was measured of one model: under each law, and teacher-forced."""


def demo(out: Path, seed: int, say: Say, tick: Tick) -> Path:
    """`out`/report.html and `out`/summary.json."""
    config = dataclasses.replace(va_pi.glyphs_cpu(), seed=seed)
    say("1/5  the base model, before")
    read = partial(evaluate, config=config, tick=tick)
    before = read(model_path(config.model), cache=out / "eval" / "before", laws=LAWS)
    say(f"     Frechet distance {before['T1.0']['fd']:.1f} at temperature 1")
    say(f"2/5  VA-pi: {config.train.steps} steps")
    replace_file(out / "command.txt", f"varl demo va-pi --out {shlex.quote(str(out))} --seed {seed}\n".encode())
    trained = post_train(config, out, "VA-pi", tick)
    if trained is None:
        return out
    after = read(trained, cache=out / "eval" / "after", laws=LAWS)
    say(f"     Frechet distance {after['T1.0']['fd']:.1f} at temperature 1")
    notes = load_notes(trained)
    say("3/5  controls: cross-entropy alone, for as many steps and for the same CPU time")
    trained_on = {}
    for name, limit in (("ce_only", 0.0), ("ce_only_same_cpu", float(notes["cpu_seconds"]))):
        with threads(available_cores()):
            on = pretrain(control_config(limit, seed), out / name, lambda metrics, name=name: tick({**metrics, "phase": name}))
        trained_on[name] = read(on, cache=out / "eval" / name, laws=PLAIN)
    say("4/5  control: rewards dealt out at random")
    random = post_train(dataclasses.replace(va_pi.glyphs_cpu_shuffled(), seed=seed), out / "shuffled", "shuffled rewards", tick)
    if random is None:
        return out
    shuffled = read(random, cache=out / "eval" / "shuffled", laws=PLAIN)
    say("5/5  report")
    summary = summarise(config, notes, {"before": before, "after": after, **trained_on, "shuffled_reward": shuffled})
    replace_file(out / "summary.json", json.dumps(summary, indent=2).encode())
    gallery(out)
    write_report(out, definitions=METRICS)
    return out


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


def control_config(cpu_seconds: float, seed: int) -> PretrainConfig:
    """Cross-entropy alone, for as many steps as VA-pi has, or, if it is not 0, for so much CPU time."""
    recipe = dataclasses.replace(va_pi.glyphs_cpu_ce(), seed=seed + 1)
    return dataclasses.replace(recipe, max_cpu_seconds=cpu_seconds, steps=1_000_000, save_every=100) if cpu_seconds else recipe


# ---- measuring --------------------------------------------------------------------------------------------------------------------------


def evaluate(folder: Path, *, config: RunConfig, cache: Path, laws: Mapping[str, LawConfig], tick: Tick) -> Results:
    """The pictures of every law, drawn freely, against real ones in the judge's features; and held-out pictures drawn again in their own
    context. Kept in `cache`.json, with some pictures beside it."""
    done = cache.with_suffix(".json")
    if done.exists():
        return json.loads(done.read_text())
    assert isinstance(config.data, GlyphsConfig)
    judge = model_folder.load_classifier(model_path("bundled:glyphs_judge")).eval()
    policy = new_policy(model_folder.load(folder))
    letters = [Prompt(text=letter, label=label) for label, letter in enumerate(config.data.letters)]
    kept, real = cache.parent / "features", {s: glyphs.pictures(config.data, s, REFERENCES, REFERENCE_SEED) for s in ("train", "heldout")}
    reference, others = (pictures.pixels(pictures.prompts) for pictures in real.values())
    heldout = moments(extract(open_pictures(others), judge, batch=512, cache=kept)).gaussian()
    drawn, results = 0, Results()

    def count(rows: int) -> None:
        nonlocal drawn
        drawn += rows
        tick({"phase": f"pictures {cache.name}", "step": drawn, "total": len(laws) * COPIES * len(letters)})

    for name, law in laws.items():
        sample = draw_sample(policy.under(law), letters, copies=COPIES, seed=EVAL_SEED, batch=256, tick=count)
        right = named(judge, sample.images, sample.prompts)
        features = extract(open_pictures(sample.images), judge, batch=512, cache=kept)
        other = estimate(frechet_replicates(features, heldout, torch.arange(len(features)) % GROUPS))
        results[name] = {
            **compare_sets(sample.images, reference, judge, EVAL_SEED, batch=512, cache=kept),
            "fd_heldout": other.value,
            "fd_heldout_ci95": other.high - other.value,
            "accuracy": float(right.float().mean()),
            "token_diversity": token_diversity(sample.tokens, COPIES),
        }
        if name == "T1.0":
            keep_pictures(cache, sample.images[:: COPIES // 2], sample.prompts[:: COPIES // 2], right[:: COPIES // 2])
    held = build_prompts(config.data, 0, TEACHER_FORCED)
    assert held.pictures is not None
    reward = build_judge(config, held.pictures)
    try:
        results["teacher_forced"] = teacher_forced_metrics(policy, held.heldout, held.pictures, reward, seed=EVAL_SEED)  # type: ignore[arg-type]
    finally:
        reward.close()
    replace_file(done, json.dumps(results, indent=2).encode())
    return results


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


def best(results: Results) -> tuple[str, float]:
    """The law with the smallest Frechet distance, and that."""
    name = min((name for name in results if name in LAWS), key=lambda name: results[name]["fd"])
    return name, results[name]["fd"]


SHOWN = ("fd", "fd_heldout", "precision", "recall", "accuracy", "token_diversity", "kid")


def summarise(config: RunConfig, trained: Mapping[str, Any], models: Mapping[str, Results]) -> dict[str, Any]:
    """Flat numbers for machines, then rows for the page. Intervals are 95 %, over other pictures of the same model."""
    before, after = models["before"], models["after"]
    flat: dict[str, Any] = {
        "fd_before": before["T1.0"]["fd"],
        "fd_after": after["T1.0"]["fd"],
        "fd_ci95": after["T1.0"]["fd_ci95"],
        "fd_temperature_control": best(before)[1],
        "temperature_control": best(before)[0],
        "fd_after_best_law": best(after)[1],
        "best_law_after": best(after)[0],
        "fd_ce_only": models["ce_only"]["T1.0"]["fd"],
        "fd_ce_only_same_cpu": models["ce_only_same_cpu"]["T1.0"]["fd"],
        "fd_shuffled_reward": models["shuffled_reward"]["T1.0"]["fd"],
    }
    for side in ("before", "after"):
        plain, forced = models[side]["T1.0"], models[side]["teacher_forced"]
        flat |= {f"{name}_{side}": plain[name] for name in ("fd_heldout", "precision", "recall", "accuracy", "token_diversity")}
        flat |= {f"{name}_{side}": forced[f"rewards/reconstruction/{name}"] for name in ("mse", "perceptual")}
        flat[f"nll_{side}"] = forced["nll"]
    return {
        **flat,
        "samples": int(after["T1.0"]["pictures"]),
        "reference_pictures": int(after["T1.0"]["reference_pictures"]),
        "train_seconds": trained["seconds"],
        "train_cpu_seconds": trained["cpu_seconds"],
        "step_seconds": trained["seconds"] / trained["step"],
        "reward_calls": trained["reward_calls"],
        "images_per_second": trained["reward_calls"] / trained["seconds"],
        "replay_gap_max": trained["replay_gap_max"],
        "seed": config.seed,
        "commit": commit(),
        **{side: row(results["T1.0"]) for side, results in models.items()},
        "law_sweep": [{"law": name, **{side: results[name]["fd"] for side, results in models.items() if name in results}} for name in LAWS],
    }


def row(metrics: Mapping[str, float]) -> dict[str, Any]:
    intervals = {
        f"{name}_interval": [metrics[name] - metrics[f"{name}_ci95"], metrics[name] + metrics[f"{name}_ci95"]]
        for name in SHOWN
        if f"{name}_ci95" in metrics
    }
    return {**{name: metrics[name] for name in SHOWN}, **intervals}


def said(summary: Mapping[str, Any]) -> list[str]:
    """What came out, a line each."""
    pairs = {
        "fd": ".2f",
        "accuracy": ".3f",
        "precision": ".3f",
        "recall": ".3f",
        "mse": ".4f",
        "perceptual": ".4f",
        "token_diversity": ".3f",
    }
    lines = [f"{name}  {summary[f'{name}_before']:{form}} -> {summary[f'{name}_after']:{form}}" for name, form in pairs.items()]
    controls = ("fd_temperature_control", "fd_ce_only", "fd_ce_only_same_cpu", "fd_shuffled_reward")
    return [*lines, *(f"{name}  {summary[name]:.4g}" for name in controls)]
