"""Two engines that read short lines of text out of small pictures. This file must stay importable without torch: reader processes use it.

Measured on drawn words of 3 to 5 letters (16x64 pixels, three faces, eight palettes, one core): both read all of 400 right; Tesseract takes
5 ms a picture, RapidOCR's recogniser 12 to 20. Tesseract's dictionaries are off: it reads letters and does not guess words."""

import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from varl.errors import RewardError

Box = tuple[float, float, float, float]
Pixels = tuple[int, int, int, int]

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LINE_HEIGHT = 48
"""Pixels to which a line is scaled before it is read, by both engines."""
FAINT = 24
"""Grey levels between the ground and anything else under which a picture is blank, and is not read."""


class Reading(NamedTuple):
    """A piece of text that was seen: upper case, confidence 0 to 1, box in shares of the picture."""

    text: str
    confidence: float
    box: Box


@runtime_checkable
class Reader(Protocol):
    """An engine. With boxes it reads one line at each and answers in their order (text "" where it sees none); with None it looks for text
    in the whole picture and answers with as many readings as it finds."""

    def read_batch(self, images: UInt8[np.ndarray, "B H W 3"], boxes: Sequence[Sequence[Box] | None]) -> list[list[Reading]]: ...


# ---- from a picture to lines ------------------------------------------------------------------------------------------------------------


def dark_on_light(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"] | None:
    """Luminance stretched so that the ground (the border's median) is 255 and what differs most from it 0; None if nothing differs."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    ground = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    if grey.max() - ground > ground - grey.min():
        grey, ground = 255 - grey, 255 - ground
    contrast = ground - grey.min()
    if contrast < FAINT:
        return None
    return np.rint(np.clip((grey - grey.min()) / contrast, 0, 1) * 255).astype(np.uint8)


def areas(boxes: Sequence[Box], height: int, width: int) -> list[Pixels]:
    """Where to look for the line at each box: (x0, y0, x1, y1) in pixels.

    A box is widened by its own height to the sides and by 0.35 of it up and down, at most half-way to its neighbours. A lone box that
    fills a third of the picture's height is looked for in the whole picture."""
    if len(boxes) == 1 and boxes[0][3] - boxes[0][1] >= 1 / 3:
        return [(0, 0, width, height)]
    pixels = [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in boxes]
    found = []
    for i, (x0, y0, x1, y1) in enumerate(pixels):
        tall = y1 - y0
        left, top, right, bottom = max(x0 - tall, 0), max(y0 - 0.35 * tall, 0), min(x1 + tall, width), min(y1 + 0.35 * tall, height)
        for other in pixels[:i] + pixels[i + 1 :]:
            if other[1] < y1 and y0 < other[3]:
                left = max(left, (other[2] + x0) / 2) if other[2] <= x0 else left
                right = min(right, (other[0] + x1) / 2) if other[0] >= x1 else right
            if other[0] < x1 and x0 < other[2]:
                top = max(top, (other[3] + y0) / 2) if other[3] <= y0 else top
                bottom = min(bottom, (other[1] + y1) / 2) if other[1] >= y1 else bottom
        x, y = min(int(left), width - 1), min(int(top), height - 1)
        found.append((x, y, max(round(right), x + 1), max(round(bottom), y + 1)))
    return found


def bands(grey: UInt8[np.ndarray, "H W"]) -> list[tuple[int, int]]:
    """First and last + 1 row of each run of rows with ink."""
    ink = np.concatenate([[False], (grey < 128).any(1), [False]])
    edges = np.flatnonzero(ink[1:] != ink[:-1])
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def ink_box(grey: UInt8[np.ndarray, "H W"]) -> Pixels:
    """The tight box of what is darker than mid-grey."""
    rows, columns = np.flatnonzero((grey < 128).any(1)), np.flatnonzero((grey < 128).any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _scale(grey: UInt8[np.ndarray, "h w"], scale: float) -> UInt8[np.ndarray, "h2 w2"]:
    height, width = grey.shape
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC))


def _share(box: Sequence[int | float], origin: Pixels, height: int, width: int) -> Box:
    """A box in pixels of a crop at `origin`, as shares of the picture."""
    x0, y0, x1, y1 = (float(value) for value in box)
    x0, x1 = (min(max((value + origin[0]) / width, 0.0), 1.0) for value in (x0, x1))
    y0, y1 = (min(max((value + origin[1]) / height, 0.0), 1.0) for value in (y0, y1))
    return x0, y0, x1, y1


def _nothing(area: Pixels, height: int, width: int) -> Reading:
    return Reading("", 0.0, (area[0] / width, area[1] / height, area[2] / width, area[3] / height))


# ---- Tesseract --------------------------------------------------------------------------------------------------------------------------


