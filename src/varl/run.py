"""A post-training run, from config to run directory: resume, train, look, save."""

import copy
import json
import logging
import math
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from varl.algorithms.mixing import RunningScale
from varl.algorithms.panw import panw_weights
from varl.build import (
    PromptSets,
    build_algorithm,
    build_judge,
    build_policy,
    build_prompts,
    build_sampler,
    demand_pictures,
    demand_texts,
    needs_reference,
)
from varl.checkpoints import adapter, hugging_face, run_state
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import replace_file
from varl.checkpoints.model import model_path
from varl.checkpoints.vision import files_of
from varl.config import PICTURE_MEASURES, LoraConfig, NetworkRewardConfig, RunConfig, VAPIConfig, VARRLConfig
from varl.distributed import mesh
from varl.distributed.reduce import all_sum
from varl.errors import CheckpointError, ConfigError
from varl.eval.pictures import teacher_forced_metrics
from varl.eval.words import draw_sample, reading_metrics, token_diversity
from varl.models.lora import chosen, merge, require_peft
from varl.models.masked import MaskedModel
from varl.plan.missing import pair_of
from varl.rng import Stream
from varl.train.loop import STOPPED, Metrics, Progress, Trainer
from varl.train.monitor import Monitor
from varl.train.record import RunDirectory, save_picture
from varl.train.weights import fill, trained
from varl.types import WATCHED, Judge, Judgement, Policy, Prompt, TeacherForcedPolicy, TrainBatch

log = logging.getLogger("varl")

