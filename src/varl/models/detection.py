"""What detectors of objects answer with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Detection:
    """An object that a detector saw in a picture."""

    label: str
    """Its class, by the name that was asked for."""
    score: float
    """How sure it is, 0 to 1."""
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in shares of the picture, y downwards."""
    mask: Bool[Tensor, "H W"] | None = None
    """Its pixels, where the detector tells them."""
    colour: str | None = None
    """Where somebody looked."""


@runtime_checkable
class Detector(Protocol):
    """Something that looks for objects."""

    def require(self, names: Sequence[str]) -> None:
        """Raises unless it can look for every one of these classes."""
        ...

    def detect(
        self, images: Float[Tensor, "B 3 H W"], names: Sequence[Sequence[str]], least: Sequence[float]
    ) -> list[tuple[Detection, ...]]:
        """What it saw in each picture of the classes `names` of that picture and was surer of than `least`, surest first."""
        ...
