"""A Janus of a few thousand weights that `transformers` itself builds, with a processor whose words are letters."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, BOI, EOI, IMAGE = range(6)
MARKS = ["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<image>"]
LETTERS = [*"abcdefgh <|>UA:", "<unk>"]
TEMPLATE = "{% for m in messages %}<|U|>:{{ m['content'][0]['text'] }}{% endfor %}<|A|>:"
CODES, SIDE = 12, 2


def make_whole(*, tied: bool = False, seed: int = 0) -> Any:
    """Untrained, its weights large enough for laws that are far from uniform; pictures of 2 x 2 tokens, 4 x 4 pixels."""
    torch.manual_seed(seed)
    words = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    text = LlamaConfig(
        vocab_size=len(MARKS) + len(LETTERS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        **words,
    )
    vision = JanusVisionConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=2 * SIDE,
        patch_size=2,
        projection_dim=16,
        depth=2,
        num_image_tokens=SIDE**2,
    )
    vq = JanusVQVAEConfig(
        embed_dim=4,
        num_embeddings=CODES,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        projection_dim=16,
        image_token_embed_dim=16,
    )
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=IMAGE, tie_word_embeddings=tied)
    whole = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in whole.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    whole.generation_config = GenerationConfig(guidance_scale=5.0, generation_kwargs={"boi_token_id": BOI}, **words)
    return whole


def make_processor() -> Any:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*MARKS, *LETTERS])}, unk_token="<unk>"))
    words.pre_tokenizer = Split("", "isolated")
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"},
    )
    return JanusProcessor(JanusImageProcessor(image_size=2 * SIDE), tokenizer, chat_template=TEMPLATE, num_image_tokens=SIDE**2)


def save_janus(folder: Path, *, tied: bool = False) -> Path:
    """As `transformers` saves it."""
    make_whole(tied=tied).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder
