"""Infinity behind `BranchingPolicy`: captions, and d independent bits per token."""

from collections.abc import Sequence

import torch

from varl.config import LawConfig
from varl.models.infinity import Condition, Infinity
from varl.policies.raster import CaptionEncoder, pad_left, read_captions
from varl.policies.scales import ScalesPolicy
from varl.tokenizers.bsq import BSQ
from varl.types import Prompt


class InfinityPolicy(ScalesPolicy):
    """Actions are bits [B, L, d]; a token's log-probability is the sum of its bits'. Guidance mixes logits; temperature, top-k and top-p
    act on each bit."""

    module: Infinity
    tokenizer: BSQ
    reference: Infinity | None

    def __init__(
        self,
        model: Infinity,
        tokenizer: BSQ,
        *,
        captions: CaptionEncoder,
        sample_law: LawConfig = LawConfig(),
        score_law: LawConfig = LawConfig(),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, tokenizer, (tokenizer.config.bits,), sample_law=sample_law, score_law=score_law, dtype=dtype)
        self.captions = captions

    def _condition(self, model: Infinity, prompts: Sequence[Prompt], guided: bool) -> Condition:
        read, keys, none = read_captions(prompts, model, self.captions)
        places: dict[str | int, int] = {}
        rows = [places.setdefault(key, len(places)) for key in (keys + none if guided else keys)]
        condition = model.condition(*pad_left([read[key] for key in places]))
        return condition.rows(torch.tensor(rows, device=self.device))
