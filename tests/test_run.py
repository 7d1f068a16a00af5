import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import test_policy_masked
import toy_run
from toy_run import ALGORITHMS, KILLS, LISTENERS, config, metrics, weights, with_steps
from varl.checkpoints import model as model_folder
from varl.checkpoints import run_state
from varl.config import EvalConfig, GRPOConfig, MARGRPOConfig, OCRConfig, OptimConfig, UnmaskingConfig, WeightedReward
from varl.data.folder import write_folder
from varl.distributed.mesh import World
from varl.errors import ConfigError, NumericsError, RewardError
from varl.run import train
from varl.settings import from_yaml, to_yaml
from varl.train import loop
from varl.types import Prompt

SMOKE = Path(__file__).parent / "data" / "smoke.json"
CURVE = ("reward", "reward_std", "grad_norm", "entropy", "advantage_abs_mean")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    toy_run.make(folder)
    return folder


@pytest.fixture(scope="module")
def whole(home) -> dict[str, Path]:
    """The run directory of six unbroken steps, by algorithm."""
    for name in ALGORITHMS:
        assert train(config(home, name), home / name).reason == "all 6 steps done"
    return {name: home / name for name in ALGORITHMS}


@pytest.fixture
def when_judged():
    """What happens when pictures are judged is put in here; afterwards it is forgotten."""
    yield LISTENERS
    LISTENERS.clear()


def assert_equal_runs(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    assert weights(a) == weights(b)
    (newest,) = {max((run / "checkpoints").iterdir()).name for run in (a, b)}
    for file in (a / "checkpoints" / newest).glob("*.safetensors"):
        assert file.read_bytes() == (b / "checkpoints" / newest / file.name).read_bytes()
    for picture in (a / "pictures").rglob("*.png"):
        assert picture.read_bytes() == (b / picture.relative_to(a)).read_bytes()


def events(out: Path, kind: str) -> list[str]:
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if line["kind"] == kind]


