"""Base models from scratch, and trained on."""

from varl.config import NextScaleConfig, OptimConfig, PretrainConfig, TextConfig, TokenizerConfig, WordsConfig

WORDS = WordsConfig(image_size=(16, 64), fonts=("sans", "mono"), palettes=("ink", "sea", "fire"), jitter=0)
"""One word of 3 to 5 letters; the prompt names face and colours."""


def words_model() -> NextScaleConfig:
    """1.2 M parameters, 90 tokens on 5 scales, 128 codes: what two CPU cores can train by reinforcement in minutes."""
    tokenizer = TokenizerConfig(vocab=128, channels=8, width=64, multipliers=(1,), blocks=1, attention=False, patch=4)
    text = TextConfig(styles=WORDS.fonts + WORDS.palettes, max_length=12)
    return NextScaleConfig(
        depth=3, width=128, heads=4, grids=((1, 1), (1, 3), (1, 6), (2, 8), (4, 16)), mlp_ratio=3.0, text=text, tokenizer=tokenizer
    )


def words_cpu() -> PretrainConfig:
    """The base model of the words demo, as bundled: about 25 minutes on one core."""
    return PretrainConfig(
        name="pretrain/words_cpu",
        model=words_model(),
        data=WORDS,
        pictures=6000,
        tokenizer_steps=1500,
        steps=4000,
        batch=16,
        optim=OptimConfig(name="muon", lr=3e-3, schedule="linear", warmup_steps=10),
        save_every=250,
    )


def continued(base: str, cpu_seconds: float, seed: int) -> PretrainConfig:
    """The control of post-training: the base trained on, on its own pictures, for so much CPU time. Half the learning rate, then down to 0."""
    words = words_cpu()
    return PretrainConfig(
        name="pretrain/continued",
        model=words.model,
        data=words.data,
        pictures=words.pictures,
        steps=1_000_000,
        batch=words.batch,
        optim=OptimConfig(name="muon", lr=1.5e-3, muon_lr=0.01, schedule="linear", warmup_steps=10),
        init=base,
        max_cpu_seconds=cpu_seconds,
        save_every=100,
        seed=seed + 1,
    )
