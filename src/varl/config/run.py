"""A run of post-training."""

from dataclasses import dataclass, field
from typing import Literal

from varl.config.algorithms import AlgorithmConfig, GRPOConfig, MARGRPOConfig, VAPIConfig
from varl.config.data import DataConfig, WordsConfig
from varl.config.demand import demand
from varl.config.laws import LawConfig, UnmaskingConfig
from varl.config.monitor import MonitorConfig
from varl.config.rewards import RewardConfig, WeightedReward
from varl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the matrices inside blocks, AdamW for the rest."""
    lr: float = 1e-4
    """AdamW's learning rate."""
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "linear"] = "constant"
    """linear decays to 0 at the last step."""
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        demand("optim.lr", self.lr, self.lr >= 0, "0 or more")
        demand("optim.muon_lr", self.muon_lr, self.muon_lr >= 0, "0 or more")
        demand("optim.weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        demand("optim.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 (none) or more")
        demand("optim.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0; inf does not clip")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685), trained in the place of the weights, which stay as they are."""

    r: int = 32
    """Rank."""
    lora_alpha: float = 32.0
    """An adapter's product is scaled by lora_alpha / r. Learning rates are some ten times those of the weights themselves."""
    target_modules: tuple[str, ...] = ()
    """Linear layers by name, or by the last parts of their names, such as `attn.mat_qkv`; none: all in the transformer's blocks that would
    be trained without adapters."""

    def __post_init__(self) -> None:
        demand("lora.r", self.r, self.r >= 1, "1 or more")
        demand("lora.lora_alpha", self.lora_alpha, self.lora_alpha > 0, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    every: int = 0
    """Steps between held-out evaluations during training; 0 is never."""
    samples: int = 128
    seed: int = 1234
    batch: int = 64

    def __post_init__(self) -> None:
        demand("eval.every", self.every, self.every >= 0, "0 (never) or more")
        demand("eval.samples", self.samples, self.samples >= 1, "1 or more")
        demand("eval.batch", self.batch, self.batch >= 1, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int = 100
    """Optimizer updates (rollout batches; each has num_iterations optimizer steps)."""
    max_seconds: float = 0.0
    """Stop after so much time in training steps, counted over interruptions; 0 is no limit."""
    prompts_per_step: int = 8
    """P, over all ranks."""
    rollouts_per_backward: int = 64
    """Micro-batch. Changes memory, not results."""
    rollouts_per_draw: int = 0
    """Pictures of a chunk that are drawn at once; 0 draws all. Changes memory, not results."""
    gradient_checkpointing: bool = False
    """Keeps the transformer's blocks' inputs alone for the backward pass, and computes the blocks again. Changes memory and time, not
    results."""
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig | None = None
    """Trains adapters of the transformer; the head of a masked model then stays frozen. None trains the weights."""
    ema_decay: float = 0.0
    """0 keeps no moving average."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast around the model; weights, log-probs and optimizer stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    save_every: int = 20
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept besides the newest milestone."""
    image_every: int = 10
    """Steps between picture grids at fixed prompts and seeds."""
    max_failed_rewards: float = 0.2
    """Share of a step's pictures whose reward may fail before the run stops."""
    idle_steps: int = 20
    """Stop after so many steps in a row that taught nothing (all advantages 0)."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "rollouts_per_backward", "save_every", "keep", "idle_steps"):
            demand(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("rollouts_per_draw", "image_every", "max_seconds"):
            demand(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, "0 (none) or more")
        demand("train.ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "at least 0 (none) and below 1")
        demand("train.max_failed_rewards", self.max_failed_rewards, 0 <= self.max_failed_rewards <= 1, "a share, 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A post-training run, whole."""

    name: str = "run"
    model: str
    """A model folder (config.yaml, model.safetensors, tokenizer.safetensors), `bundled:NAME`, or a Janus-Pro as `transformers` keeps it: a
    folder, or a name on the Hugging Face hub, looked for in the local cache."""
    data: DataConfig = WordsConfig()
    rewards: dict[str, WeightedReward] = field(default_factory=lambda: {"ocr": WeightedReward()})
    algorithm: AlgorithmConfig = GRPOConfig()
    sample_law: LawConfig = LawConfig()
    score_law: LawConfig = LawConfig()
    unmasking: UnmaskingConfig | None = None
    """Of masked models, which need it, and of no others."""
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()
    seed: int = 0

    @property
    def asked(self) -> dict[str, RewardConfig]:
        """Every reward that is asked, learned from or held out, by its place here."""
        learned = {f"rewards.{name}": part.reward for name, part in self.rewards.items()}
        return learned | {f"monitor.held_out.{name}": reward for name, reward in self.monitor.held_out.items()}

    def __post_init__(self) -> None:
        for held, reward in self.monitor.held_out.items():
            if learned := [name for name, part in self.rewards.items() if part.weight and part.reward == reward]:
                raise ConfigError(
                    f"monitor.held_out.{held}: is rewards.{learned[0]}, which is learned from. Hold out another, or give that one weight 0."
                )
        if self.train.lora is not None and isinstance(self.algorithm, MARGRPOConfig) and self.algorithm.train_head:
            raise ConfigError(
                "train.lora with mar_grpo.train_head=true: adapters are the transformer's, and the head stays frozen beside them. Leave "
                "one of the two out."
            )
        if not self.score_law.top_k and self.score_law.top_p == 1:
            return
        filtered = f"score_law.top_k={self.score_law.top_k}, top_p={self.score_law.top_p}"
        if self.algorithm.grpo.beta > 0:
            raise ConfigError(
                f"{filtered} with grpo.beta={self.algorithm.grpo.beta}: the KL to a reference that has cut a token away is infinite. "
                "Score without a filter, or set beta=0."
            )
        if isinstance(self.algorithm, VAPIConfig) and self.algorithm.prior_weight > 0:
            raise ConfigError(
                f"{filtered} with va_pi.prior_weight={self.algorithm.prior_weight}: the cross-entropy of a token that was cut away is "
                "infinite. Score without a filter, or set prior_weight=0."
            )
