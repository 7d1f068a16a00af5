"""A moving average of the weights, which often draws better pictures than the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from varl.errors import CheckpointError


class EMA:
    """e <- decay e + (1 - decay) w after every optimizer step, for each trainable parameter w; e starts as w."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._mean = {name: p.detach().clone() for name, p in _trainable(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for name, p in _trainable(module).items():
            self._mean[name].lerp_(p, 1 - self.decay)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module holds the average; afterwards its own weights again, bit for bit."""
        live = _trainable(module)
        own = {name: p.detach().clone() for name, p in live.items()}
        _fill(live, self._mean)
        try:
            yield
        finally:
            _fill(live, own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._mean)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self._mean.keys():
            other = sorted(state.keys() ^ self._mean.keys())
            raise CheckpointError(
                f"the saved average is of other parameters: {', '.join(other[:8])}. Resume with the config it was saved with."
            )
        _fill(self._mean, state)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def _fill(into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(source[name])
