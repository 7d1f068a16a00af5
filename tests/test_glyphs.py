"""Pictures of letters: which fonts, which set, and that a seed says it all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont

from varl.config import GlyphsConfig
from varl.data.fonts import font_path
from varl.data.glyphs import SPLITS, faces, faces_of, family_of, font_files, pictures, scaled, split_families
from varl.data.words import PALETTES
from varl.errors import ConfigError, DataError

PLAIN = GlyphsConfig(fonts=("matplotlib",), shares=(1.0, 0.0, 0.0, 0.0))
"""Fonts that every installation has: three families."""
THREE = replace(PLAIN, shares=(0.4, 0.3, 0.0, 0.3))


# ---- families ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Roboto Condensed", "Roboto"),
        ("DejaVu Sans Mono", "DejaVu"),
        ("cmtt10", "Computer Modern"),
        ("cmex10", "Computer Modern"),
        ("X", "X"),
    ],
)
def test_the_family_is_the_first_word(name, family):
    assert family_of(name) == family


def test_sets_of_families_are_disjoint_and_whole():
    families = [f"f{i}" for i in range(23)]
    parts = split_families(families, (0.4, 0.2, 0.2, 0.2), seed=5)
    assert sorted(name for split in SPLITS for name in parts[split]) == sorted(families)
    assert [len(parts[split]) for split in SPLITS] == [9, 5, 5, 4]
    assert parts == split_families([*families[::-1], "f3"], (0.4, 0.2, 0.2, 0.2), seed=5)
    assert parts != split_families(families, (0.4, 0.2, 0.2, 0.2), seed=6)


def test_a_small_share_has_one_family_and_none_has_none():
    assert [len(part) for part in split_families("abcdefgh", (1.0, 0.001, 0.0, 0.001), 0).values()] == [6, 1, 0, 1]
    with pytest.raises(DataError, match=r"3 font families \(a, b, c\) cannot fill 4 sets.*Name more"):
        split_families("abc", (0.4, 0.2, 0.2, 0.2), 0)


def test_faces_draw_letters():
    found = faces(PLAIN)
    assert {face.family for face in found} == {"DejaVu", "STIXGeneral", "Computer Modern"}
    names = [face.name for face in found]
    assert {"DejaVuSans-Bold", "STIXGeneral", "cmr10", "cmsy10"} <= set(names)
    assert not {"cmex10", "LastResortHE-Regular", "STIXNonUni", "STIXSizOneSymReg", "DejaVuSansDisplay"} & set(names)
    assert len(names) == len(set(names))


def renamed(folder, file, family):
    """A copy of a font that says another family's name."""
    font = TTFont(font_path(file))
    for record in font["name"].names:
        if record.nameID in (1, 16):
            font["name"].setName(family, record.nameID, record.platformID, record.platEncID, record.langID)
    font.save(folder / f"{family}-{file}.ttf")
    font.close()


def test_one_design_under_two_names_is_one_family(tmp_path):
    renamed(tmp_path, "sans", "Vera")
    renamed(tmp_path, "times", "Aardvark")
    found = faces(replace(PLAIN, fonts=("matplotlib", str(tmp_path))))
    assert {face.family for face in found} == {"DejaVu", "Aardvark", "Computer Modern"}
    assert len(found) == len(faces(PLAIN))
    assert sorted(face.name for face in found if face.family == "Aardvark")[0] == "Aardvark-times"


def test_no_family_is_in_two_sets():
    own = {split: {face.family for face in faces_of(THREE, split)} for split in SPLITS}
    assert [len(own[split]) for split in SPLITS] == [1, 1, 0, 1]
    assert len(set().union(*own.values())) == 3
    assert faces_of(PLAIN, "train") == faces(PLAIN)


def test_the_fonts_of_the_default():
    config = GlyphsConfig()
    own = {split: faces_of(config, split) for split in SPLITS}
    families = {split: {face.family for face in own[split]} for split in SPLITS}
    assert sum(len(names) for names in families.values()) == len(set().union(*families.values())) >= 16
    assert all(len(part) >= 20 for part in own.values())
    assert {"Light", "Bold"} <= {face.style for face in faces(config) if face.family == "Roboto"}
    assert not [face for face in faces(config) if "Condensed" in face.style]


# ---- letters ----------------------------------------------------------------------------------------------------------------------------