def find_tessdata() -> str | None:
    """The folder with `eng.traineddata`: TESSDATA_PREFIX, then where distributions put it; None if it is nowhere."""
    prefix = os.environ.get("TESSDATA_PREFIX")
    folders = [Path(prefix), Path(prefix) / "tessdata"] if prefix else []
    folders += sorted(Path("/usr/share/tesseract-ocr").glob("*/tessdata"), reverse=True)
    folders += [Path(root) / "share" / "tessdata" for root in (sys.prefix, "/usr", "/usr/local", "/opt/homebrew", "/opt/local")]
    return next((str(folder) for folder in folders if (folder / "eng.traineddata").is_file()), None)


class Tesseract:
    """libtesseract inside this process: LSTM, one thread, letters from a whitelist, dictionaries off."""

    PAD = 12
    """Pixels of ground around a scaled line."""

    def __init__(self, letters: str = ALPHABET) -> None:
        tessdata = find_tessdata()
        if tessdata is None:
            raise RewardError(
                "engine 'tesseract': no eng.traineddata in TESSDATA_PREFIX or the usual folders. Install it (Debian, Ubuntu: "
                "`apt-get install tesseract-ocr-eng`), point TESSDATA_PREFIX at its folder, or use engine 'rapidocr'."
            )
        os.environ.setdefault("OMP_THREAD_LIMIT", "1")
        try:
            tesserocr: Any = import_module("tesserocr")
        except ImportError as error:
            raise RewardError(
                f"engine 'tesseract': tesserocr cannot be imported ({error}). Run `pip install 'varl[words]'`, or use engine 'rapidocr'."
            ) from error
        off = dict.fromkeys(("load_system_dawg", "load_freq_dawg"), "0")
        self._one_line = tesserocr.PSM.SINGLE_LINE, tesserocr.RIL.TEXTLINE
        self._words = tesserocr.PSM.SINGLE_BLOCK, tesserocr.RIL.WORD
        self._api = tesserocr.PyTessBaseAPI(path=tessdata, psm=tesserocr.PSM.SINGLE_LINE, oem=tesserocr.OEM.LSTM_ONLY, variables=off)
        self._api.SetVariable("tessedit_char_whitelist", letters + " ")

    def read(self, image: UInt8[np.ndarray, "H W 3"], boxes: Sequence[Box] | None = None) -> list[Reading]:
        height, width, _ = image.shape
        if boxes is None:
            scale = min(max(128 / height, 0.5), 3.0)
            return self._recognise(image, (0, 0, width, height), scale, *self._words)
        found = []
        for area in areas(boxes, height, width):
            lines = self._recognise(image, area, LINE_HEIGHT / (area[3] - area[1]), *self._one_line)
            found.append(max(lines, key=lambda line: line.confidence) if lines else _nothing(area, height, width))
        return found

    def read_batch(self, images: UInt8[np.ndarray, "B H W 3"], boxes: Sequence[Sequence[Box] | None]) -> list[list[Reading]]:
        return [self.read(image, at) for image, at in zip(images, boxes, strict=True)]

    def _recognise(self, image: UInt8[np.ndarray, "H W 3"], area: Pixels, scale: float, mode: Any, level: Any) -> list[Reading]:
        x0, y0, x1, y1 = area
        grey = dark_on_light(image[y0:y1, x0:x1])
        if grey is None:
            return []
        padded = np.pad(_scale(grey, scale), self.PAD, constant_values=255)
        self._api.SetPageSegMode(mode)
        self._api.SetImageBytes(padded.tobytes(), padded.shape[1], padded.shape[0], 1, padded.shape[1])
        self._api.SetSourceResolution(70)
        self._api.Recognize()
        seen, found = self._api.GetIterator(), []
        while seen is not None:
            if not seen.Empty(level):
                box = [(value - self.PAD) / scale for value in seen.BoundingBox(level)]
                text = " ".join(seen.GetUTF8Text(level).split()).upper()
                if text:
                    found.append(Reading(text, seen.Confidence(level) / 100, _share(box, area, *image.shape[:2])))
            if not seen.Next(level):
                break
        return found


# ---- RapidOCR ---------------------------------------------------------------------------------------------------------------------------


