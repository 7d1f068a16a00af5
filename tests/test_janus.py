"""Janus-Pro: against `transformers`' own forward pass on a tiny random model, behind the policy, as a folder, and as a run's model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration, JanusProcessor

from tiny_janus import BOI, BOS, CODES, PAD, SIDE, make_processor, make_whole, save_janus
from varl.algorithms.va_pi import VAPI
from varl.build import model_path, new_policy
from varl.checkpoints import janus
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import damage, load_notes
from varl.config import FolderConfig, GRPOConfig, LawConfig, PythonRewardConfig, RunConfig, TrainConfig, VAPIConfig, WeightedReward
from varl.errors import CheckpointError, ConfigError, DataError
from varl.models.janus import Janus, positions, seen
from varl.models.raster import Condition
from varl.plan import plan
from varl.policies.raster import RasterPolicy, pad_left
from varl.rewards.judge import RewardJudge
from varl.rewards.toy import brightness
from varl.rng import Stream
from varl.run import train
from varl.settings import to_yaml
from varl.types import BranchingPolicy, Prompt, TeacherForcedPolicy

TOKENS = SIDE**2
PROMPTS = [Prompt(text="a"), Prompt(text="bad cab"), Prompt(), Prompt(text="a")]
GUIDED = LawConfig(cfg_scale=(3.0,), temperature=0.9, top_k=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture
def policy() -> RasterPolicy:
    return make()


def make(law: LawConfig = LawConfig(), **rest) -> RasterPolicy:
    return RasterPolicy(*janus.pair_of(make_whole(), make_processor(), "here"), sample_law=law, score_law=law, **rest)


def stream(rows: Sequence[int]) -> Stream:
    return Stream(seed=0, path=("rollout", 0), rows=tuple(rows))


def ids_of(rows: int = 4, seed: int = 3) -> torch.Tensor:
    return torch.randint(CODES, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def gap(policy: RasterPolicy, rollout) -> float:
    return (policy.score(rollout).logp - rollout.logp).abs().max().item()


@torch.no_grad()
def theirs(whole: JanusForConditionalGeneration, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Logits [L, V] of a picture's tokens by `transformers`' own forward pass, all of the sequence given as embeddings."""
    words = whole.get_input_embeddings()(torch.tensor([list(prompt)]))
    picture = whole.prepare_embeddings_for_image_generation(torch.tensor([list(ids)]))
    out = whole(inputs_embeds=torch.cat([words, picture], 1), output_hidden_states=True, use_cache=False)
    hidden = whole.model.language_model(inputs_embeds=torch.cat([words, picture], 1)).last_hidden_state
    torch.testing.assert_close(whole.lm_head(hidden), out.logits, rtol=0, atol=1e-5)
    return whole.model.generation_head(hidden[0, len(prompt) - 1 : -1])


# ---- against transformers


