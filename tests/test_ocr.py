"""The readers, on pictures whose text is known; the processes they live in; the reward they make."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from varl.config import OCRConfig, WordsConfig
from varl.data.words import PALETTES, dataset, render, word_list
from varl.errors import RewardError
from varl.rewards.ocr import (
    RapidOCR,
    Reading,
    Tesseract,
    areas,
    bands,
    choose_engine,
    ctc,
    dark_on_light,
    find_tessdata,
    ink_box,
    open_engine,
)
from varl.rewards.ocr_reward import NOT_READ, OCRReward, join, match_regions, region_score, to_pixels
from varl.rewards.pool import ReaderPool
from varl.types import Found, Prompt, Region

needs_tesseract = pytest.mark.skipif(
    find_tessdata() is None or find_spec("tesserocr") is None, reason="needs tesserocr and tesseract's language data (eng.traineddata)"
)
needs_rapidocr = pytest.mark.skipif(
    find_spec("rapidocr") is None or find_spec("onnxruntime") is None, reason="needs the packages rapidocr and onnxruntime"
)
ENGINES = [pytest.param(Tesseract, marks=needs_tesseract), pytest.param(RapidOCR, marks=needs_rapidocr)]


# ---- from a picture to lines ------------------------------------------------------------------------------------------------------------


def test_dark_on_light_is_the_same_for_a_picture_and_its_negative():
    image, _ = render(["CAT"], "sans", "ink", (16, 64))
    grey = image.mean(-1, keepdims=True).round().astype(np.uint8).repeat(3, -1)
    np.testing.assert_allclose(dark_on_light(grey), dark_on_light(255 - grey), atol=1)
    assert dark_on_light(grey).max() == 255
    assert dark_on_light(grey).min() == 0


def test_a_blank_picture_has_nothing_to_read():
    assert dark_on_light(np.full((16, 64, 3), 77, np.uint8)) is None


def test_areas_stop_half_way_between_neighbours():
    above, below = (0.25, 0.1, 0.5, 0.4), (0.25, 0.5, 0.5, 0.9)  # on 100x100: rows 10-40 and 50-90, columns 25-50
    assert areas([above, below], 100, 100) == [(0, 0, 80, 45), (0, 45, 90, 100)]
    left, right = (0.1, 0.4, 0.3, 0.6), (0.5, 0.4, 0.7, 0.6)
    assert areas([left, right], 100, 100) == [(0, 33, 40, 67), (40, 33, 90, 67)]


def test_a_lone_word_that_fills_the_picture_is_looked_for_everywhere():
    assert areas([(0.2, 0.2, 0.8, 0.8)], 16, 64) == [(0, 0, 64, 16)]
    assert areas([(0.2, 0.1, 0.8, 0.2)], 100, 100) == [(10, 6, 90, 24)]


def test_a_box_without_area_is_still_looked_at():
    assert areas([(1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0)], 16, 64) == [(63, 15, 64, 16), (0, 0, 1, 1)]


def test_bands_and_ink_box_by_hand():
    grey = np.full((6, 5), 255, np.uint8)
    grey[1:3, 2] = 0
    grey[4, 1:4] = 0
    assert bands(grey) == [(1, 3), (4, 5)]
    assert ink_box(grey) == (1, 1, 4, 5)


def test_ctc_by_hand():
    law = np.eye(3)[[0, 1, 1, 0, 1, 2, 2, 0]] * 0.8 + 0.1  # blank A A blank A B B blank
    text, confidence = ctc(law, ["", "a", "B"])
    assert text == "AAB"
    assert confidence == pytest.approx(0.9)
    assert ctc(np.eye(3)[[0, 0]], ["", "a", "B"]) == ("", 0.0)
    assert ctc(np.eye(3)[[2, 1, 2]], ["", "a", " "]) == ("A", 1.0)


# ---- engines ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_read_what_was_drawn(engine):
    config = WordsConfig(palettes=tuple(PALETTES))
    images, prompts = dataset(config, word_list(config), 72, seed=5)
    read = engine().read_batch(to_pixels(images), [[prompt.regions[0].box] for prompt in prompts])
    wrong = [
        (prompt.text, lines[0].text, prompt.style) for prompt, lines in zip(prompts, read, strict=True) if lines[0].text != prompt.text
    ]
    assert len(wrong) <= 1, wrong
    for prompt, (line,) in zip(prompts, read, strict=True):
        assert line.confidence > 0.3
        np.testing.assert_allclose(np.array(line.box) * [64, 16, 64, 16], np.array(prompt.regions[0].box) * [64, 16, 64, 16], atol=1.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_read_each_region_at_its_box(engine):
    image, prompt = render(["RED", "FOX", "JUMPS", "OVER"], "sans", "night", (64, 128))
    assert [line.text for line in engine().read(image, [region.box for region in prompt.regions])] == ["RED", "FOX", "JUMPS", "OVER"]


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_find_lines_where_no_box_is_known(engine):
    image, _ = render(["RED", "FOX"], "serif", "moss", (32, 64))
    assert [line.text for line in engine().read(image)] == ["RED", "FOX"]


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_see_the_space_between_words(engine):
    image, prompt = render(["RED FOX"], "sans", "sea", (16, 96))
    assert [line.text for line in engine().read(image, [prompt.regions[0].box])] == ["RED FOX"]


@needs_tesseract
def test_tesseract_finds_words_side_by_side():
    image, _ = render(["WAVE", "CLAY", "YOYO", "TALL", "RELAX"], "serif", "fire", (64, 128))
    assert [word.text for word in Tesseract().read(image)] == ["WAVE", "CLAY", "YOYO", "TALL", "RELAX"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_blank_picture_reads_as_nothing(engine):
    blank = np.full((16, 64, 3), 200, np.uint8)
    assert engine().read(blank) == []
    assert engine().read(blank, [(0.25, 0.25, 0.75, 0.75)]) == [Reading("", 0.0, (0.0, 0.0, 1.0, 1.0))]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reading_does_not_depend_on_its_batch(engine):
    config = WordsConfig()
    images, prompts = dataset(config, word_list(config), 6, seed=9)
    pixels, boxes = to_pixels(images), [[prompt.regions[0].box] for prompt in prompts]
    reader = engine()
    together = reader.read_batch(pixels, boxes)
    for (line,), image, at in reversed(list(zip(together, pixels, boxes, strict=True))):
        (alone,) = reader.read(image, at)
        assert (alone.text, alone.box) == (line.text, line.box)
        assert alone.confidence == pytest.approx(line.confidence, abs=1e-4)


def test_tesseract_without_language_data_says_what_to_do(monkeypatch):
    monkeypatch.setattr("varl.rewards.ocr.find_tessdata", lambda: None)
    with pytest.raises(RewardError, match=r"tesseract.*tesseract-ocr-eng.*TESSDATA_PREFIX.*rapidocr"):
        open_engine("tesseract")
    name, why = choose_engine("auto")
    assert name == "rapidocr"
    assert "tesseract-ocr-eng" in why


def test_tessdata_prefix_comes_first(monkeypatch, tmp_path):
    (tmp_path / "tessdata").mkdir()
    (tmp_path / "tessdata" / "eng.traineddata").touch()
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path))
    assert find_tessdata() == str(tmp_path / "tessdata")


@pytest.mark.parametrize("engine", ["easyocr", "no_such_module:Engine", "test_ocr:NoSuchEngine"])
def test_an_unknown_engine_is_named(engine):
    with pytest.raises(RewardError, match=engine):
        open_engine(engine)


# ---- reader processes -------------------------------------------------------------------------------------------------------------------


CORNER = """
import os, signal, sys, time

