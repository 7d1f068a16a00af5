"""The page of a run and the comparison of runs, from directories as training writes them. `write_run` makes such a directory."""

import base64
import io
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from varl.errors import DataError
from varl.report import compare, compare_text, write_report
from varl.report.data import by_column, read_lines, read_run
from varl.report.page import POINTS, define, duration, span_mean
from varl.report.pictures import DRAW_SIDE, DRAWS_BYTES, FILM_BYTES, MOST_DRAWS, data_uri, draws, size, telling, thin
from varl.report.summary import headline, measures, nested, probe, tables

GRIDS = [[1, 1], [1, 4], [2, 8], [3, 12], [4, 16]]
WORDS = ["HOUSE", "RIVER", "SALT", "MOON", "APPLE", "STONE", "GLASS", "WIND", "TRAIN", "OCEAN", "FIRE", "CLOUD"]
STYLES = [["sans", "sea"], ["serif", "ink"], ["mono", "fire"], ["sans", "night"]]
INK = {"sea": ((9, 61, 98), (199, 231, 240)), "ink": ((20, 20, 24), (244, 241, 232)), "fire": ((255, 224, 130), (128, 24, 10))}
INK |= {"night": ((214, 222, 255), (18, 20, 48))}


def draw(file: Path, word: str, palette: str, noise: float, rng: random.Random, size: tuple[int, int] = (64, 16)) -> None:
    """A word on its ground; `noise` 1 makes it illegible."""
    front, ground = INK[palette]
    picture = Image.new("RGB", size, ground)
    ImageDraw.Draw(picture).text(
        (size[0] // 2, size[1] // 2), word, font=ImageFont.load_default(13 * size[1] / 16), fill=front, anchor="mm"
    )
    shift = [int(noise * rng.gauss(0, 70)) for _ in range(size[0] * size[1] * 3)]
    picture.frombytes(bytes(min(255, max(0, byte + s)) for byte, s in zip(picture.tobytes(), shift, strict=True)))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def misread(word: str, wrong: float, rng: random.Random) -> str:
    return "".join(rng.choice("ABEHKOSTI") if rng.random() < wrong else letter for letter in word)


def seen(text: str, rng: random.Random) -> list[dict]:
    half = 0.075 * len(text)
    return [{"text": text, "confidence": round(rng.uniform(0.5, 0.99), 2), "box": [0.5 - half, 0.15, 0.5 + half, 0.86]}] if text else []


def write_lines(file: Path, entries: list[dict]) -> None:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def metric_line(step: int, steps: int, rng: random.Random) -> dict:
    t = step / steps
    reward = 0.35 + 0.5 * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.03)
    line = {
        "step": step,
        "stage": "suffix" if step % 4 == 3 else "prefix",
        "reward": reward,
        "reward_std": 0.3 - 0.12 * t + rng.gauss(0, 0.01),
        "rewards/ocr/mean": reward,
        "kl": 0.02 * t + abs(rng.gauss(0, 0.002)),
        "entropy": 3.1 - 1.2 * t + rng.gauss(0, 0.03),
        **{f"entropy/step_{k}": 1.5 + 0.6 * k - (1.4 - 0.15 * k) * t + rng.gauss(0, 0.03) for k in range(len(GRIDS))},
        "grad_norm": 0.6 + 0.4 * math.exp(-2 * t) + abs(rng.gauss(0, 0.12)),
        "clip_ratio/region_mean": abs(rng.gauss(0.01, 0.004)),
        "sampling/sampling_logp_difference/max": abs(rng.gauss(4e-6, 1e-6)),
        "sampling/sampling_logp_difference/mean": abs(rng.gauss(4e-7, 1e-7)),
        "sampling/law_difference/mean": 0.4 + rng.gauss(0, 0.02),
        "mask_occupancy": 0.62 + rng.gauss(0, 0.02),
        "monitor/background_edges": 0.3 - 0.2 * t,
        "lr": 1e-4 * (1 - t),
        "reward_calls": 256 * step,
        "images_per_second": 46 + rng.gauss(0, 2),
    }
    seconds = {"rollout": 1.9, "decode": 0.3, "reward_wait": 0.45, "train": 2.4, "optimizer": 0.12}
    line |= {f"seconds/{phase}": mean + rng.gauss(0, 0.05 * mean) for phase, mean in seconds.items()}
    line["seconds/total"] = sum(line[f"seconds/{phase}"] for phase in seconds) + 0.15
    if step % 20 == 0:
        line |= {"eval/word_accuracy": 0.4 + 0.4 * t + rng.gauss(0, 0.02), "eval/ned": 0.7 + 0.2 * t + rng.gauss(0, 0.01)}
    return line


CONFIG = """name: {name}
model: bundled:words-tiny
seed: {seed}
algorithm:
  kind: var_rl
  grpo:
    num_generations: 16
    panw_alpha: {alpha}
    mask: direct
  middle_step:
    resolution: 0.25
train:
  steps: 160
  prompts_per_step: 16
"""


def around(name: str, value: float, half: float) -> dict:
    return {name: value, f"{name}_interval": [value - half, value + half]}


