"""A raster model, LlamaGen's or Janus-Pro's, behind `BranchingPolicy` and `TeacherForcedPolicy`: act token by token, stop at any, replay in
one pass, or draw all tokens of a picture at once, each given a real picture's tokens before it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from varl.config import LawConfig
from varl.errors import ConfigError, DataError
from varl.models.infinity import Infinity
from varl.models.janus import Janus
from varl.models.layers import KVCache
from varl.models.raster import Condition, Raster
from varl.policies.acting import (
    CaptionEncoder,
    Drawn,
    Logits,
    TokenPolicy,
    class_ids,
    continued,
    draw_tokens,
    first_of_each,
    join,
    map_drawn,
    new_rollout,
    require_text,
    require_unfinished,
    score_tokens,
    stack,
)
from varl.policies.sampling import in_row_chunks
from varl.rng import Stream
from varl.tokenizers.vq import VQ
from varl.types import Layout, Prompt, Rollout, Score

KeptTokens = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""From pictures [B, 3, H, W] in [0, 1], and what encodes those that are new, to ids [B, L]."""


def corrupt(ids: Int[Tensor, "B L"], uniform: Float[Tensor, "B L 2"], share: float, vocab: int) -> Int[Tensor, "B L"]:
    """Each token but the last (which nobody reads) replaced with probability `share`, by one of the other vocab - 1 tokens, all as likely:
    VA-pi's kernel (arXiv 2512.19680, Eq. 28-29). The release's replacement may be the token itself; that kernel is this one with `share`
    times 1 - 1/vocab. Exact: (L - 1) * share tokens change in the mean."""
    other = (ids + 1 + (uniform[..., 1] * (vocab - 1)).long().clamp(max=vocab - 2)) % vocab
    changed = uniform[..., 0] < share
    changed[:, -1] = False
    return torch.where(changed, other, ids)


def pad_left(parts: Sequence[Tensor]) -> tuple[Shaped[Tensor, "B N *C"], Bool[Tensor, "B N"] | None]:
    """Captions of different lengths, as features [n, C] or ids [n], ending together, and where they are; None where all are equally
    long."""
    longest = max(len(part) for part in parts)
    padded = torch.stack([F.pad(part, (0, 0) * (part.ndim - 1) + (longest - len(part), 0)) for part in parts])
    if all(len(part) == longest for part in parts):
        return padded, None
    lengths = torch.tensor([[len(part)] for part in parts], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) >= longest - lengths


def read_captions(
    prompts: Sequence[Prompt], model: Raster | Janus | Infinity, captions: CaptionEncoder
) -> tuple[dict[str | int, Tensor], list[str | int], list[str | int]]:
    """What the model reads by key; the key of each prompt; and of its "none", which is as long as its caption. The empty prompt is the
    "none" of a caption that says nothing."""
    require_text(prompts)
    texts = list(dict.fromkeys(prompt.text for prompt in prompts if prompt.text))
    read: dict[str | int, Tensor] = {}
    for text, found in zip(texts, captions(texts) if texts else (), strict=True):
        if not 1 <= len(found) <= model.longest:
            raise DataError(f"prompt {text!r} has {len(found)} tokens, the model takes 1 to {model.longest}. Shorten it.")
        alike = model.none(len(found))
        if found.shape[1:] != alike.shape[1:]:
            raise ConfigError(
                f"captions have features of width {found.shape[1]}, the model was trained on {alike.shape[1]}. "
                "Give the text encoder that it was trained with."
            )
        read[text] = found.to(alike)
    keys: list[str | int] = [prompt.text or model.empty for prompt in prompts]
    none: list[str | int] = [len(read[prompt.text]) if prompt.text else model.empty for prompt in prompts]
    lengths = {key for key in [*keys, *none] if isinstance(key, int)}
    return read | {length: model.none(length) for length in lengths}, keys, none


@dataclass(slots=True)
class Branch:
    """Where a half-drawn batch stands. With guidance the cache holds the conditional rows, then the unconditional ones."""

    condition: Condition
    cache: KVCache


