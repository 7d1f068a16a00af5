"""A transformer from scratch, or trained on: cross-entropy of the pictures' own tokens."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from varl.config import PretrainConfig
from varl.pretrain.data import Shown, batch_index, signed
from varl.pretrain.family import Family, Fit
from varl.pretrain.phase import Metrics, Stateless, descend
from varl.rng import generator
from varl.train.optim import build_optimizer


class TransformerPhase(Stateless):
    stage = "transformer"

    def __init__(self, config: PretrainConfig, family: Family, shown: Shown, device: torch.device) -> None:
        self.config, self.family, self.shown, self.device = config, family, shown, device
        self.steps, self.optim = config.steps, config.optim
        self.optimizer = build_optimizer(family.model, config.optim)
        self.said, self.held_said = (family.read(prompts) for prompts in (shown.prompts, shown.held_prompts))

    def begin(self) -> None:
        self.family.tokenizer.requires_grad_(False)
        self.known = known(self.family, self.shown.images, self.said, self.device)
        self.held = known(self.family, self.shown.held_images, self.held_said, self.device)

    def step(self, step: int) -> Metrics:
        config = self.config
        batch = batch_index(len(self.known.kept), config.batch, step, config.seed, "transformer")
        said = self.known.said[batch]
        said = without_prompts(said, self.family.nothing(said), config, step)
        with precision(config, self.device):
            losses, right = self.fit(said, batch, step)
        loss = losses.mean()
        norm = descend(self, loss, self.family.model.parameters())

        def metrics(loss=loss.detach()) -> dict[str, Any]:
            fit = {"pretrain/perplexity": float(loss.exp()), "pretrain/accuracy": float(right.float().mean())}
            return {"pretrain/loss": float(loss), **fit, "grad_norm": float(norm), **self._heldout()}

        return metrics

    def fit(self, said: Int[Tensor, "b ..."], batch: Int[Tensor, " b"], step: int) -> Fit:
        """Of the pictures in those rows."""
        return self.family.fit(said, self.known.kept[batch])

    @torch.no_grad()
    def _heldout(self) -> dict[str, float]:
        pieces = zip(self.held.said.split(64), self.held.kept.split(64), strict=True)
        losses = torch.cat([self.family.fit(said, kept)[0] for said, kept in pieces])
        parts = {f"pretrain/heldout_loss_{name}": value for name, value in self.family.parts(losses).items()}
        return {"pretrain/heldout_loss": float(losses.mean()), **parts}


class Known(NamedTuple):
    """What is kept of pictures (`Family.keep`), and what was said of them."""

    kept: Shaped[Tensor, "N ..."]
    said: Int[Tensor, "N ..."]


@torch.no_grad()
def known(family: Family, images: UInt8[Tensor, "N 3 H W"], said: Int[Tensor, "N ..."], device: torch.device) -> Known:
    kept = torch.cat([family.keep(signed(part, device)) for part in images.split(256)])
    return Known(kept, said.to(device))


def without_prompts(said: Int[Tensor, "b ..."], nothing: Int[Tensor, "..."], config: PretrainConfig, step: int) -> Int[Tensor, "b ..."]:
    """A share `drop_prompt` of the prompts made empty, the row `nothing`, so that the model also learns guidance's "none"."""
    gone = torch.rand(len(said), generator=generator(config.seed, "drop", step)) < config.drop_prompt
    return torch.where(gone.to(said.device).view(-1, *[1] * (said.ndim - 1)), nothing.to(said.device), said)


def precision(config: PretrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")
