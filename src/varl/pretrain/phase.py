"""A stretch of pre-training: so many steps of one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from varl.config import OptimConfig

Metrics = Callable[[], dict[str, Any]]
"""What a step measured, worked out only where it is asked for."""


@runtime_checkable
class Phase(Protocol):
    stage: str
    """What `stage` is in its metrics."""
    steps: int
    optim: OptimConfig
    optimizer: torch.optim.Optimizer

    def begin(self) -> None:
        """Before its first step in this process."""
        ...

    def step(self, step: int) -> Metrics:
        """One update, a function of the weights and the step alone. The learning rates are set."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it needs to go on, besides weights and optimizer."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


class Stateless:
    """Of a phase that needs nothing more to go on."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass


def descend(phase: Phase, loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """One step of the phase's optimizer, which moves `parameters`. The norm of the gradient before it was clipped."""
    phase.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, phase.optim.max_grad_norm)
    phase.optimizer.step()
    return norm
