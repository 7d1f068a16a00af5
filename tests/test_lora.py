"""Low-rank adapters: by hand, on every family, as peft itself reads them, and as a run that is stopped and merged."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import test_janus
import test_policy_infinity
import test_policy_masked
import test_policy_next_scale
import test_policy_nova
import test_policy_raster
import tiny_harmon
import toy_run
from test_captions import save_phi
from tiny import status
from tiny_janus import save_janus
from toy_run import config, metrics, weights, with_steps
from varl.build import build_policy, new_policy, trains_head
from varl.checkpoints import adapter, run_state
from varl.checkpoints import model as model_folder
from varl.config import GRPOConfig, LoraConfig, MARGRPOConfig, RunConfig, UnmaskingConfig, VARRLConfig
from varl.errors import CheckpointError, ConfigError
from varl.models.lora import ADAPTER, adapt, adapters, chosen, merge
from varl.plan import plan
from varl.plan.cost import learned, weights_of
from varl.run import train
from varl.types import Prompt

SMALL = LoraConfig(r=2, lora_alpha=6.0)


@pytest.fixture(autouse=True)
def caption_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "captions"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    toy_run.make(folder)
    return folder


@pytest.fixture(scope="module")
def phi(tmp_path_factory) -> Path:
    return save_phi(tmp_path_factory.mktemp("phi"))


TEXTS = [Prompt(text="a"), Prompt(text="bad cab")]
LABELS = [Prompt(label=0), Prompt(label=3)]
FAMILIES = {
    "VAR by class": (lambda phi: test_policy_next_scale.make(), LABELS),
    "VAR by characters": (lambda phi: test_policy_next_scale.make(test_policy_next_scale.TEXT), [Prompt(text="AB"), Prompt(text="C")]),
    "Infinity": (lambda phi: test_policy_infinity.make(), TEXTS),
    "LlamaGen": (lambda phi: test_policy_raster.make(), LABELS),
    "Janus": (lambda phi: test_janus.make(), TEXTS),
    "MAR": (lambda phi: test_policy_masked.make(), LABELS),
    "NOVA": (lambda phi: test_policy_nova.make(test_policy_nova.TINY, phi), TEXTS),
    "Harmon": (lambda phi: new_policy(tiny_harmon.make(), unmasking=UnmaskingConfig(steps=3, denoise_steps=6)), TEXTS),
}


def unsettle(module: torch.nn.Module) -> None:
    """B away from 0, so that A matters too."""
    noise = torch.Generator().manual_seed(1)
    for _, layer in adapters(module):
        layer.lora_B[ADAPTER].weight.data.normal_(std=0.2, generator=noise)


def adapted(policy):
    adapt(policy.module, chosen(policy.module, SMALL), SMALL, seed=5)
    return policy


# ---- layers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_is_in_use_and_nothing_else_learns(family, phi):
    make, prompts = FAMILIES[family]
    policy = make(phi)
    base = copy.deepcopy(policy.module.state_dict())
    rng, before = test_policy_masked.stream(2), torch.get_rng_state()
    drawn = policy.rollout(prompts, rng)
    adapted(policy)
    assert torch.equal(torch.get_rng_state(), before)  # A comes from its address
    same = policy.rollout(prompts, rng)
    assert torch.equal(same.actions, drawn.actions)
    torch.testing.assert_close(same.logp, drawn.logp, rtol=1e-6, atol=1e-6)  # B is 0
    unsettle(policy.module)
    other = policy.rollout(prompts, rng)
    assert (policy.score(drawn).logp - drawn.logp).abs().max() > 1e-3
    assert (policy.score(other).logp - other.logp).abs().max() <= 1e-5 * max(1.0, other.logp.abs().max().item())
    policy.score(other).logp.sum().backward()
    learning = {name: p for name, p in policy.module.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * len(adapters(policy.module)) > 0
    assert all(".lora_" in name for name in learning)
    assert [name for name, p in learning.items() if p.grad is None or not p.grad.any()] == []
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in policy.module.state_dict().items() if ".lora_" not in name}
    assert kept.keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in kept.items())


def test_a_layer_by_hand():
    """y = W x + b + lora_alpha / r B A x, also where the bias comes with the input; A within 1 / sqrt(in)."""
    module = adapted(test_policy_next_scale.make()).module
    unsettle(module)
    attn = module.blocks[0].attn
    a, b = attn.mat_qkv.lora_A[ADAPTER].weight, attn.mat_qkv.lora_B[ADAPTER].weight
    assert (a.shape, b.shape) == ((2, 16), (48, 2))
    assert 0.2 < a.abs().max() <= 0.25
    x, bias = torch.randn(3, 16), torch.randn(48)
    want = x @ attn.mat_qkv.base_layer.weight.T + bias + 3.0 * x @ a.T @ b.T
    torch.testing.assert_close(attn.mat_qkv(x, bias), want, rtol=1e-5, atol=1e-5)
    a, b, inner = attn.proj.lora_A[ADAPTER].weight, attn.proj.lora_B[ADAPTER].weight, attn.proj.base_layer
    want = x @ inner.weight.T + inner.bias + 3.0 * x @ a.T @ b.T
    torch.testing.assert_close(attn.proj(x), want, rtol=1e-5, atol=1e-5)


def test_a_is_that_of_its_seed_and_layer():
    def drawn(seed: int) -> list[torch.Tensor]:
        module = test_policy_next_scale.make().module
        adapt(module, chosen(module, SMALL), SMALL, seed)
        return [layer.lora_A[ADAPTER].weight for _, layer in adapters(module)]

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))
    assert not torch.equal(one[0][:, :16], one[1][:, :16])


def test_which_layers():
    module = test_policy_next_scale.make().module
    inside = ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2", "ada_lin.1")
    assert chosen(module, SMALL) == [f"blocks.{i}.{name}" for i in (0, 1) for name in inside]
    some = replace(SMALL, target_modules=("mat_qkv", "head"))
    assert chosen(module, some) == ["blocks.0.attn.mat_qkv", "blocks.1.attn.mat_qkv", "head"]
    with pytest.raises(ConfigError, match=r"no linear layer that is trained is called 'qkv'\. Those in the blocks are attn\.mat_qkv"):
        chosen(module, replace(SMALL, target_modules=("qkv",)))
    with pytest.raises(ConfigError, match=r"r=17: blocks\.0\.attn\.mat_qkv has only 16 inputs or outputs\. Set 16 or less"):
        chosen(module, LoraConfig(r=17))
    harmon = tiny_harmon.make()[0]
    assert not [name for name in chosen(harmon, SMALL) if name.startswith("llm.")]  # frozen, so not adapted
    masked = test_policy_masked.make().module
    with pytest.raises(ConfigError, match="no linear layer that is trained is called 'cond_embed'"):
        chosen(masked, replace(SMALL, target_modules=("cond_embed",)))


def test_merged_is_what_was_adapted():
    policy = adapted(test_policy_next_scale.make())
    unsettle(policy.module)
    rollout = test_policy_next_scale.rollout_of(policy)
    want, plain = policy.score(rollout).logp, test_policy_next_scale.make().module.state_dict()
    merge(policy.module)
    assert not adapters(policy.module)
    assert policy.module.state_dict().keys() == plain.keys()
    torch.testing.assert_close(policy.score(rollout).logp, want, rtol=1e-5, atol=1e-5)


# ---- the reference


def references(home: Path, lora: LoraConfig | None):
    run = replace(config(home), algorithm=GRPOConfig(beta=0.1), seed=0)
    return build_policy(replace(run, train=replace(run.train, lora=lora)), torch.device("cpu"), reference=True)


def test_the_reference_is_the_model_without_adapters_and_no_copy(home):
    policy = references(home, SMALL)
    shared = {p.data_ptr() for p in policy.module.parameters()}
    assert all(p.data_ptr() in shared and not p.requires_grad for p in policy.reference.parameters())
    prompts, rng = [Prompt(text="A"), Prompt(text="BC")], test_policy_masked.stream(2)
    rollout = policy.rollout(prompts, rng)
    assert policy.score(rollout).kl.abs().max() == 0
    unsettle(policy.module)
    score, plain = policy.score(rollout), references(home, None).score(rollout)
    assert torch.equal(score.ref_logp, plain.ref_logp)
    assert score.kl.max() > 1e-3


def test_of_a_janus_the_reference_shares_what_is_not_trained(tmp_path):
    run = RunConfig(model=str(save_janus(tmp_path / "janus")), algorithm=GRPOConfig(beta=0.1))
    for lora in (None, SMALL):
        asked = replace(run, train=replace(run.train, lora=lora))
        policy = build_policy(asked, torch.device("cpu"), reference=True)
        shared = {p.data_ptr() for p in policy.module.whole.parameters()}
        own = {name for name, p in policy.reference.whole.named_parameters() if p.data_ptr() not in shared}
        drawing = {"model.language_model", "model.generation_embeddings", "model.generation_aligner", "model.generation_head"}
        assert {".".join(name.split(".")[:2]) for name in own} == (set() if lora else drawing)


# ---- as peft keeps them


def test_peft_reads_what_was_saved(tmp_path):
    policy = adapted(test_policy_next_scale.make())
    unsettle(policy.module)
    rollout = test_policy_next_scale.rollout_of(policy)
    adapter.save(tmp_path / "adapter", policy.module, SMALL, base="models/base")
    assert adapter.base_of(tmp_path / "adapter") == "models/base"
    fresh = test_policy_next_scale.make()
    peft.PeftModel.from_pretrained(fresh.module, tmp_path / "adapter")  # in place
    assert torch.equal(fresh.score(rollout).logp, policy.score(rollout).logp)
    ours = test_policy_next_scale.make()
    adapter.load(tmp_path / "adapter", ours.module)
    assert torch.equal(ours.score(rollout).logp, policy.score(rollout).logp)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
def test_adapters_of_a_janus_fit_what_transformers_makes_of_its_folder(tmp_path):
    policy = adapted(test_janus.make())
    unsettle(policy.module)
    rollout = policy.rollout(TEXTS, test_policy_masked.stream(2))
    adapter.save(tmp_path / "adapter", policy.module, SMALL, base="janus")
    names = load_file(tmp_path / "adapter" / adapter.WEIGHTS)
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in names
    other = test_janus.make()
    peft.PeftModel.from_pretrained(other.module.whole, tmp_path / "adapter")
    assert torch.equal(other.score(rollout).logp, policy.score(rollout).logp)


def test_adapters_that_do_not_fit_are_refused(tmp_path, capsys):
    policy = adapted(test_policy_next_scale.make())
    adapter.save(tmp_path / "adapter", policy.module, SMALL, base="base")
    wider = replace(test_policy_next_scale.CLASSES, width=32)
    with pytest.raises(CheckpointError, match=r"of another shape \(20\)"):
        adapter.load(tmp_path / "adapter", test_policy_next_scale.make(wider).module)
    with pytest.raises(CheckpointError, match="fits no layer of Raster"):
        adapter.load(tmp_path / "adapter", test_policy_raster.make().module)
    settings = tmp_path / "adapter" / adapter.SETTINGS
    told = json.loads(settings.read_text())
    (tmp_path / "theirs").mkdir()
    shutil.copy(tmp_path / "adapter" / adapter.WEIGHTS, tmp_path / "theirs")
    (tmp_path / "theirs" / adapter.SETTINGS).write_text(json.dumps(told | {"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="adapters of the kind 'IA3', and only LORA is read"):
        adapter.base_of(tmp_path / "theirs")
    for said, refused in ("{", "cannot be read as JSON"), ("{}", "adapters of the kind None"):
        (tmp_path / "theirs" / adapter.SETTINGS).write_text(said)
        with pytest.raises(CheckpointError, match=refused):
            adapter.base_of(tmp_path / "theirs")
    (tmp_path / "theirs" / adapter.SETTINGS).write_text(json.dumps(told | {"base_model_name_or_path": None}))
    assert status("merge", tmp_path / "theirs", "--out", tmp_path / "merged") == 2
    assert "does not say what it was trained on. Give it with --model." in " ".join(capsys.readouterr().err.split())
    settings.write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json has 2 bytes"):
        adapter.base_of(tmp_path / "adapter")


# ---- runs


@pytest.fixture(scope="module")
def whole(home) -> Path:
    assert train(config(home, lora=SMALL), home / "lora").done
    return home / "lora"


def test_a_run_keeps_its_adapters_and_leaves_a_model(home, whole, tmp_path, capsys):
    state = run_state.load(whole / "checkpoints" / "step-000006").tensors
    assert state["model"].keys() == state["ema"].keys()
    assert all(".lora_" in name for name in state["model"])
    lines = metrics(whole)
    assert all(line["grad_norm"] > 0 for line in lines)
    (base, _), (model, _) = model_folder.load(home / "base"), model_folder.load(whole / "model")
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, base.state_dict()[name])}
    assert moved == {f"{name}.weight" for name in chosen(base, SMALL)}
    assert status("merge", whole / "adapter", "--out", tmp_path / "merged") == 0
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == weights(whole)
    assert status("merge", whole / "adapter", "--model", "bundled:words", "--out", tmp_path / "wrong") == 2
    assert "the weights do not fit NextScale" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_a_run_that_was_stopped_goes_on_bit_for_bit(home, whole, tmp_path):
    asked = config(home, lora=SMALL)
    train(with_steps(asked, 4), tmp_path)  # its schedule is constant, so a shorter run is a part of the longer
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  steps: 4\n", "  steps: 6\n"))
    train(asked, tmp_path)
    assert metrics(tmp_path) == metrics(whole)
    assert weights(tmp_path) == weights(whole)
    for file in (whole / "adapter").iterdir():
        assert (tmp_path / "adapter" / file.name).read_bytes() == file.read_bytes()


def test_a_run_does_not_go_on_from_another_model(home, whole, tmp_path):
    for name in ("base", "lora"):
        shutil.copytree(home / name, tmp_path / name)
    asked = config(home, lora=SMALL)
    longer = replace(with_steps(asked, 7), model=str(tmp_path / "base"))
    for setting, new in (("steps: 6", "steps: 7"), (str(home / "base"), str(tmp_path / "base"))):
        file = tmp_path / "lora" / "config.yaml"
        file.write_text(file.read_text().replace(setting, new))
    model, tokenizer = model_folder.load(tmp_path / "base")
    model_folder.save(tmp_path / "base", model, tokenizer, {"another": "note"})
    with pytest.raises(CheckpointError, match="step-000006: the run began with another model than is now where"):
        train(longer, tmp_path / "lora")


def test_var_rl_trains_adapters_too(home, tmp_path):
    asked = config(home, "var_rl", lora=SMALL, image_every=0)
    assert isinstance(asked.algorithm, VARRLConfig)
    assert train(with_steps(asked, 3), tmp_path).done
    assert [line["stage"] for line in metrics(tmp_path)] == ["prefix", "prefix", "suffix"]


# ---- before any weight is loaded


def test_what_a_plan_says_of_adapters(home):
    asked = replace(config(home), algorithm=GRPOConfig(beta=0.1, num_generations=4, rollouts_per_chunk=4))
    plain, low = (plan(replace(asked, train=replace(asked.train, lora=lora)), calibrate=False) for lora in (None, SMALL))
    module = references(home, SMALL).module
    few, all_ = learned(module), weights_of(module)
    assert low.parameters == {**plain.parameters, "adapters": few}
    assert low.parameters["transformer"] + few == all_
    parts = {"weights": 4 * all_, "gradients": 4 * few, "optimizer": 8 * few, "moving average": 4 * few}
    assert {name: low.memory.get(name) for name in parts} == parts
    assert "reference" in plain.memory
    assert "reference" not in low.memory
    assert low.memory["activations"] < plain.memory["activations"]
    (before,), (now,) = plain.updates, low.updates
    assert 3 / 4 < now.flops["train"] / before.flops["train"] < 1  # 2 passes and the reference's for 3 and it; and the adapters' own


def test_what_cannot_be_adapted_is_said_before_weights_are_loaded(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "base")
    blank = bytes((tmp_path / "base" / "model.safetensors").stat().st_size)
    (tmp_path / "base" / "model.safetensors").write_bytes(blank)  # would be refused if it were read
    asked = replace(config(home, lora=replace(SMALL, target_modules=("w1",))), model=str(tmp_path / "base"))
    with pytest.raises(ConfigError, match="no linear layer that is trained is called 'w1'"):
        train(asked, tmp_path / "run")
    assert any("'w1'" in problem for problem in plan(asked, calibrate=False).problems)
    with pytest.raises(ConfigError, match=r"lora\.r=0: must be 1 or more"):
        LoraConfig(r=0)
    with pytest.raises(ConfigError, match=r"lora\.lora_alpha=-1\.0: must be above 0"):
        LoraConfig(lora_alpha=-1.0)
    masked = MARGRPOConfig(train_head=True)
    with pytest.raises(ConfigError, match=r"train\.lora with mar_grpo\.train_head=true"):
        replace(asked, algorithm=masked)
    assert trains_head(replace(asked, algorithm=masked, train=replace(asked.train, lora=None)))
    assert not trains_head(asked)


def test_without_peft_it_is_said_before_weights_are_loaded(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("varl.models.lora.find_spec", lambda name: None)
    asked = config(home, lora=SMALL)
    needed = r"LoRA needs the package peft, which is not installed\. Run `pip install 'varl\[lora\]'`"
    with pytest.raises(ConfigError, match=needed):
        train(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert any("LoRA needs the package peft" in problem for problem in plan(asked, calibrate=False).problems)
    assert status("merge", home / "lora" / "adapter", "--out", tmp_path / "merged") == 2
    assert "LoRA needs the package peft" in capsys.readouterr().err
