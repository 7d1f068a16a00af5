"""What the transformers of all families share."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of `device`. The meta device, which no weights are loaded on, knows of none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def rotate(x: Float[Tensor, "B heads l d"], by: Float[Tensor, "... l pairs 2"]) -> Float[Tensor, "B heads l d"]:
    """Neighbouring channels (2i, 2i + 1) turned as pairs by the angles whose (cos, sin) are given, in fp32."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.view_as_complex(by)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """From here on each block keeps its inputs alone for the backward pass, where it is computed again: with gradient a third more
    operations, and of all that the blocks make, what one of them makes at once. Nothing changes in value, and no name of a weight does."""
    for block in blocks:
        block.__class__ = recomputed(type(block))


@cache
def recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """The same kind of module, computed again in the backward pass."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        return checkpoint(kind.forward, self, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})


class GivenBias(nn.Linear):
    """A linear layer whose bias is kept elsewhere, under its released name, and comes with the input."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, bias=False)

    def forward(self, x: Float[Tensor, "*B before"], bias: Float[Tensor, " after"]) -> Float[Tensor, "*B after"]:  # type: ignore[override]
        return F.linear(x, self.weight, bias)


class KVCache:
    """Static keys and values of every block, [B, heads, L, d], written in the order of the tokens. `fork` copies only what is written."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], length: int = 0) -> None:
        self.keys, self.values, self.length = keys, values, length

    @classmethod
    def empty(cls, depth: int, shape: tuple[int, int, int, int], weight: Tensor) -> "KVCache":
        """On the device of `weight`, in the precision that it computes in."""
        device = weight.device
        dtype = torch.get_autocast_dtype(device.type) if autocasts(device) else weight.dtype
        keys, values = ([torch.empty(shape, device=device, dtype=dtype) for _ in range(depth)] for _ in range(2))
        return cls(keys, values)

    def write(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of `block` so far, the new ones after those that were there. `length` is the caller's to move on."""
        end = self.length + k.shape[2]
        self.keys[block][:, :, self.length : end] = k
        self.values[block][:, :, self.length : end] = v
        return self.keys[block][:, :, :end], self.values[block][:, :, :end]

    def fork(self, rows: Int[Tensor, " b"], capacity: int) -> "KVCache":
        """A cache of the given rows, of room for `capacity` tokens, holding what this one holds."""

        def copy(old: Tensor) -> Tensor:
            new = old.new_empty(len(rows), old.shape[1], capacity, old.shape[3])
            new[:, :, : self.length] = old[rows, :, : self.length]
            return new

        return KVCache([copy(k) for k in self.keys], [copy(v) for v in self.values], self.length)
