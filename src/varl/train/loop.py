"""The loop: collect, objective, one optimizer step. Blind to model and method; everything it needs comes through the protocols of types.py.

The gradient of a step is accumulated as a sum and divided once, at the end, by the all-reduced number of tokens (`TrainBatch.size`): so
it depends neither on the micro-batch nor on the number of ranks, and training can start on the first pictures while the last are judged."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from varl.config import TrainConfig
from varl.distributed.mesh import World
from varl.distributed.reduce import all_sum, sum_gradients
from varl.errors import NumericsError, RewardError
from varl.rng import Stream
from varl.train.ema import EMA
from varl.train.optim import build_optimizer, lr_at, set_lr
from varl.types import Algorithm, Judge, Policy, Prompt, Rollout, Score, TrainBatch

log = logging.getLogger("varl")

REPLAY_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Nats by which a log-prob may differ between sampling and the first training pass, per dtype of the forward pass; for log-probs beyond
1 nat relative to the largest in the batch, for that is how rounding grows."""

Metrics = dict[str, float]


class Prompts(Protocol):
    """Prompts of one step, for this rank, with their global slot numbers; a function of the step alone."""

    def __call__(self, step: int) -> tuple[Sequence[Prompt], Sequence[int]]: ...


@dataclass(slots=True)
class Progress:
    """What the loop has done so far; saved with every checkpoint."""

    step: int = 0
    """Updates done."""
    seconds: float = 0.0
    """Wall clock inside updates, over all interruptions."""
    cpu_seconds: float = 0.0
    reward_calls: int = 0
    idle: int = 0
    """Updates in a row that taught nothing."""
    replay_gap_max: float = 0.0
    """Largest log-prob difference that the replay gate found before the first update, nats."""


