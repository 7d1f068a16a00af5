"""ImageReward and HPSv3, on tiny models with random weights under the released names."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from varl.build import build_reward, demand_texts
from varl.checkpoints import hpsv3, image_reward
from varl.checkpoints.folder import write_tensors
from varl.checkpoints.hpsv3 import load_hpsv3, own_name, read_template
from varl.checkpoints.vision import files_of
from varl.config import (
    AestheticConfig,
    CLIPScoreConfig,
    FolderConfig,
    HPSConfig,
    HPSv3Config,
    ImageRewardConfig,
    PickScoreConfig,
    RunConfig,
    WeightedReward,
)
from varl.data.folder import write_folder
from varl.errors import CheckpointError, ConfigError, RewardError
from varl.models.hpsv3 import REWARD, patches, scaled_size
from varl.models.vision import CLIP_MEAN, CLIP_STD, Preprocessing, normalise, preprocess, resized
from varl.plan import plan
from varl.plan.missing import judge_of
from varl.plan.rewards import try_reward
from varl.rewards import preference
from varl.rewards.judge import judge_now
from varl.run import train
from varl.types import Prompt

NOISE = torch.Generator().manual_seed(0)
TEXTS = ["a cat", "two red dogs run", "a cat", "x", "one two three four five six seven eight nine ten"]
PROMPTS = [Prompt(text=text) for text in TEXTS]


def drawn(module: nn.Module, seed: int) -> nn.Module:
    """`module` with weights that keep what they are given about as large as it was: its own are so small that pictures look alike."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            vector = 0.3 * drawn + (name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name)
            parameter.copy_(drawn / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else vector)
    return module.eval()


def smooth(height: int, width: int, count: int = 5) -> Tensor:
    """Bytes of pictures as they are, rather than noise."""
    coarse = torch.rand(count, 3, 5, 5, generator=NOISE)
    return (F.interpolate(coarse, (height, width), mode="bilinear") * 255).round().to(torch.uint8)


# ---- ImageReward: BLIP as its authors wrote it down, with its names ----------------------------------------------------------------------

SIDE, WIDE, WIDTH = 48, 128, 64
"""Pixels; widths of eyes and of reader, of two and one attention heads."""


def attend(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor | None = None) -> Tensor:
    """Attention in heads of 64; `unseen` [B, L] is True where nothing may be read."""
    heads = [x.unflatten(2, (-1, 64)).transpose(1, 2) for x in (q, k, v)]
    scores = heads[0] @ heads[1].transpose(2, 3) / 8
    if unseen is not None:
        scores = scores.masked_fill(unseen[:, None, None], -1e4)
    return (scores.softmax(3) @ heads[2]).transpose(1, 2).flatten(2)


