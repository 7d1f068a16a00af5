from dataclasses import replace

import pytest
import torch
from torch import nn

from tiny import TINY, save_tiny, word_file
from varl.checkpoints.model import fresh
from varl.config import (
    EvalConfig,
    FolderConfig,
    GRPOConfig,
    LawConfig,
    MiddleStep,
    OCRConfig,
    OptimConfig,
    PretrainConfig,
    PythonRewardConfig,
    RunConfig,
    TrainConfig,
    VARRLConfig,
    WeightedReward,
    WordsConfig,
)
from varl.data.folder import write_folder
from varl.plan import format_plan, plan
from varl.plan.cost import matmul_speed, optimizer_bytes
from varl.plan.families import autoencoder_cost, cost, decoder_cost, family_of, without_memory
from varl.plan.words import in_bytes, in_time
from varl.train.optim import build_optimizer
from varl.types import Prompt, Region

TOKENS, PREFIX = 11, 3
"""Of the tiny model, and of its first two scales."""
TOY = {"bright": WeightedReward(reward=PythonRewardConfig(target="varl.rewards.toy:brightness"))}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """P = 2, G = 4 on the tiny model."""
    folder = tmp_path_factory.mktemp("plan")
    data = WordsConfig(image_size=(16, 32), fonts=("sans",), palettes=("ink",), word_list=str(word_file(folder)), max_length=3, jitter=0)
    return RunConfig(
        model=str(save_tiny(folder / "base")),
        data=data,
        rewards=TOY,
        algorithm=GRPOConfig(num_generations=4, rollouts_per_chunk=4),
        train=TrainConfig(steps=6, prompts_per_step=2, rollouts_per_backward=4, save_every=2, device="cpu"),
    )


def updates(config, **changes):
    found = plan(replace(config, **changes), calibrate=False)
    assert found.problems == ()
    return {update.name: update for update in found.updates}


# ---- batch arithmetic -------------------------------------------------------------------------------------------------------------------


def test_grpo_by_hand(config):
    step = updates(config)["whole pictures"]
    assert (step.count, step.judged, step.drawn, step.trained) == (6, 8, 8 * TOKENS, 8 * TOKENS)


def test_two_stages_by_hand(config):
    """Six steps of a 3:1 cycle are 3 + 2 prefix updates and one suffix update. m = 2, K = 2."""
    algorithm = VARRLConfig(grpo=config.algorithm, middle_step=MiddleStep(index=2), num_continuations=2)
    step = updates(config, algorithm=algorithm)
    assert (step["prefix"].count, step["suffix"].count) == (5, 1)
    assert (step["prefix"].judged, step["suffix"].judged) == (16, 8)
    assert step["prefix"].drawn == 8 * PREFIX + 16 * (TOKENS - PREFIX)
    assert step["prefix"].trained == 8 * PREFIX
    assert step["suffix"].drawn == 2 * PREFIX + 8 * (TOKENS - PREFIX), "one prefix for each prompt"
    assert step["suffix"].trained == 8 * TOKENS
    found = plan(replace(config, algorithm=algorithm), calibrate=False)
    assert (found.middle_step, found.prefix_share) == (2, PREFIX / TOKENS)
    assert found.total(lambda update: update.judged) == 5 * 16 + 8


def test_switches_of_two_stages(config):
    algorithm = VARRLConfig(grpo=config.algorithm, middle_step=MiddleStep(index=2), num_continuations=2, tree_reuse=True)
    step = updates(config, algorithm=replace(algorithm, shared_prefix_baseline=False))
    assert step["prefix"].trained == 8 * PREFIX + 16 * TOKENS
    assert step["suffix"].drawn == 8 * TOKENS
    assert updates(config, algorithm=replace(algorithm, suffix_updates=0)).keys() == {"prefix"}


def test_a_prefix_of_all_steps_is_no_prefix(config):
    """It draws and trains what plain GRPO does, and is called what it is."""
    whole = VARRLConfig(grpo=config.algorithm, middle_step=MiddleStep(resolution=1.0), prefix_updates=1, suffix_updates=0)
    assert updates(config, algorithm=whole) == updates(config)
    text = format_plan(plan(replace(config, algorithm=whole), calibrate=False))
    assert "6 x whole pictures: 8 pictures judged" in text
    assert "all 3 scales: whole pictures are trained on" in text