class Corner:
    'By the first pixel. 65 takes half a second, 66 hangs, 67 kills itself, 68 raises, 69 says if torch was imported, 70 is three words.'

    def __init__(self, letters):
        pass

    def read_batch(self, images, boxes):
        return [self.some(int(image[0, 0, 0])) for image in images]

    def some(self, value):
        if value == 70:
            return [("RED", 1.0, (0.0, 0.0, 0.5, 0.5)), ("FOX", 1.0, (0.5, 0.0, 1.0, 0.5)), ("RED", 0.5, (0.0, 0.5, 0.5, 1.0))]
        return [self.one(value)]

    def one(self, value):
        if value in (65, 66):
            time.sleep(600 if value == 66 else 0.5)
        if value == 67:
            os.kill(os.getpid(), signal.SIGKILL)
        if value == 68:
            raise OSError("the disk is on fire")
        return ("torch" if "torch" in sys.modules else "light") if value == 69 else str(value), 0.5, (0.0, 0.0, 1.0, 1.0)
"""


@pytest.fixture
def corner(tmp_path, monkeypatch):
    """The name of an engine that misbehaves on demand."""
    (tmp_path / "corner_engine.py").write_text(CORNER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "corner_engine:Corner"
    sys.modules.pop("corner_engine", None)


def numbered(values):
    """Pictures whose first pixel is their number, and no boxes."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 4, 4, 3)).copy(), [None] * len(values)


def texts(read):
    return [None if found is None else found[0].text for found in read]


