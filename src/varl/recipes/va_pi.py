"""VA-pi (arXiv 2512.19680): its settings (table 7, and where that is silent the released scripts), ours at the size of a laptop, and the
baselines that it is held against. Model folders are made by `varl convert`; the other paths are placeholders for files of yours."""

from dataclasses import replace

from varl.config import (
    GRPOConfig,
    OptimConfig,
    PicturesConfig,
    PixelLossConfig,
    PretrainConfig,
    ReconstructionConfig,
    RunConfig,
    TrainConfig,
    VAPIConfig,
    WeightedReward,
)
from varl.recipes import pretrain

LPIPS = ReconstructionConfig(vgg="models/vgg16-397923af.pth", heads="models/lpips_vgg_v0.1.pth")
"""torchvision's VGG16 and LPIPS's own heads."""


def _paper(name: str, model: str, data: PicturesConfig, steps: int, prefix_noise: float, lr: float = 1e-6) -> RunConfig:
    return RunConfig(
        name=name,
        model=model,
        data=data,
        rewards={"reconstruction": WeightedReward(reward=LPIPS)},
        algorithm=VAPIConfig(
            grpo=GRPOConfig(num_generations=8, epsilon=0.2, beta=0.0, loss_type="dapo", rollouts_per_chunk=128),
            prefix_noise=prefix_noise,
            prior_weight=0.1,
        ),
        train=TrainConfig(
            steps=steps,
            prompts_per_step=128,
            rollouts_per_backward=144,  # 16 pictures: their 8 draws and their own tokens
            dtype="bfloat16",
            optim=OptimConfig(lr=lr, betas=(0.9, 0.999), weight_decay=1e-4),
        ),
    )


def llamagen_xl_c2i() -> RunConfig:
    """LlamaGen-XL by class, 384 pixels: 100 steps of 128 pictures, no prefix noise."""
    data = PicturesConfig(path="data/imagenet/train", image_size=(384, 384), share=0.01)
    return _paper("va_pi/llamagen_xl_c2i", "models/llamagen_xl_c2i_384", data, 100, 0.0)


def llamagen_xxl_c2i() -> RunConfig:
    """LlamaGen-XXL by class, 384 pixels: as XL."""
    return replace(llamagen_xl_c2i(), name="va_pi/llamagen_xxl_c2i", model="models/llamagen_xxl_c2i_384")


def llamagen_xl_t2i() -> RunConfig:
    """LlamaGen-XL by caption, 256 pixels: 200 steps, half of the prefix replaced."""
    data = PicturesConfig(path="data/laion_coco", image_size=(256, 256))
    return _paper("va_pi/llamagen_xl_t2i", "models/llamagen_xl_t2i_256", data, 200, 0.5)


def janus_pro_1b() -> RunConfig:
    """Janus-Pro-1B, 384 pixels: 100 steps, prefix noise .95 and learning rate 1e-7 as printed; we advise .5 (docs/methods/va_pi.md)."""
    data = PicturesConfig(path="data/flux_reason", image_size=(384, 384))
    return _paper("va_pi/janus_pro_1b", "deepseek-community/Janus-Pro-1B", data, 100, 0.95, lr=1e-7)


# ---- letters, on two CPU cores ----------------------------------------------------------------------------------------------------------


def glyphs_cpu() -> RunConfig:
    """Letters in many hands, on two CPU cores in a minute or two. All numbers are ours."""
    return RunConfig(
        name="va_pi/glyphs_cpu",
        model="bundled:glyphs",
        data=pretrain.GLYPHS,
        rewards={"reconstruction": WeightedReward(reward=ReconstructionConfig(features="bundled:glyphs_reward", batch=64, keep=256))},
        algorithm=VAPIConfig(
            grpo=GRPOConfig(num_generations=8, beta=0.0, loss_type="dapo", rollouts_per_chunk=64),
            prior_weight=1.0,
            drop_condition=0.0,  # the base never learned what no class means
        ),
        train=TrainConfig(
            steps=400,
            prompts_per_step=32,
            rollouts_per_backward=72,
            save_every=100,
            image_every=50,
            optim=OptimConfig(lr=3e-4, warmup_steps=10, schedule="linear"),
        ),
    )


def _but(name: str, **changes: object) -> RunConfig:
    """`glyphs_cpu` with another objective."""
    ours = glyphs_cpu()
    assert isinstance(ours.algorithm, VAPIConfig)
    return replace(ours, name=f"va_pi/{name}", algorithm=replace(ours.algorithm, **changes))


def glyphs_cpu_shuffled() -> RunConfig:
    """Control: the rewards of a picture's draws dealt out anew at random."""
    return _but("glyphs_cpu_shuffled", shuffle_rewards=True)


def glyphs_cpu_reward_only() -> RunConfig:
    """Ablation: no cross-entropy of the pictures' own tokens."""
    return _but("glyphs_cpu_reward_only", prior_weight=0.0)


def glyphs_cpu_noisy() -> RunConfig:
    """Ablation: a quarter of the prefix replaced."""
    return _but("glyphs_cpu_noisy", prefix_noise=0.25)


def glyphs_cpu_mse() -> RunConfig:
    """Ablation: paid by pixels alone."""
    return replace(
        glyphs_cpu(),
        name="va_pi/glyphs_cpu_mse",
        rewards={"reconstruction": WeightedReward(reward=ReconstructionConfig(lpips_weight=0.0, batch=64, keep=256))},
    )


def glyphs_cpu_ce() -> PretrainConfig:
    """Baseline: the same steps, pictures and rates, with the cross-entropy of the pictures' own tokens alone."""
    ours, base = glyphs_cpu(), pretrain.glyphs_cpu()
    return replace(
        base,
        name="va_pi/glyphs_cpu_ce",
        init="bundled:glyphs",
        pictures=20_000,
        steps=ours.train.steps,
        batch=ours.train.prompts_per_step,
        optim=ours.train.optim,
    )


def _pixels(name: str, loss: PixelLossConfig) -> PretrainConfig:
    return replace(glyphs_cpu_ce(), name=f"va_pi/{name}", pixel_loss=loss)


def _reconstruction() -> ReconstructionConfig:
    reward = glyphs_cpu().rewards["reconstruction"].reward
    assert isinstance(reward, ReconstructionConfig)
    return reward


def glyphs_cpu_ste() -> PretrainConfig:
    """Baseline: the gradient of the pixels through a straight-through one-hot (appendix C.1), with the same prior."""
    return _pixels("glyphs_cpu_ste", PixelLossConfig(trains="transformer", reconstruction=_reconstruction(), prior_weight=1.0))


def glyphs_cpu_decoder() -> PretrainConfig:
    """Baseline: the tokenizer's decoder learns to draw what the transformer makes of a picture (appendix C.2)."""
    return _pixels("glyphs_cpu_decoder", PixelLossConfig(trains="decoder", reconstruction=_reconstruction()))
