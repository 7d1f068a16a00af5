"""How a MAR is pre-trained; that it goes on where it stopped is in test_pretrain_families."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import truncnorm

from varl.checkpoints import model as model_folder
from varl.config import DiffusionHeadConfig, FolderConfig, KLConfig, MARConfig, OptimConfig, PretrainConfig, ViTConfig
from varl.data.folder import write_folder
from varl.errors import ConfigError, DataError
from varl.models.diffusion_head import noise_loss, noised, respaced, variance_loss, velocity
from varl.models.mar import MAR
from varl.pretrain.data import Shown, pictures
from varl.pretrain.masked import LatentsPhase, MaskedPhase, denoising_losses, drawn, latent_moments, mask_share, posteriors, standardise
from varl.pretrain.run import pretrain
from varl.rng import generator
from varl.tokenizers.kl import KL
from varl.types import Prompt

CLASSES = 3
MODEL = MARConfig(
    encoder=ViTConfig(depth=1, width=16, heads=2),
    decoder=ViTConfig(depth=1, width=12, heads=2),
    head=DiffusionHeadConfig(depth=1, width=16, target="velocity", least_signal=2e-4),
    grid=(2, 4),
    num_classes=CLASSES,
    buffer=2,
    tokenizer=KLConfig(channels=4, width=8, multipliers=(1,), blocks=1, attention=False, patch=8, scale=0.5),
)
CPU = torch.device("cpu")


def bright(count: int, seed: int) -> tuple[torch.Tensor, list[Prompt]]:
    """Pictures of 16 x 32 pixels: class c is bright in its colour."""
    noise = torch.rand(count, 3, 16, 32, generator=torch.Generator().manual_seed(seed)) * 40
    for i, picture in enumerate(noise):
        picture[i % CLASSES] += 200
    return noise.to(torch.uint8), [Prompt(label=i % CLASSES) for i in range(count)]


@pytest.fixture(scope="module", autouse=True)
def every_step_is_logged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varl.pretrain.run.LOG_EVERY", 1)
        patch.setattr("varl.pretrain.data.HELDOUT_PICTURES", 12)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", *bright(24, 0))
    write_folder(folder / "heldout", *bright(12, 1))
    return PretrainConfig(
        model=MODEL,
        data=FolderConfig(path=str(folder / "train"), heldout=str(folder / "heldout")),
        tokenizer_steps=40,
        tokenizer_batch=8,
        tokenizer_lr=5e-2,
        steps=40,
        batch=8,
        optim=OptimConfig(name="muon", lr=2e-2, schedule="linear"),
        device="cpu",
    )


@pytest.fixture(scope="module")
def base(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("base")
    pretrain(config, out)
    return out


def fresh(config: MARConfig = MODEL) -> tuple[MAR, KL]:
    """The head's every weight matters: as it starts, it puts out 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, kl = MAR(config), KL(config.tokenizer)
        for weight in model.head.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return model, kl


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- both phases


def test_both_phases_learn(base):
    lines = metrics(base)
    assert [line["stage"] for line in lines] == ["tokenizer"] * 40 + ["transformer"] * 40
    tokenizer, transformer = lines[:40], lines[40:]
    assert tokenizer[-1]["pretrain/psnr"] > tokenizer[0]["pretrain/psnr"] + 5
    assert transformer[0]["pretrain/heldout_loss"] == pytest.approx(1.0, abs=0.2), "a fresh head puts out 0, and velocities have variance 1"
    assert transformer[-1]["pretrain/heldout_loss"] < transformer[0]["pretrain/heldout_loss"] - 0.2
    model, _ = model_folder.load(base / "model")
    assert model.config == MODEL


def test_tokens_have_deviation_one(base, config):
    """Whatever `scale` says: the autoencoder is changed, and not the config."""
    _, kl = model_folder.load(base / "model")
    tokens = kl.tokens(drawn(posteriors(kl, pictures(config).images, CPU), generator(0))).flatten(0, 1)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(4), rtol=0, atol=0.25)  # 192 tokens
    torch.testing.assert_close(tokens.std(0), torch.ones(4), rtol=0.2, atol=0)


def test_it_goes_on_from_a_folder(base, config, tmp_path):
    """The autoencoder stays bit for bit; and at a learning rate of 0 so does what is said of held-out pictures."""
    on = replace(config, init=str(base / "model"), steps=2, optim=OptimConfig(lr=0.0))
    pretrain(on, tmp_path)
    assert [line["stage"] for line in metrics(tmp_path)] == ["transformer"] * 2
    assert {line["pretrain/heldout_loss"] for line in metrics(tmp_path)} == {metrics(base)[-1]["pretrain/heldout_loss"]}
    name = "tokenizer.safetensors"
    assert (tmp_path / "model" / name).read_bytes() == (base / "model" / name).read_bytes()


# ---- the autoencoder


