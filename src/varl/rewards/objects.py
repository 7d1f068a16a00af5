"""What rewards share that look for a prompt's objects."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from varl.errors import RewardError
from varl.models.detection import Detection
from varl.types import Found, Prompt


def require_objects(prompts: Sequence[Prompt]) -> None:
    """RewardError for the first prompt that names no object."""
    for prompt in prompts:
        if not prompt.objects:
            raise RewardError(f"prompt {prompt.text or prompt.label!r}: names no object to look for. Give its line `objects` or `include`.")


def asked(prompt: Prompt) -> list[str]:
    """The classes that matter to this prompt, each once."""
    return list(dict.fromkeys(wanted.name for wanted in (*prompt.objects, *prompt.unwanted)))


def padded(rows: Sequence[Sequence[float]]) -> Float[Tensor, "B R"]:
    """One row a picture and one entry an object, NaN where a picture has fewer."""
    table = torch.full((len(rows), max(map(len, rows))), torch.nan)
    for row, values in enumerate(rows):
        table[row, : len(values)] = torch.tensor(values)
    return table


def hulls(found: Sequence[Sequence[Detection]], prompts: Sequence[Prompt]) -> Float[Tensor, "B R 4"]:
    """The box around all that was found of each of a prompt's objects, by class; NaN where nothing was."""
    table = torch.full((len(prompts), max(len(prompt.objects) for prompt in prompts), 4), torch.nan)
    for row, (detections, prompt) in enumerate(zip(found, prompts, strict=True)):
        for place, wanted in enumerate(prompt.objects):
            boxes = torch.tensor([detection.box for detection in detections if detection.label == wanted.name])
            if len(boxes):
                table[row, place] = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])
    return table


def reported(detections: Sequence[Detection]) -> tuple[Found, ...]:
    """What was detected, for the report."""
    return tuple(Found(text=f"{d.colour} {d.label}" if d.colour else d.label, confidence=d.score, box=d.box) for d in detections)
