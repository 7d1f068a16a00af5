"""Plain GRPO: the baselines."""

from dataclasses import replace

from varl.config import GRPOConfig, MARGRPOConfig, OCRConfig, RunConfig, WeightedReward
from varl.recipes import mar_grpo, var_rl


def words_cpu() -> RunConfig:
    """Plain GRPO on var_rl/words_cpu's model and words: no PANW, no stages, one advantage per picture."""
    return replace(
        var_rl.words_cpu(),
        name="grpo/words_cpu",
        rewards={"ocr": WeightedReward(reward=OCRConfig(score="mixed"))},
        algorithm=GRPOConfig(num_generations=16, beta=0.0, loss_type="dapo"),
    )


def glyphs_mar_cpu() -> RunConfig:
    """GRPO end to end on mar_grpo/glyphs_cpu's model and letters: the head learns too, no further paths."""
    return replace(
        mar_grpo.glyphs_cpu(),
        name="grpo/glyphs_mar_cpu",
        algorithm=MARGRPOConfig(
            grpo=GRPOConfig(num_generations=12, beta=0.01, loss_type="dapo", rollouts_per_chunk=72),
            ar_steps=0,
            denoise_moves=6,
            num_trajectories=0,
            train_head=True,
        ),
    )
