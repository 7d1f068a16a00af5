"""Harmon (arXiv 2503.21979): MAR with a language model, Qwen2, between its halves, which reads a caption and then what the encoder says.

    encoder         buffer + known tokens                       no class: the buffer holds the learned vector for "none"
    language model  caption, known tokens, buffer               each sees what stands before it; what comes out is added to the encoder's
    decoder         buffer + all places, and the diffusion head, as MAR's

A caption is read once, into keys and values that every later pass looks at and none writes to. (MAR-GRPO's release lets training passes
append to them.) Module and parameter names are those of the released checkpoints; Qwen2 is `transformers`' own, and is not trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from varl.config import HarmonConfig
from varl.errors import DataError
from varl.models.diffusion_head import Ancestral, DiffusionHead
from varl.models.mar import MAR

TEMPLATE = "<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
"""Qwen's chat format as Harmon was trained with it: without the message from the system that Qwen's own template puts before."""
CAPTION, NO_CAPTION = "Generate an image: {text}", "Generate an image."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompts:
    """What the language model made of B captions: keys and values of its S layers. Indexed by rows like a tensor."""

    keys: Float[Tensor, "S B heads N d"]
    values: Float[Tensor, "S B heads N d"]
    there: Bool[Tensor, "B N"]
    """False where a caption that is shorter than the longest is padded, at its end."""

    def __len__(self) -> int:
        return len(self.there)

    def __getitem__(self, rows: Any) -> "Prompts":
        return Prompts(keys=self.keys[:, rows], values=self.values[:, rows], there=self.there[rows])


class Harmon(nn.Module):
    def __init__(self, config: HarmonConfig, whole: Any, words: Any) -> None:
        """`whole` is the Qwen2ForCausalLM, `words` its tokenizer. The head that draws words is neither moved to another device nor among
        this module's weights, and is saved as it was."""
        super().__init__()
        self.config, self.words = config, words
        self._whole = (whole,)  # in a tuple, so that its other parts are no parts of this module
        self.llm = nn.ModuleDict({"model": whole.model})
        self.mar = MAR(config.mar, config.grid)
        here, inner = config.mar.encoder.width, config.width
        self.proj_in = nn.Sequential(nn.Linear(here, inner), nn.SiLU(), nn.Linear(inner, inner))
        self.proj_out = nn.Sequential(nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, here))
        self.tokens, self.channels = self.mar.tokens, self.mar.channels
        """L of a picture, and d of a token."""
        self.llm.requires_grad_(False)
        self.mar.class_emb.requires_grad_(False)

    @property
    def whole(self) -> Any:
        """The Qwen2ForCausalLM."""
        return self._whole[0]

    @property
    def head(self) -> DiffusionHead:
        return self.mar.head

    @property
    def blocks(self) -> list[nn.Module]:
        """What is split over processes, one by one."""
        return [*self.mar.encoder_blocks, *self.whole.model.layers, *self.mar.decoder_blocks]

    def schedule(self, steps: int) -> tuple[int, ...]:
        return self.mar.schedule(steps)

    def denoiser(self, steps: int) -> Ancestral:
        return self.mar.denoiser(steps)

    # -- captions ----------------------------------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Of captions, in tokens."""
        return self.config.positions - self.tokens - self.config.mar.buffer

    def read(self, texts: Sequence[str]) -> list[Int[Tensor, " _"]]:
        """Token ids of each caption in the chat template; of the empty one, what the authors ask for "none" with."""
        found = []
        for text in texts:
            asked = CAPTION.format(text=text) if text else NO_CAPTION
            ids = torch.tensor(self.words(TEMPLATE.format(asked=asked))["input_ids"])
            if len(ids) > self.longest:
                raise DataError(f"prompt {text!r} has {len(ids)} tokens, the model takes 1 to {self.longest}. Shorten it.")
            found.append(ids)
        return found

    def condition(self, captions: Sequence[Int[Tensor, " _"]]) -> Prompts:
        """Of the ids of `read`. Padding stands after a caption, and is hidden from the picture."""
        if not all(len(ids) for ids in captions):
            raise ValueError("condition: a caption has no tokens. The empty caption has some too: take them from read([''])[0].")
        device = self.mar.fake_latent.device
        ids = pad_sequence([ids.to(device) for ids in captions], batch_first=True)
        lengths = torch.tensor([[len(ids)] for ids in captions], device=device)
        places = torch.arange(ids.shape[1], device=device)
        kept = _Kept()
        self.llm["model"](
            input_ids=ids,
            attention_mask=(places[:, None] >= places)[None, None],
            position_ids=places[None],
            past_key_values=kept,
            use_cache=True,
        )
        return Prompts(keys=torch.stack(kept.keys), values=torch.stack(kept.values), there=places < lengths)

    # -- one set of tokens -------------------------------------------------------------------------------------------------------------

    def forward(self, condition: Prompts, tokens: Float[Tensor, "B L C"], known: Int[Tensor, "B n"]) -> Float[Tensor, "B L E"]:
        """z of every place, having seen the tokens at the places `known`, in whichever order these are given; the others are not read."""
        known = known.sort(1).values
        return self.mar.decode(self.encode(condition, tokens, known), known)

    def encode(self, condition: Prompts, tokens: Float[Tensor, "B L C"], known: Int[Tensor, "B n"]) -> Float[Tensor, "B m D"]:
        """The buffer, and then the known tokens, which the language model reads in the order in which they are given."""
        x = self.see(tokens, known)
        buffer = self.config.mar.buffer
        heard = self.hear(condition, self.proj_in(x).roll(-buffer, 1)).roll(buffer, 1)
        return x + self.proj_out(heard)

    def see(self, tokens: Float[Tensor, "B L C"], known: Int[Tensor, "B n"]) -> Float[Tensor, "B m D"]:
        """What MAR's encoder says, which has not heard of a caption."""
        return self.mar.encode(self.mar.fake_latent.expand(len(tokens), -1), tokens, known)

    def hear(self, condition: Prompts, x: Float[Tensor, "B m W"]) -> Float[Tensor, "B m W"]:
        """What the language model says at each place of x, which stands after the captions; positions count what is there."""
        there, length = condition.there, x.shape[1]
        places = torch.arange(length, device=x.device)
        before = (places[:, None] >= places).expand(len(x), -1, -1)
        mask = torch.cat([there[:, None].expand(-1, length, -1), before], 2)[:, None]
        return self.llm["model"](
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=there.sum(1, keepdim=True) + places,
            past_key_values=_Before(condition),
            use_cache=True,
        ).last_hidden_state


class _Kept:
    """A cache, as `transformers`' attention asks for it, that keeps what one pass writes."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        return keys, values


class _Before:
    """A cache of captions, which is looked at and stays as it is."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    def get_seq_length(self, *_: Any) -> int:
        return self.prompts.there.shape[1]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.prompts.keys[layer], keys], 2), torch.cat([self.prompts.values[layer], values], 2)
