"""Reader processes: a batch of pictures is spread over them, and one that hangs or dies costs its own pictures only."""

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import UInt8

from varl.errors import RewardError
from varl.rewards.ocr import ALPHABET, open_engine
from varl.rewards.worker import encode
from varl.types import Box, Found

log = logging.getLogger(__name__)

CHUNK = 16
"""Pictures handed to a worker at a time."""
START = 60.0
"""Seconds in which a worker must have opened its engine."""

Readings = tuple[Found, ...]


class _Lost(Exception):
    """The worker is dead or too late."""


class _Worker:
    """One reader process, started now and ready at the latest when it is first asked."""

    def __init__(self, engine: str, letters: str) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_THREAD_LIMIT": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self.engine = engine
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from varl.rewards.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.deadline = time.monotonic() + START
        self.ready = False
        self.send(encode({"engine": engine, "letters": letters}))

    def ask(self, images: UInt8[np.ndarray, "B H W 3"], boxes: Sequence[Sequence[Box] | None], timeout: float) -> dict[str, Any]:
        if not self.ready:
            answer = self.receive()
            if "error" in answer:
                raise RewardError(answer["error"])
            self.ready = True
        self.deadline = time.monotonic() + timeout
        self.send(encode({"shape": images.shape, "boxes": boxes}) + images.tobytes())
        return self.receive()

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            _, able, _ = select.select([], [self.requests], [], max(self.deadline - time.monotonic(), 0))
            if not able:
                raise _Lost("did not answer in time")
            try:
                rest = rest[os.write(self.requests, rest) :]
            except BrokenPipeError as error:
                raise _Lost("died") from error

    def receive(self) -> dict[str, Any]:
        return json.loads(self._bytes(int.from_bytes(self._bytes(4), "little")))

    def _bytes(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            able, _, _ = select.select([self.replies], [], [], max(self.deadline - time.monotonic(), 0))
            if not able:
                raise _Lost("did not answer in time")
            more = os.read(self.replies, count - len(data))
            if not more:
                raise _Lost("died")
            data += more
        return data

    def stop(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class ReaderPool:
    """`workers` processes with an engine each, or the engine in this process where workers is 0. Use as a context manager, or `close()`.

    A worker that takes longer than `timeout` seconds over a chunk of pictures, or dies, is replaced; those pictures are read as None."""

    def __init__(self, engine: str, letters: str = ALPHABET, *, workers: int, timeout: float) -> None:
        self.engine, self.letters, self.timeout = engine, letters, timeout
        self._lock = threading.Lock()
        self._works = False
        """Whether any worker has ever answered; one that then is slow to start is no reason to stop."""
        self._local = open_engine(engine, letters) if workers == 0 else None
        self._workers = [_Worker(engine, letters) for _ in range(workers)]
        self._threads = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="reader")

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(worker.process.pid for worker in self._workers)

    def read(self, images: UInt8[np.ndarray, "B H W 3"], boxes: Sequence[Sequence[Box] | None]) -> list[Readings | None]:
        """What was read in each picture, in order; None where its reader failed. `boxes` as in `Reader`."""
        with self._lock:
            results: list[Readings | None] = [None] * len(images)
            size = max(1, min(CHUNK, -(-len(images) // max(len(self._workers), 1))))
            chunks = deque(range(0, len(images), size))
            if self._local is not None:
                self._drain(self._here, chunks, size, images, boxes, results)
            else:
                tasks = [
                    self._threads.submit(self._drain, partial(self._there, k), chunks, size, images, boxes, results)
                    for k in range(len(self._workers))
                ]
                for task in wait(tasks).done:  # one that fails must not leave the others at work for the next call
                    task.result()
            return results

    def _drain(self, read: Any, chunks: deque[int], size: int, images: Any, boxes: Any, results: list[Readings | None]) -> None:
        while True:
            try:
                start = chunks.popleft()
            except IndexError:
                return
            some = slice(start, start + size)
            answer = read(images[some], list(boxes[some]))
            if "failed" in answer:
                log.warning("engine %s: %d pictures could not be read: %s", self.engine, len(images[some]), answer["failed"])
                continue
            for i, readings in enumerate(answer["readings"], start):
                results[i] = tuple(Found(text=text, confidence=confidence, box=tuple(box)) for text, confidence, box in readings)

    def _here(self, images: UInt8[np.ndarray, "B H W 3"], boxes: list[Sequence[Box] | None]) -> dict[str, Any]:
        assert self._local is not None
        try:
            return {"readings": self._local.read_batch(images, boxes)}
        except Exception as error:  # an engine of the user's own may raise anything; its pictures are failed ones
            return {"failed": f"{type(error).__name__}: {error}"}

    def _there(self, k: int, images: UInt8[np.ndarray, "B H W 3"], boxes: list[Sequence[Box] | None]) -> dict[str, Any]:
        try:
            answer = self._workers[k].ask(images, boxes, self.timeout)
            self._works = True
            return answer
        except _Lost as lost:
            if not self._works and not self._workers[k].ready:
                raise RewardError(
                    f"engine {self.engine!r}: its reader process {lost} before it was ready. See stderr, or try workers=0."
                ) from lost
            self._workers[k].stop()
            self._workers[k] = _Worker(self.engine, self.letters)
            return {"failed": f"the reader process {lost} (limit {self.timeout:g} s) and was replaced"}

    def close(self) -> None:
        """Ends the processes. Waits for a read that is under way."""
        with self._lock:
            self._threads.shutdown()
            for worker in self._workers:
                worker.stop()
            self._workers = []

    def __enter__(self) -> "ReaderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
