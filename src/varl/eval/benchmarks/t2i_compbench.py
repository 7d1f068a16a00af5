"""T2I-CompBench (arXiv 2307.06350) and its ++: attributes, places, numbers, relations, and all of these together.

Prompts: examples/dataset/CATEGORY_val.txt of github.com/Karine-Huang/T2I-CompBench, a prompt on each line (what follows a tab is none of
it). Pictures, by GORS_finetune/inference_eval.py and the scorers: CATEGORY/samples/PROMPT_000000.png, ten of each prompt, numbered through
the category. The scorers read the prompt from the name, up to the first `_`: a prompt that is no file name cannot be scored.

What scores which category: BLIP-VQA color, shape and texture; UniDet spatial, 3d_spatial and numeracy; CLIPScore (the plain cosine, of
ViT-B/32) non_spatial; the three in one complex. Numbers of categories have nothing to do with one another, so there is none of all.

    BLIP-VQA = product over the prompt's noun phrases of p(yes | "phrase?")

    spatial  = s if s >= 1/2 else 0,  s = (score(a) + score(b)) / 4 + place(a, b) / 2;  0 unless both classes are there
    place    = min(1, 0.1 / IoU) where the centres lie that way and are further apart that way than the other, else 0
    next to  = 1 where |x| < 150 or |y| < 150, else 150 / max(|x|, |y|)

    numeracy = sum over the prompt's n nouns of (0.5 / n) [it is there] + (0.5 / n) [as many as asked for are there]

    complex  = (BLIP-VQA + spatial) / 2, (BLIP-VQA + cosine) / 2 or (BLIP-VQA + spatial + cosine) / 3

a and b are the surest boxes of their classes, x and y their centres' distances in pixels of a picture that was brought to 479, 480 at most
on its longer side. To be counted, boxes of a class must not have more than 0.9 of the area of one of them in common. Complex prompts either
say where something lies, or that something happens, or both, by lists of them; the cosine is with the words that are no adjectives.

Where ours differs. UniDet is sure by 0.5 or more and has names of its own (a girl is a person, a ship a boat); ours is the judge's own
detector with its thresholds, asked for the prompt's nouns. The scorers find nouns and phrases by spaCy, and what happens in the lists; here
`phrases`, `relation`, `numbers` and `kind` read prompts of the forms that the benchmark has, and what they cannot read counts as failed. Of
the published prompts they read three of four of attributes, all of spatial and numeracy, 200 of the 300 of complex; `kind` says of 299 of
these what the lists say. "On top of" is above; the released scorer finds the words and then has no rule for them, so that its spatial score
of such prompts (33 of the 87 of complex with a place) is always 0. A relation's objects are the last words of their phrases, and without
adjectives is with these words alone. 3d_spatial needs a model of depth, and has no number of ours."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from varl.config import GenEvalConfig
from varl.errors import DataError
from varl.eval.benchmarks.benchmark import Answers, Benchmark, Item, Share, by_value, read_text
from varl.models.detection import Detection
from varl.rewards.clip import TextMatch, clip_score
from varl.rewards.geneval import GenEval
from varl.rewards.grounding_dino import GroundingDINO, placed
from varl.rewards.judge import judge_now
from varl.rewards.vqa import VQA
from varl.types import Box, Position, Prompt, RewardFn, Wanted

ENDING = "_val.txt"
CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
ATTRIBUTES = CATEGORIES[:3]
LONGEST = 255 - len("_000000.png")
"""Bytes of a prompt in a file name."""
NEAR = 150 / 479
"""Share of the picture's longer side: 150 pixels, of a square that was brought to 479."""
SAME = 0.9
"""Share of the smaller of two boxes of a class above which both are one object."""
ACTION, THREE = "action", "3-in-1"


# ---- prompts ----------------------------------------------------------------------------------------------------------------------------


