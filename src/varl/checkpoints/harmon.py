"""Harmon as its authors keep it (arXiv 2503.21979): a Hugging Face folder (wusize/Harmon-0_5B and -1_5B), into our modules and back, and
the raw `.pth` files. Of a folder nothing is run: its weights, config.json and tokenizer are read, not its code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from varl.checkpoints import mar
from varl.checkpoints.folder import (
    MANIFEST,
    Shapes,
    bytes_of,
    damage,
    fill_folder,
    read_tensors,
    refuse_strange,
    require_fit,
    seal,
    shapes_of,
    write_bytes,
    write_tensors,
)
from varl.checkpoints.hugging_face import told_by, transformers
from varl.checkpoints.released import ReleasedFile, expect, read_file
from varl.config import HarmonConfig
from varl.errors import CheckpointError
from varl.models.harmon import Harmon
from varl.tokenizers.kl import KL

MAR, VAE = "mar.", "vae."
EMBEDDING, WORDS = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
"""Language models of these sizes draw words with the vectors that they read them with; files may hold these once or twice."""
MARKS = ("<|im_start|>", "<|im_end|>")
"""Of Qwen's chat format."""
TYPES = {"B": "mar_base", "L": "mar_large", "H": "mar_huge"}
"""What config.json calls MAR's sizes."""


def is_harmon(folder: Path) -> bool:
    """Whether a folder is a Harmon of its authors' making, or of ours."""
    return told_by(folder).get("model_type") == "harmon"


def load(folder: Path) -> tuple[Harmon, KL]:
    """The model and its tokenizer, in fp32 on the CPU. Every key is accounted for; where VARL wrote the folder, so is every hash. Pictures
    have the size that config.json's `grid` says, in tokens; without it, twice the side that MAR was trained for, as released."""
    if (folder / MANIFEST).is_file() and (problems := damage(folder)):
        raise CheckpointError(f"{folder}: {'; '.join(problems)}. Copy or save the model folder again.")
    state = {name: tensor for file in _files(folder) for name, tensor in read_tensors(file).items()}
    return filled(_of_folder(folder, shapes_of(state)), state, str(folder))