Tick = Callable[[Metrics], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    reason: str
    model: Path
    """The trained model, as a model folder."""
    done: bool
    """False where it was asked to stop, and the same command goes on."""
    progress: Progress


def _no_tick(metrics: Metrics) -> None: ...


def train(config: RunConfig, out: Path, tick: Tick = _no_tick, *, processes: int = 1) -> Outcome:
    """Trains until one of the config's stop conditions; goes on where it stopped if `out` holds a run of the same config. The prompts of a
    step are shared among `processes` of this machine; under torchrun every process calls it. The first one writes."""
    with mesh.side_by_side(processes, partial(_train, config, out, _no_tick)) as seat:
        return _train(config, out, tick, seat)


def _train(config: RunConfig, out: Path, tick: Tick, seat: mesh.Seat) -> Outcome:
    with ExitStack() as at_end:
        world = mesh.join(config.train.device, seat)
        at_end.callback(mesh.leave)
        prompts = build_prompts(config.data, config.seed, config.eval.samples)
        check(config, out, prompts, world)
        run = RunDirectory(out, config, writer=world.first)
        at_end.callback(run.close)
        built = build_policy(config, world.device, reference=needs_reference(config.algorithm))
        policy = cast(Policy, built)
        algorithm = build_algorithm(config.algorithm, policy, prompts.pictures)
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        judge = build_judge(config, prompts.pictures, monitor=True)
        at_end.callback(judge.close)
        trainer = Trainer(
            config.train,
            seed=config.seed,
            policy=policy,
            algorithm=algorithm,
            judge=judge,
            prompts=build_sampler(prompts.train, config, world.rank, world.size),
            world=world,
            failures=out / "failures",
        )
        checkpoints = out / "checkpoints"
        monitor = Monitor(config.monitor, watched(config))
        learners: Learners = {"monitor": monitor}
        if isinstance(judge.prepare, RunningScale):
            learners["mixing"] = judge.prepare
        base = hugging_face.identity(model_path(config.model))
        restore(trainer, run, checkpoints, learners, base)
        begun = trainer.progress.step
        watch = Watch(config, policy, judge, prompts, run, trainer)
        if run.writer and config.train.image_every and trainer.progress.step == 0:
            watch.show(0)

        def stop() -> str | None:
            return f"alarm: {monitor.alarm}" if monitor.alarm and config.monitor.on_alarm == "stop" else None

        def after(metrics: Metrics) -> str | None:
            step = trainer.progress.step
            found = [learner.update(metrics) or {} for learner in learners.values()]
            if run.writer:
                metrics = {name: value for part in (metrics, *found, watch.after(step)) for name, value in part.items()}
                run.write(step, metrics)
                if metrics.get("monitor/alarm"):
                    log.warning("alarm: %s", monitor.alarm)
                    run.event("alarm", str(monitor.alarm))
                if step % config.train.save_every == 0:
                    save(trainer, checkpoints, config.train.keep, learners, base)
            mesh.barrier()
            tick(metrics)
            return stop()

        reason = stop() or trainer.run(after)
        judge.close()
        if trainer.progress.step > begun:  # what the reader processes spent is known once they have ended
            trainer.progress.cpu_seconds += all_sum(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - children).item()
        if run.writer:
            run.event("stop", reason)
            save(trainer, checkpoints, config.train.keep, learners, base)
            with trainer.ema.swapped(policy.module) if trainer.ema else nullcontext():
                if config.train.lora is not None:
                    adapter.save(out / "adapter", policy.module, config.train.lora, base=config.model)
                    merge(policy.module)
                model_folder.save(out / "model", built.module, built.tokenizer, notes(trainer, config))
        return Outcome(reason=reason, model=out / "model", done=reason != STOPPED, progress=trainer.progress)


def check(config: RunConfig, out: Path, prompts: PromptSets, world: mesh.World) -> None:
    """What cannot work, said before any weight is loaded."""
    if (out / "model").resolve() == Path(config.model).resolve():
        raise ConfigError(f"model={config.model!r}: the trained model of a run in {out} would replace it. Give another --out.")
    if world.size > 1 and isinstance(config.algorithm, VARRLConfig) and config.algorithm.adapt_middle_step:
        raise ConfigError("var_rl.adapt_middle_step: each process would move its own middle step. Run it in one process.")
    if config.train.prompts_per_step < world.size:
        raise ConfigError(
            f"train.prompts_per_step={config.train.prompts_per_step}: {world.size} processes would share them, and a process without a "
            f"prompt has nothing to do. Set it to {world.size} or more, or start fewer processes."
        )
    if config.train.lora is not None:
        require_adaptable(config.model, config.train.lora)
    for place, reward in config.asked.items():
        demand_texts(place, reward, [*prompts.train, *prompts.heldout])
        if isinstance(reward, NetworkRewardConfig):
            files_of(reward)
    if config.eval.every and not prompts.heldout:
        raise ConfigError(
            f"eval.every={config.eval.every}, but the data holds no prompts for evaluation. Set data.heldout, or eval.every=0."
        )


def require_adaptable(name: str, config: LoraConfig) -> None:
    """ConfigError where peft is missing, or the adapters do not fit the model, of which no weight is loaded."""
    require_peft()
    model = pair_of(name)[0]
    if isinstance(model, MaskedModel):
        model.head.requires_grad_(False)
    chosen(model, config)


def watched(config: RunConfig) -> dict[str, float]:
    """What no reward pays for, each metric with the share of its first level that it may lose: what the monitor measures, and rewards of
    weight 0."""
    measures = {f"{WATCHED}{name}": config.monitor.may_lose for name in PICTURE_MEASURES}
    held_out = [f"{WATCHED}{name}" for name in config.monitor.held_out]
    return {
        **measures,
        **dict.fromkeys([*held_out, *(f"rewards/{name}/mean" for name, part in config.rewards.items() if not part.weight)], 0.0),
    }


# ---- saving and going on ----------------------------------------------------------------------------------------------------------------


@runtime_checkable
class Learner(Protocol):
    """What learns from the metrics of every step, and may add to them."""

    def update(self, metrics: Metrics) -> Metrics | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Learners = dict[str, Learner]


def save(trainer: Trainer, checkpoints: Path, keep: int, learners: Learners, base: str) -> None:
    """All that makes the rest of the run bit-identical to one that was never interrupted, but what is not trained: that is the model's that
    the run began with, which `base` identifies."""
    tensors: dict[str, Any] = {"model": trained(trainer.policy.module), "optimizer": trainer.optimizer.state_dict()}
    if trainer.ema is not None:
        tensors["ema"] = trainer.ema.state_dict()
    controller = getattr(trainer.algorithm, "state_dict", dict)()
    learned = {name: learner.state_dict() for name, learner in learners.items()}
    plain = {"progress": asdict(trainer.progress), "algorithm": controller, "learners": learned, "base": base}
    run_state.save(checkpoints, trainer.progress.step, tensors, plain, keep)


def restore(trainer: Trainer, run: RunDirectory, checkpoints: Path, learners: Learners, base: str) -> None:
    """Goes on from the newest whole checkpoint, if there is one; what was logged after it is cut off, for it will happen again.
    CheckpointError where the model that the run began with is not `base`."""
    state = run_state.load_latest(checkpoints)
    if state is not None:
        if state.extra.get("base") != base:
            raise CheckpointError(
                f"{state.path}: the run began with another model than is now where the config's `model` says, or with a VARL that did not "
                "note it; what a run does not train is taken from there. Put the old one back, or start afresh with another --out."
            )
        fill(trained(trainer.policy.module), state.tensors["model"])
        trainer.optimizer.load_state_dict(state.tensors["optimizer"])
        if trainer.ema is not None:
            trainer.ema.load_state_dict(state.tensors["ema"])
        trainer.progress = Progress(**state.extra["progress"])
        if state.extra["algorithm"]:
            trainer.algorithm.load_state_dict(state.extra["algorithm"])  # type: ignore[attr-defined]
        for name, learner in learners.items():
            learner.load_state_dict(state.extra["learners"][name])
    run.truncate(trainer.progress.step)
    if state is not None:
        for name in state.refused:
            run.event("checkpoint refused", name)
        run.event("resume", f"from {state.path.name}")


def notes(trainer: Trainer, config: RunConfig) -> dict[str, Any]:
    return {"recipe": config.name, "base": config.model, "seed": config.seed, **asdict(trainer.progress)}


# ---- looking ----------------------------------------------------------------------------------------------------------------------------


class Watch:
    """Held-out evaluation and pictures at fixed prompts and seeds, while training goes on."""

    def __init__(self, config: RunConfig, policy: Policy, judge: Judge, prompts: PromptSets, run: RunDirectory, trainer: Trainer) -> None:
        self.config, self.policy, self.judge, self.prompts, self.run, self.trainer = config, policy, judge, prompts, run, trainer

    def after(self, step: int) -> Metrics:
        if self.config.train.image_every and step % self.config.train.image_every == 0:
            self.show(step)
        every = self.config.eval.every
        return self.evaluate() if every and step % every == 0 else {}

    def evaluate(self) -> Metrics:
        """Of draws in the context of held-out pictures where the run learns from such draws, else of pictures drawn from nothing."""
        c = self.config.eval
        if isinstance(self.config.algorithm, VAPIConfig):
            teacher, pictures = cast(TeacherForcedPolicy, self.policy), demand_pictures("va_pi", self.prompts.pictures)
            found = teacher_forced_metrics(teacher, self.prompts.heldout, pictures, self.judge, seed=c.seed, batch=c.batch)
            return {f"eval/{name}": value for name, value in found.items()}
        sample = draw_sample(self.policy, self.prompts.heldout, copies=2, seed=c.seed, batch=c.batch)
        judgement = self.judge.submit(sample.images, sample.prompts, sample.copies).result()
        unpaid = {name: float(part.nanmean()) for name, part in judgement.parts.items() if name.startswith(WATCHED)}
        parts = {name.rpartition("/")[2]: part for name, part in judgement.parts.items() if name not in unpaid}
        reads = "word_accuracy" in parts
        readings = reading_metrics(parts, 2) if reads else {"reward": float(judgement.value.nanmean())}
        found = {**readings, "token_diversity": token_diversity(sample.tokens, 2), **unpaid}
        return {f"eval/{name}": value for name, value in found.items()}

    def show(self, step: int) -> None:
        """One picture per fixed prompt, what was read in it, and the credit that the algorithm would give its tokens."""
        fixed = list(self.prompts.fixed)
        rng = Stream(seed=self.config.eval.seed, path=("show",), rows=tuple(range(len(fixed))))
        algorithm = copy.deepcopy(self.trainer.algorithm)  # what it learns from these pictures is no part of the run
        shown = Shown(self.judge)
        pieces = list(algorithm.collect(self.policy, fixed, shown, rng, step))
        pieces = [piece for piece in pieces if piece.stage == pieces[0].stage]
        folder = self.run.path / "pictures" / f"step-{step:06d}"
        ends = [0, *accumulate(h * w for h, w in self.policy.layout.grids)]
        group = sum(len(piece) for piece in pieces) // len(fixed)
        read: list[dict[str, Any]] = []
        grid: list[Tensor] = []
        for images, piece in zip(shown.images, pieces, strict=True):
            for row in range(0, len(piece), group):
                drawn = images[row * len(images) // len(piece) : (row + group) * len(images) // len(piece)].cpu()
                grid.append(drawn[0])
                save_picture(folder / f"{len(read):02d}.png", grid[-1])
                read.append(told(piece, row, ends))
                if isinstance(self.config.algorithm, VAPIConfig):
                    read[-1]["draws"] = self._draws(folder, len(read) - 1, drawn, piece, row)
        replace_file(folder / "read.json", json.dumps(read).encode())
        self.run.images(step, torch.stack(grid), [prompt.text or str(prompt.label) for prompt in fixed])
        self._index(step)

    def _draws(self, folder: Path, number: int, drawn: Tensor, piece: TrainBatch, row: int) -> list[dict[str, Any]]:
        """What read.json holds of a picture's draws; they are saved as NN-0.png, NN-1.png, ..., the real picture as NN-real.png."""
        real = demand_pictures("va_pi", self.prompts.pictures)([self.prompts.fixed[number]])
        save_picture(folder / f"{number:02d}-real.png", real[0])
        told = []
        for k, image in enumerate(drawn):
            save_picture(folder / f"{number:02d}-{k}.png", image)
            parts = {name: finite(part[row + k]) for name, part in piece.judgement.parts.items() if not name.startswith(WATCHED)}
            told.append({"reward": finite(piece.judgement.value[row + k]), "parts": parts, "advantage": float(piece.advantage[row + k, 0])})
        return told

    def _index(self, step: int) -> None:
        file = self.run.path / "pictures" / "index.json"
        steps = json.loads(file.read_text())["steps"] if file.exists() else []
        grpo = self.config.algorithm.grpo
        sizes = [h * w for h, w in self.policy.layout.grids]
        weights = panw_weights(torch.tensor([sizes], dtype=torch.float32), grpo.panw_alpha)[0].tolist()
        index = {
            "grids": self.policy.layout.grids,
            "panw_alpha": grpo.panw_alpha,
            "panw_weights": weights,
            "prompts": [{"text": p.text, "words": p.words, "style": p.style} for p in self.prompts.fixed],
            "steps": sorted({*(s for s in steps if s < step), step}),
        }
        replace_file(file, json.dumps(index).encode())


class Shown:
    """A judge that keeps what it was shown."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.images = judge, list[Tensor]()

    def submit(self, images: Tensor, prompts: Sequence[Prompt], group: int | None = None) -> Future[Judgement]:
        self.images.append(images)
        return self.judge.submit(images, prompts, group)


def finite(value: Tensor) -> float | None:
    """None where a judgement failed."""
    return None if math.isnan(value) else float(value)


def told(batch: TrainBatch, row: int, ends: Sequence[int]) -> dict[str, Any]:
    """What read.json holds of one picture: reward, readings, and per grid the mask and advantage of each token. Of one drawn by chains also
    the `weight` of each token's path and the `step` that settled it; `at`, where it is learned from as it stood at that step; and all that
    the algorithm has `shown`."""
    j, chain = batch.judgement, batch.rollout.chain
    there = batch.advantage.shape[1]

    def per_grid(values: Tensor) -> list[list[float]]:
        return [[float(f"{x:.4g}") for x in values[row, a:b].tolist()] for a, b in pairwise(ends) if b <= there]

    found = j.found[row] if j.found is not None else ()
    out: dict[str, Any] = {
        "reward": finite(j.value[row]),
        "found": [{"text": f.text, "confidence": f.confidence, "box": f.box} for f in found],
        "mask": per_grid((batch.weight > 0).float()),
        "advantage": per_grid(batch.advantage),
    }
    if chain is not None:
        settled = batch.rollout.step if chain.settled is None else chain.settled
        out |= {"weight": per_grid(batch.weight), "step": per_grid(settled)}
        out |= {} if chain.settled is None else {"at": int(batch.rollout.step[row, 0])}
    return out | {name: per_grid(values) for name, values in batch.shown.items()}
