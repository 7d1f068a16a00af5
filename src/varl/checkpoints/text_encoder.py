"""Encoders of captions, T5 or Phi, from a folder that `transformers` saved, whole or without what is not needed: a T5's decoder, a Phi's
head."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from varl.checkpoints.hugging_face import transformers
from varl.errors import CheckpointError
from varl.tokenizers.phi import Phi
from varl.tokenizers.t5 import T5

KINDS = {"t5": "T5EncoderModel", "phi": "PhiModel"}
"""What config.json calls them, and which of `transformers`' classes reads captions."""


def load_text_encoder(folder: Path, device: torch.device, dtype: torch.dtype, *, lowercase: bool = True, longest: int = 256) -> T5 | Phi:
    """The encoder in `folder`, in `dtype` on `device`, which lower-cases captions if `lowercase`; a Phi refuses captions of more than
    `longest` tokens. All its weights must be there."""
    package = transformers()
    try:
        kind = package.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind not in KINDS:
            raise CheckpointError(f"{folder}: is a {kind}, no {' and no '.join(KINDS)}. Give the encoder that the model was trained with.")
        tokenizer = package.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        cls = getattr(package, KINDS[kind])
        model, report = cls.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read as a text encoder ({error}). Is it one, and was it copied whole?") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder}: lacks {len(missing)} weights of a {cls.__name__}, `{missing[0]}` first. Copy it again.")
    if kind == "phi":
        return Phi(model.to(device), tokenizer, lowercase=lowercase, longest=longest)
    return T5(model.to(device), tokenizer, lowercase=lowercase)
