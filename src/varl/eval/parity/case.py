"""One case as it lies on the disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from varl.checkpoints.folder import read_tensors
from varl.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    root: Path
    file: Path
    """The JSON file."""
    info: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under `prefix`, without it; floating ones in fp32, as the authors' code ran."""
        found = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}

    def draws(self, stream: str) -> Iterator[Tensor]:
        """The recorded draws of a stream, in the order in which they were used; dim 0 of each tensor counts equal draws."""
        recorded = self.part(f"rng.{stream}.")
        for name in sorted(recorded):
            yield from recorded[name]


def read_info(file: Path) -> dict[str, Any]:
    try:
        info = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}). Is the folder of cases whole?") from error
    return info if isinstance(info, dict) else {}


def load_case(root: Path, file: Path, info: dict[str, Any]) -> Case:
    return Case(root=root, file=file, info=info, tensors=read_tensors(file.with_suffix(".safetensors")))


def tokenizer_case(case: Case) -> Case:
    """The case that holds the tokenizer's weights."""
    name = case.info["state_dict"].get("also_needs_weights_of") or case.config["vae"]
    places = [case.root / name, case.file.parent / name, case.file.parent / Path(name).name, case.root.parent / name]
    for place in places:
        file = place.with_name(f"{place.name}.json")
        if file.is_file():
            return load_case(case.root, file, read_info(file))
    raise CheckpointError(f"{case.file}: it needs the weights of {name}, which lie at none of {', '.join(map(str, places))}.")


def exponential_draw(logp: Float[Tensor, "*B V"], exponential: Tensor) -> Int[Tensor, "*B"]:
    """argmax p / q with q ~ Exp(1), which is how torch.multinomial draws."""
    return (logp.exp() / exponential.view_as(logp)).argmax(-1)
