"""T2I-CompBench's own rules: what its prompts say, what is there of it by hand, and the three in one, through the command too."""

import json
import math
from collections.abc import Sequence

import pytest
import torch

from test_benchmarks import READS, write
from tiny import save_tiny, status
from tiny_objects import save_blip, save_grounding_dino
from tiny_vision import save_clip
from varl.build import build_reward
from varl.config import CLIPScoreConfig, GenEvalConfig, GroundingDINOConfig
from varl.eval.benchmarks import BENCHMARKS, read_items
from varl.eval.benchmarks.benchmark import Item
from varl.eval.benchmarks.gallery import Gallery
from varl.eval.benchmarks.t2i_compbench import (
    NEAR,
    common,
    distinct,
    join,
    kind,
    number_score,
    numbers,
    phrases,
    place_score,
    plain,
    relation,
    sentence,
    singular,
    three_in_one,
)
from varl.models.detection import Detection
from varl.rewards.clip import TextMatch, clip_score
from varl.rewards.geneval import GenEval
from varl.rewards.grounding_dino import GroundingDINO
from varl.rewards.judge import judge_now
from varl.rewards.toy import brightness
from varl.rewards.vqa import VQA
from varl.types import Box, Prompt, Wanted

ASK = BENCHMARKS["t2i-compbench"].ask
SIZE = (64, 64)


def saw(label: str, box: Box, score: float = 0.8) -> Detection:
    return Detection(label=label, score=score, box=box)


def item(category: str, text: str) -> Item:
    return Item(prompt=Prompt(text=text), category=category, name=text)


# ---- prompts ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The red mug sat on the oak table.", ("The red mug", "sat on", ("the oak table",))),
        ("The soft towel is on top of the hard bench.", ("The soft towel", "is on top of", ("the hard bench",))),
        ("The old brown dog was sleeping near the gate", ("The old brown dog", "was sleeping near", ("the gate",))),
        ("The bright light shone down on the wet street.", ("The bright light", "shone down on", ("the wet street",))),
        ("The thin blanket covered the bed and the chair.", ("The thin blanket", "covered", ("the bed", "the chair"))),
        ("The striped cup stood by a painted jug.", ("The striped cup", "stood by", ("a painted jug",))),
        ("The bark of the tree touched the wall.", None),  # three phrases about one thing
        ("The dog gave the cat the ball.", None),
        ("The red mug.", None),
        ("The tiny lamp lit the room, its light warm.", None),
    ],
)
def test_sentences(text, want):
    assert sentence(text) == want
    assert phrases(text) == ((want[0], *want[2]) if want else ())


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a fox on the left of a bowl", ("fox", "left of", "bowl")),
        ("a fox on the right of an egg", ("fox", "right of", "egg")),
        ("an egg on the top of a fox", ("egg", "above", "fox")),
        ("an egg on the bottom of a fox.", ("egg", "below", "fox")),
        ("a fox near a bowl", ("fox", "next to", "bowl")),
        ("a fox next to a bowl", ("fox", "next to", "bowl")),
        ("a fox on side of a bowl", ("fox", "next to", "bowl")),
        ("The red Book was on top of the old oak shelf.", ("book", "above", "shelf")),
        ("The gray goose swam next to the green boat and the buoy.", ("goose", "next to", "boat")),
        ("The gray goose swam in the green lake.", None),
        ("The gray goose swam.", None),
        ("the goose leapt near the cup", None),  # a verb that is not known
        ("a fox in front of a bowl", None),
        ("a fox and a bowl", None),
    ],
)
def test_relations(text, want):
    assert relation(text) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The red mug was next to the blue jug.", (True, False)),
        ("The red mug stood next to the blue jug.", (True, True)),
        ("The red mug was hung near the blue jug.", (True, True)),
        ("The red mug was inside the blue jug.", (False, True)),
        ("The nearest mug broke.", (False, True)),
    ],
)
def test_kinds_of_complex_prompts(text, want):
    assert kind(text) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("eight cups", [("cup", 8)]),
        ("one knife", [("knife", 1)]),
        ("one cat and three foxes", [("cat", 1), ("fox", 3)]),
        ("two mice, five sheep, a bus and an egg", [("mouse", 2), ("sheep", 5), ("bus", 1), ("egg", 1)]),
        ("A cup, two knives, and three women filled a hall", [("cup", 1), ("knife", 2), ("woman", 3)]),
        ("four dogs barked at two strawberries on a plate", [("dog", 4), ("strawberry", 2)]),
        ("someone saw stone cups", []),
        ("nine cups", []),
    ],
)
def test_numbers(text, want):
    assert [(wanted.name, wanted.count) for wanted in numbers(text)] == want


