"""A next-scale transformer from scratch: cross-entropy of every token given all coarser scales (VAR)."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from varl.models.next_scale import NextScale


def token_loss(
    model: NextScale, prompts: Int[Tensor, "B ..."], inputs: Float[Tensor, "B l C"], ids: Int[Tensor, "B L"]
) -> Float[Tensor, "B L"]:
    """-log p of each token, nats. `inputs` are `MultiScaleVQ.inputs(ids)`, `prompts` what `NextScale.condition` takes."""
    condition = model.condition(prompts)
    logits = model.logits(model(condition, inputs), condition)
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