class RasterPolicy(TokenPolicy):
    step_name = "token"

    def __init__(
        self,
        model: Raster | Janus,
        tokenizer: VQ,
        *,
        captions: CaptionEncoder | None = None,
        sample_law: LawConfig = LawConfig(),
        score_law: LawConfig = LawConfig(),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module = model.eval()
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.captions = model.read if captions is None and isinstance(model, Janus) else captions
        self.sample_law, self.score_law, self.dtype = sample_law, score_law, dtype
        self.layout = Layout(grids=(model.config.grid,), steps=model.tokens)
        self.reference: Raster | Janus | None = None
        """A frozen model of the same shape; set it to have `Score.kl` and `Score.ref_logp`."""
        self.tokens: KeptTokens | None = None
        """Where pictures' tokens are kept; set it to encode each picture once."""
        self._check_laws()
        if model.config.num_classes is None and self.captions is None:
            raise ConfigError("this model reads captions and the policy has no encoder for them. Give `captions`, from texts to features.")

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    # -- prompts -----------------------------------------------------------------------------------------------------------------------

    def _condition(self, model: Raster | Janus, prompts: Sequence[Prompt], guided: bool) -> tuple[Condition, Int[Tensor, " b"]]:
        """What differs among the prompts, once each, and its row for each prompt; then for each prompt's "none", if guided."""
        places: dict[str | int, int] = {}
        if model.config.num_classes is None:
            assert self.captions is not None
            read, keys, none = read_captions(prompts, model, self.captions)
            rows = [places.setdefault(key, len(places)) for key in (keys + none if guided else keys)]
            condition = model.condition(*pad_left([read[key] for key in places]))
        else:
            keys = class_ids(prompts, classes := model.config.num_classes).tolist()
            rows = [places.setdefault(key, len(places)) for key in (keys + [classes] * len(keys) if guided else keys)]
            condition = model.condition(torch.tensor(list(places), device=self.device))
        return condition, torch.tensor(rows, device=self.device)

    # -- acting ------------------------------------------------------------------------------------------------------------------------

    def _both(self, rows: Tensor) -> Tensor:
        """`rows` for the conditional half of a batch, and for the unconditional one."""
        return torch.cat([rows, rows]) if self._guided else rows

    def _halves(self, logits: Float[Tensor, "b l V"]) -> tuple[Tensor, Tensor | None]:
        half = len(logits) // 2
        return (logits[:half], logits[half:]) if self._guided else (logits, None)

    @torch.no_grad()
    def prefix(self, prompts: Sequence[Prompt], rng: Stream, *, steps: int) -> Rollout:
        """The first `steps` tokens; `state` holds the cache to go on from. Prompts and their "none" are read once each, whatever the number
        of rows that share them. One uniform per token, at the address (..., "tokens", row)."""
        if not 1 <= steps <= self.layout.steps:
            raise ConfigError(f"prefix of {steps} steps: the model has {self.layout.steps} tokens. Choose 1 to {self.layout.steps}.")
        model = self.module
        with self._precision():
            condition, rows = self._condition(model, prompts, self._guided)
            read = model.cache(condition, 1)
            hidden = model.step(condition, None, read)
            branch = Branch(condition.rows(rows), read.fork(rows, model.capacity(condition, steps)))
            uniform = rng.at("tokens").uniform(steps).to(self.device)
            drawn = self._act(branch, hidden[rows], uniform, 0)
        return new_rollout(prompts, rng, drawn, torch.arange(steps, device=self.device), branch)

    @torch.no_grad()
    def complete(self, prefix: Rollout, rng: Stream) -> Rollout:
        branch, copies, model = prefix.state, len(rng) // len(prefix), self.module
        require_unfinished(prefix, self.layout.tokens)
        first, steps = prefix.actions.shape[1], self.layout.steps
        rows = torch.arange(len(prefix), device=self.device).repeat_interleave(copies)
        uniform = rng.at("tokens").uniform(steps - first).to(self.device)

        def some(part: slice) -> Drawn:
            mine = rows[part]
            both = torch.cat([mine, mine + len(prefix)]) if self._guided else mine
            fork = Branch(branch.condition.rows(both), branch.cache.fork(both, model.capacity(branch.condition, steps)))
            hidden = model.step(fork.condition, self._both(prefix.actions[mine, -1]), fork.cache)
            return self._act(fork, hidden, uniform[part], first)

        with self._precision():
            drawn = stack([some(part) for part in self._draws(len(rows))])
        return continued(prefix, rows, rng, drawn, torch.arange(steps, device=self.device))

    def _act(self, branch: Branch, hidden: Float[Tensor, "b 1 D"], uniform: Float[Tensor, "B n"], first: int) -> Drawn:
        """Draw as many tokens as there are uniforms, the first of them from `hidden`."""
        parts: list[Drawn] = []
        for column in range(uniform.shape[1]):
            if parts:
                hidden = self.module.step(branch.condition, self._both(parts[-1][0][:, 0]), branch.cache)
            cond, uncond = self._halves(self.module.logits(hidden))
            drawn = draw_tokens(cond, uncond, uniform[:, column, None, None], self.sample_law, self.score_law, first + column)
            parts.append(map_drawn(lambda tensor: tensor.squeeze(-1), drawn))
        return join(parts)

    # -- a real picture ----------------------------------------------------------------------------------------------------------------

    def encode(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Rollout:
        """The pictures' own tokens, as `given`, from `tokens` if they are kept there. The tokenizer works in fp32."""
        if tuple(images.shape[2:]) != self.module.config.image_size:
            got, want = ("x".join(map(str, size)) for size in (images.shape[2:], self.module.config.image_size))
            raise DataError(f"pictures of {got} pixels: the model was trained on {want}. Resize and crop them first.")
        return self.given(self._tokenize(images) if self.tokens is None else self.tokens(images, self._tokenize), prompts)

    @torch.no_grad()
    def _tokenize(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B L"]:
        def some(rows: slice) -> tuple[Tensor]:
            return (self.tokenizer.encode(images[rows].to(self.device, torch.float32) * 2 - 1),)

        with torch.autocast(self.device.type, enabled=False):
            return in_row_chunks(some, len(images), self._pixels)[0]

    def given(self, ids: Int[Tensor, "B L"], prompts: Sequence[Prompt]) -> Rollout:
        """Tokens that are known already, from a cache, as given actions; nothing in it is `sampled` or scored: `logp` is NaN."""
        low, high = int(ids.min()), int(ids.max())
        if ids.shape[1] != self.layout.tokens or not 0 <= low <= high < self.vocab:
            raise DataError(
                f"{ids.shape[1]} tokens between {low} and {high}: a picture of this model has {self.layout.tokens} between 0 and "
                f"{self.vocab - 1}. They were made with another tokenizer, or from pictures of another size."
            )
        ids = ids.to(self.device)
        return Rollout(
            prompts=tuple(prompts),
            actions=ids,
            logp=torch.full(ids.shape, torch.nan, device=self.device),
            step=torch.arange(self.layout.tokens, device=self.device).expand(len(ids), -1),
            sampled=torch.zeros_like(ids, dtype=torch.bool),
            index=torch.arange(len(ids)),
        )

    @torch.no_grad()
    def draw(self, given: Rollout, rng: Stream, *, prefix_noise: float) -> Rollout:
        """`len(rng)` draws, len(rng) / B of each row of `given`, side by side; they share one forward pass. Token t is drawn given the
        row's own tokens before it, of which the share `prefix_noise` was replaced (`corrupt`): the same ones for all draws of a row, at the
        address (..., "prefix", row of the first). What was read is `context`."""
        if not 0 <= prefix_noise <= 1:
            raise ConfigError(f"prefix_noise={prefix_noise}: is the share of tokens that are replaced. Choose 0 (none) to 1 (all).")
        batch, copies = len(given), len(rng) // len(given)
        noise = rng.select(range(0, len(rng), copies)).at("prefix").uniform(self.layout.tokens, 2).to(self.device)
        context = corrupt(given.actions, noise, prefix_noise, self.vocab)
        uniform = rng.at("tokens").uniform(self.layout.tokens).to(self.device).unflatten(0, (batch, copies)).transpose(1, 2).contiguous()
        logits_of = self._logits_of(self.module, given.prompts, context, self._guided)
        step = given.step[0]

        def draw_rows(rows: slice) -> tuple[Tensor, ...]:
            drawn = draw_tokens(*logits_of(rows), uniform[rows], self.sample_law, self.score_law, step)
            return tuple(part.transpose(1, 2).flatten(0, 1) for part in drawn if part is not None)

        ids, logp, *sampled = in_row_chunks(draw_rows, batch, context.shape[1] * self.vocab)
        rows = torch.arange(batch, device=self.device).repeat_interleave(copies)
        prompts = [given.prompts[row] for row in rows.tolist()]
        return new_rollout(prompts, rng, (ids, logp, sampled[0] if sampled else None), step, context=context[rows])

    # -- scoring -----------------------------------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout) -> Score:
        """One teacher-forced pass over the tokens that the rollout holds, given its `context` where it has one. Rows of the same prompt
        that read the same tokens share the pass and its logits. Log-softmax in fp32, a bounded slice of logits at a time."""
        inputs = rollout.actions if rollout.context is None else rollout.context
        first, of = first_of_each(rollout.prompts, inputs[:, :-1])
        prompts, inputs, guided = [rollout.prompts[row] for row in first], inputs[first], self.score_law.guided
        logits_of = self._logits_of(self.module, prompts, inputs, guided)
        with torch.no_grad():
            ref_logits_of = self._logits_of(self.reference, prompts, inputs, guided) if self.reference is not None else None
        return score_tokens(rollout.actions, of, logits_of, ref_logits_of, self.score_law, rollout.step[0], self.vocab)

    def _logits_of(self, model: Raster | Janus, prompts: Sequence[Prompt], inputs: Int[Tensor, "B l"], guided: bool) -> Logits:
        """Hidden states now; conditional and unconditional logits of any slice of rows later."""
        batch = len(prompts)
        with self._precision():
            condition, rows = self._condition(model, prompts, guided)
            hidden = model(condition.rows(rows), torch.cat([inputs, inputs]) if guided else inputs)

        def logits_of(rows: slice) -> tuple[Tensor, Tensor | None]:
            with self._precision():
                cond = model.logits(hidden[rows])
                return cond, model.logits(hidden[rows.start + batch : rows.stop + batch]) if guided else None

        return logits_of

    # -- showing -----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def render(self, rollout: Rollout) -> Float[Tensor, "B 3 H W"]:
        """What the tokenizer makes of it, meant to lie in [-1, 1] and not clamped; in fp32, some pictures at a time."""

        def some(rows: slice) -> tuple[Tensor]:
            return (self.tokenizer.render(self.tokenizer.codes(rollout.actions[rows], self.module.config.grid)),)

        return in_row_chunks(some, len(rollout), self._pixels)[0]