def without_memory(folder: Path) -> tuple[Harmon, KL]:
    """The model and its tokenizer on the meta device; of the weights, shapes alone are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _files(folder):
        try:
            with safe_open(file, "pt") as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors ({error}). Was it copied whole?") from error
    return _of_folder(folder, shapes)


def load_raw(
    path: Path | str, path_kl: Path | str, qwen: Path | str, *, grid: tuple[int, int] | None = None, heads: int | None = None
) -> tuple[Harmon, KL]:
    """The model in a `.pth` file of the authors (`harmon_0.5b.pth`), which holds neither the autoencoder (`path_kl`, MAR's `kl16.ckpt`) nor
    what the language model's config and tokenizer say (`qwen`, the folder of Qwen2.5-0.5B-Instruct or -1.5B-Instruct). `grid` of the
    pictures is as in `load`; `heads` as in `load_mar`."""
    return raw_pair(read_file(Path(path)), read_file(Path(path_kl)), Path(qwen), grid=grid, heads=heads)


def raw_pair(
    file: ReleasedFile, file_kl: ReleasedFile, qwen: Path, *, grid: tuple[int, int] | None = None, heads: int | None = None
) -> tuple[Harmon, KL]:
    """`load_raw` of files that were read already."""
    told = told_by(qwen)
    if told.get("model_type") != "qwen2":
        raise CheckpointError(f"{qwen}: is no folder of a Qwen2 (model_type {told.get('model_type')!r}). Give Qwen2.5-0.5B-Instruct or so.")
    kl = {VAE + name: tensor for name, tensor in file_kl.weights(mar.LATEST).items()}
    state, where = kl | file.weights(mar.LATEST), str(file.path)
    return filled(empty(shapes_of(state), told, words_of(qwen), where, grid=grid, heads=heads), state, where)


def save(folder: Path, model: Harmon, kl: KL, notes: Mapping[str, Any]) -> Path:
    """A folder with the authors' names: config.json, model.safetensors, the tokenizer's files, notes.json, and manifest.json with the hash
    of each; written whole or not at all."""
    refuse_strange(folder)
    state = dict(model.state_dict())
    if not model.whole.config.tie_word_embeddings:
        state[WORDS] = model.whole.lm_head.weight
    for ours, tensor in kl.state_dict().items():
        names = mar.released_names(ours)
        state |= {VAE + name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}

    def fill(beside: Path) -> dict[str, str]:
        model.words.save_pretrained(beside)
        write_bytes(beside / "config.json", json.dumps(_told(model), indent=2).encode())
        write_bytes(beside / "notes.json", json.dumps(notes, indent=2).encode())
        small = {str(file.relative_to(beside)): seal(file) for file in sorted(beside.rglob("*")) if file.is_file()}
        return small | {"model.safetensors": write_tensors(beside / "model.safetensors", state)}

    return fill_folder(folder, fill, bytes_of(state))


# ---- sizes ----------------------------------------------------------------------------------------------------------------------------


def empty(
    shapes: Shapes, qwen: Mapping[str, Any], words: Any, where: str, *, grid: tuple[int, int] | None = None, heads: int | None = None
) -> tuple[Harmon, KL]:
    """The model and its tokenizer on the meta device, whose weights have these `shapes`, every name accounted for; `qwen` is Qwen2's
    config, `words` its tokenizer."""
    expect(shapes, ("proj_in.0.weight", "proj_out.0.weight", "mar.z_proj.weight", EMBEDDING, "vae.quant_conv.weight"), "a Harmon", where)
    package = transformers()
    tokenizer = mar.tokenizer_config(_part(shapes, VAE), where)
    inner = mar.transformer_config(_part(shapes, MAR), tokenizer, where, heads)
    text = package.Qwen2Config.from_dict(dict(qwen))
    config = HarmonConfig(
        mar=inner,
        width=text.hidden_size,
        positions=text.max_position_embeddings,
        grid=grid or (2 * inner.grid[0], 2 * inner.grid[1]),
    )
    with torch.device("meta"):
        whole = package.AutoModelForCausalLM.from_config(text, attn_implementation="sdpa", dtype=torch.float32)
        model, kl = Harmon(config, whole.eval(), words), KL(tokenizer)
    want = shapes_of(model.state_dict())
    for ours, tensor in kl.state_dict().items():
        names = mar.released_names(ours)
        want |= {VAE + name: (tensor.shape[0] // len(names), *tensor.shape[1:]) for name in names}
    if WORDS in shapes or not text.tie_word_embeddings:
        want[WORDS] = want[EMBEDDING]
    require_fit(shapes, want, "Harmon", where)
    return model, kl


def _of_folder(folder: Path, shapes: Shapes) -> tuple[Harmon, KL]:
    told = told_by(folder)
    qwen, inner, grid = told.get("llm"), told.get("mar") or {}, told.get("grid")
    if not isinstance(qwen, dict):
        raise CheckpointError(f"{folder}: its config.json does not tell the language model's config, `llm`. Copy the folder again.")
    heads = inner.get("encoder_num_heads")
    return empty(shapes, qwen, words_of(folder), str(folder), grid=None if grid is None else tuple(grid), heads=heads)


def words_of(folder: Path) -> Any:
    """Qwen's tokenizer, as the folder has it."""
    try:
        words = transformers().PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: no tokenizer can be read from it ({error}). Was it copied whole, with tokenizer.json?") from error
    if lacking := [mark for mark in MARKS if words.convert_tokens_to_ids(mark) in (None, words.unk_token_id)]:
        raise CheckpointError(f"{folder}: its tokenizer does not know {' and '.join(lacking)}. Give the folder of Harmon's own Qwen2.5.")
    return words


def _told(model: Harmon) -> dict[str, Any]:
    """config.json, with all that the authors' code asks of it, and the pictures' grid."""
    config, text = model.config.mar, model.whole.config.to_dict()
    side, stride = config.grid[0], config.tokenizer.stride
    inner: dict[str, Any] = {
        "img_size": side * stride,
        "vae_stride": stride,
        "patch_size": 1,
        "vae_embed_dim": config.tokenizer.channels,
        "class_num": config.num_classes,
        "buffer_size": config.buffer,
        "diffloss_d": config.head.depth,
        "diffloss_w": config.head.width,
        "num_sampling_steps": "100",
    }
    size = (config.encoder.depth + config.decoder.depth, config.encoder.width, config.encoder.heads)
    released = next((TYPES[name] for name, sizes in mar.SIZES.items() if sizes == size), None)
    inner |= {"encoder_num_heads": config.encoder.heads} if released is None else {"type": released}
    text["rope_theta"] = text["rope_parameters"]["rope_theta"]  # where older versions of transformers look for it
    return {"model_type": "harmon", "architectures": ["HarmonModel"], "llm": text, "mar": inner, "grid": list(model.config.grid)}


# ---- weights --------------------------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no weights (*.safetensors). Copy the folder whole.")
    return files


def _part(shapes: Mapping[str, Any], start: str) -> dict[str, Any]:
    return {name.removeprefix(start): tensor for name, tensor in shapes.items() if name.startswith(start)}


def filled(pair: tuple[Harmon, KL], state: Mapping[str, Tensor], where: str) -> tuple[Harmon, KL]:
    """A pair from the meta device with a `state` that was found to fit, in fp32 on the CPU."""
    model, whole = pair[0].to_empty(device="cpu"), pair[0].whole
    whole.model.rotary_emb = type(whole.model.rotary_emb)(whole.config)  # its tables are no weights
    mine = set(model.state_dict())
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in mine})
    if not whole.config.tie_word_embeddings:
        whole.lm_head.to_empty(device="cpu").load_state_dict({"weight": state[WORDS]})
    elif WORDS in state and not torch.equal(state[WORDS], state[EMBEDDING]):
        raise CheckpointError(
            f"{where}: `{WORDS}` is not `{EMBEDDING}`, and the config says that they are one (tie_word_embeddings). Copy the folder again."
        )
    else:
        whole.lm_head.weight = whole.model.embed_tokens.weight
    kl = pair[1].to_empty(device="cpu")
    mar.fill_tokenizer(kl, _part(state, VAE), where)
    return model, kl
