"""Detectors of objects and models that answer questions in miniature, with random weights, in folders that transformers itself writes."""

from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    GitConfig,
    GitForCausalLM,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    SwinConfig,
)

CLASSES = ("person", "mouse", "dog", "traffic light", "sofa")
ID2LABEL = dict(enumerate(CLASSES))
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "yes", "no"]
WORDS = [*MARKS, "dog", "cat", "bench", "red", "blue", "wooden", "traffic", "light", "##s", "[DEC]", "[ENC]"]
SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"vocab_size": len(WORDS), **TOWER}
RESNET = {"embedding_size": 8, "depths": [1, 1, 1, 1], "layer_type": "basic"}


def lively(model: torch.nn.Module, deviation: float = 0.2) -> torch.nn.Module:
    """Matrices so large that pictures do not look alike."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=deviation)
    return model.eval()


def save_tokenizer(folder: Path) -> None:
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)


def save_mask2former(folder: Path, size: dict[str, int] | None = None) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Mask2FormerConfig(
            backbone_config=SwinConfig(out_features=STAGES, **SWIN),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=6,
            id2label=ID2LABEL,
        )
        lively(Mask2FormerForUniversalSegmentation(config)).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size=size or {"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


def save_detr(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
        )
        config = DetrConfig(
            backbone_config=backbone,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=6,
            id2label=ID2LABEL,
        )
        lively(DetrForObjectDetection(config), 0.5).save_pretrained(folder)
    DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 100}).save_pretrained(folder)
    return folder


def save_rt_detr(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = RTDetrResNetConfig(hidden_sizes=[8, 8, 16, 16], out_features=["stage2", "stage3", "stage4"], **RESNET)
        config = RTDetrConfig(
            backbone_config=backbone,
            encoder_hidden_dim=16,
            encoder_in_channels=[8, 16, 16],
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            d_model=16,
            num_queries=6,
            decoder_in_channels=[16, 16, 16],
            decoder_ffn_dim=32,
            decoder_layers=1,
            decoder_attention_heads=2,
            id2label=ID2LABEL,
        )
        lively(RTDetrForObjectDetection(config)).save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_grounding_dino(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GroundingDinoConfig(
            backbone_config=SwinConfig(out_features=STAGES[1:], **SWIN),
            text_config={"model_type": "bert", "max_position_embeddings": 64, **BERT},
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=8,
            max_text_len=32,
        )
        lively(GroundingDinoForObjectDetection(config)).save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_git(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"image_size": 32, "patch_size": 16, **TOWER}
        config = GitConfig(vision_config=vision, max_position_embeddings=16, pad_token_id=0, bos_token_id=2, eos_token_id=3, **BERT)
        lively(GitForCausalLM(config)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_blip(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"image_size": 32, "patch_size": 16, **TOWER}
        marks = {"bos_token_id": WORDS.index("[DEC]"), "sep_token_id": 3, "pad_token_id": 0}
        text = {"encoder_hidden_size": 16, "max_position_embeddings": 40, **BERT, **marks}
        lively(BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
