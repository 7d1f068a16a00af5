"""VAR behind `BranchingPolicy`: ids of classes or characters, one code per token."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varl.config import LawConfig, NextScaleConfig
from varl.models.next_scale import Condition, NextScale
from varl.policies.acting import class_ids, require_text, strength_of
from varl.policies.sampling import smooth_weights, token_law
from varl.policies.scales import ScalesPolicy
from varl.rng import Stream
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.text import encode_text
from varl.types import Prompt


def model_ids(prompts: Sequence[Prompt], config: NextScaleConfig) -> Int[Tensor, "B ..."]:
    """Classes or characters of the prompts, what `NextScale.condition` takes. The empty prompt is guidance's "none". Raises DataError for a
    prompt that the model cannot read."""
    if config.num_classes is not None:
        return class_ids(prompts, config.num_classes)
    assert config.text is not None
    require_text(prompts)
    return encode_text([p.text for p in prompts], [p.style for p in prompts], config.text)


class NextScalePolicy(ScalesPolicy):
    module: NextScale
    tokenizer: MultiScaleVQ
    reference: NextScale | None

    def __init__(
        self,
        model: NextScale,
        tokenizer: MultiScaleVQ,
        *,
        sample_law: LawConfig = LawConfig(),
        score_law: LawConfig = LawConfig(),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, tokenizer, (), sample_law=sample_law, score_law=score_law, dtype=dtype)

    def ids(self, prompts: Sequence[Prompt]) -> Int[Tensor, "B ..."]:
        return model_ids(prompts, self.module.config).to(self.device)

    def _condition(self, model: NextScale, prompts: Sequence[Prompt], guided: bool) -> Condition:
        places: dict[Prompt, int] = {}
        rows = [places.setdefault(prompt, len(places)) for prompt in prompts]
        none = Prompt()
        if guided:
            rows += [places.setdefault(none, len(places))] * len(prompts)
        return model.condition(self.ids(list(places))).rows(torch.tensor(rows, device=self.device))

    @torch.no_grad()
    def smooth(self, prompts: Sequence[Prompt], rng: Stream) -> Float[Tensor, "B 3 H W"]:
        """Pictures in [0, 1] by VAR's `more_smooth`: every token is a mixture of codes (`sampling.smooth_weights`) that no policy has a
        probability for, so they are to be looked at, and not to be trained on or measured. Gumbel noise at (..., "smooth", scale, row)."""
        codes, last = self.tokenizer.quantize.embedding.weight, max(self.layout.steps - 1, 1)
        with self._precision():
            branch = self._start(prompts, self.layout.steps)
            for scale in range(self.layout.steps):
                cond, uncond = self._logits_at(branch, scale)
                logp = token_law(cond, uncond if self.sample_law.guided else None, self.sample_law, *strength_of(self.sample_law, scale))
                gumbel = -rng.at("smooth", scale).uniform(*logp.shape[1:]).to(self.device).log().neg().log()
                with torch.autocast(self.device.type, enabled=False):
                    mixture = smooth_weights(logp, gumbel, scale / last) @ codes
                    branch.f_hat = branch.f_hat + self.tokenizer.quantize.contribution(mixture, scale)
            return self._shown(self.tokenizer.render(branch.f_hat).float())
