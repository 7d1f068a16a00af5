"""The loop: collect, objective, one optimizer step. Blind to model and method; everything it needs comes through the protocols of types.py.

The gradient of a step is accumulated as a sum and divided once, at the end, by the all-reduced number of tokens (`TrainBatch.size`): so
it depends neither on the micro-batch nor on the number of ranks, and training can start on the first pictures while the last are judged."""

import logging
import resource
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from varl.config import TrainConfig
from varl.distributed.mesh import World
from varl.distributed.reduce import all_sum, clip_gradients, gather_metrics, sum_gradients
from varl.errors import NumericsError, RewardError
from varl.rng import Stream
from varl.train.ema import EMA
from varl.train.optim import build_optimizer, lr_at, set_lr
from varl.types import Algorithm, Judge, Policy, Prompt, Rollout, Score, TrainBatch

log = logging.getLogger("varl")

REPLAY_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Nats by which a log-prob may differ between sampling and the first training pass, per dtype of the forward pass; for log-probs beyond
1 nat relative to the largest in the batch, for that is how rounding grows."""

STOPPED = "asked to stop"
"""Why a run ended that the same command goes on with."""

Metrics = dict[str, Any]


Prompts = Callable[[int], tuple[Sequence[Prompt], Sequence[int]]]
"""Prompts of one step, for this rank, with their global slot numbers; a function of the step alone."""


@dataclass(slots=True)
class Progress:
    """What the loop has done so far; saved with every checkpoint."""

    step: int = 0
    """Updates done."""
    seconds: float = 0.0
    """Wall clock inside updates, over all interruptions."""
    cpu_seconds: float = 0.0
    """Of all processes, over all interruptions."""
    reward_calls: int = 0
    idle: int = 0
    """Updates in a row that taught nothing."""
    replay_gap_max: float = 0.0
    """Largest log-prob difference that the replay gate found before the first update, nats."""


@dataclass(slots=True)
class Clock:
    """Seconds by phase of one update. Drawing goes on beside training, so phases may sum to more than the whole."""

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
        pieces: Iterable[TrainBatch] = ahead(self.algorithm.collect(timed, prompts, TimedJudge(self.judge, clock), rng, step))
        tally, norms = Tally(), []
        for iteration in range(self.algorithm.num_iterations):
            kept = []
            self.optimizer.zero_grad(set_to_none=True)
            size = torch.zeros(())
            for piece in pieces:
                kept.append(piece)
                if iteration == 0:
                    tally.add_piece(piece)
                for part in piece.split(config.rollouts_per_backward):
                    with clock.phase("train"):
                        objective, metrics = self.algorithm.objective(self.policy, part)
                        if iteration == 0 and not self.gated:
                            self._gate(metrics, part)
                        self._refuse_nonfinite(objective, [part], "loss")
                        (-objective).backward()
                    size += part.size.sum().cpu()
                    tally.add_objective(part, float(objective.detach()), metrics)
            if iteration == 0:
                self._check_failures(tally)
            with clock.phase("optimizer"):
                norms.append(self._step(size, kept))
            pieces = kept
        self.gated = True
        elapsed = time.perf_counter() - start
        tally.totals |= {"seconds": elapsed / self.world.size, "cpu_seconds": time.process_time() - cpu}
        total = tally.over_ranks()
        p = self.progress
        p.step = step + 1
        p.idle = 0 if total["taught"] and max(norms) > 0 else p.idle + 1
        p.seconds += total["seconds"]
        p.cpu_seconds += total["cpu_seconds"]
        p.reward_calls += int(total["judged"])
        return {
            "step": p.step,
            "stage": tally.stage,
            "lr": config.optim.lr * factor,
            "loss": total["loss"] / max(total["size"], 1.0),
            "grad_norm": norms[-1],
            **tally.means(),
            "tokens_trained": int(total["tokens"]),
            "reward_calls": p.reward_calls,
            **{f"seconds/{name}": seconds for name, seconds in clock.phases.items()},
            "seconds/total": elapsed,
            "images_per_second": total["judged"] / elapsed,
            "memory_gb": memory_gb(self.world.device),
        }

    def _step(self, size: Tensor, kept: Sequence[TrainBatch]) -> float:
        """Divide the summed gradient by the global size, clip, move. Returns the gradient's norm."""
        total = all_sum(size).clamp(min=1.0)
        sum_gradients(self.parameters)
        with torch.no_grad():
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.div_(total.to(p.grad.device))
        norm = clip_gradients(self.parameters, self.config.optim.max_grad_norm)
        self._refuse_nonfinite(norm, kept, "gradient")
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.policy.module)
        return float(norm)

    # -- gates -------------------------------------------------------------------------------------------------------------------------

    def _gate(self, metrics: Metrics, batch: TrainBatch) -> None:
        """Before the first update of a process: what the training pass computes must be what the sampler recorded."""
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
        rollout, module = batch.rollout, self.policy.module

        def gap(a: Tensor, b: Tensor) -> float:
            return float((a - b).abs().max())

        def scores() -> tuple[Tensor, Tensor]:
            return self.policy.score(rollout).logp, self.policy.score(rollout).logp

        score, again = scores()
        on = [name for name, part in module.named_modules() if part.training]
        module.eval()
        calm, calm_again = scores()
        for name in on:
            module.get_submodule(name).training = True
        random, calmed = gap(score, again) > 0, gap(calm, calm_again) == 0
        if on and calmed and (random or gap(calm, rollout.logp) < gap(score, rollout.logp) / 10):
            return f"The model is in training mode (`{on[-1] or 'root'}`): dropout or drop-path is on. Call eval()."
        if random:
            return "Scoring the same rollout twice gives two results: something in the model draws random numbers while scoring."
        if rollout.sample_logp is not None:
            if gap(score, rollout.sample_logp) < gap(score, rollout.logp) / 10:
                return "The recomputed values are those of the sample law: guidance, temperature or filter differ. Set score_law right."
            if torch.equal(rollout.logp, rollout.sample_logp):
                return "The recorded values are those of the sample law: guidance, temperature or filter differ. Record the score law's."
        worst = int((score - rollout.logp).abs().amax(0).argmax())
        step = int(rollout.step[0, worst])
        return (
            f"The largest difference is at token {worst} (step {step}): check the cache, the mask and the alignment of inputs there, and "
            "that sampler and training pass know the same law (guidance, temperature, filter)."
        )

    def _refuse_nonfinite(self, value: Tensor, batches: Sequence[TrainBatch], what: str) -> None:
        if torch.isfinite(value):
            return
        self.failures.mkdir(parents=True, exist_ok=True)
        file = self.failures / f"step-{self.progress.step + 1:06d}-rank-{self.world.rank}.safetensors"
        parts = {
            f"{i}/{name}": tensor.detach().cpu().contiguous().clone()
            for i, batch in enumerate(batches)
            for name, tensor in {
                "actions": batch.rollout.actions,
                "logp": batch.rollout.logp,
                "index": batch.rollout.index,
                "advantage": batch.advantage,
                "weight": batch.weight,
                "value": batch.judgement.value,
            }.items()
        }
        save_file(parts, file)
        raise NumericsError(
            f"step {self.progress.step + 1}: the {what} is {value.item()}. The batch is saved in {file}, the last checkpoint is whole. "
            "Lower train.optim.lr, or look at the batch's advantages and log-probs."
        )

    def _check_failures(self, tally: "Tally") -> None:
        failed, judged = (all_sum(tally.totals[name]).item() for name in ("failed", "judged"))
        if judged and failed / judged > self.config.max_failed_rewards:
            raise RewardError(
                f"step {self.progress.step + 1}: {failed:.0f} of {judged:.0f} rewards failed (allowed share: "
                f"{self.config.max_failed_rewards:g}). See the log for the engine's own message; nothing was updated in this step."
            )

    # -- the run -----------------------------------------------------------------------------------------------------------------------

    def finished(self) -> str | None:
        """Why the run is over; None while it goes on. The same on every rank, and every rank must ask."""
        p, c = self.progress, self.config
        if p.step >= c.steps:
            return f"all {c.steps} steps done"
        if c.max_seconds and p.seconds >= c.max_seconds:
            return f"train.max_seconds={c.max_seconds:g} reached after {p.step} steps"
        if p.idle >= c.idle_steps:
            return (
                f"nothing to learn: for {p.idle} steps in a row every advantage, or the gradient, was 0. The reward is constant inside "
                "each group (solved, or out of reach), or failed (the metric reward_failed). Mix in a denser reward, sample harder "
                "prompts, or mend the judge."
            )
        if all_sum(float(self.stop_asked.is_set())) > 0:
            return STOPPED
        return None

    def run(self, after: Callable[[Metrics], str | None]) -> str:
        """Updates until finished; `after` is called with each step's metrics, and may answer why the run shall end there (the same on every
        rank). SIGTERM and SIGINT finish the current step first. Returns why it ended."""
        with self._signals():
            while (reason := self.finished()) is None:
                if (reason := after(self.update())) is not None:
                    break
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
        if self.stop_asked.is_set() and self.world.size == 1:  # torchrun passes on what every process has got already
            raise KeyboardInterrupt
        log.warning("%s: finishing this step, then saving", signal.Signals(number).name)
        self.stop_asked.set()


