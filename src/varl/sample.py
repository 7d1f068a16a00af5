"""Pictures from a model folder: to look at, to read, to hold against real ones, to lay before a benchmark's scorer."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from varl.build import AnyPolicy, build_reward, model_path, new_policy, refuse_groupwise, require_unmasking
from varl.checkpoints import harmon, janus
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import load_config
from varl.config import ActingConfig, LawConfig, NextScaleConfig, OCRConfig, RewardConfig, UnmaskingConfig, WordsConfig, var_guidance
from varl.data.folder import read_folder
from varl.data.fonts import FACES
from varl.data.words import PALETTES
from varl.distributed.mesh import torchrun_seat
from varl.doctor import commit
from varl.errors import ConfigError
from varl.eval.benchmarks import BENCHMARKS, read_items
from varl.eval.benchmarks.benchmark import by_value
from varl.eval.benchmarks.gallery import Gallery, Shard, draw_gallery
from varl.eval.benchmarks.score import ask_all, score_rows
from varl.eval.draw import digest, draw_pictures
from varl.eval.features import Extractor
from varl.eval.inception import load_inception
from varl.eval.words import draw_sample, reading_metrics, token_diversity
from varl.plan.families import require_readable
from varl.plan.missing import check_objects, check_regions, judge_of
from varl.policies.next_scale import NextScalePolicy
from varl.probe import model_identity
from varl.rewards.judge import judge_now
from varl.rewards.ocr_reward import OCRReward
from varl.rewards.toy import load_callable
from varl.rng import Stream
from varl.settings import model_from_yaml
from varl.train.record import picture_grid
from varl.types import Prompt, Region, RewardFn

COPIES = 2
"""Pictures of each prompt in an evaluation: two tell how much they differ."""


def find_model(name: str) -> Path:
    """The model folder at `name`: that folder, `bundled:NAME`, or what a run directory trained."""
    inside = Path(name) / "model"
    return inside if model_folder.is_model_folder(inside) else model_path(name)


def model_at(name: str) -> Path | None:
    """`find_model`, or None where there is no model."""
    if Path(name).suffix == ".npz":  # and not the name of a model on the hub
        return None
    try:
        return find_model(name)
    except ConfigError:
        return None


def config_of(model: Path) -> ActingConfig:
    """Of a model folder; no weight is loaded."""
    if janus.is_janus(model):
        return janus.without_memory(model)[0].config
    return harmon.without_memory(model)[0].config if harmon.is_harmon(model) else model_from_yaml(load_config(model))


def usual_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_policy(
    path: Path, law: LawConfig = LawConfig(), dtype: torch.dtype = torch.float32, unmasking: UnmaskingConfig | None = None
) -> AnyPolicy:
    """The model at `path` on the GPU if there is one, drawing under `law`."""
    require_unmasking(config_of(path), unmasking)
    return new_policy(model_folder.load(path), usual_device(), law, law, dtype, unmasking)


def text_prompt(text: str, style: Sequence[str] = ()) -> Prompt:
    """`text` with one region for each part between `|`."""
    regions = tuple(Region(text=part) for part in text.split("|") if part)
    return Prompt(text=text, style=tuple(style), regions=regions)


def guidance_of(text: str, model: Path | None) -> tuple[float, ...]:
    """`LawConfig.cfg_scale` of what was typed: numbers with commas between them, or `var:S`, the ramp of VAR's own sampler up to S."""
    ramp = text.removeprefix("var:")
    try:
        first, *others = (float(part) for part in ramp.split(","))
    except ValueError:
        raise ConfigError(f"--cfg {text!r}: must be a number, numbers with commas between them, or VAR's ramp, as var:4 is.") from None
    if ramp == text:
        return (first, *others)
    config = None if model is None else config_of(model)
    if others or not isinstance(config, NextScaleConfig):
        raise ConfigError(
            f"--cfg {text!r}: is one number after var:, the ramp of VAR's sampler. For another model give one number, or one for each step."
        )
    return var_guidance(first, len(config.grids))


def draw_grid(policy: AnyPolicy, prompts: Sequence[Prompt], copies: int, seed: int, out: Path, *, smooth: bool = False) -> None:
    """`copies` pictures of each prompt as one PNG; the same seed gives the same pictures. `smooth` is VAR's more_smooth."""
    config = policy.module.config
    classes, styled = config.num_classes, isinstance(config, NextScaleConfig) and config.text is not None
    for prompt in prompts:
        if prompt.style and not styled:
            raise ConfigError(f"style {','.join(prompt.style)}: this model knows no attributes. Leave --style out.")
        if classes is not None and prompt.label is None:
            raise ConfigError(f"prompt {prompt.text!r}: this model draws classes and reads no text. Give --label, 0 to {classes - 1}.")
        if classes is None and prompt.label is not None:
            raise ConfigError(f"label {prompt.label}: this model reads text and knows no classes. Give --prompt.")
    images = smooth_pictures(policy, prompts, copies, seed) if smooth else draw_sample(policy, prompts, copies=copies, seed=seed).images
    captions = [" ".join((prompt.text or f"class {prompt.label}", *prompt.style)) for prompt in prompts for _ in range(copies)]
    out.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(images, captions).save(out, format="PNG")