def test_guidance_draws_twice_and_iterations_train_again(config):
    once = updates(config)["whole pictures"]
    guided = updates(config, sample_law=LawConfig(cfg_scale=(2.0,)))["whole pictures"]
    again = updates(config, algorithm=replace(config.algorithm, num_iterations=3))["whole pictures"]
    with_reference = updates(config, algorithm=replace(config.algorithm, beta=0.1))["whole pictures"]
    assert guided.flops == {**once.flops, "rollout": 2 * once.flops["rollout"]}
    assert again.flops == {**once.flops, "train": 3 * once.flops["train"]}
    assert with_reference.flops["train"] == pytest.approx(once.flops["train"] * 4 / 3)
    assert again.trained == 3 * once.trained


# ---- a picture's cost -------------------------------------------------------------------------------------------------------------------


def test_operations_of_a_forward_pass_by_hand():
    """Two operations for each multiplication: matrices of a token, attention of scale t over all up to t, matrices of a row."""
    config = replace(TINY, text=None, num_classes=3)
    family = family_of(without_memory(config))
    d, hidden, vocab, channels = 32, 128, 16, 4
    token = 4 * d * d + 2 * d * hidden + d * vocab
    attention = 2 * d * (1 * 1 + 2 * 3 + 8 * 11)
    row = 6 * d * d + 2 * d * d
    assert family.forward(3).flops == 2 * (11 * token + attention + row + 10 * channels * d)
    assert family.forward(1).flops == 2 * (token + 2 * d + row)


def test_operations_of_the_tokenizer_are_those_of_its_convolutions():
    family = family_of(without_memory(TINY))
    assert decoder_cost(family).flops < autoencoder_cost(family).flops
    convolution = nn.Conv2d(3, 5, 3, padding=1, device="meta")
    assert cost(lambda: convolution(torch.empty(1, 3, 4, 6)), convolution).flops == 2 * 5 * 4 * 6 * 3 * 9


def test_what_autograd_keeps_by_hand():
    """The input of the product, and the output of the ReLU; the weights are there anyway."""
    layer = nn.Linear(4, 8, device="meta")
    assert cost(lambda: layer(torch.empty(1, 4)).relu(), layer).saved == 4 * (4 + 8)


def test_activations_grow_with_the_scales():
    family = family_of(without_memory(TINY))
    assert family.forward(2).saved < family.forward(3).saved


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_bytes_are_those_of_a_real_optimizer(name):
    model, _ = fresh(TINY)
    optimizer = build_optimizer(model, OptimConfig(name=name))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [tensor for state in optimizer.state.values() for key, tensor in state.items() if key != "step"]
    assert optimizer_bytes(model, OptimConfig(name=name)) == sum(tensor.numel() * 4 for tensor in kept)


