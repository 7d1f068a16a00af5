"""What makes a run smaller and changes nothing: blocks computed again, few pictures drawn at once; and that the recipes fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import test_policy_masked
import test_policy_next_scale
import toy_run
from test_docs import released_configs
from test_lora import FAMILIES, SMALL, adapted, caption_cache, phi  # noqa: F401
from tiny_infinity import make_model
from toy_run import config, metrics
from varl.algorithms.vmr import middle_step
from varl.build import build_algorithm, build_policy, trains_head
from varl.checkpoints import model as model_folder
from varl.config import FolderConfig, LawConfig, MiddleStep, PythonRewardConfig, RunConfig, UnmaskingConfig, VARRLConfig, WeightedReward
from varl.data.folder import write_folder
from varl.errors import ConfigError
from varl.models.layers import KVCache, recompute
from varl.models.lora import ADAPTER, adapters
from varl.plan import plan
from varl.plan.cost import run_memory
from varl.plan.denoising import denoising_memory
from varl.plan.families import MaskedFamily, cost, family_of
from varl.policies.masked import MaskedPolicy
from varl.recipes import recipe
from varl.rewards.judge import RewardJudge
from varl.rewards.toy import brightness
from varl.run import train
from varl.tokenizers.bsq import BSQ
from varl.train.loop import REPLAY_TOLERANCE
from varl.types import Prompt

GUIDED = LawConfig(cfg_scale=(2.0,))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    toy_run.make(folder)
    return folder


# ---- blocks computed again


def gradient(policy, rollout) -> tuple[dict[str, torch.Tensor], int, list[int]]:
    """Of the summed log-probability; bytes that autograd saved outside of what is computed again; and how often each block was computed."""
    calls = [0] * len(policy.module.blocks)
    hooks = []
    for index, block in enumerate(policy.module.blocks):

        def count(*_: object, index: int = index) -> None:
            calls[index] += 1

        inner = next(part for part in block.modules() if isinstance(part, torch.nn.Linear))
        hooks.append(inner.register_forward_hook(count))
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    policy.module.zero_grad(set_to_none=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        total = policy.score(rollout).logp.sum()
    total.backward()
    for hook in hooks:
        hook.remove()
    return {name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None}, sum(saved.values()), calls


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_the_same_bit_for_bit(family, lora, phi):  # noqa: F811
    make, prompts = FAMILIES[family]
    policy = make(phi)
    if lora:
        adapted(policy)
    names = list(policy.module.state_dict())
    rollout = policy.rollout(prompts, test_policy_masked.stream(2))
    want, saved, once = gradient(policy, rollout)
    recompute(policy.module.blocks)
    found, less, twice = gradient(policy, rollout)
    assert found.keys() == want.keys() != set()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert less < saved
    for block, before, now in zip(policy.module.blocks, once, twice, strict=True):
        learns = any(p.requires_grad for p in block.parameters())
        assert now == 2 * before > 0 or not learns  # a frozen one (Harmon's reader) also reads captions, of which there is no gradient
    assert list(policy.module.state_dict()) == names
    assert torch.equal(policy.rollout(prompts, test_policy_masked.stream(2)).logp, rollout.logp)


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh().tanh()


def test_saved_bytes_by_hand():
    """Of three blocks tanh(tanh(x)) after a tanh and before a product: 1 + 3 x 2 results of 4 numbers each. Where the blocks are computed
    again, the three inputs and what goes into the product; and a third of the other three."""
    blocks = torch.nn.ModuleList([Twice(), Twice(), Twice()])

    def run() -> torch.Tensor:
        x = torch.empty(1, 4, requires_grad=True).tanh()
        for block in blocks:
            x = block(x)
        return x * x

    whole, again = cost(run, blocks), cost(run, blocks, list(blocks))
    assert whole.saved == 16 * (1 + 3 * 2)
    assert again.saved == 16 * (3 + 1) + 16 * 3 // 3
    assert [type(block) for block in blocks] == [Twice] * 3


# ---- few pictures at once


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """Rows of each cache that is made."""
    rows: list[int] = []
    made, forked = KVCache.empty.__func__, KVCache.fork

    def empty(cls, depth, shape, weight):
        rows.append(shape[0])
        return made(cls, depth, shape, weight)

    def fork(self, index, capacity):
        rows.append(len(index))
        return forked(self, index, capacity)

    monkeypatch.setattr(KVCache, "empty", classmethod(empty))
    monkeypatch.setattr(KVCache, "fork", fork)
    return rows


@pytest.mark.parametrize("family", ["VAR by class", "Infinity", "LlamaGen", "Janus"])
def test_pictures_drawn_a_few_at_once_are_the_same(family, held, phi):  # noqa: F811
    make, prompts = FAMILIES[family]
    policy = make(phi).under(GUIDED)
    five, rng = [*prompts, *prompts, prompts[0]], test_policy_masked.stream(5)
    want = policy.rollout(five, rng)
    prefix = policy.prefix(prompts, test_policy_masked.stream(2), steps=2)
    further = policy.complete(prefix, test_policy_masked.stream(6, first=10))
    held.clear()
    policy.rollouts_per_draw = 2
    found = policy.rollout(five, rng)
    again = policy.complete(prefix, test_policy_masked.stream(6, first=10))
    assert max(held) == 4  # guided: each of two rows twice
    for one, two in ((found, want), (again, further)):
        assert torch.equal(one.actions, two.actions)
        torch.testing.assert_close(one.logp, two.logp, rtol=1e-5, atol=1e-5)
        assert (one.prompts, one.index.tolist()) == (two.prompts, two.index.tolist())
        assert torch.equal(one.sampled, two.sampled)
        assert torch.equal(one.step, two.step)


def test_two_laws_are_recorded_of_every_slice(phi):  # noqa: F811
    make, prompts = FAMILIES["VAR by class"]
    policy = make(phi)
    policy.sample_law = LawConfig(temperature=0.7)
    want = policy.rollout(prompts, test_policy_masked.stream(2))
    policy.rollouts_per_draw = 1
    found = policy.rollout(prompts, test_policy_masked.stream(2))
    torch.testing.assert_close(found.sample_logp, want.sample_logp, rtol=1e-5, atol=1e-5)
    assert (found.sample_logp - found.logp).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["MAR", "NOVA", "Harmon"])
def test_a_masked_model_passes_a_few_pictures_at_once(family, phi, monkeypatch):  # noqa: F811
    make, prompts = FAMILIES[family]
    policy = make(phi)
    assert isinstance(policy, MaskedPolicy)
    five, rng, rows = [*prompts, *prompts, prompts[0]], test_policy_masked.stream(5), []
    want = policy.rollout(five, rng)
    forward = type(policy.module).forward

    def watched(self, condition, tokens, known):
        rows.append(len(tokens))
        return forward(self, condition, tokens, known)

    monkeypatch.setattr(type(policy.module), "forward", watched)
    policy.rollouts_per_draw = 2
    found = policy.rollout(five, rng)
    assert sorted(set(rows)) == [1, 2]
    torch.testing.assert_close(found.actions, want.actions, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logp, want.logp, rtol=1e-4, atol=1e-3)
    rows.clear()
    policy.score(want)  # a micro-batch is not cut again
    assert set(rows) == {5}


# ---- runs


def test_a_run_is_the_same_in_less_memory(home, tmp_path):
    small = {"gradient_checkpointing": True, "rollouts_per_draw": 3}
    one, two = (config(home, "var_rl", image_every=0, steps=3, **more) for more in ({}, small))
    train(one, tmp_path / "one")
    train(two, tmp_path / "two")
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        assert b["reward"] == pytest.approx(a["reward"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_settings_reach_the_policy(home):
    asked = config(home, gradient_checkpointing=True, rollouts_per_draw=3, lora=SMALL)
    policy = build_policy(asked, torch.device("cpu"), reference=True)
    assert policy.rollouts_per_draw == 3
    assert {type(block).__name__ for block in policy.module.blocks} == {"Block"}
    rollout = policy.rollout([Prompt(text="A")] * 4, test_policy_masked.stream(4))
    _, _, calls = gradient(policy, rollout)
    assert calls == [2, 2]
    with pytest.raises(ConfigError, match=r"train\.rollouts_per_draw=-1: must be 0 \(none\) or more"):
        config(home, rollouts_per_draw=-1)


# ---- recipes


RELEASED = {
    "models/infinity_2b": "Infinity-2B",
    "models/llamagen_xl_c2i_384": "LlamaGen-XL by class",
    "models/llamagen_xl_t2i_256": "LlamaGen-XL by caption",
    "models/llamagen_xxl_c2i_384": "LlamaGen-XXL by class",
    "models/mar_base": "MAR-B",
    "models/nova_d48w1024_sd512": "nova-d48w1024-sd512",
    **{f"models/var_d{depth}": f"VAR-d{depth}" for depth in (16, 20, 24, 30, 36)},
}
ONE_GPU = 141e9
"""Bytes of an H200."""
FITTING = (
    *(f"var_rl/var_d{depth}_c2i" for depth in (16, 20, 24, 30, 36)),
    *("va_pi/llamagen_xl_c2i", "va_pi/llamagen_xxl_c2i", "va_pi/llamagen_xl_t2i", "ar_grpo/llamagen_xl_c2i"),
    *("mar_grpo/mar_b_c2i", "mar_grpo/nova_512", "mar_grpo/nova_512_release", "var_rl/infinity_2b_text"),
)


def planned(config: RunConfig) -> dict[str, int]:
    again = config.train.gradient_checkpointing
    unmasking = config.unmasking or UnmaskingConfig()
    family = family_of(released_configs()[RELEASED[config.model]], unmasking, head_learns=trains_head(config), again=again)
    if isinstance(family, MaskedFamily):
        return denoising_memory(config, family)
    algorithm = config.algorithm
    return run_memory(config, family, middle_step(algorithm.middle_step, family.layout) if isinstance(algorithm, VARRLConfig) else None)


@pytest.mark.parametrize("name", FITTING)
def test_recipes_of_released_models_fit_one_gpu(name):
    """With a third to spare for what a plan does not count: rewards, caption encoders, what an allocator wastes."""
    assert sum(planned(recipe(name)).values()) < ONE_GPU / 1.33


def test_what_checkpointing_and_drawing_a_few_save_of_infinity():
    ours = recipe("var_rl/infinity_2b_text")
    greedy = replace(ours, train=replace(ours.train, gradient_checkpointing=False, rollouts_per_draw=0))
    small, large = planned(ours), planned(greedy)
    assert large["key-value cache"] == 8 * small["key-value cache"]  # 32 pictures of a group and its continuations, 4 at once
    assert large["activations"] > 9 * small["activations"]
    assert sum(large.values()) > ONE_GPU


def test_attention_keeps_no_matrix_of_pairs():
    """Of 2 heads, 4 queries, 6 keys and 8 numbers: the operations of both products; queries, keys, values, result and a number a query."""
    q, k = torch.nn.Linear(1, 2 * 4 * 8, device="meta"), torch.nn.Linear(1, 2 * 6 * 8, device="meta")
    both = torch.nn.ModuleList([q, k])

    def run() -> torch.Tensor:
        x = torch.empty(1, 1)
        keys = k(x).view(1, 2, 6, 8)
        return torch.nn.functional.scaled_dot_product_attention(q(x).view(1, 2, 4, 8), keys, keys * 1)

    found = cost(run, both)
    assert found.flops == 2 * (64 + 96) + 2 * 2 * (2 * 4 * 6 * 8)
    assert found.saved == 4 * (1 + 64 + 96 + 96 + 64 + 8)


def test_a_plan_says_what_is_held_though_the_caption_encoder_is_not_there_yet(tmp_path):
    model = make_model()
    model_folder.save(tmp_path / "base", model, BSQ(model.config.tokenizer, model.config.grids), {})
    write_folder(tmp_path / "data", None, [Prompt(text="a cab")])
    asked = RunConfig(
        model=str(tmp_path / "base"),
        data=FolderConfig(path=str(tmp_path / "data")),
        rewards={"bright": WeightedReward(reward=PythonRewardConfig(target="varl.rewards.toy:brightness"))},
    )
    found = plan(asked, calibrate=False)
    (problem,) = found.problems
    assert problem.startswith("captions.encoder='google/flan-t5-xl': there is no such folder")
    assert found.memory["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert found.updates


def test_what_to_do_about_a_run_that_is_too_large(home, monkeypatch):
    monkeypatch.setattr("varl.plan.device_memory", lambda device: 1)
    ways = ["lower train.rollouts_per_backward or train.rollouts_per_draw", "set train.gradient_checkpointing=true", "train adapters"]
    for done, left in ({}, ways), ({"gradient_checkpointing": True, "lora": SMALL}, ways[:1]):
        (said,) = (line for line in plan(config(home, **done), calibrate=False).warnings if "would be held" in line)
        assert [way for way in ways if way in said] == left


def in_bf16(device: str):
    policy = adapted(test_policy_next_scale.make(dtype=torch.bfloat16))
    for _, layer in adapters(policy.module):
        torch.nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.2, generator=torch.Generator().manual_seed(1))
    policy.module.to(device), policy.tokenizer.to(device)
    return policy


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_adapters_and_blocks_computed_again_in_bf16(device):
    """Autocast is on in the backward pass as it was before it."""
    policy = in_bf16(device)
    rollout = policy.rollout([Prompt(label=0), Prompt(label=4)], test_policy_masked.stream(2))
    gap = (policy.score(rollout).logp - rollout.logp).abs().max()
    assert gap <= REPLAY_TOLERANCE[torch.bfloat16] * max(1.0, float(rollout.logp.abs().max()))
    want, _, _ = gradient(policy, rollout)
    recompute(policy.module.blocks)
    found, _, calls = gradient(policy, rollout)
    assert set(calls) == {2}
    assert all(grad.dtype == torch.float32 and grad.any() for grad in found.values())
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_whole_pictures_of_var_rl_are_drawn_a_few_at_once_too(home, held):
    """Where the prefix is all of the picture."""
    algorithm = VARRLConfig(
        grpo=toy_run.GRPO, middle_step=MiddleStep(resolution=1.0), num_continuations=1, prefix_updates=1, suffix_updates=0
    )
    asked = replace(config(home, rollouts_per_draw=3), algorithm=algorithm)
    policy = build_policy(asked, torch.device("cpu"), reference=False)
    rng = test_policy_masked.stream(1)
    judge = RewardJudge({"bright": (1.0, brightness)})
    held.clear()
    (piece,) = build_algorithm(algorithm, policy).collect(policy, [Prompt(text="A")], judge, rng, 0)
    judge.close()
    assert held == [3, 1]
    want = policy.prefix([Prompt(text="A")] * 4, rng.repeat(4), steps=policy.layout.steps)
    assert torch.equal(piece.rollout.actions, want.actions)
