from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tabular import InstantJudge, brightness
from tiny import TINY, TINY_MAR, WIDE_RASTER, save_tiny, word_file, write_pictures
from tiny_infinity import SQUARE
from varl.build import PromptSets, build_algorithm, build_policy, build_prompts, new_policy
from varl.checkpoints import model as model_folder
from varl.checkpoints.llamagen import released
from varl.checkpoints.model import fresh
from varl.config import (
    CaptionConfig,
    ClassifierConfig,
    EvalConfig,
    FolderConfig,
    GlyphsConfig,
    GRPOConfig,
    LawConfig,
    MARGRPOConfig,
    MiddleStep,
    OCRConfig,
    OptimConfig,
    PicturesConfig,
    PretrainConfig,
    PythonRewardConfig,
    ReconstructionConfig,
    RunConfig,
    TrainConfig,
    UnmaskingConfig,
    VAPIConfig,
    VARRLConfig,
    WeightedReward,
    WordsConfig,
)
from varl.data.folder import write_folder
from varl.plan import format_plan, plan
from varl.plan.cost import IN_CONTEXT, LOGIT_COPIES, contexts_of, matmul_speed, optimizer_bytes, run_updates, training_bytes
from varl.plan.denoising import PATHS
from varl.plan.families import MaskedFamily, autoencoder_cost, cost, decoder_cost, encoder_cost, family_of
from varl.plan.words import in_bytes, in_time
from varl.policies.raster import RasterPolicy
from varl.rng import Stream
from varl.train.optim import build_optimizer
from varl.types import Prompt, Region

TOKENS, PREFIX = 11, 3
"""Of the tiny model, and of its first two scales."""
TOY = {"bright": WeightedReward(reward=PythonRewardConfig(target="varl.rewards.toy:brightness"))}
MSE = {"mse": WeightedReward(reward=ReconstructionConfig(lpips_weight=0.0))}


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
    family = family_of(config)
    d, hidden, vocab, channels = 32, 128, 16, 4
    token = 4 * d * d + 2 * d * hidden + d * vocab
    attention = 2 * d * (1 * 1 + 2 * 3 + 8 * 11)
    row = 6 * d * d + 2 * d * d
    assert family.forward(3).flops == 2 * (11 * token + attention + row + 10 * channels * d)
    assert family.forward(1).flops == 2 * (token + 2 * d + row)


def test_operations_of_the_tokenizer_are_those_of_its_convolutions():
    family = family_of(TINY)
    assert decoder_cost(family).flops < autoencoder_cost(family).flops
    convolution = nn.Conv2d(3, 5, 3, padding=1, device="meta")
    assert cost(lambda: convolution(torch.empty(1, 3, 4, 6)), convolution).flops == 2 * 5 * 4 * 6 * 3 * 9


def test_what_autograd_keeps_by_hand():
    """The input of the product, and the output of the ReLU; the weights are there anyway."""
    layer = nn.Linear(4, 8, device="meta")
    assert cost(lambda: layer(torch.empty(1, 4)).relu(), layer).saved == 4 * (4 + 8)


def test_activations_grow_with_the_scales():
    family = family_of(TINY)
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
    assert found.memory["activations"] == 4 * family_of(TINY).forward(3).saved
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
    for watched in ({}, {name: replace(part, weight=0.0) for name, part in config.rewards.items()}):
        assert "none has a weight but 0" in plan(replace(config, rewards=watched), calibrate=False).warnings[0]
    assert "16, 48" in plan(replace(config, data=replace(config.data, image_size=(16, 48))), calibrate=False).warnings[0]
    assert "eval.samples=128" in plan(replace(config, eval=replace(config.eval, every=1)), calibrate=False).warnings[0]


# ---- the raster family ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """VA-pi with P = 3 and G = 3, two pictures in a chunk: 12 rows of 4 for each picture, in two chunks."""
    folder = tmp_path_factory.mktemp("real")
    return RunConfig(
        model=str(save_tiny(folder / "base", WIDE_RASTER)),
        data=PicturesConfig(path=str(write_pictures(folder / "pictures")), image_size=(16, 32)),
        rewards=MSE,
        algorithm=VAPIConfig(grpo=GRPOConfig(num_generations=3, rollouts_per_chunk=6)),
        train=TrainConfig(steps=5, prompts_per_step=3, rollouts_per_backward=8, save_every=2, device="cpu"),
    )


