"""A reward in another process: what goes over the wire, what can go wrong with it, and that training goes on. The services are processes of
their own that listen on loopback; `faulty_service.py` fails on command."""

import copy
import json
import re
import socket
import subprocess
import sys
import threading
import time
import venv
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from faulty_service import score
from tabular import TabularPolicy, brightness
from tiny import status
from varl.algorithms.grpo import GRPO
from varl.build import build_judge
from varl.config import (
    FolderConfig,
    GRPOConfig,
    OptimConfig,
    PythonRewardConfig,
    RunConfig,
    ServedRewardConfig,
    TrainConfig,
    WeightedReward,
)
from varl.distributed.mesh import World
from varl.errors import ConfigError, RewardError
from varl.plan.missing import judge_of
from varl.rewards.judge import RewardJudge, judge_now
from varl.rewards.served import Breaker, ServedReward, health, prompt_of
from varl.rewards.service import Service, address, columns, pack, plain, unpack
from varl.settings import from_yaml, to_yaml
from varl.train.loop import Trainer
from varl.types import Judgement, Prompt, Region

NAN = float("nan")
PROMPTS = [
    Prompt(text="one"),
    Prompt(text="two words", regions=(Region(text="two", box=(0.1, 0.2, 0.3, 1 / 3)), Region(text="words")), style=("mono",)),
    Prompt(label=3, image="a/b.png"),
]
IMAGES = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
VALUE = brightness(IMAGES, PROMPTS)


def same(got, want):
    torch.testing.assert_close(got, torch.as_tensor(want), rtol=0, atol=1e-6, equal_nan=True)


# ---- what goes over the wire ------------------------------------------------------------------------------------------------------------


def test_it_is_a_safetensors_file(tmp_path):
    arrays = {"value": np.array([1.0, NAN], "<f4"), "region_box": np.arange(8, dtype="<f4").reshape(2, 1, 4)}
    said = {"ids": ["a", "é"], "x": 1 / 3}
    data = pack(arrays, said)
    got = safetensors.torch.load(data)
    assert got.keys() == arrays.keys()
    same(got["region_box"], arrays["region_box"])
    (tmp_path / "x.safetensors").write_bytes(data)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["varl"]) == said
    theirs = safetensors.torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, {"varl": json.dumps(said)})
    for either in (data, theirs):
        again, told = unpack(bytearray(either))
        assert told == said
        for name, array in arrays.items():
            np.testing.assert_array_equal(again[name], array)


GOOD = pack({"value": np.zeros(2, "<f4")}, {})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not found</html>",
        GOOD[:-1],
        GOOD[:20],
        GOOD.replace(b"F32", b"F64"),
        GOOD.replace(b"[2]", b"[3]"),
        GOOD.replace(b"__metadata__", b"__metabeta__"),
        GOOD.replace(b'"{}"', b'"[]"'),
        GOOD.replace(b"[0, 8]", b"[1" + b"0" * 30 + b", 1" + b"0" * 30 + b"]").replace(GOOD[:8], (len(GOOD) + 42).to_bytes(8, "little")),
        b"\xff" * 64,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_anything_else_is_refused(data):
    with pytest.raises(ValueError, match=r"not what is spoken here|no mapping"):
        unpack(bytearray(data))


def test_an_address_is_of_every_pixel_and_word():
    image, prompt = IMAGES[0].numpy(), asdict(PROMPTS[1])
    mine = address(image, prompt)
    assert mine == address(image.copy(), json.loads(json.dumps(prompt)))
    other = image.copy()
    other[2, 1, 1] += 1e-6
    assert len({mine, address(other, prompt), address(image, asdict(PROMPTS[0])), address(image.reshape(3, 1, 4), prompt)}) == 4


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.text)
def test_a_prompt_arrives_as_it_was(prompt):
    assert prompt_of(json.loads(json.dumps(asdict(prompt)))) == prompt


