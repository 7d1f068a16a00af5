"""A T5 encoder as LlamaGen and Infinity read captions (flan-t5-xl): the last hidden state of each of a caption's tokens."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class T5:
    """`transformers`' T5EncoderModel and its tokenizer, frozen."""

    def __init__(self, model: Any, tokenizer: Any, *, lowercase: bool) -> None:
        self.model, self.tokenizer, self.lowercase = model.eval().requires_grad_(False), tokenizer, lowercase

    @torch.no_grad()
    def __call__(self, text: str) -> Float[Tensor, "n C"]:
        """Features of the caption's tokens, the last of which ends it, in fp32 on the CPU. With single spaces, and lower-cased if
        asked for, as LlamaGen trained on. LlamaGen's release also strips what web pages leave in captions, and both cut off what is beyond
        120 or 512 tokens without a word; here nothing is taken away. One caption at a time, so that its features do not depend on its
        neighbours."""
        text = " ".join((text.lower() if self.lowercase else text).split())
        tokens = self.tokenizer(text, return_tensors="pt").to(self.model.device)
        with torch.autocast(self.model.device.type, enabled=False):
            found = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return found.last_hidden_state[0].float().cpu()
