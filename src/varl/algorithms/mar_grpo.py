"""MAR-GRPO (arXiv 2604.06966): GRPO on the denoising paths of a masked autoregressive model whose diffusion head is frozen.

A step of the model gives each token that it settles a latent, from which the head's chain of Gaussian moves makes the token. The paper
draws M further paths from each latent, to quiet the gradient of the tokens that differ most between them. What that does depends on what
these paths are paid. With the advantage A of the picture, and scores g_0 of the path that made it and g_1 .. g_M of the others:

    release           A mean(g_1 .. g_M)    the paper's expectation, as released. Paid for a picture they had no part in, paths scored
                                            under the law they were drawn from have expectation 0: the token is silenced, and noise of
                                            1/M the squared norm is left. At steps before the token was settled it is another thing:
                                            distillation, weighted by A, of the early latent towards the later one.
    include_primary   A mean(g_0 .. g_M)    expectation 1 / (M + 1) of GRPO's
    precision_weight  w A g_0               default. Damping without silence: from the further paths comes only the weight w, at most 1;
                                            it is independent of g_0, so the expected direction of each token is kept
    rewarded          mean(A_m g_m)         every further path makes a picture that is judged, M more for each: the only true average

All are weights on rows and tokens, so the objective is GRPO's, and they compose with PANW, masks and region credit. The tokens of a further
picture of `rewarded` did not see one another, only those of the first picture: with a single step its gradient is that of the reward, with
more it is that of pictures of which every token is drawn once again.

`support`: a step is trained on the tokens that it settled, whose paths made the picture. The release trains on all that were not known
before it. Most of their paths were thrown away, so that their expected gradient is 0, and a consistency filter that looks at the finished
picture picks among them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varl.algorithms.advantages import Scale, sibling_advantages
from varl.algorithms.grpo import GRPO, batched, by_step, chunks, judged, local_reach, repeated, reward_mask, token_advantages
from varl.config import MARGRPOConfig
from varl.errors import ConfigError
from varl.rng import Stream
from varl.types import Chain, Judge, Judgement, Layout, Policy, Prompt, RedrawingPolicy, Rollout, TrainBatch

# ---- maths ---------------------------------------------------------------------------------------------------------------------------


def stratified(uniform: Float[Tensor, "*B"], total: int, count: int) -> Bool[Tensor, "*B N"]:
    """`count` of `total`, one from each of `count` equal stretches, at the same place in each: exactly `count`, each with probability
    count / total. One number in [0, 1) decides."""
    edges = torch.arange(total + 1, device=uniform.device, dtype=torch.float64) * count / total
    return (edges + uniform.double()[..., None]).floor().diff(dim=-1) > 0


def uncertainty(tokens: Float[Tensor, "B M L d"]) -> Float[Tensor, "B L"]:
    """How far M tokens from the same latent differ: standard deviation over the M (divided by M, as released), mean over the d numbers; in
    the unit of the latents. 0 for M = 1."""
    return tokens.float().std(1, correction=0).mean(-1)


def uncertain_mask(spread: Float[Tensor, "B L"], fraction: float) -> Bool[Tensor, "B L"]:
    """The round(fraction * L) tokens of each row that differ most; of equal ones the first."""
    order = spread.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(spread, dtype=torch.bool).scatter(1, order[:, : round(fraction * spread.shape[1])], True)


def damping(spread: Float[Tensor, "B L"], uncertain: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Weight (u_min / u)^2 of each uncertain token, u_min the least spread among the row's uncertain ones, and 1 of the others: at most 1,
    without a jump between the two, and positive but in the limit of u_min = 0, where it is 1 at u = 0 and else 0. Ours; the paper has none.
    A rule of thumb: u is the spread of the token, which need not be that of its score (of a single Gaussian move they are inverse)."""
    least = spread.masked_fill(~uncertain, torch.inf).amin(1, keepdim=True)
    return torch.where(uncertain & (spread > least), (least / spread).square(), 1.0)


