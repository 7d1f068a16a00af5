"""A next-scale model behind `BranchingPolicy`: act scale by scale, stop at any scale, fork the cache there, replay in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varl.config import LawConfig, NextScaleConfig
from varl.errors import ConfigError
from varl.models.layers import KVCache
from varl.models.next_scale import Condition, NextScale
from varl.policies.acting import (
    Drawn,
    Logits,
    TokenPolicy,
    class_ids,
    continued,
    draw_tokens,
    join,
    map_drawn,
    new_rollout,
    require_text,
    require_unfinished,
    score_tokens,
)
from varl.rng import Stream
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.text import encode_text
from varl.types import Layout, Prompt, Rollout, Score


def model_ids(prompts: Sequence[Prompt], config: NextScaleConfig) -> Int[Tensor, "B ..."]:
    """Classes or characters of the prompts, what `NextScale.condition` takes. The empty prompt is guidance's "none". Raises DataError for a
    prompt that the model cannot read."""
    if config.num_classes is not None:
        return class_ids(prompts, config.num_classes)
    assert config.text is not None
    require_text(prompts)
    return encode_text([p.text for p in prompts], [p.style for p in prompts], config.text)


@dataclass(slots=True)
class Branch:
    """Where a half-drawn batch stands. With guidance the cache holds the conditional rows, then the unconditional ones."""

    condition: Condition
    cache: KVCache
    f_hat: Float[Tensor, "B C h w"]


class NextScalePolicy(TokenPolicy):
    step_name = "scale"

    def __init__(
        self,
        model: NextScale,
        tokenizer: MultiScaleVQ,
        *,
        sample_law: LawConfig = LawConfig(),
        score_law: LawConfig = LawConfig(),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module = model.eval()
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.sample_law, self.score_law, self.dtype = sample_law, score_law, dtype
        self.layout = Layout(grids=model.config.grids, steps=len(model.config.grids))
        self.reference: NextScale | None = None
        """A frozen model of the same shape; set it to have `Score.kl` and `Score.ref_logp`."""
        self._check_laws()

    @property
    def device(self) -> torch.device:
        return self.module.pos_start.device

    # -- prompts -----------------------------------------------------------------------------------------------------------------------

    def ids(self, prompts: Sequence[Prompt]) -> Int[Tensor, "B ..."]:
        return model_ids(prompts, self.module.config).to(self.device)

    def _condition(self, model: NextScale, prompts: Sequence[Prompt], guided: bool) -> Condition:
        """One row per prompt (equal prompts are encoded once), then as many unconditional rows, if guided."""
        places: dict[Prompt, int] = {}
        rows = [places.setdefault(prompt, len(places)) for prompt in prompts]
        none = Prompt()
        if guided:
            rows += [places.setdefault(none, len(places))] * len(prompts)
        return model.condition(self.ids(list(places))).rows(torch.tensor(rows, device=self.device))

    # -- acting ------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefix(self, prompts: Sequence[Prompt], rng: Stream, *, steps: int) -> Rollout:
        """The first `steps` scales; `state` holds the caches to go on from. One uniform per token, at the address (..., "tokens", row)."""
        if not 1 <= steps <= self.layout.steps:
            raise ConfigError(f"prefix of {steps} steps: the model has {self.layout.steps} scales. Choose 1 to {self.layout.steps}.")
        model, batch = self.module, len(prompts)
        with self._precision():
            condition = self._condition(model, prompts, self._guided)
            grid = self.tokenizer.quantize.grids[-1]
            f_hat = torch.zeros(batch, model.config.tokenizer.channels, *grid, device=self.device)
            branch = Branch(condition, model.cache(len(condition.pooled), steps), f_hat)
            uniform = rng.at("tokens").uniform(model.ends[steps - 1]).to(self.device)
            drawn = self._act(branch, uniform, 0, steps)
        return new_rollout(prompts, rng, drawn, model.scale_of_token[: model.ends[steps - 1]], branch)

    @torch.no_grad()
    def complete(self, prefix: Rollout, rng: Stream) -> Rollout:
        branch, copies = prefix.state, len(rng) // len(prefix)
        require_unfinished(prefix, self.layout.tokens)
        given = prefix.actions.shape[1]
        first, steps = self.module.ends.index(given) + 1, self.layout.steps
        rows = torch.arange(len(prefix), device=self.device).repeat_interleave(copies)
        both = torch.cat([rows, rows + len(prefix)]) if self._guided else rows
        with self._precision():
            fork = Branch(branch.condition.rows(both), branch.cache.fork(both, self.module.ends[-1]), branch.f_hat[rows])
            uniform = rng.at("tokens").uniform(self.module.ends[-1] - given).to(self.device)
            drawn = self._act(fork, uniform, first, steps)
        return continued(prefix, rows, rng, drawn, self.module.scale_of_token)

    def _act(self, branch: Branch, uniform: Float[Tensor, "B l"], first: int, last: int) -> Drawn:
        """Draw scales first .. last-1."""
        model, quantize = self.module, self.tokenizer.quantize
        batch, parts, used = len(branch.f_hat), [], 0
        for scale in range(first, last):
            inputs = quantize.next_input(branch.f_hat, scale) if scale else None
            if inputs is not None and self._guided:
                inputs = torch.cat([inputs, inputs])
            hidden = model.step(branch.condition, inputs, scale, branch.cache)
            logits = model.logits(hidden, branch.condition)
            cond, uncond = (logits[:batch], logits[batch:]) if self._guided else (logits, None)
            dice = uniform[:, used : used + logits.shape[1], None]
            drawn = draw_tokens(cond, uncond, dice, self.sample_law, self.score_law, scale)
            parts.append(map_drawn(lambda tensor: tensor.squeeze(-1), drawn))
            used += logits.shape[1]
            with torch.autocast(self.device.type, enabled=False):  # in fp32, as in `score`: rounding would add up over the scales
                branch.f_hat = branch.f_hat + quantize.contribution(quantize.embedding(parts[-1][0]), scale)
        return join(parts)

    # -- scoring -----------------------------------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout) -> Score:
        """One teacher-forced pass over the scales that the rollout holds; log-softmax in fp32, a bounded slice of logits at a time."""
        with torch.no_grad():
            inputs = self.tokenizer.inputs(rollout.actions)
        logits_of = self._logits_of(self.module, rollout.prompts, inputs)
        with torch.no_grad():
            ref_logits_of = self._logits_of(self.reference, rollout.prompts, inputs) if self.reference is not None else None
        vocab, of = self.module.config.tokenizer.vocab, range(len(rollout))
        return score_tokens(rollout.actions, of, logits_of, ref_logits_of, self.score_law, rollout.step[0], vocab)

    def _logits_of(self, model: NextScale, prompts: Sequence[Prompt], inputs: Tensor) -> Logits:
        """Hidden states now; conditional and unconditional logits of any slice of rows later."""
        guided, batch = self.score_law.guided, len(prompts)
        with self._precision():
            condition = self._condition(model, prompts, guided)
            scales = self.module.ends.index(inputs.shape[1] + self.module.ends[0]) + 1
            hidden = model(condition, torch.cat([inputs, inputs]) if guided else inputs, scales)

        def logits_of(rows: slice) -> tuple[Tensor, Tensor | None]:
            with self._precision():
                cond = model.logits(hidden[rows], condition.rows(rows))
                if not guided:
                    return cond, None
                other = slice(rows.start + batch, rows.stop + batch)
                return cond, model.logits(hidden[other], condition.rows(other))

        return logits_of

    # -- showing -----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def render(self, rollout: Rollout) -> Float[Tensor, "B 3 H W"]:
        """What the tokenizer makes of it, meant to lie in [-1, 1] and not clamped."""
        f_hat = self.tokenizer.f_hat(rollout.actions)
        with self._precision():
            return self.tokenizer.render(f_hat).float()
