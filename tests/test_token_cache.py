"""Tokens on disk: encoded once, known by pixels and weights, refused where they are another tokenizer's."""

import json
import os

import pytest
import torch

from varl.data.token_cache import MANIFEST, TokenCache, picture_keys, tokenizer_key
from varl.data.words import as_float
from varl.errors import DataError

WEIGHTS = {"codebook": torch.arange(6.0).view(3, 2), "scale": torch.tensor(0.5, dtype=torch.bfloat16)}


class Encoder:
    """Ids that are the picture's first pixels, and a note of what was asked."""

    def __init__(self, tokens=4):
        self.tokens, self.asked = tokens, []

    def __call__(self, images):
        self.asked.append(len(images))
        return (images.flatten(1)[:, : self.tokens] * 255).round().long()


def pictures(*greys):
    return torch.tensor(greys, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def shown(*greys):
    return as_float(pictures(*greys))


def cache(folder, tokenizer="a" * 64, name="models/base"):
    return TokenCache(folder / "tokens", tokenizer=tokenizer, name=name)


def parts(folder):
    return sorted((folder / "tokens").glob("*.safetensors"))


# ---- keys -------------------------------------------------------------------------------------------------------------------------------


def test_a_picture_is_known_by_its_pixels_and_size():
    one, two, same = picture_keys(pictures(1, 2, 1))
    assert one == same != two
    tall, wide = torch.zeros(1, 3, 4, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, 4, dtype=torch.uint8)
    assert picture_keys(tall) != picture_keys(wide)
    changed = pictures(1)
    changed[0, 2, 1, 1] += 1
    assert picture_keys(changed) != [one]
    turned = pictures(1, 2).permute(0, 1, 3, 2)
    assert picture_keys(turned) == [one, two]


def test_a_tokenizer_is_known_by_weights_and_config():
    key = tokenizer_key(WEIGHTS, "vocab: 3\n")
    assert key == tokenizer_key(dict(reversed(WEIGHTS.items())), "vocab: 3\n")
    others = [
        WEIGHTS | {"codebook": WEIGHTS["codebook"] + torch.eye(3, 2) * 1e-6},
        WEIGHTS | {"codebook": WEIGHTS["codebook"].view(2, 3)},
        WEIGHTS | {"codebook": WEIGHTS["codebook"].double()},
        {"book": WEIGHTS["codebook"], "scale": WEIGHTS["scale"]},
        {"codebook": WEIGHTS["codebook"]},
    ]
    keys = [key, tokenizer_key(WEIGHTS, "vocab: 4\n"), *(tokenizer_key(weights, "vocab: 3\n") for weights in others)]
    assert len(set(keys)) == len(keys)
    assert tokenizer_key({"codebook": WEIGHTS["codebook"].T.contiguous().T}, "") == tokenizer_key({"codebook": WEIGHTS["codebook"]}, "")


# ---- hits and misses --------------------------------------------------------------------------------------------------------------------


def test_each_picture_is_encoded_once(tmp_path):
    encode, tokens = Encoder(), cache(tmp_path)
    assert tokens.ids(shown(5, 6, 5), encode).tolist() == [[5] * 4, [6] * 4, [5] * 4]
    assert tokens.ids(shown(6, 7), encode).tolist() == [[6] * 4, [7] * 4]
    assert tokens.ids(shown(7, 5, 6), encode).dtype == torch.int64
    assert encode.asked == [2, 1]
    assert len(tokens) == 3


def test_what_one_run_encoded_another_finds(tmp_path):
    cache(tmp_path).ids(shown(5, 6), Encoder())
    cache(tmp_path).ids(shown(7), Encoder())
    encode = Encoder()
    assert cache(tmp_path).ids(shown(7, 6, 5), encode).tolist() == [[7] * 4, [6] * 4, [5] * 4]
    assert encode.asked == []


def test_what_is_encoded_is_what_the_key_names(tmp_path):
    encode, tokens = Encoder(), cache(tmp_path)
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    assert tokens.ids(as_float(levels), encode)[:, 0].tolist() == list(range(256))
    assert tokens.ids(shown(7, 8) + torch.tensor([0.4, -0.4]).view(2, 1, 1, 1) / 255, encode)[:, 0].tolist() == [7, 8]
    assert encode.asked == [256]


def test_two_processes_that_encode_the_same_agree(tmp_path):
    one, two = cache(tmp_path), cache(tmp_path)
    for tokens in (one, two):
        tokens.ids(shown(1, 2), Encoder())
    two.ids(shown(2, 3), Encoder())
    assert len(parts(tmp_path)) == 2
    assert len(cache(tmp_path)) == 3


def test_a_file_half_written_is_not_seen(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    tokens = cache(tmp_path)
    tokens.ids(shown(1), Encoder())
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        tokens.ids(shown(2), Encoder())
    monkeypatch.undo()
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    assert tokens.ids(shown(1, 2), Encoder()).tolist() == [[1] * 4, [2] * 4]
    assert len(cache(tmp_path)) == 2


# ---- what is wrong ----------------------------------------------------------------------------------------------------------------------


def test_another_tokenizers_cache_is_refused_by_name(tmp_path):
    cache(tmp_path).ids(shown(1), Encoder())
    with pytest.raises(
        DataError, match=r"tokens of the tokenizer 'models/base' \(a{12}\), not of 'models/mine' \(b{12}\).*Give another folder"
    ):
        cache(tmp_path, tokenizer="b" * 64, name="models/mine")
    assert len(cache(tmp_path, name="models/moved")) == 1


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=rf"is no cache of tokens \(it has no {MANIFEST}\)"):
        cache(tmp_path)
    assert [file.name for file in (tmp_path / "tokens").iterdir()] == ["mine.txt"]


def test_a_folder_that_another_process_is_making_is_no_strange_one(tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / f"{MANIFEST}.tmp-1").write_text("{")
    assert cache(tmp_path).ids(shown(1), Encoder()).tolist() == [[1] * 4]


def test_a_damaged_file_is_named(tmp_path):
    cache(tmp_path).ids(shown(1), Encoder())
    (file,) = parts(tmp_path)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"{file.name}: is damaged .*Delete it"):
        cache(tmp_path)
    file.unlink()
    assert len(cache(tmp_path)) == 0


@pytest.mark.parametrize("text", ["", "[]", '{"layout": 1}', '{"layout": 2, "tokenizer": "a", "name": "b"}'])
def test_a_manifest_that_says_nothing_is_named(tmp_path, text):
    cache(tmp_path)
    (tmp_path / "tokens" / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=rf"{MANIFEST}: .*Delete the folder"):
        cache(tmp_path)


def test_pictures_of_another_length_do_not_mix(tmp_path):
    tokens = cache(tmp_path)
    tokens.ids(shown(1), Encoder(tokens=4))
    with pytest.raises(DataError, match=r"holds pictures of 4 tokens, the tokenizer gives 9"):
        tokens.ids(shown(2), Encoder(tokens=9))
    assert len(tokens) == len(cache(tmp_path)) == 1


def test_the_manifest_says_whose_it_is(tmp_path):
    cache(tmp_path)
    said = json.loads((tmp_path / "tokens" / MANIFEST).read_text())
    assert said == {"layout": 1, "tokenizer": "a" * 64, "name": "models/base"}
