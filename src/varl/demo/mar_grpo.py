"""`make demo-mar-grpo`: the bundled masked model of letters, post-trained by MAR-GRPO to draw letters that a classifier knows; judged by
another classifier, before, after, and against sharper sampling, GRPO end to end, and plain training for the same time."""

import dataclasses
import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from varl.build import build_reward, model_path, new_policy
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import load_notes, replace_file
from varl.config import ClassScoreConfig, GlyphsConfig, LawConfig, PretrainConfig, RunConfig
from varl.demo import Say, Tick, available_cores, threads
from varl.demo.letters import PLAIN, Results, best, gallery, half_width, measure, post_train, row
from varl.doctor import commit
from varl.eval.words import Sample
from varl.pretrain.run import pretrain
from varl.recipes import grpo, mar_grpo
from varl.recipes import pretrain as pretrain_recipes
from varl.report import write_report
from varl.rewards.judge import judge_now
from varl.train.record import METRICS

COPIES = 96
"""Pictures of each of the twelve letters, for each law: 1152."""
SHARPER = {"T0.8": LawConfig(temperature=0.8), "T0.6": LawConfig(temperature=0.6)}
"""Laws other than the plain one, under which the base may already be better."""
LAWS = {**PLAIN, **SHARPER}
WARM = 5
"""First steps, in which the rate still rises, that are left out of what is said of the gradient's size."""


def demo(out: Path, seed: int, say: Say, tick: Tick) -> Path:
    """`out`/report.html and `out`/summary.json."""
    config = dataclasses.replace(mar_grpo.glyphs_cpu(), seed=seed)
    say("1/5  the base model, before")
    read = partial(evaluate, config=config, tick=tick)
    before = read(model_path(config.model), cache=out / "eval" / "before", laws=LAWS)
    say(f"     reward {before['T1.0']['reward']:.2f}, named right by the other classifier {before['T1.0']['accuracy']:.3f}")
    say(f"2/5  MAR-GRPO: {config.train.steps} steps")
    replace_file(out / "command.txt", f"varl demo mar-grpo --out {shlex.quote(str(out))} --seed {seed}\n".encode())
    trained = post_train(config, out, "MAR-GRPO", tick)
    if trained is None:
        return out
    after = read(trained, cache=out / "eval" / "after", laws=LAWS)
    say(f"     reward {after['T1.0']['reward']:.2f}, named right by the other classifier {after['T1.0']['accuracy']:.3f}")
    say("3/5  baseline: GRPO end to end, the head too")
    plain = post_train(dataclasses.replace(grpo.glyphs_mar_cpu(), seed=seed), out / "grpo", "GRPO", tick)
    if plain is None:
        return out
    end_to_end = read(plain, cache=out / "eval" / "grpo", laws=PLAIN)
    notes = load_notes(trained)
    say("4/5  control: plain training for the same CPU time")
    with threads(available_cores()):
        on = pretrain(
            control_config(notes["cpu_seconds"], seed), out / "continued", lambda metrics: tick({**metrics, "phase": "plain training"})
        )
    continued = read(on, cache=out / "eval" / "continued", laws=PLAIN)
    say("5/5  report")
    models = {"before": before, "after": after, "grpo": end_to_end, "continued_pretraining": continued}
    curves = {"mar_grpo": columns(out / "metrics.jsonl"), "grpo": columns(out / "grpo" / "metrics.jsonl")}
    replace_file(out / "summary.json", json.dumps(summarise(config, notes, models, curves), indent=2).encode())
    gallery(out)
    write_report(out, definitions=METRICS)
    return out


def control_config(cpu_seconds: float, seed: int) -> PretrainConfig:
    """The base trained on, with no reward, for so much CPU time."""
    recipe = dataclasses.replace(pretrain_recipes.glyphs_mar_cpu(), name="demo/continued", init="bundled:glyphs_mar", seed=seed + 1)
    return dataclasses.replace(recipe, max_cpu_seconds=cpu_seconds, steps=1_000_000, save_every=100)


# ---- measuring --------------------------------------------------------------------------------------------------------------------------


