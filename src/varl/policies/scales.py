"""What the policies of next-scale models do alike: act scale by scale, stop at any scale, fork the cache there, replay in one pass."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from varl.config import LawConfig
from varl.errors import ConfigError
from varl.models.infinity import Condition as CaptionCondition
from varl.models.infinity import Infinity
from varl.models.layers import KVCache
from varl.models.next_scale import Condition, NextScale
from varl.policies.acting import (
    Drawn,
    Logits,
    TokenPolicy,
    continued,
    draw_tokens,
    join,
    map_drawn,
    new_rollout,
    require_unfinished,
    score_tokens,
    stack,
)
from varl.policies.sampling import in_row_chunks
from varl.rng import Stream
from varl.tokenizers.bsq import BSQ
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.types import Layout, Prompt, Rollout, Score


@dataclass(slots=True)
class Branch:
    """Where a half-drawn batch stands. With guidance the cache holds the conditional rows, then the unconditional ones."""

    condition: Condition | CaptionCondition
    cache: KVCache
    f_hat: Float[Tensor, "B C h w"]


class ScalesPolicy(TokenPolicy):
    step_name = "scale"

    def __init__(
        self,
        model: NextScale | Infinity,
        tokenizer: MultiScaleVQ | BSQ,
        choices: tuple[int, ...],
        *,
        sample_law: LawConfig,
        score_law: LawConfig,
        dtype: torch.dtype,
    ) -> None:
        """`choices` is the shape of what is chosen for a token, each choice independently of the others: () is an id, (d,) are d bits. What
        is said of a token (log-probability, entropy, KL) is the sum over its choices."""
        self.module: Any = model.eval()
        self.tokenizer: Any = tokenizer.eval().requires_grad_(False)
        self.choices = choices
        self.sample_law, self.score_law, self.dtype = sample_law, score_law, dtype
        self.layout = Layout(grids=model.config.grids, steps=len(model.config.grids))
        self.reference: Any = None
        """A frozen model of the same shape; set it to have `Score.kl` and `Score.ref_logp`."""
        self._check_laws()

    @property
    def device(self) -> torch.device:
        return self.module.pos_start.device

    @abstractmethod
    def _condition(self, model: Any, prompts: Sequence[Prompt], guided: bool) -> Any:
        """One row per prompt (equal prompts are encoded once), then as many unconditional rows, if guided."""

    # -- choices and tokens ------------------------------------------------------------------------------------------------------------

    @property
    def _each(self) -> int:
        """Choices per token."""
        return math.prod(self.choices)

    def _over_choices(self, values: Float[Tensor, "B m"]) -> Float[Tensor, "B l"]:
        return values.unflatten(1, (-1, self._each)).sum(-1)

    # -- acting ------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefix(self, prompts: Sequence[Prompt], rng: Stream, *, steps: int) -> Rollout:
        """The first `steps` scales; `state` holds the caches to go on from. One uniform per choice, at the address (..., "tokens", row)."""
        if not 1 <= steps <= self.layout.steps:
            raise ConfigError(f"prefix of {steps} steps: the model has {self.layout.steps} scales. Choose 1 to {self.layout.steps}.")
        model = self.module
        with self._precision():
            branch = self._start(prompts, steps)
            uniform = rng.at("tokens").uniform(model.ends[steps - 1] * self._each).to(self.device)
            drawn = self._act(branch, uniform, 0, steps)
        return new_rollout(prompts, rng, drawn, model.scale_of_token[: model.ends[steps - 1]], branch)

    @torch.no_grad()
    def complete(self, prefix: Rollout, rng: Stream) -> Rollout:
        branch, copies = prefix.state, len(rng) // len(prefix)
        require_unfinished(prefix, self.layout.tokens)
        given = prefix.actions.shape[1]
        first, steps = self.module.ends.index(given) + 1, self.layout.steps
        rows = torch.arange(len(prefix), device=self.device).repeat_interleave(copies)
        uniform = rng.at("tokens").uniform((self.module.ends[-1] - given) * self._each).to(self.device)

        def some(part: slice) -> Drawn:
            mine = rows[part]
            both = torch.cat([mine, mine + len(prefix)]) if self._guided else mine
            fork = Branch(branch.condition.rows(both), branch.cache.fork(both, self.module.ends[-1]), branch.f_hat[mine])
            return self._act(fork, uniform[part], first, steps)

        with self._precision():
            drawn = stack([some(part) for part in self._draws(len(rows))])
        return continued(prefix, rows, rng, drawn, self.module.scale_of_token)

    def _start(self, prompts: Sequence[Prompt], steps: int) -> Branch:
        """Nothing drawn yet, and room for the first `steps` scales."""
        condition, batch = self._condition(self.module, prompts, self._guided), len(prompts)
        f_hat = torch.zeros(batch, self.tokenizer.config.channels, *self.tokenizer.maps[-1], device=self.device)
        return Branch(condition, self.module.cache(2 * batch if self._guided else batch, steps), f_hat)

    def _logits_at(self, branch: Branch, scale: int) -> tuple[Tensor, Tensor | None]:
        """Conditional and, where guided, unconditional logits [B, m, V] of the scale that comes next."""
        inputs, batch = self.tokenizer.next_input(branch.f_hat, scale) if scale else None, len(branch.f_hat)
        if inputs is not None and self._guided:
            inputs = torch.cat([inputs, inputs])
        logits = self.module.logits(self.module.step(branch.condition, inputs, scale, branch.cache), branch.condition)
        return (logits[:batch], logits[batch:]) if self._guided else (logits, None)

    def _act(self, branch: Branch, uniform: Float[Tensor, "B m"], first: int, last: int) -> Drawn:
        """Draw scales first .. last-1."""
        parts, used = [], 0
        for scale in range(first, last):
            cond, uncond = self._logits_at(branch, scale)
            dice = uniform[:, used : used + cond.shape[1], None]
            drawn = draw_tokens(cond, uncond, dice, self.sample_law, self.score_law, scale)
            chosen, logp, sampled = map_drawn(lambda tensor: tensor.squeeze(-1), drawn)
            chosen = chosen.unflatten(1, (-1, *self.choices))
            parts.append((chosen, self._over_choices(logp), None if sampled is None else self._over_choices(sampled)))
            used += cond.shape[1]
            with torch.autocast(self.device.type, enabled=False):  # in fp32, as in `score`: rounding would add up over the scales
                branch.f_hat = branch.f_hat + self.tokenizer.contribution(chosen, scale)
        return join(parts)

    # -- scoring -----------------------------------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout) -> Score:
        """One teacher-forced pass over the scales that the rollout holds; log-softmax in fp32, a bounded slice of logits at a time."""
        with torch.no_grad():
            inputs = self.tokenizer.inputs(rollout.actions)
        logits_of = self._logits_of(self.module, rollout.prompts, inputs)
        with torch.no_grad():
            ref_logits_of = self._logits_of(self.reference, rollout.prompts, inputs) if self.reference is not None else None
        chosen, step = rollout.actions.flatten(1), rollout.step[0].repeat_interleave(self._each)
        score = score_tokens(chosen, range(len(rollout)), logits_of, ref_logits_of, self.score_law, step, self.vocab)
        found = {field.name: value for field in fields(score) if (value := getattr(score, field.name)) is not None}
        return replace(score, **{name: self._over_choices(value) for name, value in found.items()})

    def _logits_of(self, model: Any, prompts: Sequence[Prompt], inputs: Tensor) -> Logits:
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
        """What the tokenizer makes of it, meant to lie in [-1, 1] and not clamped; some pictures at a time."""

        def some(rows: slice) -> tuple[Tensor]:
            f_hat = self.tokenizer.f_hat(rollout.actions[rows])
            with self._precision():
                return (self.tokenizer.render(f_hat).float(),)

        return in_row_chunks(some, len(rollout), self._pixels)[0]
