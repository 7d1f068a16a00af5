"""A tiny NOVA of every kind behind the masked policy, with captions that a tiny Phi reads; and from the released folder to a picture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from test_captions import save_phi
from test_nova import MOVING, TINY, TURNED, files, tiny, written
from tiny import TINY as WORDS
from tiny import status
from varl.algorithms.mar_grpo import MARGRPO
from varl.build import new_policy, require_unmasking
from varl.checkpoints import model as model_folder
from varl.config import AncestralConfig, CaptionConfig, FlowConfig, GRPOConfig, LawConfig, MARGRPOConfig, NOVAConfig, UnmaskingConfig
from varl.errors import ConfigError, DataError
from varl.policies.masked import MaskedPolicy
from varl.rewards.judge import RewardJudge
from varl.rng import Stream
from varl.tokenizers.kl import KL
from varl.types import Prompt, RedrawingPolicy

FLOWING = replace(TINY, head=replace(TINY.head, drawn=FlowConfig(shift=2.0)))
kinds = pytest.mark.parametrize("config", [TINY, TURNED, MOVING, FLOWING], ids=["ancestral", "rotary", "video", "flow"])
chains = pytest.mark.parametrize("config", [TINY, FLOWING], ids=["ancestral", "flow"])
GUIDED = LawConfig(cfg_scale=(3.0,), temperature=0.9)
PROMPTS = [Prompt(text="a red cube"), Prompt(text="a ball on a ball"), Prompt(text="a red cube"), Prompt()]


@pytest.fixture(scope="module")
def phi(tmp_path_factory) -> Path:
    return save_phi(tmp_path_factory.mktemp("phi"))


@pytest.fixture(autouse=True)
def caption_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "captions"))


def reading(config: NOVAConfig, encoder: Path | str) -> NOVAConfig:
    return replace(config, captions=CaptionConfig(tokens=5, width=8, encoder=str(encoder), lowercase=False))


def make(config: NOVAConfig, phi: Path, law: LawConfig = LawConfig()) -> MaskedPolicy:
    """Its weights are large enough for a caption to be heard."""
    model = tiny(reading(config, phi))
    for weight in model.parameters():
        weight.mul_(2)
    model.requires_grad_(True)
    unmasking = UnmaskingConfig(steps=4, denoise_steps=6)
    policy = new_policy((model, KL(config.tokenizer)), sample_law=law, score_law=law, unmasking=unmasking)
    assert isinstance(policy, MaskedPolicy)
    return policy


def stream(count: int) -> Stream:
    return Stream(seed=7, path=("test",), rows=tuple(range(count)))


# ---- acting and scoring


@kinds
@pytest.mark.parametrize("law", [LawConfig(), GUIDED], ids=["plain", "guided"])
def test_it_scores_what_it_did(config, law, phi):
    policy = make(config, phi, law)
    assert isinstance(policy, RedrawingPolicy)
    rollout = policy.rollout(PROMPTS, stream(4))
    assert rollout.actions.shape == (4, 24, 7, 12)
    assert all(torch.equal(row.bincount(), torch.tensor(policy.counts)) for row in rollout.step)
    score = policy.score(rollout)
    torch.testing.assert_close(score.logp, rollout.logp, rtol=0, atol=1e-4)
    assert policy.decode(rollout).shape == (4, 3, 16, 24)
    score.logp.sum().backward()
    assert policy.module.text_embed.proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in policy.module.head.parameters())


@chains
def test_what_is_drawn_depends_on_the_caption_and_on_nothing_beside_it(config, phi):
    policy = make(config, phi, GUIDED)
    whole = policy.rollout(PROMPTS, stream(4))
    alone = policy.rollout(PROMPTS[1:2], Stream(seed=7, path=("test",), rows=(1,)))
    torch.testing.assert_close(alone.actions[0], whole.actions[1], rtol=0, atol=2e-2)
    other = policy.rollout([Prompt(text="a green cube")], Stream(seed=7, path=("test",), rows=(0,)))
    assert torch.equal(other.step[0], whole.step[0])
    assert (other.actions[0, :, -1] - whole.actions[0, :, -1]).abs().max() > 0.1


@chains
def test_guidance_goes_from_the_empty_caption_through_the_asked_one(config, phi):
    """Scale 0 is "none" itself, and 1 the caption alone."""
    none = make(config, phi).rollout([Prompt()] * 4, stream(4))
    away = make(config, phi, LawConfig(cfg_scale=(0.0,))).rollout(PROMPTS, stream(4))
    torch.testing.assert_close(away.actions, none.actions, rtol=1e-4, atol=1e-2)
    rollout = make(config, phi, GUIDED).rollout(PROMPTS, stream(4))
    unguided = make(config, phi, replace(GUIDED, cfg_scale=(1.0,)))
    with torch.no_grad():
        apart = (unguided.score(rollout).logp - rollout.logp).abs().amax(1)
    assert (apart[:3] > 0.05).all(), "scored under another law"
    assert apart[3].item() < 1e-4, "the empty caption is guided away from itself"


@chains
def test_further_paths_from_the_same_latents(config, phi):
    policy = make(config, phi, GUIDED)
    rollout = policy.rollout(PROMPTS, stream(4))
    torch.testing.assert_close(policy.redraw(rollout, stream(4)).actions, rollout.actions, rtol=0, atol=2e-2)
    further = policy.redraw(rollout, stream(8))
    again = policy.redraw(rollout.rows(range(4)), stream(8))  # rows drop the state, and latents are made anew
    torch.testing.assert_close(further.actions, again.actions, rtol=0, atol=2e-2)
    assert torch.equal(further.step, rollout.step.repeat_interleave(2, 0))
    assert (further.actions[2] != further.actions[3]).all(-1).all(-1).all()
    torch.testing.assert_close(policy.score(further).logp, further.logp, rtol=0, atol=1e-4)


@chains
@pytest.mark.parametrize(
    "algorithm",
    [
        MARGRPOConfig(grpo=GRPOConfig(num_generations=2, beta=0.01), ar_steps=2, denoise_moves=2, num_trajectories=2),
        MARGRPOConfig(
            grpo=GRPOConfig(num_generations=2, loss_type="grpo"),
            ar_steps=2,
            denoise_moves=2,
            num_trajectories=3,
            trajectories="release",
            support="unknown",
            consistency=0.0,
        ),
    ],
    ids=["ours", "release"],
)
def test_a_step_of_mar_grpo(config, algorithm, phi):
    """On policy before it, and after it the transformer has moved and the head has not."""
    policy = make(config, phi, GUIDED)
    policy.reference = make(config, phi).module
    judge = RewardJudge({"red": (1.0, lambda images, prompts: images[:, 0].mean((1, 2)))})
    batches = list(MARGRPO(algorithm).collect(policy, PROMPTS[:2], judge, stream(2), 0))
    judge.close()
    before = {name: weight.clone() for name, weight in policy.module.state_dict().items()}
    optimizer = torch.optim.SGD([weight for weight in policy.module.parameters() if weight.requires_grad], lr=1e-2)
    for batch in batches:
        learns = batch.rollout.sampled
        torch.testing.assert_close(policy.score(batch.rollout).logp[learns], batch.rollout.logp[learns], rtol=0, atol=1e-3)
        objective, _ = MARGRPO(algorithm).objective(policy, batch)
        (-objective).backward()
    torch.nn.utils.clip_grad_norm_(policy.module.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    moved = {name for name, weight in policy.module.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.partition(".")[0] for name in moved} >= {"text_embed", "mask_embed", "video_encoder", "image_encoder"}
    assert not any(name.startswith("image_decoder.") or name == "text_embed.weight" for name in moved)
    with torch.no_grad():
        assert (policy.score(batches[0].rollout).logp - batches[0].rollout.logp)[batches[0].rollout.sampled].abs().max() > 1e-4


# ---- what cannot be


def test_what_cannot_be(phi, tmp_path):
    policy = make(TINY, phi)
    with pytest.raises(DataError, match="'a ball on a red cube' has 6 tokens, the model takes 0 to 5"):
        policy.rollout([Prompt(text="a ball on a red cube")], stream(1))
    with pytest.raises(DataError, match="prompt label 3: this model reads text"):
        policy.rollout([Prompt(label=3)], stream(1))
    with pytest.raises(ConfigError, match=r"captions\.encoder='/none': there is no such folder"):
        make(TINY, Path("/none"))
    wide = make(TINY, save_phi(tmp_path / "wide", width=16))
    with pytest.raises(DataError, match="features are 16 wide, and NOVA reads 8"):
        wide.rollout(PROMPTS, stream(4))
    with pytest.raises(ConfigError, match="25 steps for 24 tokens"):
        new_policy((tiny(reading(TINY, phi)), KL(TINY.tokenizer)), unmasking=UnmaskingConfig(steps=25))
    with pytest.raises(ConfigError, match="does not choose in which order it draws"):
        require_unmasking(WORDS, UnmaskingConfig())
    leading = replace(TINY, head=replace(TINY.head, drawn=AncestralConfig(steps_offset=2)))
    with pytest.raises(ConfigError, match="steps_offset=2 moves 1000 steps up to 1001"):
        require_unmasking(leading, UnmaskingConfig(steps=4, denoise_steps=1000))


# ---- the command line


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The Hugging Face cache, with a Phi where Phi-2 would be."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--microsoft--phi-2"
    save_phi(place / "snapshots" / "0123abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123abc")
    return place


def test_from_the_released_folder_to_a_picture(tmp_path, hub, capfd):
    config = reading(TINY, "microsoft/phi-2")
    folder, model = written(tmp_path / "nova", *files(config)), tmp_path / "model"
    assert status("convert", folder / "transformer", folder, "--heads", 2, "--out", model) == 0
    assert model_folder.load(model)[0].config == config
    asked = ("sample", model, "-n", 2, "--steps", 4, "--denoise-steps", 5, "--cfg", 3)
    for name, prompt, seed in (("one", "a red cube", 0), ("same", "a red cube", 0), ("seed", "a red cube", 1), ("other", "a ball", 0)):
        assert status(*asked, "--prompt", prompt, "--seed", seed, "--out", tmp_path / f"{name}.png") == 0
    one, same, seed, other = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("one", "same", "seed", "other"))
    assert one == same
    assert len({one, seed, other}) == 3
    capfd.readouterr()
    assert status(*asked, "--label", 3, "--out", tmp_path / "x.png") == 2
    assert "label 3: this model reads text and knows no classes" in capfd.readouterr().err
    (hub / "snapshots" / "0123abc" / "model.safetensors").unlink()
    assert status(*asked, "--prompt", "a", "--out", tmp_path / "x.png") == 2
    assert "captions.encoder='microsoft/phi-2'" in (said := capfd.readouterr().err)
    assert "hf download microsoft/phi-2" in said
