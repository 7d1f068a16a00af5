"""T2I-CompBench (arXiv 2307.06350) and its ++: attributes, places, numbers, relations, and all of these together.

Prompts: examples/dataset/CATEGORY_val.txt of github.com/Karine-Huang/T2I-CompBench, a prompt on each line (what follows a tab is none of
it). Pictures, by GORS_finetune/inference_eval.py and the scorers: CATEGORY/samples/PROMPT_000000.png, ten of each prompt, numbered through
the category. The scorers read the prompt from the name, up to the first `_`: a prompt that is no file name cannot be scored.

What scores which category: BLIP-VQA color, shape and texture; UniDet spatial, 3d_spatial and numeracy; CLIPScore (the plain cosine, of
ViT-B/32) non_spatial; the three in one complex. Numbers of categories have nothing to do with one another, so there is none of all.

    BLIP-VQA = product over the prompt's noun phrases of p(yes | "phrase?")

The scorer's phrases are spaCy's. Here they are known where the prompt is two of them with "and" between, as about three of four attribute
prompts are; of the others a VQA says nothing, and they count as failed."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from varl.errors import DataError
from varl.eval.benchmarks.benchmark import Answers, Benchmark, Item, Share, by_value, read_text
from varl.rewards.vqa import VQA
from varl.types import Prompt, RewardFn

ENDING = "_val.txt"
CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
ATTRIBUTES = CATEGORIES[:3]
LONGEST = 255 - len("_000000.png")
"""Bytes of a prompt in a file name."""
PHRASE = r"(?:(?:an?|the) )?[\w'-]+(?: [\w'-]+){0,2}"
"""A noun with up to two words and an article before it."""


def phrases(text: str) -> tuple[str, ...]:
    """The two noun phrases that the prompt consists of; none, if it is made otherwise."""
    found = re.fullmatch(rf"({PHRASE}) and ({PHRASE})\.?", text, re.IGNORECASE)
    return found.groups() if found else ()


def ask(name: str, judge: RewardFn, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> Answers:
    """Of a VQA the product over the prompt's phrases, of categories of attributes alone; of any other judge its value."""
    if not isinstance(judge, VQA):
        return by_value(name, judge, images, items)
    found: list[dict[str, Share]] = [{item.category: (math.nan, 1.0)} if item.category in ATTRIBUTES else {} for item in items]
    asked = [b for b, share in enumerate(found) if share and phrases(items[b].prompt.text)]
    if asked:
        sure = judge.model.yes(images[asked], [[f"{phrase}?" for phrase in phrases(items[b].prompt.text)] for b in asked])
        for b, row in zip(asked, sure, strict=True):
            found[b] = {items[b].category: (float(row.prod()), 1.0)}
    return {name: found}


def parts(path: Path) -> list[Path]:
    """The files in the order of the paper; other lists that lie with them (of what was seen in training) are none."""
    return [path] if path.is_file() else [path / f"{name}{ENDING}" for name in CATEGORIES if (path / f"{name}{ENDING}").is_file()]


def read(path: Path) -> list[Item]:
    """The categories of a folder, or the one of a file, by whose name it is known."""
    items = []
    for file in parts(path):
        category, count = file.name.removesuffix(ENDING), 0
        for number, line in enumerate(read_text(file).split("\n"), 1):
            text = line.rstrip("\r").split("\t")[0]
            if not text.strip():
                continue
            if "/" in text or "_" in text or len(text.encode()) > LONGEST:
                raise DataError(
                    f"{file}:{number}: {text[:60]!r} cannot be a file name that the scorers read the prompt from: no `/`, no `_`, at most "
                    f"{LONGEST} bytes. Change the prompt."
                )
            items.append(Item(prompt=Prompt(text=text), category=category, name=text, about=count))
            count += 1
    return items


def files(item: Item, index: int, samples: int) -> tuple[str, ...]:
    first = item.about * samples
    return tuple(f"{item.category}/samples/{item.name}_{first + k:06d}.png" for k in range(samples))


T2I_COMPBENCH = Benchmark(
    command="t2i-compbench",
    title="T2I-CompBench",
    expects="CATEGORY_val.txt, a prompt on each line, or the folder of these files",
    looks_right=lambda path: path.name.endswith(ENDING) if path.is_file() else bool(parts(path)),
    read=read,
    samples=10,
    files=files,
    ask=ask,
    overall="none",
    official="BLIPvqa_eval, UniDet_eval, CLIPScore_eval, 3_in_1_eval on {pictures}/CATEGORY (github.com/Karine-Huang/T2I-CompBench)",
)