def test_what_a_scorer_may_answer():
    for told in (torch.tensor([1.0, NAN]).double(), np.array([1, NAN]), [1, None], SimpleNamespace(value=[1.0, None])):
        got = columns(told)
        assert got.keys() == {"value"}
        np.testing.assert_array_equal(got["value"], np.array([1, NAN], "<f4"))
    judgement = Judgement(value=torch.ones(2), parts={"ned": torch.zeros(2)}, region_value=torch.ones(2, 1))
    assert {name: array.shape for name, array in columns(judgement).items()} == {"value": (2,), "parts/ned": (2,), "region_value": (2, 1)}


# ---- the one who answers ----------------------------------------------------------------------------------------------------------------


@contextmanager
def listening(scorer, **settings):
    """A service in a thread of this process."""
    with Service("here", "127.0.0.1", 0, **settings) as service:
        service.scorer = scorer
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()


def request(seconds=60.0):
    return bytearray(pack({"images": IMAGES.numpy()}, {"prompts": [asdict(prompt) for prompt in PROMPTS], "seconds": seconds}))


def answered(scorer, batch=0, **settings):
    with Service("here", "127.0.0.1", 0, batch=batch) as service:
        service.scorer = scorer
        arrays, said = unpack(bytearray(service.answer(request(**settings), time.monotonic())))
        return arrays, said, service


def test_what_raises_costs_its_own_call_alone_and_each_picture_has_a_status(capsys):
    def moody(images, prompts):
        if prompts[0].text == "two words":
            raise ZeroDivisionError("no mood")
        count = 1 + int(prompts[0].label is not None)
        return SimpleNamespace(value=[float("inf")] * len(images), region_value=np.ones((len(images), count)), parts={"one": [1.0]})

    arrays, said, service = answered(plain(moody), batch=1)
    assert said["status"] == ["not finite", "ZeroDivisionError: no mood", "not finite"]
    assert said["ids"] == [address(image, asdict(prompt)) for image, prompt in zip(IMAGES.numpy(), PROMPTS, strict=True)]
    same(torch.from_numpy(arrays["region_value"]), [[1.0, NAN], [NAN, NAN], [1.0, 1.0]])
    same(torch.from_numpy(arrays["parts/one"]), [1.0, NAN, 1.0])
    assert (service.judged, service.failed) == (3, 3)
    assert "no mood" in capsys.readouterr().err


def test_a_plain_callable_gets_tensors_and_prompts_with_words():
    def score(images, prompts):
        assert isinstance(images, torch.Tensor)
        assert not torch.is_grad_enabled()
        return [float(len(prompt.words)) for prompt in prompts]

    same(torch.from_numpy(answered(plain(score))[0]["value"]), [0.0, 2.0, 0.0])


def test_the_wrong_number_of_values_fails_the_call(capsys):
    arrays, said, _ = answered(plain(lambda images, prompts: [1.0]))
    same(torch.from_numpy(arrays["value"]), [NAN] * 3)
    assert said["status"] == ["ValueError: value is [1], and there are 3 pictures"] * 3
    assert "ValueError" in capsys.readouterr().err


def test_a_call_that_fails_leaves_what_the_others_read():
    def reader(images, prompts):
        if prompts[0].text == "two words":
            raise ZeroDivisionError
        seen = [SimpleNamespace(text=prompts[0].text, confidence=1.0, box=[0, 0, 1, 1])]
        return SimpleNamespace(value=[1.0], found=[seen] if prompts[0].text else None)

    with listening(plain(reader), batch=1) as service:
        told = ServedReward(ServedRewardConfig(url=service.url, retries=0))(IMAGES, PROMPTS)
    same(told.value, [1.0, NAN, 1.0])
    assert [[piece.text for piece in row] for row in told.found] == [["one"], [], []]


def test_regions_of_another_shape_fail_the_call(capsys):
    arrays, said, _ = answered(plain(lambda images, prompts: SimpleNamespace(value=[1.0] * 3, region_value=[1.0] * 3)))
    assert arrays.keys() == {"value"}
    assert said["status"] == ["ValueError: region_value is [3], and there are 3 pictures"] * 3
    assert "ValueError" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["soon", None, float("inf"), NAN], ids=str)
def test_a_time_that_is_none_is_refused(seconds):
    with Service("here", "127.0.0.1", 0) as service, pytest.raises(ValueError, match="must be a number"):
        service.answer(request(seconds=seconds), time.monotonic())


