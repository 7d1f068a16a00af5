"""What families, classifiers and VA-pi's baselines are pre-trained by; what all of them share is in test_pretrain."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from varl.checkpoints import model as model_folder
from varl.config import (
    CaptionConfig,
    ClassifierConfig,
    DiffusionHeadConfig,
    FolderConfig,
    GlyphsConfig,
    KLConfig,
    MARConfig,
    OptimConfig,
    PicturesConfig,
    PixelLossConfig,
    PretrainConfig,
    RasterConfig,
    ReconstructionConfig,
    ViTConfig,
    VQConfig,
)
from varl.data.folder import write_folder
from varl.errors import ConfigError, DataError
from varl.models.raster import Raster
from varl.pretrain.classifier import labels_of
from varl.pretrain.data import pictures
from varl.pretrain.pixel_loss import PixelLossPhase, drawn, straight_through
from varl.pretrain.raster import RasterFamily
from varl.pretrain.run import pretrain
from varl.pretrain.transformer import Known
from varl.rewards.networks import open_network
from varl.rewards.reconstruction import distances
from varl.rng import generator
from varl.settings import from_yaml, to_yaml
from varl.tokenizers.vq import VQ
from varl.types import Prompt

CLASSES = 3
MODEL = RasterConfig(
    depth=1,
    width=16,
    heads=2,
    grid=(2, 2),
    mlp_width=16,
    num_classes=CLASSES,
    tokenizer=VQConfig(vocab=16, channels=4, latent=8, width=8, multipliers=(1,), blocks=1, attention=False, patch=8),
)
MASKED = MARConfig(
    encoder=ViTConfig(depth=1, width=16, heads=2),
    decoder=ViTConfig(depth=1, width=16, heads=2),
    head=DiffusionHeadConfig(depth=1, width=16, target="velocity", least_signal=2e-4),
    grid=(2, 2),
    num_classes=CLASSES,
    buffer=2,
    tokenizer=KLConfig(channels=4, width=8, multipliers=(1,), blocks=1, attention=False, patch=8, scale=1.0),
)
LOOKS = "test_pretrain_families:looks"


def looks(images):
    """Feature maps for a perceptual distance: the pixels, and their differences along rows."""
    return [images, images.diff(dim=3)]


def striped(count: int, seed: int) -> tuple[torch.Tensor, list[Prompt]]:
    """Pictures of 16 x 16 pixels: class c has its colour channel c bright in stripes of some width."""
    noise = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 40
    for i, picture in enumerate(noise):
        picture[i % CLASSES] += 200 * (torch.arange(16) // (2 + 2 * (i % 2)) % 2)
    return noise.to(torch.uint8), [Prompt(label=i % CLASSES) for i in range(count)]


@pytest.fixture(scope="module", autouse=True)
def every_step_is_logged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varl.pretrain.run.LOG_EVERY", 1)
        patch.setattr("varl.pretrain.data.HELDOUT_PICTURES", 12)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> FolderConfig:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", *striped(24, 0))
    write_folder(folder / "heldout", *striped(12, 1))
    return FolderConfig(path=str(folder / "train"), heldout=str(folder / "heldout"))


@pytest.fixture(scope="module")
def config(data) -> PretrainConfig:
    return PretrainConfig(
        model=MODEL,
        data=data,
        tokenizer_steps=20,
        tokenizer_batch=8,
        warmup_share=0.25,
        steps=30,
        batch=8,
        optim=OptimConfig(name="muon", lr=1e-2, schedule="linear"),
        drop_prompt=0.2,
        save_every=3,
        device="cpu",
    )


@pytest.fixture(scope="module")
def base(config, tmp_path_factory) -> Path:
    """The directory of an unbroken pre-training."""
    out = tmp_path_factory.mktemp("base")
    pretrain(config, out)
    return out


@pytest.fixture(scope="module")
def configs(config, base) -> dict[str, PretrainConfig]:
    """One of each kind."""
    classifier = ClassifierConfig(num_classes=CLASSES, image_size=(16, 16), widths=(4, 6))
    on = replace(config, init=str(base / "model"), steps=8, optim=OptimConfig(lr=3e-3), drop_prompt=0.0)
    pixels = ReconstructionConfig(features=LOOKS)
    return {
        "raster": config,
        "masked": replace(config, model=MASKED),
        "classifier": replace(config, model=classifier, optim=OptimConfig(lr=1e-2)),
        "transformer": replace(on, pixel_loss=PixelLossConfig(trains="transformer", reconstruction=pixels, prior_weight=0.1)),
        "decoder": replace(on, pixel_loss=PixelLossConfig(trains="decoder", reconstruction=pixels)),
    }


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


class Interrupted(Exception):
    pass


def interrupt(step: int):
    def tick(values):
        if values["step"] == step:
            raise Interrupted

    return tick


# ---- raster


def test_both_phases_learn(config, base):
    lines = metrics(base)
    assert [line["stage"] for line in lines] == ["tokenizer"] * 20 + ["transformer"] * 30
    tokenizer, transformer = lines[:20], lines[20:]
    assert tokenizer[-1]["pretrain/psnr"] > tokenizer[0]["pretrain/psnr"] + 1
    assert [line["pretrain/code_usage"] for line in tokenizer[:5]] == [1.0] * 5, "without a codebook"
    assert 0 < tokenizer[-1]["pretrain/code_usage"] <= 1
    assert transformer[0]["pretrain/loss"] == pytest.approx(math.log(16), abs=1e-5), "a fresh head is 0"
    assert transformer[-1]["pretrain/heldout_loss"] < transformer[0]["pretrain/heldout_loss"] - 0.5
    assert 1 / 16 < transformer[-1]["pretrain/accuracy"] <= 1
    assert not [name for name in transformer[-1] if "scale" in name]
    model, _ = model_folder.load(base / "model")
    assert model.config == MODEL


def test_the_loss_is_that_of_every_token_given_those_before(base):
    family = RasterFamily(*model_folder.load(base / "model"))
    ids, said = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]), family.read([Prompt(label=2), Prompt()])
    assert said.tolist() == [2, CLASSES]
    losses, right = family.fit(said, ids)
    condition = family.model.condition(said)
    cache = family.model.cache(condition, 4)
    for t in range(4):
        logits = family.model.logits(family.model.step(condition, ids[:, t - 1] if t else None, cache))[:, 0]
        torch.testing.assert_close(losses[:, t], F.cross_entropy(logits, ids[:, t], reduction="none"), rtol=1e-5, atol=1e-6)
        assert torch.equal(right[:, t], logits.argmax(-1) == ids[:, t])


def test_the_codebook_starts_from_directions_of_real_features():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family = RasterFamily(Raster(MODEL), VQ(MODEL.tokenizer))
    images = striped(6, 0)[0].float() / 127.5 - 1
    with torch.no_grad():
        family.start_codebook(images, generator(0))
        asked = F.normalize(family.tokenizer.features(images), dim=1).flatten(2).transpose(1, 2).flatten(0, 1)
    codes = family.codebook.weight.data
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(16))
    assert bool((torch.cdist(codes, asked).min(1).values < 1e-3).all())
    assert len(codes.unique(dim=0)) > 8


def test_without_a_codebook_the_decoder_sees_what_it_will_see_with_one():
    """Where a code lies on every feature, both make the same picture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family = RasterFamily(Raster(MODEL), VQ(MODEL.tokenizer))
    images = striped(1, 0)[0].float() / 127.5 - 1
    with torch.no_grad():
        z = F.normalize(family.tokenizer.features(images), dim=1).flatten(2)[0].T
        family.codebook.weight.data[:4] = 7 * z
        plain, extra = family.autoencode(images)
        torch.testing.assert_close(family.tokenizer(images)[0], plain, rtol=1e-4, atol=1e-5)
    assert extra.item() == 0