def shares(
    mode: Literal["release", "include_primary", "precision_weight", "rewarded"],
    spread: Float[Tensor, "B L"],
    uncertain: Bool[Tensor, "B L"],
    trajectories: int,
) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """(of the path that made the picture, of each of the M further ones): what part of the token's weight they get. With C = `uncertain`:

    release                     1 - C                   C / M
    include_primary, rewarded   1 - C + C / (M + 1)     C / (M + 1)
    precision_weight            `damping`               0"""
    c = uncertain.to(spread.dtype)
    match mode:
        case "release":
            return 1 - c, c / trajectories
        case "precision_weight":
            return damping(spread, uncertain), torch.zeros_like(c)
    return 1 - c + c / (trajectories + 1), c / (trajectories + 1)


def approach(now: Float[Tensor, "B L d"], before: Float[Tensor, "B L d"], final: Float[Tensor, "B L d"]) -> Float[Tensor, "B L"]:
    """By how much a step brought its prediction of each token nearer to the final one: cos(now, final) - cos(before, final), -2 to 2."""
    return torch.cosine_similarity(now, final, dim=-1) - torch.cosine_similarity(before, final, dim=-1)


def consistent(gain: Float[Tensor, "B L"], step: Int[Tensor, "B L"], settled: Int[Tensor, "B L"], threshold: float) -> Bool[Tensor, "B L"]:
    """Tokens that came nearer by more than `threshold`. Always those that the step settled, and all of step 0, which has none before it."""
    return (gain > threshold) | (settled == step) | (step == 0)


def nested_advantages(part: Float[Tensor, "N R"], group: int, paths: int, scale: Scale) -> Float[Tensor, "N R"]:
    """Advantage of each of N pictures over the other `paths` - 1 from the same latents, for each of R parts of the reward: what the latents
    promise is settled before the paths are drawn, and is the baseline."""
    return sibling_advantages(part.unflatten(0, (-1, group, paths)), scale).flatten(0, 2)


# ---- rollouts of chains --------------------------------------------------------------------------------------------------------------


def chain_of(rollout: Rollout) -> Chain:
    """The moves of a policy that draws by chains."""
    if rollout.chain is None:
        raise ConfigError("mar_grpo trains on denoising paths; this model draws its tokens at once. Use a masked model, or GRPOConfig().")
    return rollout.chain


def narrowed(rollout: Rollout, scored: Bool[Tensor, "B L N"]) -> Rollout:
    """The same paths, of which only these moves are scored. A token without any is context alone."""
    chain = chain_of(rollout)

    def total(moves: Float[Tensor, "B L N"]) -> Float[Tensor, "B L"]:
        return moves.masked_fill(~scored, 0.0).sum(-1)

    return replace(
        rollout,
        logp=total(chain.logp),
        sample_logp=None if chain.sample_logp is None else total(chain.sample_logp),
        sampled=rollout.sampled & scored.any(-1),
        context=rollout.actions[:, :, -1] if rollout.context is None else rollout.context,
        chain=replace(chain, scored=scored),
    )


def require_steps(count: int, steps: int) -> None:
    """ConfigError for more steps to train on than there are."""
    if count > steps:
        raise ConfigError(f"mar_grpo.ar_steps={count}: this model has {steps} steps. Set at most that, or 0 for all.")


def require_moves(count: int, admissible: int, moves: int) -> None:
    """ConfigError for more moves to train on than are admissible."""
    if count > admissible:
        raise ConfigError(
            f"mar_grpo.denoise_moves={count}: only {admissible} of the {moves} moves are admissible. Set at most that, or 0 for all."
        )


def chosen_steps(rng: Stream, steps: int, count: int) -> Bool[Tensor, "B S"]:
    """The `count` steps to train each row on; 0 is all."""
    require_steps(count, steps)
    return stratified(rng.at("steps").uniform(), steps, count or steps)


