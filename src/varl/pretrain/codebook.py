"""A codebook that is started from real feature vectors and kept by moving averages."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

DECAY = 0.98
"""Of the code averages, per step."""
DEAD = 0.02
"""A code used less often than this share of the mean is put on a vector of the batch."""


@dataclass(slots=True)
class CodeAverages:
    """Running use count [V] and vector sum [V, C] of each code."""

    count: Float[Tensor, " V"]
    total: Float[Tensor, "V C"]

    @classmethod
    def start(cls, codes: Float[Tensor, "V C"]) -> "CodeAverages":
        """Each of `codes` used once."""
        return cls(torch.ones_like(codes[:, 0]), codes.clone())

    def update(self, asked: Float[Tensor, "n C"], ids: Int[Tensor, " n"], rng: torch.Generator) -> Float[Tensor, "V C"]:
        """The new codebook: each code the mean of what it stood for; dead codes restarted on random vectors that were asked for."""
        count = torch.zeros_like(self.count).index_add_(0, ids, torch.ones_like(asked[:, 0]))
        total = torch.zeros_like(self.total).index_add_(0, ids, asked)
        self.count.lerp_(count, 1 - DECAY)
        self.total.lerp_(total, 1 - DECAY)
        mean = self.count.mean()
        dead = (self.count < DEAD * mean).nonzero()[:, 0]
        if len(dead):
            pick = torch.randint(len(asked), (len(dead),), generator=rng)
            self.count[dead], self.total[dead] = mean, asked[pick] * mean
        return self.total / self.count.unsqueeze(1)


def drawn_from(vectors: Float[Tensor, "n C"], count: int, rng: torch.Generator) -> Float[Tensor, "m C"]:
    """`count` of the vectors, drawn with replacement."""
    return vectors[torch.randint(len(vectors), (count,), generator=rng)]
