"""Randomness with an address: every draw is named by (seed, purpose, step, global sample index), so that it does not depend on world
size, micro-batch size, or where a run was interrupted."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Address = int | str


def generator(seed: int, *path: Address) -> torch.Generator:
    """The CPU generator that lives at `path`, e.g. (seed, "rollout", step, sample)."""
    digest = hashlib.blake2s(repr((seed, *path)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One address per row of a batch. A stream holds no state: the same call gives the same numbers, so two different draws need two
    different paths (`at`)."""

    seed: int
    path: tuple[Address, ...] = ()
    rows: tuple[int, ...]
    """Global sample index of each row."""

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, *path: Address) -> "Stream":
        """The same rows, one room further down."""
        return replace(self, path=(*self.path, *path))

    def repeat(self, copies: int) -> "Stream":
        """Row r becomes rows r*copies .. r*copies + copies - 1, next to one another."""
        return replace(self, rows=tuple(row * copies + k for row in self.rows for k in range(copies)))

    def select(self, index: Sequence[int]) -> "Stream":
        return replace(self, rows=tuple(self.rows[i] for i in index))

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] in [0, 1), fp32, on the CPU."""
        return torch.stack([torch.rand(shape, generator=generator(self.seed, *self.path, row)) for row in self.rows])

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape] standard normal, fp32, on the CPU."""
        return torch.stack([torch.randn(shape, generator=generator(self.seed, *self.path, row)) for row in self.rows])