@pytest.mark.parametrize("law", [LawConfig(), LawConfig(cfg_scale=(5.0,))], ids=["plain", "guided"])
def test_log_probabilities_are_those_of_transformers(law):
    """Each row alone and without padding there, all together and padded here; the token at begin-of-image's place draws token 0."""
    policy = make(law)
    whole, ids = policy.module.whole, ids_of()
    score = policy.score(policy.given(ids, PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        (said,) = policy.module.read([prompt.text])
        null = [BOS, *[PAD] * (len(said) - 2), BOI]
        uncond = theirs(whole, null, ids[row].tolist())
        cond = theirs(whole, said.tolist() if prompt.text else null, ids[row].tolist())
        want = (uncond + law.guidance(0) * (cond - uncond)).log_softmax(-1).gather(-1, ids[row][:, None])[:, 0]
        torch.testing.assert_close(score.logp[row], want, rtol=0, atol=1e-5)


def test_greedy_pictures_are_those_of_transformers_own_loop():
    policy = make(LawConfig(cfg_scale=(5.0,), top_k=1))
    whole, texts = policy.module.whole, ["a", "bad cab"]
    for text in texts:
        (prompt,) = policy.module.read([text])
        asked = {"attention_mask": torch.ones(1, len(prompt), dtype=torch.long), "generation_mode": "image", "do_sample": False}
        want = whole.generate(prompt[None], **asked, max_length=len(prompt) + TOKENS, use_cache=True)
        assert torch.equal(policy.rollout([Prompt(text=text)], stream([0])).actions, want)


def test_a_prompt_is_the_processors(policy):
    one, empty = policy.module.read(["ab", ""])
    said = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
    processor = make_processor()
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    assert text == "<|U|>:ab<|A|>:"
    assert torch.equal(one, processor(text=text, generation_mode="image")["input_ids"][0])
    assert (one[0], one[-1]) == (BOS, BOI)
    assert len(one) == len(empty) + 2 == policy.module.empty + 2
    assert policy.module.none(5).tolist() == [BOS, PAD, PAD, PAD, BOI]


def test_pictures_and_codes_are_those_of_transformers_where_it_is_right(policy):
    """Decoding is the same. Its encoder compares vectors that are not normalised, and so agrees where its codes are unit vectors and the
    feature's length does not matter: then the nearest by distance is the nearest by angle."""
    vqmodel, vq = policy.module.whole.model.vqmodel.double(), policy.tokenizer.double()
    ids, images = ids_of(), torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    torch.testing.assert_close(vq.render(vq.codes(ids, (SIDE, SIDE))), vqmodel.decode(ids), rtol=0, atol=1e-10)
    features = vqmodel.quant_conv(vqmodel.encoder(images))
    torch.testing.assert_close(vq.features(images), features, rtol=0, atol=1e-10)
    assert not torch.equal(vq.encode(images).flatten(), vqmodel.encode(images).image_tokens)
    with torch.no_grad():
        vqmodel.quantize.embedding.weight.copy_(torch.nn.functional.normalize(vqmodel.quantize.embedding.weight, dim=-1))
    assert torch.equal(vq.encode(images).flatten(), vqmodel.encode(images).image_tokens)


# ---- alignment


def test_a_token_moves_the_rows_after_it_and_no_other(policy):
    """VA-pi's release reads row t where token t has been seen."""
    model, ids = policy.module, ids_of(1)
    condition = model.condition(*pad_left(model.read(["a"])))
    with torch.no_grad():
        before = model(condition, ids)
        for t in range(TOKENS):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % CODES
            moved = (model(condition, changed) != before).any(-1)[0].tolist()
            assert moved == [row > t for row in range(TOKENS)], f"token {t}"


def test_the_first_token_has_a_gradient_and_only_what_draws_pictures_gets_one(policy):
    score = policy.score(policy.given(ids_of(), PROMPTS))
    score.logp[:, 0].sum().backward()
    model = policy.module
    assert model.generation_head.vision_head.weight.grad.abs().sum() > 0
    assert model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    policy.score(policy.given(ids_of(), PROMPTS)).logp.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    rest = [model.whole.model.vision_model, model.whole.model.aligner, model.whole.model.vqmodel, model.whole.lm_head]
    mine = {id(weight) for weight in model.parameters()}
    assert not mine & {id(weight) for part in rest for weight in part.parameters()}
    assert all(weight.grad is None for part in rest for weight in part.parameters())


def test_positions_by_hand():
    there = torch.tensor([[False, False, True], [True, True, True]])
    assert positions(there, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    condition = Condition(tokens=torch.zeros(7, 3, 2), there=None)
    assert positions(seen(condition), 5).tolist() == [[0, 1, 2, 3, 4]]


# ---- behind the policy


def test_its_powers(policy):
    assert isinstance(policy, BranchingPolicy)
    assert isinstance(policy, TeacherForcedPolicy)
    assert isinstance(new_policy((policy.module, policy.tokenizer)), RasterPolicy)


@pytest.mark.parametrize("law", [LawConfig(), GUIDED], ids=["plain", "guided"])
def test_it_scores_what_it_did(law):
    policy = make(law)
    rollout = policy.rollout(PROMPTS, stream(range(4)))
    draws = policy.draw(policy.given(ids_of(), PROMPTS), stream(range(4)).repeat(3), prefix_noise=0.5)
    prefix = policy.prefix(PROMPTS, stream(range(4)), steps=2)
    done = policy.complete(prefix, stream(range(8)).at("suffix"))
    for one in (rollout, draws, prefix, done):
        assert gap(policy, one) <= 1e-5
        assert one.logp.isfinite().all()
    assert torch.equal(prefix.actions, rollout.actions[:, :2])
    assert rollout.logp.min() < -0.5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_acting_forking_and_replay_on_cuda(dtype, allowed):
    on_cpu = make(GUIDED)
    policy = new_policy((on_cpu.module, on_cpu.tokenizer), torch.device("cuda"), GUIDED, GUIDED, dtype)
    rollout = policy.rollout(PROMPTS, stream(range(4)))
    done = policy.complete(policy.prefix(PROMPTS, stream(range(4)), steps=2), stream(range(8)).at("suffix"))
    draws = policy.draw(policy.given(ids_of(), PROMPTS), stream(range(4)).repeat(3), prefix_noise=0.5)
    assert done.actions.is_cuda
    assert max(gap(policy, one) for one in (rollout, done, draws)) <= allowed
    assert policy.decode(draws).isfinite().all()


@pytest.mark.parametrize("law", [LawConfig(), GUIDED], ids=["plain", "guided"])
def test_a_row_alone_is_the_row_among_others(law):
    policy = make(law)
    whole = policy.rollout(PROMPTS, stream(range(4)))
    for row in range(4):
        alone = policy.rollout([PROMPTS[row]], stream([row]))
        assert torch.equal(alone.actions[0], whole.actions[row])
        torch.testing.assert_close(alone.logp[0], whole.logp[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(policy.score(alone).logp[0], policy.score(whole).logp[row], rtol=0, atol=1e-5)


def test_a_reference_is_a_copy_that_stays(policy):
    policy.reference = janus.pair_of(make_whole(), make_processor(), "here")[0].requires_grad_(False)
    rollout = policy.rollout(PROMPTS, stream(range(4)))
    assert policy.score(rollout).kl.abs().max() == 0
    with torch.no_grad():
        policy.module.generation_head.vision_head.bias[0] += 1
    score = policy.score(rollout)
    assert score.kl.min() > 0
    assert (score.ref_logp - rollout.logp).abs().max() <= 1e-5


def test_bfloat16_acts_and_scores_alike_with_logits_in_fp32():
    low, full = make(dtype=torch.bfloat16), make()
    rollout = low.rollout(PROMPTS, stream(range(4)))
    assert gap(low, rollout) < 0.1
    assert 0 < (full.score(rollout).logp - rollout.logp).abs().max() < 0.3
    hidden = torch.randn(1, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert low.module.logits(hidden).dtype == torch.float32
    low.score(rollout).logp.sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in low.module.parameters())


def test_a_picture_is_read_and_shown(policy):
    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    given = policy.encode(images, PROMPTS)
    assert torch.equal(given.actions, policy.tokenizer.encode(images * 2 - 1))
    assert policy.decode(given).shape == (4, 3, 4, 4)
    assert policy.module.config.image_size == (4, 4)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [(Prompt(label=2), "label 2: this model reads text"), (Prompt(text="a" * 30), r"'a{30}' has 44 tokens, the model takes 1 to 36")],
)
def test_a_prompt_that_it_cannot_read(policy, prompt, named):
    with pytest.raises(DataError, match=named):
        policy.rollout([prompt], stream([0]))


# ---- as a folder


def same(one: Janus, two: Janus) -> bool:
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_s_model_is_loaded_by_transformers_and_by_us(tmp_path, tied):
    model, vq = model_folder.load(save_janus(tmp_path / "base", tied=tied))
    with torch.no_grad():
        for weight in [*model.parameters(), *vq.parameters()]:
            weight.add_(0.1 * torch.randn(weight.shape))
    out = model_folder.save(tmp_path / "out", model, vq, {"step": 3})
    assert damage(out) == []
    assert load_notes(out) == {"step": 3}
    again, vq_again = model_folder.load(out)
    assert same(model, again)
    assert again.config == model.config
    assert all(torch.equal(x, y) for x, y in zip(vq.state_dict().values(), vq_again.state_dict().values(), strict=True))
    theirs, report = JanusForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    want = model.whole.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in theirs.state_dict().items())
    assert (theirs.lm_head.weight is theirs.model.language_model.embed_tokens.weight) == tied
    assert torch.equal(theirs.model.vqmodel.quantize.embedding.weight, vq.quantize.embedding.weight)
    prompt = JanusProcessor.from_pretrained(out).apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    assert prompt == "<|U|>:a<|A|>:"
    model_folder.save(out, model, vq, {"step": 4})
    assert load_notes(out) == {"step": 4}


def test_a_folder_that_was_not_written_here_is_not_replaced(folder):
    model, vq = model_folder.load(folder)
    with pytest.raises(CheckpointError, match="VARL did not write it"):
        model_folder.save(folder, model, vq, {})


def test_what_is_saved_of_a_run_fits_no_other_names(folder):
    """A checkpoint of a run holds what is trained, each tensor once, so that tied weights are not written twice."""
    model, _ = model_folder.load(folder)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "language_model",
        "generation_embeddings",
        "generation_aligner",
        "generation_head",
    }


def test_where_a_model_may_lie(folder, tmp_path, monkeypatch):
    assert model_path(str(folder)) == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"model='deepseek-community/Janus-Pro-1B'.*hf download deepseek-community/Janus-Pro-1B"):
        model_path("deepseek-community/Janus-Pro-1B")
    base = tmp_path / "models--deepseek-community--Janus-Pro-1B"
    snapshot = save_janus(base / "snapshots" / "0123abc")
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("0123abc")
    assert model_path("deepseek-community/Janus-Pro-1B") == snapshot


def edited(folder: Path, tmp_path: Path, name: str, change) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if name.endswith("json"):
        told = json.loads((copy / name).read_text())
        change(told)
        (copy / name).write_text(json.dumps(told))
    else:
        tensors = load_file(copy / name)
        change(tensors)
        save_file(tensors, copy / name, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("model.safetensors", lambda t: t.pop("model.generation_embeddings.weight"), "missing keys: model.generation_embeddings.weight"),
        ("model.safetensors", lambda t: t.update(extra=torch.zeros(1)), "unexpected keys: extra"),
        ("model.safetensors", lambda t: t.update({"model.generation_head.vision_head.bias": torch.zeros(3)}), "vision_head.bias"),
        ("config.json", lambda c: c.update(model_type="multi_modality"), "DeepSeek's own format.*deepseek-community/Janus-Pro-1B"),
        ("generation_config.json", lambda c: c.pop("bos_token_id"), "bos_token_id"),
        ("generation_config.json", lambda c: c.update(bos_token_id=2), "prompts from 1 to 3, where 2 to 3 are due"),
    ],
)
def test_a_folder_with_something_wrong(folder, tmp_path, name, change, named):
    with pytest.raises(CheckpointError, match=named):
        model_folder.load(edited(folder, tmp_path, name, change))