PHRASE = r"(?:(?:an?|the) )?[\w'-]+(?: [\w'-]+){0,2}"
"""A noun with up to two words and an article before it."""
THING = r"(?:an?|the)(?: (?!(?:an?|the|of|and)\b)[\w'-]+){1,4}?"
"""The same with an article for sure, and with three words."""
PLACES: dict[str, Position] = {
    "on side of": "next to",
    "next to": "next to",
    "near": "next to",
    "on the left of": "left of",
    "on the right of": "right of",
    "on the bottom of": "below",
    "on the top of": "above",
    "on top of": "above",
}
PLACE = "|".join(PLACES)
Relation = tuple[str, Position, str]
"""What lies where of what."""
BE = "is|are|was|were"
VERB = rf"(?:{BE})(?: [a-z]+(?:ed|ing)| hung)?|[a-z]+ed|cut|drove|fell|flew|grew|hung|lay|sat|shone|slept|sped|stood|swam"
"""What follows a phrase, with what goes before the next."""
BEFORE = (
    rf"{PLACE}|(?:[a-z]+ )?(?:about|above|across|against|around|at|behind|below|beneath|beside|between|by|from|in|inside|into|on|onto|over|"
    "past|through|to|under|with|within)"
)
NUMBERS = {name: count for count, name in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight"), 1)}
PLURALS = {"knives": "knife", "men": "man", "mice": "mouse", "people": "person", "women": "woman"}
ENDINGS = (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss"), ("xes", "x"), ("toes", "to"), ("ss", "ss"), ("s", ""))


def sentence(text: str) -> tuple[str, str, tuple[str, ...]] | None:
    """What a prompt such as "The red cup sat on the table and the bench." is about, what it says of it, and the further phrases."""
    found = re.fullmatch(rf"({THING}) ((?:{VERB})(?: (?:{BEFORE}))?) ({THING}(?: and {THING})*)\.?", text, re.IGNORECASE)
    return (found[1], found[2], tuple(found[3].split(" and "))) if found else None


def phrases(text: str) -> tuple[str, ...]:
    """The noun phrases that the prompt consists of, two with "and" between or those of a sentence; none, if it is made otherwise."""
    if found := re.fullmatch(rf"({PHRASE}) and ({PHRASE})\.?", text, re.IGNORECASE):
        return found.groups()
    told = sentence(text)
    return (told[0], *told[2]) if told else ()


def noun(phrase: str) -> str:
    """Its last word, in small letters."""
    return phrase.split()[-1].lower()


def relation(text: str) -> Relation | None:
    """What lies where of what, by their nouns: of "a cup near a fox", or of the first two phrases of a sentence that says it."""
    if found := re.fullmatch(rf"an? ([\w'-]+) ({PLACE}) an? ([\w'-]+)\.?", text, re.IGNORECASE):
        return found[1].lower(), PLACES[found[2].lower()], found[3].lower()
    told = sentence(text)
    words = re.search(rf"\b(?:{PLACE})$", told[1], re.IGNORECASE) if told else None
    return (noun(told[0]), PLACES[words[0].lower()], noun(told[2][0])) if told and words else None


def kind(text: str) -> tuple[bool, bool]:
    """Of a complex prompt, whether it says where something lies, and whether more: that something happens, or lies elsewhere."""
    found = re.search(rf"\b(?:({BE}) )?(?:{PLACE})\b", text, re.IGNORECASE)
    return found is not None, found is None or found[1] is None


def singular(plural: str) -> str:
    """One of them, by its ending; the same of "sheep"."""
    ending, one = next(((ending, one) for ending, one in ENDINGS if plural.endswith(ending)), ("", ""))
    return PLURALS.get(plural, plural.removesuffix(ending) + one)


def numbers(text: str) -> tuple[Wanted, ...]:
    """Every noun that stands after a number up to eight, and so many of it; after "a" too, in a list from the beginning on."""
    found = re.findall(rf"(?:\b({'|'.join(NUMBERS)})|(?:^|(?<=, )|(?<=\band ))an?) ([\w'-]+)", text, re.IGNORECASE)
    told = [(NUMBERS.get(number.lower(), 1), name.lower()) for number, name in found]
    return tuple(Wanted(name=name if count == 1 else singular(name), count=count) for count, name in told)


def plain(text: str) -> str | None:
    """A sentence with the last words of its phrases alone, None where it is none: "The cup sat on the table"."""
    if (told := sentence(text)) is None:
        return None
    first, *others = (f"{phrase.split()[0]} {phrase.split()[-1]}" for phrase in (told[0], *told[2]))
    return f"{first} {told[1]} {' and '.join(others)}"


# ---- scores of one picture --------------------------------------------------------------------------------------------------------------


def place_score(detections: Sequence[Detection], told: Relation, size: tuple[int, int]) -> float:
    """`spatial` of what was found in a picture of `size` (H, W), 0 or 1/2 to 1."""
    a, b = (max((d for d in detections if d.label == name), key=lambda d: d.score, default=None) for name in (told[0], told[2]))
    if a is None or b is None:
        return 0.0
    score = (a.score + b.score) / 4 + placed(told[1], a.box, b.box, size, near=NEAR) / 2
    return score if score >= 0.5 else 0.0


def common(a: Box, b: Box) -> float:
    """Share of the smaller of two boxes that the other covers; 0 where it is empty. (It is never less than their IoU.)"""
    across, down = (max(0.0, min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis])) for axis in (0, 1))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return across * down / smaller if smaller else 0.0


def distinct(detections: Sequence[Detection]) -> list[Detection]:
    """Those, surest first, that are no surer one of their class seen again."""
    kept: list[Detection] = []
    for one in sorted(detections, key=lambda detection: -detection.score):
        if all(one.label != other.label or common(one.box, other.box) <= SAME for other in kept):
            kept.append(one)
    return kept


def number_score(detections: Sequence[Detection], wanted: Sequence[Wanted]) -> float:
    """`numeracy` of what was found in a picture, in [0, 1]."""
    there = [detection.label for detection in distinct(detections)]
    found = [there.count(one.name) for one in wanted]
    return sum((count > 0) + (count == one.count) for count, one in zip(found, wanted, strict=True)) / (2 * len(wanted))


# ---- judges -----------------------------------------------------------------------------------------------------------------------------


