"""Which gradient estimator makes the most of the same judged pictures: GRPO, PANW, prefixes, VMR, mask propagation, at a fixed policy.

    python benchmarks/estimators.py [--minutes 12] [--model bundled:words|random] [--score letters|mixed]

Learning curves of variants drown in noise at this size, so the estimator is measured and not the curve. All estimators are made from the
same pictures and compared on them; +- and brackets are 95 % by jackknife over batches, of ratios by Fieller."""

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations

import torch
from common import arguments, config, machine, policy_of, table
from torch import Tensor

from varl.algorithms.advantages import group_advantages
from varl.algorithms.grpo import repeated
from varl.algorithms.mask_propagation import dilate, direct_mask
from varl.algorithms.panw import panw_weights
from varl.algorithms.vmr import middle_return
from varl.build import build_judge, build_prompts
from varl.data.sampler import PromptSampler
from varl.eval.gradients import (
    Estimate,
    Moments,
    Projection,
    batch_gradient,
    best_weights,
    cosine,
    estimate,
    first_tokens,
    moments,
    noise_shares,
    overlap,
    paired_ratio,
    power,
    rho2_ratio,
    signal_shares,
    snr,
    step_scores,
)
from varl.policies.next_scale import NextScalePolicy
from varl.probe import Nested, judged, leave_one_out, now, settled, span, training_pass
from varl.rewards.toy import left_brightness
from varl.rng import Stream
from varl.types import Judge, Prompt, Rollout

PROMPTS, GROUP, K = 2, 16, 4
IMAGES = PROMPTS * GROUP
ALPHAS = (0.0, 0.3, 0.6, 0.7, 0.8, 1.0, 1.2)
LEAST = 6
"""Batches of each pool: halves of the plain pool are compared, and half of one needs 3."""
TIMED = 10
"""Batches whose prefixes' training passes are timed."""
SHARES = {"plain": 0.4, "tree": 0.45, "mask": 0.15}
"""Of the time, for each pool."""


@dataclass(slots=True)
class Tree:
    """Pool of one m: prefixes with K continuations each."""

    gradients: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    likeness: list[Tensor] = field(default_factory=list)
    nested: Nested = field(default_factory=Nested)


PLAIN = ("leave-one-out, no std", "GRPO, group std", "no baseline")
MEAN, SOFT, SHARP = "mean", "LME eta 1", "LME eta 0.1"
VMR = ((1, MEAN), (2, MEAN), (4, MEAN), (2, SOFT), (4, SOFT), (2, SHARP), (4, SHARP))


