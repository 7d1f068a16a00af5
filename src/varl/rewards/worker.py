"""A reader process: pictures in on stdin, what was read out on stdout. JSON headers and raw bytes, no pickle; no torch.

A message is 4 bytes of length, little-endian, and so much JSON; `pixels` of a request follow it as raw bytes."""

import json
import os
import signal
import sys
import threading
import time
from typing import Any, BinaryIO

import numpy as np

from varl.errors import RewardError
from varl.rewards.ocr import open_engine


def encode(message: dict[str, Any]) -> bytes:
    """The message's bytes, length first."""
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "little") + body


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers until stdin ends. First request: {engine, letters}, answered by {} or {"error"}; then {shape, boxes} and pixels, answered by
    {"readings"} or, where the engine raised, {"failed"}."""

    def receive() -> dict[str, Any] | None:
        head = requests.read(4)
        return json.loads(requests.read(int.from_bytes(head, "little"))) if len(head) == 4 else None

    def send(message: dict[str, Any]) -> None:
        replies.write(encode(message))
        replies.flush()

    start = receive()
    if start is None:
        return
    try:
        engine = open_engine(start["engine"], start["letters"])
    except RewardError as error:
        send({"error": str(error)})
        return
    send({})
    while (request := receive()) is not None:
        shape = request["shape"]
        images = np.frombuffer(requests.read(int(np.prod(shape))), np.uint8).reshape(shape)
        try:
            boxes = [at if at is None else [tuple(box) for box in at] for at in request["boxes"]]
            send({"readings": engine.read_batch(images, boxes)})
        except Exception as error:  # whatever an engine of the user's own may raise: it is told, and the process lives
            send({"failed": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Entry point of the process. Leaves Ctrl-C to the parent, and ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever an engine prints goes to stderr
    serve(sys.stdin.buffer, replies)
