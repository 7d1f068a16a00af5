"""Base models from scratch, and trained on."""

from varl.config import NextScaleConfig, OptimConfig, PretrainConfig, TextConfig, TokenizerConfig, WordsConfig

WORDS = WordsConfig(image_size=(16, 64), fonts=("mono",), palettes=("indigo", "wine", "pine", "plum"), jitter=0)
"""One word of 3 to 5 letters; the prompt names face and colours."""


def words_model() -> NextScaleConfig:
    """1.2 M parameters, 90 tokens on 5 scales, 32 codes: what two CPU cores can train by reinforcement in minutes."""
    tokenizer = TokenizerConfig(vocab=32, channels=8, width=64, multipliers=(1,), blocks=1, attention=False, patch=4)
    text = TextConfig(styles=WORDS.fonts + WORDS.palettes, max_length=12)
    return NextScaleConfig(
        depth=3, width=128, heads=4, grids=((1, 1), (1, 3), (1, 6), (2, 8), (4, 16)), mlp_ratio=3.0, text=text, tokenizer=tokenizer
    )


def words_cpu() -> PretrainConfig:
    """The bundled base model of the words demo: four minutes on one core. It stops early on purpose, to leave something to RL."""
    return PretrainConfig(
        name="pretrain/words_cpu",
        model=words_model(),
        data=WORDS,
        pictures=600,
        tokenizer_steps=1200,
        warmup_share=0.4,
        steps=240,
        batch=16,
        optim=OptimConfig(name="muon", lr=3e-3, schedule="linear", warmup_steps=10),
        save_every=100,
    )


WORDS_H200 = WordsConfig(
    image_size=(128, 128),
    fonts=("sans", "serif", "mono", "oblique", "italic", "times"),
    palettes=("ink", "night", "sea", "fire", "moss", "candy", "slate", "sand"),
    max_length=7,
    regions=(0.0, 0.2, 0.3, 0.3, 0.2),
    jitter=2,
)
"""Two to five words in a picture, in the proportions of VAR-RL's evaluation (appendix C)."""


def words_h200_model() -> NextScaleConfig:
    """69 M parameters, VAR's ten scales of 680 tokens, stride 8."""
    tokenizer = TokenizerConfig(vocab=1024, channels=16, width=64, multipliers=(1, 2, 2, 4))
    text = TextConfig(styles=WORDS_H200.fonts + WORDS_H200.palettes, max_length=40, layers=2)
    return NextScaleConfig(depth=12, width=512, heads=8, text=text, tokenizer=tokenizer)


def words_h200() -> PretrainConfig:
    """The base model of var_rl/words_h200: tokenizer 4 minutes, transformer 8 (planned; not measured on GPU)."""
    return PretrainConfig(
        name="pretrain/words_h200",
        model=words_h200_model(),
        data=WORDS_H200,
        pictures=100_000,
        tokenizer_steps=4000,
        tokenizer_batch=64,
        tokenizer_lr=1e-3,
        steps=6000,
        batch=128,
        optim=OptimConfig(name="muon", lr=1e-3, schedule="linear", warmup_steps=100),
        save_every=1000,
        dtype="bfloat16",
    )