@dataclass(slots=True)
class Clock:
    """Seconds by phase of one update."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start


class Trainer:
    """One run in memory. `run` goes on from `progress.step`; saving and loading is the caller's, through `state` and `restore`."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        seed: int,
        policy: Policy,
        algorithm: Algorithm,
        judge: Judge,
        prompts: Prompts,
        world: World,
        failures: Path,
    ) -> None:
        self.config, self.seed, self.world, self.failures = config, seed, world, failures
        self.policy, self.algorithm, self.judge, self.prompts = policy, algorithm, judge, prompts
        self.parameters = [p for p in policy.module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(policy.module, config.optim)
        self.ema = EMA(policy.module, config.ema_decay) if config.ema_decay else None
        self.progress = Progress()
        self.gated = False
        self.stop_asked = threading.Event()

    # -- one update --------------------------------------------------------------------------------------------------------------------

    def update(self) -> Metrics:
        """One batch of rollouts and `num_iterations` optimizer steps on it. Returns the step's metrics."""
        step, config, clock = self.progress.step, self.config, Clock()
        start, cpu = time.perf_counter(), time.process_time()
        factor = lr_at(step, config.steps, config.optim)
        set_lr(self.optimizer, factor)
        prompts, slots = self.prompts(step)
        rng = Stream(seed=self.seed, path=("rollout", step), rows=tuple(slots))
        timed = TimedPolicy(self.policy, clock)
        pieces: Iterable[TrainBatch] = self.algorithm.collect(timed, prompts, TimedJudge(self.judge, clock), rng, step)
        tally = Tally()
        for iteration in range(self.algorithm.num_iterations):
            kept = []
            self.optimizer.zero_grad(set_to_none=True)
            size = torch.zeros(())
            for piece in pieces:
                kept.append(piece)
                for part in piece.split(config.rollouts_per_backward):
                    with clock.phase("train"):
                        objective, metrics = self.algorithm.objective(self.policy, part)
                        if iteration == 0:
                            self._gate(metrics, part)
                        self._refuse_nonfinite(objective, part, "loss")
                        (-objective).backward()
                    size += part.size.sum().cpu()
                    tally.add_objective(part, objective.detach(), metrics)
                if iteration == 0:
                    tally.add_rollouts(piece)
            self._check_failures(tally)
            with clock.phase("optimizer"):
                norm = self._step(size, kept)
            pieces = kept
        self.gated = True
        tally.norms.append(norm)
        taught = all_sum(torch.tensor(float(tally.taught))).item() > 0
        p = self.progress
        p.step, p.idle = step + 1, 0 if taught else p.idle + 1
        elapsed = time.perf_counter() - start
        p.seconds += elapsed
        p.cpu_seconds += time.process_time() - cpu
        p.reward_calls += int(all_sum(torch.tensor(float(tally.judged))).item())
        return {
            "step": p.step,
            "lr": config.optim.lr * factor,
            **tally.metrics(),
            "grad_norm": norm,
            **{f"seconds/{name}": seconds for name, seconds in clock.phases.items()},
            "seconds/total": elapsed,
            "images_per_second": tally.judged * self.world.size / elapsed,
            "reward_calls": p.reward_calls,
        }

    def _step(self, size: Tensor, kept: Sequence[TrainBatch]) -> float:
        """Divide the summed gradient by the global size, clip, move. Returns the gradient's norm."""
        total = all_sum(size).clamp(min=1.0)
        sum_gradients(self.parameters)
        with torch.no_grad():
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.div_(total.to(p.grad.device))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.max_grad_norm)
        for batch in kept[:1]:
            self._refuse_nonfinite(norm, batch, "gradient")
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.policy.module)
        return float(norm)

    # -- gates -------------------------------------------------------------------------------------------------------------------------

    def _gate(self, metrics: Metrics, batch: TrainBatch) -> None:
        """Before the first update of a process: what the training pass computes must be what the sampler recorded."""
        if self.gated:
            return
        gap = metrics["sampling/sampling_logp_difference/max"]
        self.progress.replay_gap_max = max(self.progress.replay_gap_max, gap)
        dtype = getattr(self.policy, "dtype", torch.float32)
        allowed = REPLAY_TOLERANCE[dtype] * max(1.0, float(batch.rollout.logp.abs().max()))
        if not gap <= allowed:
            raise NumericsError(
                f"replay gate: log-probs recomputed for training differ from those recorded while sampling by up to {gap:.3g} nats "
                f"(allowed in {dtype}: {allowed:.1g}), so the policy that would be trained is not the one that drew the "
                f"pictures. {self._suspect(batch)}"
            )

    @torch.no_grad()
    def _suspect(self, batch: TrainBatch) -> str:
        """Which switch differs, found by trying."""
        rollout = batch.rollout
        on = [name for name, module in self.policy.module.named_modules() if module.training]
        if on:
            return f"The model is in training mode (`{on[0] or 'root'}`): dropout or drop-path is on. Call eval()."
        score = self.policy.score(rollout).logp
        if rollout.sample_logp is not None and (score - rollout.sample_logp).abs().max() < (score - rollout.logp).abs().max() / 10:
            return "The recomputed values are those of the sample law: guidance, temperature or filter differ. Set score_law right."
        again = self.policy.score(rollout).logp
        if not torch.equal(score, again):
            return "Scoring the same rollout twice gives two results: something in the model draws random numbers while scoring."
        worst = int((score - rollout.logp).abs().amax(0).argmax())
        step = int(rollout.step[0, worst])
        return f"The largest difference is at token {worst} (step {step}): check the cache, the mask and the alignment of inputs there."

    def _refuse_nonfinite(self, value: Tensor, batch: TrainBatch, what: str) -> None:
        if torch.isfinite(value):
            return
        self.failures.mkdir(parents=True, exist_ok=True)
        file = self.failures / f"step-{self.progress.step + 1:06d}.safetensors"
        rollout = batch.rollout
        parts = {
            "actions": rollout.actions,
            "logp": rollout.logp,
            "advantage": batch.advantage,
            "weight": batch.weight,
            "value": batch.judgement.value,
            "index": rollout.index,
        }
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in parts.items()}, file)
        raise NumericsError(
            f"step {self.progress.step + 1}: the {what} is {float(value)}. The batch is saved in {file}, the last checkpoint is whole. "
            "Lower train.optim.lr, or look at the batch's advantages and log-probs."
        )

    def _check_failures(self, tally: "Tally") -> None:
        failed, judged = (all_sum(torch.tensor(float(n))).item() for n in (tally.failed, tally.judged))
        if judged and failed / judged > self.config.max_failed_rewards:
            raise RewardError(
                f"step {self.progress.step + 1}: {failed:.0f} of {judged:.0f} rewards failed (allowed share: "
                f"{self.config.max_failed_rewards:g}). See the log for the engine's own message; nothing was updated in this step."
            )

    # -- the run -----------------------------------------------------------------------------------------------------------------------

    def finished(self) -> str | None:
        """Why the run is over; None while it goes on."""
        p, c = self.progress, self.config
        if p.step >= c.steps:
            return f"all {c.steps} steps done"
        if c.max_seconds and p.seconds >= c.max_seconds:
            return f"train.max_seconds={c.max_seconds:g} reached after {p.step} steps"
        if p.idle >= c.idle_steps:
            return (
                f"nothing to learn: for {p.idle} steps in a row every advantage was 0. The reward is constant inside each group "
                "(solved, or out of reach). Mix in a denser reward, or sample harder prompts."
            )
        if self.stop_asked.is_set():
            return "asked to stop"
        return None

    def run(self, after: Callable[[Metrics], None]) -> str:
        """Updates until finished; `after` is called with each step's metrics. SIGTERM and SIGINT finish the current step first. Returns why
        it ended."""
        with self._signals():
            while (reason := self.finished()) is None:
                after(self.update())
        return reason

    @contextmanager
    def _signals(self):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.stop_asked.is_set():
            raise KeyboardInterrupt
        log.warning("%s: finishing this step, then saving", signal.Signals(number).name)
        self.stop_asked.set()


