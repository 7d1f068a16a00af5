"""A policy small enough to enumerate, and a judge that answers at once: worked examples of the protocols in `varl.types`."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor, nn

from varl.rng import Stream
from varl.types import Judgement, Layout, Prompt, RewardFn, Rollout, Score


class TabularPolicy:
    """A next-scale model of V-valued tokens on grids 1x1, 1x2, 2x2. The tokens of a step are independent given all earlier steps; their
    logits are linear in the one-hot codes of the earlier tokens and of the prompt's label, with parameters of each step's own. Its pictures
    show the three grids as the channels of 2x2 pixels."""

    grids = ((1, 1), (1, 2), (2, 2))

    def __init__(self, vocab: int = 2, labels: int = 2, seed: int = 0, spread: float = 0.5, dtype: torch.dtype = torch.float32) -> None:
        self.vocab, self.labels = vocab, labels
        self.layout = Layout(grids=self.grids, steps=len(self.grids))
        self.sizes = [h * w for h, w in self.grids]
        self.module = nn.ModuleList(
            nn.Linear(labels + vocab * sum(self.sizes[:t]), vocab * self.sizes[t], dtype=dtype) for t in range(self.layout.steps)
        )
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.module.parameters():
                weight.copy_(spread * torch.randn(weight.shape, generator=noise, dtype=dtype))
        self.reference: nn.Module | None = None

    def with_reference(self) -> "TabularPolicy":
        """The same policy, held near what it is now."""
        self.reference = copy.deepcopy(self.module).requires_grad_(False)
        return self

    # ---- Policy

    def rollout(self, prompts: Sequence[Prompt], rng: Stream) -> Rollout:
        return replace(self.prefix(prompts, rng, steps=self.layout.steps), state=None)

    def score(self, rollout: Rollout) -> Score:
        law = self.law(self.module, rollout.prompts, rollout.actions)
        kl = ref_logp = None
        if self.reference is not None:
            reference = self.law(self.reference, rollout.prompts, rollout.actions)
            kl = (law.exp() * (law - reference)).sum(-1)
            ref_logp = pick(reference, rollout.actions)
        return Score(logp=pick(law, rollout.actions), entropy=-(law.exp() * law).sum(-1).detach(), ref_logp=ref_logp, kl=kl)

    def decode(self, rollout: Rollout) -> Tensor:
        grids = rollout.actions.split(self.sizes, 1)
        coarse_to_fine = [grid.reshape(-1, h, w).repeat_interleave(2 // h, 1).repeat_interleave(2 // w, 2)
                          for grid, (h, w) in zip(grids, self.grids, strict=True)]  # fmt: skip
        return torch.stack(coarse_to_fine, 1).float() / (self.vocab - 1)

    # ---- BranchingPolicy

    def prefix(self, prompts: Sequence[Prompt], rng: Stream, *, steps: int) -> Rollout:
        empty = torch.zeros(len(prompts), 0, dtype=torch.long)
        return self._go_on(tuple(prompts), empty, rng, steps, given=0)

    def complete(self, prefix: Rollout, rng: Stream) -> Rollout:
        copies = len(rng) // len(prefix)
        prompts = tuple(prompt for prompt in prefix.prompts for _ in range(copies))
        actions = prefix.actions.repeat_interleave(copies, 0)
        whole = self._go_on(prompts, actions, rng, self.layout.steps, given=actions.shape[1])
        return replace(whole, state=None)

    @torch.no_grad()
    def _go_on(self, prompts: tuple[Prompt, ...], actions: Tensor, rng: Stream, steps: int, given: int) -> Rollout:
        for t in range(steps):
            if sum(self.sizes[:t]) < actions.shape[1]:
                continue
            cdf = self.step_law(self.module, t, prompts, actions).exp().cumsum(-1)
            drawn = torch.searchsorted(cdf, rng.at("step", t).uniform(self.sizes[t], 1).to(cdf.dtype)).squeeze(-1)
            actions = torch.cat([actions, drawn.clamp(max=self.vocab - 1)], 1)
        return self.given(prompts, actions, rng.rows, given)

    # ---- enumeration

    @torch.no_grad()
    def given(self, prompts: Sequence[Prompt], actions: Tensor, rows: Sequence[int], given: int = 0) -> Rollout:
        """The rollout that chose these tokens, the first `given` of which were not its choice."""
        step = torch.repeat_interleave(torch.tensor(self.sizes))[: actions.shape[1]]
        return Rollout(
            prompts=tuple(prompts),
            actions=actions,
            logp=pick(self.law(self.module, prompts, actions), actions),
            step=step.expand_as(actions).clone(),
            sampled=(torch.arange(actions.shape[1]) >= given).expand_as(actions).clone(),
            index=torch.tensor(rows),
            state="the actions are the state",
        )

    def every_picture(self, prompt: Prompt) -> Rollout:
        """All V^L pictures, once each."""
        actions = torch.cartesian_prod(*[torch.arange(self.vocab)] * self.layout.tokens)
        return replace(self.given([prompt] * len(actions), actions, range(len(actions))), state=None)

    def law(self, module: nn.Module, prompts: Sequence[Prompt], actions: Tensor) -> Tensor:
        """[B, L, V] log-probabilities of every token that `actions` holds, by the steps before it."""
        steps = [t for t in range(self.layout.steps) if sum(self.sizes[:t]) < actions.shape[1]]
        return torch.cat([self.step_law(module, t, prompts, actions) for t in steps], 1)

    def step_law(self, module: nn.Module, t: int, prompts: Sequence[Prompt], actions: Tensor) -> Tensor:
        head = list(module.children())[t]
        before = nn.functional.one_hot(actions[:, : sum(self.sizes[:t])], self.vocab).flatten(1)
        label = nn.functional.one_hot(torch.tensor([prompt.label or 0 for prompt in prompts]), self.labels)
        inputs = torch.cat([label, before], 1).to(head.weight.dtype)
        return head(inputs).reshape(len(prompts), self.sizes[t], self.vocab).log_softmax(-1)


def pick(law: Tensor, actions: Tensor) -> Tensor:
    return law.gather(-1, actions[:, :, None]).squeeze(-1)


class InstantJudge:
    """Answers at once, and remembers what it was asked."""

    def __init__(self, reward: RewardFn, listener: Callable[[str], None] = lambda event: None) -> None:
        self.reward, self.listener, self.asked = reward, listener, 0

    def submit(self, images: Tensor, prompts: Sequence[Prompt], group: int | None = None) -> "Future[Judgement]":
        self.listener("submit")
        self.asked += len(prompts)
        value = self.reward(images, prompts)
        answer: Future[Judgement] = Future()
        answer.set_result(value if isinstance(value, Judgement) else Judgement(value=value))
        return answer


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Every pixel counts, each by another weight, so that no two pictures tie."""
    return (images.flatten(1) * torch.linspace(0.1, 1.2, images[0].numel())).sum(1)


def gradients(policy: TabularPolicy, objective: Tensor) -> list[Tensor]:
    """Of the objective, one for each parameter; zeros where it does not depend on it."""
    return list(torch.autograd.grad(objective, list(policy.module.parameters()), allow_unused=True, materialize_grads=True))