def test_what_nobody_waits_for_any_more_is_not_judged():
    def never(images, prompts):
        raise AssertionError

    with Service("here", "127.0.0.1", 0) as service:
        service.scorer = never
        with service._turn, pytest.raises(TimeoutError, match="turn"):
            service.answer(request(seconds=0.0), time.monotonic())
        assert service.judged == 0


def test_who_waits_for_a_scorer_that_cannot_be_loaded_is_told_why(capsys, caplog):
    with Service("here", "127.0.0.1", 0) as service:
        told = []

        def ask():
            told.append(ServedReward(ServedRewardConfig(url=service.url, retries=0))(IMAGES, PROMPTS))

        asker = threading.Thread(target=ask)

        def load():
            asker.start()
            while not service.askers:
                time.sleep(0.01)
            raise ConfigError("no weights at w.pt")

        with pytest.raises(ConfigError, match=r"no weights at w\.pt"):
            service.run(load, (2, 2))
        asker.join()
    same(told[0].value, [NAN] * 3)
    assert "status 503: here: its scorer was not loaded (ConfigError: no weights at w.pt)" in caplog.text
    said = capsys.readouterr()
    assert said.out == f"here at {service.url}\n"
    assert "Traceback" not in said.err


# ---- the one who asks -------------------------------------------------------------------------------------------------------------------


def test_a_breaker_by_hand():
    breaker = Breaker(after=2, rest=10.0)
    breaker.tell(False, now=0.0)
    assert breaker.allows(0.0)
    breaker.tell(True, now=1.0)
    breaker.tell(False, now=2.0)
    assert breaker.allows(2.0)
    breaker.tell(False, now=3.0)
    assert [breaker.allows(now) for now in (3.0, 12.9, 13.0)] == [False, False, True]
    breaker.tell(False, now=13.0)  # the one try
    assert [breaker.allows(now) for now in (22.9, 23.0)] == [False, True]
    breaker.tell(True, now=23.0)
    breaker.tell(False, now=24.0)
    assert breaker.allows(24.0)
    assert breaker.opened == 2


def test_the_log_counts_the_failures_that_there_were(caplog):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    reward = ServedReward(ServedRewardConfig(url=url, retries=0, break_after=2, rest=0.0))
    for _ in range(3):
        same(reward(IMAGES, PROMPTS).value, [NAN] * 3)
    rests = [record.getMessage().removeprefix(f"reward service {url}: ") for record in caplog.records if "in a row" in record.getMessage()]
    assert rests == [f"{count} failures in a row, not asked for 0 s ({time}. time)" for count, time in ((2, 1), (3, 2))]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "https://host:1", "http://", "http://host:1/judge", "http://a b:1", "http://u@h:1"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="must be http://HOST:PORT"):
        ServedRewardConfig(url=url)


def test_a_mistake_stops_the_run_and_is_not_tried_again():
    asked = []

    def scorer(images, prompts):
        asked.append(1)
        raise RewardError("prompt 'one': no text region")

    says = pytest.raises(RewardError, match=r"refuses the request \(422\): prompt 'one': no text region")
    with listening(scorer, mistakes=(RewardError,)) as service, says:
        ServedReward(ServedRewardConfig(url=service.url))(IMAGES, PROMPTS)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "says"),
    [
        ("GET", "/", b"", 404, "there is /health and /judge"),
        ("POST", "/health", b"", 404, "there is /health and /judge"),
        ("POST", "/judge", b"{}", 400, "not what is spoken here"),
        ("POST", "/judge", GOOD, 400, "must hold `images`"),
        ("GET", "/health", b"", 503, None),
    ],
)
def test_what_is_no_request_is_refused(method, path, body, code, says):
    with listening(None) as service, closing(HTTPConnection("127.0.0.1", service.server_address[1])) as connection:
        connection.request(method, path, body)
        answer = connection.getresponse()
        told = json.loads(answer.read())
        assert answer.status == code
    assert says in told["error"] if says else not told["ready"]


