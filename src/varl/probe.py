"""A few minutes of the user's own model and reward, before training: where the gradient's signal is, how much of the reward each step
settles, what that costs, and which settings follow."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varl.algorithms.advantages import sibling_advantages
from varl.algorithms.grpo import repeated
from varl.algorithms.panw import panw_weights
from varl.algorithms.va_pi import VAPI
from varl.algorithms.var_rl import FURTHER
from varl.algorithms.vmr import best_continuations, middle_step, variance_parts
from varl.build import build_algorithm, build_judge, build_policy, build_prompts, model_path, needs_reference
from varl.checkpoints import hugging_face
from varl.config import RunConfig, VAPIConfig, VARRLConfig
from varl.data.sampler import PromptSampler
from varl.errors import ConfigError, NumericsError
from varl.eval.gradients import (
    Estimate,
    Moments,
    Projection,
    alignment,
    batch_gradient,
    best_group,
    continuation_noise,
    estimate,
    images_for_unit_snr,
    means,
    moments,
    noise_shares,
    overlap,
    power,
    rho2_ratio,
    signal_shares,
    snr,
    step_scores,
)
from varl.plan import device_of
from varl.report.page import finite
from varl.rng import Stream
from varl.types import BranchingPolicy, Judge, Layout, Policy, Prompt, Rollout, TeacherForcedPolicy

PROMPTS, GROUP = 2, 16
"""A batch of the pool: many small batches give the sharpest intervals."""
PREFIXES, CONTINUATIONS = 8, 4
"""Of each of NESTED_PROMPTS, in a round of nested sampling."""
NESTED_PROMPTS = 4
NESTED_EVERY = 4
"""Rounds between two rounds of nested sampling."""
LEAST_ROUNDS = 6
ALPHAS = (0.0, 0.3, 0.6, 0.7, 0.8, 1.0, 1.2)
GROUPS = (4, 8, 16, 32, 64)
MOST_CONTINUATIONS = 16
MOST_PARTS = 16
"""A schedule of more steps than this (a raster's tokens) is measured in PARTS stretches of equally many steps."""
PARTS = 8
NEAR = 0.9
"""The mildest setting with at least this share of the best one's progress is recommended: what else it gains is bought with bias."""

Tick = Callable[[Mapping[str, float]], None]


# ---- measuring ------------------------------------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds, once the GPU has done what was asked of it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def training_pass(policy: Policy, rollout: Rollout) -> None:
    """Forward and backward, for its time alone."""
    weights = [p for p in policy.module.parameters() if p.requires_grad]
    with torch.enable_grad():
        torch.autograd.grad(policy.score(rollout).logp.sum(), weights, allow_unused=True)


@dataclass(slots=True)
class Nested:
    """Nested sampling at one m: per prompt the variance between prefixes and within them, per round the seconds."""

    between: list[float] = field(default_factory=list)
    within: list[float] = field(default_factory=list)
    prefix_seconds: list[float] = field(default_factory=list)
    """To draw one prefix and train on it."""
    continuation_seconds: list[float] = field(default_factory=list)
    """To draw one continuation, decode and judge it."""

    @property
    def resolved(self) -> bool:
        """Whether there is a share to estimate: some prompts, of which some had pictures of different rewards."""
        return len(self.between) >= 3 and any((*self.between, *self.within))

    def draw(
        self, policy: BranchingPolicy, judge: Judge, prompts: Sequence[Prompt], rng: Stream, m: int, continuations: int
    ) -> tuple[Rollout, Float[Tensor, "P G K"]]:
        """A round: (the prefixes, what their continuations are worth), `len(rng)` prefixes of `prompts`, noted and timed."""
        start = now()
        prefix = policy.prefix(repeated(prompts, len(rng) // len(prompts)), rng, steps=m)
        drawn = now()
        whole = policy.complete(prefix, rng.at(FURTHER).repeat(continuations))
        value = judged(policy, judge, whole).view(len(prompts), -1, continuations)
        answered = now()
        prefix = prefix.rows(range(len(prefix)))
        training_pass(policy, prefix)
        self.prefix_seconds.append((drawn - start + now() - answered) / len(prefix))
        self.continuation_seconds.append((answered - drawn) / value.numel())
        for prompt in value.split(1):
            between, within = variance_parts(prompt)
            if not math.isnan(between):
                self.between.append(between)
                self.within.append(within)
        return prefix, value


def judged(policy: Policy, judge: Judge, whole: Rollout) -> Float[Tensor, " B"]:
    """What whole pictures are worth, waited for."""
    return judge.submit(policy.decode(whole), whole.prompts).result().value


class Probe:
    """What was measured so far, of one policy and reward. Every round draws at its own addresses, so that more time adds rounds and
    changes none. With `in_context` pictures are not drawn freely but as it draws them, each token in the context of a real picture; all of
    them at once, so that there are no steps to tell apart."""

    def __init__(
        self,
        policy: Policy,
        judge: Judge,
        prompts: Sequence[Prompt],
        *,
        in_context: VAPI | None = None,
        seed: int = 0,
        rows: int = PROMPTS * GROUP,
    ) -> None:
        self.policy, self.judge, self.in_context, self.seed, self.rows = policy, judge, in_context, seed, rows
        self.projection = Projection(policy.module, seed=seed)
        self.plain_prompts = PromptSampler(prompts, seed=seed, per_step=PROMPTS)
        self.nested_prompts = PromptSampler(prompts, seed=seed, per_step=NESTED_PROMPTS)
        steps = policy.layout.steps
        self.parts = 1 if in_context else steps if steps <= MOST_PARTS else PARTS
        self.starts = [steps * part // self.parts for part in range(self.parts)]
        """First step of each part."""
        self.sizes = torch.zeros(steps)
        """Mean number of tokens that each step draws."""
        self.rounds = 0
        self.gradients: list[Tensor] = []
        self.halves: list[Tensor] = []
        branches = isinstance(policy, BranchingPolicy) and not in_context
        self.nested = {m: Nested() for m in self.starts[1:]} if branches else {}

    @property
    def least_rounds(self) -> int:
        """So many that every m was visited."""
        return max(LEAST_ROUNDS, NESTED_EVERY * len(self.nested))

    @property
    def images(self) -> int:
        nested = sum(len(found.between) for found in self.nested.values()) * PREFIXES * CONTINUATIONS
        return len(self.gradients) * PROMPTS * GROUP + nested

    def round(self) -> None:
        """One more batch of the pool, and now and then nested sampling at the next m."""
        self.plain(self.rounds)
        turn, rest = divmod(self.rounds, NESTED_EVERY)
        if self.nested and rest == 0:
            self.nest(turn, list(self.nested)[turn % len(self.nested)])
        self.rounds += 1

    def plain(self, number: int) -> None:
        """A batch gradient with leave-one-out advantages, and for the prompts' own means two independent half groups of each."""
        prompts = self.plain_prompts.at(number)
        rng = Stream(seed=self.seed, path=("probe", "plain", number), rows=tuple(range(PROMPTS)))
        rollout, asked = self._drawn(prompts, rng), repeated(prompts, GROUP)
        value = judged(self.policy, self.judge, replace(rollout, prompts=asked))
        scores = torch.cat([self._scores(rollout.rows(range(i, min(i + self.rows, len(value))))) for i in range(0, len(value), self.rows)])
        self.sizes = torch.bincount(rollout.step.flatten().cpu().long(), minlength=len(self.sizes)) / len(value)
        gradient = batch_gradient(leave_one_out(value.view(PROMPTS, GROUP)).flatten(), scores)
        advantage = leave_one_out(value.view(2 * PROMPTS, -1)).view(PROMPTS, 2, -1)
        per_half = scores.double().view(PROMPTS, 2, GROUP // 2, *scores.shape[1:])
        first, second = torch.einsum("phg,phgsd->hpsd", advantage.double().to(scores.device), per_half) / (GROUP // 2)
        cross = first @ second.mT
        self.gradients.append(gradient.cpu())
        self.halves.append(((cross + cross.mT) / 2).mean(0).cpu())

    def _drawn(self, prompts: Sequence[Prompt], rng: Stream) -> Rollout:
        """GROUP pictures of each prompt."""
        if self.in_context:
            return self.in_context.draw(cast(TeacherForcedPolicy, self.policy), prompts, rng, GROUP)[1]
        return self.policy.rollout(repeated(prompts, GROUP), rng.repeat(GROUP))

    def nest(self, number: int, m: int) -> None:
        """Several continuations of several prefixes of each prompt."""
        assert isinstance(self.policy, BranchingPolicy)
        rng = Stream(seed=self.seed, path=("probe", "nested", number), rows=tuple(range(NESTED_PROMPTS))).repeat(PREFIXES)
        self.nested[m].draw(self.policy, self.judge, self.nested_prompts.at(number), rng, m, CONTINUATIONS)

    def _scores(self, rollout: Rollout) -> Float[Tensor, "B S D"]:
        return step_scores(self.policy, rollout, self._part(rollout.step), self.parts, self.projection)

    def _part(self, step: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        return torch.bucketize(step.long(), torch.tensor(self.starts[1:], dtype=torch.long, device=step.device), right=True)

    # -- what the pool says ------------------------------------------------------------------------------------------------------------

    def moments(self) -> Moments:
        gradient = torch.stack(self.gradients)
        if not gradient.any():
            raise NumericsError(
                f"probe: in {len(gradient)} batches no picture was judged better or worse than its group, so there is no gradient to "
                "measure. The reward is constant (solved, or out of reach), or fails; try other prompts, a denser reward, or `varl doctor`."
            )
        return moments(gradient)

    def alpha_weights(self, alpha: float) -> Float[Tensor, " S"]:
        """PANW's weight of a token of each part; of several steps, their tokens' mean."""
        per_step = panw_weights(self.sizes[None], alpha)[0] * self.sizes
        total, tokens = (torch.zeros(self.parts).index_add(0, self._parts_of_steps(), x) for x in (per_step, self.sizes))
        return total / tokens.clamp(min=1e-9)

    def prefix_weights(self, m: int) -> Float[Tensor, " S"]:
        return (torch.tensor(self.starts) < m).float()

    def tokens(self) -> list[float]:
        return torch.zeros(self.parts).index_add(0, self._parts_of_steps(), self.sizes).tolist()

    @property
    def uneven(self) -> bool:
        """Whether some steps draw more tokens than others, which is what PANW weighs by."""
        return bool((self.sizes != self.sizes[0]).any())

    def _parts_of_steps(self) -> Int[Tensor, " T"]:
        return self._part(torch.arange(len(self.sizes))[None])[0]


def leave_one_out(value: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Each picture's reward over the mean of its group's others, in units of the reward: no bias, no division."""
    return sibling_advantages(value[:, None, :, None], "none")[:, 0, :, 0]


# ---- concluding -----------------------------------------------------------------------------------------------------------------------


def findings(probe: Probe) -> dict[str, Any]:
    """All of probe.json but the model's identity. Intervals are 95 %; null is unbounded."""
    m, plain, batch = probe.moments(), torch.ones(probe.parts), PROMPTS * GROUP
    ratio = estimate(snr(m, plain))
    alphas = compared(m, {alpha: probe.alpha_weights(alpha) for alpha in ALPHAS}) if probe.uneven else {}
    prefixes = compared(m, {**{start: probe.prefix_weights(start) for start in probe.starts[1:]}, probe.policy.layout.steps: plain})
    alpha = mildest(alphas, 0.0)
    weight = plain if alpha is None else probe.alpha_weights(alpha)
    needed = images_for_unit_snr(estimate(snr(m, weight)), batch)
    group = groups(m, torch.stack(probe.halves), weight)
    nested = {start: settled(found) for start, found in probe.nested.items() if found.resolved}
    # a prefix alone learns less than everything, so the longest that is as good is the mildest
    cut = mildest(dict(reversed(prefixes.items())), probe.policy.layout.steps)
    quarter = min(nested, key=lambda start: abs(nested[start].share.value - 0.25), default=None)
    middle = cut if cut is not None else quarter
    chosen = nested.get(middle) if middle is not None else None
    content: dict[str, Any] = {
        "images": probe.images,
        "batches": len(probe.gradients),
        "batch": batch,
        "in_context": probe.in_context is not None,
        "grids": probe.policy.layout.grids,
        "all_steps": probe.policy.layout.steps,
        "steps": [] if probe.in_context else step_rows(probe, m),
        "snr": ratio.value,
        "snr_interval": [ratio.low, ratio.high],
        "images_for_unit_snr": needed.value,
        "images_for_unit_snr_interval": [needed.low, needed.high],
        "alpha": [{"alpha": alpha, **ratio_row(row.to_plain)} for alpha, row in alphas.items()],
        "prefix": [{"m": start, **ratio_row(row.to_plain)} for start, row in prefixes.items()],
        "variance_share": [{"m": start, "value": s.share.value, "interval": [s.share.low, s.share.high]} for start, s in nested.items()],
        "cost": {
            str(start): {
                "prefix_seconds": s.prefix_seconds,
                "continuation_seconds": s.continuation_seconds,
                "best_continuations": s.best.value,
                "best_continuations_interval": [s.best.low, s.best.high],
                "num_continuations": s.continuations,
            }
            for start, s in nested.items()
        },
        "recommend": {
            "panw_alpha": alpha,
            "panw_alpha_range": as_range(alphas) if alphas else None,
            "middle_step": middle,
            "middle_step_range": as_range(prefixes),
            "num_continuations": chosen.continuations if chosen else 1,
            "num_generations": nearest_group(group),
            "num_generations_range": [group.low, group.high],
            "images_for_unit_snr": needed.value,
        },
    }
    content["recommendations"] = [
        say_signal(ratio, needed, batch, alpha),
        say_alpha(alphas, alpha) if alphas else "panw_alpha: every step draws as many tokens, so no exponent changes anything.",
        *say_prefix(prefixes, cut, nested, quarter),
        *(say_continuations(start, s) for start, s in nested.items() if s is chosen),
        say_group(group),
    ]
    if probe.in_context:
        content["recommendations"].append(
            "All tokens of a picture were drawn at once in the context of a real one, as va_pi draws them: no step comes before another, "
            "so there is no middle step and nothing to continue. This is the gradient of the reward alone; the prior is not in it."
        )
    elif not probe.nested:
        content["recommendations"].append(
            f"{type(probe.policy).__name__} cannot stop half-way and go on several times, so the share of reward variance settled by each "
            "step, and with it K, were not measured."
        )
    return finite(content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One of several weightings: progress per batch over the plain gradient, and over the best of them."""

    to_plain: Estimate
    to_best: Estimate

    @property
    def as_good(self) -> bool:
        """Not told apart from the best."""
        return self.to_best.low <= 1 <= self.to_best.high

    @property
    def helps(self) -> bool:
        """Told apart from the plain gradient."""
        return self.to_plain.low > 1


def compared(m: Moments, weights: Mapping[Any, Float[Tensor, " S"]]) -> dict[Any, Compared]:
    plain = torch.ones(m.pairs.shape[1])
    best = max(weights.values(), key=lambda w: alignment(m, w, plain)[0].item())
    return {key: Compared(to_plain=rho2_ratio(m, w, plain, plain), to_best=rho2_ratio(m, w, best, plain)) for key, w in weights.items()}


def mildest(rows: Mapping[Any, Compared], plain: Any) -> Any | None:
    """The first that has nearly the best's progress and is told apart from the plain gradient; None if there is none. Rows come mildest
    first."""
    return next((key for key, row in rows.items() if key != plain and row.helps and row.to_best.value >= NEAR), None)


def as_range(rows: Mapping[Any, Compared]) -> list[Any]:
    """The least and the greatest that are not told apart from the best."""
    good = [key for key, row in rows.items() if row.as_good]
    return [min(good), max(good)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What nested sampling says about one m."""

    share: Estimate
    """b, of the reward's variance within a prompt."""
    prefix_seconds: float
    """To draw one prefix and train on it."""
    continuation_seconds: float
    """To draw one continuation, decode and judge it."""
    best: Estimate
    """K*."""
    continuations: int
    """K, more than 1 only where that is told apart from 1."""


def settled(found: Nested) -> Settled:
    between, within = (means(torch.tensor(x, dtype=torch.float64)) for x in (found.between, found.within))
    share = estimate((between / (between + within)).nan_to_num())
    prefix, continuation = statistics.median(found.prefix_seconds), statistics.median(found.continuation_seconds)
    best = share.map(lambda b: best_continuations(min(max(b, 0.0), 1.0), 1 - min(max(b, 0.0), 1.0), prefix, continuation))
    share = share.map(lambda b: min(max(b, 0.0), 1.0))
    counts = range(1, MOST_CONTINUATIONS + 1)
    quietest = min(counts, key=lambda count: continuation_noise(share.value, count, prefix / continuation))
    return Settled(
        share=share,
        prefix_seconds=prefix,
        continuation_seconds=continuation,
        best=best,
        continuations=quietest if best.low > math.sqrt(2) else 1,
    )


def groups(m: Moments, halves: Float[Tensor, "N S S"], weight: Float[Tensor, " S"]) -> Estimate:
    """G*: from the noise of a batch, (within / (G - 1) + between) / P, and between, the variance of the prompts' own mean gradients: of two
    half groups of one prompt the inner product has the expectation |E g_p|^2, of two prompts |E g|^2."""
    signal = overlap(m, weight, weight)
    between = torch.einsum("mst,s,t->m", means(halves.double()), weight.double(), weight.double()) - signal
    within = max((power(m, weight) - signal)[0].item() * PROMPTS - max(between[0].item(), 0.0), 0.0) * (GROUP - 1)
    return estimate(between).map(lambda b: best_group(within, b))


def nearest_group(group: Estimate) -> int | None:
    """The usual size nearest to G*; None where G* may be anything."""
    if math.isinf(group.high) and group.low <= GROUPS[0]:
        return None
    best = min(group.value if math.isfinite(group.value) else group.low, GROUPS[-1])
    return min(GROUPS, key=lambda size: abs(math.log(size / best)))


def step_rows(probe: Probe, m: Moments) -> list[dict[str, Any]]:
    signal, noise = signal_shares(m), noise_shares(m)
    rows = []
    for part, tokens in enumerate(probe.tokens()):
        own = torch.eye(probe.parts)[part]
        row: dict[str, Any] = {"step": probe.starts[part], "tokens": round(tokens)}
        for name, found in (
            ("signal_share", estimate(signal[:, part]).map(lambda x: min(max(x, 0.0), 1.0))),
            ("noise_share", estimate(noise[:, part])),
            ("snr", estimate(snr(m, own).nan_to_num())),
        ):
            row |= {name: found.value, f"{name}_interval": [found.low, found.high]}
        rows.append(row)
    return rows


def ratio_row(ratio: Estimate) -> dict[str, Any]:
    return {"rho2_ratio": ratio.value, "interval": [ratio.low, ratio.high]}


# ---- saying ---------------------------------------------------------------------------------------------------------------------------


def number(x: int | float) -> str:
    return "unbounded" if math.isinf(x) else f"{x:,.0f}" if abs(x) >= 99.5 else f"{x:.2g}"


def span(x: Estimate) -> str:
    return f"{number(x.value)} (95 %: {number(x.low)} to {number(x.high)})"


def best_seen(name: str, progress: Estimate) -> str:
    """Nothing where all is possible."""
    return "" if math.isinf(progress.high) else f" (best {name}: progress per batch x{span(progress)})"


def say_signal(ratio: Estimate, needed: Estimate, batch: int, alpha: float | None) -> str:
    if ratio.low <= 0:
        return f"A plain batch of {batch} pictures has SNR {span(ratio)}: no signal was seen yet. Give the probe more minutes."
    how = "the plain gradient" if alpha is None else f"panw_alpha {alpha:g}"
    return f"A plain batch of {batch} pictures has SNR {span(ratio)}. With {how}, signal equals noise at {span(needed)} pictures."


def say_alpha(alphas: Mapping[float, Compared], alpha: float | None) -> str:
    if alpha is None:
        best = max((key for key in alphas if key), key=lambda key: alphas[key].to_best.value)
        return (
            f"panw_alpha: no exponent was told apart from plain GRPO{best_seen(f'{best:g}', alphas[best].to_plain)}. 0.7 is the usual "
            "choice, unproven here."
        )
    low, high = as_range(alphas)
    return (
        f"panw_alpha {alpha:g}: progress per batch x{span(alphas[alpha].to_plain)} over plain GRPO; "
        f"{low:g} to {high:g} are not told apart from the best."
    )


def say_prefix(prefixes: Mapping[int, Compared], cut: int | None, nested: Mapping[int, Settled], quarter: int | None) -> list[str]:
    if cut is not None:
        return [f"Training the first {cut} steps only: progress per batch x{span(prefixes[cut].to_plain)} over all steps, at alpha 0."]
    best = max((m for m in prefixes if m < max(prefixes)), key=lambda m: prefixes[m].to_best.value, default=None)
    if best is None:
        return []
    middle = (
        "" if quarter is None else f" If you use two stages, m = {quarter} settles {span(nested[quarter].share)} of the reward's variance."
    )
    said = f"no prefix was told apart from training all steps{best_seen(f'm = {best}', prefixes[best].to_plain)}."
    return [f"middle_step: {said}{middle}"]


def say_continuations(m: int, s: Settled) -> str:
    costs = f"a prefix costs {1e3 * s.prefix_seconds:.3g} ms, a continuation with its reward {1e3 * s.continuation_seconds:.3g} ms"
    facts = f"at m = {m} the prefix settles {span(s.share)} of the reward's variance and {costs}, so K* = {span(s.best)}"
    if s.continuations > 1:
        return f"num_continuations {s.continuations}: {facts}."
    if s.best.high > math.sqrt(2):
        return f"num_continuations 1: {facts}; that more than one pays (K* above 1.4) was not shown."
    return f"num_continuations 1: {facts}; more than one only adds noise."


def say_group(group: Estimate) -> str:
    size = nearest_group(group)
    if size is None:
        return "num_generations: any size from 4 on; how much prompts differ in their gradients could not be told from no difference."
    return f"num_generations {size}: G* = {span(group)} pictures of each prompt are quietest at equal pictures, flat within a factor 2."


# ---- from config to probe.json ----------------------------------------------------------------------------------------------------------


def probe(config: RunConfig, out: Path, *, minutes: float = 3.0, tick: Tick = lambda metrics: None) -> dict[str, Any]:
    """Measures the config's model under its laws and rewards on its own prompts until `minutes` are over (at least `least_rounds`), and
    writes out/probe.json. Every picture has one advantage: region credit and masks are not measured. `tick` hears of rounds, pictures and
    seconds, and of how many seconds it will be in total."""
    device = device_of(config.train.device)
    model = model_identity(model_path(config.model))
    policy = build_policy(config, device, reference=needs_reference(config.algorithm))
    prompts = build_prompts(config.data, config.seed, config.eval.samples)
    algorithm = build_algorithm(config.algorithm, cast(Policy, policy), prompts.pictures)
    in_context, rows = algorithm if isinstance(algorithm, VAPI) else None, config.train.rollouts_per_backward
    judge = build_judge(config, prompts.pictures)
    try:
        found = Probe(policy, judge, prompts.train, in_context=in_context, seed=config.seed, rows=rows)
        content = measure(found, 60 * minutes, tick)
    finally:
        judge.close()
    grpo = config.algorithm.grpo
    if grpo.region_credit or grpo.mask != "none":
        content["recommendations"].append(
            "All of this with one advantage for each picture: the region_credit and mask that the config asks for are not measured."
        )
    content = {"model": model, "seed": config.seed, **content}
    out.mkdir(parents=True, exist_ok=True)
    (out / "probe.json").write_text(json.dumps(content, indent=2))
    return content


def measure(found: Probe, seconds: float, tick: Tick = lambda metrics: None) -> dict[str, Any]:
    """Rounds until the time is over, and what they say."""
    start = time.perf_counter()
    while found.rounds < found.least_rounds or time.perf_counter() - start < seconds:
        found.round()
        spent = time.perf_counter() - start
        least = spent * max(found.least_rounds / found.rounds, 1)
        tick({"rounds": found.rounds, "images": found.images, "seconds": spent, "total": max(seconds, least)})
    return {**findings(found), "seconds": time.perf_counter() - start}


def model_identity(folder: Path) -> str:
    """What tells the model folder from others: for one of ours, the sha256 of its manifest, which holds the hashes of its files."""
    return hugging_face.identity(folder)


def contradictions(config: RunConfig, probe: Mapping[str, Any]) -> list[str]:
    """Settings that a probe of the same model found worse, beyond its error, each in a sentence; none if it is of another model, or of
    pictures that were drawn freely and not in context, or the other way round."""
    if probe.get("model") != model_identity(model_path(config.model)):
        return []
    if probe.get("in_context", False) != isinstance(config.algorithm, VAPIConfig):
        return []
    two_stage = config.algorithm
    grpo = two_stage.grpo
    recommend, said = probe["recommend"], []
    if recommend["panw_alpha"] is not None:
        said += outside("panw_alpha", grpo.panw_alpha, recommend["panw_alpha_range"])
    if recommend["num_generations"] is not None:
        said += outside("num_generations", grpo.num_generations, usual(recommend["num_generations_range"]))
    if not isinstance(two_stage, VARRLConfig):
        return said
    grids = tuple((h, w) for h, w in probe["grids"])
    try:
        m = middle_step(two_stage.middle_step, Layout(grids=grids, steps=probe.get("all_steps", len(grids))))
    except ConfigError:  # another's to report
        return said
    said += outside("middle_step", m, recommend["middle_step_range"])
    cost = probe["cost"].get(str(m))
    if cost and two_stage.num_continuations > cost["num_continuations"]:
        low, high = (number(math.inf if end is None else end) for end in cost["best_continuations_interval"])
        said.append(
            f"num_continuations={two_stage.num_continuations}: the probe found K* from {low} to {high} at m = {m}; more than "
            f"{cost['num_continuations']} was not shown to pay."
        )
    return said


def usual(bounds: Sequence[float | None]) -> list[float]:
    """A range of group sizes, twice as wide on either side, for the optimum is flat."""
    low, high = bounds
    return [(low or 0.0) / 2, math.inf if high is None else 2 * high]


def outside(name: str, value: int | float, bounds: Sequence[int | float]) -> list[str]:
    low, high = bounds
    if low <= value <= high:
        return []
    return [f"{name}={value:g}: the probe of this model found {number(low)} to {number(high)} better."]
