"""What stands in a run's way, and what in it was probably not meant."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar, assert_never

from varl.build import PicturesOf, build_reward, demand_pictures, model_path
from varl.checkpoints import harmon, janus
from varl.checkpoints.folder import MANIFEST, load_config, read_part
from varl.checkpoints.model import Pair
from varl.checkpoints.objects import folders_of, known_by
from varl.checkpoints.vision import files_of
from varl.config import (
    ActingConfig,
    AestheticConfig,
    ClassifierConfig,
    ClassScoreConfig,
    CLIPScoreConfig,
    DataConfig,
    DINOConfig,
    FolderConfig,
    GenEvalConfig,
    GlyphsConfig,
    GroundingDINOConfig,
    HPSConfig,
    HPSv3Config,
    ImageRewardConfig,
    MARGRPOConfig,
    ModelConfig,
    OCRConfig,
    PickScoreConfig,
    PicturesConfig,
    PythonRewardConfig,
    ReconstructionConfig,
    RewardConfig,
    RunConfig,
    ServedRewardConfig,
    SSIMConfig,
    VAPIConfig,
    VARRLConfig,
    VQAConfig,
    WordsConfig,
)
from varl.data import glyphs
from varl.data.folder import read_folder
from varl.data.fonts import load_font
from varl.data.pictures import Pictures, read_pictures, together
from varl.data.words import PALETTES, split, word_list
from varl.data.words import prompts as word_prompts
from varl.errors import CheckpointError, ConfigError, VarlError
from varl.models.detection import require_known
from varl.plan.cost import Update, contexts_of, rows_of
from varl.plan.families import require_readable, without_memory
from varl.policies.acting import class_ids
from varl.rewards.geneval import require_geneval
from varl.rewards.objects import asked
from varl.rewards.ocr import choose_engine, open_engine
from varl.rewards.served import health
from varl.rewards.toy import load_callable
from varl.settings import KINDS, model_from_yaml
from varl.types import Prompt

PROMPTS_TRIED = 64
"""Prompts of drawn words and letters that are given to the model's encoder; of folders, all are."""
PICTURES_OPENED = 32
"""Of real pictures, from all over them; the others are opened when their turn comes."""

P = ParamSpec("P")
T = TypeVar("T")


