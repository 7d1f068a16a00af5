"""CLIPScore, PickScore, HPS v2.1 and the aesthetic score, on tiny models that transformers made and saved."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tiny_vision import SIDE, TOKENS, WIDTH, clip_model, save_clip, save_dino
from varl.build import build_reward
from varl.checkpoints.folder import write_tensors
from varl.checkpoints.vision import files_of, from_open_clip, load_clip, load_hps, open_clip_name, to_open_clip
from varl.config import (
    AestheticConfig,
    CLIPScoreConfig,
    DINOConfig,
    GenEvalConfig,
    HPSConfig,
    ImageRewardConfig,
    PickScoreConfig,
    VQAConfig,
    WeightedReward,
)
from varl.errors import CheckpointError, ConfigError, RewardError
from varl.models import vision
from varl.models.vision import AestheticHead, Preprocessing, preprocess
from varl.plan.missing import judge_of
from varl.rewards.clip import clip_score
from varl.rewards.judge import judge_now
from varl.types import Prompt

NOISE = torch.Generator().manual_seed(0)
BYTES = (F.interpolate(torch.rand(5, 3, 5, 7, generator=NOISE), (40, 56)) * 255).round().to(torch.uint8)
IMAGES = BYTES / 255
TEXTS = ["a b c", "d e", "a b c", "z", "m n o p q r s t u v w"]
PROMPTS = [Prompt(text=text) for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def theirs(folder) -> Tensor:
    """Cosines as transformers' own classes compute them, from bytes, one pair at a time."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    cosines = []
    for image, text in zip(BYTES, TEXTS, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.no_grad():
            out = model(**tokens, pixel_values=processor(image.numpy(), return_tensors="pt")["pixel_values"])
        cosines.append(out.logits_per_image[0, 0] / model.logit_scale.detach().exp())
    return torch.stack(cosines)


def smooth(height: int, width: int) -> Tensor:
    """Bytes of pictures as they are, rather than noise."""
    coarse = torch.rand(2, 3, 5, 5, generator=NOISE)
    return (F.interpolate(coarse, (height, width), mode="bilinear") * 255).round().to(torch.uint8)


# ---- pictures as networks want them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 56), (57, 31), (24, 24), (13, 17), (224, 250)])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_pictures_are_prepared_as_transformers_does(size, kind):
    images = smooth(*size) if kind == "smooth" else torch.randint(0, 256, (2, 3, *size), generator=NOISE, dtype=torch.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    want = torch.as_tensor(processor(list(images.numpy()), return_tensors="pt")["pixel_values"])
    mean, std = processor.image_mean, processor.image_std
    got = preprocess(images / 255, Preprocessing(side=SIDE, crop=(SIDE, SIDE), mean=tuple(mean), std=tuple(std)))
    assert got.shape == want.shape
    pixels = (got - want) * torch.tensor(std).view(3, 1, 1) * 255
    assert pixels.abs().max() < 1.5


def test_what_is_cut_and_what_is_laid_on_black():
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    image = torch.arange(12.0).view(1, 1, 3, 4).expand(1, 3, 3, 4) / 12
    cut = preprocess(image, Preprocessing(side=3, crop=(3, 3), **plain))
    assert torch.equal(cut, image[..., :3])
    whole = preprocess(image, Preprocessing(side=4, crop=(4, 4), whole=True, **plain))
    assert torch.equal(whole, F.pad(image, (0, 0, 0, 1)))
    tall = preprocess(torch.ones(1, 3, 8, 2), Preprocessing(side=4, crop=(4, 4), whole=True, **plain))
    assert tall[0, 0].tolist() == [[0, 1, 0, 0]] * 4


# ---- the units ---------------------------------------------------------------------------------------------------------------------------


def test_clip_score_is_a_hundred_cosines():
    assert clip_score(torch.tensor([0.25, 0.0, -0.5])).tolist() == [25.0, 0.0, 0.0]


def test_clip_score_is_that_of_transformers(folder, theirs):
    judged = judge_now(build_reward(CLIPScoreConfig(model=str(folder))), IMAGES, PROMPTS)
    assert theirs.std() > 0.01
    torch.testing.assert_close(judged.parts["cosine"], theirs, rtol=0, atol=5e-4)  # bytes are rounded there, between two passes
    torch.testing.assert_close(judged.value, 100 * judged.parts["cosine"].clamp(min=0))


def test_pick_score_has_the_trained_scale_and_anothers_processor(tmp_path, folder, theirs):
    weights = tmp_path / "pick"
    model = clip_model()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100.0))
    model.save_pretrained(weights)
    judged = judge_now(build_reward(PickScoreConfig(model=str(weights), processor=str(folder))), IMAGES, PROMPTS)
    torch.testing.assert_close(judged.value, 100 * judged.parts["cosine"], rtol=1e-5, atol=0)
    torch.testing.assert_close(judged.parts["cosine"], theirs, rtol=0, atol=5e-4)