def attributes(judge: VQA, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> list[dict[str, Share]]:
    """The product over the prompt's phrases, of categories of attributes and of complex."""
    found: list[dict[str, Share]] = [
        {item.category: (math.nan, 1.0)} if item.category in (*ATTRIBUTES, "complex") else {} for item in items
    ]
    asked = [b for b, share in enumerate(found) if share and phrases(items[b].prompt.text)]
    if asked:
        sure = judge.model.yes(images[asked], [[f"{phrase}?" for phrase in phrases(items[b].prompt.text)] for b in asked])
        for b, row in zip(asked, sure, strict=True):
            found[b] = {items[b].category: (float(row.prod()), 1.0)}
    return found


def nouns(item: Item) -> tuple[str, ...] | None:
    """What a detector looks for; nothing where the prompt cannot be read, None where it is not asked."""
    text = item.prompt.text
    if item.category == "numeracy":
        return tuple(wanted.name for wanted in numbers(text))
    if item.category == "spatial" or (item.category == "complex" and kind(text)[0]):
        told = relation(text)
        return (told[0], told[2]) if told else ()
    return None


def objects(judge: GenEval | GroundingDINO, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> list[dict[str, Share]]:
    """By the judge's detector, `numeracy`, and `spatial` of this category and of complex prompts that say where something lies."""
    config = judge.config
    counting = config.counting_threshold if isinstance(config, GenEvalConfig) else config.threshold
    names = [nouns(item) for item in items]
    found: list[dict[str, Share]] = [
        {} if row is None else {item.category: (math.nan, 1.0)} for item, row in zip(items, names, strict=True)
    ]
    asked = {b: row for b, row in enumerate(names) if row}
    if asked:
        least = [counting if items[b].category == "numeracy" else config.threshold for b in asked]
        seen = judge.detector.detect(images[list(asked)], list(asked.values()), least)
        for b, detections in zip(asked, seen, strict=True):
            text, category = items[b].prompt.text, items[b].category
            if category == "numeracy":
                found[b] = {category: (number_score(detections, numbers(text)), 1.0)}
            elif told := relation(text):
                found[b] = {category: (place_score(detections, told, (images.shape[2], images.shape[3])), 1.0)}
    return found


def actions(judge: TextMatch, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> list[dict[str, Share]]:
    """The cosine with `plain`, of complex prompts in which something happens."""
    happens = [item.category == "complex" and kind(item.prompt.text)[1] for item in items]
    found: list[dict[str, Share]] = [{"complex": (math.nan, 1.0)} if one else {} for one in happens]
    asked = {b: Prompt(text=text) for b, item in enumerate(items) if happens[b] and (text := plain(item.prompt.text))}
    if asked:
        cosine = judge_now(judge, images[list(asked)], list(asked.values())).parts["cosine"].tolist()
        for b, number in zip(asked, cosine, strict=True):
            found[b] = {"complex": (number, 1.0)}
    return found


def is_clip_score(judge: RewardFn) -> bool:
    """PickScore and HPS are cosines too, of other networks."""
    return isinstance(judge, TextMatch) and judge.unit is clip_score


def ask(name: str, judge: RewardFn, images: Float[Tensor, "B 3 H W"], items: Sequence[Item]) -> Answers:
    """Of a VQA and a detector the scores above, of their categories alone; of any other judge its value, and of a CLIPScore
    `name/action` too."""
    match judge:
        case VQA():
            return {name: attributes(judge, images, items)}
        case GenEval() | GroundingDINO():
            return {name: objects(judge, images, items)}
        case TextMatch() if is_clip_score(judge):
            return {**by_value(name, judge, images, items), f"{name}/{ACTION}": actions(judge, images, items)}
    return by_value(name, judge, images, items)


def three_in_one(shares: Sequence[Mapping[str, Share]]) -> dict[str, Share]:
    """The mean of what VQA, detector and CLIPScore say of a complex prompt's picture, each of what the prompt has."""
    told = [share["complex"][0] for share in shares if "complex" in share]
    return {"complex": (sum(told) / len(told), 1.0)} if told else {}


def join(judges: Mapping[str, RewardFn], answers: Answers) -> Answers:
    """3-in-1, where there is one VQA, one detector and one CLIPScore."""
    attribute = [answers[name] for name, judge in judges.items() if isinstance(judge, VQA)]
    spatial = [answers[name] for name, judge in judges.items() if isinstance(judge, GenEval | GroundingDINO)]
    action = [answers[f"{name}/{ACTION}"] for name, judge in judges.items() if is_clip_score(judge)]
    if not len(attribute) == len(spatial) == len(action) == 1:
        return {}
    return {THREE: [three_in_one(shares) for shares in zip(attribute[0], spatial[0], action[0], strict=True)]}


# ---- files ------------------------------------------------------------------------------------------------------------------------------


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
    join=join,
    overall="none",
    official="BLIPvqa_eval, UniDet_eval, CLIPScore_eval, 3_in_1_eval on {pictures}/CATEGORY (github.com/Karine-Huang/T2I-CompBench)",
)