# ---- a run directory


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_a_run_leaves_behind(home, whole, name):
    out = whole[name]
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    stages = ["all"] * 6 if name == "grpo" else ["prefix", "prefix", "suffix"] * 2
    assert [line["stage"] for line in lines] == stages
    assert from_yaml((out / "config.yaml").read_text()) == config(home, name)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-000004", "step-000006"]
    model, tokenizer = model_folder.load(out / "model")
    state = run_state.load(out / "checkpoints" / "step-000006").tensors
    assert torch.equal(model.word_embed.weight, state["ema"]["word_embed.weight"])
    assert not torch.equal(model.word_embed.weight, state["model"]["word_embed.weight"])
    base = load_file(home / "base" / "tokenizer.safetensors")
    assert all(torch.equal(tensor, base[key]) for key, tensor in tokenizer.state_dict().items())
    assert json.loads((out / "model" / "notes.json").read_text())["reward_calls"] == lines[-1]["reward_calls"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_pictures_are_whole_ones_one_for_each_prompt(whole, name):
    folder = whole[name] / "pictures"
    assert json.loads((folder / "index.json").read_text())["steps"] == [0, 3, 6]
    assert not list(folder.rglob("*.tmp"))
    for step in (0, 3, 6):
        at = folder / f"step-{step:06d}"
        assert (whole[name] / "images" / f"{at.name}.png").is_file()
        assert len(list(at.glob("*.png"))) == len(json.loads((at / "read.json").read_text())) == 6


FORMS = {
    "grpo": GRPOConfig(num_generations=2),
    "damped": MARGRPOConfig(grpo=GRPOConfig(num_generations=2), ar_steps=2, denoise_moves=3),
    "rewarded": MARGRPOConfig(grpo=GRPOConfig(num_generations=2), ar_steps=0, denoise_moves=3, trajectories="rewarded"),
    "release": MARGRPOConfig(
        grpo=GRPOConfig(num_generations=2, loss_type="grpo"), ar_steps=2, denoise_moves=3, trajectories="release", support="unknown"
    ),
}


@pytest.fixture(scope="module")
def masked_pictures(tmp_path_factory) -> dict[str, tuple[bytes, list[dict]]]:
    """(second picture, read.json) of a tiny MAR before its first step, by form of the algorithm."""
    home = tmp_path_factory.mktemp("masked")
    policy = test_policy_masked.make()
    model_folder.save(home / "base", policy.module, policy.tokenizer, {})
    write_folder(home / "data", None, [Prompt(label=label) for label in range(3)])
    out = {}
    for name, algorithm in FORMS.items():
        short = config(home, steps=1, image_every=2, prompts_per_step=2)
        train(replace(short, algorithm=algorithm, unmasking=UnmaskingConfig(steps=3, denoise_steps=8)), home / name)
        folder = home / name / "pictures" / "step-000000"
        out[name] = ((folder / "01.png").read_bytes(), json.loads((folder / "read.json").read_text()))
    return out


@pytest.mark.parametrize("name", FORMS)
def test_pictures_of_a_masked_run_come_with_order_spread_and_weight(masked_pictures, name):
    """The picture, its reward, order and spread are the same however many rows it has in the batch; the weights are the form's."""
    picture, told = masked_pictures[name]
    plain_picture, plain = masked_pictures["grpo"]
    assert picture == plain_picture
    assert len(told) == 3
    for read, other, damped in zip(told, plain, masked_pictures["damped"][1], strict=True):
        assert read["reward"] == pytest.approx(other["reward"], abs=1e-5)
        assert read["step"] == other["step"]
        assert sorted(read["step"][0]) == [0, 1, 1, 2, 2, 2]
        assert read["mask"][0] == [float(weight > 0) for weight in read["weight"][0]]
        at = [step for step, weight in zip(read["step"][0], read["weight"][0], strict=True) if weight]
        assert read.get("spread") == (None if name == "grpo" else damped["spread"])
        assert ("at" in read) == (name == "release")
        uncertain = sorted(range(6), key=lambda i: -damped["spread"][0][i])[:2]
        match name:
            case "grpo":
                assert read["weight"] == [[1.0] * 6]
            case "rewarded":
                assert [read["weight"][0][i] for i in uncertain] == [0.2, 0.2]
                assert sum(read["weight"][0]) == pytest.approx(4.4)
            case "release":
                assert at
                assert min(at) >= read["at"]
                assert all(read["weight"][0][i] == 0 for i in uncertain)
            case _:
                assert len(set(at)) == 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_showing_changes_nothing(home, whole, tmp_path, name):
    train(config(home, name, image_every=1, steps=3), tmp_path)
    assert metrics(tmp_path) == metrics(whole[name])[:3]


# ---- going on


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_interrupted_after_every_step_is_the_unbroken_run(home, whole, tmp_path, name):
    for steps in range(1, 7):
        outcome = train(with_steps(config(home, name), steps), tmp_path)
        assert outcome.progress.step == steps
    assert_equal_runs(whole[name], tmp_path)
    assert events(tmp_path, "resume") == [f"from step-{step:06d}" for step in range(1, 6)]


def test_a_finished_run_is_left_as_it_is(home, whole, tmp_path):
    shutil.copytree(whole["grpo"], tmp_path / "run")
    outcome = train(config(home), tmp_path / "run")
    assert (outcome.reason, outcome.done) == ("all 6 steps done", True)
    assert_equal_runs(whole["grpo"], tmp_path / "run")


def fast(kill: str) -> bool:
    return kill in ("in step 4, weights moved", "in the save of step 4, half of its files written")


@pytest.mark.parametrize("kill", [pytest.param(kill, marks=[] if fast(kill) else pytest.mark.slow) for kill in KILLS])
def test_killed_anywhere_the_same_command_ends_where_the_unbroken_run_does(home, whole, tmp_path, kill):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["varl.run", "torch.utils.tensorboard"])
    text = to_yaml(config(home, "var_rl"))
    child = server.Process(target=toy_run.run_and_die, args=(text, tmp_path, kill))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "model" / "manifest.json").exists()
    done = len(metrics(tmp_path))
    train(from_yaml(text), tmp_path)
    assert done == {"in": 0, "after": 6}.get(kill.split()[0], 0) or done in (3, 4)
    assert_equal_runs(whole["var_rl"], tmp_path)
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]


