"""The demo, whole but short: few steps, few words."""

import dataclasses
import json

import pytest

from varl.demo import words as demo
from varl.recipes import var_rl

pytest.importorskip("rapidocr")


@pytest.fixture
def short(monkeypatch):
    """Where ticks are kept."""
    recipe = var_rl.words_cpu()
    train = dataclasses.replace(recipe.train, steps=2, prompts_per_step=2)
    config = dataclasses.replace(recipe, train=train, eval=dataclasses.replace(recipe.eval, every=0))
    monkeypatch.setattr(var_rl, "words_cpu", lambda: config)
    monkeypatch.setattr(demo, "PROCESSES", 1)
    monkeypatch.setattr(demo, "WORDS", 6)
    monkeypatch.setattr(demo, "GALLERY", 4)
    return []


@pytest.mark.slow
def test_it_measures_what_it_promises_and_going_on_repeats_nothing(short, tmp_path):
    demo.demo(tmp_path, seed=1, say=lambda text: None, tick=short.append)
    summary = json.loads((tmp_path / "summary.json").read_text())
    sides = [f"{name}_{side}" for name in ("word_accuracy", "ned", "second_judge", "token_diversity") for side in ("before", "after")]
    best = [f"word_accuracy_{side}_best_temperature" for side in ("before", "after")]
    for name in (*sides, *best, "continued_pretraining"):
        assert 0 <= summary[name] <= 1, name
    assert summary["reward_calls"] == 2 * 2 * 16
    assert summary["images_per_second"] == pytest.approx(summary["reward_calls"] / summary["train_seconds"])
    assert summary["replay_gap_max"] < 1e-5
    assert (summary["seed"], summary["heldout_samples"]) == (1, 6 * demo.COPIES)
    assert {summary["reward_engine"], summary["second_judge_engine"]} <= {"tesseract", "rapidocr", None}
    assert [row["temperature"] for row in summary["temperature_sweep"]] == [1.0, 0.8, 0.6]
    assert "<html" in (tmp_path / "report.html").read_text()
    assert len(list((tmp_path / "gallery" / "after").glob("*.png"))) == 4
    assert {tick["phase"] for tick in short} == {"pictures before", "post-training", "pictures after", "control", "pictures continued"}
    before = (tmp_path / "summary.json").read_bytes()
    short.clear()
    demo.demo(tmp_path, seed=1, say=lambda text: None, tick=short.append)
    assert "post-training" not in {tick["phase"] for tick in short}
    assert json.loads(before) == json.loads((tmp_path / "summary.json").read_text())
