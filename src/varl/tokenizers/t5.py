"""A T5 encoder as LlamaGen reads captions (arXiv 2406.06525: flan-t5-xl): the last hidden state of each of a caption's tokens."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class T5:
    """`transformers`' T5EncoderModel and its tokenizer, frozen."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def __call__(self, text: str) -> Float[Tensor, "n C"]:
        """Features of the caption's tokens, the last of which ends it, in fp32 on the CPU. Lower-cased and with single spaces, as the
        release trained on. The release also strips what web pages leave in captions, and cuts off what is beyond 120 tokens without a word;
        here nothing is taken away. One caption at a time, so that its features do not depend on its neighbours."""
        tokens = self.tokenizer(" ".join(text.lower().split()), return_tensors="pt").to(self.model.device)
        with torch.autocast(self.model.device.type, enabled=False):
            found = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return found.last_hidden_state[0].float().cpu()
