"""AR-GRPO (arXiv 2508.06924): plain GRPO on pictures drawn freely, guidance replayed as it was drawn."""

from varl.config import GRPOConfig, LawConfig, OptimConfig, PicturesConfig, PythonRewardConfig, RunConfig, TrainConfig, WeightedReward


def llamagen_xl_c2i() -> RunConfig:
    """LlamaGen-XL by class, 384 pixels, guidance 2, 400 steps of 32 classes; its rewards are yours to name."""
    law = LawConfig(cfg_scale=(2.0,))
    return RunConfig(
        name="ar_grpo/llamagen_xl_c2i",
        model="models/llamagen_xl_c2i_384",
        data=PicturesConfig(path="data/imagenet/train", image_size=(384, 384)),
        rewards={"preference": WeightedReward(reward=PythonRewardConfig(target="my_reward.py:preference"))},
        algorithm=GRPOConfig(num_generations=8, beta=0.1, kl_estimator="k3", loss_type="grpo", rollouts_per_chunk=64),
        sample_law=law,
        score_law=law,
        train=TrainConfig(steps=400, prompts_per_step=32, rollouts_per_backward=16, dtype="bfloat16", optim=OptimConfig(lr=1e-5)),
    )
