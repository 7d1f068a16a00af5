"""The recipes of MAR-GRPO as they are, on a NOVA and a Harmon of a few thousand weights, through the command line; and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_captions import save_phi
from test_nova import TINY, tiny
from tiny import snapshot, status
from tiny_harmon import save_harmon
from toy_run import metrics, weights
from varl.checkpoints import model as model_folder
from varl.config import CaptionConfig
from varl.data.folder import write_folder
from varl.tokenizers.kl import KL
from varl.types import Prompt

REWARD = """
import torch

def preference(images, prompts):
    return (images.flatten(1) * torch.linspace(-1, 1, images[0].numel())).sum(1)
"""
SMALL = {
    "unmasking.steps": 3,
    "unmasking.denoise_steps": 6,
    "algorithm.ar_steps": 2,
    "algorithm.denoise_moves": 2,
    "algorithm.grpo.rollouts_per_chunk": 4,
    "train.prompts_per_step": 1,
    "train.rollouts_per_backward": 4,
    "train.save_every": 2,
    "train.device": "cpu",
    "eval.samples": 2,
}
"""What of the recipes is too large to be tried: sizes alone, neither the precision nor the guidance, nor the number of further paths."""


def save_nova(folder: Path) -> None:
    torch.manual_seed(0)
    captions = CaptionConfig(tokens=5, width=8, encoder=str(save_phi(folder.parent / "phi")), lowercase=False)
    config = replace(TINY, captions=captions)
    model_folder.save(folder, tiny(config), KL(config.tokenizer), {})


@pytest.fixture(scope="module")
def caption_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


MODELS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "mar_grpo/nova_512": ("models/nova_d48w1024_sd512", save_nova),
    "mar_grpo/harmon_1_5b": ("models/harmon_1_5b", save_harmon),
}
TEXTS = {"mar_grpo/nova_512": ("a red cube", "a ball on a ball"), "mar_grpo/harmon_1_5b": ("a big red sun", "a mug")}


@pytest.fixture(scope="module", params=MODELS)
def recipe(request, tmp_path_factory, caption_cache):
    """Its name; the working folder holds what it asks for."""
    folder, (model, save) = tmp_path_factory.mktemp("recipe"), MODELS[request.param]
    (folder / model).parent.mkdir(parents=True)
    save(folder / model)
    write_folder(folder / "data/t2i_compbench", None, [Prompt(text=text) for text in TEXTS[request.param]])
    (folder / "my_reward.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield request.param


def trained(recipe: str, out: str, steps: int, **changes) -> int | str | None:
    settings = [f"{name}={value}" for name, value in (SMALL | {"train.steps": steps} | changes).items() if value is not None]
    return status("train", recipe, *(word for setting in settings for word in ("--set", setting)), "--out", out, "--quiet")


def test_a_recipe_that_was_stopped_goes_on_as_if_it_had_not_been(recipe):
    """Metrics and weights, bit for bit, in the precision of the recipe; and it is the transformer that has learned."""
    assert trained(recipe, "whole", 3) == 0
    assert trained(recipe, "parts", 1) == 0
    first = metrics(Path("parts"))
    assert trained(recipe, "parts", 3) == 0
    whole = metrics(Path("whole"))
    assert [line["step"] for line in whole] == [1, 2, 3]
    assert first == whole[:1]
    assert metrics(Path("parts")) == whole
    assert weights(Path("parts")) == weights(Path("whole"))
    for line in whole:
        assert line["reward_calls"] == 4 * line["step"]
        assert line["trajectory_spread"] > 0
        assert line["grad_norm"] > 0
    assert whole[0]["kl"] == 0
    assert whole[2]["kl"] > 0
    (model, _), after = MODELS[recipe], load_file("whole/model/model.safetensors")
    before = load_file(f"{model}/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("encoder" in name for name in moved)
    kept = load_file("whole/checkpoints/step-000003/model.safetensors")
    assert any("encoder" in name for name in kept)
    for names in (moved, kept):  # what is frozen does not move, and is not saved with every checkpoint
        assert not any("image_decoder" in name or "diffloss" in name or name.startswith("llm.") for name in names)


@pytest.mark.parametrize("recipe", ["mar_grpo/nova_512"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"unmasking.steps": 25}, "25 steps for 24 tokens: every step settles a token or more. Set 1 to 24 steps."),
        ({"unmasking.denoise_steps": 1001}, "unmasking.denoise_steps=1001: must be 1 to 1000."),
        ({"algorithm.ar_steps": 5}, "mar_grpo.ar_steps=5: this model has 3 steps."),
        ({"algorithm.denoise_moves": 6}, "mar_grpo.denoise_moves=6: only "),
        ({"algorithm.num_trajectories": 1}, "mar_grpo.num_trajectories=1: one path alone does not spread"),
        ({"algorithm.consistency": 0.0}, "mar_grpo.consistency=0.0: the filter keeps every token"),
        ({"sample_law.cfg_scale": "[3.0, 4.0]"}, "sample_law.cfg_scale has 2 values, the model 3 steps."),
        ({"sample_law.top_k": 5}, "sample_law.top_k=5, top_p=1.0: this model draws vectors"),
        (
            {**dict.fromkeys(name for name in SMALL if "algorithm." in name), "algorithm": "{kind: var_rl}"},
            "var_rl completes half-drawn images; MaskedPolicy cannot.",
        ),
        ({"data.path": "labels"}, "prompt label 3: this model reads text and knows no classes."),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else None,
)
def test_what_cannot_be_is_said_before_any_weight_is_loaded(recipe, settings, said, capfd):
    write_folder(Path("labels"), None, [Prompt(label=3)])
    before = snapshot(Path())
    capfd.readouterr()
    assert trained(recipe, "refused", 3, **settings) == 2
    assert said in " ".join(capfd.readouterr().err.split())
    assert snapshot(Path()) == before
