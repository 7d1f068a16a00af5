"""What is watched, and not paid for."""

from dataclasses import dataclass, field
from typing import Literal

from varl.config.demand import demand
from varl.config.rewards import RewardConfig
from varl.errors import ConfigError

PICTURE_MEASURES = ("pixel_diversity", "background_edges")
"""What every run measures on its pictures beside the reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """Looks for a reward that is won at the cost of something else: alarm where the train reward rises over a window of steps while what is
    never optimised falls, be it a held-out reward, how much a prompt's pictures differ, or the edges outside of its text boxes."""

    held_out: dict[str, RewardConfig] = field(default_factory=dict)
    """Rewards that are measured and never learned from."""
    pictures: int = 4
    """Of each prompt's group the first so many are looked at: they are as good as any, and a held-out reward may be dear."""
    window: int = 64
    """Steps from one look for a trend to the next; a multiple of 8, for it is cut into 8 blocks."""
    false_alarms: float = 0.01
    """Share of windows in which the alarm is raised although nothing that is watched has a trend, at most."""
    may_lose: float = 0.5
    """Share of its first level that a measure of the pictures may lose before its fall is one: whoever learns what is wanted draws less
    else. A held-out reward may lose nothing."""
    on_alarm: Literal["log", "stop"] = "log"
    """stop ends the run there, with its model; the same command goes on only with another setting here."""

    def __post_init__(self) -> None:
        demand("monitor.pictures", self.pictures, self.pictures >= 2, "2 or more: one picture differs from none")
        demand("monitor.window", self.window, self.window >= 16 and self.window % 8 == 0, "a multiple of 8, 16 or more")
        demand("monitor.false_alarms", self.false_alarms, 0 < self.false_alarms < 0.5, "above 0 and below 0.5")
        demand("monitor.may_lose", self.may_lose, 0 <= self.may_lose < 1, "at least 0 and below 1")
        if taken := {"alarm", *PICTURE_MEASURES} & self.held_out.keys():
            raise ConfigError(f"monitor.held_out.{min(taken)}: is a name of the monitor's own. Call it something else.")
