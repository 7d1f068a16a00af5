"""Real pictures: the crop, the sources, which picture comes when, and what is wrong with a source."""

import json
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from varl.config import PicturesConfig
from varl.data.folder import write_folder
from varl.data.pictures import centre_crop, read_pictures, subset
from varl.errors import ConfigError, DataError
from varl.types import Prompt

SIZE = (8, 8)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def flat(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


# ---- the crop ---------------------------------------------------------------------------------------------------------------------------


def test_a_picture_of_the_size_is_left_alone():
    picture = noise(8, 8)
    assert np.array_equal(centre_crop(picture, SIZE), np.asarray(picture))


def test_the_middle_is_cut():
    picture = noise(8, 13)
    assert np.array_equal(centre_crop(picture, SIZE), np.asarray(picture)[:, 2:10])
    assert np.array_equal(centre_crop(noise(11, 8), SIZE), np.asarray(noise(11, 8))[1:9])


def test_twice_the_size_is_the_mean_of_two_by_two():
    picture = noise(16, 16)
    mean = np.asarray(picture, float).reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(centre_crop(picture, SIZE) - mean).max() <= 1  # half a level for each axis


def test_halved_twice_then_bicubic_then_cut():
    """100 x 61 pixels to 16 x 16: halved to 50 x 30, which is under twice 16, then bicubic to round(50 * 16 / 30) = 27 x 16, cut from 5."""
    picture = noise(61, 100)
    half = picture.resize((50, 30), Image.Resampling.BOX)
    whole = half.resize((27, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(centre_crop(picture, (16, 16)), np.asarray(whole)[:, 5:21])


def test_no_side_falls_short():
    for height, width, size in ((9, 50, SIZE), (7, 3, SIZE), (33, 20, (8, 24)), (20, 33, (24, 8)), (641, 480, (384, 384))):
        crop = centre_crop(flat((9, 8, 7), (width, height)), size)
        assert crop.shape == (*size, 3)
        assert (crop == (9, 8, 7)).all()


# ---- sources ----------------------------------------------------------------------------------------------------------------------------


def test_a_folder_for_each_class(tmp_path):
    for name, files in {"cat": ["b.png", "a.JPEG"], "ant": ["deep/c.webp"], "zoo": ["x.bmp"]}.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            flat((255, 0, 102)).save(tmp_path / name / file)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    pictures = read_pictures(PicturesConfig(path=str(tmp_path), image_size=SIZE))
    assert pictures.classes == ("ant", "cat", "zoo")
    files = ["ant/deep/c.webp", "cat/a.JPEG", "cat/b.png", "zoo/x.bmp"]
    assert [prompt.image for prompt in pictures.prompts] == [str(tmp_path / file) for file in files]
    assert [(prompt.text, prompt.label) for prompt in pictures.prompts] == [("ant", 0), ("cat", 1), ("cat", 1), ("zoo", 2)]
    image, prompt = list(pictures)[2]
    assert prompt is pictures.prompts[2]
    assert image.shape == (3, 8, 8)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, 0.0, 0.4]))


def test_a_folder_of_pictures_has_no_labels(tmp_path):
    for name in ("b.png", "a.png"):
        noise(8, 8, seed=ord(name[0])).save(tmp_path / name)
    pictures = read_pictures(PicturesConfig(path=str(tmp_path), image_size=SIZE))
    assert [prompt.image for prompt in pictures.prompts] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert {prompt.label for prompt in pictures.prompts} == {None}
    want = np.stack([np.asarray(noise(8, 8, seed=ord(name))) for name in "ba"])
    got = pictures.pixels([pictures.prompts[1], pictures.prompts[0]])
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), want)


def test_lines_with_captions(tmp_path):
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_folder(tmp_path, images, [Prompt(text=f"a picture of {i}") for i in range(3)])
    pictures = read_pictures(PicturesConfig(path=str(tmp_path), image_size=SIZE))
    assert [prompt.text for prompt in pictures.prompts] == ["a picture of 0", "a picture of 1", "a picture of 2"]
    assert torch.equal(pictures.pixels(pictures.prompts), images)


@pytest.fixture
def saved(tmp_path):
    """Writes columns as a saved data set, and reads it as pictures."""

    def write(columns, *, split=None, **settings):
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "cat"])}
        other = {str: datasets.Value("string"), int: datasets.Value("int64")}
        features = {name: kinds.get(name, other[type(cells[0])]) for name, cells in columns.items()}
        data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        (datasets.DatasetDict({split: data}) if split else data).save_to_disk(str(tmp_path / "saved"))
        return read_pictures(PicturesConfig(path=str(tmp_path / "saved"), image_size=SIZE, **settings))

    return write


def files(folder, count):
    for i in range(count):
        noise(8, 8, seed=i).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(count)]


@pytest.mark.parametrize("split", [None, "train"])
def test_a_saved_data_set(tmp_path, saved, split):
    pictures = saved({"image": files(tmp_path, 3), "label": [1, 0, 1]}, split=split)
    assert pictures.classes == ("ant", "cat")
    assert [(prompt.text, prompt.label) for prompt in pictures.prompts] == [("cat", 1), ("ant", 0), ("cat", 1)]
    want = np.stack([np.asarray(noise(8, 8, seed=i)) for i in range(3)])
    assert np.array_equal(pictures.pixels(pictures.prompts).permute(0, 2, 3, 1).numpy(), want)


