"""What the policies of token models share: prompts of classes, laws that fit, what was drawn as a record, what is replayed as a score."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from varl.config import LawConfig
from varl.errors import ConfigError, DataError
from varl.policies.sampling import analytic_kl, draw_several, entropy, in_row_chunks, row_slices, token_law
from varl.rng import Stream
from varl.types import Layout, Prompt, Rollout, Score

Logits = Callable[[slice], tuple[Tensor, Tensor | None]]
"""Conditional and, where guided, unconditional logits [b, l, V] of a slice of rows."""
CaptionEncoder = Callable[[Sequence[str]], Sequence[Tensor]]
"""From captions to what the model reads for each one's n tokens, without padding: features [n, C], or ids [n]."""
Drawn = tuple[Tensor, Tensor, Tensor | None]
"""Ids, log-probabilities under the score law, and under the sample law where that is another."""


def class_ids(prompts: Sequence[Prompt], none: int) -> Int[Tensor, " B"]:
    """Classes of the prompts; `none`, the number of classes, for the empty prompt. Raises DataError for any other prompt."""
    for prompt in prompts:
        if prompt.label is None and prompt.text:
            raise DataError(f"prompt {prompt.text!r}: this model draws classes and reads no text. Give it a label, 0 to {none - 1}.")
        if prompt.label is not None and not 0 <= prompt.label < none:
            raise DataError(f"prompt label {prompt.label}: the model knows classes 0 to {none - 1}. Give one of them.")
    return torch.tensor([none if p.label is None else p.label for p in prompts])


def require_text(prompts: Sequence[Prompt]) -> None:
    """DataError for a prompt that has a class only."""
    if unread := [p.label for p in prompts if p.label is not None and not p.text]:
        raise DataError(f"prompt label {unread[0]}: this model reads text and knows no classes. Give the prompt a text.")


def require_laws(laws: Mapping[str, LawConfig], steps: int, step: str, vocab: int | None) -> None:
    """ConfigError for a law that does not fit a model of `steps` steps (each called a `step`) and `vocab` tokens; None: of vectors."""
    for name, law in laws.items():
        if len(law.cfg_scale) not in (1, steps):
            raise ConfigError(f"{name}.cfg_scale has {len(law.cfg_scale)} values, the model {steps} {step}s. Give one, or one per {step}.")
        if len(law.temperature_ramp) not in (1, steps):
            count = len(law.temperature_ramp)
            raise ConfigError(f"{name}.temperature_ramp has {count} values, the model {steps} {step}s. Give one, or one per {step}.")
        if vocab is None and (law.top_k or law.top_p < 1):
            raise ConfigError(
                f"{name}.top_k={law.top_k}, top_p={law.top_p}: this model draws vectors, of which none can be cut away. Leave both out; "
                "`temperature` below 1 draws nearer to the mean."
            )
        if vocab is None and law.temperature_ramp != (1.0,):
            ramp = list(law.temperature_ramp)
            raise ConfigError(
                f"{name}.temperature_ramp={ramp}: this model draws vectors, at one temperature. Leave it out; set `temperature`."
            )
        if vocab is not None and law.top_k > vocab:
            raise ConfigError(f"{name}.top_k={law.top_k} is more than the vocabulary of {vocab}. Set 0 to keep all tokens.")


def first_of_each(prompts: Sequence[Prompt], *read: Shaped[Tensor, "B ..."]) -> tuple[list[int], list[int]]:
    """Rows that are the first of their prompt and of what they read, and for every row which of those it equals."""
    places: dict[tuple[Any, ...], int] = {}
    columns = [part.cpu().numpy() for part in read]
    keys = [(prompt, *(part[row].tobytes() for part in columns)) for row, prompt in enumerate(prompts)]
    of = [places.setdefault(key, len(places)) for key in keys]
    return [of.index(place) for place in range(len(places))], of


Own = TypeVar("Own", bound="ActingPolicy")


