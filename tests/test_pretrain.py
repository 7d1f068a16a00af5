import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny import TINY
from varl.checkpoints import model as model_folder
from varl.checkpoints import run_state
from varl.checkpoints.model import fresh
from varl.config import FolderConfig, OptimConfig, PretrainConfig, TextConfig, WordsConfig
from varl.data.folder import write_folder
from varl.data.words import split, word_list
from varl.errors import ConfigError, DataError, NumericsError
from varl.policies.next_scale import model_ids
from varl.pretrain.codebook import DECAY, CodeAverages
from varl.pretrain.data import batch_index, pictures
from varl.pretrain.next_scale import NextScaleFamily
from varl.pretrain.run import pretrain
from varl.pretrain.transformer import without_prompts
from varl.rng import generator
from varl.types import Prompt

WORDS = "ACE ADD AGE AID AIM AIR ANT ARM ART ASH BAD BAG BAR BAT BED BEE BIG BIT BOX BUS CAB CAN CAP CAR CAT COW CUP DAY DOG EAR"
MODEL = replace(TINY, text=TextConfig(styles=("sans", "ink"), max_length=4))
TOKENIZER_STEPS, STEPS = 20, 12


@pytest.fixture(scope="module", autouse=True)
def every_step_is_logged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varl.pretrain.run.LOG_EVERY", 1)
        patch.setattr("varl.pretrain.data.HELDOUT_PICTURES", 16)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PretrainConfig:
    words = tmp_path_factory.mktemp("words") / "words.txt"
    words.write_text("\n".join(WORDS.split()))
    return PretrainConfig(
        model=MODEL,
        data=WordsConfig(image_size=(16, 32), fonts=("sans",), palettes=("ink",), word_list=str(words), max_length=3, jitter=0),
        pictures=32,
        tokenizer_steps=TOKENIZER_STEPS,
        tokenizer_batch=8,
        steps=STEPS,
        batch=8,
        optim=OptimConfig(name="muon", lr=1e-2, schedule="linear"),
        drop_prompt=0.2,
        save_every=3,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """The directory of an unbroken pre-training."""
    out = tmp_path_factory.mktemp("whole")
    assert pretrain(config, out) == out / "model"
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def files(out: Path) -> tuple[bytes, bytes]:
    return (out / "model" / "model.safetensors").read_bytes(), (out / "model" / "tokenizer.safetensors").read_bytes()


class Interrupted(Exception):
    pass


def interrupt(step: int):
    def tick(values):
        if values["step"] == step:
            raise Interrupted

    return tick


# ---- a whole one


def test_both_phases_learn(whole):
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, TOKENIZER_STEPS + STEPS + 1))
    assert [line["stage"] for line in lines] == ["tokenizer"] * TOKENIZER_STEPS + ["transformer"] * STEPS
    tokenizer, transformer = lines[:TOKENIZER_STEPS], lines[TOKENIZER_STEPS:]
    assert tokenizer[-1]["pretrain/psnr"] > tokenizer[0]["pretrain/psnr"] + 1
    assert 0 < tokenizer[-1]["pretrain/code_usage"] <= 1
    assert abs(transformer[0]["pretrain/heldout_loss"] - math.log(16)) < 1
    assert transformer[-1]["pretrain/heldout_loss"] < transformer[0]["pretrain/heldout_loss"] - 0.1
    sizes = [h * w for h, w in MODEL.grids]
    by_scale = sum(transformer[-1][f"pretrain/heldout_loss_scale{s}"] * n for s, n in enumerate(sizes)) / sum(sizes)
    assert transformer[-1]["pretrain/heldout_loss"] == pytest.approx(by_scale, rel=1e-5)
    for line in transformer:
        assert line["pretrain/perplexity"] == pytest.approx(math.exp(line["pretrain/loss"]), rel=1e-5)
    assert 1 / 16 < transformer[-1]["pretrain/accuracy"] <= 1
    model, tokenizer = model_folder.load(whole / "model")
    assert model.config == MODEL


def test_a_token_is_right_where_no_other_is_more_probable(whole):
    family = NextScaleFamily(*model_folder.load(whole / "model"))
    said = family.read([Prompt(text="ACE")])
    fits = [family.fit(said, torch.full((1, 11), value)) for value in range(16)]
    losses, right = (torch.cat([fit[part][:, 0] for fit in fits]) for part in (0, 1))
    assert right.nonzero().flatten().tolist() == [int(losses.argmin())]