def ahead(pieces: Iterator[TrainBatch]) -> Iterator[TrainBatch]:
    """The same pieces in the same order, each made by another thread while the one before it is trained on: the weights do not move
    meanwhile, so the numbers are the same. On a CPU it keeps a second core busy; on a GPU the two threads share its queue."""
    with ThreadPoolExecutor(1, thread_name_prefix="draw") as drawer:
        coming = drawer.submit(next, pieces, None)
        while (piece := _result(coming)) is not None:
            coming = drawer.submit(next, pieces, None)
            yield piece


def _result(coming: Future[Any]) -> Any:
    """What comes of it. A signal may reach any thread, and is answered when this one wakes: so it does, every second."""
    while not wait([coming], timeout=1.0).done:
        pass
    return coming.result()


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

    def preview(self, rollout: Rollout, rng: Stream, steps: Tensor) -> Rollout:
        return self._timed("rollout", "preview", rollout, rng, steps)

    def decode(self, rollout: Rollout) -> Tensor:
        return self._timed("decode", "decode", rollout)

    def score(self, rollout: Rollout) -> Score:
        return self._timed("rollout", "score", rollout)


class TimedJudge:
    """The judge, with the time that the trainer had to wait for it."""

    def __init__(self, judge: Judge, clock: Clock) -> None:
        self._judge, self._clock = judge, clock

    def submit(self, images: Tensor, prompts: Sequence[Prompt], group: int | None = None) -> Any:
        return TimedFuture(self._judge.submit(images, prompts, group), self._clock)