class Eyes(nn.Module):
    """timm's vision transformer, of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.empty(1, 1, WIDE)), nn.Parameter(torch.empty(1, 10, WIDE))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDE, 16, 16)})
        self.blocks = nn.ModuleList([self.block() for _ in range(2)])
        self.norm = nn.LayerNorm(WIDE, eps=1e-6)

    def block(self) -> nn.Module:
        attn = nn.ModuleDict({"qkv": nn.Linear(WIDE, 3 * WIDE), "proj": nn.Linear(WIDE, WIDE)})
        mlp = nn.ModuleDict({"fc1": nn.Linear(WIDE, 160), "fc2": nn.Linear(160, WIDE)})
        norms = {"norm1": nn.LayerNorm(WIDE, eps=1e-6), "norm2": nn.LayerNorm(WIDE, eps=1e-6)}
        return nn.ModuleDict({**norms, "attn": attn, "mlp": mlp})

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + block["attn"]["proj"](attend(*block["attn"]["qkv"](block["norm1"](x)).chunk(3, 2)))
            x = x + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.norm(x)


class Attention(nn.Module):
    def __init__(self, seen: int) -> None:
        super().__init__()
        self.self = nn.ModuleDict({name: nn.Linear(WIDTH if name == "query" else seen, WIDTH) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)})

    def forward(self, x: Tensor, seen: Tensor, unseen: Tensor | None = None) -> Tensor:
        found = attend(self.self["query"](x), self.self["key"](seen), self.self["value"](seen), unseen)
        return self.output["LayerNorm"](self.output["dense"](found) + x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.crossattention = Attention(WIDTH), Attention(WIDE)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, 96)})
        self.output = nn.ModuleDict({"dense": nn.Linear(96, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)})

    def forward(self, x: Tensor, unseen: Tensor, seen: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, unseen), seen)
        return self.output["LayerNorm"](self.output["dense"](F.gelu(self.intermediate["dense"](x))) + x)


class Reader(nn.Module):
    """BERT whose layers look at the picture, two of them."""

    def __init__(self, words: int) -> None:
        super().__init__()
        names = {"word_embeddings": nn.Embedding(words, WIDTH), "position_embeddings": nn.Embedding(40, WIDTH)}
        self.embeddings = nn.ModuleDict({**names, "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)})
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([Layer(), Layer()])})

    def forward(self, ids: Tensor, unseen: Tensor, seen: Tensor) -> Tensor:
        e = self.embeddings
        x = e["LayerNorm"](e["word_embeddings"](ids) + e["position_embeddings"].weight[: ids.shape[1]])
        for layer in self.encoder["layer"]:
            x = layer(x, unseen, seen)
        return x


class Released(nn.Module):
    """ImageReward with the names of its released file, and written down apart from transformers."""

    def __init__(self, words: int) -> None:
        super().__init__()
        projections = {"vision_proj": nn.Linear(WIDE, 8), "text_proj": nn.Linear(WIDTH, 8)}
        self.blip = nn.ModuleDict({"visual_encoder": Eyes(), "text_encoder": Reader(words), **projections})
        sizes = (WIDTH, 1024, 128, 64, 16, 1)
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        dropouts = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
        order = [layers[0], dropouts[0], layers[1], dropouts[1], layers[2], dropouts[2], layers[3], layers[4]]
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*order)})

    @torch.no_grad()
    def forward(self, pixels: Tensor, ids: Tensor, unseen: Tensor) -> Tensor:
        read = self.blip["text_encoder"](ids, unseen, self.blip["visual_encoder"](pixels))
        return self.mlp["layers"](read[:, 0])[:, 0]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory, bert) -> tuple[Released, Path]:
    model = Released(len(BertTokenizer.from_pretrained(bert)) + 2)
    drawn(model, 7)
    file = tmp_path_factory.mktemp("image_reward") / "ImageReward.pt"
    torch.save(model.state_dict(), file)
    return model, file


def rewarding(blip, bert, **settings) -> ImageRewardConfig:
    return ImageRewardConfig(weights=str(blip[1]), tokenizer=str(bert), **settings)


def test_image_reward_is_its_authors(blip, bert):
    images = smooth(40, 64) / 255
    tokenizer = BertTokenizer.from_pretrained(bert)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens["attention_mask"].sum(1).tolist() == [6, 15, 6, 3, 35]
    pixels = preprocess(images, Preprocessing(side=SIDE, crop=(SIDE, SIDE), mean=CLIP_MEAN, std=CLIP_STD, rounded=True))
    raw = blip[0](pixels, tokens["input_ids"], tokens["attention_mask"] == 0)
    want = (raw - 0.16717362830052426) / 1.0333394966054072
    assert want.std() > 0.01
    got = judge_now(build_reward(rewarding(blip, bert)), images, PROMPTS).value
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for batch in (1, 2):
        apart = build_reward(rewarding(blip, bert, batch=batch))
        torch.testing.assert_close(judge_now(apart, images, PROMPTS).value, want, rtol=0, atol=1e-5)


def test_image_reward_by_hand():
    assert preference.image_reward(torch.tensor([0.16717362830052426, 1.2005131249])).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_the_middle_begins_where_torchvision_rounds_it():
    plain: dict[str, Any] = {"side": 4, "crop": (4, 4), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for wide, (cut, rounded) in {4: (0, 0), 5: (0, 0), 6: (1, 1), 7: (1, 2), 8: (2, 2), 9: (2, 2), 11: (3, 4)}.items():
        image = torch.arange(4.0 * wide).view(1, 1, 4, wide).expand(1, 3, 4, wide) / (4 * wide)
        assert torch.equal(preprocess(image, Preprocessing(**plain)), image[..., cut : cut + 4])
        assert torch.equal(preprocess(image, Preprocessing(**plain, rounded=True)), image[..., rounded : rounded + 4])


def listing(eyes: int, reader: int, layers: tuple[int, int], words: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released file's weights that are used, for these widths."""
    see, read = "blip.visual_encoder", "blip.text_encoder"
    found = {f"{see}.cls_token": (1, 1, eyes), f"{see}.pos_embed": (1, 197, eyes), f"{see}.patch_embed.proj.weight": (eyes, 3, 16, 16)}

    def linear(name: str, out: int, into: int) -> None:
        found.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    found[f"{see}.patch_embed.proj.bias"] = (eyes,)
    norm(f"{see}.norm", eyes)
    for i in range(layers[0]):
        block = f"{see}.blocks.{i}"
        norm(f"{block}.norm1", eyes)
        norm(f"{block}.norm2", eyes)
        for name, out, into in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            linear(f"{block}.{name}", out * eyes, into * eyes)
    found |= {f"{read}.embeddings.{what}_embeddings.weight": (many, reader) for what, many in (("word", words), ("position", 512))}
    norm(f"{read}.embeddings.LayerNorm", reader)
    for i in range(layers[1]):
        layer = f"{read}.encoder.layer.{i}"
        for attention, seen in (("attention", reader), ("crossattention", eyes)):
            linear(f"{layer}.{attention}.self.query", reader, reader)
            linear(f"{layer}.{attention}.self.key", reader, seen)
            linear(f"{layer}.{attention}.self.value", reader, seen)
            linear(f"{layer}.{attention}.output.dense", reader, reader)
            norm(f"{layer}.{attention}.output.LayerNorm", reader)
        linear(f"{layer}.intermediate.dense", 4 * reader, reader)
        linear(f"{layer}.output.dense", reader, 4 * reader)
        norm(f"{layer}.output.LayerNorm", reader)
    sizes = (reader, 1024, 128, 64, 16, 1)
    for place, into, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        linear(f"mlp.layers.{place}", out, into)
    return found