SUMMARY = {
    "commit": "447c155",
    "reward_calls": 40960,
    "hardware": "2 CPU cores",
    "before": around("word_accuracy", 0.412, 0.042) | around("ned", 0.731, 0.021),
    "after": around("word_accuracy", 0.781, 0.036) | around("ned", 0.918, 0.013),
    "control": around("word_accuracy", 0.415, 0.043) | around("ned", 0.73, 0.021),
    "temperature_sweep": {
        side: {t: {"word_accuracy": a, "diversity": d} for t, a, d in zip(("0.5", "0.7", "1.0"), accuracy, diversity, strict=True)}
        for side, accuracy, diversity in (
            ("before", (0.52, 0.48, 0.412), (0.11, 0.2, 0.31)),
            ("after", (0.8, 0.79, 0.781), (0.06, 0.11, 0.19)),
        )
    },
    "second_judge": {"before": {"engine": "rapidocr", "word_accuracy": 0.44}, "after": {"engine": "rapidocr", "word_accuracy": 0.76}},
}
SHARES = [(0.3, 0.06), (0.28, 0.1), (0.22, 0.2), (0.12, 0.27), (0.08, 0.37)]
PROBE = {
    "steps": [{"step": k, **around("signal_share", s, 0.05), **around("noise_share", n, 0.02)} for k, (s, n) in enumerate(SHARES)],
    "variance_share": [{"m": m, "value": v, "interval": [v - 0.06, v + 0.03]} for m, v in enumerate((0.12, 0.29, 0.55, 0.83, 0.97), 1)],
    "seconds_per_picture": 0.021,
    "recommendations": ["panw_alpha 0.7: coarse steps carry most of the signal", "num_continuations 1: more gain nothing at equal cost"],
}


def write_run(path: Path, name: str = "words-var-rl", seed: int = 7, alpha: float = 0.7, steps: int = 160, prompts: int = 8) -> Path:
    """A run directory with everything in it."""
    path.mkdir(parents=True)
    rng = random.Random(seed)
    (path / "config.yaml").write_text(CONFIG.format(name=name, seed=seed, alpha=alpha))
    (path / "command.txt").write_text(
        "varl train recipes.var_rl:words --set train.steps=160 --set algorithm.grpo.panw_alpha=0.7 --out runs/words\n"
    )
    write_lines(path / "metrics.jsonl", [metric_line(step, steps, rng) for step in range(1, steps + 1)])
    write_lines(path / "events.jsonl", [
        {"time": 1760000000, "step": 0, "kind": "start", "message": "replay gate passed: max |delta| 4.1e-06 nats"},
        {"time": 1760000310.5, "step": 60, "kind": "worker_replaced", "message": "reader 0 did not answer in 20 s; 32 pictures are NaN"},
        {"time": 1760000500, "step": 128, "kind": "alarm", "message": "reward rose while monitor/background_edges fell"},
        {"time": 1760000900, "step": 160, "kind": "done", "message": "160 steps"},
    ])  # fmt: skip
    (path / "summary.json").write_text(json.dumps(SUMMARY))
    (path / "probe.json").write_text(json.dumps(PROBE))
    write_pictures(path, rng, list(range(0, steps + 1, 10)), prompts)
    write_gallery(path, rng, 12)
    return path