def test_interrupted_in_either_phase_it_ends_where_the_unbroken_one_does(config, whole, tmp_path):
    warmup = round(config.warmup_share * TOKENIZER_STEPS)
    for step in (2, warmup, warmup + 3, TOKENIZER_STEPS, TOKENIZER_STEPS + 1, TOKENIZER_STEPS + 6):
        with pytest.raises(Interrupted):
            pretrain(config, tmp_path, interrupt(step))
    pretrain(config, tmp_path)
    assert metrics(tmp_path) == metrics(whole)
    assert files(tmp_path) == files(whole)


def test_a_finished_one_is_left_as_it_is(config, whole):
    before = metrics(whole), files(whole)
    pretrain(config, whole)
    assert (metrics(whole), files(whole)) == before


def test_the_global_generator_is_left_alone(config, tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path, interrupt(1))
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- what it is trained on


def test_words_for_evaluation_and_for_rl_are_in_no_training_picture(config):
    words = split(word_list(config.data), config.data)
    images, said, held_images, held_said = pictures(config)
    assert images.shape == (32, 3, 16, 32)
    assert held_images.shape == (16, 3, 16, 32)
    assert {p.text for p in said} <= set(words.pretrain)
    assert {p.text for p in held_said} <= set(words.heldout)
    assert not {p.text for p in said} & ({p.text for p in held_said} | set(words.rl))
    assert len(words.heldout) > 0
    assert len(words.rl) > 0


def test_the_same_pictures_from_a_folder_train_the_same_model(config, whole, tmp_path):
    images, said, held_images, held_said = pictures(config)
    write_folder(tmp_path / "data", images, said)
    write_folder(tmp_path / "heldout", held_images, held_said)
    data = FolderConfig(path=str(tmp_path / "data"), heldout=str(tmp_path / "heldout"))
    pretrain(replace(config, data=data), tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(whole)
    assert files(tmp_path / "run") == files(whole)


def test_every_picture_once_before_any_comes_again():
    order = torch.cat([batch_index(12, 4, step, 0, "tokenizer") for step in range(6)])
    assert sorted(order[:12].tolist()) == sorted(order[12:].tolist()) == list(range(12))
    assert order[:12].tolist() != order[12:].tolist()
    assert torch.equal(batch_index(12, 4, 5, 0, "tokenizer"), order[20:])


def test_dropped_prompts_are_the_empty_prompt(config):
    def dropped(ids, share, step=0, model=MODEL):
        nothing = NextScaleFamily(*fresh(model)).nothing(ids)
        return without_prompts(ids, nothing, replace(config, model=model, drop_prompt=share), step)

    ids = model_ids([Prompt(text="ACE", style=("sans", "ink")), Prompt(text="B")] * 50, MODEL)
    empty = torch.nn.functional.pad(model_ids([Prompt()], MODEL), (0, 3))[0]
    assert torch.equal(dropped(ids, 0.0), ids)
    assert bool((dropped(ids, 1.0) == empty).all())
    some = dropped(ids, 0.5)
    gone = (some == empty).all(1)
    assert 30 < int(gone.sum()) < 70
    assert torch.equal(some[~gone], ids[~gone])
    assert torch.equal(some, dropped(ids, 0.5))
    assert not torch.equal(some, dropped(ids, 0.5, step=1))

    classes = replace(MODEL, text=None, num_classes=3)
    assert dropped(model_ids([Prompt(label=0), Prompt(label=2)], classes), 1.0, model=classes).tolist() == [3, 3]


# ---- going on from a model


def test_init_keeps_the_tokenizer_and_trains_the_transformer_on(config, whole, tmp_path):
    on = replace(config, init=str(whole / "model"), steps=4, optim=OptimConfig(lr=1e-3))
    pretrain(on, tmp_path)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {line["stage"] for line in lines} == {"transformer"}
    assert lines[0]["pretrain/heldout_loss"] == pytest.approx(metrics(whole)[-1]["pretrain/heldout_loss"], abs=0.1)
    assert files(tmp_path)[0] != files(whole)[0]
    assert files(tmp_path)[1] == files(whole)[1]


def test_init_of_another_shape_is_refused(config, whole, tmp_path):
    with pytest.raises(ConfigError, match="holds a model of another config than `model`"):
        pretrain(replace(config, init=str(whole / "model"), model=replace(MODEL, depth=2)), tmp_path)


# ---- the codebook


def test_code_averages_by_hand():
    codes = CodeAverages(torch.tensor([1.0, 1.0]), torch.tensor([[2.0], [4.0]]))
    asked, ids = torch.tensor([[3.0], [5.0], [6.0]]), torch.tensor([0, 0, 1])
    book = codes.update(asked, ids, generator(0))
    first = (DECAY * 2 + (1 - DECAY) * 8) / (DECAY * 1 + (1 - DECAY) * 2)
    second = (DECAY * 4 + (1 - DECAY) * 6) / (DECAY * 1 + (1 - DECAY) * 1)
    assert book[:, 0].tolist() == pytest.approx([first, second])


def test_a_dead_code_is_put_on_a_vector_that_was_asked_for():
    codes = CodeAverages(torch.tensor([1.0, 0.001]), torch.tensor([[2.0], [0.0]]))
    asked = torch.tensor([[3.0], [5.0]])
    book = codes.update(asked, torch.tensor([0, 0]), generator(0))
    assert book[1].item() in (pytest.approx(3.0), pytest.approx(5.0))
    assert codes.count[1] > 0.4


# ---- errors


def test_prompts_of_the_other_kind_are_refused(config, tmp_path):
    """By the check that the policy makes."""
    classes = replace(config, model=replace(MODEL, text=None, num_classes=3), tokenizer_steps=2, warmup_share=0.5)
    for name, prompt, said in (
        ("beyond", Prompt(label=3), "prompt label 3: the model knows classes 0 to 2"),
        ("text", Prompt(text="ACE"), "prompt 'ACE': this model draws classes and reads no text"),
    ):
        write_folder(tmp_path / name, torch.zeros(8, 3, 16, 32, dtype=torch.uint8), [prompt] * 8)
        with pytest.raises(DataError, match=said):
            pretrain(replace(classes, data=FolderConfig(path=str(tmp_path / name))), tmp_path / f"run of {name}")


def test_pictures_of_another_size_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"data.image_size=\(16, 64\), but the model's pictures are \(16, 32\)"):
        pretrain(replace(config, data=replace(config.data, image_size=(16, 64))), tmp_path / "words")
    write_folder(tmp_path / "data", torch.zeros(1, 3, 16, 64, dtype=torch.uint8), [Prompt(text="ACE")])
    with pytest.raises(DataError, match=r"is 16x64 .*, must be 16x32"):
        pretrain(replace(config, data=FolderConfig(path=str(tmp_path / "data"))), tmp_path / "folder")


