"""What pre-training asks of a family of models; each family answers in a file of its own."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from varl.tokenizers.bsq import BSQ
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.vq import VQ
from varl.types import Prompt

Fit = tuple[Float[Tensor, "b L"], Bool[Tensor, "b L"]]
"""-log p of each token in nats, and whether no other value was more probable; of each bit, where a token is bits."""


@runtime_checkable
class Family(Protocol):
    """A model and its tokenizer: what is asked of the transformer."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def tokenizer(self) -> MultiScaleVQ | VQ | BSQ: ...

    def keep(self, images: Float[Tensor, "B 3 H W"]) -> Tensor:
        """What is kept of pictures for all steps: their tokens, or features to make them of."""
        ...

    def read(self, prompts: Sequence[Prompt]) -> Int[Tensor, "N ..."]:
        """A row for each prompt, to make batches of. Raises DataError for a prompt that the model cannot read."""
        ...

    def nothing(self, said: Int[Tensor, "b ..."]) -> Int[Tensor, "..."]:
        """The row of the empty prompt, as long as those of `said`; or one for each of them."""
        ...

    def fit(self, said: Int[Tensor, "b ..."], kept: Tensor) -> Fit:
        """Of all tokens, each given those before it."""
        ...

    def parts(self, losses: Float[Tensor, "N L"]) -> dict[str, float]:
        """Means over parts of the picture, where the family has parts."""
        ...


@runtime_checkable
class CodebookFamily(Family, Protocol):
    """And of a tokenizer that looks codes up."""

    @property
    def tokenizer(self) -> MultiScaleVQ | VQ: ...

    @property
    def codebook(self) -> nn.Embedding: ...

    def convolutions(self) -> nn.Module:
        """What of the tokenizer gradients move; its codebook moves by averages."""
        ...

    def autoencode(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, ""]]:
        """Reconstruction without a codebook, and a loss that keeps its features where codes can follow."""
        ...

    def start_codebook(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> None:
        """Puts the codes on vectors that the features of `images` ask for."""
        ...

    def uses(self, ids: Int[Tensor, "B L"]) -> Int[Tensor, " n"]:
        """The ids in the order in which the tokenizer lists the vectors that it looked up."""
        ...


def fit_of(logits: Float[Tensor, "b L V"], ids: Int[Tensor, "b L"]) -> Fit:
    """In fp32."""
    logits = logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return loss, logits.detach().argmax(-1) == ids
