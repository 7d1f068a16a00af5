"""VAR RL Done Right (arXiv 2601.02256)."""

from dataclasses import replace

from varl.config import EvalConfig, GRPOConfig, MiddleStep, OCRConfig, OptimConfig, RunConfig, TrainConfig, VARRLConfig, WeightedReward
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