def smooth_pictures(policy: AnyPolicy, prompts: Sequence[Prompt], copies: int, seed: int) -> Tensor:
    """[B, 3, H, W] by VAR's `more_smooth`, prompt by prompt, `copies` of each. ConfigError for another model."""
    if not isinstance(policy, NextScalePolicy):
        raise ConfigError("--more-smooth: mixes the codes of a VAR, and this model is none. Leave it out.")
    rows = Stream(seed=seed, path=("eval",), rows=tuple(range(len(prompts)))).repeat(copies)
    return torch.cat(
        [policy.smooth([prompt] * copies, rows.select(range(i * copies, (i + 1) * copies))).cpu() for i, prompt in enumerate(prompts)]
    )


def words_of(config: ActingConfig) -> WordsConfig:
    """The words that a model that reads characters can be asked for, with the faces and palettes among its styles."""
    if not isinstance(config, NextScaleConfig) or config.text is None:
        raise ConfigError("this model reads no characters, so there are no words to evaluate it on. Use one that does, or `varl eval fid`.")
    standard = WordsConfig()
    return WordsConfig(
        image_size=config.image_size,
        letters=config.text.alphabet,
        fonts=tuple(name for name in config.text.styles if name in FACES) or standard.fonts,
        palettes=tuple(name for name in config.text.styles if name in PALETTES) or standard.palettes,
    )


