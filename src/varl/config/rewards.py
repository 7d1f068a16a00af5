"""What a picture is worth."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from varl.config.demand import demand
from varl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class OCRConfig:
    """Reads the pictures, and compares with the prompt's words."""

    engine: Literal["auto", "tesseract", "rapidocr"] = "auto"
    """auto is tesseract where its language data is found, else rapidocr, and says so."""
    score: Literal["paper", "mixed", "exact", "ned", "letters"] = "mixed"
    """paper is VAR-RL's Comp + Sim - Pen; mixed is half exact, half NED similarity, per region; letters is the share of letters read right,
    and tells region credit about each letter."""
    letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """What a word may be made of, case ignored; the reader answers with nothing else."""
    workers: int = 1
    """Reader processes."""
    timeout: float = 20.0
    """Seconds for one batch of one worker, after which it is replaced and its pictures are NaN."""

    def __post_init__(self) -> None:
        demand("ocr.workers", self.workers, self.workers >= 0, "1 or more, or 0 to read in this process")
        demand("ocr.timeout", self.timeout, 0 < self.timeout < math.inf, "above 0 and finite")
        if not self.letters:
            raise ConfigError("ocr.letters='': the reader answers with these letters and no others. Name those that words are made of.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonRewardConfig:
    """Any callable (images [B, 3, H, W] in [0, 1], prompts) -> [B]."""

    target: str
    """module:function, or path.py:function."""
    groupwise: bool = False
    """It compares pictures: called once for each prompt's group, with all its pictures and no others, where it is else called for many
    groups at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionConfig:
    """How near the picture is to the prompt's reference picture: -(MSE + lpips_weight * perceptual distance), VA-pi (arXiv 2512.19680)
    Eq. 10. The perceptual distance is LPIPS with `vgg` and `heads`, or a plain one with `features`."""

    lpips_weight: float = 1.0
    """The paper's lambda_p, of which it names no value; 1 is the released scripts'. 0 is MSE alone, and needs no network."""
    vgg: str | None = None
    """File of torchvision's VGG16 weights."""
    heads: str | None = None
    """File of LPIPS's linear heads for VGG16, version 0.1."""
    features: str | None = None
    """A classifier's folder or `bundled:NAME`; or module:function, or path.py:function, of pictures [B, 3, H, W] in [0, 1]: their feature
    maps, a list of [B, C, h, w]."""
    batch: int = 16
    """Pictures at once through the network. Changes memory, not results."""
    keep: int = 64
    """Reference pictures kept with their feature maps, the latest."""

    def __post_init__(self) -> None:
        demand("reconstruction.lpips_weight", self.lpips_weight, self.lpips_weight >= 0, "0 (none) or more")
        demand("reconstruction.batch", self.batch, self.batch >= 1, "1 or more")
        demand("reconstruction.keep", self.keep, self.keep >= 1, "1 or more")
        if (self.vgg is None) != (self.heads is None):
            raise ConfigError("reconstruction: LPIPS is VGG16 and its linear heads. Set both vgg and heads, or neither.")
        if self.vgg is not None and self.features is not None:
            raise ConfigError("reconstruction: two perceptual distances. Set vgg and heads (LPIPS), or features.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScoreConfig:
    """How sure a classifier is that the picture shows the prompt's class: its log-probability, in nats, 0 at most."""

    classifier: str
    """A classifier's folder (made by `varl pretrain`), or `bundled:NAME`."""
    floor: float = -8.0
    """Lower ones count as this, so that one picture of nothing does not outweigh its group."""

    def __post_init__(self) -> None:
        demand("class_score.floor", self.floor, self.floor < 0, "below 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CLIPScoreConfig:
    """CLIPScore (arXiv 2104.08718): how well the picture fits the prompt's text, 100 max(cosine, 0) as libraries report it (20 to 35)."""

    model: str = "openai/clip-vit-large-patch14"
    """A CLIP: a folder that `transformers` saved, or a hub name. The paper's is openai/clip-vit-base-patch32."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        demand("clip_score.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PickScoreConfig:
    """PickScore (arXiv 2305.01569): which picture people would pick for the prompt's text, exp(logit_scale) cosine (18 to 24)."""

    model: str = "yuvalkirstain/PickScore_v1"
    """A CLIP: a folder that `transformers` saved, or a hub name."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Whose tokenizer and preprocessing: a folder, or a hub name."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        demand("pick_score.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class HPSConfig:
    """HPS v2.1 (arXiv 2306.09341): which picture people would prefer for the prompt's text, a cosine (.2 to .35)."""

    weights: str = "xswu/HPSv2"
    """The released file HPS_v2.1_compressed.pt, or a hub name whose local cache holds it."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """The CLIP that it was tuned from: a folder with its config, tokenizer and preprocessing, or a hub name. Its weights are not needed."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        demand("hps.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRewardConfig:
    """ImageReward (arXiv 2304.05977): which picture people would prefer for the prompt's text, of mean 0 and deviation 1 (-2 to 2)."""

    weights: str = "THUDM/ImageReward"
    """The released file ImageReward.pt, or a hub name whose local cache holds it."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """BERT's: a folder, or a hub name. Its weights are not needed."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        demand("image_reward.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class HPSv3Config:
    """HPSv3 (arXiv 2508.03789): which picture people would prefer for the prompt's text; good ones have about 10."""

    template: str
    """The file hpsv3/dataset/data_collator_qwen.py of its package, in which the network's instruction stands. It is read, not run."""
    weights: str = "MizzenAI/HPSv3"
    """The released file HPSv3.safetensors, or a hub name whose local cache holds it."""
    processor: str = "Qwen/Qwen2-VL-7B-Instruct"
    """The Qwen2-VL that it was tuned from: a folder with its config and tokenizer, or a hub name. Its weights are not needed."""
    batch: int = 8
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        demand("hpsv3.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class AestheticConfig:
    """LAION's aesthetic predictor, version 2: how much people would like the picture, 1 to 10, whatever the prompt."""

    head: str
    """The released file sac+logos+ava1-l14-linearMSE.pth."""
    model: str = "openai/clip-vit-large-patch14"
    """A CLIP: a folder that `transformers` saved, or a hub name."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        demand("aesthetic.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SSIMConfig:
    """Structural similarity to the prompt's reference picture, at most 1."""

    multiscale: bool = False
    """MS-SSIM, over five scales, for which pictures need 176 pixels to a side."""
    batch: int = 64
    """Pictures at once. Changes memory, not results."""
    keep: int = 64
    """Reference pictures kept, the latest."""

    def __post_init__(self) -> None:
        demand("ssim.batch", self.batch, self.batch >= 1, "1 or more")
        demand("ssim.keep", self.keep, self.keep >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class DINOConfig:
    """How alike the picture and the prompt's reference picture look to DINOv2 (arXiv 2304.07193): a cosine."""

    model: str = "facebook/dinov2-base"
    """A folder that `transformers` saved, or a hub name."""
    batch: int = 64
    """Pictures at once through the network. Changes memory, not results."""
    keep: int = 1024
    """Features of reference pictures kept, the latest."""

    def __post_init__(self) -> None:
        demand("dino.batch", self.batch, self.batch >= 1, "1 or more")
        demand("dino.keep", self.keep, self.keep >= 1, "1 or more")


TextRewardConfig = CLIPScoreConfig | PickScoreConfig | HPSConfig | ImageRewardConfig | HPSv3Config
"""Rewards that read the prompt's text."""


NetworkRewardConfig = TextRewardConfig | AestheticConfig | DINOConfig
"""Rewards whose weights lie in files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenEvalConfig:
    """GenEval (arXiv 2310.11513): whether a detector finds the prompt's `objects`, as many, of their colours and in their places."""

    score: Literal["graded", "correct"] = "graded"
    """graded is the mean over the prompt's conditions of the share to which each is met; correct is what GenEval counts, 0 or 1."""
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """A Mask2Former, DETR, RT-DETR or GroundingDINO: a folder that `transformers` saved, or a hub name."""
    clip: str = "openai/clip-vit-large-patch14"
    """A CLIP, which names colours: likewise."""
    threshold: float = 0.3
    """How sure the detector must be. GenEval's, of Mask2Former; other detectors may need another."""
    counting_threshold: float = 0.9
    """The same for prompts that say how many there shall be at most of something that they ask for."""
    batch: int = 8
    """Pictures at once through the detector. Changes memory, not results."""

    def __post_init__(self) -> None:
        for name in ("threshold", "counting_threshold"):
            demand(f"geneval.{name}", getattr(self, name), 0 <= getattr(self, name) < 1, "0 or more, and below 1")
        demand("geneval.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundingDINOConfig:
    """T2I-R1's detector reward (arXiv 2505.00703), which MAR-GRPO has too: whether GroundingDINO finds the prompt's `objects`, as many and
    in their places; in [0, 1]."""

    form: Literal["corrected", "paper"] = "corrected"
    """paper is the released code, where "above" is never right and "next to" always, and where the boxes of a class are thinned out by
    another measure than how far they cover each other."""
    model: str = "IDEA-Research/grounding-dino-base"
    """A GroundingDINO: a folder that `transformers` saved, or a hub name. T2I-R1's is IDEA-Research/grounding-dino-tiny."""
    threshold: float = 0.3
    """How sure it must be."""
    batch: int = 8
    """Pictures at once through the network. Changes memory, not results."""

    def __post_init__(self) -> None:
        demand("grounding_dino.threshold", self.threshold, 0 <= self.threshold < 1, "0 or more, and below 1")
        demand("grounding_dino.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class VQAConfig:
    """How sure a model that answers questions is of each of the prompt's `objects`: "red dog?", p(yes) / (p(yes) + p(no)), in [0, 1]."""

    model: str = "microsoft/git-large-vqav2"
    """A GIT, as T2I-R1 and MAR-GRPO have it, or a BLIP, Salesforce/blip-vqa-base, as T2I-CompBench: a folder that `transformers` saved, or
    a hub name."""
    combine: Literal["mean", "product"] = "mean"
    """Over the prompt's objects. mean is T2I-R1's, product T2I-CompBench's, of which no object has a share."""
    batch: int = 16
    """Pictures at once through the network, with all that they are asked. Changes memory, not results."""

    def __post_init__(self) -> None:
        demand("vqa.batch", self.batch, self.batch >= 1, "1 or more")


ObjectRewardConfig = GenEvalConfig | GroundingDINOConfig | VQAConfig
"""Rewards that look for the prompt's `objects`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRewardConfig:
    """Whatever `varl reward-serve` serves, in another process or on another machine."""

    url: str
    """The address that it prints: http://HOST:PORT."""
    timeout: float = 60.0
    """Seconds for one chunk of pictures, all tries together, after which they are NaN."""
    retries: int = 4
    """Further tries where the answer is none."""
    backoff: float = 0.5
    """Seconds before the first of them; before each later one twice as long."""
    break_after: int = 3
    """Chunks without an answer, in a row, after which the service is not asked for a while."""
    rest: float = 30.0
    """Seconds of that while; pictures are NaN at once."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"http://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?/?", self.url):
            raise ConfigError(f"served.url={self.url!r}: must be http://HOST:PORT, as `varl reward-serve` prints it.")
        demand("served.timeout", self.timeout, 0 < self.timeout < math.inf, "above 0 and finite")
        demand("served.retries", self.retries, self.retries >= 0, "0 (none) or more")
        demand("served.backoff", self.backoff, self.backoff >= 0, "0 or more")
        demand("served.break_after", self.break_after, self.break_after >= 1, "1 or more")
        demand("served.rest", self.rest, self.rest >= 0, "0 (never stop asking) or more")


RewardConfig = (
    OCRConfig
    | PythonRewardConfig
    | ReconstructionConfig
    | ClassScoreConfig
    | NetworkRewardConfig
    | ObjectRewardConfig
    | SSIMConfig
    | ServedRewardConfig
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedReward:
    reward: RewardConfig = OCRConfig()
    weight: float = 1.0
    """0 is watched alone."""

    def __post_init__(self) -> None:
        demand("weight", self.weight, math.isfinite(self.weight), "finite")
