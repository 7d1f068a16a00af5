"""Captions as features of a T5 or a Phi: tiny ones that transformers itself made and saved, what is remembered of them on disk, and what
may be missing."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaModel,
    PhiConfig,
    PhiForCausalLM,
    PhiModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from tiny_infinity import SQUARE
from varl.build import caption_encoder, new_policy
from varl.checkpoints import model as model_folder
from varl.checkpoints.hugging_face import find, identity
from varl.checkpoints.model import fresh
from varl.checkpoints.text_encoder import load_text_encoder
from varl.config import CaptionConfig, RasterConfig, VQConfig
from varl.data.caption_cache import CaptionCache
from varl.errors import CheckpointError, ConfigError, DataError
from varl.policies.infinity import InfinityPolicy
from varl.rng import Stream
from varl.tokenizers.phi import Phi
from varl.types import Prompt

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "green", "cube", "ball", "on"]
TOKENIZER = VQConfig(vocab=10, channels=4, latent=4, width=8, multipliers=(1, 2), blocks=1, attention=False)
MODEL = RasterConfig(depth=1, width=16, heads=2, grid=(2, 3), captions=CaptionConfig(tokens=5, width=8), tokenizer=TOKENIZER)
CPU = torch.device("cpu")


def save_t5(folder: Path, *, decoder: bool = True, seed: int = 0, width: int = 8) -> Path:
    """A T5 with a tokenizer of nine whole words that ends each caption."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=width,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    (T5ForConditionalGeneration if decoder else T5EncoderModel)(config).save_pretrained(folder)
    return save_words(folder, TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]))


def save_phi(folder: Path, *, head: bool = True, seed: int = 0, width: int = 8) -> Path:
    """A Phi with a tokenizer of nine whole words that adds nothing, as Phi-2's."""
    config = PhiConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    phi = (PhiForCausalLM if head else PhiModel)(config)
    torch.manual_seed(seed)
    for weight in phi.parameters():  # norms and biases too
        torch.nn.init.normal_(weight, std=0.5)
    phi.save_pretrained(folder)
    return save_words(folder)


def save_words(folder: Path, processor: TemplateProcessing | None = None) -> Path:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    if processor is not None:
        words.post_processor = processor
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


def cache(path: Path, folder: Path) -> CaptionCache:
    return CaptionCache(path, encoder=lambda: identity(folder), load=lambda: load_text_encoder(folder, CPU, torch.float32))


# ---- the encoder


def test_features_are_those_of_transformers_without_padding(folder):
    t5 = load_text_encoder(folder, CPU, torch.float32)
    theirs = T5EncoderModel.from_pretrained(folder).eval()
    assert t5("a red cube").shape == (4, 8)
    ids = torch.tensor([[3, 4, 6, 1]])
    torch.testing.assert_close(t5("a red cube"), theirs(input_ids=ids).last_hidden_state[0].detach(), rtol=0, atol=1e-6)
    assert torch.equal(t5("  A Red\n CUBE "), t5("a red cube"))
    padded = theirs(input_ids=torch.tensor([[3, 4, 6, 1, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))
    torch.testing.assert_close(t5("a red cube"), padded.last_hidden_state[0, :4].detach(), rtol=0, atol=1e-6)
    assert not t5("a").requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in t5.model.parameters())


def test_the_encoder_alone_is_enough(tmp_path, folder):
    whole, alone = (
        load_text_encoder(folder, CPU, torch.float32),
        load_text_encoder(save_t5(tmp_path / "t5", decoder=False), CPU, torch.float32),
    )
    assert whole("a red ball").shape == alone("a red ball").shape


def test_bfloat16_inside_is_fp32_outside(folder):
    low, full = (load_text_encoder(folder, CPU, dtype)("a red cube") for dtype in (torch.bfloat16, torch.float32))
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().max() < 0.05 * full.abs().max()


def test_a_folder_that_is_no_t5(tmp_path, folder):
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaModel(config).save_pretrained(tmp_path / "llama")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "llama" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="llama: is a llama, no t5 and no phi"):
        load_text_encoder(tmp_path / "llama", CPU, torch.float32)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_is_named(tmp_path, name):
    folder = save_t5(tmp_path / "t5")
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(CheckpointError, match="t5: cannot be read as a text encoder"):
        load_text_encoder(folder, CPU, torch.float32)


# ---- Phi


@pytest.fixture(scope="module")
def phi(tmp_path_factory) -> Path:
    return save_phi(tmp_path_factory.mktemp("phi"))