def evaluate(
    policy: AnyPolicy, prompts: Sequence[Prompt], *, temperatures: Sequence[float], judges: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """A row for each temperature and judge: word_accuracy and ned with 95% half-widths, failed readings, diversity of tokens. All judges
    read the same pictures, two of each prompt."""
    rows = []
    with ExitStack() as opened:
        letters = "".join(sorted({letter for prompt in prompts for word in prompt.words for letter in word.upper()}))
        configs = [OCRConfig(engine=judge, letters=letters) for judge in judges]  # type: ignore[arg-type]
        rewards = [opened.enter_context(closing(OCRReward(config))) for config in configs]
        for temperature in temperatures:
            sample = draw_sample(policy.under(LawConfig(temperature=temperature)), prompts, copies=COPIES, seed=seed)
            diversity = token_diversity(sample.tokens, COPIES)
            for reward in rewards:
                parts = judge_now(reward, sample.images, sample.prompts).parts
                rows.append(
                    {"temperature": temperature, "judge": reward.engine, **reading_metrics(parts, COPIES), "token_diversity": diversity}
                )
    return rows


# ---- against real pictures --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Which pictures are to be drawn from a model, to be held against real ones."""

    model: Path
    law: LawConfig
    unmasking: UnmaskingConfig | None
    """Of a masked model."""
    count: int
    seed: int
    size: tuple[int, int]
    """(H, W) in pixels that they are brought to."""
    dtype: Literal["float32", "bfloat16"]
    """Of the transformer; the tokenizer works in float32."""
    choices: Sequence[Prompt]
    """What is asked for: one of these for each picture, uniformly at random."""


def plan_drawing(
    model: Path,
    law: LawConfig,
    unmasking: UnmaskingConfig | None = None,
    *,
    count: int,
    seed: int,
    side: int | None,
    dtype: Literal["float32", "bfloat16"],
    prompts: Path | None,
) -> Drawing:
    """Read off the model's config; no weight is loaded. Without `prompts`, a folder, the model's classes are asked for."""
    config = config_of(model)
    require_unmasking(config, unmasking)
    height, width = config.image_size
    if side is not None and height != width:
        raise ConfigError(f"--size {side}: this model's pictures are {height}x{width} (height x width), no squares. Leave it out.")
    if prompts is None and config.num_classes is None:
        raise ConfigError(
            "this model reads text and knows no classes that could be drawn at random. Give --prompts, a folder with prompts.jsonl."
        )
    choices = read_folder(prompts) if prompts else [Prompt(label=label) for label in range(config.num_classes or 0)]
    size = (height, width) if side is None else (side, side)
    return Drawing(model=model, law=law, unmasking=unmasking, count=count, seed=seed, size=size, dtype=dtype, choices=choices)


def draw_many(drawing: Drawing, folder: Path, batch: int, tick: Callable[[int], None]) -> Path:
    """The npz file of these pictures in `folder`; what is there already is not drawn again."""
    dtype = torch.bfloat16 if drawing.dtype == "bfloat16" else torch.float32
    return draw_pictures(
        lambda: load_policy(drawing.model, drawing.law, dtype, drawing.unmasking),
        drawing.choices,
        folder,
        count=drawing.count,
        seed=drawing.seed,
        size=drawing.size,
        batch=batch,
        settings={
            "model": model_identity(drawing.model)[:16],
            "dtype": drawing.dtype,
            **asdict(drawing.law),
            **(asdict(drawing.unmasking) if drawing.unmasking else {}),
        },
        tick=tick,
    )


def load_extractor(features: str | None, inception: Path | None) -> Extractor:
    """What pictures are judged by, on the GPU if there is one: Inception, with weights from `inception` or from the usual cache; or
    `features`, a classifier that `varl pretrain` made or the function or module at MODULE:NAME."""
    if features is None:
        return load_inception(inception).to(usual_device())
    if inception is not None:
        raise ConfigError(f"--features {features}, --inception {inception}: are two networks to judge by. Leave one out.")
    folder = model_at(features)
    extractor = load_callable(features) if folder is None else model_folder.load_classifier(folder)
    return extractor.to(usual_device()).eval() if isinstance(extractor, nn.Module) else cast(Extractor, extractor)


# ---- for benchmarks ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibition:
    """Which pictures of a benchmark are to be drawn, by what, and who judges them."""

    model: Path
    law: LawConfig
    unmasking: UnmaskingConfig | None
    seed: int
    dtype: Literal["float32", "bfloat16"]
    gallery: Gallery
    rewards: Mapping[str, RewardConfig]


def plan_exhibition(
    command: str,
    prompts: Path,
    model: Path,
    folder: Path,
    law: LawConfig = LawConfig(),
    unmasking: UnmaskingConfig | None = None,
    *,
    samples: int | None,
    seed: int,
    dtype: Literal["float32", "bfloat16"],
    rewards: Mapping[str, RewardConfig],
) -> Exhibition:
    """All that can be known before a weight is loaded: that the files are the benchmark's, that the model reads their prompts, that every
    judge is there. ConfigError or DataError says what is not."""
    benchmark, config = BENCHMARKS[command], config_of(model)
    require_unmasking(config, unmasking)
    items = read_items(benchmark, prompts)
    if config.num_classes is not None:
        raise ConfigError(f"{model}: this model draws classes and reads no text, which {benchmark.title} is made of. Give one that reads.")
    height, width = config.image_size
    if benchmark.square and height != width:
        raise ConfigError(
            f"{model}: its pictures are {height}x{width} (height x width), and the scorer of {benchmark.title} cuts squares. Give another "
            "model."
        )
    count = benchmark.samples if samples is None else samples
    if benchmark.counts and count not in benchmark.counts:
        takes = " or ".join(map(str, benchmark.counts))
        raise ConfigError(f"--samples {count}: the scorer of {benchmark.title} takes {takes} of each prompt. Give one of these.")
    require_readable([item.prompt for item in items], config)
    letters = {letter for item in items for word in item.prompt.words for letter in word.upper()}
    judges = {name: _reads(reward, letters) for name, reward in rewards.items()}
    if benchmark.ask is by_value:  # the others ask about what they make of a prompt
        problems: list[str] = []
        asked = [item.prompt for item in items]
        for check in (check_regions, check_objects):
            check(problems, asked, {f"--reward {name}": reward for name, reward in judges.items()})
        if problems:
            raise ConfigError(problems[0])
    for name, reward in judges.items():
        refuse_groupwise(f"--reward {name}", reward, "a benchmark has none")
        judge_of(name, reward, None)
    gallery = Gallery(benchmark=benchmark, items=items, samples=count, folder=folder)
    return Exhibition(model=model, law=law, unmasking=unmasking, seed=seed, dtype=dtype, gallery=gallery, rewards=judges)


def _reads(reward: RewardConfig, letters: set[str]) -> RewardConfig:
    """A reader answers with every letter that is asked for."""
    return replace(reward, letters="".join(sorted({*reward.letters.upper(), *letters}))) if isinstance(reward, OCRConfig) else reward


def draw_exhibition(shown: Exhibition, batch: int, shard: Shard, tick: Callable[[int], None]) -> None:
    """Draws what is not there of the shard's prompts, on the GPU of this process if there is one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(torchrun_seat().local_rank)
    dtype = torch.bfloat16 if shown.dtype == "bfloat16" else torch.float32
    draw_gallery(
        lambda: load_policy(shown.model, shown.law, dtype, shown.unmasking),
        shown.gallery,
        seed=shown.seed,
        batch=batch,
        settings={
            "model": model_identity(shown.model)[:16],
            "prompts": digest(shown.gallery.items),
            "dtype": shown.dtype,
            **asdict(shown.law),
            **(asdict(shown.unmasking) if shown.unmasking else {}),
        },
        noted={"folder": str(shown.model), "varl": version("varl"), "commit": commit()},
        shard=shard,
        tick=tick,
    )


def await_pictures(gallery: Gallery, seconds: float = 1.0) -> None:
    """Until the other processes have drawn theirs. One that fails ends them all, torchrun sees to it."""
    while any(gallery.missing(i) for i in range(len(gallery.items))):
        time.sleep(seconds)


def score_exhibition(shown: Exhibition, batch: int, tick: Callable[[int], None]) -> list[dict[str, Any]]:
    """What the judges say of the pictures, a row for each category and one of all."""
    judges: dict[str, RewardFn] = {}
    try:
        for name, reward in shown.rewards.items():
            judges[name] = build_reward(reward)
        return score_rows(ask_all(judges, shown.gallery, batch=batch, device=usual_device(), tick=tick), shown.gallery)
    finally:
        for judge in judges.values():
            if (close := getattr(judge, "close", None)) is not None:
                close()
