"""From config to objects: the only file that names concrete classes."""

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from varl.algorithms.grpo import GRPO
from varl.algorithms.mar_grpo import MARGRPO
from varl.algorithms.mixing import RunningScale, standardised
from varl.algorithms.va_pi import VAPI
from varl.algorithms.var_rl import VARRL
from varl.checkpoints import hugging_face
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import strict_load
from varl.checkpoints.hpsv3 import load_hpsv3
from varl.checkpoints.image_reward import load_image_reward
from varl.checkpoints.model import Pair, classifier_path, model_path
from varl.checkpoints.objects import folders_of, load_answerer, load_colours, load_detector
from varl.checkpoints.released import read_weights
from varl.checkpoints.text_encoder import load_text_encoder
from varl.checkpoints.vision import files_of, load_clip, load_dino, load_hps
from varl.config import (
    ActingConfig,
    AestheticConfig,
    AlgorithmConfig,
    AncestralConfig,
    CaptionConfig,
    ClassScoreConfig,
    CLIPScoreConfig,
    DataConfig,
    DINOConfig,
    FolderConfig,
    GenEvalConfig,
    GlyphsConfig,
    GroundingDINOConfig,
    GRPOConfig,
    HarmonConfig,
    HPSConfig,
    HPSv3Config,
    ImageRewardConfig,
    LawConfig,
    MARConfig,
    MARGRPOConfig,
    NOVAConfig,
    OCRConfig,
    PickScoreConfig,
    PicturesConfig,
    PythonRewardConfig,
    ReconstructionConfig,
    RewardConfig,
    RunConfig,
    ServedRewardConfig,
    SSIMConfig,
    TextRewardConfig,
    UnmaskingConfig,
    VAPIConfig,
    VARRLConfig,
    VQAConfig,
    WordsConfig,
    settled_counts,
)
from varl.data import glyphs
from varl.data.caption_cache import CaptionCache
from varl.data.folder import read_folder
from varl.data.pictures import heldout_pictures, read_pictures, together
from varl.data.sampler import PromptSampler, shard
from varl.data.token_cache import TokenCache, tokenizer_key
from varl.data.words import prompts as word_prompts
from varl.data.words import split, word_list
from varl.errors import ConfigError, DataError
from varl.models import lora
from varl.models.harmon import Harmon
from varl.models.infinity import Infinity
from varl.models.janus import Janus
from varl.models.layers import recompute
from varl.models.mar import MAR
from varl.models.next_scale import NextScale
from varl.models.nova import NOVA, spaced
from varl.models.raster import Raster
from varl.models.vision import AestheticHead
from varl.policies.acting import CaptionEncoder
from varl.policies.infinity import InfinityPolicy
from varl.policies.masked import MaskedPolicy
from varl.policies.next_scale import NextScalePolicy
from varl.policies.raster import RasterPolicy
from varl.rewards.class_score import ClassScore
from varl.rewards.clip import Aesthetic, TextMatch, clip_score
from varl.rewards.geneval import GenEval
from varl.rewards.grounding_dino import GroundingDINO
from varl.rewards.groups import Groupwise, Watched, background_edges, pixel_diversity
from varl.rewards.judge import Prepare, RewardJudge
from varl.rewards.networks import open_network
from varl.rewards.ocr_reward import OCRReward
from varl.rewards.preference import HPSv3, ImageReward
from varl.rewards.reconstruction import ReconstructionReward
from varl.rewards.served import ServedReward
from varl.rewards.similarity import SSIM, DINOSimilarity
from varl.rewards.toy import load_callable
from varl.rewards.vqa import VQA
from varl.settings import to_yaml
from varl.tokenizers.bsq import BSQ
from varl.tokenizers.kl import KL
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.vq import VQ
from varl.types import WATCHED, Algorithm, BranchingPolicy, Policy, Prompt, RedrawingPolicy, RewardFn, TeacherForcedPolicy

AnyPolicy = NextScalePolicy | InfinityPolicy | RasterPolicy | MaskedPolicy
"""Of any family."""
PicturesOf = Callable[[Sequence[Prompt]], Tensor]
"""The real pictures of prompts, [P, 3, H, W] in [0, 1]."""

PROMPTS = 20000
"""Distinct prompts drawn for training on words; a run that needs more goes round again in another order."""


