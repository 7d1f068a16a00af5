"""What a run directory says in words and numbers. Only config.yaml must be there; what else is absent reads as empty."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from varl.errors import DataError

Cell = float | int | str | None
"""A metric at a step: a number, a name such as the stage, or nothing (not measured, or not finite)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    path: Path
    config: dict[str, Any]
    config_text: str
    command: str
    summary: dict[str, Any]
    """summary.json, and the rows of `varl eval words` as its "evaluation"."""
    steps: list[int]
    columns: dict[str, list[Cell]]
    """Metric by metric, one cell per entry of `steps`."""
    torn: int
    """Lines of metrics.jsonl that were no whole JSON object: what a kill leaves behind."""
    events: list[dict[str, Any]]
    probe: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.resolve().name)

    @property
    def seconds(self) -> float | int | None:
        """Time in training steps, over all interruptions."""
        return self.summary.get("seconds") or sum(numbers(self.columns.get("seconds/total", []))) or None


def read_run(path: Path) -> Run:
    if not path.is_dir():
        raise DataError(f"{path}: there is no such run directory. Give the folder that `varl train --out` wrote.")
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise DataError(f"{config_file}: missing, so {path} is no run directory. Give the folder that `varl train --out` wrote.")
    config_text = config_file.read_text(encoding="utf-8")
    lines, torn = read_lines(path / "metrics.jsonl")
    evaluated = read_json(path / "eval.json") or {}
    steps, columns = by_column(lines)
    return Run(
        path=path,
        config=parse_config(config_text, config_file),
        config_text=config_text,
        command=read_text(path / "command.txt").strip(),
        summary=(read_json(path / "summary.json") or {}) | ({"evaluation": evaluated["rows"]} if evaluated else {}),
        steps=steps,
        columns=columns,
        torn=torn,
        events=read_lines(path / "events.jsonl")[0],
        probe=read_json(path / "probe.json") or {},
    )


def parse_config(text: str, file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{file}: not YAML ({error}). Restore the file that `varl train` wrote first.") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: holds {type(config).__name__}, not settings by name. Restore the file that `varl train` wrote first.")
    return config


def read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def read_json(file: Path) -> Any:
    """None where there is no such file."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}). Delete it to make the page without it, or run again what wrote it.") from error


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole objects of a JSON-lines file, and how many lines were none."""
    objects, torn = [], 0
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            objects.append(entry)
        else:
            torn += 1
    return objects, torn


def by_column(lines: list[dict[str, Any]]) -> tuple[list[int], dict[str, list[Cell]]]:
    """Steps in order and a column per metric. A step that was written twice counts as it was written last."""
    last = {int(line["step"]): line for line in lines if "step" in line}
    steps = sorted(last)
    names = dict.fromkeys(name for step in steps for name in last[step] if name != "step")
    return steps, {name: [last[step].get(name) for step in steps] for name in names}


def numbers(column: Sequence[Cell]) -> list[float | int]:
    return [value for value in column if isinstance(value, int | float)]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value: {"train": {"steps": 1}} gives {"train.steps": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
