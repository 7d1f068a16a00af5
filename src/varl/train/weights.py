"""Which of a model's weights move, and how they are put back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from varl.errors import CheckpointError


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer moves, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill(into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copies tensors of the same names. CheckpointError if there are others."""
    if other := sorted(into.keys() ^ source.keys()):
        raise CheckpointError(f"what was saved is of other parameters: {', '.join(other[:8])}. Resume with the config it was saved with.")
    for name, tensor in into.items():
        tensor.copy_(source[name])
