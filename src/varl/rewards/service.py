"""A scorer in a process of its own, asked over HTTP. This file stands alone: any Python from 3.10 on that has numpy runs it, without VARL.

    GET  /health   JSON: scorer, ready, judged, failed (pictures), warm_up (what came of it); status 503 until it is ready
    POST /judge    a safetensors file with `images` [B, 3, H, W] in [0, 1]; metadata: prompts (as `varl.types.Prompt` has them), and
                   seconds, after which the asker does not wait any more
           200     a safetensors file with `value` [B] and, of scorers that say more, `parts/NAME` [B], `region_value` [B, R],
                   `region_box` [B, R, 4]; metadata: ids (`address` of what each row is the answer to), status (empty, or why the row is
                   NaN), found (what was read)
           4xx     JSON: error, a mistake that would be made again; 5xx: another try may help

Arrays are fp32; metadata is JSON under the key `varl`. Nothing is pickled."""

import argparse
import hashlib
import importlib.util
import json
import math
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

LIMIT = 4 << 30
"""Bytes of the largest request."""
IDLE = 60.0
"""Seconds without a byte after which a connection is given up."""
LAST_WORDS = 1.0
"""Seconds in which those that waited are told that there is no scorer."""
START = (
    "import importlib.util as u, sys; s = u.spec_from_file_location('varl_service', sys.argv[1]); m = u.module_from_spec(s); "
    "sys.modules[s.name] = m; s.loader.exec_module(m); m.main(sys.argv[2:])"
)
"""Runs a file that is no script, so that its folder hides no module of the scorer's."""
DOG = {"name": "dog", "count": 1, "colour": None, "attributes": [], "position": None}
GREY = {
    "text": "WORD",
    "regions": [{"text": "WORD", "box": None}],
    "style": [],
    "label": 0,
    "image": None,
    "objects": [DOG],
    "unwanted": [],
}
"""What the grey picture of the warm-up is asked for."""

AXES = {"region_value": 2, "region_box": 3}
"""Of an answer's arrays; the others have one, the pictures."""

Arrays = dict[str, np.ndarray]
Scorer = Callable[[np.ndarray, list[dict[str, Any]]], Any]
"""Pictures [B, 3, H, W] and prompts in; out what `columns` understands."""


# ---- what goes over the wire ------------------------------------------------------------------------------------------------------------


def pack(arrays: Mapping[str, np.ndarray], said: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"varl": json.dumps(said)}}
    end = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + 4 * array.size]}
        end += 4 * array.size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays.values())])


def unpack(data: bytearray) -> tuple[Arrays, dict[str, Any]]:
    """What was packed; the arrays lie in `data`. ValueError where it is anything else."""
    first = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:first])
        said = json.loads(header.pop("__metadata__")["varl"])
        arrays = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if entry["dtype"] != "F32" or not 0 <= start <= end:
                raise ValueError(f"{name}: not fp32")
            arrays[name] = np.frombuffer(data, "<f4", (end - start) // 4, first + start).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{len(data)} bytes that are not what is spoken here ({type(error).__name__}: {error})") from error
    if not isinstance(said, dict):
        raise ValueError("its metadata is no mapping")
    return arrays, said


def address(image: np.ndarray, prompt: Mapping[str, Any]) -> str:
    """A name of this picture [3, H, W] for this prompt: 16 letters of a hash of every pixel and every word."""
    digest = hashlib.blake2b(json.dumps([prompt, image.shape], sort_keys=True).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image, "<f4").data)
    return digest.hexdigest()


def columns(told: Any) -> Arrays:
    """The arrays of an answer: of an object with `value` and perhaps `parts`, `region_value` and `region_box`, or the values themselves:
    a tensor, an array, or a list of numbers and None (failed)."""
    arrays = {"value": _floats(getattr(told, "value", told))}
    arrays |= {f"parts/{name}": _floats(part) for name, part in getattr(told, "parts", {}).items()}
    regions = {name: getattr(told, name, None) for name in ("region_value", "region_box")}
    return arrays | {name: _floats(part) for name, part in regions.items() if part is not None}


