"""Base models from scratch, and trained on."""

from varl.config import NextScaleConfig, OptimConfig, PretrainConfig, TextConfig, TokenizerConfig, WordsConfig

WORDS = WordsConfig(image_size=(16, 64), fonts=("sans", "serif", "mono"), palettes=("ink", "sea", "fire", "moss"), jitter=0)
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
        pictures=3000,
        tokenizer_steps=2000,
        warmup_share=0.4,
        steps=2200,
        batch=16,
        optim=OptimConfig(name="muon", lr=3e-3, schedule="linear", warmup_steps=10),
        save_every=250,
    )