def test_codes_and_uses_are_in_one_order(base):
    family = RasterFamily(*model_folder.load(base / "model"))
    images = striped(5, 3)[0].float() / 127.5 - 1
    with torch.no_grad():
        _, _, ids, asked = family.tokenizer(images)
    assert torch.equal(family.tokenizer.quantize.nearest(torch.cat(asked)), family.uses(ids))


def test_muon_moves_the_matrices_of_the_blocks(configs, tmp_path):
    """At a learning rate of 0 for AdamW nothing else moves."""
    on = replace(configs["decoder"], pixel_loss=None, steps=1, optim=OptimConfig(name="muon", lr=0.0))
    pretrain(on, tmp_path)
    before, after = (model_folder.load(folder)[0].state_dict() for folder in (on.init, tmp_path / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("layers.") and before[name].ndim == 2}


def test_captions(tmp_path):
    """Each caption is encoded once; "none" is all of the vectors that stand for it."""
    asked = []

    def encoder(texts):
        asked.extend(texts)
        return [torch.full((len(text), 6), float(len(text))) for text in texts]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Raster(replace(MODEL, num_classes=None, captions=CaptionConfig(tokens=5, width=6)))
        torch.nn.init.normal_(model.output.weight)
    family = RasterFamily(model, VQ(MODEL.tokenizer), encoder)
    said = family.read([Prompt(text="abc"), Prompt(), Prompt(text="abc"), Prompt(text="ab")])
    assert asked == ["abc", "ab"]
    assert said.tolist() == [1, 0, 1, 2]
    assert family.nothing(said).item() == 0
    ids = torch.tensor([[3, 1, 4, 1]] * 3)
    together = family.fit(said[1:], ids)[0]
    for row in range(3):
        torch.testing.assert_close(family.fit(said[1 + row :][:1], ids[:1])[0][0], together[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1])
    assert not torch.allclose(together[1], together[2])
    with pytest.raises(ConfigError, match="this model reads captions, and there is no encoder"):
        RasterFamily(model, VQ(MODEL.tokenizer))


# ---- classifier


def test_it_learns_its_labels(configs, tmp_path):
    assert pretrain(configs["classifier"], tmp_path) == tmp_path / "model"
    lines = metrics(tmp_path)
    assert {line["stage"] for line in lines} == {"classifier"}
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert abs(lines[0]["pretrain/heldout_loss"] - math.log(CLASSES)) < 0.5
    assert lines[-1]["pretrain/heldout_accuracy"] == 1
    classifier = model_folder.load_classifier(tmp_path / "model")
    images, prompts = striped(12, 1)
    with torch.no_grad():
        logp = classifier.classify(classifier(images.float() / 255))
    assert logp.argmax(1).tolist() == [prompt.label for prompt in prompts]
    assert F.nll_loss(logp, labels_of(prompts, CLASSES)).item() == pytest.approx(lines[-1]["pretrain/heldout_loss"], rel=1e-4)


@pytest.mark.parametrize(("prompt", "said"), [(Prompt(text="x", image="a.png"), "None"), (Prompt(label=3), "3"), (Prompt(label=-1), "-1")])
def test_a_picture_without_a_label_is_named(prompt, said):
    with pytest.raises(DataError, match=f"label {said}, must be 0 to 2"):
        labels_of([Prompt(label=2), prompt], CLASSES)


# ---- pixels by gradient


def test_straight_through_is_the_most_probable_code_and_has_the_softmaxs_derivative():
    """Backward: codes^T upstream, through the Jacobian of softmax(l / T), by hand."""
    rng = torch.Generator().manual_seed(0)
    logits, codes = torch.randn(2, 3, 5, generator=rng, requires_grad=True), F.normalize(torch.randn(5, 4, generator=rng), dim=-1)
    upstream = torch.randn(2, 3, 4, generator=rng)
    out = straight_through(logits, codes, 0.7)
    assert torch.equal(out, codes[logits.argmax(-1)])
    out.backward(upstream)
    p = (logits.detach() / 0.7).softmax(-1)
    jacobian = (torch.diag_embed(p) - p[..., None] * p[..., None, :]) / 0.7
    want = (jacobian @ (upstream @ codes.T)[..., None]).squeeze(-1)
    torch.testing.assert_close(logits.grad, want, rtol=1e-5, atol=1e-6)


def phase_of(config: PretrainConfig) -> PixelLossPhase:
    pair = model_folder.load(config.init)
    with torch.no_grad():  # rows of the codebook are not unit vectors, as released
        pair[1].quantize.embedding.weight.mul_(torch.linspace(0.5, 2, 16)[:, None])
    return PixelLossPhase(config, RasterFamily(*pair), pictures(config), torch.device("cpu"))


def test_what_is_compared_is_the_hard_decode_of_unit_codes(configs):
    """And the loss is minus the reward of VA-pi, plus the weighted cross-entropy."""
    phase = phase_of(configs["transformer"])
    phase.begin()
    vq, family, images = phase.family.tokenizer, phase.family, phase.shown.images[:4]
    rows = Known(phase.known.kept[:4], phase.known.said[:4])
    loss, parts = phase.loss(images, rows, generator(0))
    with torch.no_grad():
        ids = family.logits(rows.said, rows.kept).argmax(-1)
        codes = F.normalize(vq.quantize.embedding.weight[ids], dim=-1).transpose(1, 2).unflatten(2, (2, 2))
        rendered, real = vq.render(codes).add(1).div(2), images.float() / 255
        want = distances(rendered, real, looks(real), looks)
        nll = family.fit(rows.said, rows.kept)[0].mean()
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {"mse": float(want["mse"].mean()), "perceptual": float(want["perceptual"].mean()), "nll": float(nll)}, rel=1e-5
    )
    assert loss.item() == pytest.approx(float((want["mse"] + want["perceptual"]).mean() + 0.1 * nll), rel=1e-5)


