"""The data folder: what is written is what is read, and what is wrong is named with its place."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from varl.config import WordsConfig
from varl.data.folder import load_images, read_folder, to_rgb, write_folder
from varl.data.words import dataset
from varl.errors import DataError
from varl.types import Prompt, Region, Wanted


def test_what_is_written_is_what_is_read(tmp_path):
    images, prompts = dataset(WordsConfig(image_size=(32, 64), regions=(0.5, 0.5)), ["RED", "FOX", "OWL"], 5, seed=1)
    write_folder(tmp_path, images, prompts)
    back = read_folder(tmp_path)
    assert [(p.text, p.regions, p.style, p.label) for p in back] == [(p.text, p.regions, p.style, p.label) for p in prompts]
    assert torch.equal(load_images(back, (32, 64)), images)


def test_prompts_without_pictures(tmp_path):
    prompts = [Prompt(text="a red cube", label=3), Prompt(), Prompt(text="Ü|é", regions=(Region(text="Ü"), Region(text="é")))]
    prompts.append(Prompt(text="one\u2028line\x85, whatever str.splitlines says"))
    dogs = Wanted(name="dog", count=2, colour="red", attributes=("wet",), position=("next to", 0))
    prompts.append(Prompt(text="two dogs", objects=(Wanted(name="bench"), dogs), unwanted=(Wanted(name="dog", count=3),)))
    write_folder(tmp_path, None, prompts)
    assert read_folder(tmp_path) == prompts
    with pytest.raises(DataError, match="'a red cube': names no image"):
        load_images(prompts, (16, 64))


def test_lines_of_geneval_are_read_as_they_are(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        '{"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}], "prompt": "two dogs"}\n'
        '{"tag": "color_attr", "include": [{"class": "sink", "count": 1, "color": "red"}, {"class": "car", "count": 1, "color": "blue"}], '
        '"prompt": "a red sink and a blue car"}\n'
        '{"tag": "position", "include": [{"class": "bed", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}], '
        '"prompt": "a cat left of a bed"}\n'
    )
    assert read_folder(tmp_path) == [
        Prompt(text="two dogs", objects=(Wanted(name="dog", count=2),), unwanted=(Wanted(name="dog", count=3),)),
        Prompt(text="a red sink and a blue car", objects=(Wanted(name="sink", colour="red"), Wanted(name="car", colour="blue"))),
        Prompt(text="a cat left of a bed", objects=(Wanted(name="bed"), Wanted(name="cat", position=("left of", 0)))),
    ]


def test_blank_lines_count_but_do_not_matter(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"text": "CAT"}\n\n{"text": "DOG", "colour": 1}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:3: unknown key 'colour'.*Known: text"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "CAT"', "not JSON"),
        ('["CAT"]', "is not an object"),
        ('{"txt": "CAT"}', "unknown key 'txt'"),
        ('{"text": 5}', "text=5 must be a string"),
        ('{"label": "3"}', "label='3' must be a whole number"),
        ('{"label": true}', "label=True must be a whole number"),
        ('{"label": null}', "label=None must be a whole number"),
        ('{"style": "serif"}', "style='serif' must be a list"),
        ('{"style": [1]}', "style holds 1"),
        ('{"regions": ["CAT"]}', "'CAT' is not an object"),
        ('{"regions": [{"box": [0, 0, 1, 1]}]}', "has no text"),
        ('{"regions": [{"text": " "}]}', "has no text"),
        ('{"regions": [{"text": "CAT", "size": 3}]}', "unknown key 'size'"),
        ('{"regions": [{"text": "CAT", "box": [0, 0, 64, 16]}]}', r"box=\[0, 0, 64, 16\].*not pixels"),
        ('{"regions": [{"text": "CAT", "box": [-0.1, 0, 1, 1]}]}', "box="),
        ('{"regions": [{"text": "CAT", "box": [0.5, 0, 0.5, 1]}]}', "box="),
        ('{"regions": [{"text": "CAT", "box": [0, 0, 1]}]}', "box="),
        ('{"regions": [{"text": "CAT", "box": [0, 0, NaN, 1]}]}', "box="),
        ('{"tag": 3}', "tag=3 must be a string"),
        ('{"text": "a", "prompt": "a"}', "has prompt and text, which are the same"),
        ('{"objects": ["dog"]}', "'dog' is not an object"),
        ('{"objects": [{"count": 2}]}', "has no name. Add its class"),
        ('{"objects": [{"name": "dog", "class": "dog"}]}', "has class and name"),
        ('{"objects": [{"name": "dog", "count": 0}]}', "count=0 of 'dog': must be 1 or more"),
        ('{"include": [{"class": "dog", "colour": " "}]}', "colour=' ' of 'dog': is empty"),
        ('{"include": [{"class": "dog", "position": ["left of", 0]}]}', r"position=\['left of', 0\] of 'dog'.*of an object before"),
        ('{"include": [{"class": "dog"}, {"class": "cat", "position": ["on", 0]}]}', r"position=\['on', 0\].*left of, right of, above"),
        ('{"exclude": [{"class": "dog", "color": "red"}]}', "unknown key 'colour'. Known: name, count"),
        ('{"image": 3}', "image holds 3"),
        ('{"image": "none.png"}', "there is no file .*none.png"),
        ('{"image": "text.png"}', "image 'text.png': cannot be read"),
        ('{"image": "cut.png"}', "image 'cut.png': cannot be read"),
    ],
)
def test_a_fault_is_named_with_file_and_line(tmp_path, line, says):
    (tmp_path / "text.png").write_text("not a picture")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    (tmp_path / "prompts.jsonl").write_text('{"image": "whole.png"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: .*" + says):
        read_folder(tmp_path)


def test_a_folder_without_prompts_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no prompts\.jsonl"):
        read_folder(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_folder(tmp_path)
    (tmp_path / "prompts.jsonl").write_bytes('{"text": "É"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"prompts\.jsonl: is not UTF-8.*Save it"):
        read_folder(tmp_path)


def test_a_picture_of_another_size_names_both(tmp_path):
    Image.new("RGB", (64, 16)).save(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(DataError, match=r"a\.png: is 16x64 .*must be 32x64"):
        load_images(read_folder(tmp_path), (32, 64))


def test_other_modes_become_rgb(tmp_path):
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 0, 255))
    grey = Image.new("L", (2, 1), 7)
    palette = Image.new("RGB", (2, 1), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    pictures = {"half": half, "grey": grey, "palette": palette}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"image": f"{name}.png"}) + "\n" for name in pictures))
    loaded = load_images(read_folder(tmp_path), (1, 2))
    assert loaded.permute(0, 2, 3, 1).tolist() == [[[[255, 255, 255], [0, 0, 0]]], [[[7, 7, 7]] * 2], [[[10, 20, 30]] * 2]]


def test_rgb_is_left_alone():
    picture = Image.new("RGB", (1, 1), (1, 2, 3))
    assert to_rgb(picture) is picture
