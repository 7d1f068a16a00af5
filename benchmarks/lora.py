"""Adapters against weights, on words.

    python benchmarks/lora.py [--out runs/lora] [--steps 80] [--seeds 3] [--jobs 2] [--only NAME ...] [--report]

Every arm is `varl train` on var_rl/words_cpu with adapters in the place of the weights, or with another learning rate, over several seeds,
at equal judged pictures; then 768 pictures of held-out words are drawn at temperature 1 and read."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arms import interval, results, study

from varl.build import build_policy, build_prompts, model_path
from varl.config import EvalConfig, LoraConfig, OCRConfig, RunConfig
from varl.eval.words import draw_sample, reading_metrics, token_diversity
from varl.recipes.var_rl import words_cpu
from varl.rewards.judge import judge_now
from varl.rewards.ocr_reward import OCRReward

ARMS: dict[str, tuple[int | None, float]] = {
    "weights": (None, 1.5e-4),
    "r = 32, the same rate": (32, 1.5e-4),
    "r = 32, 10 x the rate": (32, 1.5e-3),
    "r = 8, 10 x the rate": (8, 1.5e-3),
    "r = 2, 10 x the rate": (2, 1.5e-3),
}
"""Rank, and AdamW's learning rate, which falls to 0."""
COPIES = 3


def run_config(name: str, seed: int, steps: int) -> RunConfig:
    (rank, lr), ours = ARMS[name], words_cpu()
    lora = None if rank is None else LoraConfig(r=rank)
    train = replace(ours.train, steps=steps, image_every=0, save_every=steps, lora=lora, optim=replace(ours.train.optim, lr=lr))
    return replace(ours, name="lora", seed=seed, train=train, eval=EvalConfig())


def judge(model: Path, cache: Path) -> None:
    config = replace(words_cpu(), model=str(model))
    policy = build_policy(config, torch.device("cpu"), reference=False)
    prompts = build_prompts(config.data, 0, 256).heldout
    sample = draw_sample(policy, prompts, copies=COPIES, seed=1234, batch=64)
    reward = OCRReward(OCRConfig())
    parts = judge_now(reward, sample.images, sample.prompts).parts
    reward.close()
    found = {**reading_metrics(parts, COPIES), "token_diversity": token_diversity(sample.tokens, COPIES)}
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.with_suffix(".json").write_text(json.dumps(found))


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


HEAD = ["arm", "seeds", "word accuracy, T = 1", "token diversity", "CPU s", "a checkpoint, MB"]


def rows(base: dict[str, Any], arms: Iterator[tuple[str, list[Path]]]) -> list[list[str]]:
    made = [["base", "", f"{base['word_accuracy']:.3f}", f"{base['token_diversity']:.2f}", "", ""]]
    for name, here in arms:
        judged = [results(place) for place in here]
        notes = [json.loads((place / "model" / "notes.json").read_text()) for place in here]
        size = statistics.mean(bytes_in(max((place / "checkpoints").iterdir())) for place in here)
        cells = [interval([each["word_accuracy"] for each in judged]), interval([each["token_diversity"] for each in judged], ".2f")]
        made.append([name, str(len(here)), *cells, f"{statistics.mean(each['cpu_seconds'] for each in notes):.0f}", f"{size / 1e6:.1f}"])
    return made


def main() -> None:
    arms = {name: lambda seed, steps, name=name: run_config(name, seed, steps) for name in ARMS}
    base = model_path(words_cpu().model)
    study(__doc__ or "", arms, out="runs/lora", steps=80, base=base, judge=judge, head=HEAD, rows=rows)


if __name__ == "__main__":
    main()
