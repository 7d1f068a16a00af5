"""Models that answer questions about pictures, as `transformers` has them: how likely they say yes rather than no."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from varl.models.vision import Preprocessing, Scaling, preprocess, scale

QUESTION = 35
"""Tokens of a question, the first ones, that BLIP reads."""


class Asked(nn.Module, ABC):
    """A model with its tokenizer; frozen, in fp32. Each picture is encoded once, whatever it is asked."""

    def __init__(self, model: Any, tokenizer: Any, batch: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch = model.eval().requires_grad_(False), tokenizer, batch
        self.words = [self.word(answer) for answer in ("yes", "no")]
        self._questions: dict[str, list[int]] = {}

    def word(self, answer: str) -> int:
        """The token that the answer is."""
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"][0]

    def tokens(self, question: str) -> list[int]:
        """Of the question, as the model wants it; worked out once."""
        if question not in self._questions:
            self._questions[question] = self.tokenise(question)
        return self._questions[question]

    @abstractmethod
    def tokenise(self, question: str) -> list[int]: ...

    @abstractmethod
    def answer(self, images: Float[Tensor, "B 3 H W"], ids: Int[Tensor, "Q B N"], there: Bool[Tensor, "Q B N"]) -> Float[Tensor, "Q B V"]:
        """Logits of the answer's first token, to Q questions about each picture."""

    @torch.no_grad()
    def yes(self, images: Float[Tensor, "B 3 H W"], questions: Sequence[Sequence[str]]) -> list[Float[Tensor, " Q"]]:
        """p(yes) / (p(yes) + p(no)) as the first word of the answer, to each question about each picture in [0, 1]. All at once, `batch`
        pictures at most."""
        self.model.to(images.device)
        found: list[Tensor] = []
        for start in range(0, len(images), self.batch):
            some = questions[start : start + self.batch]
            most = max(map(len, some))
            rows = [torch.tensor(self.tokens(asked[min(q, len(asked) - 1)])) for q in range(most) for asked in some]
            ids = pad_sequence(rows, batch_first=True).view(most, len(some), -1)
            length = torch.tensor([len(row) for row in rows]).view(most, len(some), 1)
            there = torch.arange(ids.shape[2]) < length
            logits = self.answer(images[start : start + self.batch], ids.to(images.device), there.to(images.device))
            share = logits[..., self.words].softmax(-1)[..., 0].cpu()
            found += [share[: len(asked), row] for row, asked in enumerate(some)]
        return found


class GIT(Asked):
    """GIT (arXiv 2205.14100): the answer goes on where the question ends."""

    def __init__(self, model: Any, tokenizer: Any, preprocessing: Preprocessing, batch: int) -> None:
        super().__init__(model, tokenizer, batch)
        self.preprocessing = preprocessing

    def tokenise(self, question: str) -> list[int]:
        return [self.tokenizer.cls_token_id, *self.tokenizer(question, add_special_tokens=False)["input_ids"]]

    def answer(self, images: Float[Tensor, "B 3 H W"], ids: Int[Tensor, "Q B N"], there: Bool[Tensor, "Q B N"]) -> Float[Tensor, "Q B V"]:
        flat, told = ids.flatten(0, 1), there.flatten(0, 1)
        out = self.model(pixel_values=preprocess(images, self.preprocessing), input_ids=flat, attention_mask=told.long(), use_cache=False)
        text = out.logits[:, -flat.shape[1] :]
        last = told.sum(1) - 1
        return text[torch.arange(len(flat), device=flat.device), last].view(*ids.shape[:2], -1)


class BLIP(Asked):
    """BLIP for questions (arXiv 2201.12086): one network reads question and picture, another begins the answer.

    A question begins with the mark [ENC] that BLIP was trained with, the vocabulary's last; `transformers` leaves [CLS] there."""

    def __init__(self, model: Any, tokenizer: Any, scaling: Scaling, batch: int) -> None:
        super().__init__(model, tokenizer, batch)
        self.scaling = scaling

    def tokenise(self, question: str) -> list[int]:
        tokens = self.tokenizer(question, truncation=True, max_length=QUESTION)["input_ids"]
        return [self.model.config.text_config.vocab_size - 1, *tokens[1:]]

    def answer(self, images: Float[Tensor, "B 3 H W"], ids: Int[Tensor, "Q B N"], there: Bool[Tensor, "Q B N"]) -> Float[Tensor, "Q B V"]:
        flat, told = ids.flatten(0, 1), there.flatten(0, 1).long()
        seen = self.model.vision_model(pixel_values=scale(images, self.scaling)).last_hidden_state.repeat(len(ids), 1, 1)
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.model.text_encoder(
            input_ids=flat, attention_mask=told, encoder_hidden_states=seen, encoder_attention_mask=everywhere
        ).last_hidden_state
        length = told.sum(1)
        logits = read.new_empty(len(flat), self.model.config.text_config.vocab_size)
        for tokens in length.unique().tolist():  # the decoder looks at padding, whatever its mask says
            own = length == tokens
            begin = torch.full((int(own.sum()), 1), self.model.decoder_start_token_id, device=seen.device)
            logits[own] = self.model.text_decoder(input_ids=begin, encoder_hidden_states=read[own, :tokens]).logits[:, 0]
        return logits.view(*ids.shape[:2], -1)
