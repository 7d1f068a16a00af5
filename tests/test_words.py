"""Pictures of words: the words, where they stand, and that a seed says it all."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from varl.config import WordsConfig
from varl.data.fonts import FACES, font_path, load_font
from varl.data.words import PALETTES, as_float, dataset, prompts, render, slots, split, word_list
from varl.errors import DataError

WORDS = ("ANT", "BEE", "CAT", "CROW", "HORSE", "QUAIL", "MAMMA", "ILL", "JAY", "WREN")
MANY = replace(WordsConfig(), image_size=(64, 128), regions=(0.2, 0.2, 0.2, 0.2, 0.2), palettes=tuple(PALETTES), fonts=tuple(FACES))


# ---- words ----------------------------------------------------------------------------------------------------------------------------


def test_the_word_list_is_clean():
    config = WordsConfig()
    words = word_list(config)
    assert len(words) > 2000
    assert list(words) == sorted(set(words))
    assert all(3 <= len(word) <= 5 and set(word) <= set(config.letters) for word in words)
    assert {"HORSE", "CAT"} <= set(words)
    assert not {"ANUS", "ASS", "DAMN"} & set(words)


def test_letters_and_lengths_are_kept():
    words = word_list(WordsConfig(letters="ACEHNORST", min_length=4, max_length=4))
    assert words
    assert all(len(word) == 4 and set(word) <= set("ACEHNORST") for word in words)


def test_a_file_of_words(tmp_path):
    file = tmp_path / "animals.txt"
    file.write_text("cat\n\n Bee \ncat\nhippopotamus\nno one\n")
    assert word_list(WordsConfig(word_list=str(file))) == ("BEE", "CAT")
    with pytest.raises(DataError, match=r"none of its 4 words.*Widen"):
        word_list(WordsConfig(word_list=str(file), letters="XYZ"))
    with pytest.raises(DataError, match=r"'animals\.txt'.*neither"):
        word_list(WordsConfig(word_list="animals.txt"))
    file.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"animals\.txt': is not UTF-8"):
        word_list(WordsConfig(word_list=str(file)))


def test_splits_are_disjoint_whole_and_of_the_size_asked_for():
    config = WordsConfig(heldout_share=0.15, rl_share=0.5)
    words = word_list(config)
    parts = split(words, config)
    sets = [set(parts.pretrain), set(parts.rl), set(parts.heldout)]
    assert set().union(*sets) == set(words)
    assert sum(map(len, sets)) == len(words)
    shares = [len(part) / len(words) for part in sets]
    assert shares == pytest.approx([0.425, 0.425, 0.15], abs=4 * 0.5 / len(words) ** 0.5)


def test_a_words_place_does_not_depend_on_the_others():
    config = WordsConfig()
    words = word_list(config)
    whole, some = split(words, config), split(words[::-7], config)
    assert set(some.heldout) == set(whole.heldout) & set(words[::-7])
    assert set(some.rl) == set(whole.rl) & set(words[::-7])


def test_held_out_words_stay_so_whatever_the_rl_share():
    words = word_list(WordsConfig())
    assert split(words, WordsConfig(rl_share=0.0)).heldout == split(words, WordsConfig(rl_share=0.9)).heldout
    assert split(words, WordsConfig(rl_share=0.0)).rl == ()
    assert split(words, WordsConfig(heldout_share=0.0)).heldout == ()


def test_the_split_is_pinned():
    parts = split(WORDS, WordsConfig())
    assert (parts.pretrain, parts.rl, parts.heldout) == (("ANT", "BEE", "CROW", "QUAIL", "ILL", "JAY"), ("CAT", "WREN"), ("HORSE", "MAMMA"))


# ---- fonts and colours ------------------------------------------------------------------------------------------------------------------


def test_every_face_is_there_and_has_a_name():
    for name in FACES:
        assert load_font(name, 12).getname()[0].startswith(("DejaVu", "STIX"))


def test_a_font_may_be_a_file():
    path = str(font_path("serif"))
    assert font_path(path) == font_path("serif")
    assert np.array_equal(render(["CAT"], path, "ink", (16, 64))[0], render(["CAT"], "serif", "ink", (16, 64))[0])


def test_a_missing_font_is_named(tmp_path):
    with pytest.raises(DataError, match=r"font 'comic'.*sans, serif, mono.*path"):
        load_font("comic", 12)
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    with pytest.raises(DataError, match=r"broken\.ttf.*cannot be read as a font"):
        load_font(str(broken), 12)


def test_a_missing_palette_is_named():
    with pytest.raises(DataError, match=r"palette 'mauve'.*ink, night"):
        render(["CAT"], "sans", "mauve", (16, 64))


def test_palettes_are_legible():
    def luminance(colour):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for text, ground in PALETTES.values():
        dark, light = sorted([luminance(text), luminance(ground)])
        assert (light + 0.05) / (dark + 0.05) > 7  # WCAG 2 AAA, for small text


# ---- pictures ---------------------------------------------------------------------------------------------------------------------------


def ink(image, prompt):
    """Where the picture is not its ground."""
    return (image != np.array(PALETTES[prompt.style[1]][1])).any(-1)


def pixels(box, image_size):
    return [round(share * side) for share, side in zip(box, (image_size[1], image_size[0]) * 2, strict=True)]


@pytest.mark.parametrize("config", [WordsConfig(palettes=tuple(PALETTES), fonts=tuple(FACES)), MANY], ids=["one", "many"])
def test_boxes_are_exactly_the_ink(config):
    images, said = dataset(config, WORDS, 60, seed=2)
    for image, prompt in zip(images.permute(0, 2, 3, 1).numpy(), said, strict=True):
        seen = ink(image, prompt)
        for region in prompt.regions:
            x0, y0, x1, y1 = pixels(region.box, config.image_size)
            inside = seen[y0:y1, x0:x1]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            seen[y0:y1, x0:x1] = False
        assert not seen.any()


def test_a_prompt_says_what_is_drawn():
    image, prompt = render(["RED", "FOX"], "serif", "moss", (32, 64))
    assert image.shape == (32, 64, 3)
    assert prompt.text == "RED|FOX"
    assert prompt.words == ("RED", "FOX")
    assert prompt.style == ("serif", "moss")
    red, fox = (region.box for region in prompt.regions)
    assert red[3] <= 0.5 <= fox[1]


def test_a_shift_moves_the_ink_and_nothing_else():
    still, prompt = render(["CAT"], "sans", "ink", (16, 64), [(0, 0)])
    for down, right in [(1, 0), (-1, 1), (1, -1)]:
        moved, told = render(["CAT"], "sans", "ink", (16, 64), [(down, right)])
        assert np.array_equal(np.roll(still, (down, right), (0, 1)), moved)
        assert np.allclose(np.subtract(told.regions[0].box, prompt.regions[0].box), np.array([right / 64, down / 16] * 2))


def test_capitals_stand_in_the_middle_and_short_words_are_about_as_high_as_long_ones():
    for font in ("sans", "serif", "mono"):
        heights = set()
        for word in ("ICE", "TIDE", "HENNA", "MINIM"):
            _, y0, _, y1 = pixels(render([word], font, "ink", (16, 64))[1].regions[0].box, (16, 64))
            heights.add(y1 - y0)
            assert abs((y0 + y1) / 2 - 8) <= 1
        assert max(heights) - min(heights) <= 2


def test_slots_tile_the_picture():
    for count in range(1, 7):
        for size in [(16, 64), (64, 64), (48, 64), (64, 128), (63, 129), (32, 256)]:
            cover = np.zeros(size, int)
            for top, left, bottom, right in slots(count, size):
                cover[top:bottom, left:right] += 1
            assert (cover == 1).all()
            assert len(slots(count, size)) == count


@pytest.mark.parametrize(
    ("count", "size", "first"),
    [(1, (16, 64), (0, 0, 16, 64)), (2, (32, 64), (0, 0, 16, 64)), (2, (16, 128), (0, 0, 16, 64)), (5, (64, 128), (0, 0, 21, 64))],
)
def test_slots_by_hand(count, size, first):
    assert slots(count, size)[0] == first


def test_the_odd_one_has_the_last_row_to_itself():
    assert slots(3, (32, 160))[-1] == (16, 0, 32, 160)


def test_a_text_that_does_not_fit_is_named():
    with pytest.raises(DataError, match=r"'UNCOPYRIGHTABLE': does not fit into 16x64.*max_length"):
        render(["UNCOPYRIGHTABLE"], "sans", "ink", (16, 64))
    with pytest.raises(DataError, match=r"text ' '.*draws nothing"):
        render([" "], "sans", "ink", (16, 64))


# ---- at random --------------------------------------------------------------------------------------------------------------------------


def test_a_seed_says_it_all():
    images, said = dataset(MANY, WORDS, 12, seed=4)
    again, said_again = dataset(MANY, WORDS, 12, seed=4)
    assert torch.equal(images, again)
    assert said == said_again == prompts(WORDS, MANY, 12, seed=4)
    assert said != prompts(WORDS, MANY, 12, seed=5)


def test_a_sample_does_not_depend_on_how_many_there_are():
    assert prompts(WORDS, MANY, 30, seed=4)[:7] == prompts(WORDS, MANY, 7, seed=4)


def test_no_word_twice_in_one_picture():
    for prompt in prompts(WORDS[:5], MANY, 100, seed=0):
        assert len(set(prompt.words)) == len(prompt.words)


def test_shares_of_regions_fonts_palettes_and_words():
    config = replace(MANY, regions=(0.0, 1.0, 1.5, 1.5, 1.0))  # shares need not sum to 1
    said = prompts(WORDS, config, 2000, seed=0)
    counts = Counter(len(prompt.regions) for prompt in said)
    tolerance = 4 * 0.5 / 2000**0.5
    assert [counts[n] / 2000 for n in range(1, 6)] == pytest.approx([0.0, 0.2, 0.3, 0.3, 0.2], abs=tolerance)
    for part in (0, 1):
        styles = Counter(prompt.style[part] for prompt in said)
        assert len(styles) == len((FACES, PALETTES)[part])
        assert max(styles.values()) / 2000 == pytest.approx(1 / len(styles), abs=tolerance)
    words = Counter(word for prompt in said for word in prompt.words)
    assert len(words) == len(WORDS)
    assert max(words.values()) / min(words.values()) < 1.2


def test_jitter_covers_its_range_evenly():
    config = WordsConfig(jitter=1, fonts=("sans",), palettes=("ink",))
    seen = Counter(prompt.regions[0].box for prompt in prompts(["CAT"], config, 900, seed=0))
    assert len(seen) == 9
    assert max(seen.values()) < 100 + 4 * 10
    assert len({prompt.regions[0].box for prompt in prompts(["CAT"], replace(config, jitter=0), 20, seed=0)}) == 1


def test_impossible_requests_are_named():
    with pytest.raises(DataError, match=r"3 words cannot fill pictures of up to 5"):
        prompts(WORDS[:3], MANY, 1, seed=0)
    with pytest.raises(DataError, match=r"words\.regions"):
        prompts(WORDS, WordsConfig(regions=(0.0,)), 1, seed=0)


def test_pixels_as_floats():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert as_float(image).flatten().tolist() == pytest.approx([0, 0.2, 1])
