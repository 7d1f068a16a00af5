"""Per-Action Normalization Weighting: coarse steps, which hold few tokens, gain weight; fine ones lose it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def panw_weights(sizes: Float[Tensor, "*B S"], alpha: float) -> Float[Tensor, "*B S"]:
    """Weight of each token of a step that holds n_t tokens, unitless:

        k_t = n_t^-alpha                                VAR-RL (arXiv 2601.02256) Eq. 9
        k~_t = k_t * sum_s n_s / sum_s k_s n_s          so that sum_t n_t k~_t = sum_t n_t

    The paper prints k_t only, and speaks of a normalisation; ours keeps the stage's total weight, so that learning rate and gradient
    clipping carry over from alpha = 0, which is plain GRPO. alpha = 1 gives every step the same share, 0.6 to 0.8 is the paper's robust
    range. Steps without tokens get 0."""
    weight = torch.where(sizes > 0, sizes.clamp(min=1).pow(-alpha), 0.0)
    total = sizes.sum(-1, keepdim=True)
    return weight * (total / (weight * sizes).sum(-1, keepdim=True).where(total > 0, 1.0))


def token_weights(step: Int[Tensor, "B L"], active: Bool[Tensor, "B L"], alpha: float) -> Float[Tensor, "B L"]:
    """PANW weight of each active token, 0 elsewhere. A step's size is the number of active tokens that this row drew in it, so that raster
    and masked models are weighted by what they did, and a stage of a next-scale model among its own steps."""
    steps = int(step.max()) + 1
    sizes = torch.zeros(len(step), steps, device=step.device).scatter_add(1, step.long(), active.float())
    return panw_weights(sizes, alpha).gather(1, step.long()) * active
