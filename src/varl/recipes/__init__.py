"""A paper's settings table, or ours, as a function without arguments that returns a config. Its name is MODULE/FUNCTION."""

import difflib
from collections.abc import Callable
from importlib import import_module
from inspect import getdoc, isfunction, signature
from pkgutil import iter_modules
from typing import get_type_hints

from varl.config import PretrainConfig, RunConfig
from varl.errors import ConfigError

Recipe = Callable[[], RunConfig | PretrainConfig]


def _collect() -> dict[str, Recipe]:
    """Every function of every module here that takes nothing and returns a config."""
    found = {}
    for module in sorted(info.name for info in iter_modules(__path__)):
        for name, function in vars(import_module(f"{__name__}.{module}")).items():
            own = isfunction(function) and function.__module__ == f"{__name__}.{module}" and not signature(function).parameters
            if own and get_type_hints(function).get("return") in (RunConfig, PretrainConfig):
                found[f"{module}/{name}"] = function
    return found


RECIPES: dict[str, Recipe] = _collect()


def describe() -> dict[str, str]:
    """The first line of each recipe's docstring, by name."""
    return {name: (getdoc(function) or "").partition("\n")[0] for name, function in RECIPES.items()}


def recipe(name: str) -> RunConfig | PretrainConfig:
    """The config of a recipe."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        known = "".join(f"\n  {each}  {line}" for each, line in describe().items())
        raise ConfigError(f"unknown recipe `{name}`.{hint} Give one of these, or the path of a YAML file:{known}")
    return RECIPES[name]()