def test_its_gradient_is_the_decoders_through_the_softmax(configs):
    """d loss / d logits = J_softmax (codes . d loss / d code); the head's gradient follows from it."""
    config = replace(configs["transformer"], pixel_loss=replace(configs["transformer"].pixel_loss, prior_weight=0.0, temperature=2.0))
    phase = phase_of(config)
    phase.begin()
    vq, family, images = phase.family.tokenizer, phase.family, phase.shown.images[:4]
    rows = Known(phase.known.kept[:4], phase.known.said[:4])
    phase.loss(images, rows, generator(0))[0].backward()
    got = family.model.output.weight.grad
    with torch.no_grad():
        hidden = family.model.norm(family.model(family.model.condition(rows.said), rows.kept))
        logits, real = family.model.output(hidden), images.float() / 255
    every = F.normalize(vq.quantize.embedding.weight.detach(), dim=-1)
    code = every[logits.argmax(-1)].requires_grad_()
    parts = distances(vq.render(code.transpose(1, 2).unflatten(2, (2, 2))).add(1).div(2), real, looks(real), looks)
    (parts["mse"] + parts["perceptual"]).mean().backward()
    p, g = (logits / 2.0).softmax(-1), code.grad @ every.T
    want = torch.einsum("blv,bld->vd", p * (g - (p * g).sum(-1, keepdim=True)) / 2.0, hidden)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_the_decoder_learns_from_draws_and_all_else_stays_bit_for_bit(configs, tmp_path):
    config = replace(configs["decoder"], steps=40)
    pretrain(config, tmp_path)
    lines = metrics(tmp_path)
    assert {line["stage"] for line in lines} == {"decoder"}
    assert lines[-1]["pretrain/heldout_loss"] < 0.9 * lines[0]["pretrain/heldout_loss"]
    assert lines[-1]["pretrain/heldout_nll"] == lines[0]["pretrain/heldout_nll"]
    (model, tokenizer), (trained, other) = model_folder.load(config.init), model_folder.load(tmp_path / "model")
    for name, weight in model.state_dict().items():
        assert torch.equal(trained.state_dict()[name], weight), name
    moved = {name for name, weight in tokenizer.state_dict().items() if not torch.equal(other.state_dict()[name], weight)}
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)