def build_policy(config: RunConfig, device: torch.device, *, reference: bool) -> AnyPolicy:
    """The model and its tokenizer, on the device; with adapters where the config asks for them; with a frozen copy as reference where KL
    needs one (of which what does not learn is no copy: beside adapters nothing is); with the tokens of pictures that were encoded before
    where the data says where they are kept."""
    dtype = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
    pair = model_folder.load(model_path(config.model))
    policy = new_policy(pair, device, config.sample_law, config.score_law, dtype, config.unmasking)
    if isinstance(policy, MaskedPolicy):
        policy.train_head(trains_head(config))
    policy.rollouts_per_draw = config.train.rollouts_per_draw
    if config.train.gradient_checkpointing:
        recompute(policy.module.blocks)
    adapters = config.train.lora
    adapted = None if adapters is None else lora.chosen(policy.module, adapters)
    if reference:
        learning = {id(p) for p in policy.module.parameters() if p.requires_grad and adapters is None}
        whole = getattr(policy.module, "whole", policy.module)  # of a Janus or a Harmon it has more parts
        fixed: dict[int, Any] = {id(p): p for part in (policy.module, whole) for p in part.parameters() if id(p) not in learning}
        policy.reference = copy.deepcopy(policy.module, fixed).eval().requires_grad_(False)  # type: ignore[assignment]
    if adapters is not None and adapted is not None:
        lora.adapt(policy.module, adapted, adapters, config.seed)
    if isinstance(policy, RasterPolicy) and isinstance(config.data, PicturesConfig) and config.data.tokens is not None:
        key = tokenizer_key(policy.tokenizer.state_dict(), to_yaml(policy.tokenizer.config))
        policy.tokens = TokenCache(config.data.tokens, tokenizer=key, name=config.model).ids
    return policy


def new_policy(
    pair: Pair,
    device: torch.device | None = None,
    sample_law: LawConfig = LawConfig(),
    score_law: LawConfig = LawConfig(),
    dtype: torch.dtype = torch.float32,
    unmasking: UnmaskingConfig | None = None,
    captions: CaptionEncoder | None = None,
) -> AnyPolicy:
    """What acts with a model and its tokenizer, moved to `device` if one is given. `unmasking` is for masked models alone. Without
    `captions` what reads them is `captions_of` the model."""
    require_unmasking(pair[0].config, unmasking)
    laws: dict[str, Any] = {"sample_law": sample_law, "score_law": score_law, "dtype": dtype}
    reads = captions or captions_of(pair[0], device)
    for part in pair:
        part.to(device)
    match pair:
        case (NextScale() as model, MultiScaleVQ() as tokenizer):
            return NextScalePolicy(model, tokenizer, **laws)
        case (Infinity() as model, BSQ() as tokenizer):
            assert reads is not None
            return InfinityPolicy(model, tokenizer, captions=reads, **laws)
        case (Raster() | Janus() as model, VQ() as tokenizer):
            return RasterPolicy(model, tokenizer, captions=reads, **laws)
        case (MAR() | NOVA() | Harmon() as model, KL() as tokenizer):
            return MaskedPolicy(model, tokenizer, unmasking=unmasking or UnmaskingConfig(), captions=reads, **laws)
    assert_never(pair)


def captions_of(model: nn.Module, device: torch.device | None = None) -> CaptionEncoder | None:
    """What reads captions for a model: the encoder that its config names, which ConfigError says how to get, or a part of its own. None
    where there are no captions, or a policy knows what reads them."""
    if isinstance(model, Harmon):
        return model.read
    config = getattr(model.config, "captions", None)
    return None if config is None else caption_encoder(config, device or torch.device("cpu"))


def trains_head(config: RunConfig) -> bool:
    """Whether the diffusion head of a masked model learns too."""
    algorithm = config.algorithm
    return config.train.lora is None and (not isinstance(algorithm, MARGRPOConfig) or algorithm.train_head)


def require_unmasking(config: ActingConfig, unmasking: UnmaskingConfig | None) -> None:
    """ConfigError where a model that is not masked is told how to unmask, or a masked one in steps that cannot be."""
    if not isinstance(config, MARConfig | NOVAConfig | HarmonConfig):
        if unmasking is not None:
            raise ConfigError("unmasking: this model does not choose in which order it draws. Leave it out, or give a masked model.")
        return
    asked = unmasking or UnmaskingConfig()
    settled_counts(math.prod(config.grid), asked.steps)
    if isinstance(config, NOVAConfig) and isinstance(config.head.drawn, AncestralConfig):
        spaced(config.head.drawn, asked.denoise_steps)


