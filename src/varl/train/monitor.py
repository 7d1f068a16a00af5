"""Is the reward won at the cost of something else? Two trends over a window of steps, and an alarm with a stated rate of false ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from varl.config import MonitorConfig

BLOCKS = 8
"""Blocks that a window is cut into. Their means are what has a trend or not, so that noise forgotten within a block is none."""


def block_means(values: Sequence[float | None]) -> list[float] | None:
    """The mean of each of `BLOCKS` equal blocks of len(values) / BLOCKS values; missing ones are left out. None if a block has none."""
    size = len(values) // BLOCKS
    blocks = [[value for value in values[k * size : (k + 1) * size] if value is not None] for k in range(BLOCKS)]
    return [sum(block) / len(block) for block in blocks] if all(blocks) else None


def slope_t(values: Sequence[float]) -> float:
    """Student's t of the least-squares slope of n values against 0, 1, ..., n - 1; n - 2 degrees of freedom. Without any residual it is
    infinite, and 0 for equal values."""
    n, mean = len(values), sum(values) / len(values)
    times = [k - (n - 1) / 2 for k in range(n)]
    square = sum(time * time for time in times)
    slope = sum(time * (value - mean) for time, value in zip(times, values, strict=True)) / square
    rest = sum((value - mean - slope * time) ** 2 for time, value in zip(times, values, strict=True))
    error = math.sqrt(rest / (n - 2) / square)
    return slope / error if error > 0 else math.copysign(math.inf, slope) if slope else 0.0


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t with an even number of degrees of freedom, in closed form:

    1/2 - sin(a)/2 (1 + 1/2 cos^2 a + 1 3/(2 4) cos^4 a + ... up to cos^(freedom - 2))          a = arctan(t / sqrt(freedom))"""
    angle = math.atan(t / math.sqrt(freedom))
    term, total = 1.0, 0.0
    for k in range(freedom // 2):
        total += term
        term *= (2 * k + 1) / (2 * k + 2) * math.cos(angle) ** 2
    return 0.5 - math.sin(angle) * total / 2


def rises(blocks: Sequence[float], rate: float) -> bool:
    """Whether block means rise: of blocks of independent noise, a share `rate` is said to."""
    return student_tail(slope_t(blocks), len(blocks) - 2) < rate


class Monitor:
    """Looks at the metrics of every step, and after each window says whether there was an alarm. The same on every rank, for metrics are.

    `watched`: what shall not fall, each metric with the share of its first level that it may lose all the same. An alarm is a reward that
    rises while one of n watched falls: each trend alone at `false_alarms` / n, so that of windows in which nothing that is watched has a
    trend no more than `false_alarms` raise one, however the reward moves."""

    def __init__(self, config: MonitorConfig, watched: Mapping[str, float]) -> None:
        self.config, self.watched = config, dict(watched)
        self.history: dict[str, list[float | None]] = {name: [] for name in ("reward", *self.watched)}
        self.first: dict[str, float] = {}
        """Level of each watched metric in the first block of the first window that had it."""
        self.alarm: str | None = None
        """What the last window's alarm says, if it raised one."""

    def update(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Learns from the metrics of a step. At the end of a window `monitor/alarm`: 1 or 0."""
        for name, values in self.history.items():
            values.append(metrics.get(name))
        if len(self.history["reward"]) < self.config.window:
            return {}
        means = {name: found for name, values in self.history.items() if (found := block_means(values)) is not None}
        self.history = {name: [] for name in self.history}
        self.first = {name: means[name][0] for name in self.watched if name in means} | self.first
        fallen = self._fallen(means)
        self.alarm = self._said(metrics["step"], means, fallen) if fallen else None
        return {"monitor/alarm": float(bool(fallen))}

    def _fallen(self, means: Mapping[str, Sequence[float]]) -> list[str]:
        """What fell while the reward rose."""
        rate = self.config.false_alarms / max(1, len(self.watched))
        if "reward" not in means or not rises(means["reward"], self.config.false_alarms):
            return []
        falls = [name for name in self.watched if name in means and rises([-mean for mean in means[name]], rate)]
        return [name for name in falls if not (may := self.watched[name]) or means[name][-1] < (1 - may) * self.first[name]]

    def _said(self, step: int, means: Mapping[str, Sequence[float]], fallen: Sequence[str]) -> str:
        def way(name: str) -> str:
            return f"({means[name][0]:.3g} -> {means[name][-1]:.3g})"

        return (
            f"steps {step - self.config.window + 1} to {step}: reward rose {way('reward')} while "
            f"{', '.join(f'{name} fell {way(name)}' for name in fallen)}. The one may be won at the other's cost: look at the pictures. "
            f"By chance this is said of a share of {self.config.false_alarms:g} of such windows at most."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "first": self.first, "alarm": self.alarm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = {name: list(values) for name, values in state["history"].items()}
        self.first, self.alarm = dict(state["first"]), state["alarm"]
