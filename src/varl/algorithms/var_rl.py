"""VAR RL Done Right (arXiv 2601.02256): GRPO in two stages, a prefix that is paid by what its continuations are worth, and a suffix.

Three ways to use it, by the switches of `VARRLConfig`:

    default   K = 1, mean return, prefix and suffix 3:1, suffixes against others of the same prefix. The unbiased full-horizon gradient,
              block by block; what restricting to a prefix gains, without the noise that K > 1 adds at equal judged images.
    paper     K = 2, log_mean_exp with eta = 1, a small beta to a fixed reference. Log-mean-exp of the current policy's rewards and KL to
              another policy do not belong to one objective; with a reward spread well below eta this is close to the mean.
    exact     middle_return = importance, scale_rewards = none, beta = 0: ascent on J = E[R - eta log policy/reference], the objective of
              the paper's theorems. The log-ratio is part of the return, because KL as a loss term holds the states fixed and has another
              optimum.

The paper's theorem that prefix and suffix can be solved apart with the unconstrained soft value holds for unconstrained policies only; with
tokens that are independent inside a step the right value is that of the best such suffix (`theory.v_dagger`)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from varl.algorithms.advantages import sibling_advantages
from varl.algorithms.grpo import (
    GRPO,
    against_group,
    batched,
    chunks,
    judged,
    local_reach,
    repeated,
    reward_mask,
    token_advantages,
    train_batch,
)
from varl.algorithms.vmr import middle_return, middle_step, next_middle_step, variance_parts, variance_share
from varl.config import VARRLConfig
from varl.errors import ConfigError
from varl.rng import Stream
from varl.types import BranchingPolicy, Judge, Judgement, Layout, Policy, Prompt, Rollout, TrainBatch

MEMORY = 0.9
"""Share of the variance estimates of a middle step that survives an update."""


def of_prefixes(judgement: Judgement, value: Float[Tensor, " B"], copies: int) -> Judgement:
    """The judgement of B prefixes, from that of `copies` continuations of each, side by side: `value` is given, parts and regions are means
    over those that did not fail, a region's box is the smallest that holds all of its boxes, and what was read is joined."""

    def mean(part: Tensor) -> Tensor:
        return part.unflatten(0, (-1, copies)).nanmean(1)

    box = None
    if judgement.region_box is not None:
        corners, missing = judgement.region_box.unflatten(0, (-1, copies)), judgement.region_box.isnan().unflatten(0, (-1, copies))
        low = corners.masked_fill(missing, torch.inf).amin(1)[..., :2]
        high = corners.masked_fill(missing, -torch.inf).amax(1)[..., 2:]
        box = torch.cat([low, high], -1).masked_fill(missing.all(1), torch.nan)
    found = None
    if judgement.found is not None:
        found = tuple(sum(judgement.found[i : i + copies], ()) for i in range(0, len(judgement.found), copies))
    return Judgement(
        value=value,
        parts={name: mean(part) for name, part in judgement.parts.items()},
        region_value=None if judgement.region_value is None else mean(judgement.region_value),
        region_box=box,
        found=found,
    )


def stage_metrics(value: Float[Tensor, "P G K"], m: int) -> dict[str, float]:
    """Of the judged pictures, and not of what the stage was paid for them: `reward`, `reward_failed`, `judged` (how many), and for K > 1
    what of the reward's variance the first m steps settle and what they leave open: two means over prompts, whatever the pieces."""
    metrics = {"middle_step": float(m), "reward_failed": value.isnan().float().mean().item(), "judged": float(value.numel())}
    if not value.isnan().all():
        metrics["reward"] = value.nanmean().item()
    if value.shape[2] > 1:
        between, within = variance_parts(value)
        if not math.isnan(between):
            metrics |= {"reward_variance/settled": between, "reward_variance/open": within}
    return metrics


FURTHER = "continuation"
"""Where continuations draw. Row 0 of a prefix and row 0 of its continuations would else share one stream of random numbers."""