def test_padding_is_the_checkpoints_own(folder, tmp_path):
    model, _ = model_folder.load(edited(folder, tmp_path, "generation_config.json", lambda c: c.update(pad_token_id=7)))
    assert model.none(4).tolist() == [BOS, 7, 7, BOI]


def test_a_damaged_folder_of_ours_is_named(folder, tmp_path):
    out = model_folder.save(tmp_path / "out", *model_folder.load(folder), {})
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        model_folder.load(out)


# ---- as a run's model


def run_of(folder: Path, data: Path, **changes) -> RunConfig:
    (data / "prompts.jsonl").write_text('{"text": "a"}\n{"text": "bad"}\n')
    config = RunConfig(
        model=str(folder),
        data=FolderConfig(path=str(data)),
        rewards={"bright": WeightedReward(reward=PythonRewardConfig(target="varl.rewards.toy:brightness"))},
        algorithm=GRPOConfig(num_generations=3, beta=0.1),
        sample_law=LawConfig(cfg_scale=(2.0,)),
        score_law=LawConfig(cfg_scale=(2.0,)),
        train=TrainConfig(steps=2, prompts_per_step=2, rollouts_per_backward=4, image_every=0, save_every=1, device="cpu"),
    )
    return replace(config, **changes)


def test_a_plan_before_any_weight_is_loaded(folder, tmp_path):
    found = plan(run_of(folder, tmp_path), calibrate=False)
    assert found.problems == ()
    assert found.parameters["transformer"] == sum(weight.numel() for weight in model_folder.load(folder)[0].parameters())
    assert found.memory["weights"] == found.memory["reference"] == 4 * found.parameters["transformer"]
    assert found.updates[0].flops["train"] > found.updates[0].flops["rollout"] > 0
    bad = plan(run_of(folder, tmp_path, sample_law=LawConfig(top_k=13)), calibrate=False)
    assert "top_k=13" in bad.problems[0]