@pytest.mark.parametrize(
    ("plural", "one"),
    [
        *((one + "s", one) for one in ("horse", "vase", "bee", "toy", "microwave")),
        ("peaches", "peach"),
        ("brushes", "brush"),
        ("boxes", "box"),
        ("glasses", "glass"),
        ("tomatoes", "tomato"),
        ("butterflies", "butterfly"),
        ("people", "person"),
        ("deer", "deer"),
        ("glass", "glass"),
    ],
)
def test_singulars(plural, one):
    assert singular(plural) == one


def test_phrases_lose_all_but_their_last_words():
    assert plain("The red tin mug sat on the oak table and a soft rug.") == "The mug sat on the table and a rug"
    assert plain("a red mug") is None


# ---- one picture, by hand ---------------------------------------------------------------------------------------------------------------

LEFT, RIGHT = (0.0, 0.4, 0.2, 0.6), (0.6, 0.4, 0.8, 0.6)


@pytest.mark.parametrize(
    ("found", "position", "score"),
    [
        ([saw("fox", LEFT, 0.8), saw("cup", RIGHT, 0.4)], "left of", 0.3 + 0.5),
        ([saw("fox", LEFT, 0.8), saw("cup", RIGHT, 0.4)], "right of", 0.0),  # 0.3 alone is less than half
        ([saw("fox", LEFT, 1.0), saw("cup", RIGHT, 1.0)], "above", 0.5),
        ([saw("fox", LEFT, 1.0)], "left of", 0.0),
        ([], "left of", 0.0),
        ([saw("fox", RIGHT, 0.5), saw("fox", LEFT, 0.6), saw("cup", RIGHT, 0.6)], "left of", 0.3 + 0.5),  # the surest fox
        # intersection 0.1, union 0.3: place is 0.1 / (1/3)
        ([saw("fox", (0.0, 0.0, 0.2, 1.0), 0.8), saw("cup", (0.1, 0.0, 0.3, 1.0), 0.8)], "left of", 0.4 + 0.15),
        ([saw("fox", (0.0, 0.0, 0.2, 1.0), 0.6), saw("cup", (0.1, 0.0, 0.3, 1.0), 0.6)], "left of", 0.0),  # 0.45
    ],
)
def test_place_score_by_hand(found, position, score):
    assert place_score(found, ("fox", position, "cup"), SIZE) == pytest.approx(score)


def test_near_is_150_pixels_of_479():
    """Nearer than that in one direction is near; at 151 pixels and 0.8 of the picture it is 150 pixels of the greater."""
    for shift, near in ((149 / 479, 1.0), (151 / 479, 150 / 479 / 0.8)):
        found = [saw("fox", (0.0, 0.0, 0.1, 0.1), 0.8), saw("cup", (shift, 0.8, shift + 0.1, 0.9), 0.8)]
        assert place_score(found, ("fox", "next to", "cup"), SIZE) == pytest.approx(0.4 + near / 2)
    assert NEAR == 150 / 479


def test_one_object_seen_twice_is_one():
    big, inside, apart = (0.0, 0.0, 0.4, 0.4), (0.0, 0.0, 0.1, 0.1), (0.3, 0.3, 0.7, 0.7)
    assert common(big, inside) == 1 == common(inside, big)
    assert common(big, apart) == pytest.approx(0.01 / 0.16)
    assert common(big, (0.0, 0.04, 0.4, 0.44)) == pytest.approx(0.9)
    assert common(big, (0.8, 0.8, 0.9, 0.9)) == 0 == common(big, (0.2, 0.2, 0.2, 0.2))
    found = [saw("fox", inside, 0.5), saw("fox", big, 0.9), saw("cup", inside, 0.4), saw("fox", apart, 0.6)]
    assert [(d.label, d.score) for d in distinct(found)] == [("fox", 0.9), ("fox", 0.6), ("cup", 0.4)]


