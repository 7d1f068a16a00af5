"""How much of a policy gradient is signal: scores per picture and step, projected once; every estimator is then a sum of stored scores, so
that all are compared on the same pictures.

Letters besides the house's: N batches; M = N + 1 replicates of a statistic, the first from all batches, the others with one left out;
D projected parameters. A batch gradient is g = sum_t w_t g_t, and g_t the mean over its pictures of advantage * grad log pi of step t's
tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from varl.rng import generator
from varl.types import BranchingPolicy, Policy, Prompt, Rollout

# ---- scores ---------------------------------------------------------------------------------------------------------------------------


class Projection:
    """Fixed random matrices P [p, out] and Q [in, q] for every linear weight of a module: its gradient delta^T x becomes P delta^T x Q,
    p, q <= `size`, and inner products keep their expectation. A side no longer than `size` stays as it is. Parameters that are not weights
    of linear layers (embeddings, biases, norms) are left out."""

    def __init__(self, module: nn.Module, size: int = 16, seed: int = 0) -> None:
        self.places: dict[int, tuple[slice, Tensor, Tensor]] = {}
        """By the id of the weight: its stretch of D, P, Q."""
        self.width = 0
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad and id(layer.weight) not in self.places:
                left, right = (
                    sketch(side, size, generator(seed, "projection", name, place)).to(layer.weight.device)
                    for place, side in enumerate(layer.weight.shape)
                )
                end = self.width + len(left) * len(right)
                self.places[id(layer.weight)] = (slice(self.width, end), left, right.T)
                self.width = end


def sketch(length: int, size: int, rng: torch.Generator) -> Float[Tensor, "p n"]:
    """Rows of independent normals of variance 1 / size, so that E<Sx, Sy> = <x, y>; the identity where nothing is to be saved."""
    return torch.eye(length) if length <= size else torch.randn(size, length, generator=rng) / size**0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedPrompt(Prompt):
    """A prompt that equals no other row's, so that a policy encodes it for this row alone."""

    row: int


