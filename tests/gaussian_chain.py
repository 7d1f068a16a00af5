"""A masked policy whose laws are all known: a worked example of `RedrawingPolicy`."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from varl.types import Chain, Layout, Rollout, Score


class GaussianPolicy:
    """L tokens of d numbers in a row, settled in a random order in S steps. A latent z [d] of each token is linear in the label, in what is
    known and in which tokens are. The head moves x, at first standard normal, N times:

        x_{n+1} ~ N(a_n x_n + b_n z, sigma_n^2)         a, b, sigma frozen; the last move without noise, and so not admissible

    Its pictures are L pixels wide, and linear in the tokens: a half plus an eighth of the token's first three numbers."""

    keep = (0.6, 0.5, 0.8, 1.0)
    drive = (0.5, 0.7, 0.4, 0.0)
    sigma = (0.5, 1.0, 0.3, 0.0)

    def __init__(self, tokens: int = 4, numbers: int = 3, steps: int = 2, labels: int = 2, spread: float = 0.4) -> None:
        self.layout = Layout(grids=((1, tokens),), steps=steps)
        self.numbers, self.labels = numbers, labels
        self.module = nn.Linear(labels + tokens * (numbers + 1), tokens * numbers, dtype=torch.float64)
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.module.parameters():
                weight.copy_(spread * torch.randn(weight.shape, generator=noise, dtype=torch.float64))
        self.reference: nn.Module | None = None
        self.latents: list[Tensor] = []
        """Of each step of the last `score`, with their gradients."""
        self.moves_scored = 0

    def with_reference(self):
        self.reference = copy.deepcopy(self.module).requires_grad_(False)
        return self

    # ---- the model

    def z(self, module: nn.Module, prompts, tokens: Tensor, known: Tensor) -> Tensor:
        label = nn.functional.one_hot(torch.tensor([prompt.label or 0 for prompt in prompts]), self.labels)
        inputs = torch.cat([label, known, (tokens * known[:, :, None]).flatten(1)], 1).double()
        return module(inputs).unflatten(1, (-1, self.numbers))

    def chain(self, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(path [B, L, N+1, d] from standard normal numbers of that shape, log-density [B, L, N] of its moves)."""
        path = [noise[:, :, 0]]
        for n, (a, b, sigma) in enumerate(zip(self.keep, self.drive, self.sigma, strict=True)):
            path.append(a * path[n] + b * z + sigma * noise[:, :, n + 1])
        moves = torch.stack(path, 2)
        return moves, self.density(moves, z)

    def law(self, path: Tensor, z: Tensor) -> Normal:
        """Of every move but the last, given where it started."""
        a, b, sigma = (torch.tensor(part[:-1], dtype=torch.float64)[:, None] for part in (self.keep, self.drive, self.sigma))
        return Normal(a * path[:, :, :-2] + b * z[:, :, None], sigma)

    def density(self, path: Tensor, z: Tensor) -> Tensor:
        return nn.functional.pad(self.law(path, z).log_prob(path[:, :, 1:-1]).sum(-1), (0, 1))

    def noise(self, rng) -> Tensor:
        return rng.normal(self.layout.tokens, len(self.sigma) + 1, self.numbers).double()

    def order(self, rng) -> Tensor:
        """The step that settles each token; as many at each, or nearly."""
        place = rng.at("order").uniform(self.layout.tokens).argsort(1).argsort(1)
        return place * self.layout.steps // self.layout.tokens

    # ---- Policy

    @torch.no_grad()
    def rollout(self, prompts, rng) -> Rollout:
        step, noise = self.order(rng), self.noise(rng.at("path"))
        actions, logp = torch.zeros_like(noise), torch.zeros_like(noise[:, :, 1:, 0])
        for i in range(self.layout.steps):
            path, density = self.chain(self.z(self.module, prompts, actions[:, :, -1], step < i), noise)
            now = step == i
            actions, logp = torch.where(now[:, :, None, None], path, actions), torch.where(now[:, :, None], density, logp)
        return self.new(prompts, actions, logp, step, torch.ones_like(step, dtype=torch.bool), rng)

    def new(self, prompts, actions, density, step, sampled, rng, **more) -> Rollout:
        scored = sampled[:, :, None] & (torch.tensor(self.sigma) > 0)
        settled = more.pop("settled", None)
        return Rollout(
            prompts=tuple(prompts),
            actions=actions,
            logp=(density * scored).sum(-1),
            step=step,
            sampled=sampled,
            index=torch.tensor(rng.rows),
            chain=Chain(logp=density, scored=scored, settled=settled),
            **more,
        )

    def score(self, rollout) -> Score:
        path, chain = rollout.actions, rollout.chain
        context = path[:, :, -1] if rollout.context is None else rollout.context
        settled = rollout.step if chain.settled is None else chain.settled
        self.moves_scored += int(chain.scored.sum())

        def latents(module: nn.Module) -> tuple[list[Tensor], Tensor]:
            each = [self.z(module, rollout.prompts, context, settled < i) for i in range(self.layout.steps)]
            return each, torch.stack(each, 2).gather(2, rollout.step[:, :, None, None].expand(-1, -1, 1, self.numbers))[:, :, 0]

        def total(moves: Tensor) -> Tensor:
            return torch.where(chain.scored, moves, 0.0).sum(-1)

        self.latents, z = latents(self.module)
        for latent in self.latents:
            if latent.requires_grad:
                latent.retain_grad()
        law = self.law(path, z)
        kl = ref_logp = None
        if self.reference is not None:
            ref_z = latents(self.reference)[1]
            kl = total(nn.functional.pad(kl_divergence(law, self.law(path, ref_z)).sum(-1), (0, 1)))
            ref_logp = total(self.density(path, ref_z))
        entropy = nn.functional.pad(law.entropy().expand_as(law.loc).sum(-1), (0, 1)).detach()
        return Score(logp=total(self.density(path, z)), entropy=total(entropy), ref_logp=ref_logp, kl=kl)

    def decode(self, rollout):
        return 0.5 + rollout.actions[:, :, -1].mT[:, :, None].expand(-1, 3, -1, -1) / 8

    # ---- RedrawingPolicy

    @torch.no_grad()
    def redraw(self, rollout, rng) -> Rollout:
        copies = len(rng) // len(rollout)
        prompts = [prompt for prompt in rollout.prompts for _ in range(copies)]
        context, step = rollout.actions[:, :, -1].repeat_interleave(copies, 0), rollout.step.repeat_interleave(copies, 0)
        each = [self.z(self.module, prompts, context, step < i) for i in range(self.layout.steps)]
        z = torch.stack(each, 2).gather(2, step[:, :, None, None].expand(-1, -1, 1, self.numbers))[:, :, 0]
        path, density = self.chain(z, self.noise(rng))
        return self.new(prompts, path, density, step, torch.ones_like(step, dtype=torch.bool), rng, context=context)

    @torch.no_grad()
    def preview(self, rollout, rng, steps) -> Rollout:
        copies = steps.shape[1]
        rows = rollout.rows([row for row in range(len(rollout)) for _ in range(copies)])
        context, step = rows.actions[:, :, -1], steps.flatten()[:, None].expand_as(rows.step)
        path, density = self.chain(self.z(self.module, rows.prompts, context, rows.step < step), self.noise(rng))
        own = rows.step == step
        path, density = torch.where(own[:, :, None, None], rows.actions, path), torch.where(own[:, :, None], rows.chain.logp, density)
        return self.new(rows.prompts, path, density, step.contiguous(), rows.step >= step, rng, context=context, settled=rows.step.clone())


def token_mean(policy: GaussianPolicy) -> float:
    """d E[token] / dz."""
    out = 0.0
    for a, b in zip(policy.keep, policy.drive, strict=True):
        out = a * out + b
    return out


def token_std(policy: GaussianPolicy) -> float:
    """Standard deviation of each number of a token, given its latent."""
    variance = 1.0
    for a, sigma in zip(policy.keep, policy.sigma, strict=True):
        variance = a * a * variance + sigma**2
    return math.sqrt(variance)


def score_of_paths(policy: GaussianPolicy, rollout: Rollout) -> Tensor:
    """Gradient [B, L, d] of `Rollout.logp` by the token's latent, in closed form; the latent is that of the first step."""
    z = policy.z(policy.module, rollout.prompts, torch.zeros_like(rollout.actions[:, :, -1]), torch.zeros_like(rollout.sampled)).detach()
    law = policy.law(rollout.actions, z)
    drive = torch.tensor(policy.drive[:-1], dtype=torch.float64)[:, None]
    of_moves = drive * (rollout.actions[:, :, 1:-1] - law.loc) / law.scale.square()
    assert rollout.chain is not None
    return (of_moves * rollout.chain.scored[:, :, :-1, None]).sum(2)
