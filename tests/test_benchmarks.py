"""Benchmarks: prompts as their authors write them, pictures where their scorers look, by address and only once, numbers by hand."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import TINY, TINY_RASTER, save_tiny, snapshot, status
from tiny_vision import save_clip
from varl.build import build_reward
from varl.checkpoints import model as model_folder
from varl.cli import evaluation, shard_of
from varl.config import CLIPScoreConfig, LawConfig, NextScaleConfig, OCRConfig, TextConfig, VQAConfig
from varl.data.words import render
from varl.errors import ConfigError, DataError
from varl.eval.benchmarks import BENCHMARKS, read_items
from varl.eval.benchmarks.benchmark import Answers, Item, by_value
from varl.eval.benchmarks.cvtg import quoted, word_shares
from varl.eval.benchmarks.dpg import Question, tree_score
from varl.eval.benchmarks.gallery import ROOM, Gallery, Shard, draw_gallery, make_sheet
from varl.eval.benchmarks.score import ask_all, clustered, score_rows
from varl.eval.benchmarks.t2i_compbench import phrases
from varl.eval.words import share_interval
from varl.models.vqa import Asked
from varl.policies.next_scale import NextScalePolicy
from varl.rewards.geneval import GenEval
from varl.rewards.ocr_reward import OCRReward
from varl.rewards.toy import brightness
from varl.rewards.vqa import VQA
from varl.rng import Stream
from varl.types import Judgement, Prompt, Region, Wanted

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ',.0123456789"
READS = NextScaleConfig(
    depth=1, width=16, heads=2, grids=((1, 1), (2, 2)), text=TextConfig(alphabet=LETTERS, max_length=60), tokenizer=TINY.tokenizer
)
"""5 tokens, 16x16 pixels."""
DPG_HEAD = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"


# ---- files as their authors write them --------------------------------------------------------------------------------------------------


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    return file


def geneval(folder: Path) -> Path:
    lines = [
        '{"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}], "prompt": "two cups"}',
        '{"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a red cup"}',
        '{"tag": "counting", "include": [{"class": "fox", "count": 4}], "prompt": "four foxes"}',
    ]
    return write(folder / "evaluation_metadata.jsonl", "\n".join(lines) + "\n")


def dpg(folder: Path) -> Path:
    rows = [
        'b2,"A fox, asleep.",,1,0,entity,whole,entity - whole (fox),Is there a fox?',
        'b2,"A fox, asleep.",,2,1,attribute,state,"attribute - state (fox, asleep)",Is the fox asleep?',
        "a1,A cup.,,1,0,entity,whole,entity - whole (cup),Is there a cup?",
    ]
    write(folder / "dpg_bench/dpg_bench.csv", "\n".join([DPG_HEAD, *rows]))
    write(folder / "dpg_bench/prompts/b2.txt", "A fox, asleep.\n")
    write(folder / "dpg_bench/prompts/a1.txt", "A cup.")
    return folder / "dpg_bench"


def t2i(folder: Path) -> Path:
    write(folder / "dataset/color_val.txt", "a red cup and a blue fox\r\na green cup\r\n")
    write(folder / "dataset/color_val_seen.txt", "no list of its own\n")
    write(folder / "dataset/complex_val.txt", "The red cup is on the fox.\tof a table\n")
    return folder / "dataset"


def hpsv3(folder: Path) -> Path:
    def part(category: str, *names: str) -> str:
        return json.dumps([{"caption": f"a {name}", "category": category, "image_file": f"images/{name}.jpg"} for name in names])

    write(folder / "benchmark/benchmark_Food.json", part("Food", "cake", "pie"))
    write(folder / "benchmark/benchmark_Natural Scenery.json", part("Natural Scenery", "hill"))
    return folder / "benchmark"


def cvtg(folder: Path) -> Path:
    def part(*prompts: tuple[int, str]) -> str:
        return json.dumps({"data_list": [{"index": i, "prompt": text, "carrier_list": [], "sentence_list": []} for i, text in prompts]})

    write(folder / "CVTG-2K/CVTG/2.json", part((0, "A sign 'OPEN' and a door 'No 7'."), (4, "A cup 'TEA' by a box 'SALT'.")))
    write(folder / "CVTG-2K/CVTG/2_combined.json", part((0, "none of these")))
    write(folder / "CVTG-2K/CVTG-style/3.json", part((0, "Three cups 'A', 'B' and 'C'.")))
    return folder / "CVTG-2K"


def drawbench(folder: Path) -> Path:
    return write(folder / "drawbench.csv", 'Prompts,Category\nA red cup.,Colors\n"A cup, a fox.",Counting\nA blue cup.,Colors\n')


WRITERS = {"geneval": geneval, "dpg": dpg, "t2i-compbench": t2i, "hpsv3": hpsv3, "cvtg": cvtg, "drawbench": drawbench}
PLACES = {
    "geneval": {f"0000{i}/{name}" for i in range(3) for name in ("metadata.jsonl", "grid.png", "samples/0000.png", "samples/0001.png")},
    "dpg": {"a1.png", "b2.png"},
    "t2i-compbench": {
        *(f"color/samples/a red cup and a blue fox_00000{i}.png" for i in (0, 1)),
        *(f"color/samples/a green cup_00000{i}.png" for i in (2, 3)),
        *(f"complex/samples/The red cup is on the fox._00000{i}.png" for i in (0, 1)),
    },
    "hpsv3": {f"{name}.{kind}" for name in ("Food/cake", "Food/pie", "Natural Scenery/hill") for kind in ("png", "txt")},
    "cvtg": {"CVTG/2/0.png", "CVTG/2/4.png", "CVTG-Style/3/0.png"},
    "drawbench": {f"0000{i}_{k}.png" for i in range(3) for k in (0, 1)},
}
SAMPLES = {"geneval": 2, "dpg": 4, "t2i-compbench": 2, "hpsv3": 1, "cvtg": 1, "drawbench": 2}


def items_of(command: str, folder: Path) -> list[Item]:
    return read_items(BENCHMARKS[command], WRITERS[command](folder))


def test_prompts_are_read_with_what_their_authors_tell(tmp_path):
    told = {command: [(item.prompt.text, item.category) for item in items_of(command, tmp_path)] for command in WRITERS}
    assert told == {
        "geneval": [("two cups", "counting"), ("a red cup", "colors"), ("four foxes", "counting")],
        "dpg": [("A cup.", ""), ("A fox, asleep.", "")],
        "t2i-compbench": [
            ("a red cup and a blue fox", "color"),
            ("a green cup", "color"),
            ("The red cup is on the fox.", "complex"),
        ],
        "hpsv3": [("a cake", "Food"), ("a pie", "Food"), ("a hill", "Natural Scenery")],
        "cvtg": [
            ("A sign 'OPEN' and a door 'No 7'.", "2 texts"),
            ("A cup 'TEA' by a box 'SALT'.", "2 texts"),
            ("Three cups 'A', 'B' and 'C'.", "3 texts"),
        ],
        "drawbench": [("A red cup.", "Colors"), ("A cup, a fox.", "Counting"), ("A blue cup.", "Colors")],
    }
    cups = items_of("geneval", tmp_path)[0].prompt
    assert (cups.objects, cups.unwanted) == ((Wanted(name="cup", count=2),), (Wanted(name="cup", count=3),))
    assert items_of("cvtg", tmp_path)[0].prompt.words == ("OPEN", "No", "7")
    assert items_of("dpg", tmp_path)[1].about == (
        Question(number=1, parents=(), category="entity", text="Is there a fox?"),
        Question(number=2, parents=(1,), category="attribute", text="Is the fox asleep?"),
    )


def test_one_file_of_several_is_a_benchmark_too(tmp_path):
    color = read_items(BENCHMARKS["t2i-compbench"], t2i(tmp_path) / "color_val.txt")
    assert [item.category for item in color] == ["color", "color"]
    food = read_items(BENCHMARKS["hpsv3"], hpsv3(tmp_path) / "benchmark_Food.json")
    assert [item.name for item in food] == ["cake", "pie"]


@pytest.mark.parametrize("other", WRITERS)
@pytest.mark.parametrize("command", WRITERS)
def test_another_benchmarks_files_are_told(command, other, tmp_path):
    path = WRITERS[other](tmp_path)
    if command == other:
        assert read_items(BENCHMARKS[command], path)
        return
    with pytest.raises(DataError, match=re.escape(str(path))) as refused:
        read_items(BENCHMARKS[command], path)
    assert str(refused.value).endswith(f"{BENCHMARKS[command].expects}. It looks like {BENCHMARKS[other].title}: use `varl eval {other}`.")


def broken(folder: Path, command: str, file: str, text: str) -> str:
    """What is said of a benchmark whose `file` holds `text`."""
    path = WRITERS[command](folder)
    write(path if path.is_file() else path / file, text)
    with pytest.raises(DataError) as refused:
        read_items(BENCHMARKS[command], path)
    return str(refused.value)


GOOD = '{"tag": "colors", "include": [], "prompt": "a cup"}'
ENTRY = '{"caption": "a cup", "category": "Food", "image_file": "0.jpg"}'


@pytest.mark.parametrize(
    ("command", "file", "text", "says"),
    [
        ("geneval", "", f"{GOOD}\n{{", "evaluation_metadata.jsonl:2: '{' is not JSON"),
        ("geneval", "", f'{GOOD}\n\n{{"tag": "a", "include": []}}', "jsonl:3: 'prompt' must be a text, and is None."),
        ("geneval", "", GOOD.replace("[]", '[{"class": "cup", "count": 0}]'), "jsonl:1: count=0 of 'cup': must be 1 or more."),
        ("geneval", "", f'{GOOD}\n{{"tag": "a", "prompt": "a"}}', "jsonl:2: 'include' must be a list, and is None."),
        ("geneval", "", "plain text", "is not GenEval, which is read from evaluation_metadata.jsonl"),
        ("drawbench", "", "Prompts,Category\na,Colors\nb\n", "drawbench.csv:3: the row ends before Category."),
        ("drawbench", "", "Prompts,Category\n", "holds no prompt."),
        ("hpsv3", "benchmark_Food.json", f"[{ENTRY}, 3]", "benchmark_Food.json, entry 1: 'caption' must be a text, and is None."),
        ("hpsv3", "benchmark_Food.json", f"[{ENTRY}, {ENTRY}]", "2 prompts would share the file Food/0.png."),
        ("hpsv3", "benchmark_Food.json", f"[{ENTRY.replace('Food', '..')}]", "'../0.png' is no file name."),
        ("hpsv3", "benchmark_Natural Scenery.json", "{}", "Natural Scenery.json: is no list of prompts."),
        ("t2i-compbench", "color_val.txt", "a cup\nred/blue cup\n", "color_val.txt:2: 'red/blue cup' cannot be a file name"),
        ("t2i-compbench", "color_val.txt", "a red_cup\n", "no `/`, no `_`, at most 244 bytes."),
        ("t2i-compbench", "color_val.txt", "a" * 245, "cannot be a file name"),
        ("cvtg", "CVTG/2.json", '{"data_list": [{"prompt": "a"}]}', "2.json, entry 0: 'index' must be a text, and is None."),
        ("cvtg", "CVTG-style/3.json", "[]", "3.json: 'data_list' must be a list"),
        ("dpg", "dpg_bench.csv", f"{DPG_HEAD}\na1,,,1,0,,,e,q\n", "has no question about b2, of which"),
        (
            "dpg",
            "dpg_bench.csv",
            f"{DPG_HEAD}\na1,,,1,0,,,e,q\nb2,,,1,one,,,e,q\n",
            "dpg_bench.csv:3: proposition_id and dependency must be",
        ),
        ("dpg", "dpg_bench.csv", DPG_HEAD.replace("tuple", "pair"), "is not DPG-Bench, which is read from the folder dpg_bench"),
    ],
)
def test_faults_are_told_with_their_place(command, file, text, says, tmp_path):
    assert says in broken(tmp_path, command, file, text)


def test_nothing_there(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no such file or folder\. DrawBench is read from a CSV file"):
        read_items(BENCHMARKS["drawbench"], tmp_path / "x.csv")


# ---- drawing ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "model", READS)


@pytest.fixture(scope="module")
def load(folder):
    policy = NextScalePolicy(*model_folder.load(folder), sample_law=LawConfig(), score_law=LawConfig())  # type: ignore[arg-type]
    return lambda: policy


def gallery_of(command: str, folder: Path, samples: int | None = None) -> Gallery:
    items = items_of(command, folder / "asked")
    return Gallery(benchmark=BENCHMARKS[command], items=items, samples=samples or SAMPLES[command], folder=folder / "out")


def drawn(load, gallery: Gallery, **changes) -> dict[str, str]:
    """A hash of every file."""
    draw_gallery(load, gallery, **{"seed": 3, "batch": 4, "settings": {"law": "plain"}, **changes})
    return snapshot(gallery.folder)


def refused():
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("command", WRITERS)
def test_pictures_lie_where_the_scorer_looks(command, load, tmp_path):
    """Nothing else lies there. Drawn by two processes and in other batches they are the same, and none is drawn again."""
    gallery = gallery_of(command, tmp_path)
    files = drawn(load, gallery)
    assert {name.removeprefix("pictures/") for name in files} == PLACES[command] | {"settings.json"}
    ticks: list[int] = []
    assert drawn(refused, gallery, tick=ticks.append) == files
    assert ticks == [len(gallery.items) * gallery.samples]
    halves = gallery_of(command, tmp_path / "halves")
    for index in (1, 0):
        drawn(load, halves, batch=3, shard=Shard(index=index, count=2))
    assert snapshot(halves.folder) == files
    assert drawn(load, gallery_of(command, tmp_path / "seed"), seed=4).keys() == files.keys()
    assert snapshot(tmp_path / "seed/out") != files


def test_geneval_keeps_its_lines(load, tmp_path):
    gallery = gallery_of("geneval", tmp_path)
    drawn(load, gallery)
    lines = (tmp_path / "asked/evaluation_metadata.jsonl").read_text().splitlines(keepends=True)
    assert [(tmp_path / f"out/pictures/0000{i}/metadata.jsonl").read_text() for i in range(3)] == lines
    with Image.open(tmp_path / "out/pictures/00001/grid.png") as grid:
        assert grid.size == (32, 16)
        assert np.array_equal(np.asarray(grid)[:, 16:], gallery.load(1)[1].permute(1, 2, 0))


def test_hpsv3_has_its_captions(load, tmp_path):
    drawn(load, gallery_of("hpsv3", tmp_path))
    assert (tmp_path / "out/pictures/Natural Scenery/hill.txt").read_text() == "a hill"


@pytest.mark.parametrize("command", ["geneval", "dpg"])
def test_what_was_lost_is_drawn_again_as_it_was(command, load, tmp_path):
    gallery = gallery_of(command, tmp_path)
    files = drawn(load, gallery)
    lost = gallery.files(1)[-1]
    lost.unlink()
    ticks: list[int] = []
    assert drawn(load, gallery, tick=ticks.append) == files
    assert ticks == ([5, 1] if command == "geneval" else [4, 4])


def test_an_interrupted_drawing_goes_on(load, tmp_path):
    files = drawn(load, gallery_of("geneval", tmp_path))

    class Killed(Exception):
        pass

    def kill(pictures: int, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(pictures)
        if len(seen) == 3:  # nothing was there, two batches are drawn
            raise Killed

    again = gallery_of("geneval", tmp_path / "again")
    with pytest.raises(Killed):
        drawn(load, again, batch=2, tick=kill)
    assert sum(len(again.missing(i)) for i in range(3)) == 2
    assert drawn(load, again, batch=2) == files


def test_a_picture_has_its_own_address(load, tmp_path):
    """Picture k of item i at (seed, "eval", benchmark, 1000 i + k), however many are drawn."""
    two, three = gallery_of("drawbench", tmp_path / "two"), gallery_of("drawbench", tmp_path / "three", samples=3)
    drawn(load, two)
    drawn(load, three)
    for i in range(3):
        assert torch.equal(two.load(i), three.load(i)[:2])
    rng = Stream(seed=3, path=("eval", "drawbench"), rows=(2 * ROOM + 1,))
    policy = load()
    picture = policy.decode(policy.rollout([Prompt(text="A blue cup.")], rng))
    assert torch.equal(two.load(2)[1], (picture[0].clamp(0, 1) * 255).round().to(torch.uint8))


def test_settings_are_told_and_others_refused(load, tmp_path):
    gallery = gallery_of("drawbench", tmp_path)
    drawn(load, gallery, noted={"commit": "a"})
    told = json.loads((tmp_path / "out/settings.json").read_text())
    assert told == {"benchmark": "drawbench", "seed": 3, "samples": 2, "law": "plain", "commit": "a"}
    drawn(refused, gallery, noted={"commit": "b"})
    with pytest.raises(ConfigError, match=r"drawn otherwise: seed was 3, is 4; law was plain, is other\. Give another --out"):
        drawn(refused, gallery, seed=4, settings={"law": "other"}, noted={"commit": "a"})
    (tmp_path / "out/settings.json").unlink()
    with pytest.raises(ConfigError, match=re.escape("no evaluation drew it (it has no settings.json)")):
        drawn(refused, gallery)


def test_sheets():
    """Three pictures of 1x2 pixels, two in a row."""
    pictures = torch.arange(18, dtype=torch.uint8).view(3, 3, 1, 2)
    assert make_sheet(pictures)[0].tolist() == [[0, 1, 6, 7], [12, 13, 0, 0]]
    assert torch.equal(make_sheet(pictures[:1]), pictures[0])


def test_a_sheet_is_taken_apart(load, tmp_path):
    gallery = gallery_of("dpg", tmp_path)
    drawn(load, gallery)
    assert torch.equal(gallery.load(0)[2], torch.from_numpy(np.array(Image.open(gallery.files(0)[0]))).permute(2, 0, 1)[:, 16:, :16])
    Image.new("RGB", (32, 33)).save(gallery.files(0)[0])
    with pytest.raises(DataError, match=r"a1\.png: is 33x32 pixels and no sheet of 4 pictures"):
        gallery.load(0)


# ---- numbers ----------------------------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_prompts():
    """Equal numbers of pictures: the interval of `varl eval words`."""
    hits = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1])
    value, half = clustered([(i // 2, (hit, 1.0)) for i, hit in enumerate(hits.tolist())])
    assert (value, half) == pytest.approx(share_interval(hits, 2), abs=1e-6)


def test_a_ratio_of_sums_by_hand():
    """3 of 4 words, 0 of 2: 1/2; residues 3 - 2 and 0 - 1; sqrt(2 / 1 * 2) / 6."""
    value, half = clustered([(0, (3.0, 4.0)), (1, (0.0, 2.0)), (2, (math.nan, 5.0))])
    assert value == 0.5
    assert half == pytest.approx(1.96 * 2 / 6)
    assert math.isnan(clustered([(0, (1.0, 1.0))])[1])
    assert all(map(math.isnan, clustered([(0, (math.nan, 1.0))])))


def rows_of(gallery: Gallery, answers: Answers) -> dict[str, dict]:
    return {row["category"]: row for row in score_rows(answers, gallery)}


def test_rows_by_hand(tmp_path):
    """Two counting prompts (means 1/2 and 1) and one of colours (0): GenEval counts tags alike, DrawBench pictures, T2I-CompBench none."""
    by_tag = {"m": [{"counting": (1.0, 1.0)}, {"counting": (0.0, 1.0)}, *[{"colors": (0.0, 1.0)}] * 2, *[{"counting": (1.0, 1.0)}] * 2]}
    rows = rows_of(gallery_of("geneval", tmp_path), by_tag)
    assert list(rows) == ["counting", "colors", "overall"]
    assert (rows["counting"]["m"], rows["colors"]["m"], rows["overall"]["m"]) == (0.75, 0.0, 0.375)
    half = 1.96 * math.sqrt(2 * (0.5**2 + 0.5**2)) / 4
    assert rows["counting"]["m_ci95"] == pytest.approx(half)
    assert math.isnan(rows["overall"]["m_ci95"])  # one prompt of colours has no interval
    assert (rows["counting"]["prompts"], rows["counting"]["pictures"], rows["overall"]["pictures"]) == (2, 4, 6)
    rows = rows_of(gallery_of("drawbench", tmp_path / "d"), by_tag)
    assert rows["overall"]["m"] == 0.5
    assert "overall" not in rows_of(gallery_of("t2i-compbench", tmp_path / "t"), {})


def test_failures_are_left_out_and_counted(tmp_path):
    values = [1.0, math.nan, 3.0, 3.0, math.nan, math.nan]
    items = [item for item in items_of("drawbench", tmp_path) for _ in range(2)]
    answers = {"m": [{item.category: (value, 1.0)} for item, value in zip(items, values, strict=True)]}
    rows = rows_of(gallery_of("drawbench", tmp_path), answers)
    assert (rows["Colors"]["m"], rows["Colors"]["m_failed"]) == (1.0, 0.75)
    assert (rows["overall"]["m"], rows["overall"]["m_failed"]) == (pytest.approx(7 / 3), 0.5)


def test_judges_are_asked_by_category(load, tmp_path):
    gallery = gallery_of("drawbench", tmp_path)
    drawn(load, gallery)
    answers = ask_all({"bright": brightness}, gallery, batch=3, device=torch.device("cpu"))
    means = [float((gallery.load(i).float() / 255).mean()) for i in range(3)]
    rows = rows_of(gallery, answers)
    assert rows["Colors"]["bright"] == pytest.approx((means[0] + means[2]) / 2, rel=1e-6)
    assert rows["Counting"]["bright"] == pytest.approx(means[1], rel=1e-6)
    assert rows["overall"]["bright"] == pytest.approx(sum(means) / 3, rel=1e-6)


def test_parts_are_measures_too():
    item = Item(prompt=Prompt(text="a"), category="c", name="n")
    judgement = Judgement(value=torch.tensor([2.0]), parts={"cosine": torch.tensor([0.5])})
    assert by_value("clip", lambda images, prompts: judgement, torch.zeros(1, 3, 2, 2), [item]) == {
        "clip": [{"c": (2.0, 1.0)}],
        "clip/cosine": [{"c": (0.5, 1.0)}],
    }


class Sure(Asked):
    """As sure of a yes as the picture is bright; of a blue thing half as sure."""

    tokenise = answer = None  # `yes` is answered without them

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def yes(self, images: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        return [
            torch.tensor([float(image.mean()) / (1 + ("blue" in text)) for text in texts])
            for image, texts in zip(images, questions, strict=True)
        ]


# ---- GenEval


class Corrects(GenEval):
    """Half of every prompt's conditions are met; correct is what is bright."""

    def __init__(self) -> None:
        pass

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> Judgement:
        return Judgement(value=torch.full((len(images),), 0.5), parts={"correct": images.mean((1, 2, 3)).round()})


