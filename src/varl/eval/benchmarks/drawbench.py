"""DrawBench (arXiv 2205.11487): 200 prompts in 11 categories, to be looked at side by side.

Prompts: its authors' table as CSV, with the columns `Prompts` and `Category`. It has no scorer, people compare; so pictures are named by
prompt and number, 00000_0.png, and any reward gives a number by category."""

from pathlib import Path

from varl.eval.benchmarks.benchmark import Benchmark, Item, csv_with, read_rows, typed
from varl.types import Prompt


def read(path: Path) -> list[Item]:
    rows = read_rows(path, "Prompts", "Category")
    told = [(typed(row, "Prompts", str, f"{path}:{line}"), typed(row, "Category", str, f"{path}:{line}")) for line, row in rows]
    return [Item(prompt=Prompt(text=text), category=category, name=f"{i:05d}") for i, (text, category) in enumerate(told)]


DRAWBENCH = Benchmark(
    command="drawbench",
    title="DrawBench",
    expects="a CSV file with the columns Prompts and Category",
    looks_right=lambda path: path.is_file() and csv_with(path, "Prompts", "Category"),
    read=read,
    samples=1,
    files=lambda item, index, samples: tuple(f"{item.name}_{k}.png" for k in range(samples)),
    official="none: people look at {pictures} side by side with another model's",
)