def test_memory_by_hand(config):
    model, tokenizer = fresh(TINY)
    weights = 4 * sum(p.numel() for p in model.parameters())
    found = plan(
        replace(config, train=replace(config.train, ema_decay=0.9), algorithm=replace(config.algorithm, beta=0.1)), calibrate=False
    )
    assert found.parameters == {"transformer": weights // 4, "tokenizer": sum(p.numel() for p in tokenizer.parameters())}
    assert [found.memory[part] for part in ("weights", "gradients", "reference", "moving average")] == [weights] * 4
    assert found.memory["optimizer"] == 2 * weights
    assert found.memory["logits"] == 3 * 4 * (4 * TOKENS * 16)
    assert found.memory["activations"] == 4 * family_of(without_memory(TINY)).forward(3).saved
    plain = plan(config, calibrate=False).memory
    assert not {"reference", "moving average"} & plain.keys()
    half = plan(replace(config, train=replace(config.train, dtype="bfloat16")), calibrate=False).memory
    assert half["activations"] * 2 == plain["activations"]


def test_the_next_chunk_is_drawn_while_one_is_trained_on(config):
    """Two chunks of one group of 4 are held at once; of a single chunk, drawn and then trained on, the larger part."""
    cache = 2 * TINY.depth * TINY.width * TOKENS * 4 * 4
    two = plan(config, calibrate=False).memory
    assert two["key-value cache"] == cache
    assert "activations" in two
    one = plan(replace(config, algorithm=replace(config.algorithm, rollouts_per_chunk=8)), calibrate=False).memory
    assert one.keys() == two.keys() - {"key-value cache"}
    assert one["activations"] == two["activations"] > 2 * cache


def test_no_weight_is_read(config, tmp_path):
    """Weights replaced by as many other bytes: loading them fails, a plan does not look at them."""
    folder = save_tiny(tmp_path / "base")
    file = folder / "model.safetensors"
    file.write_bytes(b"x" * file.stat().st_size)
    assert plan(replace(config, model=str(folder)), calibrate=False).problems == ()


def test_time_is_operations_over_speed(config):
    assert plan(config, calibrate=False).seconds is None
    found = plan(config)
    total = sum(sum(update.flops.values()) * update.count for update in found.updates)
    assert found.seconds is not None
    assert 1e8 < total / found.seconds < 1e15
    assert matmul_speed(torch.device("cpu"), torch.float32, 32, seconds=0.01) > 1e8


# ---- what is missing --------------------------------------------------------------------------------------------------------------------


def test_all_that_is_missing_is_said_at_once(config):
    data = replace(config.data, fonts=("sans", "comic"), palettes=("ink", "mud"), word_list="no.txt")
    rewards = {"mine": WeightedReward(reward=PythonRewardConfig(target="no.py:f"))}
    found = plan(replace(config, model="nowhere", data=data, rewards=rewards), calibrate=False)
    for value, problem in zip(["model='nowhere'", "font 'comic'", "palette 'mud'", "'no.txt'", "'no.py:f'"], found.problems, strict=True):
        assert value in problem
    assert found.updates == ()
    assert format_plan(found).count("problem ") == 5


def test_what_the_model_cannot_do_is_a_problem(config):
    too_far = VARRLConfig(grpo=config.algorithm, middle_step=MiddleStep(index=9))
    data = replace(config.data, fonts=("serif",))
    found = plan(replace(config, algorithm=too_far, data=data, sample_law=LawConfig(top_k=17)), calibrate=False)
    assert len(found.problems) == 2
    assert "top_k=17" in found.problems[0]
    assert "'serif'" in found.problems[1]
    assert "step 9" in plan(replace(config, algorithm=too_far), calibrate=False).problems[0]


def test_a_folder_that_is_not_there(config):
    found = plan(replace(config, data=FolderConfig(path="no/train", heldout="no/heldout")), calibrate=False)
    assert [problem.split(":")[0] for problem in found.problems] == ["data folder 'no/heldout'", "data folder 'no/train'"]


def problems_of(config, folder, prompts, **changes):
    """Of the run on a folder with these prompts."""
    write_folder(folder, None, prompts)
    return plan(replace(config, data=FolderConfig(path=str(folder)), **changes), calibrate=False).problems


def test_prompts_that_the_model_cannot_read(config, tmp_path):
    (problem,) = problems_of(config, tmp_path / "labels", [Prompt(text="ACE", label=7), Prompt(label=7)])
    assert problem.startswith("prompt label 7: this model reads text and knows no classes.")
    classes = str(save_tiny(tmp_path / "classes", replace(TINY, text=None, num_classes=3)))
    assert problems_of(config, tmp_path / "fine", [Prompt(label=0), Prompt(text="a cat", label=2)], model=classes) == ()
    without, beyond = problems_of(config, tmp_path / "none", [Prompt(label=3), Prompt(text="ACE"), Prompt()], model=classes)
    assert without.startswith("2 of 3 prompts (the first: 'ACE') have no label: this model draws classes 0 to 2,")
    assert beyond == "prompt label 3: the model knows classes 0 to 2. Give one of them."


def test_held_out_prompts_that_the_model_cannot_read(config, tmp_path):
    for name, text in (("train", "ACE"), ("heldout", "ace")):
        write_folder(tmp_path / name, None, [Prompt(text=text)])
    data = FolderConfig(path=str(tmp_path / "train"), heldout=str(tmp_path / "heldout"))
    (problem,) = plan(replace(config, data=data), calibrate=False).problems
    assert problem.startswith("prompt 'ace' holds ['a', 'c', 'e']")


def test_classes_are_checked_before_a_pre_training(config, tmp_path):
    write_folder(tmp_path, None, [Prompt(label=0), Prompt()])
    fresh = PretrainConfig(model=replace(TINY, text=None, num_classes=3), data=FolderConfig(path=str(tmp_path)))
    (problem,) = plan(fresh, calibrate=False).problems
    assert problem.startswith("1 of 2 prompts have no label")


def test_prompts_that_ocr_cannot_judge(config, tmp_path, monkeypatch):
    monkeypatch.setattr("varl.plan.missing.open_engine", lambda engine: None)
    ocr = {"ocr": WeightedReward(reward=OCRConfig(engine="rapidocr")), **TOY}
    mute = [Prompt(text="ACE"), Prompt(text="BAD", regions=(Region(text="BAD"),))]
    (problem,) = problems_of(config, tmp_path / "mute", mute, rewards=ocr)
    assert problem.startswith("rewards.ocr: 1 of 2 prompts (the first: 'ACE') have no text region, so nothing to read.")
    assert problems_of(config, tmp_path / "mute", mute) == ()
    strange = [Prompt(text="ACE", regions=(Region(text="Acé 5"),))]
    (problem,) = problems_of(config, tmp_path / "strange", strange, rewards=ocr)
    assert "prompts ask for '5É', which the reader does not answer with." in problem
    known = {"ocr": WeightedReward(reward=OCRConfig(engine="rapidocr", letters="abcdefé5"))}
    assert problems_of(config, tmp_path / "strange", strange, rewards=known) == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(config):
    found = plan(replace(config, train=replace(config.train, device="cuda")))
    (problem,) = found.problems
    assert problem.startswith("device='cuda': there is no CUDA device here")
    assert plan(PretrainConfig(model=TINY, data=config.data, device="cuda"), calibrate=False).problems == (problem,)


def test_evaluation_without_prompts_for_it(config, tmp_path):
    write_folder(tmp_path, None, [Prompt(text="ACE")])
    (problem,) = plan(replace(config, data=FolderConfig(path=str(tmp_path)), eval=EvalConfig(every=5)), calibrate=False).problems
    assert problem.startswith("eval.every=5, but the data holds no prompts for evaluation")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollouts_per_backward": 9}, "rollouts_per_backward=9 is more than the 8 pictures"),
        ({"save_every": 7}, "save_every=7 is beyond the last of 6 steps"),
        ({"optim": OptimConfig(warmup_steps=6)}, "warmup_steps=6: the run of 6 steps never leaves"),
    ],
)
def test_doubts_about_training(config, changes, said):
    assert plan(config, calibrate=False).warnings == ()
    (warning,) = plan(replace(config, train=replace(config.train, **changes)), calibrate=False).warnings
    assert said in warning


