"""GenEval (arXiv 2310.11513): one or two objects, how many, of which colour, where.

Prompts: prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval, an object with `tag`, `include` and `prompt` on each line.
Pictures, by its README and evaluation/evaluate_images.py: 00000/samples/0000.png, ... for each line, four of them, beside
00000/metadata.jsonl, the line itself. (The README has four digits, its own generator writes five; the scorer takes any number.)
The score is the mean over the six tags of the share of pictures that are right (evaluation/summary_scores.py)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from varl.data.folder import read_line
from varl.eval.benchmarks.benchmark import Answers, Benchmark, Item, by_value, glimpse, read_text, typed
from varl.rewards.geneval import GenEval
from varl.rewards.judge import judge_now
from varl.types import RewardFn


def looks_right(path: Path) -> bool:
    try:
        line = json.loads(glimpse(path)) if path.is_file() else None
    except ValueError:
        return False
    return isinstance(line, dict) and {"tag", "include", "prompt"} <= line.keys()


def read(path: Path) -> list[Item]:
    """An item for each line, which it keeps as it is."""
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        prompt = read_line(line, where, path.parent)
        entry = json.loads(line)
        typed(entry, "include", list, where)
        typed(entry, "prompt", str, where)
        items.append(Item(prompt=prompt, category=typed(entry, "tag", str, where), name=f"{len(items):05d}", about=line.strip()))
    return items


def files(item: Item, index: int, samples: int) -> tuple[str, ...]:
    return tuple(f"{item.name}/samples/{k:04d}.png" for k in range(samples))


def ask(name: str, judge: RewardFn, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> Answers:
    """Of a detector, whether the picture is what GenEval counts as correct, whatever the reward's own score is; of any other judge its
    value."""
    if not isinstance(judge, GenEval):
        return by_value(name, judge, images, items)
    right = judge_now(judge, images, [item.prompt for item in items]).parts["correct"].tolist()
    return {name: [{item.category: (number, 1.0)} for item, number in zip(items, right, strict=True)]}


def beside(item: Item, index: int, sheet: bytes) -> Mapping[str, bytes]:
    return {f"{item.name}/metadata.jsonl": f"{item.about}\n".encode(), f"{item.name}/grid.png": sheet}


GENEVAL = Benchmark(
    command="geneval",
    title="GenEval",
    expects="evaluation_metadata.jsonl, an object with `tag`, `include` and `prompt` on each line",
    looks_right=looks_right,
    read=read,
    samples=4,
    files=files,
    beside=beside,
    ask=ask,
    overall="categories",
    official="python evaluation/evaluate_images.py {pictures} --outfile results.jsonl --model-path DETECTOR (github.com/djghosh13/geneval)",
)
