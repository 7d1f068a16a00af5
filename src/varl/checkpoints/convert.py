"""Released files of any family, told by the names of their weights."""

from pathlib import Path

from varl.checkpoints import harmon, infinity, mar, nova, var
from varl.checkpoints.llamagen import llamagen_pair, unwrapped
from varl.checkpoints.model import Pair
from varl.checkpoints.released import ReleasedFile, listed, read_file
from varl.errors import CheckpointError

MARKS = {
    "VAR": ("word_embed.weight", "class_emb.weight"),
    "Infinity": ("word_embed.weight", "cfg_uncond"),
    "LlamaGen": ("tok_embeddings.weight", "output.weight"),
    "MAR": ("z_proj.weight", "mask_token"),
    "NOVA": ("mask_embed.mask_token", "text_embed.weight"),
    "Harmon": ("mar.z_proj.weight", "proj_in.0.weight"),
}
"""What transformers of a family hold, and those of no other."""
TAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "VAR": ((), "everything"),
    "LlamaGen": (("image_size", "heads", "ema"), "little"),
    "MAR": (("heads",), "all but the heads"),
    "NOVA": (("heads",), "all but the heads"),
    "Infinity": (("image_size", "ema"), "all but the size of the pictures"),
    "Harmon": (("heads", "language_model"), "all but the heads and what the language model's folder does"),
}
"""Which further arguments a family takes, and what its weights tell."""


def load_released(
    transformer: Path | str,
    tokenizer: Path | str,
    *,
    image_size: int | None = None,
    heads: int | None = None,
    ema: bool = False,
    language_model: Path | str | None = None,
) -> Pair:
    """The transformer with its tokenizer, as `load_var`, `load_llamagen`, `load_mar`, `load_infinity`, `load_nova` or harmon's `load_raw`
    gives them. Of VAR the weights tell everything: it takes none of the further arguments; MAR and NOVA take `heads` alone, Infinity
    `image_size` (1024 if not given) and `ema`, Harmon `heads` and `language_model`, which it needs: the folder of the Qwen2.5 that it was
    begun with. A NOVA's `tokenizer` is its whole folder, and its `transformer` the folder of that name in it, or another file of its
    weights."""
    whole = nova.is_nova(Path(tokenizer))
    file = None if whole else read_file(Path(transformer))
    whose = "NOVA" if file is None else family(file)
    takes, tell = TAKES[whose]
    told = {"image_size": image_size, "heads": heads, "ema": ema or None, "language_model": language_model}
    if needless := [f"{name} (--{name.replace('_', '-')})" for name, value in told.items() if value is not None and name not in takes]:
        raise CheckpointError(f"{transformer}: is {whose}'s, whose weights tell {tell}. Leave {' and '.join(needless)} out.")
    if file is None:
        return nova.load_nova(tokenizer, transformer, heads=heads)
    if whose == "NOVA":
        raise CheckpointError(f"{transformer}: is NOVA's, and {tokenizer} is not its folder. After it give the one with {nova.INDEX}.")
    if whose == "Harmon" and language_model is None:
        raise CheckpointError(
            f"{transformer}: is Harmon's, which tells nothing of its language model's config and tokenizer. Give `language_model` "
            "(--language-model), the folder of Qwen2.5-0.5B-Instruct or -1.5B-Instruct that it was begun with."
        )
    other = read_file(Path(tokenizer))
    match whose:
        case "LlamaGen":
            return llamagen_pair(file, other, image_size=image_size, heads=heads, ema=ema)
        case "Infinity":
            return infinity.infinity_pair(file, other, pixels=infinity.pixels_of(image_size), ema=ema)
        case "MAR":
            return mar.mar_pair(file, other, heads=heads)
        case "Harmon":
            return harmon.raw_pair(file, other, Path(str(language_model)), heads=heads)
    return var.var_pair(file, other)


def family(file: ReleasedFile) -> str:
    """Whose transformer it is, one of `MARKS`."""
    place = next((place for place in (var.TRANSFORMER, mar.AVERAGED, infinity.LATEST) if isinstance(file.at(place), dict)), None)
    names = file.weights(place) if place else unwrapped(file)
    found = [name for name, marks in MARKS.items() if all(mark in names for mark in marks)]
    if len(found) != 1:
        known = "; ".join(f"{name}, with {listed(marks)}" for name, marks in MARKS.items())
        swapped = " It is a tokenizer: name the transformer first." if "quantize.embedding.weight" in names else ""
        raise CheckpointError(
            f"{file.path}: is a transformer of no family that is known.{swapped}\n  it holds: {listed(names)}\n  known: {known}"
        )
    return found[0]
