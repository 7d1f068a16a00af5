"""CLIP and DINOv2 in miniature, with random weights, in folders that transformers itself writes."""

from pathlib import Path

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["<|startoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|endoftext|>"]
SIDE, TOKENS, WIDTH = 24, 9, 12
TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}


def clip_model(seed: int = 0) -> CLIPModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": TOKENS, **TOWER}
        marks = {"bos_token_id": 0, "eos_token_id": len(WORDS) - 1, "pad_token_id": len(WORDS) - 1}
        vision = {"hidden_size": 20, "intermediate_size": 40, "image_size": SIDE, "patch_size": 8, **TOWER}
        model = CLIPModel(CLIPConfig(text_config=text | marks, vision_config=vision, projection_dim=WIDTH)).eval()
        for parameter in model.parameters():
            if parameter.ndim:  # its own are so small that pictures look alike
                torch.nn.init.normal_(parameter, std=0.3)
        return model


def save_clip(folder: Path, seed: int = 0, weights: bool = True) -> Path:
    """With tokenizer and image processor; `weights=False` leaves a config alone."""
    model = clip_model(seed)
    model.save_pretrained(folder) if weights else model.config.save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(
            Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2)
        ).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    ).save_pretrained(folder)
    return folder
