"""The pages in a real browser: they draw without an error, follow their links, and ask no one for anything."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from test_report import LETTERS, shown, write_lines, write_mar_run, write_run, write_va_pi_run
from varl.report import compare, write_report

pytestmark = pytest.mark.slow

QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
QUIET += " --disable-sync --hide-scrollbars --virtual-time-budget=4000"
SECTIONS = ["gallery", "film", "credit", "monitor", "curves", "entropy", "time", "results", "probe", "events", "config"]


def chromium(profile: Path, address: str, *wanted: str) -> str:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine: the pages are not looked at")
    command = [browser, *QUIET.split(), f"--user-data-dir={profile}", *wanted, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def dom(page: Path, profile: Path, link: str = "") -> str:
    """The document as it stands once drawn."""
    return chromium(profile, page.as_uri() + link, "--dump-dom")


def drawn_part(document: str) -> str:
    """Without the page's own data, script and pictures."""
    return re.sub(r"<script.*?</script>|data:image[^\"]*", "", document, flags=re.S)


def root(document: str) -> str:
    (tag,) = re.findall(r"<html[^>]*>", document)
    return tag


def asked(page: Path, folder: Path, question: str, *flags: str) -> str:
    """What the body of a function returns in a copy of the page whose security policy lets it in."""
    script = (
        f"<script>addEventListener('load', () => {{ document.documentElement.dataset.answer = (() => {{ {question} }})(); }});</script>"
    )
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page.read_text())
    (folder / "open.html").write_text(text.replace("</body>", f"{script}</body>"))
    document = chromium(folder / "profile", (folder / "open.html").as_uri(), "--dump-dom", *flags)
    assert "data-error" not in root(document)
    (answer,) = re.findall('data-answer="([^"]*)"', root(document))
    return answer


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "words"), definitions={"reward": "what the reader gave"})


def test_every_section_is_drawn_without_an_error(page, tmp_path):
    document = dom(page, tmp_path)
    assert 'data-ready="true"' in root(document)
    assert "data-error" not in root(document)
    assert re.findall(r'<section id="(\w+)"', document) == SECTIONS
    part = drawn_part(document)
    assert part.count("<article") == 12
    assert "what the reader gave" in part
    assert "word accuracy" in part
    assert "reward rose while monitor/background_edges fell" in part
    assert "NaN" not in part.replace("32 pictures are NaN", "")
    assert "undefined" not in part