def test_more_pictures_a_batch_than_there_are_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="tokenizer_batch=33: there are 32 training pictures"):
        pretrain(replace(config, tokenizer_batch=33), tmp_path / "a")
    with pytest.raises(ConfigError, match="batch=40: there are 32 training pictures"):
        pretrain(replace(config, batch=40), tmp_path / "b")


def test_a_warm_up_without_end_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="warmup_share=1 leaves none of tokenizer_steps=20"):
        pretrain(replace(config, warmup_share=1.0), tmp_path)


def test_a_loss_that_is_no_number_stops_it(config, tmp_path):
    with pytest.raises(NumericsError, match=r"pre-training step \d+: the loss is (nan|inf)"):
        pretrain(replace(config, tokenizer_lr=1e30, save_every=100), tmp_path)


def test_weights_that_are_no_numbers_are_never_saved(config, tmp_path, monkeypatch):
    """Although the loss is looked at less often than weights are saved."""
    monkeypatch.setattr("varl.pretrain.run.LOG_EVERY", 1000)
    with pytest.raises(NumericsError, match="the weights are not finite"):
        pretrain(replace(config, tokenizer_lr=1e38, save_every=1), tmp_path)
    state = run_state.load_latest(tmp_path / "checkpoints")
    assert state is None or all(bool(t.isfinite().all()) for t in state.tensors["tokenizer"].values())


def test_held_out_pictures_that_are_not_held_out_are_named(config, tmp_path):
    images, said, *_ = pictures(config)
    write_folder(tmp_path / "data", images, said)
    with pytest.raises(Interrupted):
        pretrain(replace(config, data=FolderConfig(path=str(tmp_path / "data"))), tmp_path / "run", interrupt(1))
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert event["kind"] == "warning"
    assert "heldout_loss is that of training pictures" in event["message"]
