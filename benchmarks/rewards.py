"""What batching is worth to a CLIP-like scorer: pictures one at a time, as released scorers ask, against all at once.

    python benchmarks/rewards.py [--minutes 2]

Times are medians of alternating runs in one process, quartiles in brackets."""

from collections.abc import Callable
from typing import Any

import torch
from common import alternate, arguments, machine, milliseconds, spread, table
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from varl.models.vision import CLIP, Preprocessing
from varl.rewards.clip import TextMatch, clip_score
from varl.types import Prompt

BAR = 5.0
PICTURES, GROUP, DRAWN = 16, 8, 256
"""Pictures of a chunk, of which each prompt has a group; pixels to a side."""
TOKENS = 16
SIZES = {"tiny": (64, 2, 32, 16), "small": (128, 4, 64, 16), "middle": (256, 4, 112, 16), "large": (512, 6, 224, 32)}
"""Width and depth of both towers, pixels to a side and to a patch."""


class Tokens(dict):
    """What a tokenizer answers, in as much as a CLIP needs."""

    def to(self, device: torch.device) -> "Tokens":
        return Tokens({name: tensor.to(device) for name, tensor in self.items()})


def tokenizer(text: str, **_: Any) -> Tokens:
    """Numbers that are a prompt's own, and an end."""
    ids = torch.randint(1, 999, (1, TOKENS), generator=torch.Generator().manual_seed(int(text)))
    ids[0, -1] = 999
    return Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))


def new_clip(width: int, depth: int, side: int, patch: int) -> tuple[CLIP, CLIPImageProcessorPil]:
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    text = {"vocab_size": 1000, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 999, "pad_token_id": 999}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | {"image_size": side, "patch_size": patch}, projection_dim=width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return CLIP(CLIPModel(config), tokenizer, Preprocessing(side=side, crop=(side, side), mean=mean, std=std)), processor


@torch.no_grad()
def as_released(clip: CLIP, processor: CLIPImageProcessorPil, images: Tensor, prompts: list[Prompt]) -> Tensor:
    """Cosines: each picture as a PIL image, prepared, and with its text through the model, alone."""
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
        pixels = processor(picture, return_tensors="pt")["pixel_values"].to(images.device)
        out = clip.model(**tokenizer(prompt.text).to(images.device), pixel_values=pixels)
        found.append((out.image_embeds * out.text_embeds).sum())
    return torch.stack(found).cpu()


def main() -> None:
    asked = arguments(__doc__ or "", 2.0, model=None)
    print(f"{machine(asked.device)}\n\nScoring {PICTURES} pictures of {DRAWN}x{DRAWN} pixels, {GROUP} a prompt; ms.\n")
    coarse = torch.rand(PICTURES, 3, 16, 16)
    images = torch.nn.functional.interpolate(coarse, (DRAWN, DRAWN), mode="bilinear").to(asked.device)
    prompts = [Prompt(text=str(i // GROUP)) for i in range(PICTURES)]
    head = ["scorer", "one at a time, as released", "ours, one at a time", "ours, together"]
    head += [f"gain over released (bar {BAR:g})", "gain of batching alone", "largest difference of cosines"]
    print(table(head, []), end="", flush=True)
    for name, shape in SIZES.items():
        clip, processor = new_clip(*shape)
        reward = TextMatch(clip.to(asked.device), clip_score, PICTURES)
        sides: dict[str, Callable[[], object]] = {
            "released": lambda: as_released(clip, processor, images, prompts),  # noqa: B023
            "alone": lambda: [reward(images[i : i + 1], prompts[i : i + 1]) for i in range(PICTURES)],  # noqa: B023
            "together": lambda: reward(images, prompts),  # noqa: B023
        }
        gap = (as_released(clip, processor, images, prompts) - reward(images, prompts).parts["cosine"]).abs().max().item()
        taken = alternate(sides, asked.device, asked.minutes * 60 / len(SIZES), least=3)
        released, alone = (spread(taken[side] / taken["together"]) for side in ("released", "alone"))
        size = "{} wide, {} deep, {} px, patch {}".format(*shape)
        row = [f"{name}: {size}", *(milliseconds(taken[side]) for side in sides), f"**{released}**", alone, f"{gap:.1e}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