def attempt(problems: list[str], fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What `fn` returns; where it cannot, its error joins the problems."""
    try:
        return fn(*args, **kwargs)
    except VarlError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None


def pair_of(name: str) -> Pair:
    """The model and its tokenizer, on the meta device."""
    path = model_path(name)
    theirs = janus if janus.is_janus(path) else harmon if harmon.is_harmon(path) else None
    if theirs is None:
        return without_memory(config_of(name))
    if (path / MANIFEST).is_file():
        require_whole(name, path)
    return theirs.without_memory(path)


def config_of(name: str) -> ModelConfig:
    """The model's config, if its folder is whole."""
    path = model_path(name)
    require_whole(name, path)
    return model_from_yaml(load_config(path))


def require_whole(name: str, path: Path) -> None:
    """CheckpointError unless every file has the size that was written; hashes are checked when it is loaded."""
    manifest = json.loads(read_part(path, MANIFEST))
    sizes = {file: (path / file).stat().st_size if (path / file).is_file() else 0 for file in manifest}
    wrong = [f"{file} has {size:,} bytes of {manifest[file]['bytes']:,}" for file, size in sizes.items() if size != manifest[file]["bytes"]]
    if wrong:
        raise CheckpointError(f"model={name!r}: not whole: {'; '.join(wrong)}. Copy or save the model folder again.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What a run will see."""

    prompts: Sequence[Prompt] = ()
    """Of drawn words and letters some, of folders all, held-out ones too."""
    heldout: int | None = None
    """Number of held-out prompts or words; None where there are none, or as many as are asked for."""
    pictures: PicturesOf | None = None
    """Those that were found, where the data is of real pictures."""


def data_of(problems: list[str], data: DataConfig, part: str) -> Data:
    """What can be found of it. Every face, palette, list, folder and package that is missing joins the problems."""
    match data:
        case FolderConfig():
            held = attempt(problems, read_folder, data.heldout) if data.heldout else None
            prompts = [*(attempt(problems, read_folder, data.path) or ()), *(held or ())]
            return Data(prompts=prompts, heldout=None if held is None else len(held))
        case WordsConfig():
            known = len(problems)
            for name in data.fonts:
                attempt(problems, load_font, name, 12)
            check_palettes(problems, data.palettes)
            words = attempt(problems, lambda: split(word_list(data), data))
            if words is None:
                return Data()
            some = None if len(problems) > known else attempt(problems, word_prompts, getattr(words, part), data, PROMPTS_TRIED, data.seed)
            return Data(prompts=some or (), heldout=len(words.heldout))
        case GlyphsConfig():
            check_palettes(problems, data.palettes)
            own = attempt(problems, glyphs.pictures, data, data.split, max(PROMPTS_TRIED, len(data.letters)), data.seed)
            attempt(problems, glyphs.pictures, data, "heldout", 1, data.seed)
            return Data(prompts=own.prompts if own else (), pictures=together(*([own] if own else [])))
        case PicturesConfig():
            own = opened(problems, data)
            held = None if data.heldout is None else opened(problems, replace(data, path=data.heldout, heldout=None, share=1.0))
            found = [part for part in (own, held) if part is not None]
            prompts = [prompt for part in found for prompt in part.prompts]
            return Data(prompts=prompts, heldout=None if held is None else len(held), pictures=together(*found))
    assert_never(data)


def opened(problems: list[str], data: PicturesConfig) -> Pictures | None:
    """The pictures at `data.path`, of which some were opened."""
    found = attempt(problems, read_pictures, data)
    if found is not None:
        for prompt in found.prompts[:: -(-len(found) // PICTURES_OPENED)]:
            attempt(problems, found.pixels, [prompt])
    return found


def check_palettes(problems: list[str], palettes: Sequence[str]) -> None:
    problems += [f"palette {name!r}: unknown. Known: {', '.join(PALETTES)}." for name in palettes if name not in PALETTES]


def check_prompts(problems: list[str], prompts: Sequence[Prompt], model: ActingConfig | ClassifierConfig) -> None:
    """Whether the model knows every character, attribute and class, and a model of classes is asked for one."""
    if model.num_classes is not None:
        unlabelled, prompts = [p for p in prompts if p.label is None], [p for p in prompts if p.label is not None]
        if unlabelled:
            does = "learns" if isinstance(model, ClassifierConfig) else "draws"
            problems.append(
                f"{count(unlabelled, prompts)} no label: this model {does} classes 0 to {model.num_classes - 1}, and without one of them "
                f"{'nothing' if does == 'learns' else 'anything'}. Give every prompt a `label`."
            )
    if isinstance(model, ClassifierConfig):
        attempt(problems, class_ids, prompts, model.num_classes)
    elif prompts:
        attempt(problems, require_readable, prompts, model)


def check_size(problems: list[str], data: DataConfig, model: ActingConfig | ClassifierConfig) -> None:
    """Whether pictures that are made or cut to a size have the model's. Those of a folder are as large as they are."""
    if not isinstance(data, FolderConfig) and data.image_size != model.image_size:
        whose = "the model sees" if isinstance(model, ClassifierConfig) else "the model's grids and stride make"
        problems.append(f"data.image_size={data.image_size}, but {whose} {model.image_size} pixels. Make them equal.")


def check_regions(problems: list[str], prompts: Sequence[Prompt], rewards: Mapping[str, RewardConfig]) -> None:
    """Whether what an OCR reward (by its place in the config) shall read is there, and made of letters that its reader answers with."""
    mute, spoken = [p for p in prompts if not p.words], [p for p in prompts if p.words]
    letters = {letter for prompt in spoken for word in prompt.words for letter in word.upper()}
    for place, reward in rewards.items():
        if not isinstance(reward, OCRConfig):
            continue
        if mute:
            problems.append(
                f"{place}: {count(mute, spoken)} no text region, so nothing to read. Give every prompt `regions`, or use another reward."
            )
        if strange := "".join(sorted(letters - set(reward.letters.upper()))):
            problems.append(
                f"{place}: letters={reward.letters!r}: prompts ask for {strange!r}, which the reader does not answer "
                "with. Add them to `letters`, or change the prompts."
            )


def check_objects(problems: list[str], prompts: Sequence[Prompt], rewards: Mapping[str, RewardConfig]) -> None:
    """Whether what a reward shall look for is there, and can be looked for."""
    mute, spoken = [p for p in prompts if not p.objects], [p for p in prompts if p.objects]
    for place, config in rewards.items():
        if not isinstance(config, GenEvalConfig | GroundingDINOConfig | VQAConfig):
            continue
        if mute:
            problems.append(
                f"{place}: {count(mute, spoken)} no objects to look for. Give every prompt `objects`, or `include` as GenEval does."
            )
        if isinstance(config, GenEvalConfig):
            attempt(problems, require_geneval, spoken)
            folders = attempt(problems, folders_of, config)
            known = None if folders is None else known_by(folders[0])
            if known is not None:
                attempt(problems, require_known, known, [one for prompt in spoken for one in asked(prompt)], config.detector)


def count(those: Sequence[Prompt], others: Sequence[Prompt]) -> str:
    """How many of the prompts, and which first."""
    first = f" (the first: {those[0].text!r})" if those[0].text else ""
    return f"{len(those)} of {len(those) + len(others)} prompts{first} have"


def judge_of(name: str, config: RewardConfig, pictures: PicturesOf | None) -> str:
    """Who judges. The engine is opened, the callable found, the service asked how it is; `pictures` are the data's, if it has any."""
    match config:
        case OCRConfig():
            engine, why = choose_engine(config.engine)
            open_engine(engine)
            return f"{name}: {why}"
        case PythonRewardConfig():
            load_callable(config.target)
            return f"{name}: {config.target}"
        case ReconstructionConfig():
            for file in (config.vgg, config.heads):
                if file is not None and not Path(file).is_file():
                    raise ConfigError(f"rewards.{name}: there is no file {file}. Put the released weights there.")
            pictures = demand_pictures("reconstruction", pictures)
            if config.vgg is None:
                build_reward(config, pictures)
            return f"{name}: reconstruction, MSE{'' if config.lpips_weight == 0 else ' and ' + (config.features or 'LPIPS')}"
        case ClassScoreConfig():
            build_reward(config)
            return f"{name}: the class, by {config.classifier}"
        case CLIPScoreConfig() | PickScoreConfig() | HPSConfig() | ImageRewardConfig() | HPSv3Config() | AestheticConfig() | DINOConfig():
            if isinstance(config, DINOConfig):
                demand_pictures("dino", pictures)
            return f"{name}: {KINDS[type(config)]}, by {files_of(config).weights}"
        case GenEvalConfig() | GroundingDINOConfig() | VQAConfig():
            return f"{name}: {KINDS[type(config)]}, by {' and '.join(map(str, folders_of(config)))}"
        case SSIMConfig():
            demand_pictures("ssim", pictures)
            return f"{name}: {'MS-SSIM' if config.multiscale else 'SSIM'} to the prompt's picture"
        case ServedRewardConfig():
            said = health(config.url)
            return f"{name}: {said['scorer']} at {config.url}{'' if said['ready'] else ', which is still loading'}"
    assert_never(config)


def doubts(config: RunConfig, updates: Sequence[Update], steps: int) -> list[str]:
    """Settings that work, and probably were not meant, of a model of so many steps."""
    train, algorithm = config.train, config.algorithm
    grpo = algorithm.grpo
    group = grpo.num_generations * (algorithm.num_continuations if isinstance(algorithm, VARRLConfig) else 1)
    judged, rows, whose = max(update.judged for update in updates), 1, "pictures"
    most = judged
    if isinstance(algorithm, VAPIConfig | MARGRPOConfig):
        contexts, rows = rows_of(algorithm, steps)
        most = train.prompts_per_step * contexts * rows
        if rows > 1 or contexts > group:
            whose = "rows (draws and own tokens)" if isinstance(algorithm, VAPIConfig) else "rows (steps and further paths)"
    found = []
    if train.rollouts_per_backward > most:
        found.append(
            f"train.rollouts_per_backward={train.rollouts_per_backward} is more than the {most} {whose} of a step: a step is one piece."
        )
    if isinstance(algorithm, VAPIConfig | MARGRPOConfig):
        passes = sum(sum(chunk) for chunk in contexts_of(config, algorithm, steps))
        if passes * rows > most:
            what = "its draws and its own tokens" if isinstance(algorithm, VAPIConfig) else "its own path and the further ones"
            found.append(
                f"train.rollouts_per_backward={train.rollouts_per_backward} cuts pictures apart, each of which has {rows} rows, {what}: "
                f"{passes} training passes in a step for {most // rows} pictures. Set a multiple of {rows}."
            )
    if grpo.rollouts_per_chunk < group:
        found.append(
            f"rollouts_per_chunk={grpo.rollouts_per_chunk} is less than a group of {group}, which is never split: chunks hold {group}."
        )
    if judged <= max(grpo.rollouts_per_chunk, group):
        found.append(
            f"all {judged} pictures of a step are one chunk: no rollout hides the time of a reward. Lower rollouts_per_chunk to overlap "
            "them."
        )
    if train.save_every > train.steps:
        found.append(f"train.save_every={train.save_every} is beyond the last of {train.steps} steps: a kill loses everything.")
    if train.optim.warmup_steps >= train.steps:
        found.append(f"train.optim.warmup_steps={train.optim.warmup_steps}: the run of {train.steps} steps never leaves the warm-up.")
    if not any(part.weight for part in config.rewards.values()):
        found.append("rewards: none has a weight but 0, so no picture is better than another and nothing is learned from them.")
    if config.sample_law != config.score_law:
        found.append("sample_law and score_law differ: what is drawn is not what is trained. The metrics sampling/law_* say by how much.")
    return found