@pytest.mark.parametrize("first", ["", "HTTP/1.1 200 OK\r\nX-Long: ", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"])
def test_the_deadline_holds_for_an_answer_that_trickles_in(first, caplog):
    """From its first byte, in its headers, in its body."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def trickle():
            with closing(server.accept()[0]) as peer:
                peer.sendall(first.encode())
                try:
                    for _ in range(100):
                        peer.sendall(b"x")
                        time.sleep(0.1)
                except ConnectionError:
                    pass

        thread = threading.Thread(target=trickle)
        thread.start()
        reward = ServedReward(ServedRewardConfig(url=f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.5))
        start = time.monotonic()
        same(reward(IMAGES, PROMPTS).value, [NAN] * 3)
        assert 0.4 < time.monotonic() - start < 2.0
        thread.join()
    assert "did not answer within 0.5 s" in caplog.text


# ---- what can go wrong, with a real process ---------------------------------------------------------------------------------------------


class Process:
    """`faulty_service.py`, which may be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "moods"
        self.port, self.process = 0, None

    def start(self, moods: str = "well") -> "Process":
        self.file.write_text(moods)
        command = [sys.executable, str(Path(__file__).parent / "faulty_service.py"), str(self.port), str(self.file)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]
        self.port = int(self.url.rpartition(":")[2])
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def reward(self, **settings) -> ServedReward:
        return ServedReward(ServedRewardConfig(**({"url": self.url, "retries": 0, "backoff": 0.05} | settings)))


@pytest.fixture
def service(tmp_path):
    process = Process(tmp_path)
    yield process
    if process.process is not None:
        process.kill()


def test_all_that_an_answer_may_hold_arrives(service):
    told = judge_now(service.start().reward(), IMAGES, PROMPTS)
    same(told.value, VALUE)
    same(told.parts["first"], IMAGES[:, 0, 0, 0])
    same(told.region_value, torch.stack([VALUE / 4, 3 * VALUE / 4], 1))
    same(told.region_box, torch.ones(3, 2, 4))
    assert [row[0].text for row in told.found] == ["one", "two words", ""]
    assert health(service.url)["judged"] == 3
    assert judge_of("mine", ServedRewardConfig(url=service.url), None) == f"mine: faulty at {service.url}"


@pytest.mark.parametrize(
    ("mood", "want", "says"),
    [
        ("nan", [NAN, VALUE[1], VALUE[2]], ""),
        ("short", [NAN] * 3, "to 3 pictures"),
        ("shuffled", [NAN, VALUE[1], NAN], "2 of 3 answers are for other pictures"),
        ("strange", [NAN, VALUE[1], VALUE[2]], "1 of 3 answers are for other pictures"),
        ("garbage", [NAN] * 3, "not what is spoken here"),
        ("broken", [NAN] * 3, "status 503: not now"),
        ("die", [NAN] * 3, "no answer for 3 pictures"),
        ("20", [NAN] * 3, "did not answer within 1 s"),
    ],
)
def test_a_fault_costs_the_pictures_that_it_touches(service, caplog, mood, want, says):
    reward = service.start(mood).reward(timeout=1.0 if mood == "20" else 30.0)
    told = judge_now(reward, IMAGES, PROMPTS)
    same(told.value, want)
    assert says in caplog.text
    assert bool(caplog.text) is bool(says)
    if told.found is not None and mood != "nan":
        assert [bool(row) for row in told.found] == (~told.value.isnan()).tolist(), "what was read in another picture is not shown"
    if told.region_value is not None:
        assert torch.equal(told.region_value.isnan().all(1), told.value.isnan())


def test_a_fault_that_passes_costs_nothing(service):
    reward = service.start("garbage broken short well").reward(retries=3)
    same(reward(IMAGES, PROMPTS).value, VALUE)


def test_a_service_that_is_killed_is_asked_again_later(service, caplog):
    reward = service.start().reward(break_after=2, rest=0.5)
    same(reward(IMAGES, PROMPTS).value, VALUE)
    service.kill()
    for _ in range(2):
        same(reward(IMAGES, PROMPTS).value, [NAN] * 3)
    assert "2 failures in a row, not asked for 0.5 s (1. time)" in caplog.text
    service.start()
    time.sleep(0.5)
    same(reward(IMAGES, PROMPTS).value, VALUE)
    service.kill()
    starter = threading.Timer(0.3, service.start)
    starter.start()
    same(service.reward(retries=9)(IMAGES, PROMPTS).value, VALUE)  # within the tries of one question: nothing is lost
    starter.join()


# ---- training goes on -------------------------------------------------------------------------------------------------------------------

GROUP = 4
ASKED = [Prompt(label=k % 2) for k in range(3)]


def trainer(tmp_path, reward, prompts=ASKED, policy=None, **settings) -> Trainer:
    """Three chunks a step, of one group each."""
    return Trainer(
        TrainConfig(**({"steps": 9, "optim": OptimConfig(lr=1e-2)} | settings)),
        seed=5,
        policy=policy or TabularPolicy(vocab=3),
        algorithm=GRPO(GRPOConfig(num_generations=GROUP, rollouts_per_chunk=GROUP)),
        judge=RewardJudge({"served": (1.0, reward)}),
        prompts=lambda step: (prompts, range(len(prompts))),
        world=World(),
        failures=tmp_path / "failures",
    )


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.parameters])


