"""Is a reward won at the cost of something else? False alarms, missed ones, and a policy that erases what its reward does not pay for."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import toy_run
from tabular import TabularPolicy
from varl import run as runs
from varl.algorithms.grpo import GRPO
from varl.build import build_judge
from varl.checkpoints import run_state
from varl.config import (
    GRPOConfig,
    MonitorConfig,
    OptimConfig,
    PythonRewardConfig,
    RunConfig,
    TrainConfig,
    WeightedReward,
)
from varl.data.folder import write_folder
from varl.distributed.mesh import World
from varl.errors import ConfigError
from varl.report import write_report
from varl.settings import from_yaml, to_yaml
from varl.train.loop import Trainer
from varl.train.monitor import BLOCKS, Monitor, block_means, rises, slope_t, student_tail
from varl.train.record import METRICS
from varl.types import Layout, Prompt, Region

# ---- trends


def test_block_means_leave_out_what_is_missing():
    assert block_means([1.0, 3.0] * BLOCKS) == [2.0] * BLOCKS
    assert block_means([None, 3.0] * BLOCKS) == [3.0] * BLOCKS
    assert block_means([None, None] + [1.0] * 14) is None


@pytest.mark.parametrize("freedom", [2, 4, 6, 10])
def test_tail_of_student(freedom):
    for t in (-3.0, -0.5, 0.0, 1.0, 2.5, 7.0):
        assert student_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), abs=1e-12)
    assert student_tail(float("inf"), freedom) == pytest.approx(0.0, abs=1e-15)


def test_slope_against_scipy_and_without_noise():
    draw = random.Random(0)
    values = [0.1 * k + draw.gauss(0, 1) for k in range(BLOCKS)]
    told = stats.linregress(range(BLOCKS), values)
    assert slope_t(values) == pytest.approx(told.slope / told.stderr, rel=1e-9)
    assert student_tail(slope_t(values), BLOCKS - 2) == pytest.approx(told.pvalue / 2 if told.slope > 0 else 1 - told.pvalue / 2, rel=1e-9)
    assert slope_t([0.0, 1.0, 2.0, 3.0]) == float("inf")
    assert slope_t([5.0] * BLOCKS) == 0.0
    assert not rises([5.0] * BLOCKS, 0.4)


def noise(draw: random.Random, steps: int, memory: float = 0.0) -> list[float]:
    """Unit noise, of which each step keeps a share `memory`."""
    values = [draw.gauss(0, 1)]
    while len(values) < steps:
        values.append(memory * values[-1] + (1 - memory**2) ** 0.5 * draw.gauss(0, 1))
    return values


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_white_noise_rises_as_often_as_stated(rate):
    draw, windows = random.Random(1), 4000
    found = sum(rises([draw.gauss(0, 1) for _ in range(BLOCKS)], rate) for _ in range(windows))
    assert abs(found - rate * windows) < 3 * (rate * (1 - rate) * windows) ** 0.5


def alarms(windows: int, fall: float = 0.0, memory: float = 0.0, **settings) -> float:
    """Share of windows that raise an alarm: the reward rises by 4 times its noise, of four things that are watched one falls by `fall`
    times its own."""
    config, draw = MonitorConfig(**settings), random.Random(2)
    names = [f"monitor/{k}" for k in range(4)]
    monitor, found = Monitor(config, dict.fromkeys(names, 0.0)), []
    for window in range(windows):
        series = {name: noise(draw, config.window, memory) for name in ("reward", *names)}
        for k in range(config.window):
            t = k / config.window
            metrics = {name: values[k] for name, values in series.items()} | {"step": window * config.window + k + 1}
            metrics["reward"] += 4 * t
            metrics["monitor/0"] -= fall * t
            if said := monitor.update(metrics):
                found.append(said["monitor/alarm"])
    assert len(found) == windows
    return sum(found) / windows


def test_false_alarms_come_as_seldom_as_stated_however_the_reward_rises():
    assert 0 < alarms(1200, false_alarms=0.05) < 0.05 + 3 * (0.05 * 0.95 / 1200) ** 0.5


def test_noise_that_is_forgotten_within_a_block_raises_few_more():
    """Half of it is left after a step, a hundred and twenty-eighth after a block."""
    assert alarms(1200, memory=0.5, false_alarms=0.05) < 0.1


def test_a_fall_of_three_times_the_noise_is_seen():
    assert alarms(200, fall=3.0) > 0.9


# ---- the monitor


def fed(config: MonitorConfig, may_lose: float, *levels: float, reward: float = 1.0) -> list[float]:
    """monitor/alarm after windows in which `x` goes from one level to the next and the reward up by `reward`."""
    monitor, found, step = Monitor(config, {"x": may_lose}), [], 0
    draw = random.Random(0)
    for first, last in pairwise(levels):
        for k in range(config.window):
            step += 1
            t = (k + 0.5) / config.window
            x = first + (last - first) * t + draw.gauss(0, 1e-3)
            found += monitor.update({"step": step, "reward": reward * step / 100 + draw.gauss(0, 1e-3), "x": x}).values()
    return found


def test_a_measure_may_lose_a_share_of_its_first_level_before_its_fall_is_one():
    config = MonitorConfig(window=16)
    assert fed(config, 0.0, 1.0, 1.0, 0.9, 0.9) == [0, 1, 0]
    assert fed(config, 0.5, 1.0, 0.9, 0.6, 0.4, 0.4) == [0, 0, 1, 0]
    assert fed(config, 0.5, 1.0, 0.4) == [1]


def test_no_alarm_where_the_reward_does_not_rise():
    config = MonitorConfig(window=16)
    assert fed(config, 0.0, 1.0, 0.5, reward=0.0) == [0]
    assert fed(config, 0.0, 1.0, 0.5, reward=-1.0) == [0]


def test_what_is_not_measured_in_a_block_says_nothing():
    monitor = Monitor(MonitorConfig(window=16), {"x": 0.0, "y": 0.0})
    for k in range(16):
        said = monitor.update({"step": k + 1, "reward": float(k), **({"x": -float(k)} if k > 1 else {}), "y": None if k % 2 else 3.0 - k})
    assert said == {"monitor/alarm": 1.0}
    assert monitor.alarm is not None
    assert monitor.alarm.startswith("steps 1 to 16: reward rose (0.5 -> 14.5) while y fell (3 -> -11). ")


def test_its_state_goes_through_json_whole():
    def metrics(step):
        draw = random.Random(step)
        return {"step": step, "reward": step + draw.random(), "x": -step / 3 + draw.random() if step % 3 else None}

    one, two = (Monitor(MonitorConfig(window=16), {"x": 0.5}) for _ in range(2))
    for step in range(1, 24):
        one.update(metrics(step))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.update(metrics(step)) for step in range(24, 50)] == [two.update(metrics(step)) for step in range(24, 50)]
    assert one.state_dict() == two.state_dict()


def test_bad_settings():
    for wrong, says in (
        ({"window": 20}, "monitor.window=20: must be a multiple of 8, 16 or more"),
        ({"window": 8}, "monitor.window=8"),
        ({"false_alarms": 0.0}, "monitor.false_alarms=0.0"),
        ({"may_lose": 1.0}, "monitor.may_lose=1.0"),
        ({"pictures": 1}, "monitor.pictures=1"),
        ({"held_out": {"alarm": PythonRewardConfig(target="a:b")}}, "monitor.held_out.alarm: is a name of the monitor's own"),
    ):
        with pytest.raises(ConfigError, match=says):
            MonitorConfig(**wrong)
    learned = PythonRewardConfig(target="a:b")
    with pytest.raises(ConfigError, match=r"monitor\.held_out\.other: is rewards\.mine, which is learned from"):
        RunConfig(model="m", rewards={"mine": WeightedReward(reward=learned)}, monitor=MonitorConfig(held_out={"other": learned}))


# ---- a reward that erases the background

ROWS, COLUMNS, TILE = 4, 8, 3
TEXT = (0.25, 0.25, 0.75, 0.75)


class Tiles(TabularPolicy):
    """Pictures of 4x8 tiles of 3x3 pixels, each paper, ink or a pattern, chosen apart from one another: the background begins as pattern
    mostly, the text box in the middle as anything."""

    grids = ((ROWS, COLUMNS),)

    def __init__(self) -> None:
        super().__init__(vocab=3, labels=2)
        with torch.no_grad():
            for weight in self.module.parameters():
                weight.mul_(0.2)
            self.module[0].bias.view(-1, 3)[~box_tiles()] += torch.tensor([0.0, 0.0, 1.5])
        self.layout = Layout(grids=self.grids, steps=1)

    def decode(self, rollout):
        checks = (torch.arange(TILE)[:, None] + torch.arange(TILE)) % 2
        looks = torch.stack([torch.full((TILE, TILE), 0.9), torch.full((TILE, TILE), 0.1), 0.2 + 0.6 * checks])
        tiles = looks[rollout.actions].unflatten(1, (ROWS, COLUMNS))
        return tiles.transpose(2, 3).flatten(3).flatten(1, 2)[:, None].expand(-1, 3, -1, -1)


def box_tiles() -> Tensor:
    inside = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    inside[1:3, 2:6] = True
    return inside.flatten()


def apart(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels inside and outside of the text box."""
    inside = box_tiles().view(ROWS, COLUMNS).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    return images[:, 0, inside], images[:, 0, ~inside]