@pytest.mark.parametrize(
    ("foxes", "cups", "score"), [(2, 1, 1.0), (2, 0, 0.5), (2, 3, 0.75), (1, 1, 0.75), (3, 2, 0.5), (0, 1, 0.5), (0, 0, 0.0)]
)
def test_number_score_by_hand(foxes, cups, score):
    """Two foxes and a cup are asked for: a quarter each for being there and for as many."""
    boxes = [(k / 10, 0.0, (k + 1) / 10, 0.1) for k in range(9)]
    found = [saw("fox", box) for box in boxes[:foxes]] + [saw("cup", box) for box in boxes[5 : 5 + cups]]
    assert number_score(found, (Wanted(name="fox", count=2), Wanted(name="cup"))) == score


def test_three_in_one_by_hand():
    attribute, spatial, action = ({"complex": (value, 1.0)} for value in (0.5, 0.75, 0.25))
    assert three_in_one([attribute, spatial, {}]) == {"complex": (0.625, 1.0)}
    assert three_in_one([attribute, {}, action]) == {"complex": (0.375, 1.0)}
    assert three_in_one([attribute, spatial, action]) == {"complex": (0.5, 1.0)}
    assert math.isnan(three_in_one([attribute, {"complex": (math.nan, 1.0)}, {}])["complex"][0])
    assert three_in_one([{"color": (1.0, 1.0)}, {}, {}]) == {}


# ---- judges -----------------------------------------------------------------------------------------------------------------------------


class Sees:
    """A detector that sees a fox on the left of a cup, sure by 0.8 and 0.6."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[str, ...], float]] = []

    def require(self, names: Sequence[str]) -> None:
        pass

    def detect(self, images: torch.Tensor, names: Sequence[Sequence[str]], least: Sequence[float]) -> list[tuple[Detection, ...]]:
        self.asked += [(tuple(row), limit) for row, limit in zip(names, least, strict=True)]
        there = (saw("fox", LEFT, 0.8), saw("cup", RIGHT, 0.6))
        return [tuple(d for d in there if d.label in row and d.score > limit) for row, limit in zip(names, least, strict=True)]


ITEMS = [
    item("spatial", "a fox on the left of a cup"),
    item("spatial", "a fox juggling cups"),
    item("numeracy", "one fox and two cups"),
    item("numeracy", "many cups"),
    item("complex", "The red fox was on the left of the blue cup."),
    item("complex", "The red fox was chasing the blue cup."),
    item("complex", "The tail of the fox lay next to the blue cup."),
    item("color", "a red fox and a blue cup"),
]
IMAGES = torch.zeros(len(ITEMS), 3, 8, 8)


class Looks(GenEval):
    """Of which colours are not asked."""

    def __init__(self, detector: Sees) -> None:
        self.config, self.detector = GenEvalConfig(threshold=0.3, counting_threshold=0.7), detector


def dino(detector: Sees) -> GroundingDINO:
    return GroundingDINO(GroundingDINOConfig(threshold=0.4), detector)


@pytest.mark.parametrize(("judge", "places", "counts", "numeracy"), [(dino, 0.4, 0.4, 0.75), (Looks, 0.3, 0.7, 0.5)])
def test_a_detector_is_asked_for_the_nouns(judge, places, counts, numeracy):
    """A prompt that cannot be read counts as failed; of what is none of a detector's there is nothing. By 0.7 it sees no cup."""
    detector = Sees()
    found = ASK("eye", judge(detector), IMAGES, ITEMS)
    assert detector.asked == [(("fox", "cup"), places), (("fox", "cup"), counts), (("fox", "cup"), places)]
    told = found["eye"]
    assert [{category: share[0] for category, share in picture.items()} for picture in told[::2]] == [
        {"spatial": pytest.approx(0.85)},
        {"numeracy": numeracy},
        {"complex": pytest.approx(0.85)},
        {"complex": pytest.approx(math.nan, nan_ok=True)},
    ]
    assert json.dumps(told[1::2]) == json.dumps([{"spatial": (math.nan, 1.0)}, {"numeracy": (math.nan, 1.0)}, {}, {}])