def test_sigterm_finishes_the_step_saves_and_the_same_command_goes_on(home, whole, tmp_path, when_judged):
    calls = []

    def at_step_three(value):
        calls.append(len(value))
        if len(calls) == 6 + 2 * 4 + 1:  # pictures of six prompts, then four prompts a step
            os.kill(os.getpid(), signal.SIGTERM)

    when_judged.append(at_step_three)
    outcome = train(config(home), tmp_path)
    assert (outcome.reason, outcome.done, outcome.progress.step) == (loop.STOPPED, False, 3)
    assert run_state.load_latest(tmp_path / "checkpoints").step == 3
    assert events(tmp_path, "stop") == [loop.STOPPED]
    when_judged.clear()
    assert train(config(home), tmp_path).done
    assert_equal_runs(whole["grpo"], tmp_path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(home, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole["var_rl"], out)
    file = out / "checkpoints" / "step-000006" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    train(config(home, "var_rl"), out)
    (refused,) = events(out, "checkpoint refused")
    assert refused.startswith("step-000006: optimizer.safetensors is not what was written")
    assert events(out, "resume") == ["from step-000004"]
    assert_equal_runs(whole["var_rl"], out)


def test_another_config_is_refused_with_what_differs(home, whole):
    before = sorted(path.name for path in whole["grpo"].rglob("*"))
    other = replace(config(home, optim=OptimConfig(lr=0.5, warmup_steps=2)), seed=4)
    with pytest.raises(ConfigError, match=r"(?s)other settings:.*train.optim.lr: 0.003 -> 0.5.*seed: 3 -> 4.*Give another --out"):
        train(other, whole["grpo"])
    assert sorted(path.name for path in whole["grpo"].rglob("*")) == before


# ---- one curve


def curve(out: Path) -> dict[str, list[float]]:
    return {name: [line[name] for line in metrics(out)[:4]] for name in CURVE}


def assert_is_the_curve(found: dict[str, list[float]]) -> None:
    for name, want in json.loads(SMOKE.read_text()).items():
        assert found[name] == pytest.approx(want, rel=1e-4), name


def test_smoke_curve(whole):
    assert_is_the_curve(curve(whole["grpo"]))


def test_smoke_curve_with_another_micro_batch(home, tmp_path):
    train(config(home, rollouts_per_backward=1, steps=4, image_every=0), tmp_path)
    assert_is_the_curve(curve(tmp_path))


def test_smoke_curve_resumed(home, tmp_path):
    for steps in (3, 4):
        train(config(home, steps=steps, image_every=0), tmp_path)
    assert_is_the_curve(curve(tmp_path))


# ---- what goes wrong


def leftovers() -> list[str]:
    """Threads and child processes of rewards that still live."""
    threads = [t.name for t in threading.enumerate() if t.name.startswith(("reward", "judge"))]
    return threads + [f"process {pid}" for pid in children()]


def children() -> list[int]:
    """Reader processes of this process."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread or a process that ends meanwhile
            for pid in (task / "children").read_text().split():
                if b"varl.rewards.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return found


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint_and_the_batch(home, tmp_path, when_judged):
    calls = []

    def overflow(value):
        calls.append(len(value))
        return torch.full_like(value, 3e38).masked_fill(torch.arange(len(value)) == 0, 0.0) if len(calls) > 4 else value

    when_judged.append(overflow)
    with pytest.raises(NumericsError, match=r"step 2: the loss is nan.*failures/step-000002-rank-0\.safetensors"):
        train(config(home, save_every=1, image_every=0), tmp_path)
    assert load_file(tmp_path / "failures" / "step-000002-rank-0.safetensors")["0/logp"].shape[1] == 11
    state = run_state.load_latest(tmp_path / "checkpoints")
    assert (state.step, state.refused) == (1, ())
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    assert leftovers() == []


def test_failed_rewards_stop_the_run_and_leave_nothing_behind(home, tmp_path, when_judged):
    when_judged.append(lambda value: torch.full_like(value, torch.nan))
    with pytest.raises(RewardError, match="16 of 16 rewards failed"):
        train(config(home, image_every=0), tmp_path)
    assert leftovers() == []
    assert not (tmp_path / "checkpoints").exists()
    when_judged.clear()
    assert train(with_steps(config(home, image_every=0), 1), tmp_path).done  # the directory is free again


def test_reader_processes_end_with_a_run_that_fails(home, tmp_path):
    pytest.importorskip("rapidocr")
    reads = replace(config(home), rewards={"ocr": WeightedReward(reward=OCRConfig(engine="rapidocr"))})
    with pytest.raises(RewardError, match="no text region, so nothing to read"):
        train(reads, tmp_path)
    for _ in range(50):
        if not leftovers():
            break
        time.sleep(0.1)
    assert leftovers() == []


def test_ctrl_c_twice_in_one_step_ends_it_at_once_and_the_run_can_go_on(home, tmp_path, when_judged, caplog):
    calls = []

    def insist(value):
        calls.append(len(value))
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            while "finishing this step" not in caplog.text:  # two signals before the first is handled are one
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    when_judged.append(insist)
    with pytest.raises(KeyboardInterrupt):
        train(config(home, image_every=0, steps=2), tmp_path)
    assert leftovers() == []
    when_judged.clear()
    assert train(config(home, image_every=0, steps=2), tmp_path).done


def test_what_cannot_work_is_said_before_weights_are_read(home, tmp_path, monkeypatch):
    nowhere = replace(config(home), model=str(tmp_path / "no such model"))
    blind = replace(nowhere, eval=EvalConfig(every=2))
    with pytest.raises(ConfigError, match=r"eval\.every=2, but the data holds no prompts for evaluation"):
        train(blind, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the trained model of a run in .* would replace it"):
        train(replace(nowhere, model=str(tmp_path / "run" / "model")), tmp_path / "run")
    monkeypatch.setattr("varl.run.mesh.join", lambda device, seat: World(rank=4, size=5))
    adapts = replace(ALGORITHMS["var_rl"], adapt_middle_step=True)
    with pytest.raises(ConfigError, match="adapt_middle_step: each process would move its own middle step"):
        train(replace(nowhere, algorithm=adapts, train=replace(nowhere.train, prompts_per_step=5)), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"prompts_per_step=4: 5 processes would share them"):
        train(nowhere, tmp_path / "run")
    assert not (tmp_path / "run").exists()