class VARRL:
    """Prefix and suffix updates in a cycle, each a GRPO update on its own tokens. Needs a `BranchingPolicy`."""

    def __init__(self, config: VARRLConfig) -> None:
        if config.middle_return == "importance" and (config.grpo.beta > 0 or config.grpo.scale_rewards != "none"):
            raise ConfigError(
                f"var_rl.middle_return='importance' puts eta * KL into the return; grpo.beta={config.grpo.beta} would add it again, and "
                f"grpo.scale_rewards={config.grpo.scale_rewards!r} change eta with every group. Set beta=0 and scale_rewards='none'."
            )
        if config.grpo.region_credit and config.middle_return != "mean":
            raise ConfigError(
                f"var_rl.middle_return={config.middle_return!r} of a sum over regions is no sum over regions, so it cannot be credited "
                "to them. Use mean, or switch grpo.region_credit off."
            )
        if config.adapt_middle_step and config.num_continuations < 2:
            raise ConfigError("var_rl.adapt_middle_step compares continuations of the same prefix: set num_continuations to 2 or more.")
        self.config = config
        self.grpo = GRPO(config.grpo)
        self.num_iterations = config.grpo.num_iterations
        self._parts: dict[int, tuple[float, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """What `adapt_middle_step` has learned: (between, within) of each middle step tried. Empty otherwise."""
        return {"variance_parts": {str(m): list(parts) for m, parts in self._parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._parts = {int(m): (parts[0], parts[1]) for m, parts in state["variance_parts"].items()}

    def stage(self, step: int) -> str:
        """prefix or suffix: the cycle starts with its prefix updates."""
        return "prefix" if step % (self.config.prefix_updates + self.config.suffix_updates) < self.config.prefix_updates else "suffix"

    def middle(self, layout: Layout) -> int:
        """m of the next update. `adapt_middle_step` moves it by what this process has seen, so it is for runs of one process."""
        if self._parts:
            return next_middle_step({m: variance_share(*parts) for m, parts in self._parts.items()}, layout.steps)
        m = middle_step(self.config.middle_step, layout)
        if m == layout.steps and (self.config.num_continuations > 1 or self.config.suffix_updates > 0):
            raise ConfigError(
                f"{self.config.middle_step} makes the whole picture a prefix: there is nothing to continue and no suffix to train. Set an "
                "earlier middle_step, or num_continuations=1 and suffix_updates=0, which is plain GRPO."
            )
        return m

    def collect(self, policy: Policy, prompts: Sequence[Prompt], judge: Judge, rng: Stream, step: int) -> Iterator[TrainBatch]:
        update = self._prefix_update if self.stage(step) == "prefix" else self._suffix_update
        return update(cast(BranchingPolicy, policy), prompts, judge, rng, self.middle(policy.layout))

    def objective(self, policy: Policy, batch: TrainBatch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """GRPO's, on the tokens of the stage."""
        return self.grpo.objective(policy, batch)

    def _prefix_update(self, policy: BranchingPolicy, prompts: Sequence[Prompt], judge: Judge, rng: Stream, m: int) -> Iterator[TrainBatch]:
        """P*G prefixes, K continuations of each. What is trained on holds the prefix tokens alone, so training costs no more than they do.
        With `tree_reuse` the continuations follow, each against its siblings."""
        config, layout, copies = self.config.grpo, policy.layout, self.config.num_continuations
        group = config.num_generations

        def union(tokens: Tensor) -> Tensor:
            return tokens.unflatten(0, (-1, copies)).any(1)

        def draw() -> Iterator[tuple[tuple[Rollout, Rollout], Rollout]]:
            for some, address in chunks(prompts, rng, max(1, config.rollouts_per_chunk // (group * copies))):
                asked, here = repeated(some, group), address.repeat(group)
                if m == layout.steps:
                    prefix = whole = policy.rollout(asked, here)
                else:
                    prefix = policy.prefix(asked, here, steps=m)
                    whole = policy.complete(prefix, address.at(FURTHER).repeat(group * copies))
                yield (replace(prefix, state=None), replace(whole, state=None)), whole

        seen: list[Tensor] = []
        for pieces in batched(judged(policy, judge, draw(), group * copies), config):
            returns = [self._returns(policy, whole, judgement.value, m) for (_, whole), judgement in pieces]
            values = [of_prefixes(judgement, value, copies) for (_, judgement), (value, _) in zip(pieces, returns, strict=True)]
            reaches = [local_reach(config, layout, judgement) for _, judgement in pieces]
            valid = [~judgement.value.cpu().isnan() for _, judgement in pieces]
            joint = [None if reach is None else union(reach & ok[:, None, None]) for reach, ok in zip(reaches, valid, strict=True)]
            advantages = token_advantages(layout, values, joint, partial(against_group, config))
            for ((prefix, _), judgement), value, advantage, ok in zip(pieces, values, advantages, valid, strict=True):
                mask = union(reward_mask(config, layout, judgement) & ok[:, None])
                batch = train_batch(config, layout, prefix, value, advantage, mask, stage="prefix")
                seen.append(judgement.value.float().cpu().reshape(-1, group, copies))
                yield replace(batch, metrics={**batch.metrics, **stage_metrics(seen[-1], m)})
            if self.config.tree_reuse:
                own = [replace(judgement, value=value) for (_, judgement), (_, value) in zip(pieces, returns, strict=True)]
                advantages = token_advantages(layout, own, reaches, self._against_siblings)
                for ((_, whole), _), judgement, advantage in zip(pieces, own, advantages, strict=True):
                    mask = reward_mask(config, layout, judgement)
                    batch = train_batch(config, layout, whole, judgement, advantage, mask, stage="suffix")
                    yield replace(batch, metrics={"judged": 0.0})
        if self.config.adapt_middle_step:
            self._remember(m, torch.cat(seen))

    def _suffix_update(self, policy: BranchingPolicy, prompts: Sequence[Prompt], judge: Judge, rng: Stream, m: int) -> Iterator[TrainBatch]:
        """G suffixes per prompt, from one prefix that they share (`shared_prefix_baseline`): their mean is E[R | s_m], so the luck of the
        prefix drops out. Otherwise whole pictures of which the suffix learns: unbiased too, and noisier."""
        config, layout, group = self.config.grpo, policy.layout, self.config.grpo.num_generations

        def draw() -> Iterator[tuple[Rollout, Rollout]]:
            for some, address in chunks(prompts, rng, max(1, config.rollouts_per_chunk // group)):
                if self.config.shared_prefix_baseline:
                    whole = policy.complete(policy.prefix(some, address, steps=m), address.at(FURTHER).repeat(group))
                else:
                    whole = policy.rollout(repeated(some, group), address.repeat(group))
                yield replace(whole, state=None), whole

        for pieces in batched(judged(policy, judge, draw(), group), config):
            own = [replace(judgement, value=self._suffix_returns(policy, whole, judgement.value, m)[0]) for whole, judgement in pieces]
            reaches = [local_reach(config, layout, judgement) for judgement in own]
            advantages = token_advantages(layout, own, reaches, partial(against_group, config))
            for (whole, found), judgement, advantage in zip(pieces, own, advantages, strict=True):
                mask = reward_mask(config, layout, judgement)
                batch = train_batch(config, layout, whole, judgement, advantage, mask, stage="suffix", inside=whole.step >= m)
                value = found.value.float().cpu().reshape(-1, group, 1)
                yield replace(batch, metrics={**batch.metrics, **stage_metrics(value, m)})

    def _suffix_returns(
        self, policy: Policy, whole: Rollout, reward: Float[Tensor, " N"], m: int
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
        """(return of each suffix, its log-ratio to the reference, its prefix's log-ratio): the reward, for `importance` less eta times the
        suffix's log-ratio. The ratios are 0 where they are not asked for."""
        reward = reward.float().cpu()
        if self.config.middle_return != "importance":
            return reward, torch.zeros_like(reward), torch.zeros_like(reward)
        with torch.no_grad():
            score = policy.score(whole)
        if score.ref_logp is None:
            raise ConfigError("var_rl.middle_return='importance' measures KL to a reference model, and the policy was scored without one.")
        ratio = (score.logp - score.ref_logp).cpu()
        suffix = (whole.step >= m).cpu()
        own = (ratio * suffix).sum(1)
        return reward - self.config.eta * own, own, (ratio * ~suffix).sum(1)

    def _returns(
        self, policy: Policy, whole: Rollout, reward: Float[Tensor, " N"], m: int
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " N"]]:
        """(of each prefix, of each of its suffixes), in units of the reward; for `importance` less eta times the log-ratio of what they
        drew."""
        copies, eta = self.config.num_continuations, self.config.eta
        suffix_return, own, before = self._suffix_returns(policy, whole, reward, m)
        reward, own, before = (part.unflatten(0, (-1, copies)) for part in (reward.float().cpu(), own, before))
        return middle_return(reward, self.config.middle_return, eta, own) - eta * before[:, 0], suffix_return

    def _against_siblings(self, part: Float[Tensor, "N R"]) -> Float[Tensor, "N R"]:
        shape = (-1, self.config.grpo.num_generations, self.config.num_continuations)
        return sibling_advantages(part.unflatten(0, shape), self.config.grpo.scale_rewards).flatten(0, 2)

    def _remember(self, m: int, value: Float[Tensor, "P G K"]) -> None:
        new = variance_parts(value)
        if math.isnan(new[0]):
            return
        old = self._parts.get(m, new)
        self._parts[m] = (MEMORY * old[0] + (1 - MEMORY) * new[0], MEMORY * old[1] + (1 - MEMORY) * new[1])
