"""Plain GRPO (arXiv 2402.03300), and GRPO with one part added."""

from varl.config import EvalConfig, GRPOConfig, OCRConfig, OptimConfig, RunConfig, TrainConfig, WeightedReward
from varl.recipes.pretrain import WORDS


def words_cpu() -> RunConfig:
    """Words that read, on two CPU cores in minutes: one-stage GRPO, no PANW, no masks. The numbers are ours."""
    return RunConfig(
        name="grpo/words_cpu",
        model="bundled:words",
        data=WORDS,
        rewards={"ocr": WeightedReward(reward=OCRConfig(score="mixed"))},
        algorithm=GRPOConfig(num_generations=16, panw_alpha=0.0, beta=0.0, loss_type="dapo"),
        train=TrainConfig(steps=200, prompts_per_step=6, optim=OptimConfig(lr=2e-4, warmup_steps=5)),
        eval=EvalConfig(every=50, samples=64),
    )
