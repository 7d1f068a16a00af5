"""README's picture: words before and after post-training, with what was read in them.

python benchmarks/before_after.py runs/demo docs/before_after.png"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from varl.data.fonts import font_path

COLUMNS, ROWS, FACTOR = 3, 6, 3
GAP, LINE = 14, 26
GOOD, BAD, SOFT = "#1a7f37", "#b42318", "#666666"


def draw(run: Path, out: Path) -> None:
    """The first eighteen pictures of the gallery, three pairs to a row."""
    shown = json.loads((run / "gallery" / "index.json").read_text())[: COLUMNS * ROWS]
    with Image.open(run / "gallery" / "before" / "00.png") as first:
        width, height = FACTOR * first.width, FACTOR * first.height
    small = ImageFont.truetype(font_path("sans").with_name("DejaVuSans.ttf"), 12)
    sheet = Image.new("RGB", (2 * COLUMNS * (width + GAP) + GAP, 30 + ROWS * (height + LINE)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, pair in enumerate(shown):
        for side, name in enumerate(("before", "after")):
            x, y = GAP + (2 * (number % COLUMNS) + side) * (width + GAP), 30 + number // COLUMNS * (height + LINE)
            with Image.open(run / "gallery" / name / f"{number:02d}.png") as picture:
                sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
            if number < COLUMNS:
                pen.text((x, 8), name, fill=SOFT, font=small)
            read = " ".join(found["text"] for found in pair[name]["found"]) or "nothing"
            right = pair[name]["correct"]
            said = f"read {read}" if right else f"read {read}, asked {pair['text']}"
            pen.text((x, y + height + 3), said, fill=GOOD if right else BAD, font=small)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
