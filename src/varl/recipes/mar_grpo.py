"""MAR-GRPO (arXiv 2604.06966): its settings, as far as paper and release tell them, and ours at the size of a laptop. Model folders are
made by `varl convert`; the other paths are placeholders for files of yours, and so is the reward, which is HPS v2.1 in the paper."""

from dataclasses import replace

from varl.config import (
    ClassScoreConfig,
    FolderConfig,
    GRPOConfig,
    LawConfig,
    MARGRPOConfig,
    OptimConfig,
    PicturesConfig,
    PythonRewardConfig,
    RunConfig,
    TrainConfig,
    UnmaskingConfig,
    WeightedReward,
    mar_guidance,
)
from varl.recipes import pretrain

PREFERENCE = {"preference": WeightedReward(reward=PythonRewardConfig(target="my_reward.py:preference"))}


def _paper(name: str, model: str, data: FolderConfig | PicturesConfig, law: LawConfig, *, lr: float, paths: int) -> RunConfig:
    """12 of 64 steps, 10 of 25 moves, groups of 4, KL weight 0.01; one optimizer step for each batch of rollouts, where the release takes
    12. The unit of a step is ours: the release has one prompt on each of 3 GPUs, which is too little to learn from. A picture is trained on
    at 12 steps, guided: blocks are computed again in the backward pass, so that one GPU of 141 GB is enough."""
    return RunConfig(
        name=name,
        model=model,
        data=data,
        rewards=PREFERENCE,
        algorithm=MARGRPOConfig(
            grpo=GRPOConfig(num_generations=4, beta=0.01, loss_type="dapo", rollouts_per_chunk=32),
            ar_steps=12,
            denoise_moves=10,
            num_trajectories=paths,
        ),
        sample_law=law,
        score_law=law,
        unmasking=UnmaskingConfig(steps=64, denoise_steps=25),
        train=TrainConfig(
            steps=1200,
            prompts_per_step=24,
            rollouts_per_backward=2 * (1 + paths),
            gradient_checkpointing=True,
            dtype="bfloat16",
            save_every=50,
            optim=OptimConfig(lr=lr, betas=(0.9, 0.999)),
        ),
    )


def nova_512() -> RunConfig:
    """NOVA-0.6B at 512 pixels: guidance 5, 3 further paths, learning rate 2e-6."""
    data = FolderConfig(path="data/t2i_compbench")
    return _paper("mar_grpo/nova_512", "models/nova_d48w1024_sd512", data, LawConfig(cfg_scale=(5.0,)), lr=2e-6, paths=3)


def harmon_1_5b() -> RunConfig:
    """Harmon-1.5B at 512 pixels: guidance 3, 5 further paths, learning rate 1e-6."""
    data = FolderConfig(path="data/t2i_compbench")
    return _paper("mar_grpo/harmon_1_5b", "models/harmon_1_5b", data, LawConfig(cfg_scale=(3.0,)), lr=1e-6, paths=5)


def mar_b_c2i() -> RunConfig:
    """MAR-B by class, 256 pixels, with the authors' linear guidance to 2.9; ours, for the paper has no class-conditional model."""
    law = LawConfig(cfg_scale=mar_guidance(2.9, 256, 64))
    data = PicturesConfig(path="data/imagenet/train", image_size=(256, 256))
    paper = _paper("mar_grpo/mar_b_c2i", "models/mar_base", data, law, lr=2e-6, paths=4)
    return replace(paper, unmasking=UnmaskingConfig(steps=64, denoise_steps=100))


def released(ours: RunConfig, name: str) -> RunConfig:
    """`ours` as the authors' code trains: on all tokens that a step does not know, filtered by consistency, further paths in place of the
    first at its advantage, scored without the guidance that they were drawn under."""
    assert isinstance(ours.algorithm, MARGRPOConfig)
    grpo = replace(ours.algorithm.grpo, loss_type="grpo")
    algorithm = replace(ours.algorithm, grpo=grpo, trajectories="release", support="unknown", consistency=0.0)
    return replace(ours, name=name, algorithm=algorithm, score_law=replace(ours.score_law, cfg_scale=(1.0,)))


def nova_512_release() -> RunConfig:
    """NOVA-0.6B as the authors' code trains it, but for its defects."""
    return released(nova_512(), "mar_grpo/nova_512_release")


# ---- letters, on two CPU cores ----------------------------------------------------------------------------------------------------------


def glyphs_cpu() -> RunConfig:
    """Letters that a classifier knows, on two CPU cores in a few minutes. All numbers are ours."""
    return RunConfig(
        name="mar_grpo/glyphs_cpu",
        model="bundled:glyphs_mar",
        data=pretrain.GLYPHS,
        rewards={"class": WeightedReward(reward=ClassScoreConfig(classifier="bundled:glyphs_reward"))},
        algorithm=MARGRPOConfig(
            grpo=GRPOConfig(num_generations=12, beta=0.01, loss_type="dapo", rollouts_per_chunk=72),
            ar_steps=0,
            denoise_moves=6,
            num_trajectories=2,
        ),
        unmasking=UnmaskingConfig(steps=4, denoise_steps=15),
        train=TrainConfig(
            steps=48,
            prompts_per_step=12,
            rollouts_per_backward=72,
            save_every=12,
            image_every=12,
            optim=OptimConfig(lr=3e-4, warmup_steps=5, schedule="linear"),
        ),
    )


def glyphs_cpu_release() -> RunConfig:
    """Letters in the released form."""
    return released(glyphs_cpu(), "mar_grpo/glyphs_cpu_release")