def built(config) -> tuple[RasterPolicy, PromptSets]:
    policy = new_policy(model_folder.load(config.model), sample_law=config.sample_law, score_law=config.score_law)
    assert isinstance(policy, RasterPolicy)
    return policy, build_prompts(config.data, 0, 2)


def counted(fn) -> int:
    """Operations while `fn` runs, attention written out, as it is on the meta device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def test_va_pi_by_hand(real):
    """A step is 3 pictures, 9 draws of 8 tokens; one training pass for each picture."""
    step = updates(real)[IN_CONTEXT]
    assert (step.count, step.judged, step.drawn, step.trained) == (5, 9, 9 * 8, 3 * 8)
    whole = family_of(WIDE_RASTER).forward(8).flops
    assert (step.flops["rollout"], step.flops["train"]) == (3 * whole, 3 * 3 * whole)
    guided = updates(real, sample_law=LawConfig(cfg_scale=(2.0,)), score_law=LawConfig(cfg_scale=(2.0,)))[IN_CONTEXT]
    assert (guided.flops["rollout"], guided.flops["train"]) == (2 * 3 * whole, 2 * 3 * 3 * whole)
    near = replace(real.algorithm, grpo=replace(real.algorithm.grpo, beta=0.1, num_iterations=2))
    assert updates(real, algorithm=near)[IN_CONTEXT].flops["train"] == 2 * 4 * 3 * whole


@pytest.mark.parametrize("cut", [8, 3, 1])
def test_operations_of_a_va_pi_step_are_those_of_a_real_one(real, cut):
    """Also where micro-batches of 3 rows, or 1, cut pictures of 4 rows apart."""
    config = replace(real, train=replace(real.train, rollouts_per_backward=cut))
    policy, prompts = built(config)
    algorithm = build_algorithm(config.algorithm, policy, prompts.pictures)

    def step() -> None:
        judge, rng = InstantJudge(brightness), Stream(seed=0, rows=(0, 1, 2))
        for piece in algorithm.collect(policy, prompts.train[::2], judge, rng, 0):
            for part in piece.split(cut):
                (-algorithm.objective(policy, part)[0]).backward()

    assert counted(step) == sum(updates(config)[IN_CONTEXT].flops.values())


def test_pictures_that_micro_batches_cut_apart(real):
    """Chunks of 2 and 1 pictures, 4 rows each: in pieces of 3, rows 0-2 3-5 6-7 and 0-2 3."""
    for most, held in ((8, [[2], [1]]), (4, [[1, 1], [1]]), (3, [[1, 2, 1], [1, 1]]), (1, [[1] * 8, [1] * 4])):
        config = replace(real, train=replace(real.train, rollouts_per_backward=most))
        assert contexts_of(config, real.algorithm, 8) == held


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_operations_of_free_drawing_are_those_of_real_drawing(real, guidance):
    """The class is read once for its group; every further token sees one more."""
    law = LawConfig(cfg_scale=(guidance,))
    algorithm = VARRLConfig(grpo=GRPOConfig(num_generations=4), middle_step=MiddleStep(index=3), num_continuations=2)
    config = replace(real, rewards=TOY, algorithm=algorithm, sample_law=law, score_law=law, train=replace(real.train, prompts_per_step=1))
    policy, prompts = built(config)
    rng, group = Stream(seed=0, rows=(0, 1, 2, 3)), [prompts.train[0]] * 4
    step = updates(config)
    prefix = policy.prefix(group, rng, steps=3)
    to_middle = counted(lambda: policy.prefix(group, rng, steps=3))
    assert to_middle + counted(lambda: policy.complete(prefix, rng.repeat(2))) == step["prefix"].flops["rollout"]
    whole = updates(replace(config, algorithm=algorithm.grpo))["whole pictures"]
    assert counted(lambda: policy.rollout(group, rng)) == whole.flops["rollout"]
    assert step["prefix"].trained == 4 * 3
    assert (step["prefix"].drawn, whole.drawn) == (4 * 3 + 8 * 5, 4 * 8)


def test_operations_of_a_raster_pass_by_hand():
    """Two for each multiplication: matrices of a token, and attention written out over all pairs of tokens."""
    d, hidden, vocab, tokens = 32, 48, 16, 8
    token = 4 * d * d + 3 * d * hidden + d * vocab
    assert family_of(WIDE_RASTER).forward(8).flops == 2 * tokens * (token + 2 * d * tokens)


def test_encoding_looks_for_each_tokens_code():
    family = family_of(WIDE_RASTER)
    pixels = cost(lambda: family.tokenizer.features(torch.empty(1, 3, 16, 32)), family.tokenizer).flops
    assert encoder_cost(family).flops == pixels + 2 * 8 * 4 * 16


@pytest.mark.parametrize(("size", "forward"), [("B", 0.125), ("XXL", 1.692)])
def test_operations_of_the_released_sizes(real, size, forward):
    """As counted on the authors' code at 384 pixels, in 10^12: a step of 16 pictures and 8 draws of each."""
    family = family_of(released(size, image_size=384))
    algorithm = VAPIConfig(grpo=GRPOConfig(num_generations=8))
    step = replace(real, algorithm=algorithm, train=replace(real.train, prompts_per_step=16, rollouts_per_backward=72))
    (update,) = run_updates(step, family, None)
    want = {"encode": 16 * 0.313, "rollout": 16 * forward, "decode": 128 * 0.570, "train": 3 * 16 * forward}
    assert {phase: flops / 1e12 for phase, flops in update.flops.items()} == pytest.approx(want, rel=5e-3)


