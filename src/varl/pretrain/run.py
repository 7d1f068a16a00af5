"""`varl pretrain`: a tokenizer and a transformer from scratch, or a transformer trained on. Own metrics; resumable like a run."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from varl.checkpoints import model as model_folder
from varl.checkpoints import run_state
from varl.config import FolderConfig, OptimConfig, PretrainConfig, WordsConfig
from varl.data.folder import load_images, read_folder
from varl.data.words import dataset, split, word_list
from varl.errors import ConfigError, NumericsError
from varl.models.next_scale import NextScale
from varl.policies.next_scale import model_ids
from varl.pretrain.next_scale import token_fit, token_loss
from varl.pretrain.tokenizer import CodeAverages, batch_index, start_codebook, tokenizer_loss
from varl.rng import generator
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.train.optim import build_optimizer, lr_at, set_lr
from varl.train.record import RunDirectory
from varl.types import Prompt

Tick = Callable[[dict[str, Any]], None]

CODEBOOK_PICTURES = 256
"""From whose residuals the codebook starts."""
HELDOUT_PICTURES = 256
LOG_EVERY = 25


@dataclass(slots=True)
class Done:
    """How far pre-training has come; saved with every checkpoint."""

    step: int = 0
    """Over both phases: tokenizer steps, then transformer steps."""
    cpu_seconds: float = 0.0
    """Of the transformer phase, over all interruptions."""


def pretrain(config: PretrainConfig, out: Path, tick: Tick = lambda metrics: None) -> Path:
    """The model folder, `out`/model. Goes on where it stopped if `out` holds a pre-training of the same config."""
    device = torch.device("cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu")
    run = RunDirectory(out, config)
    try:
        with seeded(config.seed):
            model, tokenizer = (
                start_from(config) if config.init else (NextScale(config.model), MultiScaleVQ(config.model.tokenizer, config.model.grids))
            )
        work = Work(config, run, model.to(device), tokenizer.to(device), tick)
        work.restore()
        if not config.init:
            work.train_tokenizer()
        work.train_transformer()
        return model_folder.save(out / "model", model, tokenizer, {"recipe": config.name, "seed": config.seed, **asdict(work.done)})
    finally:
        run.close()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fresh weights come from the global generator; it is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def start_from(config: PretrainConfig) -> tuple[NextScale, MultiScaleVQ]:
    assert config.init is not None
    model, tokenizer = model_folder.load(config.init)
    if model.config != config.model:
        raise ConfigError(f"init={config.init!r} holds a model of another config than `model`. Copy `model` from its config.yaml.")
    return model, tokenizer


def pictures(config: PretrainConfig) -> tuple[UInt8[Tensor, "N 3 H W"], list[Prompt], UInt8[Tensor, "n 3 H W"], list[Prompt]]:
    """Training and held-out pictures with their prompts. Words: training words only, and held-out words. A folder without another as
    `heldout` is held against its own first pictures."""
    match config.data:
        case WordsConfig():
            if config.data.image_size != config.model.image_size:
                raise ConfigError(
                    f"data.image_size={config.data.image_size}, but the model's grids and stride make {config.model.image_size} pixels. "
                    "Make them equal."
                )
            words = split(word_list(config.data), config.data)
            train = dataset(config.data, words.pretrain, config.pictures, config.data.seed)
            return *train, *dataset(config.data, words.heldout, HELDOUT_PICTURES, config.data.seed + 9)
        case FolderConfig():
            said = read_folder(Path(config.data.path))
            held = read_folder(Path(config.data.heldout)) if config.data.heldout else said[:HELDOUT_PICTURES]
            return load_images(said, config.model.image_size), said, load_images(held, config.model.image_size), held


def signed(images: UInt8[Tensor, "B 3 H W"], device: torch.device) -> Tensor:
    """Pixels in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def without_prompts(ids: Int[Tensor, "b ..."], config: PretrainConfig, step: int) -> Int[Tensor, "b ..."]:
    """A share `drop_prompt` of the prompts made empty, so that the model also learns guidance's "none"."""
    gone = torch.rand(len(ids), generator=generator(config.seed, "drop", step)) < config.drop_prompt
    empty = model_ids([Prompt()], config.model).to(ids.device)
    if ids.ndim == 2:
        empty = nn.functional.pad(empty, (0, ids.shape[1] - empty.shape[1]))
    return torch.where(gone.to(ids.device).view(-1, *[1] * (ids.ndim - 1)), empty, ids)