def test_geneval_counts_what_is_correct(tmp_path):
    images = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    found = BENCHMARKS["geneval"].ask("detector", Corrects(), images, items_of("geneval", tmp_path))
    assert found == {"detector": [{"counting": (0.0, 1.0)}, {"colors": (1.0, 1.0)}, {"counting": (1.0, 1.0)}]}


# ---- T2I-CompBench


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a red cup and a blue fox", ("a red cup", "a blue fox")),
        ("a stop sign and red white line", ("a stop sign", "red white line")),
        ("The round bagel and the oblong baguette.", ("The round bagel", "the oblong baguette")),
        ("a cup", ()),
        ("A green bathroom with a mirror and a pink sink.", ()),
        ("The big house and the small cabin provided different types of rooms.", ()),
    ],
)
def test_phrases(text, want):
    assert phrases(text) == want


def test_attributes_are_a_product_over_phrases(tmp_path):
    """0.5 for the red cup, 0.25 for the blue fox; of "a green cup" alone nothing is known; 0.5 twice for the complex prompt."""
    images = torch.full((3, 3, 2, 2), 0.5)
    found = BENCHMARKS["t2i-compbench"].ask("vqa", VQA(VQAConfig(), Sure()), images, items_of("t2i-compbench", tmp_path))
    assert json.dumps(found) == json.dumps({"vqa": [{"color": (0.125, 1.0)}, {"color": (math.nan, 1.0)}, {"complex": (0.25, 1.0)}]})