def test_other_doubts(config):
    found = plan(replace(config, algorithm=replace(config.algorithm, rollouts_per_chunk=3)), calibrate=False)
    assert "rollouts_per_chunk=3 is less than a group of 4" in found.warnings[0]
    assert "one chunk" in plan(replace(config, algorithm=replace(config.algorithm, rollouts_per_chunk=8)), calibrate=False).warnings[0]
    assert "differ" in plan(replace(config, sample_law=LawConfig(top_k=2)), calibrate=False).warnings[0]
    assert "16, 48" in plan(replace(config, data=replace(config.data, image_size=(16, 48))), calibrate=False).warnings[0]
    assert "eval.samples=128" in plan(replace(config, eval=replace(config.eval, every=1)), calibrate=False).warnings[0]


# ---- pre-training, and words ------------------------------------------------------------------------------------------------------------


def test_pretraining(config):
    fresh = PretrainConfig(model=TINY, data=config.data, tokenizer_steps=5, tokenizer_batch=3, steps=7, batch=2)
    found = plan(fresh, calibrate=False)
    assert found.problems == ()
    assert [(u.name, u.count, u.trained) for u in found.updates] == [("tokenizer", 5, 3 * TOKENS), ("transformer", 7, 2 * TOKENS)]
    assert [u.name for u in plan(replace(fresh, init=config.model), calibrate=False).updates] == ["transformer"]


def test_problems_of_pretraining(config):
    fresh = PretrainConfig(model=replace(TINY, depth=2), data=replace(config.data, image_size=(16, 64)), init=config.model)
    problems = plan(fresh, calibrate=False).problems
    assert "another config" in problems[0]
    assert "data.image_size=(16, 64)" in problems[1]
    assert len(problems) == 2


def test_in_words(config):
    algorithm = VARRLConfig(grpo=config.algorithm, middle_step=MiddleStep(index=2))
    text = format_plan(plan(replace(config, algorithm=algorithm), calibrate=False))
    for part in (
        "11 tokens on 3 scales: 1x1, 1x2, 2x4",
        "the first 2 scales hold 27.3% of the tokens",
        "5 x prefix: 8 pictures judged, 88 tokens drawn, 24 tokens trained on",
        "6 steps, 48 pictures and reward calls",
        "bright: varl.rewards.toy:brightness",
        "nothing is missing",
    ):
        assert part in text
    assert [in_bytes(2.5e9), in_bytes(3e6)] == ["2.50 GB", "3.0 MB"]
    assert [in_time(0.25), in_time(75), in_time(7260)] == ["0.25 s", "1 min 15 s", "2 h 1 min"]