def test_a_link_chooses_step_and_prompt(page, tmp_path):
    film = shown(page)["film"]
    for step, prompt in ((20, 3), (150, 0)):
        document = dom(page, tmp_path, f"#step={step}&prompt={prompt}")
        assert f'data-step="{step}"' in root(document)
        (shot,) = re.findall(r'id="shot">(.*?)<section', document, flags=re.S)
        assert film["frames"][step // 10][prompt]["picture"] in shot
        assert f'aria-valuetext="step {step}"' in document


def test_a_link_past_the_end_or_of_nonsense_shows_what_there_is(page, tmp_path):
    assert 'data-step="160" data-prompt="7"' in root(dom(page, tmp_path, "#step=99999&prompt=99"))
    assert 'data-step="0" data-prompt="0"' in root(dom(page, tmp_path, "#step=x&prompt=y"))


def test_slider_and_keys_change_the_picture(page, tmp_path):
    press = """const slider = document.querySelector(".player input"); slider.value = 4; slider.dispatchEvent(new Event("input"));
      const there = document.documentElement.dataset.step;
      dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
      return [there, document.documentElement.dataset.step, location.hash].join(" ");"""
    assert asked(page, tmp_path, press) == "40 50 #step=50&amp;prompt=0"


def test_gallery_filter_hides_the_others(page, tmp_path):
    press = """const visible = () => document.querySelectorAll("article:not([hidden])").length, all = visible();
      const chip = document.querySelector("[data-name=fixed]"); chip.click();
      return [all, visible(), chip.textContent].join(" ");"""
    fixed = sum(item["after"]["correct"] and not item["before"]["correct"] for item in shown(page)["gallery"]["items"])
    assert asked(page, tmp_path, press) == f"12 {fixed} fixed {fixed}"


def test_one_cross_hair_reads_all_charts(page, tmp_path):
    point = """const chart = document.querySelector("#curves .chart svg"), box = chart.getBoundingClientRect();
      chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width * 46 / 460, clientY: box.top + 9 }));
      return [...document.querySelectorAll("#curves .now")].map((now) => now.lastChild.textContent).join(";");"""
    captions = asked(page, tmp_path, point).split(";")
    assert len(captions) > 8
    assert set(captions) == {"step 1 · prefix"}


@pytest.mark.parametrize("width", [1300, 420])
def test_nothing_sticks_out(page, tmp_path, width):
    measure = "return [innerWidth, document.documentElement.scrollWidth].join(' ');"
    inner, scroll = asked(page, tmp_path, measure, f"--window-size={width},1600").split()
    assert int(scroll) <= int(inner)


def test_an_injected_script_does_not_run(page, tmp_path):
    script = "<script>document.documentElement.dataset.owned = 1</script>"
    (tmp_path / "injected.html").write_text(page.read_text().replace("</body>", f"{script}</body>"))
    document = dom(tmp_path / "injected.html", tmp_path / "profile")
    assert 'data-ready="true"' in root(document)
    assert "data-owned" not in root(document)


def test_evil_text_is_shown_as_text(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    evil = "<img src=x onerror=document.title=1><b>bold</b>"
    (run / "config.yaml").write_text(f"name: {json.dumps(evil)}\n")
    write_lines(run / "events.jsonl", [{"time": 0, "step": 1, "kind": "warning", "message": evil}])
    part = drawn_part(dom(write_report(run), tmp_path / "profile"))
    assert "data-error" not in root(part)
    assert "<b>bold" not in part
    assert part.count("&lt;b&gt;bold&lt;/b&gt;") == 4  # title, head, event, configuration
    assert len(re.findall('class="absent"', part)) >= 6


def test_a_run_without_masks_or_intervals_is_drawn(tmp_path):
    run = write_run(tmp_path / "run", steps=20, prompts=2)
    (run / "summary.json").write_text(json.dumps({"before/ned": 0.4, "after/ned": 0.6}))
    for file in run.glob("pictures/step-*/read.json"):
        blank = [{"reward": None, "found": [], "mask": None, "advantage": None}] * 2
        file.write_text(json.dumps(blank))
    (run / "pictures/step-000010/01.png").unlink()
    document = drawn_part(dom(write_report(run), tmp_path / "profile", "#step=10&prompt=1"))
    assert "data-error" not in root(document)
    assert "No advantages were recorded" in document
    assert "no picture" in document


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory) -> Path:
    return write_report(write_va_pi_run(tmp_path_factory.mktemp("runs") / "va_pi"))


def test_real_picture_and_draws_are_drawn(rebuilt, tmp_path):
    document, film = dom(rebuilt, tmp_path, "#step=35&prompt=1"), shown(rebuilt)["film"]
    assert "data-error" not in root(document)
    assert re.findall(r'<section id="(\w+)"', document) == [name for name in SECTIONS if name not in ("monitor", "entropy", "time")]
    (shot,) = re.findall(r'id="shot">(.*?)<div class="strip"', document, flags=re.S)
    assert film["prompts"][1]["real"] in shot
    places = [shot.index(f'alt="draw {k}') for k in range(2, 9)]
    assert places == sorted(places)
    assert all(each["picture"] in shot for each in film["frames"][1][1]["draws"])
    assert len(re.findall(">best</b>", shot)) == len(re.findall(">worst</b>", shot)) == 1
    part = drawn_part(document)
    assert not re.search("reader|nothing read|PANW|NaN|undefined|>null", part)
    assert len(re.findall(">recognised", part)) == 3 + 5
    assert "Fréchet distance, lower is better" in part
    assert re.search('class="badge good">−3.8 · −28 %<', part)


def test_squared_differences_are_the_mse_and_follow_the_chosen_draw(rebuilt, tmp_path):
    """The maps are drawn after the click has returned, so the answer is given once they are."""
    press = """document.getElementById("pick-6").click();
      setTimeout(() => {
        const [, drawn, difference, push] = [...document.querySelectorAll("#credit .scale")].map((card) => card.lastChild.textContent);
        const pressed = document.querySelector("#shot [aria-pressed=true]").id;
        document.documentElement.dataset.answer = [pressed, document.activeElement.id, drawn, difference, push].join(";");
      }, 1000);"""
    chosen, focus, drawn, difference, push = asked(rebuilt, tmp_path, press).split(";")
    draw = shown(rebuilt)["film"]["frames"][-1][0]["draws"][6]
    said = lambda text: float(text.replace("−", "-"))  # noqa: E731
    assert (chosen, focus) == ("draw-6", "pick-6")
    assert said(drawn.removeprefix("reward ")) == draw["reward"]
    mean, most = (said(number) for number in re.findall(r"[\d.]+", difference))
    assert mean == draw["parts"]["mse"]
    assert most > mean
    assert said(push.removeprefix("advantage ")) == pytest.approx(draw["advantage"], abs=5e-4)


@pytest.mark.parametrize("width", [1300, 420])
def test_draws_do_not_stick_out(rebuilt, tmp_path, width):
    measure = "return [innerWidth, document.documentElement.scrollWidth].join(' ');"
    inner, scroll = asked(rebuilt, tmp_path, measure, f"--window-size={width},1600").split()
    assert int(scroll) <= int(inner)


def test_one_grid_without_draws_or_classifier(tmp_path):
    """As a free run of a raster model leaves it: the credit would be flat, and nobody says what is right."""
    run = write_va_pi_run(tmp_path / "run", count=2, steps=(0,))
    file, index, pairs = run / "pictures/step-000000/read.json", run / "pictures/index.json", run / "gallery/index.json"
    file.write_text(json.dumps([{name: told[name] for name in told if name != "draws"} for told in json.loads(file.read_text())]))
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"prompts": [prompt | {"text": ""} for prompt in content["prompts"]]}))
    bare = [{**pair, "before": {"found": []}, "after": {"found": []}} for pair in json.loads(pairs.read_text())]
    pairs.write_text(json.dumps(bare))
    part = drawn_part(dom(write_report(run), tmp_path / "profile"))
    assert "data-error" not in root(part)
    assert 'id="credit"' not in part
    assert not re.search("recognised|reader|nothing read|fixed 0|>null|undefined", part)
    assert part.count("<article") == len(LETTERS)
    assert "picture 6" in part


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    return write_report(write_mar_run(tmp_path_factory.mktemp("runs") / "mar"))


