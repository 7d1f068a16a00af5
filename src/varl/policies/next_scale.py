"""A next-scale model behind `BranchingPolicy`: act scale by scale, stop at any scale, fork the cache there, replay in one pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varl.config import LawConfig, NextScaleConfig
from varl.errors import ConfigError, DataError
from varl.models.layers import KVCache
from varl.models.next_scale import Condition, NextScale
from varl.policies.sampling import analytic_kl, draw, in_row_chunks, token_law, token_scores
from varl.rng import Stream
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.tokenizers.text import encode_text
from varl.types import Layout, Prompt, Rollout, Score


def model_ids(prompts: Sequence[Prompt], config: NextScaleConfig) -> Int[Tensor, "B ..."]:
    """Classes or characters of the prompts, what `NextScale.condition` takes. The empty prompt is guidance's "none". Raises DataError for a
    prompt that the model cannot read."""
    if config.num_classes is None:
        assert config.text is not None
        if unread := [p.label for p in prompts if p.label is not None and not p.text]:
            raise DataError(f"prompt label {unread[0]}: this model reads text and knows no classes. Give the prompt a text.")
        return encode_text([p.text for p in prompts], [p.style for p in prompts], config.text)
    none = config.num_classes
    for prompt in prompts:
        if prompt.label is None and prompt.text:
            raise DataError(f"prompt {prompt.text!r}: this model draws classes and reads no text. Give it a label, 0 to {none - 1}.")
        if prompt.label is not None and not 0 <= prompt.label < none:
            raise DataError(f"prompt label {prompt.label}: the model knows classes 0 to {none - 1}. Give one of them.")
    return torch.tensor([none if p.label is None else p.label for p in prompts])


@dataclass(slots=True)
class Branch:
    """Where a half-drawn batch stands. With guidance the cache holds the conditional rows, then the unconditional ones."""

    condition: Condition
    cache: KVCache
    f_hat: Float[Tensor, "B C h w"]


class NextScalePolicy:
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
        for name, law in (("sample_law", sample_law), ("score_law", score_law)):
            if len(law.cfg_scale) not in (1, self.layout.steps):
                raise ConfigError(
                    f"{name}.cfg_scale has {len(law.cfg_scale)} values, the model {self.layout.steps} scales. Give one, or one per scale."
                )
            if law.top_k > model.config.tokenizer.vocab:
                raise ConfigError(
                    f"{name}.top_k={law.top_k} is more than the vocabulary of {model.config.tokenizer.vocab}. Set 0 to keep all tokens."
                )

    @property
    def device(self) -> torch.device:
        return self.module.pos_start.device

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

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

    @property
    def _guided(self) -> bool:
        return self.sample_law.guided or self.score_law.guided

    def rollout(self, prompts: Sequence[Prompt], rng: Stream) -> Rollout:
        return replace(self.prefix(prompts, rng, steps=self.layout.steps), state=None)

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
            ids, logp, sample_logp = self._act(branch, uniform, 0, steps)
        return self._record(prompts, rng, ids, logp, sample_logp, branch)

    @torch.no_grad()
    def complete(self, prefix: Rollout, rng: Stream) -> Rollout:
        branch, copies = prefix.state, len(rng) // len(prefix)
        if not isinstance(branch, Branch):
            raise ConfigError("complete: this rollout carries no state to go on from. Use what `prefix` returned, unsliced.")
        drawn = prefix.actions.shape[1]
        first, steps = self.module.ends.index(drawn) + 1, self.layout.steps
        rows = torch.arange(len(prefix), device=self.device).repeat_interleave(copies)
        both = torch.cat([rows, rows + len(prefix)]) if self._guided else rows
        with self._precision():
            fork = Branch(branch.condition.rows(both), branch.cache.fork(both, self.module.ends[-1]), branch.f_hat[rows])
            uniform = rng.at("tokens").uniform(self.module.ends[-1] - drawn).to(self.device)
            ids, logp, sample_logp = self._act(fork, uniform, first, steps)

        def join(old: Tensor | None, new: Tensor | None) -> Tensor | None:
            return None if old is None or new is None else torch.cat([old[rows], new], 1)

        whole = self._record(
            [prefix.prompts[i] for i in rows.tolist()],
            rng,
            torch.cat([prefix.actions[rows], ids], 1),
            torch.cat([prefix.logp[rows], logp], 1),
            join(prefix.sample_logp, sample_logp),
            None,
        )
        whole.sampled[:, :drawn] = False
        return whole

    def _act(self, branch: Branch, uniform: Float[Tensor, "B l"], first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw scales first .. last-1; ids, log-probs under the score law, and under the sample law where that is another."""
        model, quantize = self.module, self.tokenizer.quantize
        batch, same = len(branch.f_hat), self.sample_law == self.score_law
        ids, logps, sample_logps, used = [], [], [], 0
        for scale in range(first, last):
            inputs = quantize.next_input(branch.f_hat, scale) if scale else None
            if inputs is not None and self._guided:
                inputs = torch.cat([inputs, inputs])
            hidden = model.step(branch.condition, inputs, scale, branch.cache)
            logits = model.logits(hidden, branch.condition)
            cond, uncond = (logits[:batch], logits[batch:]) if self._guided else (logits, None)
            law = self._law(cond, uncond, self.sample_law, scale)
            drawn = draw(law, uniform[:, used : used + law.shape[1]])
            used += law.shape[1]
            sampled = law.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            ids.append(drawn)
            sample_logps.append(sampled)
            if same:
                logps.append(sampled)
            else:
                logps.append(self._law(cond, uncond, self.score_law, scale).gather(-1, drawn.unsqueeze(-1)).squeeze(-1))
            with torch.autocast(self.device.type, enabled=False):  # in fp32, as in `score`: rounding would add up over the scales
                branch.f_hat = branch.f_hat + quantize.contribution(quantize.embedding(drawn), scale)
        return torch.cat(ids, 1), torch.cat(logps, 1), None if same else torch.cat(sample_logps, 1)

    def _law(self, cond: Tensor, uncond: Tensor | None, law: LawConfig, scale: int) -> Tensor:
        return token_law(cond, uncond if law.guided else None, law, law.guidance(scale))

    def _record(
        self, prompts: Sequence[Prompt], rng: Stream, ids: Tensor, logp: Tensor, sample_logp: Tensor | None, state: Branch | None
    ) -> Rollout:
        step = self.module.scale_of_token[: ids.shape[1]].expand(len(ids), -1)
        return Rollout(
            prompts=tuple(prompts),
            actions=ids,
            logp=logp,
            step=step,
            sampled=torch.ones_like(ids, dtype=torch.bool),
            index=torch.tensor(rng.rows),
            sample_logp=sample_logp,
            state=state,
        )

    # -- scoring -----------------------------------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout) -> Score:
        """One teacher-forced pass over the scales that the rollout holds; log-softmax in fp32, a bounded slice of logits at a time."""
        ids, law, batch = rollout.actions, self.score_law, len(rollout)
        with torch.no_grad():
            inputs = self.tokenizer.inputs(ids)
        guidance = torch.tensor([law.guidance(s) for s in range(self.layout.steps)], device=ids.device)[rollout.step[0]].unsqueeze(-1)
        logits_of = self._logits_of(self.module, rollout.prompts, inputs)
        with torch.no_grad():
            ref_logits_of = self._logits_of(self.reference, rollout.prompts, inputs) if self.reference is not None else None

        def score_rows(rows: slice) -> tuple[Tensor, ...]:
            logp = token_law(*logits_of(rows), law, guidance)
            chosen, entropy = token_scores(logp, ids[rows])
            if ref_logits_of is None:
                return chosen, entropy
            with torch.no_grad():
                ref_logp = token_law(*ref_logits_of(rows), law, guidance)
            return chosen, entropy, ref_logp.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1), analytic_kl(logp, ref_logp)

        logp, entropy, *reference = in_row_chunks(score_rows, batch, ids.shape[1] * self.module.config.tokenizer.vocab)
        ref_logp, kl = reference or (None, None)
        return Score(logp=logp, entropy=entropy, ref_logp=ref_logp, kl=kl)

    def _logits_of(self, model: NextScale, prompts: Sequence[Prompt], inputs: Tensor) -> Callable[[slice], tuple[Tensor, Tensor | None]]:
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
    def decode(self, rollout: Rollout) -> Float[Tensor, "B 3 H W"]:
        f_hat = self.tokenizer.f_hat(rollout.actions)
        with self._precision():
            return self.tokenizer.render(f_hat).float().add(1).div(2).clamp(0, 1)
