"""Rewards in another process: the one who asks, and a reward of ours as the one who answers (`service.py`)."""

import json
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from varl.config import ServedRewardConfig
from varl.errors import ConfigError, RewardError, VarlError
from varl.rewards.judge import judge_now
from varl.rewards.service import Arrays, Scorer, Service, address, pack, picture_size, unpack
from varl.types import Found, Judgement, Prompt, Region, RewardFn, Wanted

log = logging.getLogger(__name__)

HEALTH = 5.0
"""Seconds in which a service must say how it is."""


class _Lost(Exception):
    """No answer that can be used."""


class Breaker:
    """Says whether to ask. After `after` failures in a row no for `rest` seconds; then one more is tried, on which it depends. `failures`
    counts those in a row, `opened` how often it came to a rest. Times are seconds of any clock."""

    def __init__(self, after: int, rest: float) -> None:
        self.after, self.rest = after, rest
        self.failures, self.opened, self._until = 0, 0, float("-inf")

    def allows(self, now: float) -> bool:
        return now >= self._until

    def tell(self, worked: bool, now: float) -> bool:
        """How it went; whether a rest begins now."""
        self.failures = 0 if worked else self.failures + 1
        opens = self.failures >= self.after
        if opens:
            self._until = now + self.rest
            self.opened += 1
        return opens


