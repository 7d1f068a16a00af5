"""VAR RL Done Right (arXiv 2601.02256). Folders of released models are made by `varl convert`; `data/...` and `my_reward.py` are
placeholders for files of yours. The paper's own base model, prompts and code are not public."""

from dataclasses import replace

from varl.config import (
    CLIPScoreConfig,
    EvalConfig,
    FolderConfig,
    GRPOConfig,
    LawConfig,
    MiddleStep,
    MonitorConfig,
    OCRConfig,
    OptimConfig,
    PicturesConfig,
    PythonRewardConfig,
    RunConfig,
    TrainConfig,
    VARRLConfig,
    WeightedReward,
)
from varl.recipes.pretrain import WORDS, WORDS_H200


def words_cpu() -> RunConfig:
    """Words that read, on two CPU cores in minutes: what measurement says is right at this size. All numbers are ours."""
    return RunConfig(
        name="var_rl/words_cpu",
        model="bundled:words",
        data=WORDS,
        rewards={"ocr": WeightedReward(reward=OCRConfig(score="letters"))},
        algorithm=VARRLConfig(
            grpo=GRPOConfig(
                num_generations=16,
                panw_alpha=0.0,
                region_credit=True,
                beta=0.0,
                loss_type="dapo",
                rollouts_per_chunk=16,  # small, so that the reader is never waited for where two processes share the step
            ),
            # at 90 tokens the whole picture is the best prefix, and PANW beside letter credit gained nothing over five seeds
            middle_step=MiddleStep(resolution=1.0),
            num_continuations=1,
            prefix_updates=1,
            suffix_updates=0,
        ),
        train=TrainConfig(steps=220, prompts_per_step=6, image_every=20, optim=OptimConfig(lr=1.5e-4, warmup_steps=10, schedule="linear")),
        eval=EvalConfig(every=55, samples=64),
    )


def words_cpu_paper() -> RunConfig:
    """The same with the paper's switches: K = 2, log-mean-exp at eta 1, 3:1 cycle, masks from the boxes that were read, KL."""
    ours = words_cpu()
    return replace(
        ours,
        name="var_rl/words_cpu_paper",
        rewards={"ocr": WeightedReward(reward=OCRConfig(score="paper"))},
        algorithm=VARRLConfig(
            grpo=GRPOConfig(num_generations=16, panw_alpha=0.7, mask="direct", beta=0.01, loss_type="dapo"),  # beta: ours, theirs unprinted
            middle_step=MiddleStep(index=3),  # 11 % of the tokens; m_256 is 8.9 %
            num_continuations=2,
            middle_return="log_mean_exp",
            eta=1.0,
            prefix_updates=3,
            suffix_updates=1,
        ),
    )


def words_h200() -> RunConfig:
    """128x128, two to five words, 69 M parameters, 680 tokens, one H200. Settings planned; not measured on GPU."""
    return RunConfig(
        name="var_rl/words_h200",
        model="runs/pretrain/words_h200/model",
        data=WORDS_H200,
        rewards={"ocr": WeightedReward(reward=OCRConfig(score="letters", workers=14))},
        algorithm=VARRLConfig(
            grpo=GRPOConfig(num_generations=16, panw_alpha=0.7, region_credit=True, beta=0.0, loss_type="dapo", rollouts_per_chunk=128),
            middle_step=MiddleStep(token_share=0.089),  # the paper's m_256 of 1024, by token share
            num_continuations=1,
        ),
        train=TrainConfig(
            steps=700,
            prompts_per_step=16,  # P and G as in the paper
            rollouts_per_backward=128,
            dtype="bfloat16",
            optim=OptimConfig(lr=5e-5, weight_decay=0.05, warmup_steps=20, schedule="linear"),
        ),
        eval=EvalConfig(every=100, samples=256, batch=256),
    )


# ---- released models --------------------------------------------------------------------------------------------------------------------