class Work:
    """Pre-training in memory."""

    def __init__(self, config: PretrainConfig, run: RunDirectory, model: NextScale, tokenizer: MultiScaleVQ, tick: Tick) -> None:
        self.config, self.run, self.model, self.tokenizer, self.tick = config, run, model, tokenizer, tick
        self.device = model.pos_start.device
        self.tokenizer_steps = 0 if config.init else config.tokenizer_steps
        self.images, self.prompts, self.held_images, self.held_prompts = pictures(config)
        for name, size in (("tokenizer_batch", config.tokenizer_batch), ("batch", config.batch)):
            if size > len(self.images):
                raise ConfigError(f"{name}={size}: there are {len(self.images)} training pictures. Set it to that or less, or give more.")
        if isinstance(config.data, FolderConfig) and not config.data.heldout:
            run.event("warning", "data.heldout is not set: pretrain/heldout_loss is that of training pictures.")
        self.done = Done()
        self.codes: CodeAverages | None = None
        convolutions = nn.ModuleDict({name: part for name, part in tokenizer.named_children() if name != "quantize"})
        convolutions["phi"] = tokenizer.quantize.quant_resi
        self.tokenizer_optim = OptimConfig(lr=config.tokenizer_lr, warmup_steps=20, schedule="linear")
        self.optimizers = {
            "tokenizer_optimizer": build_optimizer(convolutions, self.tokenizer_optim),
            "optimizer": build_optimizer(model, config.optim),
        }
        """The codebook is no parameter of the first: it moves by averages."""

    # -- going on ----------------------------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.run.path / "checkpoints"

    def save(self) -> None:
        if not all(bool(p.isfinite().all()) for p in (*self.model.parameters(), *self.tokenizer.parameters())):
            self._refuse("the weights are not finite")
        tensors: dict[str, Any] = {"model": self.model.state_dict(), "tokenizer": self.tokenizer.state_dict()}
        tensors |= {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if self.codes is not None:
            tensors["codes"] = {"count": self.codes.count, "total": self.codes.total}
        run_state.save(self.checkpoints, self.done.step, tensors, {"done": asdict(self.done)})

    def restore(self) -> None:
        state = run_state.load_latest(self.checkpoints)
        if state is not None:
            self.model.load_state_dict(state.tensors["model"])
            self.tokenizer.load_state_dict(state.tensors["tokenizer"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state.tensors[name])
            if "codes" in state.tensors:
                self.codes = CodeAverages(**{name: t.to(self.device) for name, t in state.tensors["codes"].items()})
            self.done = Done(**state.extra["done"])
        self.run.truncate(self.done.step)

    def _finish_step(self, metrics: Callable[[], dict[str, Any]], last: bool) -> None:
        self.done.step += 1
        if self.done.step % LOG_EVERY == 0 or last:
            values = metrics()
            if not math.isfinite(values["pretrain/loss"]):
                self._refuse(f"the loss is {values['pretrain/loss']}")
            self.run.write(self.done.step, values)
            self.tick({"step": self.done.step, **values})
        if self.done.step % self.config.save_every == 0 or last:
            self.save()

    def _refuse(self, what: str) -> NoReturn:
        raise NumericsError(f"pre-training step {self.done.step}: {what}. Lower the learning rate; the last checkpoint is whole.")

    # -- tokenizer ---------------------------------------------------------------------------------------------------------------------

    def train_tokenizer(self) -> None:
        """A plain autoencoder for the first `warmup_share`, then with its codebook."""
        config, vq, optimizer = self.config, self.tokenizer, self.optimizers["tokenizer_optimizer"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        warmup = round(config.warmup_share * config.tokenizer_steps)
        if warmup >= config.tokenizer_steps:
            raise ConfigError(
                f"warmup_share={config.warmup_share:g} leaves none of tokenizer_steps={config.tokenizer_steps} to train the codebook. "
                "Lower the share, or take more steps."
            )
        while self.done.step < config.tokenizer_steps:
            step = self.done.step
            rng = generator(config.seed, "codes", step)
            if step == warmup:
                with torch.no_grad():
                    self.codes = start_codebook(vq, vq.features(signed(self.images[:CODEBOOK_PICTURES], self.device)), rng)
            set_lr(optimizer, lr_at(step, config.tokenizer_steps, self.tokenizer_optim))
            batch = batch_index(len(self.images), config.tokenizer_batch, step, config.seed, "tokenizer")
            loss, error, ids, asked = tokenizer_loss(vq, signed(self.images[batch], self.device), step >= warmup)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            flat = None
            if ids is not None and asked is not None and self.codes is not None:
                flat = torch.cat([part.flatten() for part in vq.split(ids)])
                vq.quantize.embedding.weight.data.copy_(self.codes.update(torch.cat(asked), flat, rng))

            def metrics(loss=loss, error=error, flat=flat) -> dict[str, Any]:
                used = 1.0 if flat is None else len(flat.unique()) / config.model.tokenizer.vocab
                psnr = 10 * math.log10(4 / max(float(error.detach()), 1e-12))
                return {"stage": "tokenizer", "pretrain/loss": float(loss.detach()), "pretrain/psnr": psnr, "pretrain/code_usage": used}

            self._finish_step(metrics, step + 1 == config.tokenizer_steps)

    # -- transformer -------------------------------------------------------------------------------------------------------------------

    def train_transformer(self) -> None:
        config, optimizer = self.config, self.optimizers["optimizer"]
        self.tokenizer.requires_grad_(False)
        ids, text = self._tokens(self.images), model_ids(self.prompts, config.model).to(self.device)
        held_ids, held_text = self._tokens(self.held_images), model_ids(self.held_prompts, config.model).to(self.device)
        total = self.tokenizer_steps + config.steps
        while self.done.step < total and not self._spent():
            start, step = time.process_time(), self.done.step - self.tokenizer_steps
            set_lr(optimizer, self._factor(step))
            batch = batch_index(len(ids), config.batch, step, config.seed, "transformer")
            dropped = without_prompts(text[batch], config, step)
            with self._precision():
                with torch.no_grad():
                    inputs = self.tokenizer.inputs(ids[batch])
                losses, right = token_fit(self.model, dropped, inputs, ids[batch])
            loss = losses.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.max_grad_norm)
            optimizer.step()
            self.done.cpu_seconds += time.process_time() - start

            def metrics(loss=loss.detach(), right=right, norm=norm) -> dict[str, Any]:
                held = self._heldout(held_ids, held_text)
                fit = {"pretrain/perplexity": float(loss.exp()), "pretrain/accuracy": float(right.float().mean())}
                return {"stage": "transformer", "pretrain/loss": float(loss), **fit, "grad_norm": float(norm), **held}

            self._finish_step(metrics, self.done.step + 1 == total or self._spent())

    def _spent(self) -> bool:
        return bool(self.config.max_cpu_seconds) and self.done.cpu_seconds >= self.config.max_cpu_seconds

    def _factor(self, step: int) -> float:
        """Of the learning rates; where CPU time is the limit, the linear schedule runs over that."""
        config = self.config
        if config.max_cpu_seconds and config.optim.schedule == "linear":
            warm = min(1.0, (step + 1) / max(config.optim.warmup_steps, 1))
            return warm * max(0.0, 1 - self.done.cpu_seconds / config.max_cpu_seconds)
        return lr_at(step, config.steps, config.optim)

    @torch.no_grad()
    def _tokens(self, images: Tensor) -> Int[Tensor, "N L"]:
        return torch.cat([self.tokenizer.encode(signed(part, self.device)) for part in images.split(256)])

    @torch.no_grad()
    def _heldout(self, ids: Tensor, text: Tensor) -> dict[str, float]:
        losses = torch.cat(
            [token_loss(self.model, t, self.tokenizer.inputs(i), i) for i, t in zip(ids.split(64), text.split(64), strict=True)]
        )
        parts = {f"pretrain/heldout_loss_scale{s}": float(part.mean()) for s, part in enumerate(self.tokenizer.split(losses))}
        return {"pretrain/heldout_loss": float(losses.mean()), **parts}

    def _precision(self):
        bf16 = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
