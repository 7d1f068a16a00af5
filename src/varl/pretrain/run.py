"""`varl pretrain`: a tokenizer and a transformer from scratch, a transformer trained on, or a classifier. Own metrics; resumable like a
run."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, assert_never

import torch
from torch import nn

from varl.checkpoints import model as model_folder
from varl.checkpoints import run_state
from varl.checkpoints.model import OwnPair
from varl.config import ClassifierConfig, FolderConfig, PicturesConfig, PretrainConfig
from varl.errors import ConfigError, NumericsError
from varl.models.classifier import Classifier
from varl.models.infinity import Infinity
from varl.models.janus import Janus
from varl.models.mar import MAR
from varl.models.next_scale import NextScale
from varl.models.nova import NOVA
from varl.models.raster import Raster
from varl.policies.acting import CaptionEncoder
from varl.pretrain.classifier import ClassifierPhase
from varl.pretrain.data import Shown, pictures
from varl.pretrain.infinity import BitsPhase, CorrectingPhase, InfinityFamily
from varl.pretrain.masked import LatentsPhase, MaskedPhase
from varl.pretrain.next_scale import NextScaleFamily
from varl.pretrain.phase import Metrics, Phase
from varl.pretrain.pixel_loss import PixelLossPhase
from varl.pretrain.raster import RasterFamily
from varl.pretrain.tokenizer import TokenizerPhase
from varl.pretrain.transformer import TransformerPhase
from varl.tokenizers.bsq import BSQ
from varl.tokenizers.kl import KL
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.vq import VQ
from varl.train.optim import lr_at, set_lr
from varl.train.record import RunDirectory

Tick = Callable[[dict[str, Any]], None]

LOG_EVERY = 25
MODULES = ("model", "tokenizer")
"""Names of what is trained."""


@dataclass(slots=True)
class Done:
    """How far pre-training has come; saved with every checkpoint."""

    step: int = 0
    """Over all phases."""
    cpu_seconds: float = 0.0
    """Of the last phase, over all interruptions."""


def pretrain(config: PretrainConfig, out: Path, tick: Tick = lambda metrics: None, captions: CaptionEncoder | None = None) -> Path:
    """The model folder, `out`/model. Goes on where it stopped if `out` holds a pre-training of the same config. `captions` is for a model
    that reads them."""
    device = torch.device("cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu")
    run = RunDirectory(out, config)
    try:
        with seeded(config.seed):
            modules = start(config)
        for module in modules:
            module.to(device)
        shown = demand_batches(config, pictures(config))
        data = config.data
        if isinstance(data, FolderConfig | PicturesConfig) and not data.heldout:
            run.event("warning", "data.heldout is not set: pretrain/heldout_loss is that of training pictures.")
        work = Work(config, run, modules, phases(config, modules, shown, device, captions), tick)
        work.restore()
        work.train()
        notes = {"recipe": config.name, "seed": config.seed, **asdict(work.done)}
        match modules:
            case (Classifier() as classifier,):
                return model_folder.save_classifier(out / "model", classifier, notes)
            case (model, tokenizer):
                return model_folder.save(out / "model", model, tokenizer, notes)
        assert_never(modules)
    finally:
        run.close()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fresh weights come from the global generator; it is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def start(config: PretrainConfig) -> OwnPair | tuple[Classifier]:
    """What is trained: fresh, or from `init`."""
    if isinstance(config.model, ClassifierConfig):
        return (Classifier(config.model),)
    if config.init is None:
        return model_folder.fresh(config.model)
    pair = model_folder.load(model_folder.model_path(config.init))
    match pair:
        case (NextScale() | Infinity() | Raster() | MAR() as model, _) if model.config == config.model:
            return pair
    raise ConfigError(f"init={config.init!r} holds a model of another config than `model`. Copy `model` from its config.yaml.")


def phases(
    config: PretrainConfig, modules: OwnPair | tuple[Classifier], shown: Shown, device: torch.device, captions: CaptionEncoder | None
) -> list[Phase]:
    """What is done with the modules, in order."""
    match modules:
        case (Classifier() as classifier,):
            return [ClassifierPhase(config, classifier, shown, device)]
        case (NextScale() as model, MultiScaleVQ() as tokenizer):
            family = NextScaleFamily(model, tokenizer)
        case (Raster() as model, VQ() as tokenizer):
            family = RasterFamily(model, tokenizer, captions)
        case (Janus(), VQ()):
            raise ConfigError(f"init={config.init!r}: holds a Janus-Pro, which is not trained on here. Post-train it with `varl train`.")
        case (Infinity() as model, BSQ() as bsq):
            bits: list[Phase] = [BitsPhase(config, bsq, shown, device)] if config.trains_tokenizer else []
            return [*bits, CorrectingPhase(config, InfinityFamily(model, bsq, captions), shown, device)]
        case (NOVA(), KL()):
            raise ConfigError(f"init={config.init!r}: holds a NOVA, which is not trained on here. Post-train it with `varl train`.")
        case (MAR() as model, KL() as kl):
            before: list[Phase] = [LatentsPhase(config, kl, shown, device)] if config.trains_tokenizer else []
            return [*before, MaskedPhase(config, model, kl, shown, device)]
        case _:
            assert_never(modules)
    if config.pixel_loss is not None and isinstance(family, RasterFamily):
        return [PixelLossPhase(config, family, shown, device)]
    first: list[Phase] = [TokenizerPhase(config, family, shown, device)] if config.trains_tokenizer else []
    return [*first, TransformerPhase(config, family, shown, device)]


def demand_batches(config: PretrainConfig, shown: Shown) -> Shown:
    """`shown`, if there is a batch in it."""
    sizes = {"tokenizer_batch": config.tokenizer_batch} if config.trains_tokenizer else {}
    for name, size in {**sizes, "batch": config.batch}.items():
        if size > len(shown.images):
            raise ConfigError(f"{name}={size}: there are {len(shown.images)} training pictures. Set it to that or less, or give more.")
    return shown


class Work:
    """Pre-training in memory: `phases` one after the other, and the `modules` that they train."""

    def __init__(
        self, config: PretrainConfig, run: RunDirectory, modules: Sequence[nn.Module], phases: Sequence[Phase], tick: Tick
    ) -> None:
        self.config, self.run, self.modules, self.phases, self.tick = config, run, modules, phases, tick
        self.done = Done()

    def train(self) -> None:
        first = 0
        for phase in self.phases:
            self._train(phase, first)
            first += phase.steps

    def _train(self, phase: Phase, first: int) -> None:
        limit = self.config.max_cpu_seconds if phase is self.phases[-1] else 0.0
        begun = False
        while (step := self.done.step - first) < phase.steps and not self._spent(limit):
            if not begun:
                phase.begin()
                begun = True
            start = time.process_time()
            set_lr(phase.optimizer, self._factor(phase, step, limit))
            metrics = phase.step(step)
            if phase is self.phases[-1]:
                self.done.cpu_seconds += time.process_time() - start
            self._finish_step(phase.stage, metrics, step + 1 == phase.steps or self._spent(limit))

    def _spent(self, limit: float) -> bool:
        return bool(limit) and self.done.cpu_seconds >= limit

    def _factor(self, phase: Phase, step: int, limit: float) -> float:
        """Of the learning rates; where CPU time is the limit, the linear schedule runs over that."""
        if limit and phase.optim.schedule == "linear":
            warm = min(1.0, (step + 1) / max(phase.optim.warmup_steps, 1))
            return warm * max(0.0, 1 - self.done.cpu_seconds / limit)
        return lr_at(step, phase.steps, phase.optim)

    def _finish_step(self, stage: str, metrics: Metrics, last: bool) -> None:
        self.done.step += 1
        if self.done.step % LOG_EVERY == 0 or last:
            values = metrics()
            if not math.isfinite(values["pretrain/loss"]):
                self._refuse(f"the loss is {values['pretrain/loss']}")
            self.run.write(self.done.step, {"stage": stage, **values})
            self.tick({"step": self.done.step, "stage": stage, **values})
        if self.done.step % self.config.save_every == 0 or last:
            self.save()

    def _refuse(self, what: str) -> NoReturn:
        raise NumericsError(f"pre-training step {self.done.step}: {what}. Lower the learning rate; the last checkpoint is whole.")

    # -- going on ----------------------------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.run.path / "checkpoints"

    def save(self) -> None:
        if not all(bool(p.isfinite().all()) for module in self.modules for p in module.parameters()):
            self._refuse("the weights are not finite")
        tensors: dict[str, Any] = {name: module.state_dict() for name, module in zip(MODULES, self.modules, strict=False)}
        for phase in self.phases:
            tensors[f"{phase.stage}_optimizer"], tensors[f"{phase.stage}_state"] = phase.optimizer.state_dict(), phase.state()
        run_state.save(self.checkpoints, self.done.step, tensors, {"done": asdict(self.done)})

    def restore(self) -> None:
        state = run_state.load_latest(self.checkpoints)
        if state is not None:
            for name, module in zip(MODULES, self.modules, strict=False):
                module.load_state_dict(state.tensors[name])
            for phase in self.phases:
                phase.optimizer.load_state_dict(state.tensors[f"{phase.stage}_optimizer"])
                phase.restore(state.tensors[f"{phase.stage}_state"])
            self.done = Done(**state.extra["done"])
        self.run.truncate(self.done.step)