def failing(*chunks):
    """What the service answers, but for the chunks of these numbers."""
    asked = iter(range(1000))

    def reward(images, prompts):
        value = torch.from_numpy(score(images.numpy(), [asdict(prompt) for prompt in prompts]).value)
        return value * (NAN if next(asked) in chunks else 1.0)

    return reward


def test_training_goes_on_without_the_pictures_that_failed(service, tmp_path):
    """One chunk of garbage, then a service that dies in the middle of a step, then one that was started again: the same weights as with a
    reward here that fails for the same pictures."""
    service.start("well garbage well well well die")
    remote = trainer(tmp_path, service.reward(rest=0.0), max_failed_rewards=0.5)
    local = trainer(tmp_path, failing(1, 5), max_failed_rewards=0.5)
    fresh, failed = copy.deepcopy(remote.policy.module), []
    for step in range(3):
        if step == 2:
            service.kill()
            service.start()
        got, want = remote.update(), local.update()
        assert got["reward_failed"] == want["reward_failed"]
        assert got["reward"] == want["reward"]
        failed.append(got["reward_failed"])
    assert failed == pytest.approx([1 / 3, 1 / 3, 0.0])
    assert torch.equal(weights(remote), weights(local))
    for one in (remote, local):
        assert (weights(one) - torch.cat([p.detach().flatten() for p in fresh.parameters()])).abs().max() > 1e-2
        one.judge.close()


def test_too_many_failures_stop_the_run_before_the_update(service, tmp_path):
    one = trainer(tmp_path, service.start("well garbage").reward(), max_failed_rewards=0.5)
    before = weights(one)
    with pytest.raises(RewardError, match=r"step 1: 8 of 12 rewards failed \(allowed share: 0.5\).*nothing was updated"):
        one.update()
    assert torch.equal(weights(one), before)
    one.judge.close()


class Slow(TabularPolicy):
    def rollout(self, prompts, rng):
        time.sleep(PAUSE)
        return super().rollout(prompts, rng)


PAUSE = 0.2
CHUNKS = 8


def hidden_shares(reward, tmp_path, updates):
    """Of each update: the share of the reward's time in which the trainer did not wait for it."""
    taken = []

    def timed(images, prompts):
        start = time.perf_counter()
        told = reward(images, prompts)
        taken.append(time.perf_counter() - start)
        return told

    one = trainer(tmp_path, timed, [Prompt(label=k % 2) for k in range(CHUNKS)], Slow(vocab=3))
    for _ in range(updates):
        taken.clear()
        waited = one.update()["seconds/reward_wait"]
        yield 1 - waited / sum(taken)
    one.judge.close()


def test_a_reward_that_takes_as_long_as_the_rollout_is_hidden_behind_it(service, tmp_path):
    """All but the last chunk's can be, 7 of 8 here. What is asserted, of the best of four updates, leaves room for a busy machine; of a
    reward that the trainer waits for it would be 0."""
    assert max(hidden_shares(service.start(str(PAUSE)).reward(), tmp_path, 4)) > 0.5


# ---- the command ------------------------------------------------------------------------------------------------------------------------

