"""Released files of any family, told by the names of their weights."""

from pathlib import Path

from varl.checkpoints import infinity, mar, nova, var
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
}
"""What transformers of a family hold, and those of no other."""
TAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "VAR": ((), "everything"),
    "LlamaGen": (("image_size", "heads", "ema"), "little"),
    "MAR": (("heads",), "all but the heads"),
    "NOVA": (("heads",), "all but the heads"),
    "Infinity": (("image_size", "ema"), "all but the size of the pictures"),
}
"""Which further arguments a family takes, and what its weights tell."""


def load_released(
    transformer: Path | str, tokenizer: Path | str, *, image_size: int | None = None, heads: int | None = None, ema: bool = False
) -> Pair:
    """The transformer with its tokenizer, as `load_var`, `load_llamagen`, `load_mar`, `load_infinity` or `load_nova` gives them. Of VAR the
    weights tell everything: it takes none of the further arguments; MAR and NOVA take `heads` alone, Infinity `image_size` (1024 if not
    given) and `ema`. A NOVA's `tokenizer` is its whole folder, and its `transformer` the folder of that name in it, or another file of its
    weights."""
    whole = nova.is_nova(Path(tokenizer))
    file = None if whole else read_file(Path(transformer))
    whose = "NOVA" if file is None else family(file)
    takes, tell = TAKES[whose]
    told = {"image_size": image_size, "heads": heads, "ema": ema or None}
    if needless := [f"{name} (--{name.replace('_', '-')})" for name, value in told.items() if value is not None and name not in takes]:
        raise CheckpointError(f"{transformer}: is {whose}'s, whose weights tell {tell}. Leave {' and '.join(needless)} out.")
    if file is None:
        return nova.load_nova(tokenizer, transformer, heads=heads)
    if whose == "NOVA":
        raise CheckpointError(f"{transformer}: is NOVA's, and {tokenizer} is not its folder. After it give the one with {nova.INDEX}.")
    other = read_file(Path(tokenizer))
    match whose:
        case "LlamaGen":
            return llamagen_pair(file, other, image_size=image_size, heads=heads, ema=ema)
        case "Infinity":
            return infinity.infinity_pair(file, other, pixels=infinity.pixels_of(image_size), ema=ema)
        case "MAR":
            return mar.mar_pair(file, other, heads=heads)
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