class RapidOCR:
    """The PP-OCR recogniser that lies in the `rapidocr` package, through onnxruntime alone. It reads lines and finds none: without boxes,
    every run of rows with ink is one line."""

    BATCH = 32

    def __init__(self, letters: str = ALPHABET) -> None:
        package = find_spec("rapidocr")
        folders = package.submodule_search_locations if package else None
        models = sorted(Path(folders[0]).glob("models/*rec*.onnx")) if folders else []
        if not models or find_spec("onnxruntime") is None:
            raise RewardError(
                "engine 'rapidocr': needs the recognition model inside the package rapidocr (3 or later), and onnxruntime. Run "
                "`pip install 'varl[words]'`, or use engine 'tesseract'."
            )
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(models[-1]), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        signs = ["", *self._session.get_modelmeta().custom_metadata_map["character"].split("\n"), " "]
        self._letters = ["", *dict.fromkeys(letters + " ")]
        """Blank first: class 0 of CTC."""
        self._classes = [0, *(signs.index(letter) for letter in self._letters[1:])]

    def read(self, image: UInt8[np.ndarray, "H W 3"], boxes: Sequence[Box] | None = None) -> list[Reading]:
        return self.read_batch(image[None], [boxes])[0]

    def read_batch(self, images: UInt8[np.ndarray, "B H W 3"], boxes: Sequence[Sequence[Box] | None]) -> list[list[Reading]]:
        height, width = images.shape[1:3]
        found: list[list[Reading]] = []
        same_width: dict[int, list[tuple[int, int, Pixels, np.ndarray, np.ndarray]]] = defaultdict(list)
        for i, (image, at) in enumerate(zip(images, boxes, strict=True)):
            places = self._lines(image) if at is None else areas(at, height, width)
            found.append([_nothing(area, height, width) for area in places])
            for k, area in enumerate(places):
                x0, y0, x1, y1 = area
                grey = dark_on_light(image[y0:y1, x0:x1])
                if grey is not None:
                    line = _scale(grey, LINE_HEIGHT / (y1 - y0))
                    line = np.pad(line, ((0, 0), (0, -line.shape[1] % 32)), constant_values=255)
                    same_width[line.shape[1]].append((i, k, area, grey, line))
        for jobs in same_width.values():
            for start in range(0, len(jobs), self.BATCH):
                some = jobs[start : start + self.BATCH]
                read = self._recognise(np.stack([line for *_, line in some]))
                for (i, k, area, grey, _), (text, confidence) in zip(some, read, strict=True):
                    if text:
                        found[i][k] = Reading(text, confidence, _share(ink_box(grey), area, height, width))
        return [
            [reading for reading in readings if reading.text] if at is None else readings for readings, at in zip(found, boxes, strict=True)
        ]

    def _lines(self, image: UInt8[np.ndarray, "H W 3"]) -> list[Pixels]:
        grey = dark_on_light(image)
        if grey is None:
            return []
        height, width, _ = image.shape
        return [(0, max(top - 2, 0), width, min(bottom + 2, height)) for top, bottom in bands(grey)]

    def _recognise(self, lines: UInt8[np.ndarray, "N h w"]) -> list[tuple[str, float]]:
        pixels = np.repeat(lines[:, None].astype(np.float32) / 127.5 - 1, 3, axis=1)
        output = self._session.run(None, {self._input: pixels})[0]
        law = np.asarray(output)[:, :, self._classes]
        return [ctc(row, self._letters) for row in law / law.sum(-1, keepdims=True)]


def ctc(law: Float[np.ndarray, "t V"], letters: Sequence[str]) -> tuple[str, float]:
    """Greedy CTC: the likeliest class at each place, repeats merged, blanks (class 0) dropped; and the mean probability of what is kept."""
    best = law.argmax(-1)
    kept = [t for t, c in enumerate(best) if c and (t == 0 or best[t - 1] != c)]
    if not kept:
        return "", 0.0
    return " ".join("".join(letters[int(best[t])] for t in kept).upper().split()), float(law[kept, best[kept]].mean())


# ---- which one --------------------------------------------------------------------------------------------------------------------------


def choose_engine(engine: str) -> tuple[str, str]:
    """The engine's name, and a sentence that says why it is this one. `auto` is tesseract where it can run, else rapidocr."""
    if engine != "auto":
        return engine, f"engine {engine}: as configured."
    tessdata = find_tessdata()
    if tessdata is None:
        return (
            "rapidocr",
            "engine rapidocr: no tesseract language data found (about three times slower; `apt-get install tesseract-ocr-eng`).",
        )
    if find_spec("tesserocr") is None:
        return "rapidocr", "engine rapidocr: tesserocr is not installed (about three times slower; `pip install tesserocr`)."
    return "tesseract", f"engine tesseract: language data in {tessdata}."


def open_engine(engine: str, letters: str = ALPHABET) -> Reader:
    """`tesseract`, `rapidocr`, or the class at `module:Class`, which is called with `letters`."""
    match engine:
        case "tesseract":
            return Tesseract(letters)
        case "rapidocr":
            return RapidOCR(letters)
    module, colon, name = engine.partition(":")
    if not colon:
        raise RewardError(f"engine {engine!r}: unknown. Use tesseract, rapidocr, or module:Class.")
    try:
        return getattr(import_module(module), name)(letters)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"engine {engine!r}: {error}. Give module:Class of a class that takes the letters and has read_batch.") from error
