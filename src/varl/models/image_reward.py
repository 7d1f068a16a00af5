"""ImageReward's network (arXiv 2304.05977): BLIP (arXiv 2201.12086), whose text encoder looks at the picture while it reads, and a head."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from varl.models.vision import AestheticHead, Preprocessing, preprocess

TOKENS = 35
"""Of a text, its two marks included; what is beyond them is cut off."""


class ImageRewardNetwork(nn.Module):
    """`transformers`' BlipVisionModel and BlipTextModel with their tokenizer and what they want of pictures; frozen, in fp32."""

    def __init__(self, eyes: Any, reader: Any, head: AestheticHead, tokenizer: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.eyes, self.reader, self.head = eyes, reader, head
        self.tokenizer, self.preprocessing = tokenizer, preprocessing
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"], texts: Sequence[str]) -> Float[Tensor, " B"]:
        """The head's answer to what the text's first token holds after the last layer. A text is read anew beside each picture: what it
        says depends on that."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt").to(images.device)
        seen = self.eyes(pixel_values=preprocess(images, self.preprocessing)).last_hidden_state
        read = self.reader(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen)
        return self.head(read.last_hidden_state[:, 0])
