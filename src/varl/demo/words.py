"""`make demo`: the bundled words model, post-trained to write words that read; measured before, after, and against its control."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from varl.build import build_prompts, model_path, new_policy
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import load_notes, replace_file
from varl.config import LawConfig, OCRConfig, PretrainConfig, RunConfig, WordsConfig
from varl.demo import Say, Tick, available_cores, copy_gallery, threads
from varl.doctor import commit
from varl.eval.words import Sample, draw_sample, reading_metrics, token_diversity
from varl.pretrain.run import pretrain
from varl.recipes import pretrain as pretrain_recipes
from varl.recipes import var_rl
from varl.report import write_report
from varl.rewards.judge import judge_now
from varl.rewards.ocr import choose_engine
from varl.rewards.ocr_reward import OCRReward
from varl.run import train
from varl.train.record import METRICS, save_picture
from varl.types import Judgement

WORDS, COPIES = 256, 3
"""Held-out words (drawn with repetition of words but not of styles), and pictures of each: 768 samples."""
TEMPERATURES = (1.0, 0.8, 0.6)
EVAL_SEED = 4321
PROCESSES = 3
"""At most so many share a step: each then has the two prompts of one chunk."""
GALLERY = 24


def demo(out: Path, seed: int, say: Say, tick: Tick) -> Path:
    """`out`/report.html and `out`/summary.json."""
    config = dataclasses.replace(var_rl.words_cpu(), seed=seed)
    assert isinstance(config.data, WordsConfig)
    engine, why = choose_engine("auto")
    say(f"reward: {why}")
    second = "rapidocr" if engine == "tesseract" else None
    if second is None:
        say("second judge: none, because both places would be taken by the same engine")
    say("1/4  the base model, before")
    read = partial(evaluate, config=config, engine=engine, second=second, tick=tick)
    before = read(model_path(config.model), cache=out / "eval" / "before")
    say(f"     word accuracy {before['T1.0']['word_accuracy']:.3f} at temperature 1")
    say(f"2/4  post-training: {config.train.steps} steps")
    replace_file(out / "command.txt", f"varl demo words --out {shlex.quote(str(out))} --seed {seed}\n".encode())
    with threads(available_cores()):
        outcome = train(
            config,
            out,
            lambda metrics: tick({**metrics, "phase": "post-training", "total": config.train.steps}),
            processes=min(available_cores(), PROCESSES),
        )
    if not outcome.done:
        return out
    trained = load_notes(outcome.model)
    after = read(outcome.model, cache=out / "eval" / "after")
    say(f"     word accuracy {after['T1.0']['word_accuracy']:.3f} at temperature 1")
    say(f"3/4  control: the base trained on for the same CPU time ({trained['cpu_seconds']:.0f} s)")
    cpu = float(trained["cpu_seconds"])
    with threads(available_cores()):
        on = pretrain(
            control_config(str(model_path(config.model)), cpu, seed),
            out / "continued",
            lambda metrics: tick({**metrics, "phase": "control"}),
        )
    control = read(on, cache=out / "eval" / "continued")
    say("4/4  report")
    summary = summarise(config, before, after, control, trained, engine, second)
    replace_file(out / "summary.json", json.dumps(summary, indent=2).encode())
    gallery(out)
    write_report(out, definitions=METRICS)
    return out


def control_config(base: str, cpu_seconds: float, seed: int) -> PretrainConfig:
    """The control of post-training: the base trained on, on its own pictures, for so much CPU time, at half the rate, then down to 0."""
    words = pretrain_recipes.words_cpu()
    optim = dataclasses.replace(words.optim, lr=words.optim.lr / 2, muon_lr=words.optim.muon_lr / 2)
    return dataclasses.replace(
        words, name="continued", optim=optim, init=base, max_cpu_seconds=cpu_seconds, steps=1_000_000, save_every=100, seed=seed + 1
    )


# ---- measuring --------------------------------------------------------------------------------------------------------------------------


def evaluate(folder: Path, *, config: RunConfig, cache: Path, engine: str, second: str | None, tick: Tick) -> dict[str, dict[str, float]]:
    """Held-out words at every temperature by the engine that rewards, and at temperature 1 by the other: name -> metrics. Kept in
    `cache`.json, with the pictures of the first words beside it."""
    done = cache.with_suffix(".json")
    if done.exists():
        return json.loads(done.read_text())
    policy = new_policy(model_folder.load(folder))
    held = build_prompts(config.data, config.seed, WORDS).heldout
    results: dict[str, dict[str, float]] = {}
    drawn = 0

    def count(rows: int) -> None:
        nonlocal drawn
        drawn += rows
        tick({"phase": f"pictures {cache.name}", "step": drawn, "total": len(TEMPERATURES) * WORDS * COPIES})

    reward = OCRReward(OCRConfig(engine=engine))  # type: ignore[arg-type]
    try:
        for temperature in TEMPERATURES:
            law = LawConfig(temperature=temperature)
            sample = draw_sample(policy.under(law), held, copies=COPIES, seed=EVAL_SEED, tick=count)
            judgement = judge_now(reward, sample.images, sample.prompts)
            diversity = token_diversity(sample.tokens, COPIES)
            results[f"T{temperature}"] = {**reading_metrics(judgement.parts, COPIES), "token_diversity": diversity}
            if temperature == 1.0:
                keep_pictures(cache, sample, judgement)
                if second is not None:
                    other = OCRReward(OCRConfig(engine=second))  # type: ignore[arg-type]
                    results["second_judge"] = reading_metrics(judge_now(other, sample.images, sample.prompts).parts, COPIES)
                    other.close()
    finally:
        reward.close()
    replace_file(done, json.dumps(results, indent=2).encode())
    return results


def keep_pictures(folder: Path, sample: Sample, judgement: Judgement) -> None:
    """The first picture of each of the first words, and what was read in it."""
    assert judgement.found is not None
    told = []
    for place in range(GALLERY):
        row = place * COPIES
        save_picture(folder / f"{place:02d}.png", sample.images[row])
        found = [dataclasses.asdict(f) for f in judgement.found[row]]
        prompt = sample.prompts[row]
        told.append(
            {"text": prompt.text, "style": prompt.style, "found": found, "correct": bool(judgement.parts["word_accuracy"][row] == 1)}
        )
    replace_file(folder / "index.json", json.dumps(told).encode())


def gallery(out: Path) -> None:
    """What the report shows side by side: gallery/before, gallery/after, gallery/index.json."""
    before, after = copy_gallery(out)
    rows = [
        {
            "text": b["text"],
            "style": b["style"],
            **{side: {k: told[k] for k in ("found", "correct")} for side, told in (("before", b), ("after", a))},
        }
        for b, a in zip(before, after, strict=True)
    ]
    replace_file(out / "gallery" / "index.json", json.dumps(rows).encode())


def best(results: Mapping[str, Mapping[str, float]]) -> tuple[str, float]:
    """The temperature that reads best, and its word accuracy."""
    name = max((name for name in results if name.startswith("T")), key=lambda name: results[name]["word_accuracy"])
    return name.removeprefix("T"), results[name]["word_accuracy"]


def summarise(
    config: RunConfig,
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
    control: Mapping[str, Mapping[str, float]],
    trained: Mapping[str, Any],
    engine: str,
    second: str | None,
) -> dict[str, Any]:
    """Flat numbers for machines, then rows for the page. Intervals are 95 %, clustered by word."""
    assert isinstance(config.data, WordsConfig)
    flat: dict[str, Any] = {}
    for side, results in (("before", before), ("after", after)):
        plain = results["T1.0"]
        flat |= {f"word_accuracy_{side}": plain["word_accuracy"], f"ned_{side}": plain["ned"]}
        flat |= {f"word_accuracy_{side}_best_temperature": best(results)[1], f"best_temperature_{side}": best(results)[0]}
        flat |= {f"token_diversity_{side}": plain["token_diversity"]}
        flat |= {f"second_judge_{side}": results["second_judge"]["word_accuracy"] if second else None}
    heldout = build_prompts(config.data, config.seed, WORDS).heldout
    return {
        **flat,
        "continued_pretraining": control["T1.0"]["word_accuracy"],
        "continued_pretraining_best_temperature": best(control)[1],
        "continued_pretraining_second_judge": control["second_judge"]["word_accuracy"] if second else None,
        "heldout_words": len({prompt.text for prompt in heldout}),
        "heldout_samples": WORDS * COPIES,
        "train_seconds": trained["seconds"],
        "train_cpu_seconds": trained["cpu_seconds"],
        "reward_calls": trained["reward_calls"],
        "images_per_second": trained["reward_calls"] / trained["seconds"],
        "replay_gap_max": trained["replay_gap_max"],
        "reward_engine": engine,
        "second_judge_engine": second,
        "seed": config.seed,
        "commit": commit(),
        "before": row(before["T1.0"]),
        "after": row(after["T1.0"]),
        "control": row(control["T1.0"]),
        "temperature_sweep": [
            {
                "temperature": t,
                "before": before[f"T{t}"]["word_accuracy"],
                "after": after[f"T{t}"]["word_accuracy"],
                "continued": control[f"T{t}"]["word_accuracy"],
            }
            for t in TEMPERATURES
        ],
    }


def row(metrics: Mapping[str, float]) -> dict[str, Any]:
    intervals = {f"{k}_interval": [metrics[k] - metrics[f"{k}_ci95"], metrics[k] + metrics[f"{k}_ci95"]] for k in ("word_accuracy", "ned")}
    return {**{k: metrics[k] for k in ("word_accuracy", "ned", "token_diversity")}, **intervals}


def said(summary: Mapping[str, Any]) -> list[str]:
    """What came out, a line each."""
    lines = []
    for name in ("word_accuracy", "word_accuracy_{}_best_temperature", "second_judge", "token_diversity"):
        key = name if "{}" in name else name + "_{}"
        before, after = summary[key.format("before")], summary[key.format("after")]
        if before is not None:
            lines.append(f"{key.format('before').replace('_before', '')}  {before:.3f} -> {after:.3f}")
    return [*lines, f"continued_pretraining  {summary['continued_pretraining']:.3f}"]
