import re
import subprocess
import sys
from collections.abc import Callable
from inspect import getmodule, getsource, isfunction

import pytest

from varl.algorithms.vmr import middle_step
from varl.config import FolderConfig, InfinityConfig, NextScaleConfig, PretrainConfig, RunConfig
from varl.errors import ConfigError
from varl.policies.acting import require_laws
from varl.recipes import RECIPES, describe, recipe
from varl.settings import from_yaml, to_yaml
from varl.types import Layout


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_is_the_yaml_it_writes(name):
    config = recipe(name)
    assert isinstance(config, RunConfig | PretrainConfig)
    assert from_yaml(to_yaml(config), type(config)) == config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_in_a_line_what_it_is(name):
    line = describe()[name]
    assert line.endswith(".")
    assert 20 < len(line) < 140


def test_names_are_module_and_function():
    assert {"grpo/words_cpu", "var_rl/words_cpu"} <= RECIPES.keys()
    for name, function in RECIPES.items():
        module, _, short = name.partition("/")
        assert isinstance(function, Callable)
        assert (getmodule(function).__name__, function.__name__) == (f"varl.recipes.{module}", short)


def written(function):
    """The function's text, and those of its module's functions that it is made of."""
    text, own = getsource(function), vars(getmodule(function))
    parts = {name for name in re.findall(r"\b(\w+)\(", text) if isfunction(own.get(name)) and own[name] is not function}
    return text + "".join(written(own[name]) for name in sorted(parts) if own[name].__module__ == function.__module__)


@pytest.mark.parametrize("name", [name for name in RECIPES if isinstance(recipe(name), RunConfig)])
def test_the_loss_is_written_down_and_not_left_to_defaults(name):
    text = written(RECIPES[name])
    assert "loss_type=" in text
    assert "beta=" in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_named_after_its_recipe(name):
    assert recipe(name).name == name


@pytest.mark.parametrize(
    ("name", "near"),
    [("grpo/words_cp", "grpo/words_cpu"), ("var_lr/words_cpu", "var_rl/words_cpu"), ("var_rl.words_cpu", "var_rl/words_cpu")],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_with_all(name, near):
    with pytest.raises(ConfigError) as caught:
        recipe(name)
    assert str(caught.value).startswith(f"unknown recipe `{name}`. Did you mean `{near}`? Give one of these, or the path of a YAML file:\n")
    for known, line in describe().items():
        assert f"\n  {known}  {line}" in str(caught.value)


def test_a_name_like_none_gets_no_hint():
    with pytest.raises(ConfigError, match=r"^unknown recipe `zzz`. Give one of these"):
        recipe("zzz")


@pytest.mark.parametrize(
    ("name", "model", "m", "tokens"),
    [
        ("infinity_2b_text", InfinityConfig(), 7, 521),
        ("var_d16_c2i", NextScaleConfig(num_classes=1000), 5, 55),
        ("var_d36_c2i", NextScaleConfig(num_classes=1000, grids=tuple((n, n) for n in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))), 6, 147),
    ],
)
def test_what_released_models_of_scales_are_asked_for(name, model, m, tokens):
    """The prefix ends where the paper's m_256 of 1024 does, by resolution or by its share of the tokens; laws fit the vocabulary."""
    config = recipe(f"var_rl/{name}")
    layout = Layout(grids=model.grids, steps=len(model.grids))
    assert middle_step(config.algorithm.middle_step, layout) == m
    assert sum(h * w for h, w in model.grids[:m]) == tokens
    require_laws({"sample_law": config.sample_law, "score_law": config.score_law}, layout.steps, "scale", model.tokenizer.vocab)
    assert isinstance(config.data, FolderConfig) or config.data.image_size == model.image_size


def test_recipes_come_without_torch():
    code = "import sys, varl.recipes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