def caption_encoder(config: CaptionConfig, device: torch.device) -> CaptionCache:
    """Features of captions, remembered in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache). Where the encoder lies is found now; it
    is loaded when a caption is asked for whose features are not there. It computes in bf16 on CUDA, in fp32 on the CPU; the two are kept
    apart, and so are captions that are lower-cased and those that are not."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = hugging_face.find(config.encoder, "captions.encoder")
    return CaptionCache(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "varl" / "captions",
        encoder=lambda: f"{hugging_face.identity(folder)} {dtype}{'' if config.lowercase else ' cased'}",
        load=partial(load_text_encoder, folder, device, dtype, lowercase=config.lowercase, longest=config.tokens),
    )


def build_algorithm(config: AlgorithmConfig, policy: Policy, pictures: PicturesOf | None = None) -> Algorithm:
    """`pictures` gives the real pictures of prompts, where the data has any."""
    match config:
        case VARRLConfig() if not isinstance(policy, BranchingPolicy):
            raise ConfigError(
                f"var_rl completes half-drawn images; {type(policy).__name__} cannot. Use a next-scale model or GRPOConfig()."
            )
        case VARRLConfig():
            return VARRL(config)
        case VAPIConfig() if not isinstance(policy, TeacherForcedPolicy):
            raise ConfigError(f"va_pi reads real pictures; {type(policy).__name__} cannot. Use a raster model or GRPOConfig().")
        case VAPIConfig():
            return VAPI(config, demand_pictures("va_pi", pictures))
        case MARGRPOConfig() if not isinstance(policy, RedrawingPolicy):
            raise ConfigError(
                f"mar_grpo trains on denoising paths; {type(policy).__name__} draws its tokens at once. Use a masked model or GRPOConfig()."
            )
        case MARGRPOConfig():
            return MARGRPO(config)
        case GRPOConfig():
            return GRPO(config)
    assert_never(config)


def needs_reference(config: AlgorithmConfig) -> bool:
    """Whether a frozen copy of the initial model takes part: in a KL term, or as the fixed old policy of the importance-corrected value."""
    return config.grpo.beta > 0 or (isinstance(config, VARRLConfig) and config.middle_return == "importance")


def build_reward(config: RewardConfig, pictures: PicturesOf | None = None) -> RewardFn:
    """`pictures` gives the real pictures of prompts, where the data has any."""
    match config:
        case OCRConfig():
            return OCRReward(config)
        case PythonRewardConfig():
            fn = load_callable(config.target)
            return Groupwise(fn) if config.groupwise else fn
        case ReconstructionConfig():
            return ReconstructionReward(config, demand_pictures("reconstruction", pictures), *open_network(config))
        case ClassScoreConfig():
            return ClassScore(model_folder.load_classifier(classifier_path(config.classifier, "class_score.classifier")), config.floor)
        case CLIPScoreConfig():
            return TextMatch(load_clip(files_of(config)), clip_score, config.batch)
        case PickScoreConfig():
            clip = load_clip(files_of(config))
            return TextMatch(clip, lambda cosine: clip.logit_scale * cosine, config.batch)
        case HPSConfig():
            return TextMatch(load_hps(files_of(config)), lambda cosine: cosine, config.batch)
        case ImageRewardConfig():
            return ImageReward(load_image_reward(files_of(config)), config.batch)
        case HPSv3Config():
            return HPSv3(load_hpsv3(files_of(config), Path(config.template)), config.batch)
        case AestheticConfig():
            files = files_of(config)
            clip = load_clip(files)
            head = AestheticHead(clip.width)
            strict_load(head, read_weights(Path(config.head)), config.head)
            return Aesthetic(clip, head, config.batch)
        case SSIMConfig():
            return SSIM(config, demand_pictures("ssim", pictures))
        case DINOConfig():
            pictures = demand_pictures("dino", pictures)
            return DINOSimilarity(config, load_dino(files_of(config)), pictures)
        case GenEvalConfig():
            detector, clip = folders_of(config)
            return GenEval(config, load_detector(detector, config.batch), load_colours(clip))
        case GroundingDINOConfig():
            return GroundingDINO(config, load_detector(folders_of(config)[0], config.batch))
        case VQAConfig():
            return VQA(config, load_answerer(folders_of(config)[0], config.batch))
        case ServedRewardConfig():
            return ServedReward(config)
    assert_never(config)


def demand_pictures(who: str, pictures: PicturesOf | None) -> PicturesOf:
    """`pictures`, if the data has any."""
    if pictures is None:
        raise ConfigError(f"{who} compares with real pictures, and this data has none. Set data to pictures.")
    return pictures


def demand_texts(place: str, config: RewardConfig, prompts: Sequence[Prompt]) -> None:
    """ConfigError where the reward at `place` of the config reads the prompts' texts, and some have none."""
    mute = [prompt for prompt in prompts if not prompt.text.strip()]
    if mute and isinstance(config, TextRewardConfig):
        raise ConfigError(
            f"{place}: {len(mute)} of {len(prompts)} prompts have no text to compare with. Give every prompt a `text`, or use another "
            "reward."
        )