def test_order_and_maps_of_a_masked_run_are_drawn(masked, tmp_path):
    document, film = dom(masked, tmp_path, "#step=35&prompt=1"), shown(masked)["film"]
    assert "data-error" not in root(document)
    assert 'data-ready="true"' in root(document)
    assert re.findall(r'<section id="(\w+)"', document)[1:4] == ["film", "order", "credit"]
    order, shot = film["prompts"][1]["order"], film["frames"][1][1]
    (drawn,) = re.findall(r'id="order">(.*?)<section', document, flags=re.S)
    assert drawn.count('class="hidden"') == sum(step >= 8 for step in order)
    assert drawn.count('class="box fresh"') == sum(step == 7 for step in order)
    assert f"step 8 of 12 · {sum(step < 8 for step in order)} of 64 tokens" in drawn
    assert shot["picture"] in drawn
    (maps,) = re.findall(r'id="credit">(.*?)<section', document, flags=re.S)
    assert re.findall("<h3>(.*?)</h3>", maps) == ["uncertainty", "what learns", "push = weight × advantage"]
    assert f"{sum(weight > 0 for weight in shot['weight'])} of 64 tokens learn" in maps
    assert maps.count('fill="var(--weight)"') == sum(weight > 0 for weight in shot["weight"])
    assert maps.count('fill="var(--unsure)"') == 64
    part = drawn_part(document)
    assert "Entropy per drawing step" in part
    assert not re.search("PANW|NaN|undefined|>null", part)


