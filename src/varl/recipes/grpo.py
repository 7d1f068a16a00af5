"""Plain GRPO: the baselines."""

from dataclasses import replace

from varl.config import GRPOConfig, OCRConfig, RunConfig, WeightedReward
from varl.recipes import var_rl


def words_cpu() -> RunConfig:
    """Plain GRPO on var_rl/words_cpu's model and words: no PANW, no stages, one advantage per picture."""
    return replace(
        var_rl.words_cpu(),
        name="grpo/words_cpu",
        rewards={"ocr": WeightedReward(reward=OCRConfig(score="mixed"))},
        algorithm=GRPOConfig(num_generations=16, beta=0.0, loss_type="dapo"),
    )