def write_pictures(path: Path, rng: random.Random, steps: list[int], prompts: int, size: tuple[int, int] = (64, 16)) -> None:
    asked = [{"text": f"{WORDS[n]}", "words": [WORDS[n]], "style": STYLES[n % 4]} for n in range(prompts)]
    weights = [(h * w) ** -0.7 for h, w in GRIDS]
    index = {"grids": GRIDS, "panw_alpha": 0.7, "panw_weights": weights, "middle_step": 3, "prompts": asked, "steps": steps}
    (path / "pictures").mkdir()
    (path / "pictures/index.json").write_text(json.dumps(index))
    for step in steps:
        t, folder, read = step / max(steps[-1], 1), path / f"pictures/step-{step:06d}", []
        for number, prompt in enumerate(asked):
            draw(folder / f"{number:02d}.png", prompt["text"], prompt["style"][1], 0.15 + 0.8 * (1 - t), rng, size)
            text = misread(prompt["text"], 0.55 * (1 - t), rng)
            mask = [[int(h == 1 or 0.2 < (i // w + 0.5) / h < 0.9) for i in range(h * w)] for h, w in GRIDS]
            lean = rng.gauss(0, 1)
            advantage = [[lean + 0.6 * math.sin(i % w) for i in range(h * w)] for h, w in GRIDS]
            reward = sum(a == b for a, b in zip(text, prompt["text"], strict=True)) / len(text)
            read.append({"reward": reward, "found": seen(text, rng), "mask": mask, "advantage": advantage})
        (folder / "read.json").write_text(json.dumps(read))


def write_gallery(path: Path, rng: random.Random, count: int, size: tuple[int, int] = (64, 16)) -> None:
    entries = []
    for number in range(count):
        word, style = WORDS[number % len(WORDS)], STYLES[number % 4]
        entry: dict = {"text": word, "style": style}
        for side, noise, wrong in (("before", 0.8, 0.4), ("after", 0.15, 0.05)):
            draw(path / f"gallery/{side}/{number:02d}.png", word, style[1], noise, rng, size)
            text = misread(word, wrong, rng)
            entry[side] = {"found": seen(text, rng), "correct": text == word}
        entries.append(entry)
    (path / "gallery/index.json").write_text(json.dumps(entries))


LETTERS = "ABDEGH"
VA_PI_SUMMARY = {
    "fd_before": 13.6,
    "fd_after": 9.8,
    "before": around("fd", 13.6, 0.7) | around("recall", 0.71, 0.02) | {"accuracy": 0.93},
    "after": around("fd", 9.8, 0.6) | around("recall", 0.74, 0.02) | {"accuracy": 0.97},
    "ce_only": around("fd", 14.0, 0.7) | around("recall", 0.7, 0.02) | {"accuracy": 0.93},
    "law_sweep": [{"law": "T1.0", "before": 13.6, "after": 9.8, "ce_only": 14.0}, {"law": "T0.9", "before": 11.6, "after": 9.5}],
}


def write_va_pi_run(path: Path, count: int = 8, size: int = 24, steps: tuple[int, ...] = (0, 35, 70)) -> Path:
    """A run directory as VA-pi leaves it: real letters, each with `count` draws that are paid by how near they come to it."""
    path.mkdir(parents=True)
    rng = random.Random(3)
    (path / "config.yaml").write_text("name: va_pi/glyphs_cpu\nmodel: bundled:glyphs\nseed: 3\nalgorithm:\n  kind: va_pi\n")
    lines = [{"step": k, "reward": -0.4 + 0.001 * k, "prior/nll": 2.9 - 0.001 * k, "eval/reward": -0.38 + 0.001 * k} for k in range(1, 71)]
    write_lines(path / "metrics.jsonl", lines)
    (path / "summary.json").write_text(json.dumps(VA_PI_SUMMARY))
    asked = [{"text": letter, "words": [], "style": []} for letter in LETTERS]
    index = {"grids": [[6, 6]], "panw_alpha": 0.0, "panw_weights": [1.0], "prompts": asked, "steps": steps}
    for step in steps:
        folder, read = path / f"pictures/step-{step:06d}", []
        for number, letter in enumerate(LETTERS):
            palette, real = STYLES[number % 4][1], folder / f"{number:02d}-real.png"
            draw(real, letter, palette, 0, rng, (size, size))
            told = []
            for k in range(count):
                drawn = folder / f"{number:02d}-{k}.png"
                draw(drawn, letter, palette, (0.2 + 0.1 * k) * (1 - step / 100), rng, (size, size))
                mse = squared_error(real, drawn)
                parts = {"reconstruction": -1.5 * mse, "reconstruction/mse": mse, "reconstruction/perceptual": 0.5 * mse}
                told.append({"reward": -1.5 * mse, "parts": parts})
            shutil.copy(folder / f"{number:02d}-0.png", folder / f"{number:02d}.png")
            rewards = [entry["reward"] for entry in told]
            for entry in told:
                entry["advantage"] = (entry["reward"] - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-4)
            flat = {"mask": [[1.0] * 36], "advantage": [[told[0]["advantage"]] * 36]}
            read.append({"reward": rewards[0], "found": [], **flat, "draws": told})
        (folder / "read.json").write_text(json.dumps(read))
    (path / "pictures/index.json").write_text(json.dumps(index))
    items = []
    for number, letter in enumerate(LETTERS):
        for side, noise in (("before", 0.6), ("after", 0.1)):
            draw(path / f"gallery/{side}/{number:02d}.png", letter, "sea", noise, rng, (size, size))
        sides = {"before": {"found": [], "correct": number > 2}, "after": {"found": [], "correct": number > 0}}
        items.append({"text": letter, "style": [], **sides})
    (path / "gallery/index.json").write_text(json.dumps(items))
    return path


def write_mar_run(path: Path, steps: tuple[int, ...] = (0, 35, 70), grid: tuple[int, int] = (4, 16), rounds: int = 12) -> Path:
    """A run directory as MAR-GRPO leaves it: words drawn in `rounds` steps, half of them trained on, the uncertain tokens damped."""
    path.mkdir(parents=True)
    rng, tokens, prompts = random.Random(5), grid[0] * grid[1], 6
    (path / "config.yaml").write_text("name: mar\nmodel: bundled:words-masked\nseed: 5\nalgorithm:\n  kind: mar_grpo\n")
    lines = [{"step": k, "reward": 0.5 + 0.003 * k, "trajectory_spread": 0.4 - 0.001 * k, "kl": 1e-4 * k} for k in range(1, 71)]
    lines = [line | {f"entropy/step_{i}": 2 - 0.4 * i - line["step"] / 200 for i in range(rounds)} for line in lines]
    write_lines(path / "metrics.jsonl", [line | {f"consistent/step_{i}": 0.4 + 0.05 * i for i in range(rounds)} for line in lines])
    asked = [{"text": WORDS[n], "words": [WORDS[n]], "style": STYLES[n % 4]} for n in range(prompts)]
    index = {"grids": [grid], "panw_alpha": 0.0, "panw_weights": [1.0], "prompts": asked, "steps": steps}
    edges = [round(tokens * (1 - math.cos(math.pi / 2 * k / rounds))) for k in range(rounds + 1)]
    orders = []
    for _ in range(prompts):
        places = rng.sample(range(tokens), tokens)
        orders.append([next(k for k in range(rounds) if place < edges[k + 1]) for place in places])
    for step in steps:
        folder, read = path / f"pictures/step-{step:06d}", []
        for number, (prompt, order) in enumerate(zip(asked, orders, strict=True)):
            draw(folder / f"{number:02d}.png", prompt["text"], prompt["style"][1], 0.7 * (1 - step / 100), rng)
            spread = [(0.2 + 0.5 * math.exp(-(((i // grid[1] - 1.5) / 1.2) ** 2))) * rng.uniform(0.7, 1.3) for i in range(tokens)]
            least = sorted(spread, reverse=True)[: round(0.3 * tokens)][-1]
            weight = [min(1.0, (least / u) ** 2) if k % 2 else 0.0 for u, k in zip(spread, order, strict=True)]
            told = {"mask": [[float(w > 0) for w in weight]], "advantage": [[rng.gauss(0, 1)] * tokens], "weight": [weight]}
            told |= {"step": [[float(k) for k in order]], "spread": [spread]}
            read.append({"reward": 0.5 + step / 200, "found": seen(misread(prompt["text"], 0.3, rng), rng), **told})
        (folder / "read.json").write_text(json.dumps(read))
    (path / "pictures/index.json").write_text(json.dumps(index))
    return path


def squared_error(real: Path, drawn: Path) -> float:
    """Mean over channels and places, of pixels in [-1, 1]."""
    with Image.open(real) as one, Image.open(drawn) as other:
        pairs = list(zip(one.tobytes(), other.tobytes(), strict=True))
    return sum((2 * (a - b) / 255) ** 2 for a, b in pairs) / len(pairs)


def shown(page: Path) -> dict:
    """What the page is made of."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    return json.loads(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "words")


def test_page_of_a_whole_run(whole):
    page = write_report(
        whole, definitions={"reward": "mean over rollouts", "rewards/*/mean": "before weights", "grad_*": "before clipping"}
    )
    assert page == whole / "report.html"
    content = shown(page)
    assert content["title"] == "words-var-rl"
    assert content["headline"]["before"] == {"value": 0.412, "interval": pytest.approx([0.37, 0.454])}
    assert content["headline"]["after"]["value"] == 0.781
    assert content["header"]["commit"] == "447c155"
    assert content["header"]["seed"] == "7"
    assert len(content["gallery"]["items"]) == 12
    for number, item in enumerate(content["gallery"]["items"]):
        for side in ("before", "after"):
            assert item[side]["picture"] == data_uri(whole / f"gallery/{side}/{number:02d}.png")
    assert content["film"]["steps"] == list(range(0, 161, 10))
    assert all(shot["picture"].startswith("data:image/png;base64,") for frame in content["film"]["frames"] for shot in frame)
    assert content["film"]["frames"][0][0]["mask"][0] == "1"
    assert content["metrics"]["definitions"] == {
        "reward": "mean over rollouts",
        "rewards/ocr/mean": "before weights",
        "grad_norm": "before clipping",
    }
    assert content["missing"] == {}
    assert page.stat().st_size < 1_000_000


def test_page_asks_for_nothing(whole, tmp_path):
    text = write_report(whole, tmp_path / "page.html").read_text()
    assert not re.search(r'(?:src|href)\s*=\s*"(?!data:|#)', text)
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_report_is_the_same_twice(whole, tmp_path):
    assert write_report(whole, tmp_path / "a.html").read_bytes() == write_report(whole, tmp_path / "b.html").read_bytes()


def test_page_of_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("name: early\n")
    content = shown(write_report(tmp_path))
    assert set(content["missing"]) == {"gallery", "film", "metrics", "tables", "probe", "events", "command"}
    assert f"`varl probe {tmp_path}/config.yaml --out {tmp_path}`" in content["missing"]["probe"]
    assert content["headline"] is None


def test_a_run_is_known_by_its_name_its_last_step_and_its_time(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\nalgorithm: {kind: grpo}\nmodel: m\n")
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "seconds/total": 36.0} for step in (5, 10)])
    content = shown(write_report(tmp_path))
    assert content["title"] == tmp_path.name, "for want of a name the folder's"
    assert content["header"] == {"algorithm": "grpo", "model": "m", "steps": "10", "training time": "1 min 12 s", "seed": "3"}
    (tmp_path / "summary.json").write_text('{"seconds": 90}')
    assert shown(write_report(tmp_path))["header"]["training time"] == "1 min 30 s", "as the summary counted it"


def test_numbers_that_are_none_are_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "summary.json").write_text('{"before": {"fd": NaN}, "after": {"fd": 2.5}}')
    content = shown(write_report(tmp_path))
    assert content["headline"]["before"] == {"value": None, "interval": None}
    assert content["headline"]["after"]["value"] == 2.5


def test_no_directory_no_config_no_yaml(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there is no such run directory\. Give the folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"config\.yaml: missing, so .* is no run directory"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [1\n")
    with pytest.raises(DataError, match=r"config\.yaml: not YAML"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "summary.json").write_text('{"a": ')
    with pytest.raises(DataError, match=r"summary\.json: not JSON .* Delete it"):
        write_report(tmp_path)


def test_text_is_never_markup(tmp_path):
    evil = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>{{js}}"
    (tmp_path / "config.yaml").write_text(f"name: {json.dumps(evil)}\n")
    write_lines(tmp_path / "events.jsonl", [{"time": 0, "step": 1, "kind": "warning", "message": evil}])
    write_pictures(tmp_path, random.Random(0), [0], 1)
    index = json.loads((tmp_path / "pictures/index.json").read_text())
    index["prompts"][0]["text"] = evil
    (tmp_path / "pictures/index.json").write_text(json.dumps(index))
    page = write_report(tmp_path)
    text = page.read_text()
    assert len(re.findall(r"<script", text)) == 2
    assert "<img src=x" not in text
    assert shown(page)["film"]["prompts"][0]["text"] == evil
    assert shown(page)["events"][0]["message"] == evil


def test_a_torn_line_is_counted_and_the_others_live(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": null}\n[3]\n\n{"step": 3, "rew')
    lines, torn = read_lines(file)
    assert (len(lines), torn) == (2, 2)
    (tmp_path / "config.yaml").write_text("name: torn\n")
    metrics = shown(write_report(tmp_path))["metrics"]
    assert metrics["torn"] == 2
    assert metrics["columns"]["reward"] == [0.5, None]


def test_a_step_written_twice_counts_as_written_last():
    steps, columns = by_column([{"step": 2, "kl": 1.0}, {"step": 1, "kl": 0.0}, {"step": 2, "kl": 3.0, "stage": "all"}])
    assert steps == [1, 2]
    assert columns == {"kl": [0.0, 3.0], "stage": [None, "all"]}


def test_long_runs_are_means_over_spans(tmp_path):
    (tmp_path / "config.yaml").write_text("name: long\n")
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "reward": step % 2} for step in range(2 * POINTS)])
    metrics = shown(write_report(tmp_path))["metrics"]
    assert metrics["every"] == 2
    assert metrics["columns"]["reward"] == [0.5] * POINTS
    assert metrics["steps"] == list(range(1, 2 * POINTS, 2)), "the last step of each span"
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "reward": step} for step in range(POINTS + 1)])
    metrics = shown(write_report(tmp_path))["metrics"]
    assert (metrics["steps"][-1], metrics["columns"]["reward"][-1]) == (POINTS, POINTS), "alone in its span"


@pytest.mark.parametrize(
    ("span", "mean"),
    [
        ([1.0, 3.0], 2.0),
        ([1.0, None], 1.0),
        ([None], None),
        ([float("nan"), 2.0], 2.0),
        (["prefix", "suffix"], "suffix"),
        ([1 / 3], 0.33333),
    ],
)
def test_span_mean(span, mean):
    assert span_mean(span) == mean


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, None), (0.25, "0.25 s"), (72, "1 min 12 s"), (3600, "1 h"), (90061, "1 d 1 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_metric_s_own_definition_is_preferred():
    table = {"rewards/*/mean": "pattern", "rewards/ocr/mean": "own"}
    assert define("rewards/ocr/mean", table) == "own"
    assert define("rewards/clip/mean", table) == "pattern"
    assert define("kl", table) is None
    assert define("eval/ned/mean", {"*": "any", "eval/*": "held out"}) == "held out"


def test_summary_flat_and_nested_say_the_same():
    assert nested({"before/ned": 1, "before/exact": 2, "x": 3}) == nested({"before": {"ned": 1, "exact": 2}, "x": 3})
    flat = measures({"ned": 0.5, "ned_interval": [0.4, 0.6]})
    assert flat == measures({"ned": {"value": 0.5, "interval": [0.4, 0.6]}}) == {"ned": {"value": 0.5, "interval": [0.4, 0.6]}}


def test_summary_tables():
    first, sweep, seeds = tables(
        {"commit": "x", "before": {"ned": 1}, "sweep": {"0.5": {"ned": 2}, "1.0": {"ned": 3}}, "seeds": [{"seed": 4}]}
    )
    assert first == {"title": "overall", "rows": [{"label": "before", "cells": {"ned": {"value": 1, "interval": None}}}]}
    assert [row["label"] for row in sweep["rows"]] == ["0.5", "1.0"]
    assert seeds["rows"][0]["cells"]["seed"]["value"] == 4


def test_what_is_no_number_is_said_in_words():
    assert measures({"best": True, "worst": False, "engine": None, "laws": [1, 0.5]}) == {
        "best": "yes",
        "worst": "no",
        "engine": "–",
        "laws": "1, 0.5",
    }


def test_a_row_is_named_by_the_whole_way_to_it():
    (table,) = tables({"judges": {"ours": {"hot": {"ned": 1}, "cold": {"ned": 2}}, "theirs": {"other": {"ned": 3}}}})
    assert [row["label"] for row in table["rows"]] == ["ours / hot", "ours / cold", "theirs / other"]


def test_a_sweep_before_and_after_lies_side_by_side():
    (sweep,) = tables({"sweep": {side: {"0.5": {"ned": value}, "1.0": {"ned": value}} for side, value in (("before", 1), ("after", 2))}})
    assert [row["label"] for row in sweep["rows"]] == ["0.5", "1.0"]
    assert {name: cell["value"] for name, cell in sweep["rows"][0]["cells"].items()} == {"ned, before": 1, "ned, after": 2}


def test_what_varl_eval_found_is_a_table(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    rows = [{"temperature": t, "judge": "rapidocr", "word_accuracy": a} for t, a in ((1.0, 0.4), (0.5, 0.6))]
    (tmp_path / "eval.json").write_text(json.dumps({"model": "m", "rows": rows}))
    (table,) = shown(write_report(tmp_path))["tables"]
    assert table["title"] == "evaluation"
    assert [row["cells"]["word_accuracy"]["value"] for row in table["rows"]] == [0.4, 0.6]


def test_headline_falls_back_to_evaluations_then_to_the_reward(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    lines = [{"step": k, "reward": float(k), "eval/ned": k / 10} for k in range(4)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    found = headline(read_run(tmp_path))
    assert (found["metric"], found["before"]["value"], found["after"]["value"]) == ("ned", 0.0, 0.3)
    write_lines(tmp_path / "metrics.jsonl", [line | {"eval/word_accuracy": line["step"] / 5} for line in lines])
    found = headline(read_run(tmp_path))
    assert (found["metric"], found["before"]["value"], found["after"]["value"]) == ("word_accuracy", 0.0, 0.6), "the first of HEADLINES"
    write_lines(tmp_path / "metrics.jsonl", [{"step": k, "reward": float(k)} for k in range(4)])
    found = headline(read_run(tmp_path))
    assert (found["metric"], found["before"]["value"], found["after"]["value"]) == ("reward", 0.5, 2.5)


def test_probe_charts():
    drawn = probe(
        {"steps": [{"step": 0, "signal_share": 0.4, "signal_share_interval": [0.3, 0.5]}], "variance_share": [{"m": 2, "value": 0.7}]}
    )
    assert drawn["charts"] == [
        {"name": "signal_share", "points": [{"name": "0", "value": 0.4, "interval": [0.3, 0.5]}]},
        {"name": "variance_share", "points": [{"name": "2", "value": 0.7, "interval": None}]},
    ]
    assert drawn["facts"] == {}
    rest = probe({"variance_share": [], "seconds_per_picture": 0.5, "recommendations": ["more"]})
    assert rest == {"charts": [], "recommendations": ["more"], "facts": {"seconds_per_picture": {"value": 0.5, "interval": None}}}
    assert probe({}) == {}


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(70, [0, 1, 2, 3, 4, 5, 6]), (69, [0, 2, 4, 6]), (39, [0, 3, 6]), (20, [0, 6]), (5, [6])],
)
def test_thinning_keeps_the_ends(budget, kept):
    assert thin(list(range(7)), dict.fromkeys(range(7), 10), budget) == kept


def test_large_pictures_still_make_a_small_page(tmp_path):
    (tmp_path / "config.yaml").write_text("name: large\n")
    rng = random.Random(0)
    write_pictures(tmp_path, rng, [0], 2, size=(256, 256))
    folder, index = tmp_path / "pictures", json.loads((tmp_path / "pictures/index.json").read_text())
    for step in range(1, 60):
        (folder / f"step-{step:06d}").symlink_to(folder / "step-000000")
    (folder / "index.json").write_text(json.dumps(index | {"steps": list(range(60))}))
    write_gallery(tmp_path, rng, 1, size=(256, 256))
    entry = json.loads((tmp_path / "gallery/index.json").read_text())
    (tmp_path / "gallery/index.json").write_text(json.dumps(entry * 60))
    for side in ("before", "after"):
        for number in range(1, 60):
            (tmp_path / f"gallery/{side}/{number:02d}.png").symlink_to(tmp_path / f"gallery/{side}/00.png")
    page = write_report(tmp_path)
    content = shown(page)
    assert page.stat().st_size < 3_000_000
    assert content["film"]["left_out"] > 0
    assert content["film"]["left_out"] + len(content["film"]["steps"]) == 60
    assert content["film"]["steps"][0] == 0
    assert content["film"]["steps"][-1] == 59
    assert content["gallery"]["left_out"] + len(content["gallery"]["items"]) == 60


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory) -> Path:
    return write_va_pi_run(tmp_path_factory.mktemp("runs") / "va_pi")


def test_a_picture_has_its_real_one_and_its_draws(rebuilt, tmp_path):
    film = shown(write_report(rebuilt, tmp_path / "page.html"))["film"]
    assert film["steps"] == [0, 35, 70]
    told = json.loads((rebuilt / "pictures/step-000035/read.json").read_text())[4]["draws"]
    shot = film["frames"][1][4]
    assert film["prompts"][4]["real"] == data_uri(rebuilt / "pictures/step-000035/04-real.png")
    assert [each["number"] for each in shot["draws"]] == list(range(8))
    assert [each["picture"] for each in shot["draws"]] == [data_uri(rebuilt / f"pictures/step-000035/04-{k}.png") for k in range(8)]
    assert shot["picture"] == shot["draws"][0]["picture"]
    for entry, each in zip(told, shot["draws"], strict=True):
        assert each["parts"] == {
            "mse": pytest.approx(entry["parts"]["reconstruction/mse"], rel=5e-3),
            "perceptual": pytest.approx(entry["parts"]["reconstruction/perceptual"], rel=5e-3),
        }
        assert each["reward"] == pytest.approx(entry["reward"], rel=5e-3)
        assert each["advantage"] == pytest.approx(entry["advantage"], rel=5e-3)
    best, worst = (pick(told, key=lambda entry: entry["reward"]) for pick in (max, min))
    assert [each["mark"] for each in shot["draws"]] == [{told.index(best): "best", told.index(worst): "worst"}.get(k) for k in range(8)]
    assert shot["draws_reward"] == pytest.approx(statistics.mean(entry["reward"] for entry in told), rel=5e-3)
    assert shot["draws_left_out"] == 0
    assert shot["advantage"] == []


def test_a_run_without_draws_knows_nothing_of_them(whole, tmp_path):
    film = shown(write_report(whole, tmp_path / "page.html"))["film"]
    assert film["prompts"][0].keys() == {"text", "words", "style"}
    assert film["frames"][0][0].keys() == {"picture", "reward", "found", "mask", "advantage"}


def entry(reward: float | None) -> dict:
    return {"reward": reward, "parts": {}, "advantage": 0.0}


def test_of_many_draws_the_best_and_the_worst_stay(tmp_path):
    rewards = [0.5] * 20
    rewards[15], rewards[18] = 0.9, 0.1
    found = draws(tmp_path, 0, [entry(reward) for reward in rewards])
    assert [each["number"] for each in found["draws"]] == [*range(MOST_DRAWS - 2), 15, 18]
    assert found["draws_left_out"] == 8
    assert found["draws_reward"] == 0.5


@pytest.mark.parametrize(
    ("rewards", "marks", "mean"),
    [
        ([0.0, 2.0, 1.0], ["worst", "best", None], 1.0),
        ([None, 2.0, 1.0], [None, "best", "worst"], 1.5),
        ([1.0, 1.0], [None, None], 1.0),
        ([1.0, None], [None, None], 1.0),
        ([None], [None], None),
    ],
)
def test_best_and_worst(tmp_path, rewards, marks, mean):
    found = draws(tmp_path, 0, [entry(reward) for reward in rewards])
    assert [each["mark"] for each in found["draws"]] == marks
    assert [each["reward"] for each in found["draws"]] == rewards
    assert found["draws_reward"] == mean


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"rebuild": -3, "rebuild/mse": 1, "rebuild/look": 2}, {"mse": 1, "look": 2}),
        ({"rebuild": -3}, {}),
        ({"a": 1, "a/mse": 2, "b": 3}, {"a": 1, "a/mse": 2, "b": 3}),
        ({"mse": 1, "look": 2}, {"mse": 1, "look": 2}),
        ({}, {}),
    ],
)
def test_parts_of_one_reward_lose_its_name(parts, told):
    assert telling(parts) == told


def test_large_draws_still_make_a_small_page(tmp_path):
    run = write_va_pi_run(tmp_path / "run", count=2, size=132, steps=(0,))
    folder, index = run / "pictures", json.loads((run / "pictures/index.json").read_text())
    read = json.loads((folder / "step-000000/read.json").read_text())
    for number, told in enumerate(read):
        told["draws"] += 6 * told["draws"][1:]
        for k in range(2, 8):
            (folder / f"step-000000/{number:02d}-{k}.png").symlink_to(folder / f"step-000000/{number:02d}-1.png")
    (folder / "step-000000/read.json").write_text(json.dumps(read))
    for step in range(1, 8):
        (folder / f"step-{step:06d}").symlink_to(folder / "step-000000")
    (folder / "index.json").write_text(json.dumps(index | {"steps": list(range(8))}))
    page = write_report(run)
    film = shown(page)["film"]
    assert page.stat().st_size < 3_000_000
    assert 2 <= len(film["steps"]) == 8 - film["left_out"] < 8
    assert FILM_BYTES < size(film["frames"]) <= FILM_BYTES + DRAWS_BYTES, "draws come on top"
    assert len(film["frames"][0][0]["draws"]) == 8
    content = base64.b64decode(film["frames"][0][0]["draws"][7]["picture"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(content)).size == (DRAW_SIDE, DRAW_SIDE)


def test_a_distance_is_better_when_it_falls(rebuilt, whole):
    found = headline(read_run(rebuilt))
    assert (found["metric"], found["before"]["value"], found["after"]["value"]) == ("fd", 13.6, 9.8)
    assert found["lower_is_better"] is True
    assert headline(read_run(whole))["lower_is_better"] is False


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    return write_mar_run(tmp_path_factory.mktemp("runs") / "mar")


def test_a_masked_picture_has_its_order_spread_and_weight(masked, tmp_path):
    film = shown(write_report(masked, tmp_path / "page.html"))["film"]
    for step, frame in zip(film["steps"], film["frames"], strict=True):
        told = json.loads((masked / f"pictures/step-{step:06d}/read.json").read_text())
        for prompt, shot, read in zip(film["prompts"], frame, told, strict=True):
            assert prompt["order"] == read["step"][0]
            assert shot["spread"] == pytest.approx(read["spread"][0], rel=5e-3)
            assert shot["weight"] == pytest.approx(read["weight"][0], rel=5e-3)
            assert "at" not in shot
    assert sorted(set(film["prompts"][0]["order"])) == list(range(12))


def test_a_masked_picture_without_further_paths_and_one_seen_at_a_step(masked, tmp_path):
    run = shutil.copytree(masked, tmp_path / "run")
    file = run / "pictures/step-000070/read.json"
    read = json.loads(file.read_text())
    del read[0]["spread"]
    read[1]["at"] = 3
    file.write_text(json.dumps(read))
    bare, early, *_ = shown(write_report(run))["film"]["frames"][-1]
    assert "spread" not in bare
    assert early["at"] == 3


def test_many_tokens_still_make_a_small_page(tmp_path):
    """1,024 tokens of a picture, their maps thinned out with the steps."""
    run = write_mar_run(tmp_path / "run", steps=(0,), grid=(32, 32), rounds=64)
    folder, index = run / "pictures", json.loads((run / "pictures/index.json").read_text())
    for step in range(1, 60):
        (folder / f"step-{step:06d}").symlink_to(folder / "step-000000")
    (folder / "index.json").write_text(json.dumps(index | {"steps": list(range(60))}))
    page = write_report(run)
    film = shown(page)["film"]
    assert page.stat().st_size < 3_000_000
    assert 2 <= len(film["steps"]) == 60 - film["left_out"]
    assert {len(shot["spread"]) for frame in film["frames"] for shot in frame} == {1024}


def test_compare(whole, tmp_path):
    other = write_run(tmp_path / "other", name="words-grpo", seed=8, alpha=0.0, steps=40, prompts=1)
    page = compare([whole, other], tmp_path / "compare.html")
    content = shown(page)
    assert content["runs"] == ["words-var-rl", "words-grpo"]
    assert ["algorithm.grpo.panw_alpha", "0.7", "0.0"] in content["settings"]
    assert [name for name, *_ in content["metrics"]][:1] == ["eval/word_accuracy"]
    assert {len(chart["series"]) for chart in content["curves"]} == {2}
    (reward,) = (chart for chart in content["curves"] if chart["name"] == "reward")
    assert [(line["run"], line["x"][-1]) for line in reward["series"]] == [(0, 160), (1, 40)]
    ended, columns = {name: values for name, *values in content["metrics"]}, [read_run(run).columns for run in (whole, other)]
    assert ended["after/word_accuracy"] == [0.781, 0.781]
    assert ended["kl"] == pytest.approx([statistics.mean(column["kl"][-10:]) for column in columns])
    assert ended["reward_calls"] == [256 * 160, 256 * 40], "a count as it was written last"
    assert ended["eval/ned"] == [column["eval/ned"][-1] for column in columns]
    assert compare([whole, other]) == whole.parent / "compare.html"
    text = compare_text([whole, other])
    assert re.search(r"algorithm\.grpo\.panw_alpha +0\.7 +0\.0\n", text)
    assert "Unequal: seeds differ (words-var-rl: 7, words-grpo: 8)." in text
    assert "Unequal: wall clocks differ" in text
    assert "steps differ (words-var-rl: 160, words-grpo: 40)" in text


def test_equal_runs_are_called_equal(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"name: {name}\nseed: 1\n")
        write_lines(
            tmp_path / name / "metrics.jsonl",
            [{"step": k, "reward": 0.5, "seconds/total": 2.0, "reward_calls": 8 * k + 8} for k in range(3)],
        )
    assert compare_text([tmp_path / "a", tmp_path / "b"]) == (
        "final metrics    a    b\n"
        "-----------------------\n"
        "reward         0.5  0.5\n"
        "seconds/total    2    2\n"
        "reward_calls    24   24\n"
        "\nThe configurations agree.\n"
        "\nSame seed, same number of judged pictures, same time.\n"
    )
    write_lines(tmp_path / "b/metrics.jsonl", [{"step": k, "seconds/total": 2.1, "reward_calls": 24} for k in range(3)])
    assert "wall clocks" not in compare_text([tmp_path / "a", tmp_path / "b"]), "5 %"
    write_lines(tmp_path / "b/metrics.jsonl", [{"step": k, "seconds/total": 2.2, "reward_calls": 24} for k in range(3)])
    assert "Unequal: wall clocks differ (a: 6 s, b: 7 s)." in compare_text([tmp_path / "a", tmp_path / "b"])
    write_lines(tmp_path / "b/metrics.jsonl", [{"step": k, "reward_calls": 24} for k in range(3)])
    assert "Unequal: wall clocks differ (a: 6 s, b: unknown)." in compare_text([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b/summary.json").write_text('{"reward_calls": 99}')
    assert "Unequal: judged pictures differ (a: 24, b: 99)." in compare_text([tmp_path / "a", tmp_path / "b"])


def test_runs_of_one_name_go_by_their_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("name: same\n")
    assert shown(compare([tmp_path / "a", tmp_path / "b"]))["runs"] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_one_run_is_no_comparison(whole):
    with pytest.raises(DataError, match="at least two run directories"):
        compare_text([whole])


def test_report_needs_no_torch():
    code = "import sys, varl.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
