"""A masked model with a diffusion head behind `RedrawingPolicy`: settle a set of tokens at each step, each by a chain of Gaussian moves;
score any of these moves; draw the chains again from the same latents.

The transformer makes a latent z of each token from the tokens that are known, and the head makes the token of z: so there is one pass of
the transformer for each step, and the head sees only the tokens that it settles. Where the head is frozen the backward pass has two
levels: the derivative of a token's score by its z is made with the score, move by move, and what is kept for later is one vector of each
token, however many moves and further paths there are."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varl.config import LawConfig, UnmaskingConfig
from varl.errors import ConfigError, NumericsError
from varl.models.diffusion_head import gaussian_kl, log_density
from varl.models.mar import known
from varl.models.masked import Denoiser, MaskedModel
from varl.policies.acting import ActingPolicy, CaptionEncoder, class_ids, first_of_each, require_laws, require_text
from varl.policies.sampling import CHUNK_ELEMENTS, in_row_chunks
from varl.rng import Stream
from varl.types import Chain, Layout, Prompt, Rollout, Score

HEAD_COPIES = 16
"""Tensors as wide as the head that its layers hold at once, or so, for each row: what slices of rows are sized by."""

# ---- maths ----------------------------------------------------------------------------------------------------------------------------


def settled_at(uniform: Float[Tensor, "B L"], counts: Sequence[int]) -> Int[Tensor, "B L"]:
    """The step that settles each token, `counts` of them at each step: in the order of their numbers, which is any with equal odds."""
    steps = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return steps[uniform.argsort(1).argsort(1)]


def with_derivative(value: Float[Tensor, " R"], *by: tuple[Float[Tensor, "R E"], Float[Tensor, "R E"]]) -> Float[Tensor, " R"]:
    """`value`, whose derivative by each row of an argument was computed already: pairs of argument and derivative."""
    for argument, derivative in by:
        value = value + ((argument - argument.detach()) * derivative).sum(-1)
    return value


def gaussian_entropy(log_std: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
    """Of N(., exp(log_std)^2), in nats: log_std + log(2 pi e) / 2."""
    return log_std + 0.5 * math.log(2 * math.pi * math.e)


def require_finite(tokens: Float[Tensor, "B L d"], step: Int[Tensor, "B L"]) -> None:
    """NumericsError for tokens that are no finite numbers; `step` settled each."""
    lost = ~tokens.isfinite().all(-1)
    if lost.any():
        raise NumericsError(
            f"rollout: {int(lost.any(1).sum())} of {len(lost)} pictures hold latents that are infinite or no numbers, the first from step "
            f"{int(step[lost].min())}. The weights are damaged, or cfg_scale, temperature or train.optim.lr is too large."
        )


# ---- chains ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """z of some tokens, and of the same tokens where nothing is asked for, under guidance."""

    asked: Float[Tensor, "*R E"]
    nothing: Float[Tensor, "*R E"] | None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Latents":
        return Latents(asked=fn(self.asked), nothing=None if self.nothing is None else fn(self.nothing))

    def __getitem__(self, rows: Any) -> "Latents":
        return self.map(lambda part: part[rows])

    @property
    def parts(self) -> list[Tensor]:
        return [self.asked] if self.nothing is None else [self.asked, self.nothing]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A chain under one law: `guidance` is that of each token's step."""

    denoiser: Denoiser
    law: LawConfig

    def read(self, z: Latents) -> list[Tensor]:
        """What the head makes of the latents that the law needs."""
        return [self.denoiser.read(part) for part in (z.parts if self.law.guided else z.parts[:1])]

    def guidance(self, step: Int[Tensor, " R"]) -> Float[Tensor, "R 1"] | None:
        if not self.law.guided:
            return None
        scale = self.law.cfg_scale
        return torch.tensor(scale, device=step.device)[step if len(scale) > 1 else torch.zeros_like(step)][:, None]

    def move(
        self, x: Float[Tensor, "R d"], move: Int[Tensor, " R"], read: Sequence[Tensor], guidance: Float[Tensor, "R 1"] | None
    ) -> tuple[Float[Tensor, "R d"], Float[Tensor, "R d"]]:
        """(mean, log standard deviation) of where each x goes."""
        mean, log_std = self.denoiser.law(x, move, read[0], read[1] if len(read) > 1 else None, guidance)
        return mean, log_std + math.log(self.law.temperature)