def test_standard_latents_by_hand_and_the_pictures_stay():
    _, kl = fresh()
    images = bright(6, 2)[0]
    signed = images.float() / 127.5 - 1
    with torch.no_grad():
        before, reconstruction = kl.encode(signed), kl(signed)[0]
        mean, std = latent_moments(kl, images, CPU)
        means, variances = before.mean.transpose(0, 1).flatten(1), before.log_variance.exp().transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean, means.mean(1))
        torch.testing.assert_close(std.square(), means.var(1, correction=0) + variances.mean(1))
        standardise(kl, mean, std)
        after = kl.encode(signed)
        by = (std * 0.5)[:, None, None]
        torch.testing.assert_close(after.mean, (before.mean - mean[:, None, None]) / by, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((after.log_variance / 2).exp(), (before.log_variance / 2).exp() / by, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kl(signed)[0], reconstruction, rtol=1e-4, atol=1e-5)
        again = latent_moments(kl, images, CPU)
    torch.testing.assert_close(again[0], torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(again[1], torch.full((4,), 1 / 0.5), rtol=1e-4, atol=0)


# ---- what is masked


def test_the_share_is_a_cut_off_normal():
    law = truncnorm((0.7 - 1) / 0.25, 0, loc=1, scale=0.25)
    for quantile in (0.0, 0.2, 0.5, 0.99, 1.0):
        assert mask_share(quantile) == pytest.approx(law.ppf(quantile), abs=1e-6)
    assert (mask_share(0.0), mask_share(1.0)) == pytest.approx((0.7, 1.0))


def phase_of(config: PretrainConfig, model: MAR, kl: KL, prompts: list[Prompt] | None = None) -> MaskedPhase:
    images, said = bright(8, 0)
    phase = MaskedPhase(config, model, kl, Shown(images, prompts or said, *bright(70, 1)), CPU)
    phase.begin()
    return phase


def test_only_masked_tokens_are_trained_and_each_at_several_steps(config):
    """Of 8 tokens 0.7 to 1 are masked: 6, 7 or 8 of each of the 8 pictures."""
    phase = phase_of(config, *fresh())
    shapes = {phase.losses(phase.latents, phase.said, generator(seed)).shape for seed in range(20)}
    assert shapes == {(2, 8 * count) for count in (6, 7, 8)}


def test_a_masked_token_is_not_seen(config, monkeypatch):
    """With all masked, and a fixed head's noise, what the tokens are changes the loss through x_0 alone."""
    model, kl = fresh()
    phase, seen = phase_of(config, model, kl), []
    monkeypatch.setattr(MAR, "forward", lambda self, condition, tokens, known: seen.append(known) or torch.zeros(8, 8, 12))
    phase.losses(phase.latents, phase.said, generator(3))
    given = {}
    monkeypatch.setattr(
        "varl.pretrain.masked.denoising_losses", lambda head, process, x_0, z, noise, t: given.update(x_0=x_0, t=t) or torch.zeros(t.shape)
    )
    phase.losses(phase.latents, phase.said, generator(3))
    (places, again), tokens = seen, phase.kl.tokens(drawn(phase.latents, generator(3)))
    assert torch.equal(places, again)
    missing = torch.ones(8, 8, dtype=torch.bool).scatter(1, places, False)
    assert torch.equal(given["x_0"], tokens[missing])
    assert 0 <= given["t"].min() < 100
    assert 900 < given["t"].max() < 1000


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_the_prompts_is_dropped(config, share):
    """Then the vector of "none" learns, and those of the classes do not."""
    phase = phase_of(replace(config, drop_prompt=share), *fresh())
    classes, none = phase.model.class_emb.weight.detach().clone(), phase.model.fake_latent.detach().clone()
    phase.step(0)
    assert torch.equal(phase.model.class_emb.weight, classes) == (share == 1)
    assert torch.equal(phase.model.fake_latent, none) == (share == 0)


def test_the_heldout_loss_is_drawn_alike_each_time(config):
    phase = phase_of(config, *fresh())
    assert phase.heldout_loss() == phase.heldout_loss()
    before = phase.heldout_loss()
    phase.step(0)
    assert phase.heldout_loss() != before


# ---- the loss


@pytest.mark.parametrize("target", ["noise", "velocity"])
def test_the_loss_of_each_token_and_step(target):
    head = fresh(replace(MODEL, head=replace(MODEL.head, target=target, least_signal=1e-3)))[0].head
    rng = torch.Generator().manual_seed(0)
    process, t = respaced(range(1000), 1e-3), torch.tensor([[0, 400], [999, 3]])
    x_0, z, noise = (torch.randn(shape, generator=rng) for shape in ((2, 4), (2, 12), (2, 2, 4)))
    losses = denoising_losses(head, process, x_0, z, noise, t)
    assert losses.shape == (2, 2)
    assert losses.isfinite().all()
    for step in range(2):
        for token in range(2):
            at, eps, start = t[step, token][None], noise[step, token][None], x_0[token][None]
            x_t = noised(process, start, eps, at)
            out = head(x_t, at, z[token][None])
            if target == "velocity":
                want = (out - velocity(process, start, eps, at)).square().mean(-1)
            else:
                want = noise_loss(out, eps) + variance_loss(process, out, start, x_t, at)
            torch.testing.assert_close(losses[step, token][None], want, rtol=1e-4, atol=1e-5)


def test_a_head_that_says_noise_learns_too(config, tmp_path):
    noise = replace(MODEL, head=replace(MODEL.head, target="noise", least_signal=0.0))
    pretrain(replace(config, model=noise, tokenizer_steps=2, steps=20), tmp_path)
    lines = metrics(tmp_path)[2:]
    assert lines[-1]["pretrain/heldout_loss"] < 0.8 * lines[0]["pretrain/heldout_loss"]


# ---- bad input


def test_an_autoencoder_must_be_trained(config):
    with pytest.raises(ConfigError, match="tokenizer_steps=0: the latents of an untrained autoencoder"):
        LatentsPhase(replace(config, tokenizer_steps=0), fresh()[1], pictures(config), CPU)


def test_a_prompt_that_it_cannot_read(config):
    for prompt, said in ((Prompt(label=3), "label 3"), (Prompt(text="a cat"), "'a cat'")):
        with pytest.raises(DataError, match=said):
            phase_of(config, *fresh(), prompts=[prompt] * 8)