def chosen_moves(rng: Stream, admissible: Bool[Tensor, "B L N"], count: int) -> Bool[Tensor, "B L N"]:
    """`count` of the admissible moves of each token; 0 is all."""
    moves = admissible.flatten(0, 1).any(0).nonzero().flatten()
    require_moves(count, len(moves), admissible.shape[-1])
    out = torch.zeros_like(admissible)
    out[..., moves] = stratified(rng.at("moves").uniform(admissible.shape[1]), len(moves), count or len(moves)).to(out.device)
    return out & admissible


def per_number(batch: TrainBatch) -> TrainBatch:
    """The objective divided by the numbers that each token's log-density is summed over, moves times channels, so that neither their count
    nor the width of a token changes the size of the gradient. All scored tokens have equally many."""
    moves = chain_of(batch.rollout).scored.sum(-1).amax()
    return replace(batch, size=batch.size * moves * batch.rollout.actions.shape[-1])


def unjudged(judgement: Judgement, copies: int) -> Judgement:
    """`copies` rows for each, of pictures that nobody saw."""
    judgement = judgement.rows([row for row in range(len(judgement.value)) for _ in range(copies)])
    for part in (judgement.value, *judgement.parts.values(), judgement.region_value, judgement.region_box):
        if part is not None:
            part[:] = torch.nan
    return judgement


# ---- the algorithm -------------------------------------------------------------------------------------------------------------------