def infinity_2b_text() -> RunConfig:
    """Infinity-2B at 1024 pixels, words in captions: VMR, PANW and mask propagation with the paper's numbers. Not measured.

    By `varl plan` 69 GB: a picture is 10,521 tokens, whose caches and activations are held for a few pictures at once."""
    return RunConfig(
        name="var_rl/infinity_2b_text",
        model="models/infinity_2b",  # ours: the paper's is NextFlow-7B, of codes where this one has bits
        data=FolderConfig(path="data/text_prompts", heldout="data/text_prompts_heldout"),
        rewards={"ocr": WeightedReward(reward=OCRConfig(score="paper", workers=4))},  # workers: ours
        monitor=MonitorConfig(held_out={"clip": CLIPScoreConfig()}),  # ours: 64 pictures a step, little beside drawing 256
        algorithm=VARRLConfig(
            grpo=GRPOConfig(
                num_generations=16,
                panw_alpha=0.7,  # ours, amid the robust 0.6 to 0.8; the final run's is unprinted
                mask="direct",  # ours: the paper masks by the boxes that were read, and does not say which tokens a box has
                beta=0.01,  # ours, and so is the estimator: the paper draws a KL to a reference and prints no weight
                loss_type="dapo",
                rollouts_per_chunk=32,
            ),
            middle_step=MiddleStep(resolution=0.25),  # m_256 of 1024: the grid of 16 x 16, 5 % of the tokens
            num_continuations=2,
            middle_return="log_mean_exp",
            eta=1.0,
            prefix_updates=3,
            suffix_updates=1,
        ),
        sample_law=LawConfig(cfg_scale=(5.0,), top_k=2, top_p=0.9),  # top_k: of a bit's two values it cuts none
        score_law=LawConfig(),  # as printed: drawn under guidance and scored without, so off its own policy
        train=TrainConfig(
            steps=1200,
            prompts_per_step=16,
            rollouts_per_backward=1,
            rollouts_per_draw=4,
            gradient_checkpointing=True,
            dtype="bfloat16",
            save_every=50,
            optim=OptimConfig(lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05),  # lr: the paper prints 1e-6 and 1e-5
        ),
        eval=EvalConfig(every=100, samples=64, batch=16),
    )


def _by_class(depth: int, side: int, *, at_once: int = 32, gradient_checkpointing: bool = False) -> RunConfig:
    """VAR by class, where the paper has no experiment: PANW 0.7, K = 1, its m_256 by token share, 3:1, no guidance; its P, G, betas and
    weight decay. All other numbers are ours; those of memory so that one GPU of 141 GB is enough."""
    return RunConfig(
        name=f"var_rl/var_d{depth}_c2i",
        model=f"models/var_d{depth}",
        data=PicturesConfig(path="data/imagenet/train", image_size=(side, side)),
        rewards={"preference": WeightedReward(reward=PythonRewardConfig(target="my_reward.py:preference"))},
        algorithm=VARRLConfig(
            grpo=GRPOConfig(num_generations=16, panw_alpha=0.7, beta=0.02, loss_type="dapo", rollouts_per_chunk=64),
            middle_step=MiddleStep(token_share=0.089),
            num_continuations=1,
            prefix_updates=3,
            suffix_updates=1,
        ),
        train=TrainConfig(
            steps=400,
            prompts_per_step=16,
            rollouts_per_backward=at_once,
            rollouts_per_draw=at_once,
            gradient_checkpointing=gradient_checkpointing,
            dtype="bfloat16",
            optim=OptimConfig(lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05),
        ),
    )


def var_d16_c2i() -> RunConfig:
    """VAR-d16 by class, 256 pixels; its reward is yours to name. Settings ours, not measured."""
    return _by_class(16, 256)


def var_d20_c2i() -> RunConfig:
    """VAR-d20 by class, 256 pixels: as d16."""
    return _by_class(20, 256)


def var_d24_c2i() -> RunConfig:
    """VAR-d24 by class, 256 pixels: as d16."""
    return _by_class(24, 256)


def var_d30_c2i() -> RunConfig:
    """VAR-d30 by class, 256 pixels: as d16, half as many pictures at once."""
    return _by_class(30, 256, at_once=16)


def var_d36_c2i() -> RunConfig:
    """VAR-d36 by class, 512 pixels: as d16, half as many pictures at once, and blocks computed again in the backward pass."""
    return _by_class(36, 512, at_once=16, gradient_checkpointing=True)
