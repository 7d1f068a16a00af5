"""The documents hold: their links, names, commands, configs and code."""

import builtins
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from test_architecture import MAY_IMPORT
from varl.checkpoints import infinity, llamagen, mar, nova
from varl.checkpoints import model as model_folder
from varl.config import (
    LoraConfig,
    ModelConfig,
    NextScaleConfig,
    NOVAConfig,
    NOVAHeadConfig,
    RunConfig,
    TextConfig,
    TokenizerConfig,
    ViTConfig,
)
from varl.data.folder import read_folder, write_folder
from varl.errors import ConfigError
from varl.models.lora import chosen
from varl.models.masked import MaskedModel
from varl.models.next_scale import NextScale
from varl.recipes import RECIPES, recipe
from varl.recipes.pretrain import WORDS
from varl.settings import from_yaml, override
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.types import Prompt

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in ("docs", "dev", "benchmarks") for page in (ROOT / folder).rglob("*.md"))])
MODULES = "|".join(sorted({name.partition("/")[0] for name in RECIPES}))


class Block(NamedTuple):
    """A fenced block; `mark` is the comment on the line before it: run, or file: NAME."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    return [
        Block(page, text[: match.start(3)].count("\n") + 1, match[2], match[1] or "", match[3]) for match in found if match[2] == language
    ]


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, language)]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_a_block_is_found_with_its_mark_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("one\n<!-- run -->\n```python\nx = 1\n```\n```bash\nls\n```\n")
    assert blocks(page, "python") == [Block(page, 4, "python", "run", "x = 1\n")]
    assert blocks(page, "bash") == [Block(page, 7, "bash", "", "ls\n")]
    assert prose(page) == "one\n<!-- run -->\n\n\n"


# ---- links and names --------------------------------------------------------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, f"{page.name}: {target}"


@each_page
def test_names_of_code_are_there(page):
    """`algorithms/panw.py::panw_weights` is in src/varl, `tests/test_panw.py::test_by_hand` in tests; a bare `algorithms/panw.py` too."""
    for path, name in re.findall(r"`((?:\w+/)*\w+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8")):
        files = [ROOT / path, ROOT / "src" / "varl" / path]
        file = next((file for file in files if file.is_file()), None)
        if file is None and path.startswith(("tests/", "my_")):
            assert path.startswith("my_") or not name, f"{page.name}: there is no {path}"
            continue
        assert file is not None, f"{page.name}: there is no {path}"
        defined = rf"^\s*(?:def|class) {name}\b|^{name}\b"
        assert not name or re.search(defined, file.read_text(encoding="utf-8"), re.M), f"{page.name}: {path} has no {name}"


def test_the_table_of_rooms_is_the_one_that_is_enforced():
    table = prose(ROOT / "docs" / "architecture.md").partition("| may import |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\w, ]+) \|$", table, re.M)
    said = {room: set(names.split(", ")) - {"nothing"} for room, names in rows}
    assert said == {room: set(names.split()) for room, names in MAY_IMPORT.items() if room != "__init__"}


@each_page
def test_recipes_are_there(page):
    named = re.findall(rf"(?<![\w./-])(?:{MODULES})/\w+(?![\w./])", page.read_text(encoding="utf-8"))
    assert set(named) <= RECIPES.keys()


@each_page
def test_a_page_speaks_of_the_project_alone(page):
    text = page.read_text(encoding="utf-8")
    for pattern in (r"/work\b", r"\.\./shared", r"(?<![\w&/])#\d+\b", r"\bagents?\b"):
        assert not re.search(pattern, text, re.I), f"{page.name}: {re.search(pattern, text, re.I)}"


def released_configs() -> dict[str, ModelConfig]:
    """Of the models that docs/models.md counts the parameters of, by their names there."""
    var = {f"VAR-d{depth}": NextScaleConfig(depth=depth, width=64 * depth, heads=depth, num_classes=1000) for depth in (16, 20, 24, 30)}
    grids = tuple((side, side) for side in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
    var["VAR-d36"] = NextScaleConfig(depth=36, width=64 * 36, heads=36, num_classes=1000, shared_adaln=True, grids=grids)
    raster = {f"LlamaGen-{size} by class": llamagen.released(size, image_size=384) for size in llamagen.SIZES}
    raster["LlamaGen-XL by caption"] = llamagen.released("XL", image_size=256, text=True)
    masked: dict[str, ModelConfig] = {f"MAR-{size}": mar.released(size) for size in mar.SIZES}
    for width, heads in nova.HEADS.items():
        prefix, head = ViTConfig(depth=16, width=width, heads=heads), NOVAHeadConfig(width=width)
        masked[f"nova-d48w{width}-sdxl1024"] = NOVAConfig(prefix=prefix, encoder=replace(prefix, depth=32), head=head, grid=(64, 64))
    masked["nova-d48w1024-sd512"] = NOVAConfig()
    masked["nova-d48w1024-osp480"] = NOVAConfig(head=NOVAHeadConfig(depth=3, width=1280), grid=(30, 48), motion=True)
    return var | raster | masked | {f"Infinity-{size}": config for size, config in infinity.SIZES.items()}


def test_parameters_and_sizes_are_counted():
    rows = re.findall(
        r"^\| ([\w. -]+) \| .*?\| (\d+(?: x \d+)?)(?: \([^|]*)? \| ([\d,]+) \+ (\d+) \| ([\d.]+) \| ([\d.]+) \|",
        prose(ROOT / "docs" / "models.md"),
        re.M,
    )
    said = {name: (size, *counts, float(gib), float(low)) for name, size, *counts, gib, low in rows}
    found = {}
    for name, config in released_configs().items():
        with torch.device("meta"):
            pair = model_folder.fresh(config)
        h, w = config.image_size
        weights = [sum(p.numel() for p in module.parameters()) for module in pair]
        if isinstance(pair[0], MaskedModel):
            pair[0].head.requires_grad_(False)
        layers = [pair[0].get_submodule(layer) for layer in chosen(pair[0], LoraConfig())]
        added = sum(LoraConfig().r * sum(layer.weight.shape) for layer in layers)
        held = [(size + 4 * weights[1]) / 2**30 for size in (16 * weights[0], 4 * weights[0] + 16 * added)]
        found[name] = (
            str(h) if h == w else f"{h} x {w}",
            *(f"{count / 1e6:,.0f}" for count in weights),
            *(pytest.approx(size, abs=0.06) for size in held),
        )
    assert said == found


# ---- commands and configs ---------------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """Every `varl ...` line of the page's shell blocks, in words; a backslash goes on with the next line."""
    lines = [line for block in blocks(page, "bash") for line in block.text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(\S*/)?varl ", line)]


UNDERSTAND = """
import json, sys
import typer
from varl import cli
from varl.recipes import RECIPES

known = typer.main.get_command(cli.app).commands
for place, name, *rest in json.load(sys.stdin):
    try:
        command = known[name]
        while rest and hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        asked = command.make_context(name, rest).params if rest else {"command": command}
        if asked.get("target") in RECIPES and "assignments" in asked:
            cli.load(asked["target"], asked["assignments"] or ())
    except BaseException as error:
        print(place, name, *rest, repr(error))
"""
"""Names each command line that the command line would not take, with its options and, of a recipe, its settings."""


def test_every_command_line_is_understood():
    said = []
    for page in PAGES:
        place = str(page.relative_to(ROOT))
        said += [[place, name] for name in re.findall(r"`varl (\w[\w-]*)", page.read_text(encoding="utf-8"))]
        said += [[place, *words[1:]] for words in commands(page)]
    done = subprocess.run([sys.executable, "-c", UNDERSTAND], input=json.dumps(said), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr
    for line in (["here", "trian", "x"], ["here", "eval", "word"]):
        wrong = subprocess.run([sys.executable, "-c", UNDERSTAND], input=json.dumps([line]), capture_output=True, text=True, timeout=60)
        assert wrong.stdout.startswith(f"{' '.join(line)} KeyError")


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=lambda block: block.place)
def test_yaml_is_a_run(block):
    assert isinstance(from_yaml(block.text), RunConfig)


@pytest.mark.parametrize("block", all_blocks("jsonl"), ids=lambda block: block.place)
def test_prompts_can_be_read(block, tmp_path):
    for name in re.findall(r'"image": "([^"]+)"', block.text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 16)).save(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text(block.text, encoding="utf-8")
    assert len(read_folder(tmp_path)) == len(block.text.splitlines())


@each_page
def test_settings_in_prose_exist(page):
    """`train.steps=10`, `algorithm.grpo.mask=direct`: what is written as an assignment can be one."""
    for assignment in re.findall(r"`((?:model|data|rewards|algorithm|sample_law|score_law|train|eval)\.[\w.]+=[^`\s]+)`", prose(page)):
        tried = []
        for name in ("var_rl/words_cpu", "grpo/words_cpu", "pretrain/words_cpu"):
            try:
                override(recipe(name), [assignment])
                break
            except ConfigError as error:
                tried.append(str(error))
        else:
            pytest.fail(f"{page.name}: {assignment}: {tried[0]}")


# ---- code -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", all_blocks("python"), ids=lambda block: block.place)
def test_python_compiles(block):
    compile(block.text, block.place, "exec")


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """Where a reader of the documents may stand: a model folder `my/model` as small as can be, prompts in `my/prompts`."""
    config = NextScaleConfig(
        depth=1,
        width=16,
        heads=2,
        grids=((1, 1), (1, 3), (1, 6), (2, 8), (4, 16)),
        text=TextConfig(styles=WORDS.fonts + WORDS.palettes),
        tokenizer=TokenizerConfig(vocab=16, channels=4, width=8, multipliers=(1,), blocks=1, attention=False, patch=4),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_folder.save(tmp_path / "my" / "model", NextScale(config), MultiScaleVQ(config.tokenizer, config.grids), {})
    write_folder(tmp_path / "my" / "prompts", None, [Prompt(text=text) for text in ("FOX", "OWL", "CAT", "BEE")])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.mark == "run" for block in blocks(page, "python"))], ids=lambda page: page.name
)
def test_code_runs(page, workplace):
    """The marked blocks of a page, files and code, one after another, as one program; the bundled model is replaced by a smaller one."""
    program: dict = {"__name__": "program"}
    run = vars(builtins)["exec"]
    for block in sorted(blocks(page, "python") + blocks(page, "yaml"), key=lambda block: block.line):
        if block.mark.startswith("file: "):
            (workplace / block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.mark == "run":
            run(compile(block.text.replace("bundled:words", str(workplace / "my" / "model")), block.place, "exec"), program)