def test_memory_of_va_pi_by_hand(real):
    """Two pictures at most in a micro-batch, so 2 rows of activations and logits. The next chunk is drawn meanwhile, without a cache."""
    found = plan(real, calibrate=False).memory
    assert found["activations"] == 2 * family_of(WIDE_RASTER).forward(8).saved
    assert found["logits"] == 3 * 4 * (2 * 8 * 16)
    assert found["drawing"] == 4 * 4 * (2 * 8 * 16)
    assert "key-value cache" not in found
    free = plan(replace(real, rewards=TOY, algorithm=GRPOConfig(num_generations=3, rollouts_per_chunk=3)), calibrate=False).memory
    assert free["key-value cache"] == 2 * WIDE_RASTER.depth * WIDE_RASTER.width * 8 * 3 * 4
    model, _ = fresh(WIDE_RASTER)
    assert found["weights"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_bytes_of_a_raster_model(name):
    model, _ = fresh(WIDE_RASTER)
    optimizer = build_optimizer(model, OptimConfig(name=name))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [tensor for state in optimizer.state.values() for key, tensor in state.items() if key != "step"]
    assert optimizer_bytes(family_of(WIDE_RASTER).model, OptimConfig(name=name)) == sum(tensor.numel() * 4 for tensor in kept)


def test_a_raster_plan_in_words(real):
    text = format_plan(plan(real, calibrate=False))
    for part in (
        "picture     8 tokens, 2x4\n",
        "5 x draws in the context of a picture: 9 pictures judged, 72 tokens drawn, 24 tokens trained on; operations: encode ",
        "mse: reconstruction, MSE\n",
        "nothing is missing",
    ):
        assert part in text
    assert "scale" not in text
    for m, said in ((2, "the first 2 tokens are 25.0% of the picture"), (8, "all 8 tokens: whole pictures are trained on")):
        algorithm = VARRLConfig(grpo=GRPOConfig(num_generations=4), middle_step=MiddleStep(index=m), suffix_updates=0)
        assert said in format_plan(plan(replace(real, rewards=TOY, algorithm=algorithm), calibrate=False))


def test_pretraining_of_a_raster_model(real):
    base = PretrainConfig(model=WIDE_RASTER, data=real.data, tokenizer_steps=5, tokenizer_batch=3, steps=7, batch=2)
    assert plan(real, calibrate=False).problems == ()
    found = plan(base, calibrate=False)
    assert found.problems == ()
    assert [(u.name, u.count, u.trained) for u in found.updates] == [("tokenizer", 5, 3 * 8), ("transformer", 7, 2 * 8)]
    assert found.updates[1].flops["train"] == 3 * 2 * family_of(WIDE_RASTER).forward(8).flops
    _, tokenizer = fresh(WIDE_RASTER)
    saved = cost(lambda: tokenizer.render(tokenizer.features(torch.empty(1, 3, 16, 32))), tokenizer.to("meta")).saved
    assert plan(replace(base, tokenizer_batch=9), calibrate=False).memory["activations"] == 9 * saved, (
        "a run's tokenizer is frozen, not this"
    )
    assert plan(replace(base, init=real.model), calibrate=False).problems == ()
    (problem,) = plan(replace(base, data=replace(real.data, image_size=(32, 32))), calibrate=False).problems
    assert problem.startswith("data.image_size=(32, 32), but the model's grids and stride make (16, 32) pixels.")


def test_data_of_a_classifier(real):
    small = ClassifierConfig(num_classes=2, image_size=(16, 16), widths=(8,))
    size, label = plan(PretrainConfig(model=small, data=real.data), calibrate=False).problems[::-1]
    assert size.startswith("data.image_size=(16, 32), but the model sees (16, 16) pixels. Make them equal.")
    assert label == "prompt label 2: the model knows classes 0 to 1. Give one of them."


def test_a_classifier_by_hand(real):
    """A convolution of 3 to 8 channels at 16x32 places, one to 4 at half the size, a norm between two linear layers."""
    small = ClassifierConfig(num_classes=3, image_size=(16, 32), widths=(8, 4))
    found = plan(PretrainConfig(model=small, data=real.data, steps=7, batch=2), calibrate=False)
    assert found.problems == ()
    places = 16 * 32
    one = 2 * (places * 9 * 3 * 8 + places // 4 * 9 * 8 * 4 + places // 4 * 4 * 4 + 4 * 3)
    assert [(u.name, u.count, u.flops) for u in found.updates] == [("classifier", 7, {"train": 3 * 2 * one})]
    weights = (9 * 3 * 8 + 3 * 8) + (9 * 8 * 4 + 3 * 4) + (places // 4 * 4 * 4 + 4) + 2 * 4 + (4 * 3 + 3)
    assert found.parameters == {"classifier": weights}
    assert found.memory["gradients"] == 4 * weights
    text = format_plan(found)
    assert "step        7 x classifier: operations: train " in text
    assert "token" not in text


def test_a_janus_that_is_not_whole_is_named(real, tmp_path):
    """What a whole one costs is tested with Janus-Pro."""
    (tmp_path / "config.json").write_text('{"model_type": "janus"}')
    found = plan(replace(real, model=str(tmp_path)), calibrate=False)
    assert found.updates == ()
    assert "cannot be read as a Janus" in found.problems[0]


# ---- what VA-pi lacks -------------------------------------------------------------------------------------------------------------------


def lacks(config, **changes):
    return plan(replace(config, **changes), calibrate=False).problems


def test_va_pi_needs_real_pictures_and_a_model_that_reads_them(config, real):
    words = replace(config.data, image_size=(16, 32))
    reward, method = lacks(real, data=FolderConfig(path=real.data.path, heldout=None))[1:]
    assert reward.startswith("reconstruction compares with real pictures, and this data has none.")
    assert method.startswith("va_pi compares with real pictures, and this data has none.")
    (problem,) = lacks(config, algorithm=real.algorithm, data=words)
    assert problem.startswith("va_pi reads real pictures; NextScalePolicy cannot. Use a raster model or GRPOConfig().")


def test_a_perceptual_distance_needs_a_network(real):
    (problem,) = lacks(real, rewards={"like": WeightedReward(reward=ReconstructionConfig())})
    assert problem.startswith("reconstruction.lpips_weight=1.0: there is no network to look with.")


def test_pictures_that_are_not_there_are_named_and_nothing_else(real, tmp_path):
    (problem,) = lacks(real, data=replace(real.data, path="nowhere"))
    assert problem.startswith("pictures.path='nowhere': there is no such folder.")
    both = lacks(real, data=replace(real.data, path=str(tmp_path), heldout="nowhere"))
    assert "holds no picture" in both[0]
    assert both[1].startswith("pictures.path='nowhere'")
    (tmp_path / "prompts.jsonl").write_text('{"label": 0, "image": "gone.png"}\n')
    (problem,) = lacks(real, data=replace(real.data, path=str(tmp_path)))
    assert "prompts.jsonl:1: image 'gone.png': there is no file" in problem


def test_broken_pictures_are_found_by_looking(real, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "a" / "1.png").write_bytes(b"not a picture")
    Image.fromarray(torch.zeros(16, 32, dtype=torch.int32).numpy()).save(folder / "c" / "0.tiff")
    broken, deep = lacks(real, data=replace(real.data, path=str(folder)))
    assert "a/1.png: cannot be read" in broken
    assert "c/0.tiff: has mode I, more than 8 bits for each colour. Save it with 8 bits" in deep


def test_labels_that_the_model_does_not_know(real, tmp_path):
    folder = write_pictures(tmp_path / "four", classes=4)
    (problem,) = lacks(real, data=replace(real.data, path=str(folder)))
    assert problem == "prompt label 3: the model knows classes 0 to 2. Give one of them."
    (problem,) = lacks(real, data=replace(real.data, heldout=str(folder)))
    assert problem == "prompt label 3: the model knows classes 0 to 2. Give one of them."
    (problem,) = lacks(real, data=replace(real.data, path=str(folder / "a")))
    assert problem.startswith("2 of 2 prompts have no label: this model draws classes 0 to 2")


def test_classes_for_a_model_that_reads_captions(real, tmp_path):
    captions = replace(WIDE_RASTER, num_classes=None, captions=CaptionConfig(tokens=4, width=6))
    write_folder(tmp_path, torch.zeros(1, 3, 16, 32, dtype=torch.uint8), [Prompt(label=1)])
    found = lacks(real, model=str(save_tiny(tmp_path / "base", captions)), data=replace(real.data, path=str(tmp_path)))
    assert "prompt label 1: this model reads text and knows no classes. Give the prompt a text." in found


def test_pictures_of_another_size_than_the_models(real):
    (problem,) = lacks(real, data=replace(real.data, image_size=(24, 24)))
    assert problem.startswith("data.image_size=(24, 24), but the model's grids and stride make (16, 32) pixels. Make them equal.")


def test_evaluation_needs_other_pictures(real):
    (problem,) = lacks(real, eval=EvalConfig(every=5))
    assert problem.startswith("eval.every=5, but the data holds no prompts for evaluation. Set data.heldout")
    held = plan(replace(real, data=replace(real.data, heldout=real.data.path), eval=EvalConfig(every=5, samples=9)), calibrate=False)
    assert held.problems == ()
    assert held.warnings[0] == "eval.samples=9, but there are 6 held-out prompts or words: there are no more samples."


def test_letters(real):
    data = GlyphsConfig(image_size=(16, 32), fonts=("matplotlib",), letters="ABC", shares=(1.0, 0.0, 0.0, 1.0))
    assert lacks(real, data=data, eval=EvalConfig(every=1)) == ()
    (problem,) = lacks(real, data=replace(data, letters="ABCD"))
    assert problem == "prompt label 3: the model knows classes 0 to 2. Give one of them."
    absent, few = (lacks(real, data=replace(data, **change)) for change in ({"fonts": ("no_fonts",)}, {"shares": (1.0, 0.0, 0.0, 0.0)}))
    assert len(absent) == 1
    assert absent[0].startswith("glyphs.fonts: no_fonts: no such package, folder or file. Run `pip install no-fonts`, or set glyphs.fonts")
    assert few == ("glyphs.shares=(1.0, 0.0, 0.0, 0.0): no font family is in 'heldout'. Give it a share.",)
    (problem,) = lacks(real, data=replace(data, palettes=("mud",)))
    assert problem.startswith("palette 'mud': unknown. Known: ink")


def test_letters_that_ocr_cannot_be_asked_for(real, monkeypatch):
    monkeypatch.setattr("varl.plan.missing.open_engine", lambda engine: None)
    (problem,) = lacks(real, rewards={"ocr": WeightedReward(reward=OCRConfig(engine="rapidocr"))})
    assert "6 of 6 prompts (the first: 'a') have no text region" in problem


def test_doubts_about_va_pi(real):
    def said(most: int) -> tuple[str, ...]:
        return plan(replace(real, train=replace(real.train, rollouts_per_backward=most)), calibrate=False).warnings

    assert said(4) == said(8) == said(12) == ()
    assert said(9) == ()  # the chunk has only 8
    (warning,) = said(3)
    assert warning.startswith(
        "train.rollouts_per_backward=3 cuts pictures apart, each of which has 4 rows, its draws and its own tokens: 6 "
    )
    assert warning.endswith("training passes in a step for 3 pictures. Set a multiple of 4.")
    (warning,) = said(13)
    assert warning == "train.rollouts_per_backward=13 is more than the 12 rows (draws and own tokens) of a step: a step is one piece."


# ---- the masked family ------------------------------------------------------------------------------------------------------------------

COUNTS, MOVES = (2, 2, 4), 8
"""Tokens of each of 3 steps; moves, of which t = 2 .. 6 are admissible."""
MAR_KNOWN = 0 + 2 + 4


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """P = 2, G = 4, one prompt in a chunk, all steps, 3 moves, 2 further paths that are trained on."""
    folder = tmp_path_factory.mktemp("masked")
    return RunConfig(
        model=str(save_tiny(folder / "base", TINY_MAR)),
        data=PicturesConfig(path=str(write_pictures(folder / "pictures")), image_size=(16, 32)),
        rewards=TOY,
        algorithm=mar_grpo(),
        unmasking=UnmaskingConfig(steps=3, denoise_steps=MOVES),
        train=TrainConfig(steps=5, prompts_per_step=2, rollouts_per_backward=6, save_every=2, device="cpu"),
    )


def mar_grpo(beta: float = 0.0, loss_type="dapo", **changes) -> MARGRPOConfig:
    grpo = GRPOConfig(num_generations=4, rollouts_per_chunk=4, beta=beta, loss_type=loss_type)
    own = {"ar_steps": 0, "denoise_moves": 3, "num_trajectories": 2, "trajectories": "include_primary", "uncertain_fraction": 1.0}
    return MARGRPOConfig(grpo=grpo, **(own | changes))


def masked_family(config) -> MaskedFamily:
    family = family_of(TINY_MAR, config.unmasking)
    assert isinstance(family, MaskedFamily)
    return family


def head_move() -> int:
    """Operations of a move of one token: into the head, two blocks, out to mean and variance."""
    d, w = 4, 20
    return 2 * (d * w + 2 * (3 * w * w + 2 * w * w) + 2 * w * w + 2 * d * w)


def test_operations_of_a_masked_pass_by_hand(masked):
    """The encoder sees 2 buffer places and the known tokens, the decoder all 10; attention is written out."""
    family = masked_family(masked)
    assert (family.counts, family.known, family.admissible) == (COUNTS, (0, 2, 4), 5)

    def block(width, seen):
        return seen * 12 * width * width + 2 * width * seen * seen

    for known in (0, 3, 7):
        by_hand = known * 4 * 16 + block(16, 2 + known) + (2 + known) * 16 * 24 + block(24, 10)
        assert family.seeing(known).flops == 2 * by_hand
        assert family.seeing(known) == cost(lambda known=known: family._see(known), family.model)
    assert family.reading().flops == 2 * 24 * 20
    assert family.moving().flops == head_move()
    assert family.making() == 2 * MOVES * (256 * 20 + 20 * 20)
    assert family.condition().flops == 0


def test_mar_grpo_by_hand(masked):
    """Each picture: 3 passes, 8 tokens of 8 moves; 2 further paths of each token; 3 moves of each path trained on."""
    (step,) = updates(masked).values()
    family, making = masked_family(masked), 2 * MOVES * (256 * 20 + 20 * 20)
    passes, read, move = sum(family.seeing(n).flops for n in (0, 2, 4)), 2 * 24 * 20, head_move()
    assert (step.name, step.count, step.judged, step.drawn, step.trained) == (PATHS, 5, 8, 8 * 8 * 3, 8 * 8)
    assert step.flops["rollout"] == 8 * (passes + 8 * (read + 8 * move)) + 2 * making
    assert step.flops["paths"] == 8 * 2 * 8 * (read + 8 * move) + 2 * making
    into = 2 * 4 * 20  # what goes into the head is given
    scored = 8 * 8 * 3 * (2 * read + 3 * (2 * move - into))
    assert step.flops["train"] == 8 * 3 * passes + scored + 4 * making
    for changes, judged in (({"trajectories": "rewarded"}, 24), ({"trajectories": "precision_weight"}, 8)):
        (other,) = updates(masked, algorithm=mar_grpo(**changes)).values()
        assert other.judged == judged
        assert other.flops["decode"] == judged * decoder_cost(family).flops
    (damped,) = updates(masked, algorithm=mar_grpo(trajectories="precision_weight")).values()
    assert damped.flops["train"] == 8 * 3 * passes + scored / 3 + 2 * making


def test_some_steps_and_moves_are_a_share_of_all(masked):
    (whole,), (some,) = (updates(masked, algorithm=mar_grpo(ar_steps=steps)).values() for steps in (3, 1))
    making = 4 * masked_family(masked).making()
    assert some.flops["train"] - making == pytest.approx((whole.flops["train"] - making) / 3)
    assert some.flops["rollout"] == whole.flops["rollout"]
    assert some.trained == round(8 * 8 / 3)


class Operations(TorchDispatchMode):
    """Of the products in it; torch's counter cannot look into a backward pass that starts inside of it."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


GUIDED = LawConfig(cfg_scale=(2.0,))


@pytest.mark.parametrize(
    ("algorithm", "sample", "score"),
    [
        (GRPOConfig(num_generations=4, rollouts_per_chunk=4, beta=0.1), LawConfig(), LawConfig()),
        (mar_grpo(), GUIDED, LawConfig()),
        (mar_grpo(beta=0.1, trajectories="rewarded"), GUIDED, GUIDED),
        (mar_grpo(beta=0.1, loss_type="grpo", trajectories="release", support="unknown", consistency=-3.0), GUIDED, GUIDED),
    ],
    ids=["grpo", "guided, scored without", "rewarded", "release"],
)
def test_operations_of_a_masked_step_are_those_of_a_real_one(masked, algorithm, sample, score):
    """But for the first layer: no gradient goes on from it to the tokens, which a training pass of three forward ones counts."""
    config = replace(masked, algorithm=algorithm, sample_law=sample, score_law=score)
    policy = build_policy(config, torch.device("cpu"), reference=algorithm.grpo.beta > 0)
    method, prompts = build_algorithm(algorithm, policy), [Prompt(label=0), Prompt(label=2)]
    with sdpa_kernel(SDPBackend.MATH), Operations() as counter:
        for piece in method.collect(policy, prompts, InstantJudge(brightness), Stream(seed=0, rows=(0, 1)), 0):
            for part in piece.split(6):
                (-method.objective(policy, part)[0]).backward()
    (step,) = updates(config).values()
    first = 2 * 4 * 16 * MAR_KNOWN * 8 * (1 + score.guided)
    assert counter.total == sum(step.flops.values()) - first


def test_rows_of_further_paths_and_of_steps(masked):
    """A picture and its 2 further paths are 3 rows; with support=unknown each of its steps has 3."""
    assert contexts_of(masked, masked.algorithm, 3) == [[2, 2], [2, 2]]
    unknown = mar_grpo(loss_type="grpo", support="unknown", trajectories="release", ar_steps=2)
    assert contexts_of(masked, unknown, 3) == [[2] * 4, [2] * 4]
    assert contexts_of(masked, mar_grpo(trajectories="precision_weight"), 3) == [[4], [4]]
    cut = replace(masked, train=replace(masked.train, rollouts_per_backward=4))
    (warning,) = plan(cut, calibrate=False).warnings
    assert (
        "rollouts_per_backward=4 cuts pictures apart, each of which has 3 rows, its own path and the further ones: 12 training" in warning
    )
    assert plan(masked, calibrate=False).warnings == ()
    many = replace(masked, train=replace(masked.train, rollouts_per_backward=25))
    assert "is more than the 24 rows (steps and further paths) of a step" in plan(many, calibrate=False).warnings[0]


def test_memory_of_mar_grpo_by_hand(masked):
    """Two pictures in a micro-batch. A frozen head has no gradients, and neither moves nor paths make the graph larger."""
    model, _ = fresh(TINY_MAR)
    weights, frozen = (4 * sum(p.numel() for p in part.parameters()) for part in (model, model.head))
    family, found = masked_family(masked), plan(masked, calibrate=False).memory
    assert (found["weights"], found["gradients"], found["optimizer"]) == (weights, weights - frozen, 2 * (weights - frozen))
    assert found["activations"] == 2 * sum(family.seeing(n).saved for n in (0, 2, 4))
    assert found["paths"] == 4 * 3 * 4 * 8 * (9 * 4 + 8)
    assert found["latents"] == 4 * 4 * 8 * 24
    assert found["derivatives"] == 2 * 3 * 8 * 24 * 4
    for changes in ({"denoise_moves": 5}, {"num_trajectories": 3}):
        more = plan(replace(masked, algorithm=mar_grpo(**changes)), calibrate=False).memory
        assert more["activations"] in (found["activations"], found["activations"] // 2)  # 6 rows hold 1 picture with 3 further paths
    learns = plan(replace(masked, algorithm=mar_grpo(train_head=True)), calibrate=False).memory
    assert learns["gradients"] == weights
    assert "derivatives" not in learns
    assert learns["head"] > found["head"]


def test_a_masked_plan_in_words(masked):
    text = format_plan(plan(masked, calibrate=False))
    assert "picture     8 tokens in 3 steps, 2x4\n" in text
    assert "5 x denoising paths of pictures: 8 pictures judged, 192 tokens drawn, 64 tokens trained on; operations: rollout " in text
    assert "nothing is missing" in text


def test_what_a_masked_run_lacks(masked, config):
    for changes, said in (
        ({"unmasking": UnmaskingConfig(steps=9, denoise_steps=8)}, "9 steps for 8 tokens"),
        ({"algorithm": mar_grpo(ar_steps=4)}, "mar_grpo.ar_steps=4: this model has 3 steps."),
        ({"algorithm": mar_grpo(denoise_moves=6)}, "mar_grpo.denoise_moves=6: only 5 of the 8 moves are admissible."),
    ):
        (problem,) = lacks(masked, **changes)
        assert problem.startswith(said)
    (problem,) = lacks(config, algorithm=mar_grpo())
    assert problem.startswith("mar_grpo trains on denoising paths; NextScalePolicy draws its tokens at once.")
    (problem,) = lacks(config, unmasking=UnmaskingConfig())
    assert problem.startswith("unmasking: this model does not choose in which order it draws.")


def test_pretraining_of_a_mar(masked):
    """Of 8 tokens 6, 7 or 8 are masked, with the odds of a normal around 1 of deviation 1/4 between 0.7 and 1; each at two times."""
    odds = {6: (0.1587 - 0.1151) / 0.3849, 7: (0.3085 - 0.1587) / 0.3849, 8: (0.5 - 0.3085) / 0.3849}
    base = PretrainConfig(model=TINY_MAR, data=masked.data, tokenizer_steps=5, tokenizer_batch=3, steps=7, batch=2)
    found = plan(base, calibrate=False)
    assert found.problems == ()
    assert [(u.name, u.count) for u in found.updates] == [("tokenizer", 5), ("transformer", 7)]
    family, w = masked_family(masked), 20
    missing = sum(count * p for count, p in odds.items())
    into_head, time = 2 * 4 * w, 2 * (256 * w + w * w)
    head = 3 * 2 * 24 * w + 2 * (3 * head_move() - into_head + 3 * time - 2 * 256 * w)
    passes = 3 * sum(p * family.seeing(8 - count).flops for count, p in odds.items())
    assert found.updates[1].flops["train"] == pytest.approx(2 * (passes + missing * head), rel=2e-3)
    assert found.updates[1].trained == 15
    assert found.memory["gradients"] == found.memory["weights"] == 4 * found.parameters["transformer"]
    assert [u.name for u in plan(replace(base, init=masked.model), calibrate=False).updates] == ["transformer"]


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


def test_a_bit_has_two_logits():
    """4 pictures of 1 + 4 tokens of 3 bits; of codes, as many as there are."""
    bits = training_bytes(family_of(SQUARE), 2, 4, 4)["logits"]
    codes = training_bytes(family_of(TINY), 2, 4, 4)["logits"]
    assert (bits, codes) == (LOGIT_COPIES * 4 * 4 * 5 * 3 * 2, LOGIT_COPIES * 4 * 4 * 3 * 16)
