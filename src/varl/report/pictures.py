"""Pictures of a run as data URIs, within a budget of bytes, so that the page can be mailed."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from varl.report.data import read_json

SMALL = 12_000
"""Bytes up to which a PNG goes in as it is; a larger picture goes in as JPEG, its longer side at most `SIDE` pixels."""
SIDE = 320
GALLERY_BYTES = 800_000
FILM_BYTES = 1_300_000


def data_uri(file: Path) -> str:
    """Empty where there is no such file."""
    if not file.is_file():
        return ""
    content, kind = file.read_bytes(), "png"
    if len(content) > SMALL:
        with Image.open(io.BytesIO(content)) as picture:
            small, kind = picture.convert("RGB"), "jpeg"
        small.thumbnail((SIDE, SIDE))
        small.save(buffer := io.BytesIO(), "JPEG", quality=80)
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def size(part: Any) -> int:
    return len(json.dumps(part))


def short(value: float | int) -> float:
    """Three significant digits: a colour needs no more."""
    return float(f"{value:.3g}")


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
    """pictures/index.json with "frames" [step][prompt] and "left_out", the number of steps thinned out to keep to the budget."""
    index = read_json(run / "pictures/index.json")
    if not index or not index.get("steps"):
        return None
    frames = {step: frame(run / f"pictures/step-{step:06d}", len(index["prompts"])) for step in index["steps"]}
    kept = thin(index["steps"], {step: size(shots) for step, shots in frames.items()}, FILM_BYTES)
    return index | {"steps": kept, "frames": [frames[step] for step in kept], "left_out": len(index["steps"]) - len(kept)}


def frame(folder: Path, prompts: int) -> list[dict[str, Any]]:
    """What each fixed prompt looked like at one step, how it was read, and what was learned from it."""
    read = read_json(folder / "read.json") or [{}] * prompts
    return [
        {
            "picture": data_uri(folder / f"{number:02d}.png"),
            "reward": read[number].get("reward"),
            "found": read[number].get("found") or [],
            "mask": ["".join(str(int(cell)) for cell in cells) for cells in read[number].get("mask") or []],
            "advantage": [[short(cell) for cell in cells] for cells in read[number].get("advantage") or []],
        }
        for number in range(prompts)
    ]


def thin(steps: list[int], cost: dict[int, int], budget: int) -> list[int]:
    """Evenly fewer steps, first and last among them, until their cost keeps to the budget."""
    for stride in range(1, len(steps)):
        kept = [*steps[:-1:stride], steps[-1]]
        if sum(cost[step] for step in kept) <= budget:
            return kept
    return steps[-1:]