class Bench:
    def __init__(self, policy: NextScalePolicy, judge: Judge, prompts: Sequence[Prompt]) -> None:
        self.policy, self.judge = policy, judge
        self.sampler = PromptSampler(prompts, seed=0, per_step=PROMPTS)
        self.projection = Projection(policy.module)
        self.steps = policy.layout.steps
        self.sizes = torch.tensor([[h * w for h, w in policy.layout.grids]], dtype=torch.float32)
        self.plain: list[Tensor] = []
        self.masked: list[Tensor] = []
        self.trees = {m: Tree() for m in range(1, self.steps)}
        self.costs: dict[str, list[float]] = {}
        self.rounds = dict.fromkeys(SHARES, 0)
        self.spent = dict.fromkeys(SHARES, 0.0)

    def round(self) -> None:
        """The pool that is furthest behind its share of the time gets one more batch."""
        name = min(SHARES, key=lambda pool: self.spent[pool] / SHARES[pool])
        start, number = time.perf_counter(), self.rounds[name]
        {"plain": self.plain_round, "tree": self.tree_round, "mask": self.mask_round}[name](number)
        self.rounds[name] += 1
        self.spent[name] += time.perf_counter() - start

    @property
    def enough(self) -> bool:
        return min(len(self.plain), len(self.masked), *(len(tree.gradients) for tree in self.trees.values())) >= LEAST

    def draw(self, pool: str, number: int) -> Rollout:
        rng = Stream(seed=0, path=("estimators", pool, number), rows=tuple(range(PROMPTS))).repeat(GROUP)
        return self.policy.rollout(repeated(self.sampler.at(number), GROUP), rng)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = now()
        yield
        self.costs.setdefault(name, []).append(now() - start)

    def plain_round(self, number: int) -> None:
        with self.timed("rollout"):
            rollout = self.draw("plain", number)
        with self.timed("decode and reward"):
            value = judged(self.policy, self.judge, rollout).view(PROMPTS, GROUP)
        with self.timed("train"):
            training_pass(self.policy, rollout)
        for m in self.trees if number < TIMED else ():
            with self.timed(f"train first {m}"):
                training_pass(self.policy, first_tokens(rollout, int(self.sizes[0, :m].sum())))
        scores = step_scores(self.policy, rollout, rollout.step, self.steps, self.projection)
        advantages = (leave_one_out(value), group_advantages(value, "group"), value.nan_to_num())
        self.plain.append(torch.cat([batch_gradient(a.flatten(), scores) for a in advantages]).cpu())

    def mask_round(self, number: int) -> None:
        """A reward whose cause has a place, the left third. Three parts per step: under its box, within one fine cell of it, outside."""
        rollout = self.draw("mask", number)
        value = left_brightness(self.policy.decode(rollout), rollout.prompts).cpu().view(PROMPTS, GROUP)
        box = torch.tensor([[[0.0, 0.0, 1 / 3, 1.0]]])
        grids = self.policy.layout.grids
        inside, near = direct_mask(box, grids), direct_mask(dilate(box, grids[-1], 1), grids)
        kind = torch.where(inside, 0, torch.where(near, 1, 2)).to(rollout.step.device)
        scores = step_scores(self.policy, rollout, rollout.step + self.steps * kind, 3 * self.steps, self.projection)
        self.masked.append(batch_gradient(leave_one_out(value).flatten(), scores).cpu())

    def tree_round(self, number: int) -> None:
        turn, m = divmod(number, len(self.trees))
        m += 1
        tree, policy = self.trees[m], self.policy
        rng = Stream(seed=0, path=("estimators", "tree", m, turn), rows=tuple(range(PROMPTS))).repeat(GROUP)
        prefix, value = tree.nested.draw(policy, self.judge, self.sampler.at(turn), rng, m, K)
        scores = step_scores(policy, prefix, torch.zeros_like(prefix.step), 1, self.projection)[:, 0].double().cpu()
        scores = scores.view(PROMPTS, GROUP, -1)
        subs = [subsamples(value, scores, copies, mode) for copies, mode in VMR]
        everything = prefix_gradient(value.mean(2), scores)[None]
        tree.gradients.append(torch.stack([sub.mean(0) for sub in (*subs, everything)]))
        tree.own.append(torch.diag(torch.stack([sub.square().sum(1).mean() for sub in (*subs, everything)])))
        by_key = dict(zip(VMR, subs, strict=True))
        tree.likeness.append(
            torch.stack([torch.cosine_similarity(by_key[copies, mode], by_key[copies, MEAN]).mean() for copies, mode in VMR])
        )


def prefix_gradient(value: Tensor, scores: Tensor) -> Tensor:
    """[D]: mean over P x G prefixes of leave-one-out advantage * score."""
    return torch.einsum("pg,pgd->d", leave_one_out(value.float()).double(), scores) / value.numel()


def subsamples(value: Tensor, scores: Tensor, copies: int, mode: str) -> Tensor:
    """[K, D]: the K disjoint estimates, of GROUP pictures per prompt each, with `copies` continuations of GROUP / copies prefixes."""
    eta = 0.1 if mode == SHARP else 1.0
    group, found = GROUP // copies, []
    for part in range(copies):
        at = slice(part * group, (part + 1) * group)
        for first in range(0, K, copies):
            some = value[:, at, first : first + copies]
            returns = middle_return(some.flatten(0, 1), "mean" if mode == MEAN else "log_mean_exp", eta).view(PROMPTS, group)
            found.append(prefix_gradient(returns, scores[:, at]))
    return torch.stack(found)


# ---- tables ---------------------------------------------------------------------------------------------------------------------------


def unit(length: int, at: int) -> Tensor:
    return torch.eye(length)[at]


def shown(x: Estimate, digits: int = 3) -> str:
    """Value +- half the interval."""
    return "n/a" if math.isnan(x.high) else f"{x.value:.{digits}f} ± {(x.high - x.low) / 2:.{digits}f}"


