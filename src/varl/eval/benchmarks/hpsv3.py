"""HPSv3's benchmark (arXiv 2508.03789): 12 categories of prompts, to be scored by HPSv3.

Prompts: the folder `benchmark` of the data set MizzenAI/HPDv3, a file benchmark_CATEGORY.json for each category: a list of objects with
`caption`, `category` and `image_file`. Pictures, as others have laid them out for its scorer (the export of github.com/Lakonik/LakonLab):
CATEGORY/NAME.png, NAME being that of `image_file`, beside NAME.txt, the caption; one of each. The authors' own script was not at hand."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from varl.errors import DataError
from varl.eval.benchmarks.benchmark import Benchmark, Item, parsed, read_json, typed
from varl.types import Prompt


def parts(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("benchmark_*.json"))


def looks_right(path: Path) -> bool:
    entries = parsed(parts(path)[0]) if parts(path) else None
    return isinstance(entries, list) and bool(entries) and isinstance(entries[0], dict) and {"caption", "image_file"} <= entries[0].keys()


def read(path: Path) -> list[Item]:
    """All categories of a folder, or the one of a file."""
    items = []
    for file in parts(path):
        entries = read_json(file)
        if not isinstance(entries, list):
            raise DataError(f"{file}: is no list of prompts. Get the file again.")
        for number, entry in enumerate(entries):
            where = f"{file}, entry {number}"
            text, category = typed(entry, "caption", str, where), typed(entry, "category", str, where)
            name = PurePosixPath(typed(entry, "image_file", str, where)).stem
            items.append(Item(prompt=Prompt(text=text), category=category, name=name))
    return items


def beside(item: Item, index: int, sheet: bytes) -> Mapping[str, bytes]:
    return {f"{item.category}/{item.name}.txt": item.prompt.text.encode()}


HPSV3 = Benchmark(
    command="hpsv3",
    title="HPSv3's benchmark",
    expects="the folder of benchmark_CATEGORY.json of MizzenAI/HPDv3, or one of these files: a list of `caption`, `category`, `image_file`",
    looks_right=looks_right,
    read=read,
    samples=1,
    counts=(1,),
    files=lambda item, index, samples: (f"{item.category}/{item.name}.png",),
    beside=beside,
    official="evaluate/benchmark.py on {pictures} (github.com/MizzenAI/HPSv3)",
)
