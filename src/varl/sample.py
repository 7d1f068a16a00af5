"""Pictures from a model folder, and whether they can be read."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from varl.build import model_path, new_policy
from varl.checkpoints import model as model_folder
from varl.config import LawConfig, ModelConfig, NextScaleConfig, OCRConfig, WordsConfig
from varl.data.fonts import FACES
from varl.data.words import PALETTES
from varl.errors import ConfigError
from varl.eval.words import draw_sample, reading_metrics, token_diversity
from varl.policies.next_scale import NextScalePolicy
from varl.policies.raster import RasterPolicy
from varl.rewards.judge import judge_now
from varl.rewards.ocr_reward import OCRReward
from varl.train.record import picture_grid
from varl.types import Prompt, Region

COPIES = 2
"""Pictures of each prompt in an evaluation: two tell how much they differ."""


def find_model(name: str) -> Path:
    """The model folder at `name`: that folder, `bundled:NAME`, or what a run directory trained."""
    inside = Path(name) / "model"
    return inside if (inside / "config.yaml").is_file() else model_path(name)


def load_policy(path: Path, law: LawConfig = LawConfig()) -> NextScalePolicy | RasterPolicy:
    """The model at `path` on the GPU if there is one, drawing under `law`."""
    return new_policy(model_folder.load(path), torch.device("cuda" if torch.cuda.is_available() else "cpu"), law, law)


def text_prompt(text: str, style: Sequence[str] = ()) -> Prompt:
    """`text` with one region for each part between `|`."""
    regions = tuple(Region(text=part) for part in text.split("|") if part)
    return Prompt(text=text, style=tuple(style), regions=regions)


def draw_grid(policy: NextScalePolicy | RasterPolicy, prompts: Sequence[Prompt], copies: int, seed: int, out: Path) -> None:
    """`copies` pictures of each prompt as one PNG; the same seed gives the same pictures."""
    classes = policy.module.config.num_classes
    for prompt in prompts:
        if classes is not None and prompt.label is None:
            raise ConfigError(f"prompt {prompt.text!r}: this model draws classes and reads no text. Give --label, 0 to {classes - 1}.")
        if classes is None and prompt.label is not None:
            raise ConfigError(f"label {prompt.label}: this model reads text and knows no classes. Give --prompt.")
    sample = draw_sample(policy, prompts, copies=copies, seed=seed)
    captions = [" ".join((prompt.text or f"class {prompt.label}", *prompt.style)) for prompt in sample.prompts]
    out.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(sample.images, captions).save(out, format="PNG")


def words_of(config: ModelConfig) -> WordsConfig:
    """The words that a model that reads characters can be asked for, with the faces and palettes among its styles."""
    if not isinstance(config, NextScaleConfig) or config.text is None:
        raise ConfigError("this model reads no characters, so there are no words to evaluate it on. Use one that does.")
    standard = WordsConfig()
    return WordsConfig(
        image_size=config.image_size,
        letters=config.text.alphabet,
        fonts=tuple(name for name in config.text.styles if name in FACES) or standard.fonts,
        palettes=tuple(name for name in config.text.styles if name in PALETTES) or standard.palettes,
    )


def evaluate(
    policy: NextScalePolicy | RasterPolicy, prompts: Sequence[Prompt], *, temperatures: Sequence[float], judges: Sequence[str], seed: int
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
            diversity = token_diversity(sample.actions, COPIES)
            for reward in rewards:
                parts = judge_now(reward, sample.images, sample.prompts).parts
                rows.append(
                    {"temperature": temperature, "judge": reward.engine, **reading_metrics(parts, COPIES), "token_diversity": diversity}
                )
    return rows