def walk(
    heads: Sequence[Head], z: Latents, step: Int[Tensor, " R"], noise: Float[Tensor, "R moves d"]
) -> tuple[Float[Tensor, "R moves d"], list[Float[Tensor, "R N"]]]:
    """Paths of tokens that these N + 1 standard normal vectors make under the first of the `heads`, from the first vector itself to the
    token; and the log-density of each move under each of them, 0 where nothing is drawn."""
    drawing = heads[0].denoiser
    reads, guidance = [head.read(z) for head in heads], [head.guidance(step) for head in heads]
    path, densities = [noise[:, 0]], [noise.new_zeros(len(noise), drawing.moves) for _ in heads]
    for n, noisy in enumerate(drawing.noisy.tolist()):
        move = torch.full((len(noise),), n, device=noise.device)
        laws = [head.move(path[n], move, read, scale) for head, read, scale in zip(heads, reads, guidance, strict=True)]
        mean, log_std = laws[0]
        path.append(mean + log_std.exp() * noise[:, n + 1] if noisy else mean)
        if noisy:
            for density, (mean, log_std) in zip(densities, laws, strict=True):
                density[:, n] = log_density(path[-1], mean, 2 * log_std).sum(-1)
    return torch.stack(path, 1), densities


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Some moves of some tokens' paths."""

    path: Float[Tensor, "R moves d"]
    scored: Bool[Tensor, "R N"]
    step: Int[Tensor, " R"]
    """Of each token, which says how it is guided."""

    def __getitem__(self, rows: Any) -> "Moves":
        return Moves(path=self.path[rows], scored=self.scored[rows], step=self.step[rows])

    def score(self, head: Head, z: Latents, reference: tuple[Head, Latents] | None) -> tuple[Tensor, ...]:
        """(log-density, entropy) of each token's scored moves together; with a reference (its log-density, KL to it) too: [R] each."""
        row, move = self.scored.nonzero().unbind(1)
        start, end = self.path[row, move], self.path[row, move + 1]

        def law(head: Head, z: Latents) -> tuple[Tensor, Tensor]:
            guidance = head.guidance(self.step)
            mean, log_std = head.move(start, move, [part[row] for part in head.read(z)], None if guidance is None else guidance[row])
            return mean, 2 * log_std

        def total(of_moves: Float[Tensor, "k d"]) -> Float[Tensor, " R"]:
            return of_moves.new_zeros(len(self.path)).index_add(0, row, of_moves.sum(-1))

        mean, log_variance = law(head, z)
        logp, entropy = total(log_density(end, mean, log_variance)), total(gaussian_entropy(log_variance.detach() / 2))
        if reference is None:
            return logp, entropy
        with torch.no_grad():
            other = law(*reference)
        return logp, entropy, total(log_density(end, *other)), total(gaussian_kl(mean, log_variance, *other))

    def slices(self, width: int) -> Iterator[slice]:
        """Rows to score together, by the width of the head."""
        most = max(1, int(self.scored.sum(1).max())) * HEAD_COPIES * width
        size = max(1, CHUNK_ELEMENTS // most)
        return (slice(start, start + size) for start in range(0, len(self.path), size))


def score_frozen(moves: Moves, head: Head, z: Latents, reference: tuple[Head, Latents] | None) -> tuple[Tensor, ...]:
    """`Moves.score` of a head that does not learn. What it keeps for the backward pass is the derivative by z."""
    if not torch.is_grad_enabled():
        return moves.score(head, z, reference)
    values, derivatives = [], []
    for rows in moves.slices(z.asked.shape[-1]):
        leaves = Latents(
            asked=z.asked[rows].detach().requires_grad_(),
            nothing=None if z.nothing is None or not head.law.guided else z.nothing[rows].detach().requires_grad_(),
        )
        found = moves[rows].score(head, leaves, None if reference is None else (reference[0], reference[1][rows]))
        with_gradient = (0, 3)[: 1 if reference is None else 2]  # log-density, and KL
        derivatives.append([torch.autograd.grad(found[i].sum(), leaves.parts, retain_graph=i != with_gradient[-1]) for i in with_gradient])
        values.append([value.detach() for value in found])
    logp, *others = (torch.cat(column) for column in zip(*values, strict=True))
    by_z = [[torch.cat(column) for column in zip(*each, strict=True)] for each in zip(*derivatives, strict=True)]
    logp = with_derivative(logp, *zip(z.parts, by_z[0], strict=False))
    if reference is None:
        return logp, *others
    entropy, ref_logp, kl = others
    return logp, entropy, ref_logp, with_derivative(kl, *zip(z.parts, by_z[1], strict=False))


def score_trained(moves: Moves, head: Head, z: Latents, reference: tuple[Head, Latents] | None) -> tuple[Tensor, ...]:
    """`Moves.score` of a head that learns too. Slices are scored again in the backward pass."""

    def some(rows: slice) -> tuple[Tensor, ...]:
        return moves[rows].score(head, z[rows], None if reference is None else (reference[0], reference[1][rows]))

    return in_row_chunks(some, len(moves.path), max(1, int(moves.scored.sum(1).max())) * HEAD_COPIES * z.asked.shape[-1])


# ---- the policy -----------------------------------------------------------------------------------------------------------------------


class MaskedPolicy(ActingPolicy):
    step_name = "step"

    def __init__(
        self,
        model: MaskedModel,
        tokenizer: Any,
        *,
        unmasking: UnmaskingConfig = UnmaskingConfig(),
        captions: CaptionEncoder | None = None,
        sample_law: LawConfig = LawConfig(),
        score_law: LawConfig = LawConfig(),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """The head is frozen; it works in fp32, the transformer in `dtype`."""
        self.module: Any = model.eval()  # type: ignore[attr-defined]
        self.train_head(False)
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.captions, self.unmasking = captions, unmasking
        self.sample_law, self.score_law, self.dtype = sample_law, score_law, dtype
        self.counts = model.schedule(unmasking.steps)
        """Tokens that each step settles."""
        self.layout = Layout(grids=(model.config.grid,), steps=len(self.counts))
        self.reference: Any = None
        """A frozen model of the same shape; set it to have `Score.kl` and `Score.ref_logp`."""
        self._check_laws()
        if model.config.num_classes is None and captions is None:
            raise ConfigError("this model reads captions and the policy has no encoder for them. Give `captions`, from texts to features.")

    def train_head(self, learns: bool) -> None:
        """Whether the head learns too."""
        self.trains_head = learns
        self.module.head.requires_grad_(learns)

    def _check_laws(self) -> None:
        require_laws({"sample_law": self.sample_law, "score_law": self.score_law}, self.layout.steps, self.step_name, None)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _head(self, model: Any, law: LawConfig) -> Head:
        return Head(denoiser=model.denoiser(self.unmasking.denoise_steps), law=law)

    # -- latents -----------------------------------------------------------------------------------------------------------------------

    def _condition(self, model: Any, prompts: Sequence[Prompt]) -> tuple[Any, Int[Tensor, "halves B"]]:
        """What differs among the prompts, once each; its row for each prompt, and under guidance for each prompt's "none"."""
        places: dict[str | int, int] = {}
        if model.config.num_classes is None:
            assert self.captions is not None
            require_text(prompts)
            keys, none = [prompt.text for prompt in prompts], ""
        else:
            none = model.config.num_classes
            keys = class_ids(prompts, none).tolist()
        rows = [[places.setdefault(key, len(places)) for key in part] for part in (keys, [none] * len(keys))[: 1 + self._guided]]
        with self._precision():
            if self.captions is not None:
                condition = model.condition([read.to(self.device) for read in self.captions([str(key) for key in places])])
            else:
                condition = model.condition(torch.tensor(list(places), device=self.device))
        return condition, torch.tensor(rows, device=self.device)

    def _latents(
        self, model: Any, condition: Any, rows: Int[Tensor, "halves b"], tokens: Float[Tensor, "b L d"], settled: Int[Tensor, "b L"], i: int
    ) -> Latents:
        """z of every place at step i, which has seen the tokens that earlier steps `settled`."""
        halves, seen = len(rows), known(settled >= i, sum(self.counts[:i]))

        def some(part: slice) -> Float[Tensor, "halves n L E"]:
            z = model(condition[rows[:, part].flatten()], tokens[part].repeat(halves, 1, 1), seen[part].repeat(halves, 1))
            return z.float().unflatten(0, (halves, -1))

        parts = [slice(0, len(tokens))] if torch.is_grad_enabled() else self._draws(len(tokens))
        with self._precision():
            z = torch.cat([some(part) for part in parts], 1)
        return Latents(asked=z[0], nothing=z[1] if halves > 1 else None)

    def _own_latents(self, rollout: Rollout) -> Latents:
        """z of every token as its step had it: what drew it."""
        if isinstance(rollout.state, Latents):
            return rollout.state
        tokens, condition = rollout.actions[:, :, -1], self._condition(self.module, rollout.prompts)
        parts: list[Latents] = [self._latents(self.module, *condition, tokens, rollout.step, i) for i in range(self.layout.steps)]
        b, l = torch.arange(len(rollout), device=tokens.device)[:, None], torch.arange(self.layout.tokens, device=tokens.device)
        asked, *nothing = (torch.stack(half)[rollout.step, b, l] for half in zip(*(part.parts for part in parts), strict=True))
        return Latents(asked=asked, nothing=nothing[0] if nothing else None)

    # -- acting ------------------------------------------------------------------------------------------------------------------------

    def _heads(self) -> list[Head]:
        """That which draws; and that which scores, if it is another."""
        laws = [self.sample_law] if self.sample_law == self.score_law else [self.sample_law, self.score_law]
        drawing = self._head(self.module, laws[0])
        return [Head(denoiser=drawing.denoiser, law=law) for law in laws]

    def _noise(self, rng: Stream, moves: int) -> Float[Tensor, "B L moves d"]:
        return rng.at("path").normal(self.layout.tokens, moves + 1, self.module.channels).to(self.device)

    def _walk(
        self, heads: Sequence[Head], z: Latents, step: Int[Tensor, " R"], noise: Float[Tensor, "R moves d"]
    ) -> tuple[Tensor, list[Tensor]]:
        """`walk`, some rows at a time."""

        def some(rows: slice) -> tuple[Tensor, ...]:
            path, densities = walk(heads, z[rows], step[rows], noise[rows])
            return path, *densities

        with torch.autocast(self.device.type, enabled=False):
            path, *densities = in_row_chunks(some, len(noise), HEAD_COPIES * z.asked.shape[-1])
        return path, densities

    @torch.no_grad()
    def rollout(self, prompts: Sequence[Prompt], rng: Stream) -> Rollout:
        """Pictures in orders from the addresses (..., "order", row) and with noise from (..., "path", row). `state` holds the latents, from
        which `redraw` goes on. Raises NumericsError for latents that are no numbers."""
        step = settled_at(rng.at("order").uniform(self.layout.tokens), self.counts).to(self.device)
        heads, (condition, rows) = self._heads(), self._condition(self.module, prompts)
        noise = self._noise(rng, heads[0].denoiser.moves)
        path, every = torch.zeros_like(noise), [torch.zeros_like(noise[:, :, 1:, 0]) for _ in heads]
        own: list[Tensor] | None = None
        for i in range(self.layout.steps):
            z, now = self._latents(self.module, condition, rows, path[:, :, -1], step, i), step == i
            path[now], densities = self._walk(heads, z[now], step[now], noise[now])
            for density, found in zip(every, densities, strict=True):
                density[now] = found
            own = own or [torch.empty_like(part) for part in z.parts]
            for part, latest in zip(own, z.parts, strict=True):
                part[now] = latest[now]
        require_finite(path[:, :, -1], step)
        assert own is not None
        state = Latents(asked=own[0], nothing=own[1] if len(own) > 1 else None)
        return self._record(prompts, rng, path, every, step, torch.ones_like(step, dtype=torch.bool), heads[0].denoiser, state=state)

    def _record(
        self,
        prompts: Sequence[Prompt],
        rng: Stream,
        path: Float[Tensor, "B L moves d"],
        densities: Sequence[Float[Tensor, "B L N"]],
        step: Int[Tensor, "B L"],
        sampled: Bool[Tensor, "B L"],
        denoiser: Denoiser,
        *,
        context: Tensor | None = None,
        settled: Int[Tensor, "B L"] | None = None,
        state: Latents | None = None,
    ) -> Rollout:
        """What was drawn; `densities` are those under the sample law, and under the score law where that is another."""
        scored = sampled[:, :, None] & denoiser.admissible.to(sampled.device)
        drawn, score = densities[0], densities[-1]
        sample_logp = drawn if len(densities) > 1 else None
        return Rollout(
            prompts=tuple(prompts),
            actions=path,
            logp=(score * scored).sum(-1),
            step=step,
            sampled=sampled,
            index=torch.tensor(rng.rows),
            sample_logp=None if sample_logp is None else (sample_logp * scored).sum(-1),
            context=context,
            chain=Chain(logp=score, scored=scored, sample_logp=sample_logp, settled=settled),
            state=state,
        )

    @torch.no_grad()
    def redraw(self, rollout: Rollout, rng: Stream) -> Rollout:
        copies, heads = len(rng) // len(rollout), self._heads()
        rows = torch.arange(len(rollout), device=self.device).repeat_interleave(copies)
        z, step = self._own_latents(rollout), rollout.step[rows]
        noise = self._noise(rng, heads[0].denoiser.moves).flatten(0, 1)
        path, densities = self._walk(heads, z.map(lambda part: part[rows].flatten(0, 1)), step.flatten(), noise)
        return self._record(
            [rollout.prompts[row] for row in rows.tolist()],
            rng,
            path.unflatten(0, step.shape),
            [density.unflatten(0, step.shape) for density in densities],
            step,
            torch.ones_like(step, dtype=torch.bool),
            heads[0].denoiser,
            context=rollout.actions[:, :, -1][rows],
        )

    @torch.no_grad()
    def preview(self, rollout: Rollout, rng: Stream, steps: Int[Tensor, "B K"]) -> Rollout:
        copies, heads = steps.shape[1], self._heads()
        seen = rollout.rows([row for row in range(len(rollout)) for _ in range(copies)])
        assert seen.chain is not None
        settled, at, context = seen.step, steps.flatten().to(self.device), seen.actions[:, :, -1]
        condition, rows = self._condition(self.module, seen.prompts)
        own = [seen.chain.logp] if seen.chain.sample_logp is None else [seen.chain.sample_logp, seen.chain.logp]
        path, every = seen.actions.clone(), [density.clone() for density in own]
        noise = self._noise(rng, heads[0].denoiser.moves)
        for i in at.unique().tolist():
            some = (at == i).nonzero().flatten()
            z = self._latents(self.module, condition, rows[:, some], context[some], settled[some], i)
            drawn = settled[some] > i
            if not drawn.any():  # the last step
                continue
            b, l = some[drawn.nonzero()[:, 0]], drawn.nonzero()[:, 1]
            path[b, l], densities = self._walk(heads, z[drawn], torch.full_like(b, i), noise[b, l])
            for density, found in zip(every, densities, strict=True):
                density[b, l] = found
        step = at[:, None].expand_as(settled).contiguous()
        return self._record(
            seen.prompts, rng, path, every, step, settled >= step, heads[0].denoiser, context=context, settled=settled.clone()
        )

    # -- scoring -----------------------------------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout) -> Score:
        """One pass of the transformer for each step that has scored moves, over the pictures that have them there; rows of the same prompt
        and tokens share it. Of the head, the scored moves alone."""
        if rollout.chain is None:
            raise ConfigError("score: this rollout's tokens were drawn at once, and not by chains of moves. Use what `rollout` returned.")
        scored, path = rollout.chain.scored, rollout.actions
        tokens = path[:, :, -1] if rollout.context is None else rollout.context
        settled = rollout.step if rollout.chain.settled is None else rollout.chain.settled
        first, of = first_of_each(rollout.prompts, tokens, settled)
        prompts, tokens, settled = [rollout.prompts[row] for row in first], tokens[first], settled[first]
        models = [self.module] if self.reference is None else [self.module, self.reference]
        heads = [self._head(model, self.score_law) for model in models]
        read = []
        for model in models:
            with torch.set_grad_enabled(torch.is_grad_enabled() and model is self.module):
                read.append(self._condition(model, prompts))
        halves = 1 + self.score_law.guided
        of_rows, any_scored = torch.tensor(of, device=path.device), scored.any(-1)
        places, columns = [], []
        for i in rollout.step[any_scored].unique().tolist():
            b, l = (any_scored & (rollout.step == i)).nonzero().unbind(1)
            pictures, at = of_rows[b].unique(return_inverse=True)
            z = []
            for model, (condition, rows) in zip(models, read, strict=True):
                with torch.set_grad_enabled(torch.is_grad_enabled() and model is self.module):
                    z.append(self._latents(model, condition, rows[:halves, pictures], tokens[pictures], settled[pictures], i)[at, l])
            moves = Moves(path=path[b, l], scored=scored[b, l], step=torch.full_like(b, i))
            with torch.autocast(self.device.type, enabled=False):
                scoring = score_trained if self.trains_head else score_frozen
                columns.append(scoring(moves, heads[0], z[0], (heads[1], z[1]) if len(models) > 1 else None))
            places.append((b, l))
        zeros = torch.zeros(scored.shape[:2], device=path.device)
        if not places:  # rows that add nothing; with a gradient all the same, which is 0
            logp = zeros + 0.0 * next(p for p in self.module.parameters() if p.requires_grad).flatten()[0]
            return Score(
                logp=logp, entropy=zeros, ref_logp=None if self.reference is None else zeros, kl=None if self.reference is None else logp
            )
        where = tuple(torch.cat(axis) for axis in zip(*places, strict=True))
        logp, entropy, *reference = (zeros.index_put(where, torch.cat(column)) for column in zip(*columns, strict=True))
        ref_logp, kl = reference or (None, None)
        return Score(logp=logp, entropy=entropy, ref_logp=ref_logp, kl=kl)

    # -- showing -----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def render(self, rollout: Rollout) -> Float[Tensor, "B 3 H W"]:
        """What the tokenizer makes of it, meant to lie in [-1, 1] and not clamped; in fp32, some pictures at a time."""
        h, w = self.module.config.image_size
        pixels = h * w // self.tokenizer.config.patch**2 * self.tokenizer.config.width

        def some(rows: slice) -> tuple[Tensor]:
            return (self.tokenizer.decode(self.tokenizer.maps(rollout.actions[rows, :, -1], self.module.config.grid)),)

        with torch.autocast(self.device.type, enabled=False):
            return in_row_chunks(some, len(rollout), pixels)[0]