def evaluate(folder: Path, *, config: RunConfig, cache: Path, laws: Mapping[str, LawConfig], tick: Tick) -> Results:
    """The pictures of every law: what they earn, what the other classifier says of them, and how far they are from real ones. Kept in
    `cache`.json, with some pictures beside it."""
    done = cache.with_suffix(".json")
    if done.exists():
        return json.loads(done.read_text())
    assert isinstance(config.data, GlyphsConfig)
    asked = config.rewards["class"].reward
    assert isinstance(asked, ClassScoreConfig)
    reward = build_reward(asked)

    def earned(sample: Sample) -> dict[str, float]:
        told = judge_now(reward, sample.images, sample.prompts)
        return {
            "reward": float(told.value.mean()),
            "reward_ci95": half_width(told.value),
            "reward_accuracy": float(told.parts["class_accuracy"].mean()),
        }

    policy = new_policy(model_folder.load(folder), unmasking=config.unmasking)
    results = measure(policy, laws, config.data, copies=COPIES, cache=cache, tick=tick, also=earned)
    replace_file(done, json.dumps(results, indent=2).encode())
    return results


def columns(metrics: Path) -> dict[str, list[float]]:
    """`grad_norm` and `kl` of a run's steps."""
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {name: [step[name] for step in steps if name in step] for name in ("grad_norm", "kl")}


def variation(values: Sequence[float]) -> float:
    """Standard deviation over mean; unitless."""
    return statistics.stdev(values) / statistics.mean(values)


def roughness(curve: Sequence[float]) -> float:
    """The way that a curve goes up and down, over the distance from its least to its greatest value: 1 for one that only rises."""
    return sum(abs(b - a) for a, b in pairwise(curve)) / (max(curve) - min(curve))


SHOWN = ("reward", "reward_accuracy", "accuracy", "fd", "precision", "recall", "token_diversity")


def summarise(
    config: RunConfig, trained: Mapping[str, Any], models: Mapping[str, Results], curves: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, Any]:
    """Flat numbers for machines, then rows for the page. Intervals are 95 %, over other pictures of the same model. `heldout` is the share
    of pictures that the classifier names right which had no part in training."""
    flat: dict[str, Any] = {}
    for side in ("before", "after"):
        plain = models[side]["T1.0"]
        names = {"reward": "reward", "heldout": "accuracy", "fd": "fd", "recall": "recall", "token_diversity": "token_diversity"}
        flat |= {f"{name}_{side}": plain[key] for name, key in names.items()}
        flat |= {f"{name}_ci95_{side}": plain[f"{key}_ci95"] for name, key in (("reward", "reward"), ("heldout", "accuracy"))}
        law, least = best(models[side], lambda metrics: -metrics["accuracy"], LAWS)
        flat |= {f"heldout_{side}_best_temperature": -least, f"best_temperature_{side}": law}
    for name in ("grpo", "continued_pretraining"):
        flat |= {f"reward_{name}": models[name]["T1.0"]["reward"], f"heldout_{name}": models[name]["T1.0"]["accuracy"]}
    for name, curve in curves.items():
        flat |= {f"grad_norm_cv_{name}": variation(curve["grad_norm"][WARM:]), f"kl_curve_roughness_{name}": roughness(curve["kl"])}
    return {
        **flat,
        "samples": int(models["after"]["T1.0"]["pictures"]),
        "train_seconds": trained["seconds"],
        "train_cpu_seconds": trained["cpu_seconds"],
        "step_seconds": trained["seconds"] / trained["step"],
        "reward_calls": trained["reward_calls"],
        "images_per_second": trained["reward_calls"] / trained["seconds"],
        "replay_gap_max": trained["replay_gap_max"],
        "seed": config.seed,
        "commit": commit(),
        **{side: row(results["T1.0"], SHOWN) for side, results in models.items()},
        "law_sweep": [
            {"law": name, **{f"heldout, {side}": results[name]["accuracy"] for side, results in models.items() if name in results}}
            for name in LAWS
        ],
    }


def said(summary: Mapping[str, Any]) -> list[str]:
    """What came out, a line each."""
    pairs = ("reward_{}", "heldout_{}", "heldout_{}_best_temperature", "fd_{}", "recall_{}", "token_diversity_{}")
    ends = ((pair.format("").replace("__", "_").strip("_"), *(pair.format(side) for side in ("before", "after"))) for pair in pairs)
    lines = [f"{name}  {summary[first]:.3f} -> {summary[last]:.3f}" for name, first, last in ends]
    others = ("reward_grpo", "heldout_grpo", "reward_continued_pretraining", "heldout_continued_pretraining")
    curves = ("grad_norm_cv_grpo", "grad_norm_cv_mar_grpo", "kl_curve_roughness_grpo", "kl_curve_roughness_mar_grpo")
    return [*lines, *(f"{name}  {summary[name]:.3f}" for name in (*others, *curves))]
