"""A tokenizer from scratch: first a plain autoencoder, then a codebook started from its real features and kept by moving averages."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varl.config import NextScaleConfig, OptimConfig, PretrainConfig, RasterConfig
from varl.errors import ConfigError
from varl.pretrain.codebook import CodeAverages
from varl.pretrain.data import Shown, batch_index, psnr, signed
from varl.pretrain.family import CodebookFamily
from varl.pretrain.phase import Metrics, descend
from varl.rng import generator
from varl.train.optim import build_optimizer

CODEBOOK_PICTURES = 256
"""From whose features the codebook starts."""


class TokenizerPhase:
    stage = "tokenizer"

    def __init__(self, config: PretrainConfig, family: CodebookFamily, shown: Shown, device: torch.device) -> None:
        assert isinstance(config.model, NextScaleConfig | RasterConfig)
        self.config, self.family, self.images, self.device = config, family, shown.images, device
        self.vocab = config.model.tokenizer.vocab
        self.steps = config.tokenizer_steps
        self.optim = OptimConfig(lr=config.tokenizer_lr, warmup_steps=20, schedule="linear")
        self.optimizer = build_optimizer(family.convolutions(), self.optim)
        self.warmup = round(config.warmup_share * config.tokenizer_steps)
        self.codes: CodeAverages | None = None
        if self.warmup >= config.tokenizer_steps:
            raise ConfigError(
                f"warmup_share={config.warmup_share:g} leaves none of tokenizer_steps={config.tokenizer_steps} to train the codebook. "
                "Lower the share, or take more steps."
            )

    def begin(self) -> None:
        pass

    def step(self, step: int) -> Metrics:
        config, rng = self.config, generator(self.config.seed, "codes", step)
        if step == self.warmup:
            with torch.no_grad():
                self.family.start_codebook(signed(self.images[:CODEBOOK_PICTURES], self.device), rng)
            self.codes = CodeAverages.start(self.family.codebook.weight.data)
        images = signed(self.images[batch_index(len(self.images), config.tokenizer_batch, step, config.seed, "tokenizer")], self.device)
        if self.codes is None:
            (reconstruction, extra), ids, asked = self.family.autoencode(images), None, []
        else:
            reconstruction, extra, ids, asked = self.family.tokenizer(images)
        error = F.mse_loss(reconstruction, images)
        loss = error + extra
        descend(self, loss, [p for group in self.optimizer.param_groups for p in group["params"]])
        uses = None
        if ids is not None and self.codes is not None:
            uses = self.family.uses(ids)
            self.family.codebook.weight.data.copy_(self.codes.update(torch.cat(asked), uses, rng))

        def metrics(loss=loss.detach(), error=error.detach()) -> dict[str, Any]:
            used = 1.0 if uses is None else len(uses.unique()) / self.vocab
            return {"pretrain/loss": float(loss), "pretrain/psnr": psnr(float(error)), "pretrain/code_usage": used}

        return metrics

    def state(self) -> dict[str, Tensor]:
        return {} if self.codes is None else {"count": self.codes.count, "total": self.codes.total}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.codes = CodeAverages(**{name: tensor.to(self.device) for name, tensor in state.items()}) if state else None
