"""What phases that train an autoencoder without a codebook do alike."""

from typing import ClassVar

import torch
from torch import nn

from varl.config import OptimConfig, PretrainConfig
from varl.errors import ConfigError
from varl.pretrain.data import Shown
from varl.pretrain.phase import Stateless
from varl.train.optim import build_optimizer


class AutoencoderPhase(Stateless):
    stage = "tokenizer"
    latents: ClassVar[str]
    """What its codes are called."""

    def __init__(self, config: PretrainConfig, autoencoder: nn.Module, shown: Shown, device: torch.device) -> None:
        self.config, self.images, self.device = config, shown.images, device
        self.steps = config.tokenizer_steps
        self.optim = OptimConfig(lr=config.tokenizer_lr, warmup_steps=20, schedule="linear")
        self.optimizer = build_optimizer(autoencoder, self.optim)
        if self.steps < 1:
            raise ConfigError(
                f"tokenizer_steps={self.steps}: the {self.latents} of an untrained autoencoder say nothing of a picture. Take more steps, "
                "or set init to a model whose autoencoder is trained."
            )

    def begin(self) -> None:
        pass