class ServedReward:
    """A RewardFn: what the scorer at `config.url` says. Pictures that it does not answer for in time or at all, or answers for with
    another's address, are NaN; a request that it refuses as a mistake is a RewardError."""

    def __init__(self, config: ServedRewardConfig) -> None:
        self.config = config
        self.breaker = Breaker(config.break_after, config.rest)

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Judgement:
        failed = Judgement(value=torch.full((len(prompts),), torch.nan))
        if not self.breaker.allows(time.monotonic()):
            return failed
        url, breaker = self.config.url, self.breaker
        try:
            judgement = self._ask(images.detach().float().cpu().contiguous().numpy(), [asdict(prompt) for prompt in prompts])
        except _Lost as lost:
            log.warning("reward service %s: no answer for %d pictures: %s", url, len(prompts), lost)
            if breaker.tell(False, time.monotonic()):
                said = "reward service %s: %d failures in a row, not asked for %g s (%d. time)"
                log.warning(said, url, breaker.failures, breaker.rest, breaker.opened)
            return failed
        breaker.tell(True, time.monotonic())
        return judgement

    def _ask(self, images: np.ndarray, prompts: list[dict[str, Any]]) -> Judgement:
        deadline = time.monotonic() + self.config.timeout
        ids = [address(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        reasons: dict[str, None] = {}
        for attempt in range(self.config.retries + 1):
            try:
                seconds = deadline - time.monotonic()
                body = pack({"images": images}, {"prompts": prompts, "seconds": seconds})
                status, answer = _exchange(self.config.url, "POST", "/judge", body, deadline)
                if status == 200:
                    return self._judgement(*unpack(answer), ids)
                if 400 <= status < 500:
                    raise RewardError(f"reward service {self.config.url} refuses the request ({status}): {_error(answer)}")
                why = f"status {status}: {_error(answer)}"
            except TimeoutError:
                raise _Lost(f"did not answer within {self.config.timeout:g} s") from None
            except (OSError, HTTPException, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
            reasons[why] = None
            pause = self.config.backoff * 2**attempt
            if attempt == self.config.retries or time.monotonic() + pause >= deadline:
                raise _Lost(f"{', then '.join(reasons)} ({attempt + 1} tries)")
            time.sleep(pause)
        raise AssertionError

    def _judgement(self, arrays: Arrays, said: Mapping[str, Any], ids: Sequence[str]) -> Judgement:
        """ValueError where it does not fit the question."""
        count, answered = len(ids), said.get("ids")
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        regions = shapes.get("region_value", shapes.get("region_box", [0, 0]))[1:2]
        wanted = {"region_value": [count, *regions], "region_box": [count, *regions, 4]}
        if "value" not in arrays or any(shape != wanted.get(name, [count]) for name, shape in shapes.items()):
            raise ValueError(f"answer of shapes {shapes} to {count} pictures")
        if not isinstance(answered, list) or len(answered) != count:
            raise ValueError(f"answer that does not name its {count} pictures")
        status = said.get("status") or []
        if not isinstance(status, list):
            raise ValueError(f"answer whose status is {status!r}")
        strange = torch.tensor([mine != theirs for mine, theirs in zip(ids, answered, strict=True)])
        if strange.any():
            log.warning("reward service %s: %d of %d answers are for other pictures", self.config.url, int(strange.sum()), count)
        if reasons := [why for why in status if why]:
            log.warning("reward service %s: %d of %d pictures failed: %s", self.config.url, len(reasons), count, reasons[0])
        tensors = {name: torch.from_numpy(array).masked_fill(_over(strange, array.ndim), torch.nan) for name, array in arrays.items()}
        return Judgement(
            value=tensors["value"],
            parts={name.removeprefix("parts/"): tensor for name, tensor in tensors.items() if name.startswith("parts/")},
            region_value=tensors.get("region_value"),
            region_box=tensors.get("region_box"),
            found=_found(said["found"], strange.tolist()) if said.get("found") else None,
        )


def _over(rows: Tensor, axes: int) -> Tensor:
    return rows.reshape(-1, *[1] * (axes - 1))


def _found(rows: Any, strange: Sequence[bool]) -> tuple[tuple[Found, ...], ...]:
    """What was read in each picture; nothing where the answer is for another."""

    def piece(text: Any, confidence: Any, box: Any) -> Found:
        x0, y0, x1, y1 = map(float, box)
        return Found(text=str(text), confidence=float(confidence), box=(x0, y0, x1, y1))

    try:
        found = tuple(tuple(piece(*said) for said in row) for row in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`found` is not what was read ({error})") from error
    if len(found) != len(strange):
        raise ValueError(f"`found` in {len(found)} of {len(strange)} pictures")
    return tuple(() if other else row for row, other in zip(found, strange, strict=True))


def _error(answer: bytearray) -> str:
    try:
        return json.loads(answer)["error"]
    except (ValueError, KeyError, TypeError):
        return "no reason given"


def _exchange(url: str, method: str, path: str, body: bytes | None, deadline: float) -> tuple[int, bytearray]:
    """(status, answer). TimeoutError at the deadline (time.monotonic), whatever was sent or has arrived by then, if the host's name was
    found; OSError or HTTPException where the other side is not there, hangs up, or speaks something else."""
    place = urlsplit(url)
    assert place.hostname
    connection = HTTPConnection(place.hostname, place.port or 80)
    try:
        connection.sock = _connected(place.hostname, place.port or 80, deadline)
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, bytearray(response.read())
    finally:
        connection.close()


class _Bounded(socket.socket):
    """Each wait of it ends at the deadline, however many there are: a timeout alone begins anew with each byte."""

    deadline: float

    def hurry(self) -> None:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self.settimeout(seconds)

    def recv_into(self, *args: Any) -> int:
        self.hurry()
        return super().recv_into(*args)

    def sendall(self, *args: Any) -> None:
        self.hurry()
        super().sendall(*args)


def _connected(host: str, port: int, deadline: float) -> _Bounded:
    """To the first of the host's addresses that takes it."""
    reason = OSError(f"{host} has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        one = _Bounded(family, kind, protocol)
        one.deadline = deadline
        try:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the body does not wait for the headers to have arrived
            one.hurry()
            one.connect(place)
            return one
        except OSError as error:
            one.close()
            reason = error
    raise reason


def health(url: str) -> dict[str, Any]:
    """What the service at `url` says of itself. ConfigError where there is none."""
    try:
        _, answer = _exchange(url, "GET", "/health", None, time.monotonic() + HEALTH)
        said = json.loads(answer)
        if not isinstance(said, dict) or not {"scorer", "ready"} <= said.keys():
            raise ValueError("another server listens there")
    except (OSError, HTTPException, ValueError) as error:
        raise ConfigError(
            f"no reward service answers at {url} ({type(error).__name__}: {error}). Start one with `varl reward-serve`, and give the "
            "address that it prints."
        ) from error
    return said


# ---- a reward of ours as the one who answers --------------------------------------------------------------------------------------------


def prompt_of(asked: Mapping[str, Any]) -> Prompt:
    """The prompt that `dataclasses.asdict` took apart, after JSON."""
    regions = tuple(Region(text=r["text"], box=None if r["box"] is None else tuple(r["box"])) for r in asked["regions"])
    objects, unwanted = (tuple(_wanted(one) for one in asked[kind]) for kind in ("objects", "unwanted"))
    return Prompt(
        text=asked["text"],
        regions=regions,
        style=tuple(asked["style"]),
        label=asked["label"],
        image=asked["image"],
        objects=objects,
        unwanted=unwanted,
    )


def _wanted(asked: Mapping[str, Any]) -> Wanted:
    position = None if asked["position"] is None else tuple(asked["position"])
    return Wanted(**{**asked, "attributes": tuple(asked["attributes"]), "position": position})


def serve(load: Callable[[], RewardFn], name: str, *, host: str, port: int, batch: int, warm_up: str) -> None:
    """Answers for a reward until Ctrl-C, on CUDA where there is one. Raises VarlError where it cannot be loaded or the port is taken."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def scorer() -> Scorer:
        fn = load()

        @torch.no_grad()
        def judge(images: np.ndarray, prompts: list[dict[str, Any]]) -> Judgement:
            return judge_now(fn, torch.from_numpy(images).to(device), [prompt_of(prompt) for prompt in prompts])

        return judge

    try:
        size = picture_size(warm_up)
        service = Service(name, host, port, batch=batch, mistakes=(VarlError,))
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error}). Port 0 takes one that is free.") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    service.run(scorer, size)
