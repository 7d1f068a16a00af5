"""The MAR-GRPO demo: what it says of curves, and, slowly, the whole of it in short."""

import dataclasses
import json

import pytest

from varl.config import UnmaskingConfig
from varl.demo import mar_grpo as demo
from varl.recipes import grpo, mar_grpo


def test_a_curve_that_only_rises_is_as_rough_as_can_be_least():
    assert demo.roughness([0.0, 0.5, 2.0]) == 1
    assert demo.roughness([0.0, 2.0, 1.0, 3.0]) == pytest.approx((2 + 1 + 2) / 3)


def test_variation_is_deviation_over_mean():
    assert demo.variation([1.0, 3.0]) == pytest.approx(2**0.5 / 2)
    assert demo.variation([10.0, 30.0]) == demo.variation([1.0, 3.0])


def test_the_baseline_differs_in_the_method_alone():
    ours, plain = mar_grpo.glyphs_cpu(), grpo.glyphs_mar_cpu()
    same = dataclasses.replace(plain, name=ours.name, algorithm=ours.algorithm)
    assert same == ours
    assert plain.algorithm == dataclasses.replace(ours.algorithm, num_trajectories=0, train_head=True)


@pytest.mark.slow
def test_it_measures_what_it_promises_and_going_on_repeats_nothing(monkeypatch, tmp_path):
    recipe = mar_grpo.glyphs_cpu()
    algorithm = dataclasses.replace(recipe.algorithm, grpo=dataclasses.replace(recipe.algorithm.grpo, num_generations=2))
    train = dataclasses.replace(recipe.train, steps=8, prompts_per_step=4, image_every=8)
    short = dataclasses.replace(recipe, algorithm=algorithm, train=train, unmasking=UnmaskingConfig(steps=2, denoise_steps=10))
    monkeypatch.setattr(mar_grpo, "glyphs_cpu", lambda: short)
    monkeypatch.setattr(demo, "COPIES", 8)
    assert grpo.glyphs_mar_cpu().unmasking == short.unmasking
    ticks = []
    demo.demo(tmp_path, seed=1, say=lambda text: None, tick=ticks.append)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for side in ("before", "after"):
        assert summary[f"reward_{side}"] <= 0
        for name in ("heldout", "recall", "heldout_{}_best_temperature"):
            key = name.format(side) if "{}" in name else f"{name}_{side}"
            assert 0 <= summary[key] <= 1, key
    for name in ("grpo", "mar_grpo"):
        assert summary[f"grad_norm_cv_{name}"] > 0
        assert summary[f"kl_curve_roughness_{name}"] >= 1
    assert summary["reward_calls"] == 8 * 4 * 2
    assert summary["images_per_second"] == pytest.approx(summary["reward_calls"] / summary["train_seconds"])
    assert summary["replay_gap_max"] < 1e-3
    assert summary["seed"] == 1
    assert "<html" in (tmp_path / "report.html").read_text()
    assert len(demo.said(summary)) == 14
    assert {tick["phase"] for tick in ticks} >= {"pictures before", "MAR-GRPO", "GRPO", "plain training", "pictures after"}
    ticks.clear()
    demo.demo(tmp_path, seed=1, say=lambda text: None, tick=ticks.append)
    assert not {"MAR-GRPO", "GRPO", "plain training"} & {tick["phase"] for tick in ticks}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
