"""A Harmon of a few thousand weights, around a Qwen2 that `transformers` itself builds, with a tokenizer whose words are letters; and its
folder as its authors keep it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from varl.config import DiffusionHeadConfig, HarmonConfig, KLConfig, MARConfig, ViTConfig
from varl.models.harmon import Harmon
from varl.tokenizers.kl import KL

MARKS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
LETTERS = [*"abcdegimnrstuG :.\n"]
QWEN = {
    "model_type": "qwen2",
    "vocab_size": len(MARKS) + len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 120,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "_attn_implementation": "flash_attention_2",
}
"""As in the authors' config.json."""
TOLD = {"img_size": 4, "class_num": 4, "buffer_size": 3, "diffloss_d": 1, "diffloss_w": 8, "encoder_num_heads": 2}
HALF = ViTConfig(depth=2, width=12, heads=2)
MAR = MARConfig(
    encoder=HALF,
    decoder=HALF,
    head=DiffusionHeadConfig(depth=1, width=8),
    grid=(2, 2),
    num_classes=4,
    buffer=3,
    tokenizer=KLConfig(channels=3, width=8, multipliers=(1, 2), blocks=1),
)
CONFIG = HarmonConfig(mar=MAR, width=16, positions=120, grid=(4, 4))
"""Pictures of 16 tokens, 8 x 8 pixels; positions were trained for 2 x 2 tokens."""


def make_words() -> Any:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*MARKS, *LETTERS])}, unk_token="<unk>"))
    words.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


def make(*, tied: bool = True, config: HarmonConfig = CONFIG) -> tuple[Harmon, KL]:
    """Untrained, every weight large enough to matter."""
    torch.manual_seed(0)
    qwen = {name: value for name, value in QWEN.items() if name[0] != "_" and name != "torch_dtype"}
    whole = Qwen2ForCausalLM(Qwen2Config.from_dict(qwen | {"tie_word_embeddings": tied})).eval()
    model = Harmon(config, whole, make_words())
    for weight in [*model.parameters(), *([] if tied else whole.lm_head.parameters())]:
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval(), KL(config.tokenizer).eval()


def their_state(model: Harmon, kl: KL) -> dict[str, torch.Tensor]:
    """Under the authors' names."""
    state = {f"llm.{name}": tensor.clone() for name, tensor in model.whole.state_dict().items()}
    for part in ("mar", "proj_in", "proj_out"):
        state |= {f"{part}.{name}": tensor.clone() for name, tensor in getattr(model, part).state_dict().items()}
    for name, tensor in kl.state_dict().items():
        names = [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]
        state |= {f"vae.{theirs}": part.clone() for theirs, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return state


def save_harmon(folder: Path, *, tied: bool = True, **told: Any) -> Path:
    """As the authors save it, but for `told`, which joins its config.json; a language model that is tied draws words with the vectors that
    it reads them with, which are then saved once."""
    folder.mkdir(parents=True, exist_ok=True)
    state = their_state(*make(tied=tied))
    if tied:
        state.pop("llm.lm_head.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    make_words().save_pretrained(folder)
    llm = QWEN | {"tie_word_embeddings": tied}
    auto = {"AutoModel": "modeling_harmon.HarmonModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "harmon", "auto_map": auto, "llm": llm, "mar": TOLD} | told))
    return folder
