"""Group-relative policy optimisation (GRPO, arXiv 2402.03300): the objective and its parts, and the plain algorithm on whole pictures."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varl.algorithms.advantages import flat_groups, nan_std, part_advantages
from varl.algorithms.mask_propagation import chained_mask, dilate, direct_mask, judged_boxes, region_reach, spread
from varl.algorithms.panw import token_weights
from varl.config import GRPOConfig
from varl.errors import ConfigError
from varl.rng import Stream
from varl.types import WATCHED, Judge, Judgement, Layout, Policy, Prompt, Rollout, Score, TrainBatch

# ---- maths ---------------------------------------------------------------------------------------------------------------------------


def log_ratio(
    logp: Float[Tensor, "B L"],
    old_logp: Float[Tensor, "B L"],
    step: Int[Tensor, "B L"],
    active: Bool[Tensor, "B L"],
    level: Literal["token", "step", "sequence"] = "token",
) -> Float[Tensor, "B L"]:
    """Log of the importance ratio that each token is clipped by, nats:

        token      logp_l - old_l
        step       mean over the active tokens of l's step: the geometric mean of their ratios
        sequence   mean over all active tokens: GSPO (arXiv 2507.18071) Eq. 7

    The gradient flows through the mean. At ratio 1, with one advantage and weight within the mean, the three have the same gradient.
    NextFlow writes the product over a whole grid; a product over thousands of tokens leaves any clip range at once, hence the mean. Only
    tokens that learn (`active`) take part, else the mean would hand their gradient to tokens that are masked out."""
    difference = logp - old_logp.detach()
    match level:
        case "token":
            return difference
        case "step":
            span = step.long()
        case "sequence":
            span = torch.zeros_like(step).long()
    zeros = torch.zeros(len(span), int(span.max()) + 1, device=logp.device, dtype=logp.dtype)
    mean = zeros.scatter_add(1, span, difference * active) / zeros.scatter_add(1, span, active.to(logp.dtype)).clamp(min=1)
    return mean.gather(1, span)


def clipped_surrogate(log_ratio: Float[Tensor, "B L"], advantage: Float[Tensor, "B L"], low: float, high: float) -> Float[Tensor, "B L"]:
    """PPO's objective per token, to be maximised, in units of the advantage: min(r A, clip(r, 1 - low, 1 + high) A). At r = 1 its gradient
    is A * grad log pi."""
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def k1(logp: Float[Tensor, "*B"], ref_logp: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """logp - ref: an unbiased value of KL(policy || reference), but as a loss its expected gradient is that of sum pi = 1: zero."""
    return logp - ref_logp


def k2(logp: Float[Tensor, "*B"], ref_logp: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """(logp - ref)^2 / 2: a biased value, but as a loss its expected gradient is that of the reverse KL(policy || reference)."""
    return 0.5 * (logp - ref_logp).square()


def k3(logp: Float[Tensor, "*B"], ref_logp: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """exp(d) - 1 - d, d = ref - logp: an unbiased, never negative value of the reverse KL, but as a loss its expected gradient is that of
    the forward KL(reference || policy)."""
    return (ref_logp - logp).exp() - 1 - (ref_logp - logp)


def kl_penalty(estimator: Literal["analytic", "k1", "k2", "k3"], score: Score) -> Float[Tensor, "B L"]:
    """KL to the reference per token, nats, as a loss."""
    if score.kl is None or score.ref_logp is None:
        raise ConfigError("grpo.beta is above 0, but the policy was scored without a reference model. Give it one, or set grpo.beta=0.")
    if estimator == "analytic":
        return score.kl
    return {"k1": k1, "k2": k2, "k3": k3}[estimator](score.logp, score.ref_logp)


def normaliser(
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"], active: Bool[Tensor, "B L"], tokens: int
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """(scale, size) of each row. The loop sums scale * weight * surrogate over all rows of all pieces and ranks, and divides once by the
    sum of sizes. With n_b the active tokens of row b, and a piece being what `collect` yields at once:

        dapo     sum over all / all active tokens of the step               scale 1            size n_b
        grpo     mean over rows of (row's sum / n_b)                        scale 1 / n_b      size 1
        dr_grpo  sum over all / (rows * tokens of a whole picture)          scale 1            size tokens
        bnpo     mean over pieces of (piece's sum / piece's active tokens)  scale 1 / sum n_b  size 1 / rows of the piece

    A token is active if the policy chose it in the stage that learns. Tokens that a mask silences stay active: a mask then removes terms of
    expectation 0 and leaves the others' size alone, where renormalising would make pictures with little text loud. dr_grpo alone counts
    tokens outside the stage, so that prefix and suffix updates keep the size they have in the full objective."""
    count = active.sum(1).float()
    match loss_type:
        case "dapo":
            return torch.ones_like(count), count
        case "grpo":
            return 1 / count.clamp(min=1), torch.ones_like(count)
        case "dr_grpo":
            return torch.ones_like(count), torch.full_like(count, float(tokens))
        case "bnpo":
            return (1 / count.sum().clamp(min=1)).expand_as(count).clone(), torch.full_like(count, 1 / len(count))


MOST_STEPS, BLOCKS = 32, 8
"""Metrics are also given step by step, or of more than MOST_STEPS (a raster's tokens, not scales) for BLOCKS of them."""


def by_step(name: str, value: Float[Tensor, "B L"], where: Bool[Tensor, "B L"], step: Int[Tensor, "B L"], steps: int) -> dict[str, float]:
    """`name`/step_i: the mean over the tokens of step i that `where` admits, for every one of the `steps` that has any. Of many steps that
    of the block of equally many that begins with step i."""
    size = 1 if steps <= MOST_STEPS else -(-steps // BLOCKS)
    at, zeros = step[where].long() // size, torch.zeros(-(-steps // size), device=value.device)
    total, count = zeros.scatter_add(0, at, value.detach()[where].float()), zeros.scatter_add(0, at, torch.ones_like(at).float())
    return {f"{name}/step_{i * size}": t / n for i, (t, n) in enumerate(zip(total.tolist(), count.tolist(), strict=True)) if n}


# ---- credit, shared by the algorithms ------------------------------------------------------------------------------------------------

T = TypeVar("T")


def repeated(prompts: Sequence[Prompt], copies: int) -> tuple[Prompt, ...]:
    """Each prompt `copies` times, side by side, as `Stream.repeat` does with addresses."""
    return tuple(prompt for prompt in prompts for _ in range(copies))


def chunks(prompts: Sequence[Prompt], rng: Stream, size: int) -> Iterator[tuple[Sequence[Prompt], Stream]]:
    """The prompts and their addresses, `size` at a time."""
    for i in range(0, len(prompts), size):
        part = range(i, min(i + size, len(prompts)))
        yield [prompts[j] for j in part], rng.select(part)


def judged(policy: Policy, judge: Judge, drawn: Iterable[tuple[T, Rollout]], group: int) -> Iterator[tuple[T, Judgement]]:
    """Shows each chunk of whole pictures, `group` of them side by side for each prompt, to the judge, and yields what came with it and the
    verdict, in order. One chunk ahead: while a chunk is judged the next is drawn, and while the caller trains on it the next is judged."""
    waiting = None
    for item, whole in drawn:
        asked = judge.submit(policy.decode(whole), whole.prompts, group)
        if waiting is not None:
            yield waiting[0], waiting[1].result()
        waiting = item, asked
    if waiting is not None:
        yield waiting[0], waiting[1].result()


def batched(pieces: Iterator[T], config: GRPOConfig) -> Iterator[list[T]]:
    """Pieces whose advantages can be known together: one by one, but all at once where advantages are divided by the deviation of the whole
    batch. `scale_rewards=batch` therefore waits for the last judgement before the first piece, and nothing overlaps with training; and the
    batch is this process's own."""
    if config.scale_rewards == "batch":
        yield list(pieces)
    else:
        for piece in pieces:
            yield [piece]


def reward_mask(config: GRPOConfig, layout: Layout, judgement: Judgement) -> Bool[Tensor, "B L"]:
    """Tokens that learn from the reward (mask propagation); all of them without a mask."""
    if config.mask == "none":
        return torch.ones(len(judgement.value), layout.tokens, dtype=torch.bool)
    box = dilate(judged_boxes(judgement), layout.grids[-1], config.mask_dilation)
    return direct_mask(box, layout.grids) if config.mask == "direct" else chained_mask(box, layout.grids)


def local_reach(config: GRPOConfig, layout: Layout, judgement: Judgement) -> Bool[Tensor, "B R L"] | None:
    """Which tokens each region's credit goes to; None where credit is global, by config or because the reward does not say where."""
    if not config.region_credit or judgement.region_value is None:
        return None
    if judgement.region_box is None:
        return torch.ones(*judgement.region_value.shape, layout.tokens, dtype=torch.bool)
    return region_reach(dilate(judgement.region_box.cpu(), layout.grids[-1], config.mask_dilation), layout.cells())


def token_advantages(
    layout: Layout,
    judgements: Sequence[Judgement],
    reaches: Sequence[Bool[Tensor, "_ _ L"] | None],
    relative: Callable[[Float[Tensor, "N R"]], Float[Tensor, "N R"]],
) -> list[Float[Tensor, "_ L"]]:
    """Advantage of every token of every piece. `relative` sets N pictures, side by side, against their groups, for each of R parts of the
    reward: the regions, or if any piece has no `reach`, the whole as the only part, which reaches all tokens."""
    value = torch.cat([judgement.value.float().cpu() for judgement in judgements])
    local = [(judgement.region_value, reach) for judgement, reach in zip(judgements, reaches, strict=True) if reach is not None]
    if len(local) < len(judgements):
        part, reach = value[:, None], torch.ones(len(value), 1, layout.tokens, dtype=torch.bool)
    else:
        regions = max(reach.shape[1] for _, reach in local)
        part = torch.cat([_pad(region_value.float().cpu(), regions, torch.nan) for region_value, _ in local if region_value is not None])
        reach = torch.cat([_pad(reach, regions, False) for _, reach in local])
        part = part.masked_fill(value.isnan()[:, None], torch.nan)
    return list(spread(relative(part), reach).split([len(judgement.value) for judgement in judgements]))


def _pad(tensor: Tensor, regions: int, value: float | bool) -> Tensor:
    return torch.cat([tensor, tensor.new_full((len(tensor), regions - tensor.shape[1], *tensor.shape[2:]), value)], 1)


def against_group(config: GRPOConfig, part: Float[Tensor, "N R"]) -> Float[Tensor, "N R"]:
    """Each picture against the G of its prompt."""
    return part_advantages(part.unflatten(0, (-1, config.num_generations)), config.scale_rewards).flatten(0, 1)


def reward_metrics(judgement: Judgement, group: int) -> dict[str, float]:
    """Of one piece: `reward` and `rewards/<part>/mean` (over pictures that did not fail, own unit), `reward_std` and `rewards/<part>/std`
    (within a group, mean over groups: pieces hold whole groups, so these do not depend on how many), `frac_reward_zero_std` (share of
    groups whose rewards are all equal), `reward_failed` (share of pictures), `monitor/<part>` (mean over the pictures looked at)."""
    value = judgement.value.float().cpu().reshape(-1, group)
    metrics = {
        "reward_std": nan_std(value).mean().item(),
        "frac_reward_zero_std": flat_groups(value).float().mean().item(),
        "reward_failed": value.isnan().float().mean().item(),
    }
    if not value.isnan().all():
        metrics["reward"] = value.nanmean().item()
    for name, part in judgement.parts.items():
        if part.isnan().all():
            continue
        if name.startswith(WATCHED):
            metrics[name] = part.nanmean().item()
        else:
            metrics |= {
                f"rewards/{name}/mean": part.nanmean().item(),
                f"rewards/{name}/std": nan_std(part.reshape(-1, group)).mean().item(),
            }
    return metrics


def train_batch(
    config: GRPOConfig,
    layout: Layout,
    rollout: Rollout,
    judgement: Judgement,
    advantage: Float[Tensor, "B _"],
    mask: Bool[Tensor, "B _"],
    *,
    stage: str = "all",
    inside: Bool[Tensor, "B L"] | None = None,
) -> TrainBatch:
    """A piece to learn from. `advantage` and `mask` are those of whole pictures; a prefix takes its first columns. `inside` is the stage,
    all that was sampled unless given. KL has the weights of PANW but neither mask nor failures: what the reward says nothing about still
    stays near the reference, and at every step's own pace, so that tabular fixed points do not move."""
    device, length = rollout.logp.device, rollout.logp.shape[1]
    active = rollout.sampled if inside is None else rollout.sampled & inside
    scale, size = normaliser(config.loss_type, active, layout.tokens)
    kl_weight = token_weights(rollout.step, active, config.panw_alpha) * scale[:, None]
    keep = mask[:, :length].to(device) & ~judgement.value.isnan().to(device)[:, None]
    metrics = reward_metrics(judgement, config.num_generations)
    if config.mask != "none":
        learns = mask[:, :length].to(device).float()
        metrics["mask_occupancy"] = _mean(learns, active)
        metrics |= by_step("mask_occupancy", learns, active, rollout.step, layout.steps)
    return TrainBatch(
        rollout=rollout,
        advantage=advantage[:, :length].to(device),
        weight=kl_weight * keep,
        kl_weight=kl_weight,
        judgement=judgement,
        size=size,
        stage=stage,
        metrics=metrics,
    )


# ---- the algorithm -------------------------------------------------------------------------------------------------------------------


class GRPO:
    """Group-relative policy optimisation on whole pictures, with PANW, mask propagation and region credit as weights and advantages."""

    def __init__(self, config: GRPOConfig) -> None:
        if config.importance_sampling_level == "sequence" and (config.panw_alpha > 0 or config.region_credit):
            raise ConfigError(
                "grpo.importance_sampling_level='sequence': all tokens of a picture share one ratio, so weights per step (panw_alpha) and "
                "advantages per region (region_credit) average out. Use token, or switch these off."
            )
        if config.importance_sampling_level == "step" and config.region_credit:
            raise ConfigError(
                "grpo.importance_sampling_level='step': all tokens of a step share one ratio, so advantages per region (region_credit) "
                "average out. Use token, or switch region_credit off."
            )
        self.config = config
        self.num_iterations = config.num_iterations

    def collect(self, policy: Policy, prompts: Sequence[Prompt], judge: Judge, rng: Stream, step: int) -> Iterator[TrainBatch]:
        """Pieces of whole groups, about `rollouts_per_chunk` pictures each, in the order of the prompts."""
        group = self.config.num_generations

        def draw() -> Iterator[tuple[Rollout, Rollout]]:
            for some, address in chunks(prompts, rng, max(1, self.config.rollouts_per_chunk // group)):
                rollout = policy.rollout(repeated(some, group), address.repeat(group))
                yield rollout, rollout

        for pieces in batched(judged(policy, judge, draw(), group), self.config):
            yield from self.credit(policy.layout, pieces)

    def credit(self, layout: Layout, pieces: Sequence[tuple[Rollout, Judgement]]) -> Iterator[TrainBatch]:
        """What to learn from pieces of whole groups whose advantages are known together."""
        judgements = [judgement for _, judgement in pieces]
        reaches = [local_reach(self.config, layout, judgement) for judgement in judgements]
        advantages = token_advantages(layout, judgements, reaches, partial(against_group, self.config))
        for (rollout, judgement), advantage in zip(pieces, advantages, strict=True):
            yield train_batch(self.config, layout, rollout, judgement, advantage, reward_mask(self.config, layout, judgement))

    def objective(self, policy: Policy, batch: TrainBatch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """`scored`, by the policy as it is now."""
        return self.scored(policy.score(batch.rollout), batch, policy.layout.steps)

    def scored(self, score: Score, batch: TrainBatch, steps: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """sum over tokens of weight * min(r A, clip(r) A) - beta * kl_weight * KL, with r against the log-probs of the rollout.

        Metrics, over active tokens: `entropy` (nats; and `entropy/step_i`), `kl` (nats, analytic, to the reference if there is one),
        `clip_ratio/low_mean`, `high_mean` and `region_mean` (share of learning tokens whose gradient the clip stopped),
        `sampling/sampling_logp_difference/mean` and `max` (|log-prob now - log-prob in the rollout|, nats; 0 before the first update), and
        where the law that was drawn from is another one than the law that is scored, `sampling/law_difference/mean` and `max` (nats)."""
        config, rollout = self.config, batch.rollout
        low, high = config.epsilon, config.epsilon if config.epsilon_high is None else config.epsilon_high
        active, learning = batch.kl_weight > 0, batch.weight > 0
        ratio = log_ratio(score.logp, rollout.logp, rollout.step, learning, config.importance_sampling_level)
        objective = (batch.weight * clipped_surrogate(ratio, batch.advantage, low, high)).sum()
        if config.beta > 0:
            objective = objective - config.beta * (batch.kl_weight * kl_penalty(config.kl_estimator, score)).sum()

        with torch.no_grad():
            below = (ratio.exp() < 1 - low) & (batch.advantage < 0)
            above = (ratio.exp() > 1 + high) & (batch.advantage > 0)
            drift = (score.logp - rollout.logp).abs().masked_fill(~rollout.sampled, 0.0)
            metrics = {
                "entropy": _mean(score.entropy, active),
                **by_step("entropy", score.entropy, active, rollout.step, steps),
                "clip_ratio/low_mean": _mean(below.float(), learning),
                "clip_ratio/high_mean": _mean(above.float(), learning),
                "clip_ratio/region_mean": _mean((below | above).float(), learning),
                "sampling/sampling_logp_difference/mean": _mean(drift, rollout.sampled),
                "sampling/sampling_logp_difference/max": drift.max().item(),
            }
            if score.kl is not None:
                metrics["kl"] = _mean(score.kl, active)
            if rollout.sample_logp is not None:
                gap = (rollout.logp - rollout.sample_logp).abs().masked_fill(~rollout.sampled, 0.0)
                metrics |= {"sampling/law_difference/mean": _mean(gap, rollout.sampled), "sampling/law_difference/max": gap.max().item()}
        return objective, metrics


def _mean(value: Float[Tensor, "B L"], where: Bool[Tensor, "B L"]) -> float:
    return (value.detach() * where).sum().item() / max(int(where.sum()), 1)
