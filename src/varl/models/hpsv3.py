"""HPSv3's network (arXiv 2508.03789): Qwen2-VL (arXiv 2409.12191), which is asked to rate a picture, and a head where it would answer."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from varl.models.vision import CLIP_MEAN, CLIP_STD, normalise, resized

PIXELS = 256 * 28 * 28
"""Of a picture as the network sees it, about."""
REWARD = "<|Reward|>"
"""The token at which the head looks. Qwen2-VL's own tokens do not hold it."""


class Template(NamedTuple):
    """What the network is told beside a picture."""

    instruction: str
    """With `{text_prompt}` where the picture's text goes."""
    ending: str
    """With the token at which the head looks."""


def scaled_size(height: int, width: int, unit: int, pixels: int = PIXELS) -> tuple[int, int]:
    """(H, W) in multiples of `unit` for a picture of `height` x `width`, whose area is about `pixels`: each side rounded, and where that is
    too large or too small, all of it scaled and rounded down or up. As Qwen2-VL does, with one area for least and most."""
    rounded = max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)
    area = rounded[0] * rounded[1]
    if area > pixels:
        scale = math.sqrt(height * width / pixels)
        return max(unit, math.floor(height / scale / unit) * unit), max(unit, math.floor(width / scale / unit) * unit)
    if area < pixels:
        scale = math.sqrt(pixels / (height * width))
        return math.ceil(height * scale / unit) * unit, math.ceil(width * scale / unit) * unit
    return rounded


def patches(images: Float[Tensor, "B 3 H W"], patch: int, merge: int, frames: int) -> Float[Tensor, "B N D"]:
    """Patches of `patch` x `patch` pixels, in squares of `merge` x `merge` of them, row by row; a still is a film of `frames` equal frames.
    D runs over channel, frame, row, column."""
    count, channels, height, width = images.shape
    down, across = height // patch // merge, width // patch // merge
    cut = images.reshape(count, channels, down, merge, patch, across, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return cut[..., None, :, :].expand(*cut.shape[:6], frames, patch, patch).reshape(count, down * across * merge**2, -1)


class HPSv3Network(nn.Module):
    """`transformers`' Qwen2VLModel with its tokenizer, and a head of three layers in fp32; frozen."""

    def __init__(self, model: Any, head: nn.Module, tokenizer: Any, template: Template) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.tokenizer, self.template = tokenizer, template
        self.eval().requires_grad_(False)

    def at(self, device: torch.device) -> "HPSv3Network":
        """Moved there, in bf16 on CUDA and in fp32 on the CPU. The weights have values of bf16, so that nothing is lost on the way."""
        self.model.to(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.head.to(device)
        return self

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"], texts: Sequence[str]) -> Float[Tensor, "B 2"]:
        """The mean of the score, and the logarithm of its deviation.

        Tokens of the picture are numbered on like those of text, for all three axes of the rotary code, as its package has it: Qwen2-VL
        itself numbers them by row and column. Nothing behind the token at which the head looks can reach it, and it is left out."""
        vision = self.model.config.vision_config
        height, width = images.shape[2:]
        size = scaled_size(height, width, vision.patch_size * vision.spatial_merge_size)
        pixels = normalise(resized(images, size), CLIP_MEAN, CLIP_STD)
        cut = patches(pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        rows = [self._tokens(text, cut.shape[1] // vision.spatial_merge_size**2) for text in texts]
        ids = pad_sequence(rows, batch_first=True).to(images.device)  # what is padded lies behind, too
        last = torch.tensor([len(row) - 1 for row in rows], device=images.device)
        found = self.model(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=images.device).expand(3, *ids.shape),
            pixel_values=cut.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, *(side // vision.patch_size for side in size)]] * len(rows), device=images.device),
            use_cache=False,
        )
        return self.head(found.last_hidden_state[torch.arange(len(rows), device=images.device), last].float())

    def _tokens(self, text: str, places: int) -> Tensor:
        """Ids of the question about a picture of so many tokens, up to the one at which the head looks."""
        asked = self.template.instruction.format(text_prompt=text) + self.template.ending
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}
        said = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        place = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        before, mark, _ = said.replace(place, place * places, 1).rpartition(REWARD)
        return torch.tensor(self.tokenizer(before + mark)["input_ids"])
