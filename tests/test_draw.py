"""Pictures for evaluators: bytes by hand, prompts by address, shards that survive, one file that is always the same."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import TINY_RASTER, save_tiny, snapshot
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import write_tensors
from varl.config import LawConfig
from varl.errors import ConfigError, DataError
from varl.eval.draw import draw_pictures, draw_shard, prompt_of, to_bytes
from varl.eval.features import open_pictures
from varl.policies.raster import RasterPolicy
from varl.types import Prompt

SHARDS = ((0, 20), (20, 40), (40, 50))
CLASSES = [Prompt(label=label) for label in range(5)]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("model") / "model", TINY_RASTER)

    def loaded(law: LawConfig = LawConfig()) -> RasterPolicy:
        return RasterPolicy(*model_folder.load(folder), sample_law=law, score_law=law)  # type: ignore[arg-type]

    return loaded


@pytest.fixture
def draw(load, monkeypatch):
    """50 pictures in shards of 20."""
    monkeypatch.setattr("varl.eval.draw.SHARD", 20)
    return partial(draw_pictures, load, CLASSES, count=50, seed=3, size=(12, 12), batch=8, settings={"law": "plain"})


def arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as found:
        return dict(found)


# ---- bytes


def test_bytes_by_hand():
    """What is out of range is cut, then fractions are."""
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 0.999, 1.0, 3.0])
    want = [0, 0, 128, 191, 255, 255, 255]  # 127.5 v + 128 = -127, .5, 128, 191.75, 255.4, 255.5, 510.5
    assert to_bytes(values.expand(1, 3, 1, 7), (1, 7))[0, 0, 0].tolist() == want


def test_pictures_are_resized_before_they_are_cut():
    """Halved by the cubic of a = -3/4 at a half, unsmoothed: (-3, 19, 19, -3) / 32 of four neighbours. Cut first, the 3 would be a 1."""
    row = torch.tensor([0.0, 0.0, 3.0, -1.0, -1.0, -1.0])
    halved = to_bytes(row.expand(1, 3, 6, 6), (3, 3))[0, 0, 1].tolist()
    middle = (-3 * 0 + 19 * 3 + 19 * -1 - 3 * -1) / 32
    assert middle == 41 / 32
    assert halved[1] == 255
    milder = row / 2
    assert to_bytes(milder.expand(1, 3, 6, 6), (3, 3))[0, 0, 1, 1] == math.floor(127.5 * middle / 2 + 128)


# ---- prompts


def test_prompts_are_uniform_and_have_addresses():
    drawn = [prompt_of(CLASSES, 7, row).label for row in range(2000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=5)
    assert (counts - 400).abs().max() < 4 * (2000 * 0.2 * 0.8) ** 0.5
    assert drawn[:50] == [prompt_of(CLASSES, 7, row).label for row in range(50)]
    assert drawn[:50] != [prompt_of(CLASSES, 8, row).label for row in range(50)]


# ---- drawing


def test_a_picture_depends_on_its_index_alone(load):
    policy = load(LawConfig(cfg_scale=(2.0,), temperature=0.9))
    whole = draw_shard(policy, CLASSES, range(23), seed=3, size=(6, 6), batch=23, tick=lambda n: None)
    assert whole.shape == (23, 3, 6, 6)
    assert len({image.numpy().tobytes() for image in whole}) == 23
    parts = [
        draw_shard(policy, CLASSES, rows, seed=3, size=(6, 6), batch=batch, tick=lambda n: None)
        for rows, batch in ((range(10), 3), (range(10, 23), 7))
    ]
    difference = (torch.cat(parts).int() - whole.int()).abs()
    assert difference.max() <= 1  # a sum rounded otherwise may cross a whole number
    assert (difference > 0).float().mean() < 1e-3


def test_the_file_is_the_evaluators(load, draw, tmp_path):
    ticks: list[int] = []
    file = draw(tmp_path / "drawn", tick=ticks.append)
    assert ticks == [8, 8, 4, 8, 8, 4, 8, 2]
    images = arrays(file)
    assert images.keys() == {"arr_0"}
    assert (images["arr_0"].dtype, images["arr_0"].shape) == (np.uint8, (50, 12, 12, 3))
    assert open_pictures(file).size == (12, 12)
    want = [
        draw_shard(load(), CLASSES, range(a, b), seed=3, size=(12, 12), batch=8, tick=ticks.append)
        for a, b in ((0, 20), (20, 40), (40, 50))
    ]
    assert np.array_equal(images["arr_0"], torch.cat(want).permute(0, 2, 3, 1).numpy())
    assert sorted(entry.name for entry in file.parent.iterdir()) == ["pictures.npz", "settings.json"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 6, 8])
def test_an_interrupted_drawing_ends_where_the_unbroken_one_does(draw, load, tmp_path, after):
    unbroken = draw(tmp_path / "unbroken").read_bytes()
    drawn = 0

    def kill(rows: int) -> None:
        nonlocal drawn
        drawn += 1
        if drawn == after:
            raise Killed

    with pytest.raises(Killed):
        draw(tmp_path / "broken", tick=kill)
    whole = [file.name for file in sorted((tmp_path / "broken").glob("*.safetensors"))]
    assert whole == ["000000-000020.safetensors", "000020-000040.safetensors"][: (after - 1) // 3]
    for name in whole[:1]:
        (tmp_path / "broken" / name).unlink()
    assert draw(tmp_path / "broken").read_bytes() == unbroken


def test_what_is_there_is_not_drawn_again(draw, tmp_path):
    draw(tmp_path / "drawn")
    before, ticks = snapshot(tmp_path), list[int]()
    (tmp_path / "drawn" / "000000-000020.safetensors").write_bytes(b"left by a kill after the last rename")

    draw_again(tmp_path / "drawn", tick=ticks.append)
    assert ticks == [50]
    assert snapshot(tmp_path) == before


def test_shards_that_are_there_are_not_drawn_again(draw, tmp_path):
    unbroken = draw(tmp_path / "drawn")
    images = torch.from_numpy(arrays(unbroken)["arr_0"]).permute(0, 3, 1, 2)
    for start, stop in SHARDS:
        write_tensors(tmp_path / "drawn" / f"{start:06d}-{stop:06d}.safetensors", {"images": images[start:stop]})
    kept = unbroken.read_bytes()
    unbroken.unlink()
    assert draw_again(tmp_path / "drawn").read_bytes() == kept


def draw_again(folder: Path, **rest) -> Path:
    """What was drawn, by a model that is not there."""

    def never() -> RasterPolicy:
        raise AssertionError("the model is not needed")

    return draw_pictures(never, CLASSES, folder, count=50, seed=3, size=(12, 12), batch=1, settings={"law": "plain"}, **rest)


# ---- what is wrong


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 4}, "seed was 3, is 4. Give another --out, or remove the folder."),
        ({"count": 60}, "count was 50, is 60"),
        ({"size": (6, 6)}, r"size was \[12, 12\], is \[6, 6\]"),
        ({"settings": {"law": "hot"}}, "law was plain, is hot"),
        ({"settings": {}}, "law was plain, is None"),
    ],
)
def test_pictures_that_were_drawn_otherwise_are_not_mixed(draw, tmp_path, change, said):
    draw(tmp_path / "drawn")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=f"drawn: holds pictures that were drawn otherwise: {said}"):
        draw(tmp_path / "drawn", **change)
    assert snapshot(tmp_path) == before


def test_pictures_of_other_prompts_are_not_mixed(draw, load, tmp_path):
    draw(tmp_path / "drawn")
    with pytest.raises(ConfigError, match=r"drawn otherwise: prompts was [0-9a-f]{16}, is [0-9a-f]{16}"):
        draw_pictures(load, CLASSES[:4], tmp_path / "drawn", count=50, seed=3, size=(12, 12), batch=8, settings={"law": "plain"})


def test_a_folder_that_is_no_place_for_pictures(draw, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match=f"{name}: is there already, and no evaluation drew it"):
            draw(tmp_path / name)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/settings.json").write_text("{")
    with pytest.raises(DataError, match=r"torn/settings\.json: cannot be understood .* Remove the folder"):
        draw(tmp_path / "torn")
    with pytest.raises(DataError, match=r"cannot be written .* make room and run the same command again"):
        draw(Path("/proc/mine"))


def test_a_drawing_that_cannot_begin_leaves_no_trace(draw, load, tmp_path):
    with pytest.raises(ConfigError, match=r"cfg_scale has 2 values, the model 9 tokens"):
        draw_pictures(
            lambda: load(LawConfig(cfg_scale=(1.0, 2.0))),
            CLASSES,
            tmp_path / "drawn",
            count=50,
            seed=3,
            size=(12, 12),
            batch=8,
            settings={},
        )
    assert not (tmp_path / "drawn").exists()


def test_a_half_written_folder_goes_on(draw, tmp_path):
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn/settings.json.tmp-7").write_text("{")
    assert json.loads((draw(tmp_path / "drawn").parent / "settings.json").read_text())["count"] == 50
