"""DPG-Bench (arXiv 2403.05135): long prompts, each with a tree of questions about its picture.

Prompts: the folder dpg_bench of github.com/TencentQQGYLab/ELLA: prompts/NAME.txt, and dpg_bench.csv with the questions: `item_id` is the
name, `proposition_id` the question's number, `dependency` those of its parents (0: none), `tuple` its category before a bracket.
Pictures, by its README and compute_dpg_bench.py: NAME.png, four in a sheet, two in a row, which the scorer cuts into squares.

The scorer leaves out the table's first row and, where a parent is then missing, the whole item; its categories are of the last of the four
pictures alone, by what was answered before parents count. Here every row and picture counts; categories likewise before parents."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from varl.errors import DataError
from varl.eval.benchmarks.benchmark import Answers, Benchmark, Item, Share, csv_with, read_rows, read_text
from varl.rewards.judge import judge_now
from varl.rewards.vqa import VQA
from varl.types import Prompt, RewardFn

TABLE, PROMPTS = "dpg_bench.csv", "prompts"
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
YES = 0.5
"""What a judge gives at least where it answers yes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    number: int
    parents: tuple[int, ...]
    """Numbers of questions without which it means nothing."""
    category: str
    """Entity, attribute, relation, global or other."""
    text: str


def tree_score(questions: Sequence[Question], yes: Mapping[int, bool]) -> float:
    """The share of questions that count: answered yes, as are their parents, and their parents' parents.

    Questions are gone through in their order, so that of a parent that comes later only its own answer is known, as in the authors' scorer.
    A parent without a question asks for nothing."""
    counts = dict(yes)
    for question in questions:
        counts[question.number] &= all(counts.get(parent, True) for parent in question.parents)
    return sum(counts.values()) / len(counts)


def likely(judge: RewardFn, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> list[list[float]]:
    """How sure the judge is of a yes to each question about each picture: a VQA asked so, any other given the question as the prompt, no
    more pictures at once than these."""
    if isinstance(judge, VQA):
        return [row.tolist() for row in judge.model.yes(images, [[question.text for question in item.about] for item in items])]
    pairs = [(b, Prompt(text=question.text)) for b, item in enumerate(items) for question in item.about]
    told: list[list[float]] = [[] for _ in items]
    for start in range(0, len(pairs), len(items)):
        some = pairs[start : start + len(items)]
        values = judge_now(judge, images[[b for b, _ in some]], [prompt for _, prompt in some]).value.tolist()
        for (b, _), value in zip(some, values, strict=True):
            told[b].append(value)
    return told


def ask(name: str, judge: RewardFn, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> Answers:
    """`name`, the score of each picture, and `name/yes`, the share of questions answered yes, by category. Yes is YES or more; one failed
    answer fails the picture."""
    scores: list[dict[str, Share]] = []
    shares: list[dict[str, Share]] = []
    for item, sure in zip(items, likely(judge, images, items), strict=True):
        yes = {question.number: value >= YES for question, value in zip(item.about, sure, strict=True)}
        failed = any(math.isnan(value) for value in sure)
        scores.append({"": (math.nan if failed else tree_score(item.about, yes), 1.0)})
        by_category: dict[str, Share] = {}
        for question in item.about:
            said, of = by_category.get(question.category, (0.0, 0.0))
            by_category[question.category] = (math.nan if failed else said + yes[question.number], of + 1)
        shares.append(by_category)
    return {name: scores, f"{name}/yes": shares}


def looks_right(path: Path) -> bool:
    return path.is_dir() and (path / PROMPTS).is_dir() and csv_with(path / TABLE, *COLUMNS)


def read(path: Path) -> list[Item]:
    """An item for each text, by name, with its questions."""
    questions: dict[str, list[Question]] = {}
    table = path / TABLE
    for at, (line, row) in enumerate(read_rows(table, *COLUMNS)):
        if at == 0 and not row["proposition_id"].strip().isdecimal():  # a second line of names
            continue
        try:
            number, parents = int(row["proposition_id"]), [int(parent) for parent in row["dependency"].split(",")]
        except ValueError as error:
            raise DataError(
                f"{table}:{line}: proposition_id and dependency must be whole numbers ({error}). Get the file again."
            ) from error
        category = row["tuple"].split("(")[0].split("-")[0].strip()
        question = Question(number=number, parents=tuple(p for p in parents if p), category=category, text=row["question_natural_language"])
        questions.setdefault(row["item_id"], []).append(question)
    items = []
    for file in sorted((path / PROMPTS).glob("*.txt")):
        if file.stem not in questions:
            raise DataError(f"{table}: has no question about {file.stem}, of which {file} is the prompt. Get both again.")
        text = read_text(file).strip()
        items.append(Item(prompt=Prompt(text=text), category="", name=file.stem, about=tuple(questions[file.stem])))
    return items


DPG = Benchmark(
    command="dpg",
    title="DPG-Bench",
    expects=f"the folder dpg_bench, with {TABLE} and {PROMPTS}/*.txt",
    looks_right=looks_right,
    read=read,
    samples=4,
    counts=(1, 4),
    files=lambda item, index, samples: (f"{item.name}.png",),
    square=True,
    ask=ask,
    official="PIC_NUM={samples} bash dpg_bench/dist_eval.sh {pictures} RESOLUTION (github.com/TencentQQGYLab/ELLA)",
)
