"""GenEval's rule, worked by hand, and the colour of things."""

import itertools
import random

import pytest
import torch

from tiny_vision import save_clip
from varl.checkpoints.vision import files_of, load_clip
from varl.config import CLIPScoreConfig
from varl.models.detection import Detection
from varl.rewards.geneval import COLOURS, Colours, conditions, correct, counts, cut_out, graded, looked_at, relations
from varl.types import Prompt, Wanted

SIZE = (100, 200)


def saw(label: str, score: float = 0.95, box=(0.0, 0.0, 0.1, 0.2), colour: str | None = None) -> Detection:
    return Detection(label=label, score=score, box=box, colour=colour)


def at(x: float, y: float, width: float = 20, height: float = 20):
    """A box about (x, y), in pixels of a picture of SIZE."""
    return (x - width / 2) / 200, (y - height / 2) / 100, (x + width / 2) / 200, (y + height / 2) / 100


BENCH = Prompt(objects=(Wanted(name="bench"),))
TWO = Prompt(objects=(Wanted(name="bench"), Wanted(name="dog")))
THREE = Prompt(objects=(Wanted(name="dog", count=3),), unwanted=(Wanted(name="dog", count=4),))
RED = Prompt(objects=(Wanted(name="dog", colour="red"),))
LEFT = Prompt(objects=(Wanted(name="bench"), Wanted(name="dog", position=("left of", 0))))
MIXED = Prompt(objects=(Wanted(name="dog", colour="red"), Wanted(name="bench", colour="blue")))


# ---- the rule, for each of its tags ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "detections", "share", "says"),
    [
        (BENCH, [saw("bench")], 1, ""),
        (BENCH, [saw("bench"), saw("bench"), saw("dog")], 1, ""),
        (BENCH, [saw("dog")], 0, "wanted at least 1 bench, 0 there"),
        (TWO, [saw("dog"), saw("bench")], 1, ""),
        (TWO, [saw("dog"), saw("dog")], 1 / 2, "wanted at least 1 bench, 0 there"),
        (TWO, [], 0, "wanted at least 1 bench, 0 there\nwanted at least 1 dog, 0 there"),
        (THREE, [saw("dog")] * 3, 1, ""),
        (THREE, [saw("dog")] * 2, (2 / 3 + 1) / 2, "wanted at least 3 dog, 2 there"),
        (THREE, [saw("dog")] * 5, (1 + 3 / 5) / 2, "wanted fewer than 4 dog, 5 there"),
        (THREE, [saw("dog")] * 20, (1 + 3 / 16) / 2, "wanted fewer than 4 dog, 16 there"),
        (RED, [saw("dog", colour="red")], 1, ""),
        (RED, [saw("dog", 0.9, colour="blue"), saw("dog", 0.8, colour="red")], 1 / 2, "wanted 1 red dog, 0 there (blue)"),
        (RED, [saw("dog", 0.8, colour="blue"), saw("dog", 0.9, colour="red")], 1, ""),
        (RED, [], 0, "wanted at least 1 dog, 0 there\nwanted 1 red dog, 0 there"),
        (LEFT, [saw("bench", box=at(150, 50)), saw("dog", box=at(50, 50))], 1, ""),
        (LEFT, [saw("bench", box=at(50, 50)), saw("dog", box=at(150, 50))], 2 / 3, "wanted dog left of bench, so are 0 of 1 pairs"),
        (LEFT, [saw("dog", box=at(50, 50))], 1 / 3, "wanted at least 1 bench, 0 there\nwanted dog left of bench, some are missing"),
        (LEFT, [saw("bench", 0.5, at(9, 50)), saw("bench", 0.9, at(150, 50)), saw("dog", box=at(50, 50))], 1, ""),
        (MIXED, [saw("dog", colour="red"), saw("bench", colour="blue")], 1, ""),
        (MIXED, [saw("dog", colour="blue"), saw("bench", colour="red")], 1 / 2, "wanted 1 red dog, 0 there (blue)\nwanted 1 blue bench"),
    ],
)
def test_by_hand(prompt, detections, share, says):
    right, why = correct(detections, prompt, SIZE)
    assert right == (share == 1)
    assert why.startswith(says)
    assert bool(why) == bool(says)
    assert graded(detections, prompt, SIZE) == pytest.approx(share, abs=1e-12)


def test_every_one_of_several_must_have_the_colour_and_lie_so():
    two = Prompt(objects=(Wanted(name="cat"), Wanted(name="dog", count=2, colour="red", position=("above", 0))))
    cat, first, second = saw("cat", box=at(100, 80)), saw("dog", box=at(90, 20), colour="red"), saw("dog", box=at(110, 20), colour="red")
    assert correct([cat, first, second], two, SIZE) == (True, "")
    aside = saw("dog", box=at(190, 80), colour="red")
    assert correct([cat, first, aside], two, SIZE) == (False, "wanted dog above cat, so are 1 of 2 pairs")
    assert [condition.share for condition in conditions([cat, first, aside], two, SIZE)] == [1, 1, 1, 1 / 2]


