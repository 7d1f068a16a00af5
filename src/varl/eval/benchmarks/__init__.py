"""Published benchmarks: prompts by path, pictures in their authors' layout, numbers where a judge is at hand."""

from collections import Counter
from pathlib import Path

from varl.errors import ConfigError, DataError
from varl.eval.benchmarks.benchmark import Benchmark, Item
from varl.eval.benchmarks.cvtg import CVTG
from varl.eval.benchmarks.dpg import DPG
from varl.eval.benchmarks.drawbench import DRAWBENCH
from varl.eval.benchmarks.geneval import GENEVAL
from varl.eval.benchmarks.hpsv3 import HPSV3
from varl.eval.benchmarks.t2i_compbench import T2I_COMPBENCH

BENCHMARKS = {benchmark.command: benchmark for benchmark in (GENEVAL, DPG, T2I_COMPBENCH, HPSV3, CVTG, DRAWBENCH)}


def read_items(benchmark: Benchmark, path: Path) -> list[Item]:
    """The benchmark's prompts, no two of which would write the same file. DataError for another benchmark's files says whose they are."""
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder. {benchmark.title} is read from {benchmark.expects}.")
    if not benchmark.looks_right(path):
        other = next((other for other in BENCHMARKS.values() if other.looks_right(path)), None)
        hint = f" It looks like {other.title}: use `varl eval {other.command}`." if other else ""
        raise DataError(f"{path}: is not {benchmark.title}, which is read from {benchmark.expects}.{hint}")
    items = benchmark.read(path)
    if not items:
        raise DataError(f"{path}: holds no prompt. Get {benchmark.title} again: {benchmark.expects}.")
    names = Counter(name for index, item in enumerate(items) for name in benchmark.files(item, index, 1))
    for name, times in names.items():
        if times > 1:
            raise DataError(f"{path}: {times} prompts would share the file {name}. Get the files again, or mend their names.")
        if name.startswith("/") or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in name.split("/")):
            raise DataError(f"{path}: {name[:80]!r} is no file name. Get the files again, or mend their names.")
    return items