def test_a_saved_data_set_with_captions(tmp_path, saved):
    pictures = saved({"image": files(tmp_path, 2), "said": ["one", "two"], "id": [7, 8]}, caption="said")
    assert [(prompt.text, prompt.label) for prompt in pictures.prompts] == [("one", None), ("two", None)]


def test_what_is_wrong_with_a_saved_data_set(tmp_path, saved):
    with pytest.raises(DataError, match=r"neither a column `label` nor 'text', but image, said\. Set pictures\.caption"):
        saved({"image": files(tmp_path, 2), "said": ["one", "two"]})
    with pytest.raises(DataError, match=r"no column `image` of pictures, but picture, text"):
        saved({"picture": [1], "text": ["one"]})
    with pytest.raises(DataError, match=r"row 1: text=None must be a string"):
        saved({"image": files(tmp_path, 2), "text": ["one", None]})


def test_a_saved_data_set_of_splits_needs_one(tmp_path, saved):
    with pytest.raises(DataError, match=r"no split 'train'\. Set pictures\.split to one of test"):
        saved({"image": files(tmp_path, 1), "text": ["one"]}, split="test")


def test_a_saved_data_set_that_is_not_whole(tmp_path, saved):
    saved({"image": files(tmp_path, 1), "text": ["one"]})
    (tmp_path / "saved" / "state.json").unlink()
    with pytest.raises(DataError, match=r"saved: cannot be read as a saved data set.*Copy or save it again"):
        read_pictures(PicturesConfig(path=str(tmp_path / "saved")))


def test_a_damaged_row_is_named(tmp_path, saved):
    paths = files(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"no picture")
    pictures = saved({"image": paths, "text": ["one", "two"]})
    with pytest.raises(DataError, match=r"saved#1: cannot be read"):
        pictures.images(pictures.prompts)


def test_a_saved_data_set_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"is a saved data set.*pip install 'varl\[data\]'"):
        read_pictures(PicturesConfig(path=str(tmp_path)))


# ---- which picture comes when -----------------------------------------------------------------------------------------------------------


def test_a_share_is_drawn_once_for_each_seed():
    one, ten = subset(1000, 0.01, seed=3), subset(1000, 0.1, seed=3)
    assert (len(one), len(ten), len(subset(1000, 1.0, seed=3))) == (10, 100, 1000)
    assert set(one) < set(ten)
    assert one == sorted(one) == subset(1000, 0.01, seed=3)
    assert one != subset(1000, 0.01, seed=4)
    assert len(subset(7, 0.01, seed=0)) == 1


def test_a_share_of_a_folder(tmp_path):
    files(tmp_path, 10)
    whole, part = (read_pictures(PicturesConfig(path=str(tmp_path), image_size=SIZE, share=share)) for share in (1.0, 0.3))
    assert part.prompts == tuple(whole.prompts[i] for i in subset(10, 0.3, seed=0))


# ---- what is wrong ----------------------------------------------------------------------------------------------------------------------


def read_all(path):
    pictures = read_pictures(PicturesConfig(path=str(path), image_size=SIZE))
    return pictures.images(pictures.prompts)


def test_a_damaged_picture_is_named(tmp_path):
    noise(32, 32).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:800])
    with pytest.raises(DataError, match=r"cut\.png: cannot be read .*damaged"):
        read_all(tmp_path)


def test_text_under_a_pictures_name_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read"):
        read_all(tmp_path)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_not_cut_off_silently(tmp_path, mode):
    Image.new(mode, (8, 8), 300).save(tmp_path / "deep.tiff")
    with pytest.raises(DataError, match=rf"deep\.tiff: has mode {mode}, more than 8 bits.*Save it"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("mode", "colour", "want"), [("L", 7, [7, 7, 7]), ("1", 1, [255] * 3), ("LA", (7, 0), [255] * 3), ("CMYK", (0, 0, 0, 0), [255] * 3)]
)
def test_other_modes_become_rgb(tmp_path, mode, colour, want):
    Image.new(mode, (8, 8), colour).save(tmp_path / "a.tiff")
    assert (read_all(tmp_path)[0, :, 3, 3] * 255).round().tolist() == want


def test_folders_that_hold_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match=r"no such folder"):
        read_all(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no picture"):
        read_all(tmp_path)
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match=r"holds no picture"):
        read_all(tmp_path)
    (tmp_path / "bee").mkdir()
    noise(8, 8).save(tmp_path / "bee" / "a.png")
    with pytest.raises(DataError, match=r"the class 'ant' has no picture, but would be label 0"):
        read_all(tmp_path)
    noise(8, 8).save(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"holds pictures \(stray\.png\) and folders of pictures \(bee\)"):
        read_all(tmp_path)


def test_a_line_without_a_picture(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": "a red cube"}) + "\n")
    with pytest.raises(DataError, match=r"'a red cube': names no image"):
        read_all(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": "a red cube", "image": "gone.png"}) + "\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: image 'gone\.png': there is no file"):
        read_all(tmp_path)


@pytest.mark.parametrize("setting", [{"share": 0.0}, {"share": 1.5}, {"image_size": (0, 8)}])
def test_impossible_settings(setting):
    with pytest.raises(ConfigError, match=rf"pictures\.{next(iter(setting))}="):
        PicturesConfig(path="x", **setting)