def build_judge(config: RunConfig, pictures: PicturesOf | None, *, monitor: bool = False) -> RewardJudge:
    """`monitor`: beside the rewards, and with no weight, it asks what the run's monitor watches."""
    parts = {name: (part.weight, build_reward(part.reward, pictures)) for name, part in config.rewards.items()}
    if monitor:
        watched = {"pixel_diversity": Groupwise(pixel_diversity), "background_edges": background_edges}
        watched |= {name: build_reward(reward, pictures) for name, reward in config.monitor.held_out.items()}
        parts |= {f"{WATCHED}{name}": (0.0, Watched(fn, config.monitor.pictures)) for name, fn in watched.items()}
    return RewardJudge(parts, build_mixing(config))


def build_mixing(config: RunConfig) -> Prepare | None:
    """What rewards become before they are weighed."""
    match config.algorithm.grpo.multi_objective_aggregation:
        case "sum_then_normalize":
            return None
        case "normalize_then_sum":
            return lambda name, judgement, prompts, group: standardised(judgement, prompts, group)
        case "running_scale":
            return RunningScale(name for name, part in config.rewards.items() if part.weight)
    assert_never(config.algorithm.grpo.multi_objective_aggregation)


def refuse_groupwise(place: str, config: RewardConfig, reason: str) -> None:
    """ConfigError for a reward that compares the pictures of a group."""
    if isinstance(config, PythonRewardConfig) and config.groupwise:
        raise ConfigError(f"{place}: compares the pictures of a group, and {reason}. Ask it in the run.")


def build_served(config: RunConfig, name: str) -> Callable[[], RewardFn]:
    """What loads one of the run's rewards, to be served; ConfigError now for one that cannot be. The run's pictures are looked for when
    they are first asked for, for not all rewards do."""
    asked = config.rewards[name].reward
    if isinstance(asked, ServedRewardConfig):
        raise ConfigError(f"rewards.{name}: is served already, at {asked.url}. Give one that is not.")
    refuse_groupwise(f"rewards.{name}", asked, "a service is not told which these are")

    @cache
    def real() -> PicturesOf:
        return demand_pictures(name, build_prompts(config.data, config.seed, config.eval.samples).pictures)

    return lambda: build_reward(asked, lambda prompts: real()(prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSets:
    """Train and held-out prompts, and those that are drawn again and again to see progress."""

    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    fixed: Sequence[Prompt]
    pictures: PicturesOf | None = None
    """The real pictures of any of them, where the data has any."""


def build_prompts(config: DataConfig, seed: int, heldout: int) -> PromptSets:
    """`heldout` is how many evaluation prompts are wanted; a folder may hold fewer."""
    match config:
        case WordsConfig():
            words = split(word_list(config), config)
            held = word_prompts(words.heldout, config, heldout, config.seed + 77)
            return PromptSets(train=word_prompts(words.rl, config, PROMPTS, 1000 + seed), heldout=held, fixed=held[:12])
        case FolderConfig():
            train = read_folder(Path(config.path))
            held = read_folder(Path(config.heldout))[:heldout] if config.heldout else []
            if not train:
                raise DataError(f'{config.path}: prompts.jsonl is empty. Write one JSON object a line, at least {{"text": ...}}.')
            return PromptSets(train=train, heldout=held, fixed=(held or train)[:12])
        case GlyphsConfig():
            drawn = glyphs.pictures(config, config.split, PROMPTS, 1000 + seed)
            shown = glyphs.pictures(config, "heldout", heldout, config.seed + 77)
            return PromptSets(train=drawn.prompts, heldout=shown.prompts, fixed=shown.prompts[:12], pictures=together(drawn, shown))
        case PicturesConfig():
            real, others = read_pictures(config), heldout_pictures(config, heldout)
            held = others.prompts if others else ()
            some = held or real.prompts
            fixed = some[:: max(1, len(some) // 12)][:12]
            return PromptSets(train=real.prompts, heldout=held, fixed=fixed, pictures=together(real, *([others] if others else [])))
    assert_never(config)


def build_sampler(prompts: Sequence[Prompt], config: RunConfig, rank: int, world: int):
    """Prompts of one step for one rank, with their global slots, as a function of the step alone."""
    sampler = PromptSampler(prompts, seed=config.seed, per_step=config.train.prompts_per_step)
    return lambda step: shard(sampler.at(step), rank, world)