def test_a_run_learns_goes_on_and_leaves_a_model_that_transformers_loads(folder, tmp_path):
    config = run_of(folder, tmp_path)
    out = train(config, tmp_path / "run")
    assert out.done
    assert out.progress.replay_gap_max <= 1e-5
    start, end = (JanusForConditionalGeneration.from_pretrained(path).state_dict() for path in (folder, out.model))
    moved = {name.split(".")[1] for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    assert moved == {"language_model", "generation_embeddings", "generation_aligner", "generation_head"}
    short = replace(config, train=replace(config.train, steps=1))
    train(short, tmp_path / "half")
    (tmp_path / "half" / "config.yaml").write_text(to_yaml(config))
    again = JanusForConditionalGeneration.from_pretrained(train(config, tmp_path / "half").model).state_dict()
    assert all(torch.equal(tensor, end[name]) for name, tensor in again.items())


def test_va_pi_reads_real_pictures_with_it(policy):
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    config = VAPIConfig(grpo=GRPOConfig(num_generations=4), prefix_noise=0.5)
    algorithm = VAPI(config, lambda prompts: images[[int(prompt.text == "bad") for prompt in prompts]])
    judge = RewardJudge({"bright": (1.0, brightness)})
    objective = torch.zeros(())
    for piece in algorithm.collect(policy, [Prompt(text="a"), Prompt(text="bad")], judge, stream([0, 1]), 0):
        part, metrics = algorithm.objective(policy, piece)
        assert metrics["sampling/sampling_logp_difference/max"] <= 1e-5
        objective = objective + part
    judge.close()
    objective.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in policy.module.parameters())
