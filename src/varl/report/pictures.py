"""Pictures of a run as data URIs, within a budget of bytes, so that the page can be mailed."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from varl.report.data import read_json

SMALL = 12_000
"""Bytes up to which a PNG goes in as it is; a larger picture goes in as JPEG, its longer side at most `SIDE` pixels."""
SIDE = 320
GALLERY_BYTES = 800_000
FILM_BYTES = 1_300_000
DRAW_SMALL, DRAW_SIDE = 3_000, 128
"""The same two limits for a real picture and its draws, of which a page holds many."""
MOST_DRAWS = 12
"""Draws shown of one prompt at one step: the first ones, the best and the worst always among them."""
DRAWS_BYTES = 1_200_000
"""On top of `FILM_BYTES`, in a run that shows its draws."""


def data_uri(file: Path, small: int = SMALL, side: int = SIDE) -> str:
    """A picture of at most `small` bytes as it is, a larger one as JPEG of at most `side` pixels. Empty where there is no such file."""
    if not file.is_file():
        return ""
    content, kind = file.read_bytes(), "png"
    if len(content) > small:
        with Image.open(io.BytesIO(content)) as picture:
            reduced, kind = picture.convert("RGB"), "jpeg"
        reduced.thumbnail((side, side))
        reduced.save(buffer := io.BytesIO(), "JPEG", quality=80)
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def size(part: Any) -> int:
    return len(json.dumps(part))


def short(value: float | int) -> float:
    """Three significant digits: a colour needs no more."""
    return float(f"{value:.3g}")


def short_or_none(value: float | int | None) -> float | None:
    return None if value is None else short(value)


def gallery(run: Path) -> dict[str, Any] | None:
    """{"items", "left_out"}: pairs of pictures before and after training, as many as the budget holds."""
    entries = read_json(run / "gallery/index.json")
    if not entries:
        return None
    items, used = [], 0
    for number, entry in enumerate(entries):
        sides = {side: entry[side] | {"picture": data_uri(run / f"gallery/{side}/{number:02d}.png")} for side in ("before", "after")}
        used += size(sides)
        if used > GALLERY_BYTES:
            break
        items.append(entry | sides)
    return {"items": items, "left_out": len(entries) - len(items)}


def film(run: Path) -> dict[str, Any] | None:
    """pictures/index.json with "frames" [step][prompt] and "left_out", the number of steps thinned out to keep to the budget.

    In a run that shows its draws each prompt has the "real" picture that they are held against, once for all steps; of a masked model the
    "order" in which its tokens were settled, which no weight changes: the drawing step of each."""
    index = read_json(run / "pictures/index.json")
    if not index or not index.get("steps"):
        return None
    prompts = index["prompts"]
    frames = {step: frame(run / f"pictures/step-{step:06d}", len(prompts)) for step in index["steps"]}
    budget = FILM_BYTES
    if any("draws" in shot for shots in frames.values() for shot in shots):
        last = run / f"pictures/step-{index['steps'][-1]:06d}"
        real = [data_uri(last / f"{number:02d}-real.png", DRAW_SMALL, DRAW_SIDE) for number in range(len(prompts))]
        index["prompts"] = [prompt | {"real": uri} for prompt, uri in zip(prompts, real, strict=True)]
        budget += DRAWS_BYTES
    told = read_json(run / f"pictures/step-{index['steps'][-1]:06d}/read.json") or []
    orders = [[int(step) for cells in read.get("step") or [] for step in cells] for read in told]
    if any(orders):
        index["prompts"] = [prompt | {"order": order} for prompt, order in zip(index["prompts"], orders, strict=True)]
    kept = thin(index["steps"], {step: size(shots) for step, shots in frames.items()}, budget)
    return index | {"steps": kept, "frames": [frames[step] for step in kept], "left_out": len(index["steps"]) - len(kept)}


def frame(folder: Path, prompts: int) -> list[dict[str, Any]]:
    """What each fixed prompt looked like at one step, how it was read, what was learned from it, and its draws if it has any. Of a masked
    model also the "weight" of each token, its "spread" over further paths, and "at", the drawing step that was learned from if one was."""
    read = read_json(folder / "read.json") or [{}] * prompts
    return [
        {
            "picture": data_uri(folder / f"{number:02d}.png"),
            "reward": told.get("reward"),
            "found": told.get("found") or [],
            "mask": ["".join(str(int(cell)) for cell in cells) for cells in told.get("mask") or []],
            "advantage": [[short(cell) for cell in cells] for cells in told.get("advantage") or []],
            **{name: [short(cell) for cells in told[name] for cell in cells] for name in ("weight", "spread") if name in told},
            **({"at": told["at"]} if "at" in told else {}),
            **(draws(folder, number, told["draws"]) if told.get("draws") else {}),
        }
        for number, told in enumerate(read[:prompts])
    ]


def draws(folder: Path, number: int, told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"draws", "draws_left_out", "draws_reward"}: of one prompt at one step, at most MOST_DRAWS draws in their order, each with its "mark"
    (best, worst or none); and the mean reward of all. Each draw has one advantage, so there is none per token."""
    judged = [(draw["reward"], place) for place, draw in enumerate(told) if draw["reward"] is not None]
    marks = {min(judged)[1]: "worst", max(judged)[1]: "best"} if len({reward for reward, _ in judged}) > 1 else {}
    shown = sorted(sorted(range(len(told)), key=lambda place: (place not in marks, place))[:MOST_DRAWS])
    return {
        "advantage": [],
        "draws": [
            {
                "number": place,
                "mark": marks.get(place),
                "picture": data_uri(folder / f"{number:02d}-{place}.png", DRAW_SMALL, DRAW_SIDE),
                "reward": short_or_none(told[place]["reward"]),
                "parts": {name: short_or_none(part) for name, part in telling(told[place]["parts"]).items()},
                "advantage": short(told[place]["advantage"]),
            }
            for place in shown
        ],
        "draws_left_out": len(told) - len(shown),
        "draws_reward": short(sum(reward for reward, _ in judged) / len(judged)) if judged else None,
    }


def telling(parts: Mapping[str, Any]) -> dict[str, Any]:
    """{"rebuild": -3, "rebuild/mse": 1, "rebuild/look": 2} gives {"mse": 1, "look": 2}: a name under which lie all the others is the reward
    itself. The parts of several rewards keep their full names."""
    whole = next((name for name in parts if all(other.startswith(f"{name}/") for other in parts if other != name)), None)
    return {name.removeprefix(f"{whole}/"): part for name, part in parts.items() if name != whole}


def thin(steps: list[int], cost: dict[int, int], budget: int) -> list[int]:
    """Evenly fewer steps, first and last among them, until their cost keeps to the budget."""
    for stride in range(1, len(steps)):
        kept = [*steps[:-1:stride], steps[-1]]
        if sum(cost[step] for step in kept) <= budget:
            return kept
    return steps[-1:]