def alive(pid):
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.parent.parent.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"  # nobody may have reaped it yet
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_readings_come_back_in_order(corner, workers):
    with ReaderPool(corner, workers=workers, timeout=20.0) as pool:
        assert texts(pool.read(*numbered(range(50)))) == [str(i) for i in range(50)]
        assert texts(pool.read(*numbered([7]))) == ["7"]
        assert pool.read(*numbered([])) == []


def test_pictures_larger_than_a_pipe_get_through(corner):
    with ReaderPool(corner, workers=1, timeout=20.0) as pool:
        images = np.zeros((16, 200, 200, 3), np.uint8)
        assert texts(pool.read(images, [None] * 16)) == ["0"] * 16


def test_a_reader_process_does_not_import_torch(corner):
    with ReaderPool(corner, workers=1, timeout=20.0) as pool:
        assert texts(pool.read(*numbered([69]))) == ["light"]


def test_a_worker_that_hangs_costs_its_own_chunk_and_is_replaced(corner):
    with ReaderPool(corner, workers=2, timeout=1.0) as pool:
        before = pool.pids
        read = texts(pool.read(*numbered([*range(16), 66, *range(17, 32)])))
        assert read == [str(i) for i in range(16)] + [None] * 16
        assert len(set(before) - set(pool.pids)) == 1
        assert not any(alive(pid) for pid in set(before) - set(pool.pids))
        assert texts(pool.read(*numbered(range(32)))) == [str(i) for i in range(32)]


def test_a_worker_that_dies_while_reading_costs_its_own_chunk(corner):
    with ReaderPool(corner, workers=1, timeout=20.0) as pool:
        assert texts(pool.read(*numbered([*range(16), 67, *range(17, 40)]))) == [str(i) for i in range(16)] + [None] * 16 + [
            str(i) for i in range(32, 40)
        ]


def test_a_worker_killed_between_batches_is_replaced(corner):
    with ReaderPool(corner, workers=1, timeout=20.0) as pool:
        assert texts(pool.read(*numbered([1]))) == ["1"]
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        assert texts(pool.read(*numbered([2]))) == [None]
        assert texts(pool.read(*numbered([3]))) == ["3"]
        assert pool.pids != (pid,)


def test_a_replacement_that_is_slow_to_start_costs_pictures_and_not_the_run(corner, monkeypatch):
    with ReaderPool(corner, workers=1, timeout=20.0) as pool:
        assert texts(pool.read(*numbered([1]))) == ["1"]
        os.kill(pool.pids[0], signal.SIGKILL)
        with monkeypatch.context() as slow:
            slow.setattr("varl.rewards.pool.START", 0.0)  # no process is ever ready in time
            assert texts(pool.read(*numbered([2]))) == [None]
            assert texts(pool.read(*numbered([3]))) == [None]
        assert texts(pool.read(*numbered([4]))) == [None]  # by the last one that was given no time
        assert texts(pool.read(*numbered([5]))) == ["5"]
    monkeypatch.setattr("varl.rewards.pool.START", 0.0)
    with (
        ReaderPool(corner, workers=1, timeout=20.0) as pool,
        pytest.raises(RewardError, match="did not answer in time before it was ready"),
    ):
        pool.read(*numbered([1]))


def test_a_pool_that_gives_up_leaves_none_at_work(corner):
    with ReaderPool(corner, workers=2, timeout=20.0) as pool:
        os.kill(pool.pids[0], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RewardError, match="died before it was ready"):
            pool.read(*numbered([65, 65]))
        assert time.monotonic() - start > 0.5, "the other has read to the end"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_engine_that_raises_fails_its_chunk_and_lives(corner, workers, caplog):
    with ReaderPool(corner, workers=workers, timeout=20.0) as pool:
        before = pool.pids
        assert texts(pool.read(*numbered([*range(16), 68, *range(17, 34)]))) == [str(i) for i in range(16)] + [None] * 16 + ["32", "33"]
        assert pool.pids == before
    assert "OSError: the disk is on fire" in caplog.text


def test_workers_ignore_ctrl_c_and_end_with_the_pool(corner):
    with ReaderPool(corner, workers=2, timeout=20.0) as pool:
        pool.read(*numbered(range(32)))
        pids = pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        assert texts(pool.read(*numbered(range(32)))) == [str(i) for i in range(32)]
        assert pool.pids == pids
    assert not any(alive(pid) for pid in pids)