SCORER = """
import importlib.util

import numpy as np

assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("varl") is None

def darkness(images, prompts):
    assert isinstance(images, np.ndarray)
    return 1 - images.mean((1, 2, 3)) + np.array([len(prompt.words) for prompt in prompts])
"""


@contextmanager
def command(*words):
    process = subprocess.Popen([sys.executable, "-m", "varl.cli", "reward-serve", *words], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def interpreter(tmp_path) -> Path:
    """Another Python, which has numpy and nothing else."""
    venv.create(tmp_path / "other", with_pip=False)
    (site,) = (tmp_path / "other" / "lib").glob("python*/site-packages")
    here = Path(np.__file__).parent
    for part in (here, here.parent / "numpy.libs"):
        if part.exists():
            (site / part.name).symlink_to(part)
    (site / "judge.py").write_text(SCORER)  # a name that our own folder has too
    return tmp_path / "other" / "bin" / "python"


def test_another_interpreter_needs_no_torch_and_none_of_ours(interpreter):
    with command("judge:darkness", "--python", str(interpreter), "--warm-up", "4x4") as url:
        reward = ServedReward(ServedRewardConfig(url=url))
        same(reward(IMAGES, PROMPTS).value, 1 - IMAGES.mean((1, 2, 3)) + torch.tensor([0.0, 2.0, 0.0]))
        said = health(url)
        assert (said["ready"], said["judged"], said["warm_up"].split()[0]) == (True, 3, "1.5")


TWO = RunConfig(
    model="none",
    data=FolderConfig(path="none"),
    rewards={name: WeightedReward(reward=PythonRewardConfig(target=f"varl.rewards.toy:{name}")) for name in ("redness", "brightness")},
)


def test_a_runs_reward_is_served_as_it_is_and_judges_the_same(tmp_path):
    (tmp_path / "two.yaml").write_text(to_yaml(TWO))
    with command(str(tmp_path / "two.yaml"), "--reward", "redness", "--batch", "2") as url:
        config = replace(TWO, rewards={"far": WeightedReward(reward=ServedRewardConfig(url=url)), "near": TWO.rewards["redness"]})
        judge = build_judge(from_yaml(to_yaml(config)), None)
        parts = judge.submit(IMAGES, PROMPTS).result().parts
        judge.close()
        assert torch.equal(parts["far"], parts["near"])
        assert parts["near"].unique().numel() == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["m:f", "--python", "no/such/python"], "there is no such interpreter"),
        (["grpo/words_cpu", "--python", sys.executable], "a run's reward needs VARL"),
        (["m:f", "--python", sys.executable, "--warm-up", "0x4"], "must be height x width"),
        (["m:f", "--warm-up", "large"], "must be height x width"),
        (["m:f", "--reward", "ocr"], "are for a run's reward, and m:f is a callable"),
        (["TWO"], "has 2 rewards. Name one with --reward: redness, brightness"),
        (["TWO", "--reward", "ocr"], "is none of the rewards"),
        (["TWO", "--set", "rewards={far: {reward: {kind: served, url: http://h:1}}}"], "is served already"),
        (["m:f", "--port", "TAKEN"], "Address already in use.*Port 0 takes one that is free"),
        (["mine.py"], "'mine.py': must be module:function or path.py:function"),
        (["no_such_module:f"], "module no_such_module cannot be imported"),
        (["TWO", "--set", "rewards={apart: {reward: {kind: python, target: 'm:f', groupwise: true}}}"], "compares the pictures of a group"),
    ],
)
def test_what_cannot_be_served_is_said(words, says, tmp_path, capfd):
    (tmp_path / "two.yaml").write_text(to_yaml(TWO))
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        known = {"TWO": str(tmp_path / "two.yaml"), "TAKEN": str(taken.getsockname()[1])}
        assert status("reward-serve", *(known.get(word, word) for word in words)) == 2
    told = capfd.readouterr()
    assert re.search(says, " ".join(told.err.split()))
    assert not told.out or words in (["no_such_module:f"], ["mine.py"]), "nothing was started"


def test_a_plan_says_that_nobody_answers():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"no reward service answers at {url}.*varl reward-serve"):
        judge_of("far", ServedRewardConfig(url=url), None)