def test_image_reward_of_the_released_size():
    want = listing(1024, 768, (24, 12), 30524)
    assert len(want) == 620
    eyes, reader = image_reward.sizes_of(want, "released")
    assert (eyes["image_size"], eyes["num_attention_heads"], reader["num_attention_heads"]) == (224, 16, 12)
    assert image_reward.released_shapes(image_reward.without_memory(eyes, reader)) == want


def test_weights_of_image_reward_that_do_not_fit(tmp_path, blip, bert):
    state = dict(blip[0].state_dict())
    state["blip.visual_encoder.blocks.1.attn.qkv.weights"] = state.pop("blip.visual_encoder.blocks.1.attn.qkv.weight")
    state["mlp.layers.7.bias"] = torch.zeros(2)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError) as error:
        build_reward(ImageRewardConfig(weights=str(tmp_path / "bad.pt"), tokenizer=str(bert)))
    said = str(error.value)
    nearest = "nearest on the other side: `blip.visual_encoder.blocks.1.attn.qkv.weights`"
    assert f"`blip.visual_encoder.blocks.1.attn.qkv.weight` ({nearest})" in said
    assert "`mlp.layers.7.bias` [2], the model has [1]" in said
    torch.save({"model": {"a.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        build_reward(ImageRewardConfig(weights=str(tmp_path / "other.pt"), tokenizer=str(bert)))


# ---- HPSv3 -------------------------------------------------------------------------------------------------------------------------------

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for message in messages %}{% if loop.first %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE = f'''"""What the package has beside it is never run."""
import no_such_package

INSTRUCTION = """
Judge the picture.
Text - {{text_prompt}}

"""
OTHER = 3
prompt_with_special_token = """
So: {REWARD}

END
"""
raise SystemExit
'''


def qwen(words: int) -> Qwen2VLConfig:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2}
    ids = {f"{name}_token_id": 256 + MARKS.index(f"<|{mark}|>") for name, mark in IDS.items()}
    return Qwen2VLConfig(text_config={"vocab_size": words, "rope_parameters": rope, **text}, vision_config=vision, **ids)


IDS = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Path:
    """A tokenizer of single bytes, and a config whose vocabulary is larger than what the tokenizer knows, as the released one's is."""
    folder = tmp_path_factory.mktemp("qwen")
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printed] + [chr(256 + k) for k in range(256 - len(printed))]
    tokenizer = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    qwen(300).save_pretrained(folder)
    (folder / "data_collator_qwen.py").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory, processor) -> tuple[Qwen2VLForConditionalGeneration, dict[str, Tensor], Path]:
    """The backbone in fp32 with values of bf16, buffers included, the head, and both in a file with the names of the older transformers."""
    model = drawn(Qwen2VLForConditionalGeneration(qwen(264)), 3).to(torch.bfloat16)
    noise = torch.Generator().manual_seed(4)
    sizes = {"0": (1024, 16), "3": (16, 1024), "5": (2, 16)}
    head = {f"rm_head.{at}.weight": torch.randn(size, generator=noise) / size[1] ** 0.5 for at, size in sizes.items()}
    head |= {f"rm_head.{at}.bias": torch.randn(size[0], generator=noise) for at, size in sizes.items()}
    head["rm_head.5.weight"] *= 8
    older = {}
    for name, tensor in model.state_dict().items():
        older[name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")] = tensor
    file = tmp_path_factory.mktemp("hpsv3") / "HPSv3.safetensors"
    write_tensors(file, older | head)
    return model.to(torch.float32), head, file


def asking(judge, folder, **settings) -> HPSv3Config:
    where = {"weights": str(judge[2]), "processor": str(folder), "template": str(folder / "data_collator_qwen.py")}
    return HPSv3Config(**(where | settings))


@torch.no_grad()
def alone(judge, processor, image: Tensor, text: str, *, by_place: bool = False) -> Tensor:
    """The two numbers for bytes of a picture that needs no scaling, as its package gets them: one picture, the whole conversation,
    positions left to the language model. `by_place` numbers the picture's tokens as Qwen2-VL itself does."""
    model, head, _ = judge
    tokenizer = Qwen2Tokenizer.from_pretrained(processor)
    tokenizer.add_tokens([REWARD], special_tokens=True)
    said = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 256 + "<|vision_end|>"
    said += f"\nJudge the picture.\nText - {text}\n\n\nSo: {REWARD}\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(said, return_tensors="pt")["input_ids"]
    seen = Qwen2VLImageProcessorPil(min_pixels=200704, max_pixels=200704)(image.numpy(), return_tensors="pt")
    if by_place:
        kinds = (ids == model.config.image_token_id).int()
        hidden = model.model(input_ids=ids, mm_token_type_ids=kinds, **seen).last_hidden_state
    else:
        words = model.model.language_model.embed_tokens(ids)
        places = (ids == model.config.image_token_id)[..., None].expand_as(words)
        words = words.masked_scatter(places, model.model.visual(seen["pixel_values"], seen["image_grid_thw"]).pooler_output)
        hidden = model.model.language_model(inputs_embeds=words).last_hidden_state
    assert (ids == 263).sum() == 1
    x = hidden[ids == 263][0]
    for at in ("0", "3", "5"):
        x = head[f"rm_head.{at}.weight"] @ (x if at == "0" else x.relu()) + head[f"rm_head.{at}.bias"]
    return x


def test_hpsv3_is_its_packages(judge, processor):
    pictures = smooth(448, 448, 3)
    texts = [TEXTS[4], TEXTS[0], TEXTS[1]]
    want = torch.stack([alone(judge, processor, image, text) for image, text in zip(pictures, texts, strict=True)])
    assert want.std(0).min() > 0.01
    for batch in (8, 2, 1):
        reward = build_reward(asking(judge, processor, batch=batch))
        judged = judge_now(reward, pictures / 255, [Prompt(text=text) for text in texts])
        torch.testing.assert_close(judged.value, want[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(judged.parts["sigma"], want[:, 1].exp(), rtol=1e-5, atol=1e-5)
    by_place = alone(judge, processor, pictures[0], texts[0], by_place=True)
    assert (by_place - want[0]).abs().max() > 1e-3


def test_both_ways_of_naming(tmp_path, judge, processor):
    model, head, _ = judge
    newer = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    assert {name.split(".")[1] for name in newer if name.startswith("model.")} == {"visual", "language_model"}
    write_tensors(tmp_path / "newer.safetensors", newer | head)
    image = smooth(60, 90, 1) / 255
    older = load_hpsv3(files_of(asking(judge, processor)), processor / "data_collator_qwen.py")(image, ["a"])
    config = asking(judge, processor, weights=str(tmp_path / "newer.safetensors"))
    assert torch.equal(load_hpsv3(files_of(config), processor / "data_collator_qwen.py")(image, ["a"]), older)


def test_hpsv3_of_the_released_size():
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = Qwen2VLConfig(text_config={"vocab_size": 151658, **text}, vision_config={"hidden_size": 3584})
    want: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151658, 3584), "model.norm.weight": (3584,)}
    want["visual.patch_embed.proj.weight"] = (1280, 3, 2, 14, 14)

    def linear(name: str, out: int, into: int, *, bias: bool = True) -> None:
        want.update({f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})})

    for i in range(28):
        layer = f"model.layers.{i}"
        for name, out in (("q", 3584), ("k", 512), ("v", 512)):
            linear(f"{layer}.self_attn.{name}_proj", out, 3584)
        linear(f"{layer}.self_attn.o_proj", 3584, 3584, bias=False)
        linear(f"{layer}.mlp.gate_proj", 18944, 3584, bias=False)
        linear(f"{layer}.mlp.up_proj", 18944, 3584, bias=False)
        linear(f"{layer}.mlp.down_proj", 3584, 18944, bias=False)
        want |= {f"{layer}.{norm}_layernorm.weight": (3584,) for norm in ("input", "post_attention")}
    for i in range(32):
        block = f"visual.blocks.{i}"
        for name, out, into in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            linear(f"{block}.{name}", out * 1280, into * 1280)
        want |= {f"{block}.{norm}.{kind}": (1280,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    want |= {f"visual.merger.ln_q.{kind}": (1280,) for kind in ("weight", "bias")}
    linear("visual.merger.mlp.0", 5120, 5120)
    linear("visual.merger.mlp.2", 3584, 5120)
    for at, out, into in (("0", 1024, 3584), ("3", 16, 1024), ("5", 2, 16)):
        linear(f"rm_head.{at}", out, into)
    assert len(want) == 735
    assert hpsv3.released_shapes(config, newer=False) == want
    newer = hpsv3.released_shapes(config, newer=True)
    assert {own_name(name): shape for name, shape in newer.items()} == {own_name(name): shape for name, shape in want.items()}


def test_weights_of_hpsv3_that_do_not_fit(tmp_path, judge, processor):
    model, head, _ = judge
    state = dict(model.state_dict()) | head
    state["model.visual.merger.ln_k.bias"] = state.pop("model.visual.merger.ln_q.bias")
    state["rm_head.5.weight"] = torch.zeros(4, 16)
    write_tensors(tmp_path / "bad.safetensors", state)
    with pytest.raises(CheckpointError) as error:
        build_reward(asking(judge, processor, weights=str(tmp_path / "bad.safetensors")))
    said = str(error.value)
    assert "`model.visual.merger.ln_q.bias` (nearest on the other side: `model.visual.merger.ln_k.bias`)" in said
    assert "`rm_head.5.weight` [4, 16], the model has [2, 16]" in said
    state["model.language_model.embed_tokens.weight"] = torch.zeros(300, 16)
    write_tensors(tmp_path / "words.safetensors", state)
    with pytest.raises(CheckpointError, match=r"knows 300 tokens, and the tokenizer in .* has 264 with <\|Reward\|>"):
        build_reward(asking(judge, processor, weights=str(tmp_path / "words.safetensors")))


def test_the_template_is_read_and_not_run(tmp_path, processor):
    template = read_template(processor / "data_collator_qwen.py")
    assert template == ("\nJudge the picture.\nText - {text_prompt}\n\n", f"\nSo: {REWARD}\n\nEND\n")
    for broken in (TEMPLATE.replace("{text_prompt}", "{prompt}"), TEMPLATE.replace(REWARD, "here"), "INSTRUCTION = 3"):
        (tmp_path / "t.py").write_text(broken)
        with pytest.raises(CheckpointError, match=r"t\.py: must assign INSTRUCTION, with \{text_prompt\} in it, and prompt_with_special_"):
            read_template(tmp_path / "t.py")
    (tmp_path / "t.py").write_text("INSTRUCTION = '")
    with pytest.raises(CheckpointError, match=r"t\.py: cannot be read as Python"):
        read_template(tmp_path / "t.py")


# ---- pictures as Qwen2-VL wants them -----------------------------------------------------------------------------------------------------


def test_sizes():
    sizes = {(448, 448): (448, 448), (1024, 1024): (448, 448), (256, 256): (448, 448), (480, 640): (364, 504)}
    for have, want in sizes.items():
        assert scaled_size(*have, 28) == want
    for height in range(29, 1400, 37):
        for width in range(31, 1400, 53):
            assert scaled_size(height, width, 28) == smart_resize(height, width, 28, 256 * 28 * 28, 256 * 28 * 28)


@pytest.mark.parametrize("size", [(448, 448), (300, 500), (640, 480)])
def test_pictures_are_prepared_as_qwen2_vl_does(size):
    picture = smooth(*size, 1)
    height, width = scaled_size(*size, 28)
    bytes_ = Image.fromarray(picture[0].permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    told = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)(bytes_, return_tensors="pt")
    got = patches(normalise(resized(picture / 255, (height, width)), CLIP_MEAN, CLIP_STD), 14, 2, 2)
    assert told["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    assert got[0].shape == told["pixel_values"].shape
    std = torch.tensor(CLIP_STD).repeat_interleave(2 * 14 * 14)
    assert ((got[0] - told["pixel_values"]) * std * 255).abs().max() < 1.5


# ---- both --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (ImageRewardConfig(), r"hf download THUDM/ImageReward ImageReward\.pt"),
        (HPSv3Config(template="t"), r"hf download MizzenAI/HPSv3 HPSv3\.safetensors"),
    ],
)
def test_weights_that_are_not_there(config, command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for demanded in (lambda: build_reward(config), lambda: judge_of("mine", config, None)):
        with pytest.raises(ConfigError, match=command):
            demanded()


def test_parts_that_are_not_there(tmp_path, monkeypatch, judge, processor, blip, bert):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"hf download google-bert/bert-base-uncased --exclude .*'\*\.safetensors'"):
        judge_of("mine", ImageRewardConfig(weights=str(blip[1])), None)
    with pytest.raises(ConfigError, match=r"hpsv3\.template='none': there is no such file.*github\.com/MizzenAI/HPSv3"):
        judge_of("mine", asking(judge, processor, template="none"), None)
    with pytest.raises(ConfigError, match=r"hpsv3\.processor: .* holds no config\.json"):
        judge_of("mine", asking(judge, processor, processor=str(bert.parent)), None)
    assert judge_of("mine", rewarding(blip, bert), None) == f"mine: image_reward, by {blip[1]}"
    assert judge_of("mine", asking(judge, processor), None) == f"mine: hpsv3, by {judge[2]}"


def test_a_prompt_without_text(judge, processor, blip, bert):
    for config in (rewarding(blip, bert), asking(judge, processor)):
        with pytest.raises(RewardError, match="prompt with label 3: has no text to compare with"):
            build_reward(config)(torch.zeros(1, 3, 40, 40), [Prompt(label=3)])
    prompts = [Prompt(text="a"), Prompt(label=1), Prompt(text=" ")]
    texts = (CLIPScoreConfig(), PickScoreConfig(), HPSConfig(), ImageRewardConfig(), HPSv3Config(template="t"))
    for config in texts:
        with pytest.raises(ConfigError, match=r"rewards\.mine: 2 of 3 prompts have no text to compare with\."):
            demand_texts("rewards.mine", config, prompts)
        demand_texts("rewards.mine", config, prompts[:1])
    demand_texts("rewards.mine", AestheticConfig(head="h"), prompts)


def test_a_run_is_refused_before_its_model_is_opened(tmp_path, blip, bert):
    write_folder(tmp_path / "mute", None, [Prompt(text="a"), Prompt(label=1)])
    run = RunConfig(model="no/model", data=FolderConfig(path=str(tmp_path / "mute")))
    run = replace(run, rewards={"people": WeightedReward(reward=rewarding(blip, bert))})
    with pytest.raises(ConfigError, match=r"rewards\.people: 1 of 2 prompts have no text to compare with\."):
        train(run, tmp_path / "run")
    assert any(problem.startswith("rewards.people: 1 of 2 prompts have no text") for problem in plan(run, calibrate=False).problems)
    write_folder(tmp_path / "fine", None, [Prompt(text="a")])
    run = replace(
        run, data=FolderConfig(path=str(tmp_path / "fine")), rewards={"people": WeightedReward(reward=ImageRewardConfig(weights="no.pt"))}
    )
    with pytest.raises(ConfigError, match=r"image_reward\.weights='no\.pt': there is no such file"):
        train(run, tmp_path / "run")


def test_they_can_be_tried(judge, processor, blip, bert):
    images = smooth(60, 60, 2) / 255
    for config in (rewarding(blip, bert), asking(judge, processor)):
        tried = try_reward("mine", build_reward(config), images, PROMPTS[:2])
        assert tried.pictures.isfinite().all()
        assert (tried.pictures - tried.noise).abs().min() > 1e-4
        assert tried.memory > 0


def test_batch_must_hold_a_picture():
    for cls, needed in ((ImageRewardConfig, {}), (HPSv3Config, {"template": "t"})):
        with pytest.raises(ConfigError, match=r"batch=0: must be 1 or more"):
            cls(batch=0, **needed)


@pytest.mark.gpu
def test_hpsv3_on_a_gpu_is_in_half_precision(judge, processor):
    images, prompts = smooth(448, 448, 3) / 255, PROMPTS[:3]
    want = judge_now(build_reward(asking(judge, processor)), images, prompts).value
    network = load_hpsv3(files_of(asking(judge, processor)), processor / "data_collator_qwen.py")
    reward = preference.HPSv3(network, 8)
    got = reward(images.cuda(), prompts).value
    assert {parameter.dtype for parameter in network.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(got, want, rtol=0, atol=0.1 * want.std().item() + 0.1)
    torch.testing.assert_close(reward(images, prompts).value, want, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_image_reward_on_a_gpu_as_on_the_cpu(blip, bert):
    images = smooth(40, 64) / 255
    reward = build_reward(rewarding(blip, bert))
    want = reward(images, PROMPTS)
    torch.testing.assert_close(reward(images.cuda(), PROMPTS), want, rtol=0, atol=1e-3)