class MARGRPO:
    """GRPO on some of the moves of some of the steps, with further denoising paths for the tokens that are uncertain. Needs a
    `RedrawingPolicy`. With num_trajectories = 0 and all steps and moves it is GRPO, its gradient divided by moves times channels."""

    def __init__(self, config: MARGRPOConfig) -> None:
        self.config = config
        self.grpo = GRPO(config.grpo)
        self.num_iterations = config.grpo.num_iterations

    def collect(self, policy: Policy, prompts: Sequence[Prompt], judge: Judge, rng: Stream, step: int) -> Iterator[TrainBatch]:
        """Pieces of whole groups in the order of the prompts. Each picture (support=unknown: each of its trained steps) is a row, followed
        by its further paths where these are trained on."""
        config, group, redrawing = self.config, self.config.grpo.num_generations, cast(RedrawingPolicy, policy)

        def draw() -> Iterator[tuple[tuple[Rollout, Rollout | None, Stream], Rollout]]:
            for some, address in chunks(prompts, rng, max(1, config.grpo.rollouts_per_chunk // group)):
                address = address.repeat(group)
                rollout = policy.rollout(repeated(some, group), address)
                chain_of(rollout)
                rollout = replace(rollout, context=rollout.actions[:, :, -1])
                further = None
                if config.num_trajectories > 0:
                    further = redrawing.redraw(rollout, address.at("trajectories").repeat(config.num_trajectories))
                shown = rollout.beside(further) if further is not None and config.trajectories == "rewarded" else rollout
                yield (rollout, further, address), shown

        seen = group * (1 + config.num_trajectories if config.trajectories == "rewarded" else 1)
        for pieces in batched(judged(policy, judge, draw(), seen), config.grpo):
            drawn, judgements = [item for item, _ in pieces], [judgement for _, judgement in pieces]
            paths = len(judgements[0].value) // len(drawn[0][0])
            own = [judgement.rows(range(0, len(judgement.value), paths)) for judgement in judgements]
            if config.support == "unknown":
                credited = self.grpo.credit(policy.layout, [(item[0], judgement) for item, judgement in zip(drawn, own, strict=True)])
                for (rollout, further, address), batch in zip(drawn, credited, strict=True):
                    yield self._at_steps(redrawing, rollout, further, address, batch)
                continue
            chosen = [narrowed(rollout, self._moves(policy.layout, rollout, address)) for rollout, _, address in drawn]
            credited = self.grpo.credit(policy.layout, list(zip(chosen, own, strict=True)))
            rewarded = self._of_paths(policy.layout, judgements, paths) if paths > 1 else [None] * len(own)
            for (_, further, _), batch, extra in zip(drawn, credited, rewarded, strict=True):
                yield per_number(batch if further is None else self._with_paths(batch, further, extra))

    def objective(self, policy: Policy, batch: TrainBatch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """GRPO's. Metrics: GRPO's, and from `collect` `trajectory_spread` (unit of the latents), `judged` (pictures) and `consistent`
        (share of the unknown tokens that the filter keeps; and `consistent/step_i`). `TrainBatch.shown` has the `spread` of each token."""
        return self.grpo.objective(policy, batch)

    def _moves(self, layout: Layout, rollout: Rollout, rng: Stream) -> Bool[Tensor, "B L N"]:
        """Moves to train on: some of each token's, of the tokens of some steps."""
        kept = chosen_steps(rng, layout.steps, self.config.ar_steps).to(rollout.step.device).gather(1, rollout.step.long())
        return chosen_moves(rng, chain_of(rollout).scored, self.config.denoise_moves) & kept[:, :, None]

    def _of_paths(
        self, layout: Layout, judgements: Sequence[Judgement], paths: int
    ) -> list[tuple[Judgement, Float[Tensor, "B L"], Bool[Tensor, "B L"]]]:
        """(judgement, advantage, what learns) of each piece's further pictures."""
        grpo = self.config.grpo
        relative = partial(nested_advantages, group=grpo.num_generations, paths=paths, scale=grpo.scale_rewards)
        reaches = [local_reach(grpo, layout, judgement) for judgement in judgements]
        out = []
        for judgement, advantage in zip(judgements, token_advantages(layout, judgements, reaches, relative), strict=True):
            learns = reward_mask(grpo, layout, judgement) & ~judgement.value.isnan().cpu()[:, None]
            further = [row for row in range(len(advantage)) if row % paths]
            out.append((judgement.rows(further), advantage[further], learns[further]))
        return out

    def _uncertain(self, batch: TrainBatch, further: Rollout) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        """The two `shares` of each token of each picture, and its spread."""
        spread = uncertainty(further.actions[:, :, -1].unflatten(0, (len(batch), -1)))
        uncertain = uncertain_mask(spread, self.config.uncertain_fraction)
        return *shares(self.config.trajectories, spread, uncertain, self.config.num_trajectories), spread

    def _with_paths(
        self, batch: TrainBatch, further: Rollout, rewarded: tuple[Judgement, Float[Tensor, "B L"], Bool[Tensor, "B L"]] | None
    ) -> TrainBatch:
        """Weights shared with the further paths, which are scored at the moves of the first, and only where they have a weight."""
        own, each, spread = self._uncertain(batch, further)
        copies = len(further) // len(batch)
        judged = float(len(batch) * (copies + 1 if rewarded else 1))
        metrics = {**batch.metrics, "trajectory_spread": spread.mean().item(), "judged": judged}
        first = replace(batch, weight=batch.weight * own, metrics=metrics, shown={"spread": spread})
        if not each.any():
            return first
        if rewarded is None:
            advantage, weight = batch.advantage.repeat_interleave(copies, 0), (batch.weight * each).repeat_interleave(copies, 0)
            judgement = unjudged(batch.judgement, copies)
        else:
            judgement, advantage, learns = rewarded
            weight = (batch.kl_weight * each).repeat_interleave(copies, 0) * learns.to(each.device)
        scored = chain_of(batch.rollout).scored.repeat_interleave(copies, 0) & (weight > 0)[:, :, None]
        return first.beside(_further(narrowed(further, scored), advantage.to(weight.device), weight, judgement, first))

    def _at_steps(self, policy: RedrawingPolicy, rollout: Rollout, further: Rollout | None, rng: Stream, batch: TrainBatch) -> TrainBatch:
        """The release's rows: a picture at one of its steps, all tokens not known then, each row a mean of its own."""
        config = self.config
        steps = chosen_steps(rng, policy.layout.steps, config.ar_steps).nonzero()[:, 1].reshape(len(rollout), -1).to(rollout.step.device)
        count = steps.shape[1]
        seen = policy.preview(rollout, rng.at("previews").repeat(count), steps)
        seen = narrowed(seen, chosen_moves(rng.at("previews").repeat(count), chain_of(seen).scored, config.denoise_moves))
        keep, metrics = seen.sampled, {**batch.metrics, "judged": float(len(batch))}
        if config.consistency is not None:
            before = policy.preview(rollout, rng.at("previews", "before").repeat(count), (steps - 1).clamp(min=0))
            final = rollout.actions[:, :, -1].repeat_interleave(count, 0)
            gain = approach(seen.actions[:, :, -1], before.actions[:, :, -1], final)
            keep = keep & consistent(gain, seen.step, rollout.step.repeat_interleave(count, 0), config.consistency)
            metrics["consistent"] = (keep.sum() / seen.sampled.sum()).item()
            metrics |= by_step("consistent", keep.float(), seen.sampled, seen.step, policy.layout.steps)
        own = each = None
        if further is not None:
            own, each, spread = self._uncertain(batch, further)
            metrics["trajectory_spread"] = spread.mean().item()
            batch = replace(batch, shown={"spread": spread})
        batch = batch.rows([row for row in range(len(batch)) for _ in range(count)])
        weight = keep * (batch.weight > 0) / keep.sum(1, keepdim=True).clamp(min=1)
        kl_weight = seen.sampled / seen.sampled.sum(1, keepdim=True).clamp(min=1)
        if own is None or each is None or further is None:
            return per_number(replace(batch, rollout=seen, weight=weight, kl_weight=kl_weight, metrics=metrics))
        own, each = own.repeat_interleave(count, 0), each.repeat_interleave(count, 0)
        first = replace(batch, rollout=seen, weight=weight * own, kl_weight=kl_weight, metrics=metrics)
        if not each.any():
            return per_number(first)

        # paths from the latents that made the picture, scored under those of the step: another law, so its log-probs are computed here
        copies = len(further) // len(rollout)
        weight = (weight * each).repeat_interleave(copies, 0)
        paths = further.rows([b * copies + m for b in range(len(rollout)) for _ in range(count) for m in range(copies)])
        paths = narrowed(paths, chain_of(seen).scored.repeat_interleave(copies, 0) & (weight > 0)[:, :, None])
        step = seen.step.repeat_interleave(copies, 0)
        drawn_under = paths.logp if paths.sample_logp is None else paths.sample_logp
        chain = replace(chain_of(paths), settled=paths.step, sample_logp=None)
        paths = replace(paths, step=step, sample_logp=drawn_under, chain=chain)
        with torch.no_grad():
            paths = replace(paths, logp=policy.score(paths).logp)
        chain = replace(chain_of(seen), sample_logp=None)
        first = replace(first, rollout=replace(seen, chain=chain, sample_logp=seen.logp if seen.sample_logp is None else seen.sample_logp))
        advantage = batch.advantage.repeat_interleave(copies, 0)
        return per_number(first.beside(_further(paths, advantage, weight, unjudged(batch.judgement, copies), first)))


def _further(
    rollout: Rollout, advantage: Float[Tensor, "B L"], weight: Float[Tensor, "B L"], judgement: Judgement, first: TrainBatch
) -> TrainBatch:
    """Rows that add to what is learned, but neither to the KL nor to the denominator; as many for each of `first`, what is shown of which
    holds for them too."""
    return TrainBatch(
        rollout=rollout,
        advantage=advantage,
        weight=weight,
        kl_weight=torch.zeros_like(weight),
        judgement=judgement,
        size=torch.zeros_like(weight[:, 0]),
        shown={name: part.repeat_interleave(len(rollout) // len(first), 0) for name, part in first.shown.items()},
    )