# ---- DPG-Bench


def test_a_vqa_is_asked_the_questions(tmp_path):
    cup, fox = items_of("dpg", tmp_path)
    images = torch.tensor([0.6, 0.4]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    found = BENCHMARKS["dpg"].ask("vqa", VQA(VQAConfig(), Sure()), images, [fox, cup])
    assert found["vqa"] == [{"": (1.0, 1.0)}, {"": (0.0, 1.0)}]
    assert found["vqa/yes"] == [{"entity": (1.0, 1.0), "attribute": (1.0, 1.0)}, {"entity": (0.0, 1.0)}]


def questions(*parents: tuple[int, ...]) -> list[Question]:
    return [Question(number=i, parents=above, category="entity", text="?") for i, above in enumerate(parents, 1)]


@pytest.mark.parametrize(
    ("parents", "yes", "score"),
    [
        (((), ()), (True, False), 1 / 2),
        (((), (1,)), (False, True), 0.0),  # what has no fox has no sleeping fox
        (((), (1,)), (True, True), 1.0),
        (((), (1,), (2,)), (False, True, True), 0.0),  # and its grandchildren
        (((), (), (1, 2)), (True, False, True), 1 / 3),  # both parents are needed
        (((3,), (), (2,)), (True, False, True), 1 / 3),  # of a parent that comes later its own answer is known
        (((9,), ()), (True, False), 1 / 2),  # a parent that nobody asks about
    ],
)
def test_tree_score_by_hand(parents, yes, score):
    assert tree_score(questions(*parents), dict(enumerate(yes, 1))) == pytest.approx(score)


def test_questions_are_asked_of_every_picture(tmp_path):
    """A judge that sees a fox in bright pictures, a cup in all, and no sleep; it fails where it is black."""

    def judge(images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        assert len(images) <= 3
        bright = images.mean((1, 2, 3))
        answers = torch.stack(
            [level if "fox?" in p.text else torch.tensor(float("cup" in p.text)) for level, p in zip(bright, prompts, strict=True)]
        )
        return torch.where(bright == 0, torch.nan, answers)

    cup, fox = items_of("dpg", tmp_path)
    images = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    found = BENCHMARKS["dpg"].ask("vqa", judge, images, [cup, fox, fox])
    told = json.dumps(found)  # NaN is not equal to itself
    assert told == json.dumps(
        {
            "vqa": [{"": (1.0, 1.0)}, {"": (0.5, 1.0)}, {"": (math.nan, 1.0)}],
            "vqa/yes": [
                {"entity": (1.0, 1.0)},
                {"entity": (1.0, 1.0), "attribute": (0.0, 1.0)},
                {"entity": (math.nan, 1.0), "attribute": (math.nan, 1.0)},
            ],
        }
    )
    one = Gallery(benchmark=BENCHMARKS["dpg"], items=[cup, fox], samples=1, folder=tmp_path)
    rows = rows_of(one, {name: pictures[:2] for name, pictures in found.items()})
    assert list(rows) == ["entity", "attribute", "overall"]
    assert (rows["entity"]["vqa/yes"], rows["attribute"]["vqa/yes"], rows["overall"]["vqa"]) == (1.0, 0.0, 0.75)


# ---- CVTG-2K


def test_what_stands_in_quotes():
    assert quoted("A sign 'Tea Time' and 'CUP', it's a shop's door") == ["Tea Time", "CUP", "s a shop"]  # as the scorer takes them
    assert quoted("no words, '' or ' '") == []


def test_word_shares_by_hand():
    """Case does not count; one reading answers twice; "sail" is one letter of four from the nearest to "SALT"."""
    right, likeness = word_shares(["TEA", "tea", "SALT"], ["Tea", "sail", "x"])
    assert right == 2
    assert likeness == pytest.approx(2 * 1 + 1 - 2 / (4 + 1e-5))
    assert word_shares(["TEA"], []) == (0, pytest.approx(1 - 3 / (3 + 1e-5)))


def test_clip_score_is_the_scorers(tmp_path):
    """2.5 max(cosine, 0), where a library's is 100 max(cosine, 0), with the scorer's first words."""
    items = items_of("cvtg", tmp_path)
    judge = build_reward(CLIPScoreConfig(model=str(save_clip(tmp_path / "clip"))))
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    found = BENCHMARKS["cvtg"].ask("clip", judge, images, items)
    prompts = [Prompt(text=f"A photo depicts {item.prompt.text}") for item in items]
    want = judge(images, prompts)
    assert isinstance(want, Judgement)
    got = [next(iter(share.values())) for share in found["clip"]]
    assert [n for n, _ in got] == pytest.approx((want.value / 40).tolist(), abs=1e-6)
    assert {d for _, d in got} == {1.0}
    assert sum(n > 0 for n, _ in got) > 0


def test_words_are_read():
    """One of two words is there; a picture of which no word is asked; one that cannot be read."""
    pixels = torch.from_numpy(render(["TEA"], "sans", "ink", (16, 64))[0]).permute(2, 0, 1)
    images = (pixels.float() / 255).expand(3, -1, -1, -1).clone()
    images[2, 0, 0, 0] = torch.nan
    regions = tuple(Region(text=text) for text in ("tea", "X"))
    asked = [Prompt(text="'tea' and 'X'", regions=regions), Prompt(text="a cup"), Prompt(text="'tea' and 'X'", regions=regions)]
    items = [Item(prompt=prompt, category="2 texts", name="n") for prompt in asked]
    reader = OCRReward(OCRConfig(workers=0))
    found = BENCHMARKS["cvtg"].ask("ocr", reader, images, items)
    reader.close()
    near = 2 - 3 / (3 + 1e-5)  # "X" is nothing like "TEA"
    assert json.dumps(found["ocr/word_accuracy"]) == json.dumps([{"2 texts": (1.0, 2.0)}, {}, {"2 texts": (math.nan, 2.0)}])
    assert found["ocr/ned"][0]["2 texts"] == (pytest.approx(near), 2.0)


# ---- the commands -----------------------------------------------------------------------------------------------------------------------


def test_a_command_draws_then_scores(folder, tmp_path, capfd):
    """Two shards, then the numbers; the second time nothing is drawn."""
    path, out = drawbench(tmp_path), tmp_path / "out"
    command = ["eval", "drawbench", folder, path, "--out", out, "--samples", 2, "--quiet"]
    assert status(*command, "--shard", "1/2") == 0
    assert "4 pictures are left to the other shards." in capfd.readouterr().out
    judges = write(tmp_path / "judges.yaml", 'red: {reward: {kind: python, target: "varl.rewards.toy:redness"}}\n')
    rewards = ["--reward", "bright={kind: python, target: varl.rewards.toy:brightness}", "--reward", judges]
    assert status(*command, *rewards) == 0
    said = capfd.readouterr().out
    assert f"pictures {out}/pictures\n" in said
    assert said.endswith(f"{out}/scores.json\n")
    told = json.loads((out / "scores.json").read_text())
    gallery = Gallery(benchmark=BENCHMARKS["drawbench"], items=read_items(BENCHMARKS["drawbench"], path), samples=2, folder=out)
    colors, counting, overall = told["rows"]
    assert (colors["category"], colors["prompts"], counting["pictures"], overall["category"]) == ("Colors", 2, 2, "overall")
    assert counting["bright"] == pytest.approx(float((gallery.load(1).float() / 255).mean()), rel=1e-6)
    assert {"red", "red_ci95", "red_failed"} <= overall.keys()
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["seed"], settings["cfg_scale"], settings["folder"]) == (1234, [1.0], str(folder))
    assert {"model", "prompts", "dtype", "varl", "commit"} <= settings.keys()
    files = snapshot(out)
    assert status(*command, *rewards) == 0
    assert snapshot(out) == files
    assert status(*command, "--seed", 5) == 2
    assert "drawn otherwise: seed was 1234, is 5" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("drawbench", ["--reward", "clip_score={kind: clip_score, model: no/such}"], "clip_score.model='no/such'"),
        ("drawbench", ["--reward", "hsp"], "reward.kind='hsp': must be one of"),
        ("drawbench", ["--reward", "no.yaml"], "--reward no.yaml: there is no such file."),
        ("drawbench", ["--reward", "a={kind: ocr}", "--reward", "a=ocr"], "--reward a=ocr: the name a is taken."),
        ("drawbench", ["--reward", "dino"], "dino"),
        (
            "drawbench",
            ["--reward", "many={kind: python, target: varl.rewards.groups:pixel_diversity, groupwise: true}"],
            "--reward many: compares the pictures of a group, and a benchmark has none.",
        ),
        ("drawbench", ["--reward", "ocr"], "--reward ocr: 3 of 3 prompts (the first: "),
        ("hpsv3", ["--reward", "vqa"], "no objects to look for"),
        ("drawbench", ["--shard", "2/2"], "--shard '2/2': must be I/N with I from 0 to N - 1, for example 0/4."),
        ("drawbench", ["--steps", "4"], "unmasking: this model does not choose"),
        ("dpg", ["--samples", "2"], "--samples 2: the scorer of DPG-Bench takes 1 or 4 of each prompt."),
        ("cvtg", ["--samples", "2"], "--samples 2: the scorer of CVTG-2K takes 1 of each prompt."),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_drawn(command, arguments, says, folder, tmp_path, capfd):
    assert status("eval", command, folder, WRITERS[command](tmp_path), "--out", tmp_path / "out", *arguments) == 2
    assert says in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_a_benchmark_is_not_for(tmp_path, capfd):
    """One of classes; one that cannot read the prompts; one whose pictures are no squares."""
    save_tiny(tmp_path / "classes", TINY_RASTER)
    save_tiny(tmp_path / "wide")
    for model, command, says in [
        ("classes", "drawbench", "this model draws classes and reads no text, which DrawBench is made of."),
        ("wide", "drawbench", "which the encoder lacks"),
        ("wide", "dpg", "its pictures are 16x32 (height x width), and the scorer of DPG-Bench cuts squares."),
    ]:
        assert status("eval", command, tmp_path / model, WRITERS[command](tmp_path), "--out", tmp_path / "out") == 2
        assert says in capfd.readouterr().err


def test_torchrun_shares_the_prompts(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert shard_of(None) == (2, 3)
    with pytest.raises(ConfigError, match="torchrun has started 3 processes"):
        shard_of("0/2")


def test_every_benchmark_has_its_command():
    assert set(BENCHMARKS) < {command.name for command in evaluation.registered_commands}