def _floats(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    return np.asarray([math.nan if x is None else x for x in value] if isinstance(value, list) else value, "<f4")


def _stacked(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of all pieces, NaN where a piece has fewer columns."""
    shape = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
    out, end = np.full((sum(map(len, pieces)), *shape), np.nan, "<f4"), 0
    for piece in pieces:
        start, end = end, end + len(piece)
        out[(slice(start, end), *map(slice, piece.shape[1:]))] = piece
    return out


# ---- the server -------------------------------------------------------------------------------------------------------------------------


class Unready(Exception):
    """No scorer to answer with."""


class Service(ThreadingHTTPServer):
    """Answers requests one after another, each in calls of at most `batch` pictures (0: all at once). What the scorer raises makes the
    pictures of that call failed ones; `mistakes` are told to the asker as such."""

    daemon_threads = True

    def __init__(self, name: str, host: str, port: int, *, batch: int = 0, mistakes: tuple[type[Exception], ...] = ()) -> None:
        super().__init__((host, port), _Handler)
        self.name, self.batch, self.mistakes = name, batch, mistakes
        self.scorer: Scorer | None = None
        self.judged, self.failed, self.warm_up = 0, 0, "not yet"
        self.askers: set[threading.Thread] = set()
        """Of requests that have arrived and are not answered yet."""
        self._turn = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def run(self, load: Callable[[], Scorer], size: tuple[int, int]) -> None:
        """Says where it listens, loads the scorer, has it judge a grey picture of `size` (H, W), and answers until Ctrl-C. Requests that
        come while it loads wait for it; they are told where it cannot be loaded, which is raised."""
        sys.stdout.write(f"{self.name} at {self.url}\n")
        sys.stdout.flush()
        listener = threading.Thread(target=self.serve_forever, daemon=True)
        try:
            with self._turn:
                listener.start()
                try:
                    scorer = load()
                    self.warm_up = self._warm(scorer, size)
                except BaseException as error:  # Ctrl-C too
                    self.warm_up = f"its scorer was not loaded ({type(error).__name__}: {error})"
                    raise
                self.scorer = scorer
            listener.join()
        except KeyboardInterrupt:
            pass
        finally:
            self.shutdown()
            for asker in () if self.scorer else tuple(self.askers):
                asker.join(LAST_WORDS)
            self.server_close()

    def _warm(self, scorer: Scorer, size: tuple[int, int]) -> str:
        start = time.perf_counter()
        try:
            value = float(columns(scorer(np.full((1, 3, *size), 0.5, "<f4"), [GREY]))["value"][0])
        except Exception as error:  # a scorer may have no use for a grey picture; the first real one is then slower
            return f"{type(error).__name__}: {error}"
        return f"{value:.4g} in {time.perf_counter() - start:.2g} s"

    def health(self) -> dict[str, Any]:
        ready = self.scorer is not None
        return {"scorer": self.name, "ready": ready, "judged": self.judged, "failed": self.failed, "warm_up": self.warm_up}

    def answer(self, data: bytearray, arrived: float) -> bytes:
        """To a request that `arrived` (time.monotonic). ValueError: no request; TimeoutError: the asker does not wait any more; Unready:
        there will be no scorer."""
        arrays, said = unpack(data)
        images, prompts, seconds = arrays.get("images"), said.get("prompts"), said.get("seconds", 0)
        if images is None or images.ndim != 4 or images.shape[1] != 3 or not isinstance(prompts, list) or len(prompts) != len(images):
            raise ValueError("must hold `images` [B, 3, H, W] and B prompts")
        if not isinstance(seconds, int | float) or not math.isfinite(seconds):
            raise ValueError(f"seconds={seconds!r}: must be a number")
        ids = [address(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        left = min(max(arrived + seconds - time.monotonic(), 0), threading.TIMEOUT_MAX)
        if not self._turn.acquire(timeout=left):
            raise TimeoutError("its turn did not come in time")
        try:
            if self.scorer is None:
                raise Unready(f"{self.name}: {self.warm_up}")
            size = self.batch or len(images)
            pieces = [self._judge(self.scorer, images[i : i + size], prompts[i : i + size]) for i in range(0, len(images), size)]
            status = [why for _, reasons, _ in pieces for why in reasons]
            self.judged += len(images)
            self.failed += sum(map(bool, status))
        finally:
            self._turn.release()
        names = dict.fromkeys(name for piece, _, _ in pieces for name in piece)
        table = {}
        for name in names:
            empty = [np.full((len(piece["value"]), *[0] * (AXES.get(name, 1) - 1)), np.nan, "<f4") for piece, _, _ in pieces]
            table[name] = _stacked([piece.get(name, none) for (piece, _, _), none in zip(pieces, empty, strict=True)])
        found = (
            [row for piece, _, rows in pieces for row in rows or [[]] * len(piece["value"])] if any(rows for _, _, rows in pieces) else None
        )
        return pack(table, {"ids": ids, "status": status, "found": found})

    def _judge(self, scorer: Scorer, images: np.ndarray, prompts: list[dict[str, Any]]) -> tuple[Arrays, list[str], list[Any]]:
        """(arrays, status, found, which may be empty) of pictures that are judged together."""
        count = len(prompts)
        try:
            told = scorer(images, prompts)
            arrays = columns(told)
            for name, array in arrays.items():
                if array.shape[:1] != (count,) or array.ndim != AXES.get(name, 1):
                    raise ValueError(f"{name} is {list(array.shape)}, and there are {count} pictures")
        except self.mistakes:
            raise
        except Exception as error:  # a scorer of the user's own may raise anything; its pictures are failed ones
            traceback.print_exc()
            return {"value": np.full(count, np.nan, "<f4")}, [f"{type(error).__name__}: {error}"] * count, []
        found = [[[piece.text, piece.confidence, piece.box] for piece in row] for row in getattr(told, "found", None) or ()]
        return arrays, ["" if ok else "not finite" for ok in np.isfinite(arrays["value"])], found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE
    server: Service

    def do_GET(self) -> None:
        if self.path != "/health":
            return self._send(404, {"error": f"{self.path}: there is /health and /judge"})
        health = self.server.health()
        return self._send(200 if health["ready"] else 503, health)

    def do_POST(self) -> None:
        arrived, length = time.monotonic(), self.headers.get("Content-Length", "")
        self.close_connection = True
        if self.path != "/judge":
            return self._send(404, {"error": f"{self.path}: there is /health and /judge"})
        if not length.isdigit() or int(length) > LIMIT:
            return self._send(413, {"error": f"a request of {length or 'unsaid'} bytes: at most {LIMIT}. Send fewer pictures at once."})
        data = bytearray(int(length))
        if self.rfile.readinto(data) < len(data):  # type: ignore[attr-defined]
            return None  # the asker is gone
        asker = threading.current_thread()
        self.server.askers.add(asker)
        try:
            return self._send(200, self.server.answer(data, arrived))
        except self.server.mistakes as error:
            return self._send(422, {"error": str(error)})
        except ValueError as error:
            return self._send(400, {"error": str(error)})
        except (TimeoutError, Unready) as error:
            return self._send(503, {"error": str(error)})
        finally:
            self.server.askers.discard(asker)

    def _send(self, status: int, body: bytes | dict[str, Any]) -> None:
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # the asker is gone

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each request is no news."""


# ---- any callable -----------------------------------------------------------------------------------------------------------------------


def find_callable(target: str) -> Callable[..., Any]:
    """The callable at `module:function`, or at `path.py:function`. ValueError says why there is none."""
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"target {target!r}: must be module:function or path.py:function.")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise ValueError(f"target {target!r}: there is no file {path}. Give a path from the folder in which the command runs.")
        spec = importlib.util.spec_from_file_location(f"varl_user_{path.stem}", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a user's file may raise anything
            raise ValueError(f"target {target!r}: {path} cannot be imported ({type(error).__name__}: {error}). Mend the file.") from error
    else:
        try:
            module = import_module(place)
        except ImportError as error:
            raise ValueError(
                f"target {target!r}: module {place} cannot be imported ({error}). Install it, or give path.py:function."
            ) from error
    fn = getattr(module, name, None)
    if not callable(fn):
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"target {target!r}: {place} has no callable {name!r}. It has: {', '.join(known) or 'none'}.")
    return fn


def plain(fn: Callable[..., Any]) -> Scorer:
    """A callable that knows nothing of VARL, as a scorer: it gets pictures as a tensor where anything here has imported torch and else as
    an array, and prompts with the fields of `varl.types.Prompt`."""

    def scorer(images: np.ndarray, prompts: list[dict[str, Any]]) -> Any:
        asked = []
        for prompt in prompts:
            regions = [SimpleNamespace(**region) for region in prompt["regions"]]
            words = [word for region in regions for word in region.text.split()]
            objects = {kind: [SimpleNamespace(**one) for one in prompt[kind]] for kind in ("objects", "unwanted")}
            asked.append(SimpleNamespace(**{**prompt, "regions": regions, "words": words, **objects}))
        torch = sys.modules.get("torch")
        if torch is None:
            return fn(images, asked)
        with torch.no_grad():
            return fn(torch.from_numpy(images), asked)

    return scorer


def picture_size(text: str) -> tuple[int, int]:
    """(H, W) of "256x512"; ValueError for what is none."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise ValueError(f"--warm-up {text!r}: must be height x width in pixels, for example 256x256.")
    height, width = text.split("x")
    return int(height), int(width)


def command(python: str, target: str, host: str, port: int, batch: int, warm_up: str) -> list[str]:
    """Serves `target` in another interpreter, which needs numpy, and what the scorer needs."""
    options = ["--host", host, "--port", str(port), "--batch", str(batch), "--warm-up", warm_up]
    return [python, "-c", START, str(Path(__file__).resolve()), target, *options]


def main(arguments: Sequence[str]) -> None:
    """Serves a callable that knows nothing of VARL; exit status 2 for what cannot be done as asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--warm-up", default="256x256")
    asked = parser.parse_args(arguments)
    try:
        Service(asked.target, asked.host, asked.port, batch=asked.batch).run(
            lambda: plain(find_callable(asked.target)), picture_size(asked.warm_up)
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
