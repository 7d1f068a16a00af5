"""`make demo-va-pi`: the bundled letters model, aligned with pixels by VA-pi; measured by a network and fonts that had no part in it,
before, after, and against sharper sampling, cross-entropy alone, and rewards dealt out at random."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from varl.build import build_judge, build_prompts, model_path, new_policy
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import load_notes, replace_file
from varl.config import GlyphsConfig, LawConfig, PretrainConfig, RunConfig
from varl.demo import Say, Tick, available_cores, threads
from varl.demo.letters import EVAL_SEED, PLAIN, Results, best, gallery, measure, post_train, row
from varl.doctor import commit
from varl.eval.pictures import teacher_forced_metrics
from varl.pretrain.run import pretrain
from varl.recipes import va_pi
from varl.report import write_report
from varl.train.record import METRICS

COPIES = 342
"""Pictures of each of the twelve letters, for each law: 4104."""
SHARPER = {"T0.9": LawConfig(temperature=0.9), "T0.8": LawConfig(temperature=0.8), "top_p0.95": LawConfig(top_p=0.95)}
"""Laws other than the plain one, under which the base may already be better."""
LAWS = {**PLAIN, **SHARPER}
TEACHER_FORCED = 384
"""Held-out pictures that are drawn again in their own context."""


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
    policy = new_policy(model_folder.load(folder))
    results = measure(policy, laws, config.data, copies=COPIES, cache=cache, tick=tick)
    held = build_prompts(config.data, 0, TEACHER_FORCED)
    assert held.pictures is not None
    reward = build_judge(config, held.pictures)
    try:
        results["teacher_forced"] = teacher_forced_metrics(policy, held.heldout, held.pictures, reward, seed=EVAL_SEED)  # type: ignore[arg-type]
    finally:
        reward.close()
    replace_file(done, json.dumps(results, indent=2).encode())
    return results


SHOWN = ("fd", "fd_heldout", "precision", "recall", "accuracy", "token_diversity", "kid")


def fd_best(results: Results) -> tuple[str, float]:
    """The law with the smallest Frechet distance, and that."""
    return best(results, lambda metrics: metrics["fd"], LAWS)


def summarise(config: RunConfig, trained: Mapping[str, Any], models: Mapping[str, Results]) -> dict[str, Any]:
    """Flat numbers for machines, then rows for the page. Intervals are 95 %, over other pictures of the same model."""
    before, after = models["before"], models["after"]
    flat: dict[str, Any] = {
        "fd_before": before["T1.0"]["fd"],
        "fd_after": after["T1.0"]["fd"],
        "fd_ci95": after["T1.0"]["fd_ci95"],
        "fd_temperature_control": fd_best(before)[1],
        "temperature_control": fd_best(before)[0],
        "fd_after_best_law": fd_best(after)[1],
        "best_law_after": fd_best(after)[0],
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
        **{side: row(results["T1.0"], SHOWN) for side, results in models.items()},
        "law_sweep": [{"law": name, **{side: results[name]["fd"] for side, results in models.items() if name in results}} for name in LAWS],
    }


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
