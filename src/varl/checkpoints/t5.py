"""A T5 encoder from a folder that `transformers` saved, whole or with the decoder that is not needed."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from varl.checkpoints.hugging_face import transformers
from varl.errors import CheckpointError
from varl.tokenizers.t5 import T5


def load_t5(folder: Path, device: torch.device, dtype: torch.dtype, lowercase: bool = True) -> T5:
    """The encoder in `folder`, in `dtype` on `device`, which lower-cases captions if `lowercase`. All its weights must be there."""
    t5 = transformers()
    try:
        kind = t5.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind != "t5":
            raise CheckpointError(f"{folder}: is a {kind}, no t5. Give the encoder that the model was trained with.")
        tokenizer = t5.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = t5.T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read as a T5 encoder ({error}). Is it one, and was it copied whole?") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder}: lacks {len(missing)} weights of a T5 encoder, `{missing[0]}` first. Copy it again.")
    return T5(model.to(device), tokenizer, lowercase=lowercase)
