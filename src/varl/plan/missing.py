"""What stands in a run's way, and what in it was probably not meant."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from varl.build import model_path
from varl.checkpoints.folder import MANIFEST, load_config, read_part
from varl.config import (
    DataConfig,
    FolderConfig,
    NextScaleConfig,
    OCRConfig,
    PythonRewardConfig,
    ReconstructionConfig,
    RewardConfig,
    RunConfig,
    VARRLConfig,
    WeightedReward,
)
from varl.data.folder import read_folder
from varl.data.fonts import load_font
from varl.data.words import PALETTES, split, word_list
from varl.data.words import prompts as word_prompts
from varl.errors import CheckpointError, ConfigError, VarlError
from varl.plan.cost import Update
from varl.policies.next_scale import model_ids
from varl.rewards.ocr import choose_engine, open_engine
from varl.rewards.toy import load_callable
from varl.settings import from_yaml
from varl.types import Prompt

PROMPTS_TRIED = 64
"""Prompts of drawn words that are given to the encoder; of a folder, all are."""

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


def config_of(name: str) -> NextScaleConfig:
    """The model's config, after every file beside it was found to have the size that was written; hashes are checked when it is loaded."""
    path = model_path(name)
    manifest = json.loads(read_part(path, MANIFEST))
    sizes = {file: (path / file).stat().st_size if (path / file).is_file() else 0 for file in manifest}
    wrong = [f"{file} has {size:,} bytes of {manifest[file]['bytes']:,}" for file, size in sizes.items() if size != manifest[file]["bytes"]]
    if wrong:
        raise CheckpointError(f"model={name!r}: not whole: {'; '.join(wrong)}. Copy or save the model folder again.")
    return from_yaml(load_config(path), NextScaleConfig)


def prompts_of(problems: list[str], data: DataConfig, part: str) -> tuple[Sequence[Prompt], int | None]:
    """Prompts that the run will see, of drawn words some, and the number of held-out prompts or words; None where there are none to speak
    of. Every face, palette, list and folder that is missing joins the problems."""
    if isinstance(data, FolderConfig):
        held = attempt(problems, read_folder, data.heldout) if data.heldout else None
        return [*(attempt(problems, read_folder, data.path) or ()), *(held or ())], None if held is None else len(held)
    known = len(problems)
    for name in data.fonts:
        attempt(problems, load_font, name, 12)
    problems += [f"palette {name!r}: unknown. Known: {', '.join(PALETTES)}." for name in data.palettes if name not in PALETTES]
    words = attempt(problems, lambda: split(word_list(data), data))
    if words is None:
        return (), None
    some = None if len(problems) > known else attempt(problems, word_prompts, getattr(words, part), data, PROMPTS_TRIED, data.seed)
    return some or (), len(words.heldout)


def check_prompts(problems: list[str], prompts: Sequence[Prompt], model: NextScaleConfig) -> None:
    """Whether the model knows every character, attribute and class, and a model of classes is asked for one."""
    if model.num_classes is not None:
        unlabelled, prompts = [p for p in prompts if p.label is None], [p for p in prompts if p.label is not None]
        if unlabelled:
            problems.append(
                f"{count(unlabelled, prompts)} no label: this model draws classes 0 to {model.num_classes - 1}, and without one of them "
                "anything. Give every prompt a `label`."
            )
    if prompts:
        attempt(problems, model_ids, prompts, model)


def check_regions(problems: list[str], prompts: Sequence[Prompt], rewards: Mapping[str, WeightedReward]) -> None:
    """Whether what an OCR reward shall read is there, and made of letters that its reader answers with."""
    mute, spoken = [p for p in prompts if not p.words], [p for p in prompts if p.words]
    letters = {letter for prompt in spoken for word in prompt.words for letter in word.upper()}
    for name, part in rewards.items():
        if not isinstance(part.reward, OCRConfig):
            continue
        if mute:
            problems.append(
                f"rewards.{name}: {count(mute, spoken)} no text region, so nothing to read. Give every prompt `regions`, or use another "
                "reward."
            )
        if strange := "".join(sorted(letters - set(part.reward.letters.upper()))):
            problems.append(
                f"rewards.{name}.reward.letters={part.reward.letters!r}: prompts ask for {strange!r}, which the reader does not answer "
                "with. Add them to `letters`, or change the prompts."
            )


def count(those: Sequence[Prompt], others: Sequence[Prompt]) -> str:
    """How many of the prompts, and which first."""
    first = f" (the first: {those[0].text!r})" if those[0].text else ""
    return f"{len(those)} of {len(those) + len(others)} prompts{first} have"


def judge_of(name: str, config: RewardConfig) -> str:
    """Who judges. The engine is opened, the callable found."""
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
            if config.features is not None:
                load_callable(config.features)
            return f"{name}: reconstruction, MSE{'' if config.lpips_weight == 0 else ' and ' + (config.features or 'LPIPS')}"


def doubts(config: RunConfig, updates: Sequence[Update]) -> list[str]:
    """Settings that work, and probably were not meant."""
    train, algorithm = config.train, config.algorithm
    grpo = algorithm.grpo
    group = grpo.num_generations * (algorithm.num_continuations if isinstance(algorithm, VARRLConfig) else 1)
    most = max(update.judged for update in updates)
    found = []
    if train.rollouts_per_backward > most:
        found.append(
            f"train.rollouts_per_backward={train.rollouts_per_backward} is more than the {most} pictures of a step: a step is one piece."
        )
    if grpo.rollouts_per_chunk < group:
        found.append(
            f"rollouts_per_chunk={grpo.rollouts_per_chunk} is less than a group of {group}, which is never split: chunks hold {group}."
        )
    if most <= max(grpo.rollouts_per_chunk, group):
        found.append(
            f"all {most} pictures of a step are one chunk: no rollout hides the time of a reward. Lower rollouts_per_chunk to overlap them."
        )
    if train.save_every > train.steps:
        found.append(f"train.save_every={train.save_every} is beyond the last of {train.steps} steps: a kill loses everything.")
    if train.optim.warmup_steps >= train.steps:
        found.append(f"train.optim.warmup_steps={train.optim.warmup_steps}: the run of {train.steps} steps never leaves the warm-up.")
    if config.sample_law != config.score_law:
        found.append("sample_law and score_law differ: what is drawn is not what is trained. The metrics sampling/law_* say by how much.")
    return found