class ActingPolicy(ABC):
    """What the policies of all families do alike; each has its own model, and says how it acts, scores and renders."""

    step_name: ClassVar[str]
    """What a step is called."""
    module: Any
    tokenizer: Any
    layout: Layout
    sample_law: LawConfig
    score_law: LawConfig
    dtype: torch.dtype
    rollouts_per_draw: int = 0
    """Pictures whose caches, or passes, are held at once while they are drawn; 0 holds all. Changes memory, not results."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def rollout(self, prompts: Sequence[Prompt], rng: Stream) -> Rollout: ...

    @abstractmethod
    def render(self, rollout: Rollout) -> Float[Tensor, "B 3 H W"]:
        """What the tokenizer makes of it, meant to lie in [-1, 1] and not clamped."""

    @abstractmethod
    def _check_laws(self) -> None:
        """ConfigError for laws that do not fit the model."""

    def under(self: Own, law: LawConfig) -> Own:
        """The same weights, drawing and scoring under another law."""
        other = copy.copy(self)
        other.sample_law = other.score_law = law
        other._check_laws()
        return other

    def decode(self, rollout: Rollout) -> Float[Tensor, "B 3 H W"]:
        return self._shown(self.render(rollout))

    @staticmethod
    def _shown(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """From [-1, 1] to [0, 1]."""
        return pixels.add(1).div(2).clamp(0, 1)

    @property
    def _pixels(self) -> int:
        """Numbers in the tokenizer's widest layer, per picture."""
        h, w = self.module.config.image_size
        return h * w // self.tokenizer.config.patch**2 * self.tokenizer.config.width

    def _draws(self, rows: int) -> list[slice]:
        """Of rows that are drawn at once."""
        return row_slices(rows, self.rollouts_per_draw or rows)

    @property
    def _guided(self) -> bool:
        return self.sample_law.guided or self.score_law.guided

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


class TokenPolicy(ActingPolicy):
    """What the policies of models of a vocabulary do alike."""

    @abstractmethod
    def prefix(self, prompts: Sequence[Prompt], rng: Stream, *, steps: int) -> Rollout: ...

    def rollout(self, prompts: Sequence[Prompt], rng: Stream) -> Rollout:
        parts = [
            replace(self.prefix(prompts[rows], rng.select(range(rows.start, rows.stop)), steps=self.layout.steps), state=None)
            for rows in self._draws(len(prompts))
        ]
        drawn = stack([(part.actions, part.logp, part.sample_logp) for part in parts])
        return new_rollout(prompts, rng, drawn, parts[0].step[0])

    @property
    def vocab(self) -> int:
        return self.module.config.tokenizer.vocab

    def _check_laws(self) -> None:
        require_laws({"sample_law": self.sample_law, "score_law": self.score_law}, self.layout.steps, self.step_name, self.vocab)


# ---- acting ---------------------------------------------------------------------------------------------------------------------------


def strength_of(law: LawConfig, step: int | Int[Tensor, " n"]) -> tuple[Tensor | float, Tensor | float | None]:
    """`cfg_scale` of each token's step, ready to broadcast over the vocabulary, and its temperature; None where all steps have one."""
    ramp = law.temperature_ramp != (1.0,)
    if isinstance(step, int):
        return law.guidance(step), law.heat(step) if ramp else None
    steps = range(int(step.max()) + 1)

    def each(of: Callable[[int], float]) -> Float[Tensor, "n 1"]:
        return torch.tensor([of(s) for s in steps], device=step.device)[step].unsqueeze(-1)

    return each(law.guidance), each(law.heat) if ramp else None


def draw_tokens(
    cond: Float[Tensor, "B n V"],
    uncond: Float[Tensor, "B n V"] | None,
    uniform: Float[Tensor, "B n G"],
    sample_law: LawConfig,
    score_law: LawConfig,
    step: int | Int[Tensor, " n"],
) -> Drawn:
    """G tokens from each law, all [B, n, G]; `step` is that of all n tokens, or each one's own."""

    def law_of(law: LawConfig) -> Tensor:
        return token_law(cond, uncond if law.guided else None, law, *strength_of(law, step))

    law = law_of(sample_law)
    ids = draw_several(law, uniform)
    sampled = law.gather(-1, ids)
    return (ids, sampled, None) if sample_law == score_law else (ids, law_of(score_law).gather(-1, ids), sampled)


def map_drawn(fn: Callable[[Tensor], Tensor], drawn: Drawn) -> Drawn:
    ids, logp, sampled = drawn
    return fn(ids), fn(logp), None if sampled is None else fn(sampled)


