"""A next-scale transformer from scratch: cross-entropy of every token given all coarser scales (VAR)."""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varl.models.next_scale import NextScale


def token_fit(
    model: NextScale, prompts: Int[Tensor, "B ..."], inputs: Float[Tensor, "B l C"], ids: Int[Tensor, "B L"]
) -> tuple[Float[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """(-log p of each token in nats, whether no other value was more probable). `inputs` are `MultiScaleVQ.inputs(ids)`, `prompts` what
    `NextScale.condition` takes."""
    condition = model.condition(prompts)
    logits = model.logits(model(condition, inputs), condition).float()
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return loss, logits.detach().argmax(-1) == ids


def token_loss(
    model: NextScale, prompts: Int[Tensor, "B ..."], inputs: Float[Tensor, "B l C"], ids: Int[Tensor, "B L"]
) -> Float[Tensor, "B L"]:
    """-log p of each token, nats."""
    return token_fit(model, prompts, inputs, ids)[0]
