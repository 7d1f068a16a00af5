"""summary.json laid out for reading.

A measure is a number, `{"value": 0.4, "interval": [0.3, 0.5]}`, or a number `x` beside `x_interval`. A row is an object of measures
("before", "after", "control"); an object or a list of rows is a table ("temperature_sweep"); what is none of these is a fact. Keys may be
nested or joined by `/`: "before/word_accuracy"."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from varl.report.data import Run, numbers

HEADLINES = ("word_accuracy", "exact", "ned", "fd", "reward")
"""The first of these that was measured before and after is the page's one-line result."""
DISTANCES = ("fd", "fid", "kid", "mse", "perceptual", "lpips", "nll")
"""Measures that are better the lower they are."""
SMOOTH = 10
"""Steps at either end of the run whose mean stands for the reward there, if nothing better was measured."""


def nested(summary: Mapping[str, Any]) -> dict[str, Any]:
    """{"before/ned": 1} gives {"before": {"ned": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in summary.items():
        *rooms, leaf = key.split("/")
        place = tree
        for room in rooms:
            place = place.setdefault(room, {})
        place[leaf] = {**place.get(leaf, {}), **nested(value)} if isinstance(value, Mapping) else value
    return tree


def is_measure(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def is_row(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and not is_measure(value) and not any(is_table_part(part) for part in value.values())


def is_table_part(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(part, Mapping) for part in value)
    return isinstance(value, Mapping) and not is_measure(value)


def measure(value: Any, interval: Any = None) -> dict[str, Any] | str:
    """{"value", "interval"} of a number; anything else as text."""
    if is_measure(value):
        return {"value": value["value"], "interval": value.get("interval")}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"value": value, "interval": interval}
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no", None: "–"}[value] if isinstance(value, bool | None) else str(value)


def measures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Each measure of a row, joined with its interval."""
    intervals = {key for key in row if key.endswith("_interval") and key.removesuffix("_interval") in row}
    return {key: measure(value, row.get(f"{key}_interval")) for key, value in row.items() if key not in intervals}


def rows(value: Any, label: str = "") -> list[dict[str, Any]]:
    """Every row below `value`, each named by the way to it."""
    if is_row(value):
        return [{"label": label, "cells": measures(value)}]
    parts = {str(key): part for key, part in (value.items() if isinstance(value, Mapping) else enumerate(value, 1))}
    loose = {key: part for key, part in parts.items() if not is_table_part(part)}
    own = [{"label": label, "cells": measures(loose)}] if loose else []
    below = {f"{label} / {key}" if label else key: part for key, part in parts.items() if key not in loose}
    return own + [row for way, part in below.items() for row in rows(part, way)]


def turned(value: Any) -> Any:
    """{"before": {"0.5": row}, "after": {"0.5": row}} gives {"0.5": row}, with what was before and after side by side in it."""
    parts = list(value.values()) if isinstance(value, Mapping) else []
    alike = all(isinstance(part, Mapping) and all(map(is_row, part.values())) and part.keys() == parts[0].keys() for part in parts)
    if not parts or not alike:
        return value
    sides = {key: {side: measures(value[side][key]) for side in value} for key in parts[0]}
    names = {key: dict.fromkeys(name for cells in each.values() for name in cells) for key, each in sides.items()}
    return {key: {f"{name}, {side}": each[side].get(name) for name in names[key] for side in each} for key, each in sides.items()}


def tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{"title", "rows": [{"label", "cells"}]}]: the single rows together first, then each table."""
    tree = nested(summary)
    single = {key: value for key, value in tree.items() if is_row(value)}
    found = [{"title": "overall", "rows": rows(single)}] if single else []
    return found + [
        {"title": key, "rows": rows(turned(value))} for key, value in tree.items() if is_table_part(value) and key not in single
    ]


def facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    return measures({key: value for key, value in nested(summary).items() if not is_table_part(value)})


def headline(run: Run) -> dict[str, Any] | None:
    """What the run changed: {"metric", "lower_is_better", "before", "after", "source"}. From the summary, else the evaluations, else the
    reward."""
    tree = nested(run.summary)
    before, after = tree.get("before"), tree.get("after")
    if is_row(before) and is_row(after):
        ends = measures(before), measures(after)
        shared = [key for key in (*HEADLINES, *ends[0]) if all(isinstance(end.get(key), dict) for end in ends)]
        if shared:
            return change(shared[0], ends[0][shared[0]], ends[1][shared[0]], "held-out evaluation")
    for name in (*(f"eval/{key}" for key in HEADLINES), "reward"):
        curve = numbers(run.columns.get(name, []))
        if len(curve) >= 2:
            width = min(SMOOTH, len(curve) // 2) if name == "reward" else 1
            first, last = sum(curve[:width]) / width, sum(curve[-width:]) / width
            source = f"mean reward of the first and the last {width} steps" if name == "reward" else "first and last evaluation in training"
            return change(name.removeprefix("eval/"), measure(first), measure(last), source)
    return None


def change(metric: str, before: Any, after: Any, source: str) -> dict[str, Any]:
    return {"metric": metric, "lower_is_better": metric in DISTANCES, "before": before, "after": after, "source": source}


def probe(content: Mapping[str, Any]) -> dict[str, Any]:
    """probe.json as {"charts": [{"name", "points"}], "recommendations", "facts"}; empty if there is none.

    "steps" holds a row of measures for each step of drawing, "variance_share" a measure for each m; numbers beside them are facts."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(content.get("steps", [])):
        for name, value in measures(row).items():
            if name != "step" and isinstance(value, dict):
                by_name.setdefault(name, []).append({"name": str(row.get("step", number)), **value})
    for point in content.get("variance_share", []):
        by_name.setdefault("variance_share", []).append(
            {"name": str(point["m"]), "value": point["value"], "interval": point.get("interval")}
        )
    if not content:
        return {}
    return {
        "charts": [{"name": name, "points": points} for name, points in by_name.items()],
        "recommendations": content.get("recommendations", []),
        "facts": facts({name: value for name, value in content.items() if name not in ("steps", "variance_share", "recommendations")}),
    }