class TimedFuture:
    def __init__(self, future, clock: Clock) -> None:
        self._future, self._clock = future, clock

    def result(self):
        with self._clock.phase("reward_wait"):
            return self._future.result()


class Tally:
    """What one step adds up, piece by piece."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(("judged", "failed", "taught", "tokens", "loss", "size"), 0.0)
        self.stage = "all"
        self._pictures = 0.0
        self._sums: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        """Of each metric: value times rows, and rows."""
        self._maxima: Metrics = {}

    def add_piece(self, piece: TrainBatch) -> None:
        """Once for each piece that was collected."""
        judged = piece.metrics.get("judged", len(piece))
        if judged:  # reused continuations follow the prefixes whose update it is
            self.stage = piece.stage
        self._pictures += len(piece)
        self.totals["judged"] += judged
        self.totals["failed"] += round(piece.metrics.get("reward_failed", 0.0) * judged)
        self.totals["taught"] += int((piece.advantage * piece.weight).abs().amax(1).gt(0).sum())
        self.totals["tokens"] += int((piece.kl_weight > 0).sum())
        self._add({**piece.metrics, "advantage_abs_mean": float(piece.advantage.abs().mean())}, len(piece))

    def add_objective(self, part: TrainBatch, objective: float, metrics: Metrics) -> None:
        """Once for each pass over a part of a piece."""
        self.totals["loss"] -= objective
        self.totals["size"] += float(part.size.sum())
        self._add(metrics, len(part))

    def _add(self, metrics: Mapping[str, float], rows: int) -> None:
        for name, value in metrics.items():
            if name.endswith("/max"):
                self._maxima[name] = max(self._maxima.get(name, value), value)
            elif name != "judged":
                total, count = self._sums[name]
                self._sums[name] = total + value * rows, count + rows

    def over_ranks(self) -> dict[str, float]:
        """The totals of all ranks."""
        return dict(zip(self.totals, all_sum(torch.tensor(list(self.totals.values()), dtype=torch.float64)).tolist(), strict=True))

    def means(self) -> Metrics:
        """Means over rows, and maxima, of all ranks."""
        here = {name: total / count for name, (total, count) in self._sums.items()}
        return gather_metrics({**here, **self._maxima}, self._pictures)


def memory_gb(device: torch.device) -> float:
    """Largest memory held so far, 10^9 bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held * (1 if sys.platform == "darwin" else 1024) / 1e9
