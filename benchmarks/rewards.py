"""What batching is worth to a CLIP-like scorer: pictures one at a time, as released scorers ask, against all at once. And how much of a
reward that takes as long as drawing a run does not wait for.

    python benchmarks/rewards.py [--minutes 3]

Times are medians of alternating runs in one process, quartiles in brackets."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import alternate, arguments, machine, milliseconds, policy_of, spread, table
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from varl.build import build_algorithm, build_prompts, build_sampler
from varl.distributed.mesh import World
from varl.models.vision import CLIP, Preprocessing
from varl.recipes.grpo import words_cpu
from varl.rewards.clip import TextMatch, clip_score
from varl.rewards.judge import RewardJudge
from varl.train.loop import Trainer
from varl.types import Prompt

BAR, HIDDEN_BAR = 5.0, 0.7
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
    (r, g, b), (dr, dg, db) = processor.image_mean, processor.image_std
    wanted = Preprocessing(side=side, crop=(side, side), mean=(r, g, b), std=(dr, dg, db))
    return CLIP(CLIPModel(config), tokenizer, wanted), processor


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


# ---- a reward that takes as long as drawing ---------------------------------------------------------------------------------------------


class Slow:
    """Contrast, and `seconds` of waiting for each picture: a scorer on another device or host."""

    seconds = 0.0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        time.sleep(self.seconds * len(images))
        return images.flatten(1).std(1)


def hidden(device: torch.device, budget: float) -> list[object]:
    """Wall-clock seconds of a step of the words recipe whose reward costs nothing, and of one whose reward takes as long as its drawing."""
    ours, reward = words_cpu(), Slow()
    run = replace(ours, algorithm=replace(ours.algorithm, region_credit=False))  # type: ignore[type-var]
    policy = policy_of("bundled:words", device)
    judge = RewardJudge({"slow": (1.0, reward)})
    prompts = build_sampler(build_prompts(run.data, run.seed, run.eval.samples).train, run, 0, 1)
    algorithm = build_algorithm(run.algorithm, policy)
    steps: dict[str, list[float]] = {"free": [], "slow": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            run.train,
            seed=run.seed,
            policy=policy,
            algorithm=algorithm,
            judge=judge,
            prompts=prompts,
            world=World(device=device),
            failures=Path(folder),
        )
        trainer.update()
        first = trainer.update()
        drawing = first["seconds/rollout"]
        pictures = round(first["images_per_second"] * first["seconds/total"])
        end = time.perf_counter() + budget
        while time.perf_counter() < end or len(steps["slow"]) < 4:
            for name in steps:
                reward.seconds = drawing / pictures if name == "slow" else 0.0
                steps[name].append(trainer.update()["seconds/total"])
    judge.close()
    free, slow = (torch.tensor(taken, dtype=torch.float64) for taken in steps.values())
    share = 1 - (slow - free) / drawing
    return [
        pictures,
        len(free),
        f"{drawing:.2f}",
        spread(free),
        spread(slow),
        f"**{1 - (slow.median() - free.median()) / drawing:.2f}** ({spread(share)})",
    ]


def main() -> None:
    asked = arguments(__doc__ or "", 3.0, model=None)
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
        taken = alternate(sides, asked.device, asked.minutes * 40 / len(SIZES), least=3)
        released, alone = (spread(taken[side] / taken["together"]) for side in ("released", "alone"))
        size = "{} wide, {} deep, {} px, patch {}".format(*shape)
        row = [f"{name}: {size}", *(milliseconds(taken[side]) for side in sides), f"**{released}**", alone, f"{gap:.1e}"]
        print(f"| {' | '.join(row)} |", flush=True)

    print(f"\n### A reward that takes as long as drawing, judged in the background (bar: {HIDDEN_BAR:g} of it not waited for)\n")
    head = ["pictures a step", "rounds", "drawing, s", "step, reward free, s", "step, reward slow, s", "share not waited for"]
    print(table(head, [hidden(asked.device, asked.minutes * 20)]))


if __name__ == "__main__":
    main()
