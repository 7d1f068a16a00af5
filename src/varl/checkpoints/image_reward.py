"""ImageReward's released file: BLIP's own names for what `transformers` has in two models."""

import math
import re
from typing import Any

import torch

from varl.checkpoints.folder import Shapes, require_fit, shapes_of, strict_load
from varl.checkpoints.hugging_face import transformers
from varl.checkpoints.released import count, expect, read_weights
from varl.checkpoints.vision import Files, tokenizer_of
from varl.models.image_reward import ImageRewardNetwork
from varl.models.vision import CLIP_MEAN, CLIP_STD, AestheticHead, Preprocessing

EYES, READER, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
RENAMED = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.qkv\.", ".attn.qkv."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^post_layernorm\.", "norm."),
)
"""From names of `transformers`' BlipVisionModel to BLIP's; those of its BlipTextModel are BLIP's."""
UNUSED = r"blip\.(vision|text)_proj\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids"
"""Of BLIP's training without a picture beside the text, and positions, which are counted anew."""
HEAD_WIDTH = 64
"""Of attention, in both models: what no weight tells."""


def released_name(part: str, name: str) -> str:
    """What the file calls a weight of one of its three parts."""
    for pattern, theirs in RENAMED if part == EYES else ():
        name = re.sub(pattern, theirs, name)
    return part + name


def sizes_of(shapes: Shapes, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of BlipVisionConfig and of BlipTextConfig that the file's weights were made with."""
    patch, place, inner = f"{EYES}patch_embed.proj.weight", f"{EYES}pos_embed", f"{EYES}blocks.0.mlp.fc1.weight"
    word, position = (f"{READER}embeddings.{what}_embeddings.weight" for what in ("word", "position"))
    feed = f"{READER}encoder.layer.0.intermediate.dense.weight"
    expect(shapes, (patch, place, inner, word, position, feed), "ImageReward", where)
    width, side = shapes[patch][0], shapes[patch][2]
    eyes = {
        **_attention(width, shapes[inner][0], count(shapes, rf"{re.escape(EYES)}blocks\.(\d+)\.")),
        "image_size": side * math.isqrt(shapes[place][1] - 1),
        "patch_size": side,
        "layer_norm_eps": 1e-6,
    }
    reader = {
        **_attention(shapes[word][1], shapes[feed][0], count(shapes, rf"{re.escape(READER)}encoder\.layer\.(\d+)\.")),
        "vocab_size": shapes[word][0],
        "max_position_embeddings": shapes[position][0],
        "encoder_hidden_size": width,
        "layer_norm_eps": 1e-12,
    }
    return eyes, reader


def _attention(width: int, inner: int, layers: int) -> dict[str, Any]:
    heads = {"num_attention_heads": width // HEAD_WIDTH, "num_hidden_layers": layers}
    return {"hidden_size": width, "intermediate_size": inner, **heads, "hidden_act": "gelu"}


def without_memory(eyes: dict[str, Any], reader: dict[str, Any]) -> dict[str, Any]:
    """The three parts of the network of these settings, on the meta device."""
    package = transformers()
    with torch.device("meta"):
        return {
            EYES: package.BlipVisionModel(package.BlipVisionConfig(**eyes)),
            READER: package.BlipTextModel(package.BlipTextConfig(**reader), add_pooling_layer=False),
            HEAD: AestheticHead(reader["hidden_size"]),
        }


def released_shapes(parts: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the file's weights, those that are used, if it holds these parts."""
    return shapes_of({released_name(part, name): tensor for part, own in parts.items() for name, tensor in own.state_dict().items()})


def load_image_reward(files: Files) -> ImageRewardNetwork:
    """In fp32 on the CPU; its sizes are read off its weights. CheckpointError lists every weight that does not fit, under the file's names.

    Pictures are cut as torchvision does, since its package does."""
    package = transformers()
    where = str(files.weights)
    state = {name: tensor.float() for name, tensor in read_weights(files.weights).items() if not re.fullmatch(UNUSED, name)}
    eyes, reader = sizes_of(shapes_of(state), where)
    parts = without_memory(eyes, reader)
    require_fit(shapes_of(state), released_shapes(parts), "ImageReward", where)
    ours = {part: {name: state[released_name(part, name)] for name in own.state_dict()} for part, own in parts.items()}
    head = AestheticHead(reader["hidden_size"])
    strict_load(head, ours[HEAD], where)
    blip = {"dtype": torch.float32, "add_pooling_layer": False}
    side = eyes["image_size"]
    return ImageRewardNetwork(
        package.BlipVisionModel.from_pretrained(None, config=parts[EYES].config, state_dict=ours[EYES], dtype=torch.float32),
        package.BlipTextModel.from_pretrained(None, config=parts[READER].config, state_dict=ours[READER], **blip),
        head,
        tokenizer_of(files.processor),
        Preprocessing(side=side, crop=(side, side), mean=CLIP_MEAN, std=CLIP_STD, rounded=True),
    )