def test_what_must_not_be_there():
    no_cat = Prompt(objects=(Wanted(name="dog"),), unwanted=(Wanted(name="cat"),))
    assert correct([saw("dog")], no_cat, SIZE) == (True, "")
    assert correct([saw("dog"), saw("cat")], no_cat, SIZE) == (False, "wanted fewer than 1 cat, 1 there")
    assert graded([saw("dog"), saw("cat")], no_cat, SIZE) == 0.5
    assert [counts(prompt) for prompt in (BENCH, THREE, no_cat)] == [False, True, False]


def test_graded_is_one_where_correct_and_only_there():
    draw = random.Random(0)
    outcomes = set()
    for _ in range(400):
        prompt = draw.choice([TWO, THREE, RED, LEFT, MIXED])
        detections = [
            saw(draw.choice(["bench", "dog"]), draw.random(), at(draw.choice([40, 160]), 50), draw.choice(["red", "blue"]))
            for _ in range(draw.randrange(5))
        ]
        right, _ = correct(detections, prompt, SIZE)
        value = graded(detections, prompt, SIZE)
        assert 0 <= value <= 1
        assert right == (value == 1)
        outcomes.add(right)
    assert outcomes == {True, False}


# ---- positions ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (50, 50, {"left of"}),
        (150, 50, {"right of"}),
        (100, 10, {"above"}),
        (100, 90, {"below"}),
        (100, 50, set()),
        (97, 52, set()),  # within a tenth of both sizes
        (96, 50, set()),  # just so: |o| - 0.1 (20 + 20) = 0
        (91, 50, {"left of"}),  # 5 of 9 pixels are left over, more than half
        (92.1, 50, set()),  # 3.9 of 7.9 are not
        (60, 10, {"left of", "above"}),
    ],
)
def test_where_one_lies_of_another(x, y, says):
    assert relations(at(x, y), at(100, 50), SIZE) == says


def test_directions_are_of_pixels():
    a, b = (0.0, 0.0, 0.1, 0.1), (0.3, 0.5, 0.4, 0.6)
    assert relations(a, b, (100, 100)) == {"above"}  # 28 left over across of 58 pixels, 48 down
    assert relations(a, b, (100, 400)) == {"left of"}


def test_positions_are_opposite():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    boxes = [at(x, y, width, 30) for x, y, width in itertools.product((30, 90, 150), (25, 60), (10, 50))]
    for a, b in itertools.product(boxes, boxes):
        assert relations(a, b, SIZE) == {opposite[name] for name in relations(b, a, SIZE)}


# ---- colours -----------------------------------------------------------------------------------------------------------------------------


def test_what_is_cut_out():
    image = torch.arange(32.0).view(1, 4, 8).expand(3, 4, 8) / 32
    whole = cut_out(image, saw("dog", box=(0.25, 0.24, 0.51, 1.0)))
    assert torch.equal(whole, image[:, 1:4, 2:4])
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[1, 2] = True
    masked = cut_out(image, Detection(label="dog", score=1.0, box=(0.25, 0.25, 0.5, 0.75), mask=mask))
    torch.testing.assert_close(masked[0], torch.tensor([[10 / 32, 0.6], [0.6, 0.6]]))
    for box in ((1.0, 1.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5), (-0.1, -0.1, 0.0, 0.0)):
        assert cut_out(image, saw("dog", box=box)).shape == (3, 1, 1)


def test_only_the_surest_are_looked_at():
    two = Prompt(objects=(Wanted(name="cat"), Wanted(name="dog", count=2, colour="red")))
    assert looked_at([saw("dog", 0.4), saw("cat"), saw("dog", 0.9), saw("dog", 0.5)], two) == [2, 3]


def test_colours_by_hand(tmp_path):
    clip = load_clip(files_of(CLIPScoreConfig(model=str(save_clip(tmp_path)))))
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(3))
    prompts = [RED, MIXED, BENCH]
    found = [
        (saw("dog", box=(0.1, 0.2, 0.9, 0.7)), saw("cat")),
        (saw("bench", box=(0.0, 0.0, 1.0, 1.0)), saw("dog", box=(0.5, 0.5, 1.0, 1.0))),
        (saw("bench"),),
    ]
    for batch in (1, 16):
        told = Colours(clip, batch).see(images, found, prompts)
        assert [[d.colour is not None for d in detections] for detections in told] == [[True, False], [True, True], [False]]
        for row, place in ((0, 0), (1, 0), (1, 1)):
            own = found[row][place]
            seen = clip.encode_images(cut_out(images[row], own)[None])[0]
            likeness = []
            for colour in COLOURS:
                texts = [
                    f"a photo of a {colour} {own.label}",
                    f"a photo of a {colour}-colored {own.label}",
                    f"a photo of a {colour} object",
                ]
                mean = sum(clip.encode_texts([text])[0] for text in texts)
                likeness.append(float(seen @ mean / mean.norm()))
            assert told[row][place].colour == COLOURS[likeness.index(max(likeness))]