def times(x: Estimate) -> str:
    """A ratio with its interval, bold where that excludes 1."""
    if math.isinf(x.high):
        return f"{x.value:.2f} (unresolved)"
    text = f"{x.value:.2f} ({x.low:.2f}-{x.high:.2f})"
    return f"**{text}**" if x.low > 1 or x.high < 1 else text


def angle(x: Estimate) -> str:
    """A cosine, where it is known at all."""
    return shown(x, 2) if x.high - x.low <= 2 else "n/a"


def needed(ratio: Estimate) -> str:
    """Pictures for SNR 1, where there is any signal to be sure of."""
    return f"{IMAGES / ratio.value:,.0f}" if ratio.low > 0 else "n/a"


def plain_tables(bench: Bench) -> dict[str, str]:
    steps, n = bench.steps, len(bench.plain)
    m = moments(torch.stack(bench.plain))

    def weights(estimator: int, per_step: Tensor) -> Tensor:
        out = torch.zeros(len(PLAIN), steps)
        out[estimator] = per_step
        return out.flatten()

    ones = torch.ones(steps)
    reference = weights(0, ones)
    variants: dict[str, Tensor] = {name: weights(i, ones) for i, name in enumerate(PLAIN)}
    variants |= {f"PANW alpha {a:g}": weights(0, panw_weights(bench.sizes, a)[0]) for a in ALPHAS[1:]}
    variants |= {f"first {k} of {steps} steps, K = 1": weights(0, (torch.arange(steps) < k).float()) for k in bench.trees}
    variants |= {
        f"first {k} of {steps} steps + PANW 0.7": weights(0, panw_weights(bench.sizes, 0.7)[0] * (torch.arange(steps) < k))
        for k in bench.trees
        if k > 1
    }
    cost = {name: statistics.median(taken) for name, taken in bench.costs.items()}
    whole = cost["rollout"] + cost["decode and reward"] + cost["train"]
    rows = []
    for name, w in variants.items():
        prefix = next((k for k in bench.trees if name.startswith(f"first {k} of")), None)
        step_cost = whole if prefix is None else whole - cost["train"] + cost[f"train first {prefix}"]
        found, ratio = estimate(snr(m, w)), rho2_ratio(m, w, reference, reference)
        snr_ratio = paired_ratio(snr(m, w), snr(m, reference))
        cos = estimate(cosine(m, w, reference))
        compute = ratio.map(lambda x, factor=whole / step_cost: x * factor)
        rows.append([name, shown(found, 4), needed(found), angle(cos), times(snr_ratio), times(ratio), times(compute)])
    head = [
        "estimator",
        f"SNR of {IMAGES} pictures",
        "pictures for SNR 1",
        "cos to plain",
        "SNR ratio",
        "rho² ratio",
        "rho² ratio per second",
    ]
    own = Moments(pairs=m.pairs[:, :steps, :steps], own=m.own[:, :steps, :steps])
    halves = [moments(torch.stack(bench.plain[i::2])[:, :steps]) for i in (0, 1)]
    fitted = [rho2_ratio(halves[1 - i], best_weights(halves[i], ones).float(), ones, ones) for i in (0, 1)]
    best = " and ".join(times(x) for x in fitted)

    signal, noise = signal_shares(own), noise_shares(own)
    share_rows = [
        [
            t + 1,
            int(bench.sizes[0, t]),
            shown(estimate(snr(own, unit(steps, t))), 4),
            shown(estimate(signal[:, t]), 2),
            shown(estimate(noise[:, t])),
        ]
        for t in range(steps)
    ]
    pairs = [[f"{t + 1}-{u + 1}", angle(estimate(cosine(own, unit(steps, t), unit(steps, u))))] for t, u in combinations(range(steps), 2)]
    return {
        f"Estimators at equal judged pictures ({n} batches of {IMAGES}; {n * IMAGES} pictures)": table(head, rows)
        + f"\nBest free weights per scale, fitted on one half of the batches and tested on the other: rho² ratio {best}.\n",
        "Signal and noise by scale": table(["scale", "tokens", "SNR", "share of signal", "share of noise"], share_rows),
        "Conflict between scales: cosines of mean gradients": table(["scales", "cosine"], pairs),
        "Seconds per batch": table(list(cost), [[f"{x:.3f}" for x in cost.values()]]),
    }