class Linears(TorchFunctionMode):
    """Notes every linear map with a projected weight whose input has the batch's rows. Also those that a model calls as functions."""

    def __init__(self, projection: Projection, rows: int) -> None:
        super().__init__()
        self.projection, self.rows = projection, rows
        self.sliced = False
        """Whether the policy scored fewer rows at a time somewhere."""
        self.outputs: list[Tensor] = []
        self.projectors: list[tuple[slice, Callable[[Tensor], Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        place = self.projection.places.get(id(args[1])) if func is F.linear else None
        self.sliced |= place is not None and len(args[0]) < self.rows
        if place is not None and out.requires_grad and len(args[0]) % self.rows == 0:
            stretch, left, right = place
            right_x = self._by_row(args[0].detach()) @ right
            self.outputs.append(out)
            self.projectors.append((stretch, lambda delta: torch.einsum("blp,blq->bpq", self._by_row(delta) @ left.T, right_x).flatten(1)))
        return out

    def _by_row(self, x: Tensor) -> Float[Tensor, "B l n"]:
        """Rows that are copies of the batch, one after the other (guidance), are joined as if they were tokens."""
        with torch._C.DisableTorchFunction():
            return x.float().reshape(-1, self.rows, x[0].numel() // x.shape[-1], x.shape[-1]).transpose(0, 1).flatten(1, 2)


def step_scores(
    policy: Policy, rollout: Rollout, part: Int[Tensor, "B L"], parts: int, projection: Projection
) -> Float[Tensor, "B parts D"]:
    """Gradient of the summed log-probs of each row's tokens in each part (a step, or any other grouping of tokens), projected. Forward
    over the tokens up to the part's last step, backward to the linear layers' outputs. A policy that scores only some rows at a time, for
    their logits are large, is given no more than these. A layer that does not see one input per row is left out: with guidance, those that
    encode the prompt."""
    numbered = tuple(
        NumberedPrompt(**{f.name: getattr(prompt, f.name) for f in fields(Prompt)}, row=row) for row, prompt in enumerate(rollout.prompts)
    )
    rollout = replace(rollout, prompts=numbered, state=None)
    out = torch.zeros(len(rollout), parts, projection.width, device=rollout.logp.device)
    by_length: dict[int, list[int]] = {}
    for number in part.unique().tolist():
        by_length.setdefault(tokens_until(policy, rollout, part == number), []).append(number)
    for tokens, numbers in sorted(by_length.items(), reverse=True):
        some = first_tokens(rollout, tokens)
        with torch.enable_grad(), Linears(projection, len(some)) as seen:
            logp = policy.score(some).logp
        if seen.sliced:
            halves = range(len(rollout) // 2), range(len(rollout) // 2, len(rollout))
            return torch.cat([step_scores(policy, rollout.rows(half), part[list(half)], parts, projection) for half in halves])
        for number in numbers:
            total = (logp * (part[:, :tokens] == number).to(logp.device)).sum()
            deltas = torch.autograd.grad(total, seen.outputs, retain_graph=number != numbers[-1], allow_unused=True)
            for (stretch, project), delta in zip(seen.projectors, deltas, strict=True):
                if delta is not None:
                    out[:, number, stretch] += project(delta)
    return out


def tokens_until(policy: Policy, rollout: Rollout, where: Bool[Tensor, "B L"]) -> int:
    """How many tokens the last step of `where` needs to be scored: all, unless the policy scores half-drawn pictures, in step order."""
    if not isinstance(policy, BranchingPolicy):
        return rollout.step.shape[1]
    return int((rollout.step[0] <= rollout.step[where.to(rollout.step.device)].max()).sum())


def first_tokens(rollout: Rollout, tokens: int) -> Rollout:
    """The half-drawn picture of so many tokens."""
    names = ("actions", "logp", "step", "sampled", "sample_logp")
    cut = {name: getattr(rollout, name)[:, :tokens] for name in names if getattr(rollout, name) is not None}
    return replace(rollout, **cut, state=None)


def batch_gradient(advantage: Float[Tensor, " B"], scores: Float[Tensor, "B S D"]) -> Float[Tensor, "S D"]:
    """g_t = 1/B sum_b A_b s_bt, in float64."""
    return torch.einsum("b,bsd->sd", advantage.to(scores.device).double(), scores.double()) / len(scores)


# ---- moments: unbiased, with their jackknife replicates --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Second moments of N batch gradients of S steps. An estimator with weight w_t per step has |E g|^2 = w pairs w, E|g|^2 = w own w."""

    pairs: Float[Tensor, "M S S"]
    """Mean of <g_it, g_ju> over pairs of different batches: <E g_t, E g_u> without bias (a U-statistic)."""
    own: Float[Tensor, "M S S"]
    """Mean of <g_it, g_iu>: E<g_t, g_u>."""


def means(value: Float[Tensor, "N *S"]) -> Float[Tensor, "M *S"]:
    """The mean over batches, then the means with one batch left out."""
    total = value.sum(0, keepdim=True)
    return torch.cat([total / len(value), (total - value) / (len(value) - 1)])


def inner(gradient: Float[Tensor, "*N S D"]) -> Float[Tensor, "*N S S"]:
    return gradient @ gradient.mT


def moments(gradient: Float[Tensor, "N S D"], own: Float[Tensor, "N S S"] | None = None) -> Moments:
    """Of N >= 3 independent batches. `own` is each batch's E<g_t, g_u> where `gradient` is itself a mean of several estimates made from
    the same batch, and the noise of a single one is meant."""
    if len(gradient) < 3:
        raise ValueError(f"moments: {len(gradient)} batches, but pairs of batches with one left out need at least 3.")
    n, gradient = len(gradient), gradient.double()
    self_inner, total = inner(gradient), gradient.sum(0)
    cross = total @ gradient.mT
    without = inner(total) - cross - cross.mT + 2 * self_inner - self_inner.sum(0)
    pairs = torch.cat([(inner(total) - self_inner.sum(0))[None] / (n * (n - 1)), without / ((n - 1) * (n - 2))])
    return Moments(pairs=pairs, own=means(self_inner if own is None else own.double()))


def overlap(m: Moments, w: Float[Tensor, " S"], v: Float[Tensor, " S"]) -> Float[Tensor, " M"]:
    """<E g_w, E g_v>, unbiased; may come out below 0."""
    return torch.einsum("mst,s,t->m", m.pairs, w.double(), v.double())


def power(m: Moments, w: Float[Tensor, " S"]) -> Float[Tensor, " M"]:
    """E|g_w|^2."""
    return torch.einsum("mst,s,t->m", m.own, w.double(), w.double())


def snr(m: Moments, w: Float[Tensor, " S"]) -> Float[Tensor, " M"]:
    """|E g|^2 / E|g - E g|^2 of one batch."""
    signal = overlap(m, w, w)
    return signal / (power(m, w) - signal)


def cosine(m: Moments, w: Float[Tensor, " S"], v: Float[Tensor, " S"]) -> Float[Tensor, " M"]:
    """Between the mean gradients. Unbiased in each product, so an estimate may exceed 1; NaN where a signal is not above 0."""
    return overlap(m, w, v) / (overlap(m, w, w).sqrt() * overlap(m, v, v).sqrt())


def alignment(m: Moments, w: Float[Tensor, " S"], reference: Float[Tensor, " S"]) -> Float[Tensor, " M"]:
    """<E g_w, E g_ref> / sqrt(E|g_w|^2): rho but for the factor 1 / |E g_ref|, which all estimators share."""
    return overlap(m, w, reference) / power(m, w).sqrt()


def rho2(m: Moments, w: Float[Tensor, " S"], reference: Float[Tensor, " S"]) -> Float[Tensor, " M"]:
    """<E g_w, E g_ref>^2 / (E|g_w|^2 |E g_ref|^2): expected squared alignment of one batch gradient with the true gradient, which is its
    first-order progress at the best step size under isotropic curvature. Bias and noise both cost; without bias it is SNR / (1 + SNR)."""
    return alignment(m, w, reference).square() / overlap(m, reference, reference)


def best_weights(m: Moments, reference: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """The weights per step that maximise rho^2, own^-1 pairs ref, scaled to length 1. To be judged on other batches than these."""
    w = torch.linalg.solve(m.own[0], m.pairs[0] @ reference.double())
    return w / w.norm()


def signal_shares(m: Moments) -> Float[Tensor, "M S"]:
    """|E g_t|^2 / sum_u |E g_u|^2."""
    signal = m.pairs.diagonal(dim1=1, dim2=2)
    return signal / signal.sum(1, keepdim=True)


def noise_shares(m: Moments) -> Float[Tensor, "M S"]:
    """Var g_t / sum_u Var g_u, with Var g = E|g|^2 - |E g|^2."""
    noise = (m.own - m.pairs).diagonal(dim1=1, dim2=2)
    return noise / noise.sum(1, keepdim=True)


# ---- intervals ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval, whose ends may be infinite."""

    value: float
    low: float
    high: float

    def map(self, fn: Callable[[float], float]) -> "Estimate":
        """The image under a monotone function."""
        low, high = sorted((fn(self.low), fn(self.high)))
        return Estimate(value=fn(self.value), low=low, high=high)


def student(freedom: int) -> float:
    """0.975 quantile of Student's t, by the Cornish-Fisher expansion around the normal's: within 1 % from 3 degrees of freedom on."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def covariance(*replicate: Float[Tensor, " M"]) -> Float[Tensor, "k k"]:
    """Jackknife: (N-1)/N sum_i (x_i - mean)(y_i - mean) over the left-out replicates."""
    left_out = torch.stack(replicate)[:, 1:]
    centred = left_out - left_out.mean(1, keepdim=True)
    n = left_out.shape[1]
    return (n - 1) / n * centred @ centred.T


def estimate(replicate: Float[Tensor, " M"]) -> Estimate:
    """Value from all batches, jackknife standard error, Student's t with N - 1 degrees of freedom."""
    value, reach = replicate[0].item(), student(len(replicate) - 2) * covariance(replicate).sqrt().item()
    return Estimate(value=value, low=value - reach, high=value + reach)


def paired_ratio(numerator: Float[Tensor, " M"], denominator: Float[Tensor, " M"]) -> Estimate:
    """numerator / denominator on the same batches, with Fieller's interval: all R for which numerator - R denominator is not significantly
    different from 0. Unlike an interval around the ratio or its logarithm it stays right where the denominator is hardly known. The
    denominator is known not to be negative: where it is not told apart from 0 the ratio has no upper end, and where the numerator is not
    either, nothing is known: (-inf, inf)."""
    a, b = numerator[0].item(), denominator[0].item()
    if torch.equal(numerator, denominator):
        return Estimate(value=1.0, low=1.0, high=1.0)
    (aa, ab), (_, bb) = (student(len(numerator) - 2) ** 2 * covariance(numerator, denominator)).tolist()
    square, half, rest = b * b - bb, a * b - ab, a * a - aa
    value = a / b if b > 0 else math.copysign(math.inf, a)
    reach = math.sqrt(max(half * half - square * rest, 0.0))
    if square > 0:
        return Estimate(value=value, low=(half - reach) / square, high=(half + reach) / square)
    if rest <= 0:
        return Estimate(value=value, low=-math.inf, high=math.inf)
    # the roots lie on either side of 0; `reach` outweighs `half`
    if a > 0:
        return Estimate(value=value, low=(half - reach) / square if square else rest / (2 * half), high=math.inf)
    return Estimate(value=value, low=-math.inf, high=(half + reach) / square if square else rest / (2 * half))


def rho2_ratio(m: Moments, w: Float[Tensor, " S"], v: Float[Tensor, " S"], reference: Float[Tensor, " S"]) -> Estimate:
    """Progress of one batch with weights w over that with weights v, paired. An alignment below 0 counts as none."""
    return paired_ratio(alignment(m, w, reference), alignment(m, v, reference)).map(lambda rho: max(rho, 0.0) ** 2)


# ---- what follows from them -------------------------------------------------------------------------------------------------------------


def images_for_unit_snr(snr: Estimate, images: int) -> Estimate:
    """Pictures in a batch whose signal equals its noise, given the SNR of a batch of `images`: noise falls as 1 / pictures. Infinite where
    no signal was seen."""
    return snr.map(lambda ratio: images / ratio if ratio > 0 else math.inf)


def group_noise(within: float, between: float, images: int, group: int) -> float:
    """Noise of a gradient from `images` pictures in groups of `group`, each against the others of its group:

        (G/(G-1) within + G between) / images

    within: of one picture's term; between: of the prompts' own mean gradients. Few pictures per prompt are few to compare with; many
    leave few prompts."""
    return (group / (group - 1) * within + group * between) / images


def best_group(within: float, between: float) -> float:
    """The G that makes `group_noise` smallest: 1 + sqrt(within / between)."""
    return 1 + math.sqrt(within / between) if between > 0 else math.inf


def continuation_noise(share: float, continuations: int, cost: float) -> float:
    """Noise of the prefix gradient at equal cost, K continuations over one: (K b + 1 - b) (c + K) / (K (1 + c)).

    b: share of the reward's variance that the prefix settles; c: cost of a prefix over that of a continuation."""
    return (continuations * share + 1 - share) * (cost + continuations) / (continuations * (1 + cost))
