"""CVTG-2K (arXiv 2503.23461): pictures with two to five texts in them.

Prompts: the folder of the data set dnkdnk/CVTG-2K: CVTG/2.json ... 5.json by number of texts, and CVTG-Style (or CVTG-style) alike, each
with a `data_list` of `index` and `prompt`; the texts stand in single quotes in the prompt. Pictures, by its authors' scorer
(unified_metrics_eval.py): CVTG/2/INDEX.png, one of each.

What the scorer computes, and so we do, case ignored:

    word accuracy  words that are among the words read / words asked for, over all words. A word read once answers for several
    NED            1 - ED(word, nearest) / (max length + 1e-5), mean over all words; the nearest by difflib's ratio
    CLIPScore      2.5 max(cosine, 0) with the prompt after "A photo depicts ", of ViT-L/14, mean over pictures

It takes for texts whatever lies between two apostrophes, those of a genitive too. It reads with PaddleOCR: another reader's numbers compare
models, and do not belong into its table."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from varl.eval.benchmarks.benchmark import Answers, Benchmark, Item, Share, by_value, parsed, read_json, typed
from varl.rewards.clip import TextMatch
from varl.rewards.judge import judge_now
from varl.rewards.ocr_reward import OCRReward
from varl.rewards.text_scores import edit_distance
from varl.types import Prompt, Region, RewardFn

SETS = {"CVTG": ("CVTG",), "CVTG-Style": ("CVTG-Style", "CVTG-style")}
"""The scorer's names of the two halves, with those that their folders go by."""
COUNTS = (2, 3, 4, 5)
EPSILON = 1e-5


def quoted(prompt: str) -> list[str]:
    """The texts that the picture shall show."""
    return [text for text in re.findall(r"'(.*?)'", prompt) if text.strip()]


def word_shares(words: Sequence[str], read: Sequence[str]) -> tuple[int, float]:
    """How many of the words are among those read, and the sum of their similarities to the nearest of them."""
    asked, seen = [word.lower() for word in words], [word.lower() for word in read] or [""]
    nearest = [difflib.get_close_matches(word, seen, n=1, cutoff=0)[0] for word in asked]
    likeness = [1 - edit_distance(word, near) / (max(len(word), len(near)) + EPSILON) for word, near in zip(asked, nearest, strict=True)]
    return sum(word in seen for word in asked), sum(likeness)


def ask(name: str, judge: RewardFn, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> Answers:
    """Of a reader `name/word_accuracy` and `name/ned`, of a CLIP `name`, as the scorer computes them; of any other judge its value."""
    if isinstance(judge, TextMatch):
        prompts = [replace(item.prompt, text=f"A photo depicts {item.prompt.text}") for item in items]
        cosines = judge_now(judge, images, prompts).parts["cosine"].tolist()
        return {name: [{item.category: (2.5 * max(cosine, 0.0), 1.0)} for item, cosine in zip(items, cosines, strict=True)]}
    if not isinstance(judge, OCRReward):
        return by_value(name, judge, images, items)
    asked = [b for b, item in enumerate(items) if item.prompt.words]
    accuracy: list[dict[str, Share]] = [{} for _ in items]
    ned: list[dict[str, Share]] = [{} for _ in items]
    if asked:
        judgement = judge_now(judge, images[asked], [items[b].prompt for b in asked])
        for b, value, found in zip(asked, judgement.value.tolist(), judgement.found or (), strict=True):
            words, category = items[b].prompt.words, items[b].category
            right, likeness = word_shares(words, [word for piece in found for word in piece.text.split()])
            failed = value != value
            accuracy[b] = {category: (float("nan") if failed else float(right), float(len(words)))}
            ned[b] = {category: (float("nan") if failed else likeness, float(len(words)))}
    return {f"{name}/word_accuracy": accuracy, f"{name}/ned": ned}


def parts(path: Path) -> list[tuple[str, int, Path]]:
    """The scorer's name of the half, the number of texts, and the file, of all that is there."""
    found = []
    for half, names in SETS.items():
        folder = next((path / name for name in names if (path / name).is_dir()), path / half)
        found += [(half, count, folder / f"{count}.json") for count in COUNTS if (folder / f"{count}.json").is_file()]
    return found


def looks_right(path: Path) -> bool:
    first = parsed(parts(path)[0][2]) if path.is_dir() and parts(path) else None
    return isinstance(first, dict) and isinstance(first.get("data_list"), list)


def read(path: Path) -> list[Item]:
    """Both halves, by number of texts."""
    items = []
    for half, count, file in parts(path):
        for number, entry in enumerate(typed(read_json(file), "data_list", list, str(file))):
            where = f"{file}, entry {number}"
            text, index = typed(entry, "prompt", str, where), entry.get("index")
            if not isinstance(index, int):
                index = typed(entry, "index", str, where)
            regions = tuple(Region(text=part) for part in quoted(text))
            prompt = Prompt(text=text, regions=regions)
            items.append(Item(prompt=prompt, category=f"{count} texts", name=f"{half}/{count}/{index}"))
    return items


CVTG = Benchmark(
    command="cvtg",
    title="CVTG-2K",
    expects="the folder CVTG-2K, with CVTG/2.json ... 5.json and CVTG-Style alike, each with a `data_list` of `index` and `prompt`",
    looks_right=looks_right,
    read=read,
    samples=1,
    counts=(1,),
    files=lambda item, index, samples: (f"{item.name}.png",),
    ask=ask,
    official="python unified_metrics_eval.py --benchmark_dir CVTG-2K --result_dir {pictures} --output_file scores.json (TextCrafter's)",
)