def test_aesthetic_score_by_hand(tmp_path, folder):
    head = AestheticHead(WIDTH)
    names = [f"layers.{place}.{kind}" for place in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    assert list(head.state_dict()) == names
    with torch.device("meta"):
        shapes = [tuple(weight.shape) for name, weight in AestheticHead(768).state_dict().items() if name.endswith("weight")]
    assert shapes == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]
    torch.save(head.state_dict(), tmp_path / "head.pth")
    reward = build_reward(AestheticConfig(head=str(tmp_path / "head.pth"), model=str(folder)))
    features = load_clip(files_of(CLIPScoreConfig(model=str(folder)))).encode_images(IMAGES)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    x = features
    for place in (0, 2, 4, 6, 7):
        x = x @ head.state_dict()[f"layers.{place}.weight"].T + head.state_dict()[f"layers.{place}.bias"]
    torch.testing.assert_close(reward(IMAGES, [Prompt()] * 5), x[:, 0], rtol=0, atol=1e-5)
    torch.save({name.replace("layers.7", "layers.8"): tensor for name, tensor in head.state_dict().items()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"missing \(2\):\n    `layers\.7\.weight`.*nearest on the other side: `layers\.8\.weight`"):
        build_reward(AestheticConfig(head=str(tmp_path / "bad.pth"), model=str(folder)))


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_picture_is_worth_the_same_in_any_company(folder, batch):
    whole = build_reward(CLIPScoreConfig(model=str(folder)))(IMAGES, PROMPTS).value
    apart = build_reward(CLIPScoreConfig(model=str(folder), batch=batch))
    torch.testing.assert_close(apart(IMAGES, PROMPTS).value, whole, rtol=0, atol=1e-4)


# ---- texts -------------------------------------------------------------------------------------------------------------------------------


def test_a_text_is_encoded_once(folder, monkeypatch):
    clip = load_clip(files_of(CLIPScoreConfig(model=str(folder))))
    asked = []
    encode = clip._encode
    monkeypatch.setattr(clip, "_encode", lambda text: asked.append(text) or encode(text))
    first = clip.encode_texts(TEXTS)
    assert asked == ["a b c", "d e", "z", TEXTS[4]]
    assert torch.equal(clip.encode_texts(TEXTS[::-1]), first.flip(0))
    assert len(asked) == 4
    monkeypatch.setattr(vision, "TEXTS_KEPT", 2)
    clip.encode_texts(["k"])
    assert len(clip._texts) == 4
    clip.encode_texts(["k", "l"])
    assert "l" in clip._texts


@pytest.mark.parametrize("kind", ["clip_score", "pick_score", "hps"])
def test_every_reward_of_texts_encodes_each_prompt_once(kind, folder, released):
    """Counted where the text goes through the network, over chunks of repeated prompts."""
    configs = {
        "clip_score": CLIPScoreConfig(model=str(folder)),
        "pick_score": PickScoreConfig(model=str(folder), processor=str(folder)),
        "hps": hps(released),
    }
    reward, passes = build_reward(configs[kind]), []
    reward.clip.model.text_model.register_forward_hook(lambda *told: passes.append(1))
    for chunk in (PROMPTS[:2] * 4, PROMPTS, PROMPTS[::-1], [Prompt(text="z", label=1)]):
        reward(IMAGES[:1].expand(len(chunk), -1, -1, -1), chunk)
    assert len(passes) == len({prompt.text for prompt in PROMPTS}) == 4


def test_what_is_too_long_is_cut_off(folder):
    clip = load_clip(files_of(CLIPScoreConfig(model=str(folder))))
    long, longer = clip.encode_texts(["a b c d e f g", "a b c d e f g h i"])
    assert torch.equal(long, longer)


def test_a_prompt_without_text_stops_the_run(folder):
    with pytest.raises(RewardError, match="prompt with label 3: has no text to compare with"):
        build_reward(CLIPScoreConfig(model=str(folder)))(IMAGES[:1], [Prompt(label=3)])


# ---- HPS: open_clip's names --------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block as open_clip has it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inner))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(inner, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, inner) for _ in range(2)])


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(20))
        self.positional_embedding = nn.Parameter(torch.empty(10, 20))
        self.proj = nn.Parameter(torch.empty(20, WIDTH))
        self.conv1 = nn.Conv2d(3, 20, 8, 8, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(20), nn.LayerNorm(20)
        self.transformer = Blocks(20, 40)


class OpenCLIP(nn.Module):
    """A CLIP with open_clip's parameters, and written down apart from transformers."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.visual, self.transformer = Visual(), Blocks(16, 32)
        self.token_embedding, self.ln_final = nn.Embedding(vocab, 16), nn.LayerNorm(16)
        self.positional_embedding = nn.Parameter(torch.empty(TOKENS, 16))
        self.text_projection = nn.Parameter(torch.empty(16, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        for parameter in self.parameters():
            if parameter.ndim:
                nn.init.normal_(parameter, std=0.3)

    def image(self, pixels: Tensor) -> Tensor:
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = v.ln_pre(torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding)
        for block in v.transformer.resblocks:
            x = block(x)
        return F.normalize(v.ln_post(x[:, 0]) @ v.proj, dim=1)

    def text(self, ids: Tensor) -> Tensor:
        """Of ids padded with zeros; the end has the highest id."""
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return F.normalize(self.ln_final(x)[range(len(ids)), ids.argmax(1)] @ self.text_projection, dim=1)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[OpenCLIP, Path, Path]:
    """A tiny model of open_clip's names, the file that it is released in, and the folder of the CLIP it was tuned from, without weights."""
    place = tmp_path_factory.mktemp("hps")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = OpenCLIP(54).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, place / "hps.pt")
    return model, place / "hps.pt", save_clip(place / "clip", weights=False)


