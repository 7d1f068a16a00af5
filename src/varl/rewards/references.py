"""The pictures that prompts name, to compare with, and what was made of them."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from varl.errors import DataError, RewardError
from varl.types import Prompt

log = logging.getLogger(__name__)

Seen = TypeVar("Seen")


class References(Generic[Seen]):
    """What `look` makes of the prompts' pictures [1, 3, H, W] in [0, 1], which `pictures` reads; the latest `keep` are kept."""

    def __init__(
        self,
        pictures: Callable[[Sequence[Prompt]], Float[Tensor, "B 3 H W"]],
        look: Callable[[Float[Tensor, "1 3 H W"]], Seen],
        keep: int,
    ) -> None:
        self.pictures, self.look, self.keep = pictures, look, keep
        self._kept: OrderedDict[str, Seen | None] = OrderedDict()

    def batches(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt], batch: int) -> Iterator[tuple[list[int], list[Seen]]]:
        """Rows of pictures that were drawn, `batch` at most, with what was made of their references. Rows are left out whose reference
        cannot be read, which the log says once."""
        for start in range(0, len(prompts), batch):
            found = {}
            for row in range(start, min(start + batch, len(prompts))):
                if (seen := self._of(prompts[row], images)) is not None:
                    found[row] = seen
            if found:
                yield list(found), list(found.values())

    def _of(self, prompt: Prompt, images: Float[Tensor, "B 3 H W"]) -> Seen | None:
        if prompt.image is None:
            raise RewardError(f"prompt {prompt.text or prompt.label!r}: has no picture to compare with. Give it an `image`.")
        if prompt.image not in self._kept:
            self._kept[prompt.image] = self._read(prompt, images)
            if len(self._kept) > self.keep:
                self._kept.popitem(last=False)
        self._kept.move_to_end(prompt.image)
        return self._kept[prompt.image]

    def _read(self, prompt: Prompt, images: Float[Tensor, "B 3 H W"]) -> Seen | None:
        try:
            picture = self.pictures([prompt]).to(images.device, torch.float32)
        except (DataError, OSError) as error:
            log.warning("reference picture %s cannot be read: %s", prompt.image, error)
            return None
        if picture.shape[1:] != images.shape[1:]:
            raise RewardError(
                f"reference picture {prompt.image}: is {list(picture.shape[2:])} pixels, those drawn are {list(images.shape[2:])}. Set "
                "data.image_size to the model's."
            )
        return self.look(picture)