def test_phi_s_features_are_those_of_transformers_after_its_last_norm(phi):
    read = load_text_encoder(phi, CPU, torch.float32)
    assert isinstance(read, Phi)
    theirs = PhiForCausalLM.from_pretrained(phi).eval()
    found = theirs(input_ids=torch.tensor([[3, 4, 6]]), output_hidden_states=True)
    assert read("a red cube").shape == (3, 8)
    torch.testing.assert_close(read("a red cube"), found.hidden_states[-1][0].detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs.lm_head(read("a red cube")), found.logits[0], rtol=0, atol=1e-5)
    assert not read("a").requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in read.model.parameters())


def test_each_of_phi_s_tokens_sees_those_before_it_alone(phi):
    read = load_text_encoder(phi, CPU, torch.float32)
    torch.testing.assert_close(read("a red cube on a ball")[:3], read("a red cube"), rtol=0, atol=1e-5)
    assert (read("a red cube")[2] - read("a green cube")[2]).abs().max() > 1e-2


def test_the_empty_caption_has_no_features_and_is_remembered(tmp_path, phi):
    first = cache(tmp_path, phi)
    assert [part.shape for part in first(["", "a"])] == [(0, 8), (1, 8)]
    assert len(list(first.folder.iterdir())) == 2
    again = CaptionCache(tmp_path, encoder=lambda: identity(phi), load=lambda: pytest.fail("the encoder is loaded"))
    (none,) = again([""])
    assert (none.shape, none.dtype) == ((0, 8), torch.float32)


def test_a_caption_too_long_for_phi(phi):
    read = load_text_encoder(phi, CPU, torch.float32, longest=3)
    assert len(read("a red cube")) == 3
    with pytest.raises(DataError, match="'a red cube on' has 4 tokens, the model takes 0 to 3"):
        read("a red cube on")
    assert len(load_text_encoder(phi, CPU, torch.float32)(" ".join(["a"] * 30))) == 30


def test_phi_lower_cases_if_told_to(phi):
    low, cased = (load_text_encoder(phi, CPU, torch.float32, lowercase=lowercase) for lowercase in (True, False))
    assert torch.equal(low("A red CUBE"), cased("a red cube"))
    assert not torch.equal(cased("A red CUBE"), cased("a red cube"))


def test_phi_without_its_head_is_enough(tmp_path, phi):
    bare = load_text_encoder(save_phi(tmp_path / "bare", head=False), CPU, torch.float32)
    assert torch.equal(bare("a ball"), load_text_encoder(phi, CPU, torch.float32)("a ball"))


def test_a_phi_that_lacks_weights(tmp_path):
    folder = save_phi(tmp_path / "phi")
    state = load_file(folder / "model.safetensors")
    del state["model.final_layernorm.bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"phi: lacks 1 weights of a PhiModel, `\S*final_layernorm.bias` first"):
        load_text_encoder(folder, CPU, torch.float32)


# ---- what is remembered


def test_a_caption_is_encoded_once_and_found_by_another_run(tmp_path, folder, monkeypatch):
    first = cache(tmp_path, folder)
    features = first(["a red cube", "on", "a red cube"])
    assert [len(f) for f in features] == [4, 2, 4]
    assert torch.equal(features[0], features[2])
    assert len(list(first.folder.iterdir())) == 2
    monkeypatch.setattr("varl.checkpoints.text_encoder.transformers", lambda: pytest.fail("the encoder is loaded"))
    again = CaptionCache(tmp_path, encoder=lambda: identity(folder), load=lambda: load_text_encoder(folder, CPU, torch.float32))
    for got, want in zip(again(["on", "a red cube"]), [features[1], features[0]], strict=True):
        assert torch.equal(got, want)


def test_encoders_do_not_share_what_is_remembered(tmp_path, folder):
    other = save_t5(tmp_path / "other", seed=1)
    one, two = cache(tmp_path / "cache", folder), cache(tmp_path / "cache", other)
    assert one.folder != two.folder
    assert not torch.equal(one(["a"])[0], two(["a"])[0])
    assert torch.equal(cache(tmp_path / "cache", folder)(["a"])[0], one(["a"])[0])


def test_nothing_is_loaded_before_a_caption_is_asked_for(tmp_path):
    CaptionCache(tmp_path, encoder=lambda: pytest.fail("named"), load=lambda: pytest.fail("loaded"))


def test_a_damaged_file_is_named(tmp_path, folder):
    first = cache(tmp_path, folder)
    first(["a"])
    (file,) = first.folder.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"}}") + 50] ^= 1
    for data, why in ((bytes(flipped), "is damaged"), (whole[:60], "holds no features")):
        file.write_bytes(data)
        with pytest.raises(DataError, match=rf"{file.name}: {why}.*Delete it"):
            first(["a"])
    file.unlink()
    assert len(first(["a"])) == 1


