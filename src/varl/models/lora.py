"""Low-rank adapters (LoRA, arXiv 2106.09685) of any model here, by the package peft.

    y = W x + lora_alpha / r  B A x        W frozen, A [r, in] and B [out, r] trained

B starts at 0, so the adapted model starts as the model; A is uniform within 1 / sqrt(in)."""

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from varl.config import LoraConfig
from varl.errors import ConfigError
from varl.rng import generator

ADAPTER = "default"
"""The name by which peft knows the adapters of a model that has one set of them."""
SHOWN = 12


def require_peft() -> None:
    """ConfigError where the package is not installed."""
    if find_spec("peft") is None:
        raise ConfigError("LoRA needs the package peft, which is not installed. Run `pip install 'varl[lora]'`.")


def peft() -> Any:
    """The package, imported when it is first needed: it takes seconds."""
    require_peft()
    return importlib.import_module("peft")


def chosen(module: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear layers that get adapters, none of which is frozen. ConfigError for a name that fits none, and for a layer that is
    smaller than the rank."""
    learning = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear) and part.weight.requires_grad}
    inside = {id(part) for block in module.blocks for part in block.modules()}  # type: ignore[attr-defined]
    names = [name for name, part in learning.items() if id(part) in inside]
    if config.target_modules:
        fits = {target: [name for name in learning if f".{name}".endswith(f".{target}")] for target in config.target_modules}
        if absent := [target for target, found in fits.items() if not found]:
            kinds = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
            raise ConfigError(
                f"train.lora.target_modules: no linear layer that is trained is called {absent[0]!r}. "
                f"Those in the blocks are {', '.join(list(kinds)[:SHOWN])}."
            )
        names = [name for name in learning if any(name in found for found in fits.values())]
    smallest = min(names, key=lambda name: min(learning[name].weight.shape))
    if config.r > (least := min(learning[smallest].weight.shape)):
        raise ConfigError(f"train.lora.r={config.r}: {smallest} has only {least} inputs or outputs. Set {least} or less.")
    return names


def with_adapters(module: nn.Module, config: LoraConfig, seed: int = 0) -> None:
    """`adapt` on all layers that are `chosen`."""
    adapt(module, chosen(module, config), config, seed)


def adapt(module: nn.Module, names: Sequence[str], config: LoraConfig, seed: int) -> None:
    """Puts adapters on the layers of these names, in place, and freezes all else. A of a layer is drawn at the address (seed, "lora",
    name), on the CPU."""
    package = peft()
    device = {name: module.get_submodule(name).weight.device for name in names}
    settings = package.LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=list(names))
    package.inject_adapter_in_model(settings, module, ADAPTER, low_cpu_mem_usage=True)  # empty ones, so that nothing is drawn
    for name, layer in adapters(module):
        a, b = (part[ADAPTER].to_empty(device=device[name]) for part in (layer.lora_A, layer.lora_B))
        with torch.no_grad():
            drawn = torch.rand(a.weight.shape, generator=generator(seed, "lora", name))
            a.weight.copy_((2 * drawn - 1) / a.in_features**0.5)
            b.weight.zero_()
    module.eval()


def adapters(module: nn.Module) -> list[tuple[str, Any]]:
    """Name of each adapted layer, and peft's layer: `base_layer`, and `lora_A` and `lora_B` by the name of the adapter."""
    return [(name, part) for name, part in module.named_modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer")]


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Adds lora_alpha / r B A to each adapted layer's W, in place and one after another, and takes the adapters off: a plain model remains,
    and no way back."""
    for name, layer in adapters(module):
        base = layer.get_base_layer()
        base.weight += layer.get_delta_weight(ADAPTER)
        module.set_submodule(name, base)