def block(height, width, rows, columns):
    picture = np.zeros((height, width), int)
    picture[(height - rows) // 2 : (height + rows) // 2, (width - columns) // 2 : (width + columns) // 2] = 255
    return picture.tolist()


@pytest.mark.parametrize(
    ("size", "share", "margin", "rows", "columns"),
    [
        ((24, 24), 0.5, 0, 12, 12),  # an em of ink is half the height
        ((24, 24), 1.0, 0, 24, 24),
        ((24, 24), 1.0, 2, 20, 20),  # as large as fits
        ((24, 48), 1.0, 0, 24, 24),
        ((48, 24), 1.0, 2, 20, 20),
    ],
)
def test_a_letter_is_scaled_by_its_em_and_stands_in_the_middle(size, share, margin, rows, columns):
    ink = np.full((96, 96), 255, np.uint8)
    assert scaled(ink, size, share, margin).tolist() == block(*size, rows, columns)


def drawn(config, split, n, seed):
    """Pictures and labels."""
    found = pictures(config, split, n, seed)
    return found.pixels(found.prompts), torch.tensor([prompt.label for prompt in found.prompts])


def test_pictures_are_coloured_letters():
    images, labels = drawn(THREE, "train", 48, seed=1)
    assert images.shape == (48, 3, 24, 24)
    assert images.dtype == torch.uint8
    assert labels.tolist() == list(range(12)) * 4
    seen = set()
    for image in images.permute(0, 2, 3, 1).double().numpy():
        name = next(n for n, (_, ground) in PALETTES.items() if tuple(image[0, 0]) == ground)
        ink, ground = (np.array(colour, float) for colour in PALETTES[name])
        share = (image - ground) @ (ink - ground) / ((ink - ground) @ (ink - ground))
        assert np.abs(image - (ground + share[..., None] * (ink - ground))).max() <= 1
        assert share.max() > 0.3
        seen.add(name)
    assert seen == set(THREE.palettes)


def test_a_letter_moves_by_the_jitter_and_is_else_the_same():
    one = replace(PLAIN, fonts=(str(font_path("thin-sans")),), palettes=("ink",), sizes=(0.8,), jitter=0)
    still, moved = (drawn(replace(one, jitter=jitter), "train", 240, seed=0)[0] for jitter in (0, 1))
    assert torch.equal(still[:12], still[12:24])
    shifts = set()
    for a, b in zip(still, moved, strict=True):
        fits = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if torch.equal(a.roll((y, x), (1, 2)), b)]
        assert len(fits) == 1
        shifts.add(fits[0])
    assert shifts == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_a_picture_depends_on_its_seed_set_and_number_alone():
    images, labels = drawn(PLAIN, "train", 30, seed=3)
    fewer, same = drawn(PLAIN, "train", 17, seed=3)
    assert torch.equal(fewer, images[:17])
    assert torch.equal(same, labels[:17])
    assert not torch.equal(drawn(PLAIN, "train", 30, seed=4)[0], images)
    assert not torch.equal(drawn(THREE, "heldout", 30, seed=3)[0], images)


def test_labels_name_the_letters_in_other_families_too():
    """The nearest mean picture of the training families tells the held-out ones' letters: labels are those of the letters, in all sets."""
    flat = replace(THREE, palettes=("ink",), jitter=0)
    (known, label), (new, wanted) = (drawn(flat, split, 480, seed=0) for split in ("train", "heldout"))
    means = torch.stack([known[label == i].float().mean(0).flatten() for i in range(12)])
    guess = torch.cdist(new.float().flatten(1), means).argmin(1)
    assert (guess == wanted).float().mean() > 0.5  # by chance 0.08


def test_prompts_say_letter_and_label():
    found = pictures(PLAIN, "train", 3, seed=0)
    assert [(prompt.text, prompt.label) for prompt in found.prompts] == [("A", 0), ("B", 1), ("D", 2)]
    assert found.classes[:3] == ("A", "B", "D")


def test_a_picture_has_an_address_of_its_own():
    found = pictures(PLAIN, "train", 5, seed=3)
    assert torch.equal(found.pixels(found.prompts[3:])[0], found.pixels(found.prompts)[3])
    assert found.prompts[3].image == "glyphs:train:3#3"


# ---- what is wrong ----------------------------------------------------------------------------------------------------------------------


def test_fonts_that_are_not_there_are_named_together():
    with pytest.raises(DataError, match=r"no_fonts_a, no_fonts_b: no such.*Run `pip install no-fonts-a no-fonts-b`"):
        faces(replace(PLAIN, fonts=("matplotlib", "no_fonts_a", "no_fonts_b")))
    with pytest.raises(DataError, match=r"/no/such: no such package, folder or file\. Set glyphs\.fonts"):
        font_files(("/no/such",))
    with pytest.raises(DataError, match=r"json holds no font"):
        font_files(("json",))


def test_a_damaged_font_is_named(tmp_path):
    file = tmp_path / "cut.ttf"
    file.write_bytes(Path(font_path("sans")).read_bytes()[:500])
    with pytest.raises(DataError, match=r"cut\.ttf: cannot be read"):
        faces(replace(PLAIN, fonts=(str(file),)))


def test_letters_that_no_face_has():
    with pytest.raises(DataError, match=r"no face in them draws all of 'A漢'"):
        faces(replace(PLAIN, fonts=(str(font_path("sans")),), letters="A漢"))


def test_a_set_without_families():
    with pytest.raises(DataError, match="no font family is in 'judge'"):
        drawn(PLAIN, "judge", 1, seed=0)
    with pytest.raises(DataError, match=r"3 font families .* cannot fill 4 sets"):
        drawn(replace(PLAIN, shares=(0.4, 0.2, 0.2, 0.2)), "train", 1, seed=0)


def test_an_unknown_palette():
    with pytest.raises(DataError, match="palette 'neon'"):
        drawn(replace(PLAIN, palettes=("neon",)), "train", 1, seed=0)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"letters": "ABA"}, "letters='ABA'"),
        ({"letters": "A"}, "letters='A'"),
        ({"shares": (1.0, -1.0, 0.0, 0.0)}, "shares="),
        ({"shares": (0.0, 0.0, 0.0, 0.0)}, "shares="),
        ({"sizes": ()}, "sizes="),
        ({"sizes": (1.2,)}, "sizes="),
        ({"fonts": ()}, "fonts and palettes"),
        ({"jitter": 6}, "jitter=6"),
    ],
)
def test_impossible_settings(setting, says):
    with pytest.raises(ConfigError, match=says):
        GlyphsConfig(**setting)
