"""Runs side by side: what came out, what was set differently, and whether the comparison is a fair one."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from varl.errors import DataError
from varl.report.data import Run, flatten, numbers, read_run
from varl.report.page import curves, duration, render
from varl.report.summary import is_row, measures, nested

LAST = 10
"""Steps at the end of a run over which a training metric is averaged; of an evaluation and of a count the last one stands."""
COUNTS = ("reward_calls", "memory_gb")
"""Metrics of the run so far, not of the step."""
SLACK = 0.05
"""Wall clocks that differ by less than this share are the same time."""
SAYS_LAST = f"eval/* and counts as last written, after/* from the summary, all others as the mean of the last {LAST} steps."


def compare(runs: Sequence[Path], out: Path | None = None) -> Path:
    """One self-contained HTML page about several run directories, by default `compare.html` beside the first."""
    found = read_runs(runs)
    out = out or found[0].path.resolve().parent / "compare.html"
    out.write_text(render(payload(found)), encoding="utf-8")
    return out


def compare_text(runs: Sequence[Path]) -> str:
    """The same as plain text: final metrics, settings that differ, and what makes the comparison unequal."""
    found = read_runs(runs)
    names = unique_names(found)
    blocks = [
        aligned([["final metrics", *names], *([name, *(plain(value) for value in values)] for name, *values in final_metrics(found))]),
        aligned([["settings that differ", *names], *settings_diff(found)]) if settings_diff(found) else "The configurations agree.",
        "\n".join(f"Unequal: {line}" for line in unequal(found)) or "Same seed, same number of judged pictures, same time.",
    ]
    return "\n\n".join(blocks) + "\n"


def read_runs(runs: Sequence[Path]) -> list[Run]:
    if len(runs) < 2:
        raise DataError(f"{[str(run) for run in runs]}: a comparison needs at least two run directories. Name another.")
    return [read_run(run) for run in runs]


def unique_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names, or their folders' where two have the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def finals(run: Run) -> dict[str, float | int]:
    """Metric -> where it ended."""
    ended = {}
    for name, column in run.columns.items():
        known = numbers(column)[-1:] if name.startswith("eval/") or name in COUNTS else numbers(column[-LAST:])
        if known:
            ended[name] = sum(known) / len(known)
    after = nested(run.summary).get("after")
    cells = measures(after) if is_row(after) else {}
    return ended | {f"after/{name}": cell["value"] for name, cell in cells.items() if isinstance(cell, dict)}


def final_metrics(runs: Sequence[Run]) -> list[list[Any]]:
    """Rows of [metric, value of each run]; None where a run has not measured it. Evaluations come first."""
    ended = [finals(run) for run in runs]
    names = sorted(dict.fromkeys(name for each in ended for name in each), key=lambda name: not name.startswith(("after/", "eval/")))
    return [[name, *(each.get(name) for each in ended)] for name in names]


def settings_diff(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of [dotted setting, value in each run], where not all agree."""
    flat = [flatten(run.config) for run in runs]
    names = sorted({name for each in flat for name in each})
    rows = [[name, *(str(each.get(name, "–")) for each in flat)] for name in names if name != "name"]
    return [row for row in rows if len(set(row[1:])) > 1]


def unequal(runs: Sequence[Run]) -> list[str]:
    """A sentence for each thing that the runs must share before a difference between them is the settings' doing, and do not share."""
    names = unique_names(runs)
    known: dict[str, list[Any]] = {
        "seeds": [run.config.get("seed") for run in runs],
        "judged pictures": [reward_calls(run) for run in runs],
        "steps": [run.steps[-1] if run.steps else None for run in runs],
    }
    sentences = [f"{what} differ ({listed(names, values)})." for what, values in known.items() if len(set(values)) > 1]
    seconds = [run.seconds for run in runs]
    timed = [value for value in seconds if value]
    if 0 < len(timed) < len(runs) or (timed and max(timed) > (1 + SLACK) * min(timed)):
        sentences.append(f"wall clocks differ ({listed(names, [duration(value) for value in seconds])}).")
    return sentences


def reward_calls(run: Run) -> int | None:
    """Pictures judged, as counted in the summary or at the last step."""
    counted = [run.summary.get("reward_calls"), *reversed(numbers(run.columns.get("reward_calls", [])))]
    return next((int(count) for count in counted if count is not None), None)


def listed(names: Sequence[str], values: Sequence[Any]) -> str:
    return ", ".join(f"{name}: {'unknown' if value is None else value}" for name, value in zip(names, values, strict=True))


def plain(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right, with a rule under the head."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = []
    for first, *others in rows:
        lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def payload(runs: Sequence[Run]) -> dict[str, Any]:
    """All that the page shows."""
    names = unique_names(runs)
    return {
        "kind": "compare",
        "title": " vs ".join(names),
        "runs": names,
        "unequal": [f"{line[0].upper()}{line[1:]}" for line in unequal(runs)],
        "last": SAYS_LAST,
        "metrics": final_metrics(runs),
        "settings": settings_diff(runs),
        "curves": overlaid([curves(run, {}) for run in runs]),
    }


def overlaid(drawn: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """[{"name", "series": [{"run", "x", "y"}]}]: a chart per metric, a line per run that measured it."""
    names = dict.fromkeys(name for run in drawn if run for name in run["columns"])
    charts = []
    for name in names:
        measured = [(number, run) for number, run in enumerate(drawn) if run and numbers(run["columns"].get(name, []))]
        if measured:
            charts.append(
                {"name": name, "series": [{"run": number, "x": run["steps"], "y": run["columns"][name]} for number, run in measured]}
            )
    return charts
