"""Phi-2 as NOVA reads captions: what it makes of each of a caption's tokens, after its last norm and before it would say the next one."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from varl.errors import DataError


class Phi:
    """`transformers`' PhiModel and its tokenizer, frozen."""

    def __init__(self, model: Any, tokenizer: Any, *, lowercase: bool, longest: int) -> None:
        """`longest` of captions, in tokens."""
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.lowercase, self.longest = lowercase, longest

    @torch.no_grad()
    def __call__(self, text: str) -> Float[Tensor, "n C"]:
        """Features of the caption's tokens, in fp32 on the CPU; of the empty caption, which has no tokens, none. Each token sees those
        before it. Spaces are read as they stand. Raises DataError for a caption that is too long, of which the release cuts off the end
        without a word. One caption at a time, so that there is no padding."""
        ids = self.tokenizer(text.lower() if self.lowercase else text)["input_ids"]
        if len(ids) > self.longest:
            raise DataError(f"prompt {text!r} has {len(ids)} tokens, the model takes 0 to {self.longest}. Shorten it.")
        if not ids:
            return torch.zeros(0, self.model.config.hidden_size)
        with torch.autocast(self.model.device.type, enabled=False):
            found = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False)
        return found.last_hidden_state[0].float().cpu()