def join(parts: Sequence[Drawn]) -> Drawn:
    """One after the other, along the tokens."""
    ids, logp, sampled = zip(*parts, strict=True)
    return torch.cat(ids, 1), torch.cat(logp, 1), None if sampled[0] is None else torch.cat(sampled, 1)


def stack(parts: Sequence[Drawn]) -> Drawn:
    """Rows after rows."""
    ids, logp, sampled = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logp), None if sampled[0] is None else torch.cat(sampled)


def new_rollout(
    prompts: Sequence[Prompt], rng: Stream, drawn: Drawn, step: Int[Tensor, " l"], state: Any = None, context: Tensor | None = None
) -> Rollout:
    """What was drawn, as a rollout of which all was sampled."""
    ids, logp, sample_logp = drawn
    return Rollout(
        prompts=tuple(prompts),
        actions=ids,
        logp=logp,
        step=step.expand(len(ids), -1),
        sampled=torch.ones_like(logp, dtype=torch.bool),
        index=torch.tensor(rng.rows),
        sample_logp=sample_logp,
        context=context,
        state=state,
    )


def require_unfinished(prefix: Rollout, tokens: int) -> None:
    """ConfigError for what cannot be completed: a rollout without state, or one that has all `tokens` of a picture."""
    if prefix.state is None:
        raise ConfigError("complete: this rollout carries no state to go on from. Use what `prefix` returned, unsliced.")
    if prefix.actions.shape[1] == tokens:
        raise ConfigError(f"complete: these pictures have all of their {tokens} tokens. Take a prefix of fewer steps.")


def continued(prefix: Rollout, rows: Int[Tensor, " b"], rng: Stream, drawn: Drawn, step: Int[Tensor, " l"]) -> Rollout:
    """The given rows of `prefix`, and what was drawn after them; the prefix's tokens are not `sampled`."""
    before = map_drawn(lambda tensor: tensor[rows], (prefix.actions, prefix.logp, prefix.sample_logp))
    whole = new_rollout([prefix.prompts[i] for i in rows.tolist()], rng, join([before, drawn]), step)
    whole.sampled[:, : prefix.actions.shape[1]] = False
    return whole


# ---- scoring --------------------------------------------------------------------------------------------------------------------------


def score_tokens(
    ids: Int[Tensor, "B l"],
    of: Sequence[int],
    logits_of: Logits,
    ref_logits_of: Logits | None,
    law: LawConfig,
    step: Int[Tensor, " l"],
    vocab: int,
) -> Score:
    """Score of `ids`, of which row b was drawn from the b-th of `of` among the sequences that `logits_of` knows, so that rows of one
    sequence share its logits: there are never more than a bounded slice of [sequences, l, V], in fp32, and never [B, l, V]."""
    rows_of: list[list[int]] = [[] for _ in range(max(of) + 1)]
    for row, sequence in enumerate(of):
        rows_of[sequence].append(row)
    strength = strength_of(law, step)
    place = torch.arange(ids.shape[1], device=ids.device)

    def score_sequences(slice_: slice) -> tuple[Tensor, ...]:
        mine = range(slice_.start, slice_.stop)
        rows = torch.tensor([row for sequence in mine for row in rows_of[sequence]], device=ids.device)
        at = torch.tensor([i for i, sequence in enumerate(mine) for _ in rows_of[sequence]], device=ids.device)

        def chosen(logp: Tensor) -> Tensor:
            return logp[at[:, None], place, ids[rows]]

        logp = token_law(*logits_of(slice_), law, *strength)
        if ref_logits_of is None:
            return chosen(logp), entropy(logp)[at]
        with torch.no_grad():
            ref_logp = token_law(*ref_logits_of(slice_), law, *strength)
        return chosen(logp), entropy(logp)[at], chosen(ref_logp), analytic_kl(logp, ref_logp)[at]

    scores = in_row_chunks(score_sequences, len(rows_of), ids.shape[1] * vocab)
    back = torch.tensor([row for rows in rows_of for row in rows], device=ids.device).argsort()
    logp, entropies, *reference = (score[back] for score in scores)
    ref_logp, kl = reference or (None, None)
    return Score(logp=logp, entropy=entropies, ref_logp=ref_logp, kl=kl)