def test_the_order_is_played_and_follows_slider_bar_and_prompt(masked, tmp_path):
    press = """const section = document.getElementById("order"), slider = section.querySelector("input");
      const hidden = () => section.querySelectorAll(".hidden").length, play = section.querySelector("button");
      const to = (step) => { slider.value = step; slider.dispatchEvent(new Event("input")); };
      to(0); const none = hidden(); to(12); const all = hidden();
      section.querySelectorAll(".steps rect[fill=transparent]")[4].dispatchEvent(new Event("click")); const bar = [hidden(), slider.value];
      document.querySelectorAll(".fixed button")[3].click(); const other = hidden();
      play.click();
      const after = () => [none, all, ...bar, other, hidden(), play.textContent].join(" ");
      setTimeout(() => { document.documentElement.dataset.answer = after(); }, 3600);"""
    orders = [prompt["order"] for prompt in shown(masked)["film"]["prompts"]]
    left = [sum(step >= 5 for step in orders[number]) for number in (0, 3)]
    assert asked(masked, tmp_path, press) == f"64 0 {left[0]} 5 {left[1]} 0 ▶ draw"


@pytest.mark.parametrize("width", [1300, 420])
def test_maps_of_a_masked_run_do_not_stick_out(masked, tmp_path, width):
    measure = "return [innerWidth, document.documentElement.scrollWidth].join(' ');"
    inner, scroll = asked(masked, tmp_path, measure, f"--window-size={width},1600").split()
    assert int(scroll) <= int(inner)


def test_a_masked_run_of_plain_grpo_and_an_old_one(masked, tmp_path):
    """All tokens weigh the same and there are no further paths: the order alone is shown; and without it, nothing of this."""
    run = write_mar_run(tmp_path / "run", steps=(0,))
    file = run / "pictures/step-000000/read.json"
    read = [{**told, "weight": [[1.0] * 64], "mask": [[1.0] * 64]} for told in json.loads(file.read_text())]
    for gone, sections in ((["spread"], ["film", "order", "curves"]), (["spread", "weight", "step"], ["film", "curves", "entropy"])):
        file.write_text(json.dumps([{name: told[name] for name in told if name not in gone} for told in read]))
        document = dom(write_report(run), tmp_path / "profile")
        assert "data-error" not in root(document)
        assert re.findall(r'<section id="(\w+)"', document)[1:4] == sections
        assert not re.search("NaN|undefined|>null", drawn_part(document))


def test_comparison_is_drawn(page, tmp_path):
    other = write_run(tmp_path / "grpo", name="grpo", seed=8, alpha=0.0, steps=40, prompts=1)
    document = drawn_part(dom(compare([page.parent, other], tmp_path / "compare.html"), tmp_path / "profile"))
    assert 'data-ready="true"' in root(document)
    assert "data-error" not in root(document)
    assert "Seeds differ (words-var-rl: 7, grpo: 8)." in document
    assert "algorithm.grpo.panw_alpha" in document


@pytest.mark.parametrize("width", [1300, 420])
def test_light_and_dark_follow_the_reader(page, tmp_path, width):
    shots = []
    for scheme in (1, 0):
        file = tmp_path / f"{scheme}.png"
        flags = (f"--window-size={width},1600", f"--screenshot={file}", f"--blink-settings=preferredColorScheme={scheme}")
        chromium(tmp_path / "profile", page.as_uri(), *flags)
        shots.append(Image.open(file).convert("L"))
    light, dark = shots
    assert light.size == dark.size == (width, 1600)
    assert light.getpixel((2, 2)) > 230
    assert dark.getpixel((2, 2)) < 40
