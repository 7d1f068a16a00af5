"""A classifier from scratch: cross-entropy of the pictures' labels."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from varl.config import PretrainConfig
from varl.errors import DataError
from varl.models.classifier import Classifier
from varl.pretrain.data import Shown, batch_index
from varl.pretrain.phase import Metrics, Stateless, descend
from varl.train.optim import build_optimizer
from varl.types import Prompt


class ClassifierPhase(Stateless):
    stage = "classifier"

    def __init__(self, config: PretrainConfig, classifier: Classifier, shown: Shown, device: torch.device) -> None:
        self.config, self.classifier, self.shown, self.device = config, classifier, shown, device
        self.steps, self.optim = config.steps, config.optim
        self.optimizer = build_optimizer(classifier, config.optim)
        self.labels, self.held_labels = (
            labels_of(said, classifier.config.num_classes).to(device) for said in (shown.prompts, shown.held_prompts)
        )

    def begin(self) -> None:
        pass

    def step(self, step: int) -> Metrics:
        config = self.config
        batch = batch_index(len(self.labels), config.batch, step, config.seed, "classifier")
        labels = self.labels[batch]
        logp = self._logp(self.shown.images[batch])
        loss = F.nll_loss(logp, labels)
        norm = descend(self, loss, self.classifier.parameters())

        def metrics(loss=loss.detach()) -> dict[str, Any]:
            right = float((logp.argmax(1) == labels).float().mean())
            return {"pretrain/loss": float(loss), "pretrain/accuracy": right, "grad_norm": float(norm), **self._heldout()}

        return metrics

    def _logp(self, images: Tensor) -> Float[Tensor, "b K"]:
        return self.classifier.classify(self.classifier(images.to(self.device).float() / 255))

    @torch.no_grad()
    def _heldout(self) -> dict[str, float]:
        logp = torch.cat([self._logp(part) for part in self.shown.held_images.split(64)])
        right = float((logp.argmax(1) == self.held_labels).float().mean())
        return {"pretrain/heldout_loss": float(F.nll_loss(logp, self.held_labels)), "pretrain/heldout_accuracy": right}


def labels_of(prompts: Sequence[Prompt], classes: int) -> Int[Tensor, " N"]:
    """Of the prompts; a DataError names the first that has none, or one that the classifier does not know."""
    for prompt in prompts:
        if prompt.label is None or not 0 <= prompt.label < classes:
            what = f"prompt {prompt.text!r}, picture {prompt.image}"
            raise DataError(f"{what}: label {prompt.label}, must be 0 to {classes - 1}. Label every picture, or set model.num_classes.")
    return torch.tensor([prompt.label for prompt in prompts])
