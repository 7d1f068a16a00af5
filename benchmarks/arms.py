"""What ablations do alike, those on letters most of it: every arm is trained by the command line, over several seeds, and then drawn from
and judged. Runs that are there already are not repeated, so a study may be stopped at any time."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import machine, table
from scipy.stats import t as student

from varl.config import PretrainConfig, RunConfig
from varl.settings import to_yaml

Config = RunConfig | PretrainConfig
Arms = Mapping[str, Callable[[int, int], Config]]
"""From seed and number of steps to what is trained."""
Judged = Callable[[Path, Path], object]
"""Judges a model folder, and leaves `cache`.json."""


def folder(out: Path, name: str, seed: int) -> Path:
    return out / "".join(c if c.isalnum() else "-" for c in name) / str(seed)


def run(out: Path, name: str, seed: int, config: Config, judge: Judged) -> None:
    here = folder(out, name, seed)
    if (here / "judged.json").exists():
        return
    here.mkdir(parents=True, exist_ok=True)
    recipe = here.with_name(f"{seed}.yaml")
    recipe.write_text(to_yaml(config))
    with here.with_name(f"{seed}.txt").open("w") as said:
        what = "train" if isinstance(config, RunConfig) else "pretrain"
        command = [Path(sys.executable).with_name("varl"), what, recipe, "--out", here]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=said, stderr=said, check=True)
    judge(here / "model", here / "judged")
    print(name, seed, flush=True)


def found(arms: Arms, out: Path, seeds: int) -> Iterator[tuple[str, list[Path]]]:
    """The arms of which runs were judged, and those."""
    for name in arms:
        here = [place for seed in range(seeds) if ((place := folder(out, name, seed)) / "judged.json").exists()]
        if here:
            yield name, here


def results(place: Path) -> dict[str, Any]:
    return json.loads((place / "judged.json").read_text())


def half_width(values: list[float]) -> float:
    """Of the 95 % t-interval of the mean of two values or more."""
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def interval(values: list[float], form: str = ".3f") -> str:
    """Mean and the half-width of its interval."""
    if len(values) < 2:
        return f"{values[0]:{form}} (one seed)"
    return f"{statistics.mean(values):{form}} ± {half_width(values):{form}}"


def study(
    doc: str,
    arms: Arms,
    *,
    out: str,
    steps: int,
    base: Path,
    judge: Judged,
    head: list[str],
    rows: Callable[[dict[str, Any], Iterator[tuple[str, list[Path]]]], list[list[str]]],
) -> None:
    """The command line, and the table: `rows` makes it of what was judged of `base` and of the arms."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(arms))
    parser.add_argument("--report", action="store_true", help="only read what is there")
    given = parser.parse_args()
    if not given.report:
        judge(base, given.out / "base")
        todo = [(name, seed) for seed in range(given.seeds) for name in given.only]
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(lambda job: run(given.out, job[0], job[1], arms[job[0]](job[1], given.steps), judge), todo))
    print(f"{machine(torch.device('cpu'))}.\n")
    before = json.loads((given.out / "base.json").read_text())
    print(table(head, rows(before, found(arms, given.out, given.seeds))))
