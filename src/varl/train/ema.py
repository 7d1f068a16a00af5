"""A moving average of the weights, which often draws better pictures than the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from varl.train.weights import fill, trained


class EMA:
    """e <- decay e + (1 - decay) w after every optimizer step, for each trainable parameter w; e starts as w."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._mean = {name: p.detach().clone() for name, p in trained(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for name, p in trained(module).items():
            self._mean[name].lerp_(p, 1 - self.decay)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module holds the average; afterwards its own weights again, bit for bit."""
        live = trained(module)
        own = {name: p.detach().clone() for name, p in live.items()}
        fill(live, self._mean)
        try:
            yield
        finally:
            fill(live, own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._mean)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        fill(self._mean, state)