def test_draws_follow_the_law():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(200, 100, 3)
    share = drawn(logits, generator(0)).flatten().bincount() / 20_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.015)  # 4 standard deviations


def test_the_transformer_learns_and_the_tokenizer_stays_bit_for_bit(configs, base, tmp_path):
    config = replace(configs["transformer"], steps=40)
    pretrain(config, tmp_path)
    lines = metrics(tmp_path)
    assert {line["stage"] for line in lines} == {"transformer"}
    assert lines[-1]["pretrain/heldout_loss"] < lines[0]["pretrain/heldout_loss"]
    assert weights(tmp_path / "model")["tokenizer.safetensors"] == weights(base / "model")["tokenizer.safetensors"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init": None}, "pixel_loss: trains a raster model that can draw already"),
        ({"model": ClassifierConfig(num_classes=3, image_size=(16, 16))}, "a classifier starts from nothing"),
        ({"pixel_loss": PixelLossConfig(trains="decoder")}, "reconstruction.lpips_weight=1.0: there is no network to look with"),
    ],
)
def test_what_cannot_be(configs, change, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        pretrain(replace(configs["decoder"], **change), tmp_path)


def test_a_frozen_transformer_has_no_prior():
    with pytest.raises(ConfigError, match="the transformer is frozen"):
        PixelLossConfig(trains="decoder", prior_weight=0.1)


# ---- all kinds


@pytest.mark.parametrize("kind", ["raster", "masked", "classifier", "transformer", "decoder"])
def test_interrupted_it_ends_where_the_unbroken_one_does(kind, configs, base, tmp_path):
    config, whole = configs[kind], base
    if kind != "raster":
        pretrain(config, whole := tmp_path / "whole")
    for step in (2, 4, 8, 23, 25, 40):
        if step < config.total_steps:
            with pytest.raises(Interrupted):
                pretrain(config, tmp_path / "broken", interrupt(step))
    pretrain(config, tmp_path / "broken")
    assert metrics(tmp_path / "broken") == metrics(whole)
    assert weights(tmp_path / "broken" / "model") == weights(whole / "model")


@pytest.mark.parametrize("kind", ["raster", "masked", "classifier", "transformer", "decoder"])
def test_its_config_is_the_yaml_it_writes(kind, configs):
    assert from_yaml(to_yaml(configs[kind]), PretrainConfig) == configs[kind]


def test_letters_are_of_the_faces_of_their_split():
    data = GlyphsConfig(fonts=("matplotlib",), image_size=(16, 16), letters="ABX", shares=(1.0, 1.0, 0.0, 1.0), split="reward")
    config = PretrainConfig(model=ClassifierConfig(num_classes=3, image_size=(16, 16)), data=data, pictures=6)
    images, prompts, held_images, held_prompts = pictures(config)
    assert (images.shape, held_images.shape) == ((6, 3, 16, 16), (12, 3, 16, 16))
    assert {prompt.image.partition("#")[0] for prompt in prompts} == {"glyphs:reward:0"}
    assert {prompt.image.partition("#")[0] for prompt in held_prompts} == {"glyphs:heldout:9"}
    assert [prompt.label for prompt in prompts] == [0, 1, 2, 0, 1, 2]


def test_real_pictures_are_held_against_others_or_against_themselves(data, tmp_path, configs):
    real = PicturesConfig(path=data.path, image_size=(16, 16), share=0.5)
    config = replace(configs["classifier"], data=real)
    shown = pictures(config)
    assert len(shown.images) == 12
    assert torch.equal(shown.held_images, shown.images)
    other = pictures(replace(config, data=replace(real, heldout=data.heldout)))
    assert len(other.held_images) == 12
    assert not torch.equal(other.held_images, shown.images)
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path, interrupt(1))
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert "heldout_loss is that of training pictures" in event["message"]
    with pytest.raises(ConfigError, match=r"data.image_size=\(8, 8\), but the model's pictures are \(16, 16\)"):
        pictures(replace(config, data=replace(real, image_size=(8, 8))))


def test_a_networks_weights_stay_as_they_are(configs, tmp_path):
    """A classifier's folder looks, and learns nothing from it."""
    pretrain(replace(configs["classifier"], steps=2), tmp_path / "looks")
    pixels = ReconstructionConfig(features=str(tmp_path / "looks" / "model"))
    features, _ = open_network(pixels)
    assert not any(p.requires_grad for p in features.parameters())
    pretrain(replace(configs["decoder"], pixel_loss=PixelLossConfig(trains="decoder", reconstruction=pixels), steps=2), tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["pretrain/perceptual"] > 0
