"""HPSv3's released file: a Qwen2-VL with a head, under the names of an older or a newer `transformers`."""

import ast
import re
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from torch import nn

from varl.checkpoints.folder import require_fit, shapes_of, strict_load
from varl.checkpoints.hugging_face import transformers
from varl.checkpoints.released import expect, read_weights
from varl.checkpoints.vision import Files, tokenizer_of
from varl.errors import CheckpointError
from varl.models.hpsv3 import REWARD, HPSv3Network, Template

UNUSED = "lm_head.weight"
"""What would choose the next word."""
HEAD = "rm_head."
INSTRUCTION, ENDING = "INSTRUCTION", "prompt_with_special_token"
"""What the template's two parts are called in the file of its package."""


def released_name(name: str, *, newer: bool) -> str:
    """What the file calls a weight of a Qwen2VLModel: as `transformers` did up to 4.51, or as it has since."""
    return f"model.{name}" if newer else re.sub(r"^language_model\.", "model.", name)


def own_name(name: str) -> str:
    """What a Qwen2VLModel calls a weight of the file, either way."""
    return re.sub(r"^model\.(language_model\.|visual\.)?", lambda found: found[1] or "language_model.", name)


def head_of(width: int) -> nn.Sequential:
    """From what a token of `width` holds to the two numbers, with the released names; the third place dropped out while it was trained."""
    return nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))


def released_shapes(config: Any, *, newer: bool) -> dict[str, tuple[int, ...]]:
    """Of the file's weights, those that are used, if it is of a Qwen2-VL of that config."""
    with torch.device("meta"):
        model, head = transformers().Qwen2VLModel(config), head_of(config.text_config.hidden_size)
    found = {released_name(name, newer=newer): tensor for name, tensor in model.state_dict().items()}
    return shapes_of(found | {HEAD + name: tensor for name, tensor in head.state_dict().items()})


def read_template(file: Path) -> Template:
    """The two strings of that name which a file of Python assigns. It is not run."""
    try:
        assigned = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)]
    except (OSError, SyntaxError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as Python ({error}). Give the file of the released package.") from error
    found = {getattr(node.targets[0], "id", ""): node.value.value for node in assigned if isinstance(node.value, ast.Constant)}
    instruction, ending = (str(found.get(name, "")) for name in (INSTRUCTION, ENDING))
    fields = [field for _, field, _, _ in Formatter().parse(instruction) if field is not None]
    if fields != ["text_prompt"] or ending.count(REWARD) != 1:
        raise CheckpointError(
            f"{file}: must assign {INSTRUCTION}, with {{text_prompt}} in it, and {ENDING}, with {REWARD} in it, each once. Give "
            "hpsv3/dataset/data_collator_qwen.py of the released package."
        )
    return Template(instruction, ending)


def load_hpsv3(files: Files, template: Path) -> HPSv3Network:
    """On the CPU, its weights in bf16. CheckpointError lists every weight that does not fit, under the file's names.

    The frequencies of the rotary codes are rounded to bf16 like the weights, as they were while it was trained, and as its package has
    them."""
    package = transformers()
    asks = read_template(template)
    tokenizer = tokenizer_of(files.processor)
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{files.processor}: its tokenizer has no chat template. Give the whole folder of the Qwen2-VL.")
    tokenizer.add_tokens([REWARD], special_tokens=True)
    try:
        config = package.Qwen2VLConfig.from_pretrained(files.processor, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{files.processor}: its config.json cannot be read as a Qwen2-VL's ({error}). Copy it again.") from error
    where = str(files.weights)
    state = {name: tensor for name, tensor in read_weights(files.weights, "model").items() if name != UNUSED}
    newer = any(name.startswith("model.language_model.") for name in state)
    words = released_name("language_model.embed_tokens.weight", newer=newer)
    expect(shapes_of(state), [words], "HPSv3", where)
    config.text_config.vocab_size = known = state[words].shape[0]
    if len(tokenizer) != known:
        raise CheckpointError(
            f"{where}: knows {known} tokens, and the tokenizer in {files.processor} has {len(tokenizer)} with {REWARD}. Give the Qwen2-VL "
            "that it was tuned from."
        )
    require_fit(shapes_of(state), released_shapes(config, newer=newer), "HPSv3", where)
    head = head_of(config.text_config.hidden_size)
    strict_load(head, {name: state[HEAD + name].float() for name in head.state_dict()}, where)
    ours = {own_name(name): tensor for name, tensor in state.items() if not name.startswith(HEAD)}
    model = package.Qwen2VLModel.from_pretrained(None, config=config, state_dict=ours, dtype=torch.bfloat16)
    return HPSv3Network(model.to(torch.bfloat16), head, tokenizer, asks)