def test_three_in_one_takes_one_judge_of_each_kind():
    """By names that the user chose, whatever else is asked; with two detectors or without CLIPScore there is none."""
    vqa, eye, clip = VQA.__new__(VQA), dino(Sees()), TextMatch.__new__(TextMatch)
    clip.unit = clip_score
    share = [{"complex": (0.5, 1.0)}]
    answers = {"a": share, "b": share, "c": share, "c/action": [{"complex": (0.2, 1.0)}], "d": [{"complex": (9.0, 1.0)}]}
    judges = {"a": vqa, "b": eye, "c": clip, "d": brightness}
    assert join(judges, answers) == {"3-in-1": [{"complex": (pytest.approx(0.4), 1.0)}]}
    assert join({**judges, "d": eye}, answers) == {}
    assert join({"a": vqa, "b": eye}, answers) == {}


# ---- the command ------------------------------------------------------------------------------------------------------------------------

PLAIN = {
    "The red dog sat next to the blue cat.": "The dog sat next to the cat",
    "The blue light lay near the wooden bench.": "The light lay near the bench",
}
FILES = {
    "spatial": ["a dog on the left of a cat", "a bench near a dog", "a cat on the top of a bench"],
    "numeracy": ["one dog and two cats", "two dogs"],
    "complex": list(PLAIN),
}


def test_the_command_scores_with_three_networks(tmp_path):
    """GroundingDINO, BLIP and CLIP of `transformers`, with random weights. Numbers are those of the judges' own networks on the files."""
    for category, lines in FILES.items():
        write(tmp_path / f"dataset/{category}_val.txt", "\r\n".join(lines) + "\r\n")
    model, dino, clip = save_tiny(tmp_path / "model", READS), save_grounding_dino(tmp_path / "dino"), save_clip(tmp_path / "clip")
    judges = {
        "eye": f"{{kind: grounding_dino, model: {dino}, threshold: 0.5}}",
        "blip": f"{{kind: vqa, model: {save_blip(tmp_path / 'blip')}}}",
        "clip": f"{{kind: clip_score, model: {clip}}}",
    }
    out = tmp_path / "out"
    rewards = [word for name, text in judges.items() for word in ("--reward", f"{name}={text}")]
    assert status("eval", "t2i-compbench", model, tmp_path / "dataset", "--out", out, "--samples", 2, "--quiet", *rewards) == 0
    spatial, numeracy, complex_ = json.loads((out / "scores.json").read_text())["rows"]
    assert complex_["3-in-1"] == pytest.approx((complex_["eye"] + complex_["blip"] + complex_["clip/action"]) / 3, abs=1e-6)
    assert spatial["eye_failed"] == numeracy["eye_failed"] == complex_["3-in-1_failed"] == 0
    assert "blip" not in spatial
    assert "3-in-1" not in numeracy

    benchmark = BENCHMARKS["t2i-compbench"]
    gallery = Gallery(benchmark=benchmark, items=read_items(benchmark, tmp_path / "dataset"), samples=2, folder=out)
    eye, clip = build_reward(GroundingDINOConfig(model=str(dino), threshold=0.5)), build_reward(CLIPScoreConfig(model=str(clip)))
    assert isinstance(eye, GroundingDINO)
    placed, counted, cosines = [], [], []
    for i, one in enumerate(gallery.items):
        images, text = gallery.load(i).float() / 255, one.prompt.text
        if one.category == "complex":
            cosines += judge_now(clip, images, [Prompt(text=PLAIN[text])] * 2).parts["cosine"].tolist()
        elif one.category == "spatial":
            told = relation(text)
            assert told is not None
            found = eye.detector.detect(images, [(told[0], told[2])] * 2, [0.5] * 2)
            placed += [place_score(row, told, SIZE) for row in found]
        else:
            found = eye.detector.detect(images, [[wanted.name for wanted in numbers(text)]] * 2, [0.5] * 2)
            counted += [number_score(row, numbers(text)) for row in found]
    assert max(placed) > 0
    assert max(counted) > 0
    assert spatial["eye"] == pytest.approx(sum(placed) / 6, abs=1e-6)
    assert numeracy["eye"] == pytest.approx(sum(counted) / 4, abs=1e-6)
    assert complex_["clip/action"] == pytest.approx(sum(cosines) / 4, abs=1e-6)
