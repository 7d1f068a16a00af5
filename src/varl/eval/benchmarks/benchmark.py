"""What a benchmark is: prompts in its authors' files, pictures where its authors' scorer looks for them, a rule that makes numbers of
what judges say of them."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from varl.errors import DataError
from varl.rewards.judge import judge_now
from varl.types import Prompt, RewardFn

Share = tuple[float, float]
"""Numerator and denominator: what a picture gives to a measure, and what it could have given. NaN is a judgement that failed."""
Answers = Mapping[str, Sequence[Mapping[str, Share]]]
"""Of each measure, for each picture, by category."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A prompt of a benchmark."""

    prompt: Prompt
    category: str
    """The group of prompts that gets a number of its own."""
    name: str
    """What its pictures' files are named by."""
    about: Any = None
    """What the authors tell beside: GenEval's line, DPG-Bench's questions."""


def by_value(name: str, judge: RewardFn, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> Answers:
    """The judge's value of each picture under its prompt, and its parts as `name/part`, in their own units."""
    judgement = judge_now(judge, images, [item.prompt for item in items])
    values = {name: judgement.value, **{f"{name}/{part}": value for part, value in judgement.parts.items() if part != name}}
    return {
        measure: [{item.category: (number, 1.0)} for item, number in zip(items, value.tolist(), strict=True)]
        for measure, value in values.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """How its prompts are read, its pictures placed, its judges asked."""

    command: str
    """After `varl eval`."""
    title: str
    expects: str
    """What its prompts are read from."""
    looks_right: Callable[[Path], bool]
    """Whether a path can be that, by its first lines."""
    read: Callable[[Path], list[Item]]
    """DataError names file, line and fix."""
    samples: int
    """Pictures of each prompt, as its authors draw."""
    counts: tuple[int, ...] = ()
    """The numbers of pictures that the authors' scorer takes; any, if empty."""
    files: Callable[[Item, int, int], tuple[str, ...]]
    """Of an item, its index and the number of its pictures: a file for each of them, or one sheet that holds all, two in a row."""
    beside: Callable[[Item, int, bytes], Mapping[str, bytes]] = lambda item, index, sheet: {}
    """Further files of an item that the scorer reads, given the sheet."""
    square: bool = False
    """Whether the scorer cuts sheets into squares."""
    ask: Callable[[str, RewardFn, Float[Tensor, "B 3 H W"], Sequence[Item]], Answers] = by_value
    """What the judge `name` says of pictures, as measures."""
    join: Callable[[Mapping[str, RewardFn], Answers], Answers] = lambda judges, answers: {}
    """Measures of the same pictures that are made of several judges' answers."""
    overall: Literal["pictures", "categories", "none"] = "pictures"
    """What counts alike in the number of all categories together."""
    official: str
    """How its authors' scorer is run on the folder {pictures}."""


# ---- files ------------------------------------------------------------------------------------------------------------------------------


def read_text(file: Path) -> str:
    """DataError unless it is a file of UTF-8; a byte order mark is no part of it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Give the benchmark's files as its authors publish them.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 ({error}). Save it as UTF-8.") from error


def read_json(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: is not JSON ({error}). Get the file again.") from error


def read_rows(file: Path, *columns: str) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with their lines; DataError unless every row has these columns."""
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""))
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise DataError(f"{file}: has no column {', '.join(missing)}. Its first line names {', '.join(reader.fieldnames or ())}.")
    rows = []
    for row in reader:
        if empty := [name for name in columns if row[name] is None]:
            raise DataError(f"{file}:{reader.line_num}: the row ends before {', '.join(empty)}. Put texts that hold commas in quotes.")
        rows.append((reader.line_num, row))
    return rows


def typed(entry: Any, key: str, kind: type, where: str) -> Any:
    """`entry[key]`; DataError unless it is there and of that kind."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        names = {str: "a text", list: "a list", int: "a whole number"}
        raise DataError(f"{where}: {key!r} must be {names[kind]}, and is {value!r}. Get the file again, or mend it.")
    return value


def glimpse(file: Path) -> str:
    """The first line that is not empty, "" where there is none to be read."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            return next((line.strip() for line in lines if line.strip()), "")
    except (OSError, UnicodeDecodeError):
        return ""


def csv_with(file: Path, *columns: str) -> bool:
    """Whether the file's first line names these columns."""
    return set(columns) <= set(next(csv.reader([glimpse(file)]), []))


def parsed(file: Path) -> Any:
    """The file's JSON, None where it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