# ---- where it lies, and what may be missing


def test_identity_is_that_of_the_contents(tmp_path, folder):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert identity(copy) == identity(folder)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert identity(copy) != identity(folder)
    revision = tmp_path / "snapshots" / "0123abc"
    revision.mkdir(parents=True)
    assert identity(revision) == "0123abc"


def test_a_hub_name_is_looked_for_in_the_local_cache(tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    with pytest.raises(ConfigError, match=r"encoder='google/tiny'.*no such folder, and the Hugging Face cache.*hf download google/tiny"):
        find("google/tiny", "encoder")
    snapshot = hub / "models--google--tiny" / "snapshots" / "0123abc"
    save_t5(snapshot)
    (hub / "models--google--tiny" / "refs").mkdir()
    (hub / "models--google--tiny" / "refs" / "main").write_text("0123abc")
    assert find("google/tiny", "encoder") == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no weights.*hf download google/tiny"):
        find("google/tiny", "encoder")


def test_what_is_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="encoder='/no/such/folder': there is no such folder"):
        find("/no/such/folder", "encoder")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find(str(tmp_path), "encoder")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"holds no weights.*Copy it whole"):
        find(str(tmp_path), "encoder")


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers, which is not installed\. Run `pip install 'varl\[hf\]'`"):
        load_text_encoder(tmp_path, CPU, torch.float32)


# ---- a policy that reads captions


def policy_of(encoder: str, width: int = 8):
    torch.manual_seed(0)
    return new_policy(fresh(replace(MODEL, captions=CaptionConfig(tokens=5, width=width, encoder=encoder))))


def test_a_model_folder_with_captions_draws(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    policy = policy_of(str(folder))
    prompts = [Prompt(text="A red cube"), Prompt(text="a green ball on"), Prompt()]
    rollout = policy.rollout(prompts, Stream(seed=0, rows=(0, 1, 2)))
    torch.testing.assert_close(policy.score(rollout).logp, rollout.logp, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "varl" / "captions").glob("*/*.safetensors"))) == 2
    with pytest.raises(DataError, match="'a red cube on a ball' has 7 tokens, the model takes 1 to 5"):
        policy.rollout([Prompt(text="a red cube on a ball")], Stream(seed=0, rows=(0,)))


def test_captions_are_lower_cased_for_models_that_were_trained_so(tmp_path, folder):
    low, cased = load_text_encoder(folder, CPU, torch.float32), load_text_encoder(folder, CPU, torch.float32, lowercase=False)
    assert torch.equal(cased("a  red\ncube"), low("A red CUBE"))
    unknown = cased("A red CUBE")
    assert unknown.shape == low("A red CUBE").shape
    assert torch.equal(unknown, cased("On red Ball")), "words that it does not know"
    assert not torch.equal(unknown, low("A red CUBE"))


def test_an_infinity_draws_and_tells_cases_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoder = str(save_t5(tmp_path / "t5", width=128))
    pair = fresh(replace(SQUARE, captions=replace(SQUARE.captions, encoder=encoder)))
    policy = new_policy(model_folder.load(model_folder.save(tmp_path / "model", *pair, {})))
    assert isinstance(policy, InfinityPolicy)
    rollout = policy.rollout([Prompt(text="a red cube"), Prompt(text="A red cube"), Prompt()], Stream(seed=0, rows=(0, 1, 2)))
    torch.testing.assert_close(policy.score(rollout).logp, rollout.logp, rtol=0, atol=1e-5)
    small, large = policy.captions(["a red cube", "A red cube"])
    assert small.shape == large.shape == (4, 128)
    assert not torch.equal(small, large)
    lower = caption_encoder(replace(pair[0].config.captions, lowercase=True), CPU)
    assert lower.folder != caption_encoder(pair[0].config.captions, CPU).folder


def test_an_encoder_that_is_missing_or_of_another_width(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"captions\.encoder='/none'"):
        policy_of("/none")
    policy = policy_of(str(folder), width=6)
    with pytest.raises(ConfigError, match="width 8, the model was trained on 6"):
        policy.rollout([Prompt(text="a")], Stream(seed=0, rows=(0,)))