def tree_tables(bench: Bench) -> dict[str, str]:
    shares, rows, length = [], [], len(VMR) + 1
    for m, tree in bench.trees.items():
        found, tokens = settled(tree.nested), int(bench.sizes[0, :m].sum())
        c_p, c_c = found.prefix_seconds, found.continuation_seconds
        costs = f"{1e3 * c_p:.1f} / {1e3 * c_c:.1f}"
        shares.append([m, tokens, len(tree.nested.between) * GROUP, span(found.share), costs, span(found.best)])
        if not torch.stack(tree.gradients).any():
            continue
        b, pool = found.share.value, moments(torch.stack(tree.gradients), torch.stack(tree.own))
        first, like = unit(length, 0), torch.stack(tree.likeness).mean(0)

        def noise(at: Tensor, pool: Moments = pool) -> Tensor:
            return power(pool, at) - overlap(pool, at, at)

        for place, (copies, mode) in enumerate((*VMR, (K, MEAN))):
            w, everything = unit(length, place), place == len(VMR)
            group, images = (GROUP, K * IMAGES) if everything else (GROUP // copies, IMAGES)
            ratio = paired_ratio(noise(w), noise(first))
            factor = (copies * b + 1 - b) * group / (group - 1) / (GROUP / (GROUP - 1)) * IMAGES / images
            cost = (images / copies * c_p + images * c_c) / (IMAGES * (c_p + c_c))
            rows.append([
                m,
                f"K = {copies}, G = {group}, {mode}",
                images,
                shown(estimate(snr(pool, w)), 4),
                times(ratio),
                f"{factor:.2f}" if mode == MEAN else "",
                times(ratio.map(lambda x, cost=cost: x * cost)),
                angle(estimate(cosine(pool, w, first))),
                "" if everything else f"{like[place]:.3f}",
            ])  # fmt: skip
    head = [
        "m",
        "estimator",
        "pictures",
        "SNR",
        "noise / K = 1",
        "formula",
        "noise / K = 1 at equal seconds",
        "cos to K = 1",
        "cos to mean, single batch",
    ]
    return {
        "Share of the reward's variance settled by scale m": table(
            ["m", "tokens", "prefixes", "b(m)", "prefix / continuation, ms", "K*"], shares
        ),
        "VMR on the prefix block (same prefixes, disjoint sub-samples)": table(head, rows),
    }


def mask_table(bench: Bench) -> dict[str, str]:
    steps, m = bench.steps, moments(torch.stack(bench.masked))
    plain = torch.ones(3, steps)
    panw = panw_weights(bench.sizes, 0.7).expand(3, steps)
    inside, near = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[1.0], [1.0], [0.0]])
    variants: Mapping[str, Tensor] = {
        "none": plain,
        "direct": plain * inside,
        "direct, dilated by one fine cell": plain * near,
        "only outside the dilated box": plain * (1 - near),
        "PANW 0.7": panw,
        "direct, dilated + PANW 0.7": panw * near,
    }
    reference, rows = plain.flatten(), []
    for name, w in variants.items():
        w = w.flatten()
        found, cos = estimate(snr(m, w)), estimate(cosine(m, w, reference))
        rows.append([name, shown(found, 4), angle(cos), times(rho2_ratio(m, w, reference, reference))])
    title = f"Mask propagation where the reward is local: brightness of the left third ({len(bench.masked)} batches of {IMAGES})"
    return {title: table(["mask", "SNR", "cos to no mask", "rho² ratio"], rows)}


def main() -> None:
    given = arguments(__doc__, 12.0, score=("letters", "mixed"))
    run = config("bundled:words", given.score)
    prompts = build_prompts(run.data, run.seed, 0)
    policy, judge = policy_of(given.model, given.device), build_judge(run, prompts.pictures)
    bench = Bench(policy, judge, prompts.train)
    end = time.perf_counter() + 60 * given.minutes
    while time.perf_counter() < end or not bench.enough:
        bench.round()
    judge.close()
    print(f"## Estimators\n\n{machine(given.device)}.")
    print(f"Model {given.model}; score {given.score}; {PROMPTS} prompts x {GROUP} pictures a batch; 95 % intervals.\n")
    for title, content in {**plain_tables(bench), **tree_tables(bench), **mask_table(bench)}.items():
        print(f"### {title}\n\n{content}")


if __name__ == "__main__":
    main()