class TimedPolicy:
    """The policy, with its acting timed. Has every power that a policy may have; using one that the policy lacks fails there."""

    def __init__(self, policy: Any, clock: Clock) -> None:
        self._policy, self._clock = policy, clock
        self.module, self.layout = policy.module, policy.layout

    def _timed(self, phase: str, name: str, *args: Any, **kwargs: Any) -> Any:
        with self._clock.phase(phase):
            return getattr(self._policy, name)(*args, **kwargs)

    def rollout(self, prompts: Sequence[Prompt], rng: Stream) -> Rollout:
        return self._timed("rollout", "rollout", prompts, rng)

    def prefix(self, prompts: Sequence[Prompt], rng: Stream, *, steps: int) -> Rollout:
        return self._timed("rollout", "prefix", prompts, rng, steps=steps)

    def complete(self, prefix: Rollout, rng: Stream) -> Rollout:
        return self._timed("rollout", "complete", prefix, rng)

    def encode(self, images: Tensor, prompts: Sequence[Prompt]) -> Rollout:
        return self._timed("rollout", "encode", images, prompts)

    def draw(self, given: Rollout, rng: Stream, *, prefix_noise: float) -> Rollout:
        return self._timed("rollout", "draw", given, rng, prefix_noise=prefix_noise)

    def redraw(self, rollout: Rollout, rng: Stream) -> Rollout:
        return self._timed("rollout", "redraw", rollout, rng)

    def decode(self, rollout: Rollout) -> Tensor:
        return self._timed("decode", "decode", rollout)

    def score(self, rollout: Rollout) -> Score:
        return self._timed("rollout", "score", rollout)


class TimedJudge:
    """The judge, with the time that the trainer had to wait for it."""

    def __init__(self, judge: Judge, clock: Clock) -> None:
        self._judge, self._clock = judge, clock

    def submit(self, images: Tensor, prompts: Sequence[Prompt]):
        return TimedFuture(self._judge.submit(images, prompts), self._clock)


class TimedFuture:
    def __init__(self, future, clock: Clock) -> None:
        self._future, self._clock = future, clock

    def result(self):
        with self._clock.phase("reward_wait"):
            return self._future.result()


@dataclass(slots=True)
class Tally:
    """Sums over the pieces of one step, and the means that are reported."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    loss: float = 0.0
    size: float = 0.0
    judged: int = 0
    failed: int = 0
    taught: int = 0
    tokens: int = 0
    stage: str = "all"

    def _add(self, metrics: Metrics, weight: float) -> None:
        for name, value in metrics.items():
            if name.endswith("/max"):
                self.maxima[name] = max(self.maxima.get(name, value), value)
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value * weight
                self.counts[name] = self.counts.get(name, 0.0) + weight

    def add_objective(self, part: TrainBatch, objective: Tensor, metrics: Metrics) -> None:
        self._add(metrics, len(part))
        self.loss -= float(objective)
        self.size += float(part.size.sum())
        self.tokens += int((part.kl_weight > 0).sum())

    def add_rollouts(self, piece: TrainBatch) -> None:
        self._add(dict(piece.metrics), len(piece))
        self.judged += int(piece.metrics.get("judged", len(piece)))
        self.failed += round(piece.metrics.get("reward_failed", 0.0) * piece.metrics.get("judged", len(piece)))
        self.taught += int((piece.advantage * piece.weight).abs().amax(1).gt(0).sum())
        self.stage = piece.stage
        self._add({"advantage_abs_mean": float(piece.advantage.abs().mean())}, len(piece))

    def metrics(self) -> Metrics:
        means = {name: self.sums[name] / self.counts[name] for name in self.sums if name != "judged"}
        return {**means, **self.maxima, "loss": self.loss / max(self.size, 1.0), "tokens_trained": self.tokens, "stage": self.stage}  # type: ignore[dict-item]
