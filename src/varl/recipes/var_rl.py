"""VAR RL Done Right (arXiv 2601.02256)."""

from varl.config import EvalConfig, GRPOConfig, MiddleStep, OCRConfig, OptimConfig, RunConfig, TrainConfig, VARRLConfig, WeightedReward
from varl.recipes.pretrain import WORDS


def words_cpu() -> RunConfig:
    """Words that read, on two CPU cores in minutes: PANW, region credit, K = 1."""
    return RunConfig(
        name="var_rl/words_cpu",
        model="bundled:words",
        data=WORDS,
        rewards={"ocr": WeightedReward(reward=OCRConfig(score="mixed"))},
        algorithm=VARRLConfig(grpo=GRPOConfig(num_generations=16, panw_alpha=0.7, beta=0.0, loss_type="dapo")),
        train=TrainConfig(steps=200, prompts_per_step=6, optim=OptimConfig(lr=2e-4, warmup_steps=5)),
        eval=EvalConfig(every=50, samples=64),
    )
