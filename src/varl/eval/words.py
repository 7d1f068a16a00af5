"""Do the words read? Held-out prompts, fixed seeds, one or more readers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from varl.rng import Stream
from varl.types import Policy, Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Pictures drawn for an evaluation: n prompts, `copies` pictures of each, side by side."""

    prompts: tuple[Prompt, ...]
    images: Float[Tensor, "B 3 H W"]
    tokens: Shaped[Tensor, "B L *d"]
    """Ids, or vectors of d numbers."""
    copies: int


def draw_sample(
    policy: Policy, prompts: Sequence[Prompt], *, copies: int, seed: int, batch: int = 64, tick: Callable[[int], None] = lambda n: None
) -> Sample:
    """`copies` pictures of each prompt from the policy's sample law, at addresses (seed, "eval", row): the same ones in every run."""
    rng = Stream(seed=seed, path=("eval",), rows=tuple(range(len(prompts)))).repeat(copies)
    repeated = [p for p in prompts for _ in range(copies)]
    images, tokens = [], []
    for start in range(0, len(repeated), batch):
        rows = range(start, min(start + batch, len(repeated)))
        rollout: Rollout = policy.rollout([repeated[i] for i in rows], rng.select(rows))
        images.append(policy.decode(rollout).cpu())
        tokens.append((rollout.actions if rollout.chain is None else rollout.actions[:, :, -1]).cpu())
        tick(len(rows))
    return Sample(prompts=tuple(repeated), images=torch.cat(images), tokens=torch.cat(tokens), copies=copies)


def token_diversity(tokens: Shaped[Tensor, "B L *d"], copies: int) -> float:
    """How much two pictures of the same prompt differ, mean over pairs and prompts. Of ids: the share of tokens in which they do, 0 for one
    picture, 1 for nothing shared. Of vectors: the root of the mean squared difference of their numbers, in the unit of the latents."""
    group = tokens.unflatten(0, (-1, copies))
    first, second = group[:, :, None], group[:, None]
    if tokens.is_floating_point():
        differ = (first - second).square().flatten(3).mean(-1).sqrt()
    else:
        differ = (first != second).float().mean(-1)
    return float(differ.sum((1, 2)).mean() / (copies * (copies - 1)))


def share_interval(hits: Float[Tensor, " B"], copies: int) -> tuple[float, float]:
    """Mean over prompts of the mean over their pictures, and the half-width of its 95% interval, clustered by prompt (pictures of one word
    are not independent). Failed readings (NaN) are left out; NaN where fewer than one, or for the half-width two, prompts are left."""
    values = hits.view(-1, copies).nanmean(1)
    values = values[~values.isnan()]
    half = 1.96 * values.std() / len(values) ** 0.5 if len(values) > 1 else torch.nan
    return float(values.mean()), float(half)


def reading_metrics(parts: Mapping[str, Float[Tensor, " B"]], copies: int) -> dict[str, float]:
    """word_accuracy and ned (similarity), with the half-widths of their 95% intervals; failed readings (NaN) are left out and counted."""
    metrics = {"failed": float(parts["ned"].isnan().float().mean())}
    for name in ("word_accuracy", "ned"):
        metrics[name], metrics[f"{name}_ci95"] = share_interval(parts[name], copies)
    return metrics