def hps(released) -> HPSConfig:
    return HPSConfig(weights=str(released[1]), processor=str(released[2]))


def test_hps_is_open_clips_cosine(released):
    model, _, folder = released
    square = IMAGES[..., :40]
    judged = build_reward(hps(released))(square, PROMPTS)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = torch.zeros(5, TOKENS, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        found = tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"]
        ids[row, : len(found)] = torch.tensor(found)
    clip = load_hps(files_of(hps(released)))
    with torch.no_grad():
        pixels = preprocess(square, clip.preprocessing)
        torch.testing.assert_close(clip.encode_images(square), model.image(pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(clip.encode_texts(TEXTS), model.text(ids), rtol=0, atol=1e-5)
        want = (model.image(pixels) * model.text(ids)).sum(1)
    assert want.std() > 0.02
    torch.testing.assert_close(judged.value, want, rtol=0, atol=1e-5)
    assert clip.logit_scale == pytest.approx(math.exp(2.0))
    assert clip.preprocessing.whole


def test_names_there_and_back(released):
    state = clip_model().state_dict()
    there = to_open_clip(state)
    assert there.keys() == released[0].state_dict().keys()
    back = from_open_clip(there, list(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert open_clip_name("vision_model.encoder.layers.31.self_attn.k_proj.weight") == "visual.transformer.resblocks.31.attn.in_proj_weight"


def test_what_does_not_fit_is_listed_under_the_files_names(tmp_path, released):
    state = dict(released[0].state_dict())
    state["visual.ln_prae.bias"] = state.pop("visual.ln_pre.bias")
    state["text_projection"] = state["text_projection"].T
    write_tensors(tmp_path / "hps.safetensors", state)
    with pytest.raises(CheckpointError) as error:
        build_reward(HPSConfig(weights=str(tmp_path / "hps.safetensors"), processor=str(released[2])))
    said = str(error.value)
    assert "`visual.ln_pre.bias` (nearest on the other side: `visual.ln_prae.bias`)" in said
    assert "`text_projection` [12, 16], the model has [16, 12]" in said


def test_a_compressed_file_is_read_in_fp32(tmp_path, released):
    torch.save({"state_dict": {name: tensor.half() for name, tensor in released[0].state_dict().items()}}, tmp_path / "half.pt")
    clip = load_hps(files_of(HPSConfig(weights=str(tmp_path / "half.pt"), processor=str(released[2]))))
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}


# ---- what is missing, said before a weight is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (CLIPScoreConfig(), "hf download openai/clip-vit-large-patch14 "),
        (PickScoreConfig(), "hf download yuvalkirstain/PickScore_v1 "),
        (HPSConfig(), r"hf download xswu/HPSv2 HPS_v2\.1_compressed\.pt"),
        (HPSConfig(weights="no.pt"), r"hps.weights='no.pt': there is no such file"),
        (AestheticConfig(head="no.pth"), "hf download openai/clip-vit-large-patch14 "),
    ],
)
def test_weights_that_are_not_there(config, command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for demanded in (lambda: build_reward(config), lambda: judge_of("mine", config, None)):
        with pytest.raises(ConfigError, match=command):
            demanded()


def test_parts_that_are_not_there(tmp_path, folder, released):
    bare = tmp_path / "bare"
    clip_model().save_pretrained(bare)
    with pytest.raises(ConfigError, match=r"bare holds no preprocessor_config\.json or processor_config\.json"):
        judge_of("mine", CLIPScoreConfig(model=str(bare)), None)
    with pytest.raises(ConfigError, match=r"no\.pth'.*christophschuhmann/improved-aesthetic-predictor"):
        judge_of("mine", AestheticConfig(head="no.pth", model=str(folder)), None)
    with pytest.raises(ConfigError, match=r"hps\.processor: .*bare holds no preprocessor_config\.json"):
        judge_of("mine", HPSConfig(weights=str(released[1]), processor=str(bare)), None)
    assert judge_of("mine", hps(released), None) == f"mine: hps, by {released[1]}"
    for name in ("vocab.json", "tokenizer.json"):
        (save_clip(tmp_path / "mute") / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"mute holds no tokenizer\.json or vocab\.json"):
        judge_of("mine", CLIPScoreConfig(model=str(tmp_path / "mute")), None)


@pytest.mark.parametrize("config", [CLIPScoreConfig, PickScoreConfig, HPSConfig, ImageRewardConfig, GenEvalConfig, VQAConfig])
def test_the_package_that_is_not_there(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs the package transformers, which is not installed\. Run `pip install 'varl\[hf\]'`"):
        judge_of("mine", config(), None)


def test_it_is_said_of_a_folder_that_is_there_too(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="needs the package transformers"):
        judge_of("mine", CLIPScoreConfig(model=str(folder)), None)


def test_a_file_that_is_none_is_not_recommended_to_be_trusted(tmp_path, released):
    (tmp_path / "hps.pt").write_text("<html>not found</html>")
    with pytest.raises(
        CheckpointError, match=r"hps\.pt: cannot be read as a file of weights \(UnpicklingError: Weights only load failed\)"
    ) as error:
        build_reward(HPSConfig(weights=str(tmp_path / "hps.pt"), processor=str(released[2])))
    assert "weights_only" not in str(error.value)


def test_a_file_in_the_hubs_cache_is_found(tmp_path, monkeypatch, released):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--xswu--HPSv2" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "HPS_v2.1_compressed.pt").write_bytes(released[1].read_bytes())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123abc")
    assert files_of(HPSConfig(processor=str(released[2]))).weights == snapshot / "HPS_v2.1_compressed.pt"


def test_folders_of_something_else(tmp_path, folder):
    dino = str(_with_tokenizer(save_dino(tmp_path / "dino"), folder))
    for config, setting in ((CLIPScoreConfig, "clip_score"), (PickScoreConfig, "pick_score")):
        with pytest.raises(ConfigError, match=rf"{setting}\.model='.*dino': .*dino holds a dinov2\. Give a folder with one of these: clip"):
            judge_of("mine", config(model=dino), None)
    with pytest.raises(ConfigError, match=r"dino\.model=.* holds a clip\. Give a folder with one of these: dinov2"):
        judge_of("mine", DINOConfig(model=str(folder)), lambda prompts: IMAGES)
    other = save_clip(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["projection_dim"] = 10
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"the weights do not fit CLIPModel \(mismatched keys: .*text_projection"):
        build_reward(CLIPScoreConfig(model=str(other)))
    told = json.loads((folder / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(told | {"resample": 2}))
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="its preprocessing does not scale the shorter side"):
        build_reward(CLIPScoreConfig(model=str(other)))


def _with_tokenizer(folder: Path, source: Path) -> Path:
    for file in source.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_batch_must_hold_a_picture():
    for cls in (CLIPScoreConfig, PickScoreConfig, HPSConfig):
        with pytest.raises(ConfigError, match=r"batch=0: must be 1 or more"):
            cls(batch=0)
    assert WeightedReward(reward=CLIPScoreConfig()).weight == 1.0


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(folder):
    reward = build_reward(CLIPScoreConfig(model=str(folder)))
    want = reward(IMAGES, PROMPTS).value
    torch.testing.assert_close(reward(IMAGES.cuda(), PROMPTS).value, want, rtol=0, atol=1e-2)
