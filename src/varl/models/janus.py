"""Janus-Pro (arXiv 2501.17811) as a raster model: a caption in words, then a picture's tokens row by row, each drawn given all before it.

    reads      bos  w_1 ... w_n  boi  x_0  x_1 ... x_{L-2}
    predicts                     x_0  x_1  x_2 ... x_{L-1}

The weights are `transformers`' own modules; a token of a picture enters as generation_aligner(generation_embeddings(x)) and leaves through
generation_head. VA-pi's release reads each row one place too late, when the token that it shall predict has been seen."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from varl.config import JanusConfig
from varl.models.layers import KVCache, autocasts
from varl.models.raster import Condition, attention_mask


class Janus(nn.Module):
    """The part of a `JanusForConditionalGeneration` that draws pictures; all of it is trained. The rest, what understands pictures, is
    neither trained nor moved to another device, and is saved as it was."""

    language_model: Any
    generation_embeddings: nn.Embedding
    generation_aligner: nn.Module
    generation_head: Any

    def __init__(self, whole: Any, processor: Any, config: JanusConfig) -> None:
        """`whole` is the JanusForConditionalGeneration, `processor` its JanusProcessor."""
        super().__init__()
        self.config, self.processor = config, processor
        self._whole = (whole,)  # in a tuple, so that its other parts are no parts of this module
        self.language_model = whole.model.language_model
        self.generation_embeddings = whole.model.generation_embeddings
        self.generation_aligner, self.generation_head = whole.model.generation_aligner, whole.model.generation_head
        self.tokens = config.grid[0] * config.grid[1]
        """L, of a picture."""

    @property
    def whole(self) -> Any:
        """The JanusForConditionalGeneration, of which this module's weights are a part."""
        return self._whole[0]

    @property
    def blocks(self) -> nn.ModuleList:
        """What is split over processes, one by one."""
        return self.language_model.layers

    # -- prompts -----------------------------------------------------------------------------------------------------------------------

    def read(self, texts: Sequence[str]) -> list[Int[Tensor, " n"]]:
        """Token ids of each caption in the checkpoint's chat template, from bos to boi."""
        template, found = self.processor.apply_chat_template, []
        for text in texts:
            asked = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            prompt = template(asked, add_generation_prompt=True, tokenize=False)
            found.append(self.processor(text=prompt, generation_mode="image", return_tensors="pt")["input_ids"][0])
        return found

    def none(self, length: int) -> Int[Tensor, " n"]:
        """What stands for no caption in the place of one of `length` tokens, as released: padding between bos and boi, which is seen like
        any token."""
        ids = torch.full((length,), self.config.pad, device=self.generation_embeddings.weight.device)
        ids[0], ids[-1] = self.config.bos, self.config.boi
        return ids

    @property
    def longest(self) -> int:
        """Of captions, in tokens."""
        return self.config.positions - self.tokens

    @cached_property
    def empty(self) -> int:
        """Tokens of a caption that says nothing."""
        return len(self.read([""])[0])

    def condition(self, ids: Int[Tensor, "B N"], there: Bool[Tensor, "B N"] | None = None) -> Condition:
        """`ids` are those of `read`, padded on the left where `there` is False."""
        return Condition(tokens=self.language_model.embed_tokens(ids), there=there)

    # -- teacher-forced ----------------------------------------------------------------------------------------------------------------

    def embed(self, tokens: Int[Tensor, "B l"]) -> Float[Tensor, "B l D"]:
        """A picture's tokens as the language model reads them."""
        return self.generation_aligner(self.generation_embeddings(tokens))

    def forward(self, condition: Condition, tokens: Int[Tensor, "B l"]) -> Float[Tensor, "B l D"]:
        """Hidden states of the first l tokens: row t is what token t is drawn from, having seen the condition and tokens 0 .. t-1. So the
        last of `tokens` is not read at all."""
        before, count = condition.tokens.shape[1], tokens.shape[1] - 1
        x = torch.cat([condition.tokens, self.embed(tokens[:, :-1])], 1)
        there = seen(condition)
        hidden = self.language_model(
            inputs_embeds=x, attention_mask=attention_mask(there, count), position_ids=positions(there, before + count), use_cache=False
        ).last_hidden_state
        return hidden[:, before - 1 :]

    # -- one token at a time -----------------------------------------------------------------------------------------------------------

    def capacity(self, condition: Condition, tokens: int) -> int:
        """Positions that are read while the first `tokens` tokens are drawn: all of the condition, all tokens but the last."""
        return condition.tokens.shape[1] + tokens - 1

    def cache(self, condition: Condition, tokens: int) -> KVCache:
        """Room to draw the first `tokens` tokens."""
        config = self.config
        shape = (len(condition.tokens), config.kv_heads, self.capacity(condition, tokens), config.head_width)
        return KVCache.empty(config.depth, shape, self.generation_embeddings.weight)

    def step(self, condition: Condition, tokens: Int[Tensor, " B"] | None, cache: KVCache) -> Float[Tensor, "B 1 D"]:
        """What the next token is drawn from. `tokens` are those drawn last; None before the first, when the condition itself is read."""
        x = condition.tokens if tokens is None else self.embed(tokens[:, None])
        there, start, end = seen(condition), cache.length, cache.length + x.shape[1]
        mask = attention_mask(there, 0) if tokens is None else F.pad(there, (0, end - there.shape[1]), value=True)[:, None, None]
        hidden = self.language_model(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=positions(there, end)[:, start:],
            past_key_values=_Written(cache),
            use_cache=True,
        ).last_hidden_state
        cache.length = end
        return hidden[:, -1:]

    def logits(self, hidden: Float[Tensor, "B l D"]) -> Float[Tensor, "B l V"]:
        """In fp32: the last product is not autocast, for log-probabilities in bf16 are off by hundredths of a nat."""
        head = self.generation_head
        inner = head.activation_fn(head.proj_out(hidden))
        with torch.autocast(hidden.device.type, enabled=False) if autocasts(hidden.device) else nullcontext():
            return head.vision_head(inner.float())


def seen(condition: Condition) -> Bool[Tensor, "b N"]:
    """Where the condition is no padding; one row for all where nothing was padded."""
    tokens = condition.tokens
    return torch.ones(1, tokens.shape[1], dtype=torch.bool, device=tokens.device) if condition.there is None else condition.there


def positions(there: Bool[Tensor, "b N"], length: int) -> Int[Tensor, "b n"]:
    """Of a condition and the tokens after it, `length` together: counted from the first that is there, so that padding moves nothing."""
    return (F.pad(there, (0, length - there.shape[1]), value=True).cumsum(1) - 1).clamp(min=0)


class _Written:
    """Our cache, as `transformers`' attention asks for it."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def get_seq_length(self, *_: Any) -> int:
        return self.cache.length

    def update(self, keys: Tensor, values: Tensor, block: int, *_: Any) -> tuple[Tensor, Tensor]:
        return self.cache.write(block, keys, values)