def legible(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """What a reader of text alone pays for: ink that stands out against what is around it, which is easiest where there is nothing."""
    ink, ground = apart(images)
    return (ground.mean(1) - ink.mean(1)) / (ground.std(1) + 0.1)


def ink(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Pays for the same ink, whatever is around it."""
    return 1 - apart(images)[0].mean(1)


def pattern(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """How much of the ground is patterned: what a judge of whole pictures would miss."""
    return apart(images)[1].unflatten(1, (-1, TILE)).std(2).mean(1)


@pytest.mark.parametrize(("reward", "alarm"), [("legible", True), ("ink", False)])
def test_a_reward_that_erases_the_background_is_found_out_and_an_honest_one_is_not(tmp_path, reward, alarm):
    config = RunConfig(
        model="none",
        rewards={"words": WeightedReward(reward=PythonRewardConfig(target=f"test_monitor:{reward}"))},
        algorithm=GRPOConfig(num_generations=8, rollouts_per_chunk=16),
        train=TrainConfig(steps=64, optim=OptimConfig(lr=0.1)),
        monitor=MonitorConfig(held_out={"pattern": PythonRewardConfig(target="test_monitor:pattern")}),
    )
    prompts = [Prompt(text="A", label=label, regions=(Region(text="A", box=TEXT),)) for label in (0, 1)]
    monitor, judge = Monitor(config.monitor, runs.watched(config)), build_judge(config, None, monitor=True)
    trainer = Trainer(
        config.train,
        seed=0,
        policy=Tiles(),
        algorithm=GRPO(config.algorithm.grpo),
        judge=judge,
        prompts=lambda step: (prompts, range(2)),
        world=World(),
        failures=tmp_path,
    )
    told = []
    trainer.run(lambda metrics: told.append(metrics | monitor.update(metrics)))
    judge.close()
    edges = [metrics["monitor/background_edges"] for metrics in told]
    assert sum(metrics["reward"] for metrics in told[-8:]) > 1.2 * sum(metrics["reward"] for metrics in told[:8])
    assert (sum(edges[-8:]) < 0.5 * sum(edges[:8])) is alarm
    assert told[-1]["monitor/alarm"] == float(alarm), monitor.alarm
    if alarm:
        assert "monitor/background_edges fell" in str(monitor.alarm)
        assert "monitor/pattern fell" in str(monitor.alarm)
    assert isinstance(trainer.policy.module, nn.ModuleList)


# ---- a run


def undone(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Falls as the reward of `watched_run` rises."""
    return 3 - toy_run.reward(images, prompts) - 0.1 * bright(images, prompts)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    toy_run.make(folder)
    write_folder(folder / "data", None, toy_run.PROMPTS)
    return folder


def watched_run(home, **changes) -> RunConfig:
    """18 steps on two rewards, the second of much larger units, by running scale; a held-out one that falls as the first rises."""
    config = toy_run.config(home, steps=18, prompts_per_step=3, save_every=5, image_every=0, optim=OptimConfig(lr=1e-2), ema_decay=0.0)
    rewards = {
        "pixels": WeightedReward(reward=PythonRewardConfig(target="toy_run:reward")),
        "bright": WeightedReward(reward=PythonRewardConfig(target="test_monitor:bright"), weight=0.1),
    }
    grpo = GRPOConfig(num_generations=4, rollouts_per_chunk=4, scale_rewards="none", multi_objective_aggregation="running_scale")
    monitor = MonitorConfig(window=16, false_alarms=0.2, held_out={"undone": PythonRewardConfig(target="test_monitor:undone")}, **changes)
    return replace(config, rewards=rewards, algorithm=grpo, monitor=monitor)


def bright(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return 1000 * images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def unbroken(home):
    """A whole run, of which nothing but the log is asked for."""
    assert runs.train(watched_run(home), home / "unbroken").done
    return home / "unbroken"


def learned(out) -> dict:
    return run_state.load_latest(out / "checkpoints").extra["learners"]


def test_a_run_says_what_no_one_pays_for_and_raises_its_alarm_once(unbroken, caplog):
    lines = toy_run.metrics(unbroken)
    for line in lines:
        assert {"monitor/undone", "monitor/pixel_diversity", "monitor/background_edges"} <= line.keys()
        assert not [name for name in line if name.startswith("rewards/monitor")]
    assert [(line["step"], line["monitor/alarm"]) for line in lines if "monitor/alarm" in line] == [(16, 1.0)]
    (event,) = [json.loads(line) for line in (unbroken / "events.jsonl").read_text().splitlines() if '"alarm"' in line]
    assert event["step"] == 16
    assert "monitor/undone fell" in event["message"]
    page = write_report(unbroken, definitions=METRICS).read_text()
    assert event["message"].replace("<", "\\u003c") in page


def test_what_is_watched_changes_nothing(home, unbroken):
    """The same steps bit for bit without: nothing is learned from it, by no way round."""
    plain = replace(watched_run(home), monitor=MonitorConfig(window=16))
    runs.train(toy_run.with_steps(plain, 6), home / "plain")
    for line, other in zip(toy_run.metrics(home / "plain"), toy_run.metrics(unbroken), strict=False):
        assert line == {name: value for name, value in other.items() if name != "monitor/undone"}


def test_the_scale_is_the_running_mean_of_the_metric(unbroken):
    scale = dict.fromkeys(("pixels", "bright"), None)
    for line in toy_run.metrics(unbroken):
        for name, old in scale.items():
            new = line[f"rewards/{name}/std"]
            scale[name] = new if old is None else 0.9 * old + (1 - 0.9) * new
    assert learned(unbroken)["mixing"]["scale"] == scale
    assert scale["bright"] > 2 * scale["pixels"] > 0


def test_an_interrupted_run_ends_where_the_unbroken_one_does(home, unbroken):
    for steps in (7, 18):
        runs.train(toy_run.with_steps(watched_run(home), steps), home / "broken")
    assert toy_run.metrics(home / "broken") == toy_run.metrics(unbroken)
    assert toy_run.weights(home / "broken") == toy_run.weights(unbroken)
    assert learned(home / "broken") == learned(unbroken)


def test_two_processes_are_one(home, unbroken):
    runs.train(toy_run.with_steps(watched_run(home), 5), home / "both", processes=2)
    lines = toy_run.metrics(home / "both")
    assert len(lines) == 5
    for one, two in zip(toy_run.metrics(unbroken), lines, strict=False):
        assert one.keys() == two.keys()
        for name in ("reward", "rewards/bright/std", "monitor/undone", "monitor/pixel_diversity", "monitor/background_edges"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_an_alarm_may_stop_the_run_and_only_another_setting_goes_on(home):
    stopping, out = watched_run(home, on_alarm="stop"), home / "stopping"
    first, again = (runs.train(stopping, out) for _ in range(2))
    assert first.reason == again.reason
    assert first.reason.startswith("alarm: steps 1 to 16: reward rose (")
    assert (first.done, first.progress.step, again.progress.step) == (True, 16, 16)
    assert (out / "model" / "model.safetensors").is_file()
    assert runs.train(watched_run(home), out).progress.step == 18


def test_round_trip(home):
    config = watched_run(home, on_alarm="stop")
    assert from_yaml(to_yaml(config)) == config
