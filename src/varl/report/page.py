"""The page of one run: everything it shows as one JSON object inside page.html, drawn by page.js. No request leaves the page."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from varl.report.data import Cell, Run, numbers, read_run
from varl.report.pictures import film, gallery
from varl.report.summary import facts, headline, probe, tables

POINTS = 800
"""Most points of a curve; a longer run is shown as means over equal spans of steps."""


def write_report(run: Path, out: Path | None = None, definitions: Mapping[str, str] | None = None) -> Path:
    """One self-contained HTML page about a run directory, by default `report.html` in it.

    `definitions` says what each metric means; a name may hold `*`, as in `rewards/*/mean`."""
    out = out or run / "report.html"
    out.write_text(render(payload(read_run(run), definitions or {})), encoding="utf-8")
    return out


def payload(run: Run, definitions: Mapping[str, str]) -> dict[str, Any]:
    """All that the page shows."""
    parts = {"gallery": gallery(run.path), "film": film(run.path), "tables": tables(run.summary), "probe": probe(run.probe)}
    parts |= {"metrics": curves(run, definitions), "events": run.events, "command": run.command}
    return {
        "kind": "run",
        "title": run.name,
        "headline": headline(run),
        "header": header(run),
        "facts": facts(run.summary),
        "config": run.config_text,
        **parts,
        "missing": {name: sentence for name, sentence in absent(run).items() if not parts[name]},
    }


def header(run: Run) -> dict[str, Any]:
    """The facts by which a run is known."""
    algorithm = run.config.get("algorithm") or {}
    known = {
        "algorithm": algorithm.get("kind") if isinstance(algorithm, Mapping) else algorithm,
        "model": run.config.get("model"),
        "steps": run.steps[-1] if run.steps else None,
        "training time": duration(run.seconds),
        "seed": run.config.get("seed"),
        "commit": run.summary.get("commit"),
    }
    return {name: str(value) for name, value in known.items() if value is not None}


def duration(seconds: float | int | None) -> str | None:
    """72 s is "1 min 12 s"; the two largest units are enough."""
    if seconds is None:
        return None
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    rest, parts = round(seconds), []
    for name, length in units:
        count, rest = divmod(rest, length)
        parts += [f"{count} {name}"] if count else []
    return " ".join(parts[:2]) or f"{seconds:.2g} s"


def absent(run: Run) -> dict[str, str]:
    """For each part of the page: why it may be absent, and which command makes it."""
    where = run.path
    return {
        "gallery": "No pictures from before and after training: `varl demo` makes them.",
        "film": "No pictures from during training: `varl train` writes them at fixed prompts and seeds every train.image_every steps.",
        "metrics": "No metrics yet: `varl train` writes a line to metrics.jsonl at every step.",
        "tables": f"No evaluation yet: `varl eval words {where}` makes one.",
        "probe": f"Not probed: `varl probe {where}/config.yaml --out {where}` measures signal and noise, and how much each step settles.",
        "events": "Nothing happened but training: no warning, no restart, no replaced worker.",
        "command": "The command was not recorded: `varl train` writes it to command.txt.",
    }


def curves(run: Run, definitions: Mapping[str, str]) -> dict[str, Any] | None:
    """{"steps", "columns", "every", "torn", "definitions"}: at most POINTS points a curve, each the mean of `every` steps."""
    if not run.steps:
        return None
    every = math.ceil(len(run.steps) / POINTS)
    columns = {name: [span_mean(column[i : i + every]) for i in range(0, len(column), every)] for name, column in run.columns.items()}
    return {
        "steps": [run.steps[min(i + every, len(run.steps)) - 1] for i in range(0, len(run.steps), every)],
        "columns": columns,
        "every": every,
        "torn": run.torn,
        "definitions": {name: text for name in columns if (text := define(name, definitions))},
    }


def span_mean(span: Sequence[Cell]) -> Cell:
    """The mean of the finite numbers of a span, or its last name, or nothing."""
    finite = [value for value in numbers(span) if math.isfinite(value)]
    if finite:
        return float(f"{sum(finite) / len(finite):.5g}")
    return next((value for value in reversed(span) if isinstance(value, str)), None)


def define(name: str, definitions: Mapping[str, str]) -> str | None:
    """What a metric means: by its own name, else by the longest pattern that fits."""
    fitting = [pattern for pattern in definitions if fnmatchcase(name, pattern)]
    return definitions.get(name) or (definitions[max(fitting, key=len)] if fitting else None)


def render(content: Mapping[str, Any]) -> str:
    """page.html around `content`. Text reaches the page as data and never as markup, and no script runs but page.js, by its hash."""
    page, css, js = (resources.files("varl.report").joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    data = json.dumps(finite(content), separators=(",", ":"), default=str).replace("<", "\\u003c")
    parts = {"title": escape(str(content["title"])), "script-hash": digest, "css": css, "js": js, "data": data}
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda mark: parts[mark[1]], page)


def finite(part: Any) -> Any:
    """JSON knows no NaN: null in its place."""
    match part:
        case Mapping():
            return {str(key): finite(value) for key, value in part.items()}
        case list() | tuple():
            return [finite(value) for value in part]
        case float() if not math.isfinite(part):
            return None
    return part