def test_a_worker_that_hangs_ends_when_its_parent_is_killed(corner):
    code = f"""
import os, subprocess, sys
from varl.rewards.worker import encode
worker = subprocess.Popen([sys.executable, "-c", "from varl.rewards.worker import main; main()"], stdin=-1, stdout=-1)
worker.stdin.write(encode(dict(engine="{corner}", letters="A")) + encode(dict(shape=[1, 1, 1, 3], boxes=[None])) + bytes([66, 66, 66]))
worker.stdin.flush()
worker.stdout.read(6)  # ready; from here on it hangs
print(worker.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(parent.stdout.readline())
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_an_engine_that_cannot_be_opened_is_an_error_not_a_failed_picture():
    with (
        ReaderPool("corner_engine_that_is_not_there:Corner", workers=1, timeout=20.0) as pool,
        pytest.raises(RewardError, match="No module named"),
    ):
        pool.read(*numbered([1]))


# ---- the reward -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "read", "score", "value"),
    [
        ("CAT", "CAT", "mixed", 1.0),
        ("cat", "CAT", "exact", 1.0),
        ("CAT", "CAR", "exact", 0.0),
        ("CAT", "CAR", "ned", 2 / 3),
        ("CAT", "CAR", "mixed", 1 / 3),
        ("CAT", "", "mixed", 0.0),
        ("CAT", "C AT", "exact", 0.0),
        ("RED FOX", "RED  FOX", "exact", 1.0),
    ],
)
def test_region_score_by_hand(target, read, score, value):
    assert region_score(target, read, score) == pytest.approx(value)


def found(text, confidence=1.0, box=(0.0, 0.0, 0.5, 0.5)):
    return Found(text=text, confidence=confidence, box=box)


def test_pieces_are_matched_to_the_likest_region_once():
    red, fox = found("RAD"), found("FOX")
    assert match_regions(["FOX", "RED"], [red, fox]) == [fox, red]
    assert match_regions(["RED", "RED"], [red]) == [red, NOT_READ]
    assert match_regions(["RED"], []) == [NOT_READ]


def test_a_region_of_two_words_is_the_same_read_as_one_piece_or_as_two():
    left, right, owl = found("RED", box=(0.0, 0.0, 0.2, 0.5)), found("FOX", box=(0.3, 0.0, 0.5, 0.5)), found("OWL")
    want = [found("RED FOX"), owl]
    assert match_regions(["RED FOX", "OWL"], [found("RED FOX"), owl]) == want
    assert match_regions(["RED FOX", "OWL"], [left, owl, right]) == want
    assert match_regions(["RED FOX", "OWL"], [right, left])[0].text == "FOX RED"  # as it was read, not as it was wanted


def test_pieces_of_a_line_are_joined():
    joined = join([found("RED", 1.0, (0.1, 0.2, 0.3, 0.4)), found("FOX", 0.5, (0.4, 0.1, 0.6, 0.3))])
    assert joined == found("RED FOX", 0.75, (0.1, 0.1, 0.6, 0.4))


def test_pixels_round_and_clip():
    image = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0, torch.nan]).expand(1, 3, 1, 6)
    assert to_pixels(image)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]


@needs_tesseract
@pytest.mark.parametrize("score", ["mixed", "exact", "ned", "paper"])
def test_the_reward_of_what_was_asked_is_the_highest(score):
    image, prompt = render(["RED", "FOX"], "sans", "ink", (32, 64))
    other = render(["OLD", "HEN"], "sans", "ink", (32, 64))[0]
    half = render(["RED", "HEN"], "sans", "ink", (32, 64))[0]
    images = torch.from_numpy(np.stack([image, half, other])).permute(0, 3, 1, 2)
    reward = OCRReward(OCRConfig(engine="tesseract", score=score, workers=0))
    told = reward(images.float() / 255, [prompt] * 3)
    assert torch.equal(told.value, reward(images, [prompt] * 3).value)
    assert told.parts["word_accuracy"].tolist() == [1.0, 0.5, 0.0]
    assert [[piece.text for piece in pieces] for pieces in told.found] == [["RED", "FOX"], ["RED", "HEN"], ["OLD", "HEN"]]
    if score == "paper":
        assert told.region_value is None
        assert told.value[0] > told.value[1] > told.value[2]
        assert 1.2 < told.value[0] <= 2
    else:
        assert torch.equal(told.region_value.sum(1), told.value)
        assert told.region_value[:2, 0].tolist() == [0.5, 0.5]
        assert told.value[0] == 1.0
    reward.close()


@needs_tesseract
def test_regions_without_boxes_are_found_and_padded():
    image, prompt = render(["RED", "FOX"], "sans", "ink", (32, 64))
    boxless = Prompt(text="FOX|RED", regions=(Region(text="FOX"), Region(text="RED")))
    single = Prompt(text="RED FOX", regions=(Region(text="RED FOX"),))
    images = torch.from_numpy(image).permute(2, 0, 1).expand(2, 3, 32, 64)
    reward = OCRReward(OCRConfig(engine="tesseract", workers=0))
    told = reward(images, [boxless, single])
    assert told.value.tolist() == [1.0, 1.0]
    assert told.region_value[0].tolist() == [0.5, 0.5]
    assert told.region_value[1, 0] == 1.0
    assert told.region_value[1, 1].isnan()
    fox, red = prompt.regions[1].box, prompt.regions[0].box
    torch.testing.assert_close(told.region_box[0], torch.tensor([fox, red]), rtol=0, atol=1.5 / 32)
    reward.close()


@pytest.mark.parametrize("score", ["mixed", "exact", "ned", "letters", "paper"])
def test_region_boxes_are_the_prompts_except_for_the_paper(corner, score):
    """Credit must not move with the outcome where the prompt says where its regions are."""
    reward = OCRReward(OCRConfig(engine="auto", score=score, workers=0))
    reward.pool = ReaderPool(corner, workers=0, timeout=1.0)
    known, unknown = (Prompt(regions=(Region(text="5", box=box),)) for box in ((0.25, 0.25, 0.75, 0.75), None))
    told = reward(torch.full((2, 3, 4, 4), 5 / 255), [known, unknown])
    read = [0.0, 0.0, 1.0, 1.0]
    assert told.region_box[0].tolist() == [read if score == "paper" else [0.25, 0.25, 0.75, 0.75]]
    assert told.region_box[1].isnan().all() if score == "letters" else told.region_box[1].tolist() == [read]
    reward.close()


@pytest.mark.parametrize(("score", "value"), [("mixed", 1.0), ("paper", 0.75 + 1.0 - 0.6 * 3 / 15)])
def test_the_papers_reward_counts_all_that_was_read(corner, score, value):
    """RED, FOX and another RED of confidence 0.5: the least confidence counts, and three letters are too many."""
    reward = OCRReward(OCRConfig(engine="auto", score=score, workers=0))
    reward.pool = ReaderPool(corner, workers=0, timeout=1.0)
    told = reward(torch.full((1, 3, 4, 4), 70 / 255), [Prompt(regions=(Region(text="RED"), Region(text="FOX")))])
    assert told.value.item() == pytest.approx(value, abs=1e-6)
    reward.close()


def test_a_failed_reading_is_nan_and_keeps_the_prompts_box(corner):
    reward = OCRReward(OCRConfig(engine="tesseract", workers=0)) if find_tessdata() else OCRReward(OCRConfig(engine="rapidocr", workers=0))
    reward.pool = ReaderPool(corner, workers=0, timeout=1.0)
    box = (0.25, 0.25, 0.75, 0.75)
    prompt = Prompt(text="68", regions=(Region(text="68", box=box),))
    images = torch.full((1, 3, 4, 4), 68 / 255)
    told = reward(images, [prompt])
    assert told.value.isnan().all()
    assert told.region_value.isnan().all()
    assert all(part.isnan().all() for part in told.parts.values())
    assert told.region_box.tolist() == [[list(box)]]
    assert told.found == ((),)
    reward.close()


def test_a_picture_that_is_not_finite_is_a_failed_one(corner):
    reward = OCRReward(OCRConfig(engine="auto", workers=0))
    reward.pool = ReaderPool(corner, workers=0, timeout=1.0)
    images = torch.full((2, 3, 4, 4), 5 / 255)
    images[1, 0, 3, 3] = torch.nan
    told = reward(images, [Prompt(text="5", regions=(Region(text="5", box=(0.0, 0.0, 1.0, 1.0)),))] * 2)
    assert told.value.isnan().tolist() == [False, True]
    assert told.value[0] == 1.0
    reward.close()


def test_letters_that_no_reader_knows_are_named_once(corner, caplog):
    reward = OCRReward(OCRConfig(engine="auto", workers=0))
    reward.pool = ReaderPool(corner, workers=0, timeout=1.0)
    for text in ("route", "5É", "5"):
        reward(torch.full((1, 3, 4, 4), 5 / 255), [Prompt(regions=(Region(text=text),))])
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "prompts ask for 5É, which the reader does not answer with: add them to the OCR reward's `letters`."
    ]
    reward.close()


def test_a_prompt_without_text_cannot_be_judged(corner):
    reward = OCRReward(OCRConfig(engine="auto", workers=0))
    with pytest.raises(RewardError, match="a red cube"):
        reward(torch.zeros(1, 3, 4, 4), [Prompt(text="a red cube")])
    reward.close()
