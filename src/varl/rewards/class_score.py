"""A classifier as a reward."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from varl.errors import RewardError
from varl.models.classifier import Classifier
from varl.types import Judgement, Prompt


class ClassScore:
    """A RewardFn: log-probability of the prompt's class, in nats, and at least `floor`. Parts: `log_probability` (the value) and
    `class_accuracy` (1 where no other class is more probable)."""

    def __init__(self, classifier: Classifier, floor: float) -> None:
        self.classifier, self.floor = classifier, floor

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Judgement:
        config = self.classifier.config
        if tuple(images.shape[2:]) != config.image_size:
            got, want = ("x".join(map(str, size)) for size in (images.shape[2:], config.image_size))
            raise RewardError(f"pictures of {got} pixels: the classifier was trained on {want}. Give one of the model's size.")
        for prompt in prompts:
            if prompt.label is None or not 0 <= prompt.label < config.num_classes:
                raise RewardError(f"prompt {prompt.text!r} has label {prompt.label}: the classifier knows 0 to {config.num_classes - 1}.")
        classifier = self.classifier.to(images.device)
        logp = classifier.classify(classifier(images.float())).cpu()
        label = torch.tensor([prompt.label for prompt in prompts])
        value = logp.gather(1, label[:, None]).squeeze(1).clamp(min=self.floor)
        return Judgement(value=value, parts={"log_probability": value, "class_accuracy": (logp.argmax(1) == label).float()})
