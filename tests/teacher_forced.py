"""A raster policy small enough to enumerate, that reads real pictures: a worked example of `TeacherForcedPolicy`."""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from tabular import TabularPolicy, pick
from varl.policies.raster import corrupt
from varl.policies.sampling import draw
from varl.types import Layout, Score


class TeacherForcedTabular(TabularPolicy):
    """L tokens in a row, each of V values; token l's logits are linear in the one-hot codes of the label (0 is "none") and of the tokens
    before it, with parameters of its own. Its pictures are L pixels wide: red is the token, green holds it together with its neighbour, so
    that a picture is no sum over tokens, blue is 0."""

    def __init__(self, tokens: int = 3, vocab: int = 3, labels: int = 3, **kwargs) -> None:
        self.grids = ((1, 1),) * tokens
        super().__init__(vocab, labels, **kwargs)
        self.layout = Layout(grids=((1, tokens),), steps=tokens)
        self.contexts_read = 0
        """Rows forwarded by `score` so far."""

    def score(self, rollout):
        """Rows side by side that share a context and a prompt share its law."""
        context = rollout.actions if rollout.context is None else rollout.context
        other = torch.tensor([a != b for a, b in pairwise(rollout.prompts)], dtype=torch.bool)
        new = (context[:, :-1].diff(dim=0) != 0).any(1) | other
        first = torch.cat([torch.ones(1, dtype=torch.bool), new])
        self.contexts_read += int(first.sum())
        prompts = [prompt for prompt, own in zip(rollout.prompts, first.tolist(), strict=True) if own]
        row = first.cumsum(0) - 1
        law = self.law(self.module, prompts, context[first])[row]
        kl = ref_logp = None
        if self.reference is not None:
            reference = self.law(self.reference, prompts, context[first])[row]
            kl, ref_logp = (law.exp() * (law - reference)).sum(-1), pick(reference, rollout.actions)
        return Score(logp=pick(law, rollout.actions), entropy=-(law.exp() * law).sum(-1).detach(), ref_logp=ref_logp, kl=kl)

    def decode(self, rollout):
        red = rollout.actions.float() / (self.vocab - 1)
        green = (red * red.roll(1, 1)).sqrt()
        return torch.stack([red, green, torch.zeros_like(red)], 1)[:, :, None]

    def encode(self, images, prompts):
        ids = (images[:, 0, 0] * (self.vocab - 1)).round().long()
        given = self.given(prompts, ids, range(len(ids)), ids.shape[1])
        return replace(given, logp=torch.full_like(given.logp, torch.nan), state=None)

    @torch.no_grad()
    def draw(self, given, rng, *, prefix_noise):
        copies = len(rng) // len(given)
        noise = rng.select(range(0, len(rng), copies)).at("prefix").uniform(self.layout.tokens, 2)
        context = corrupt(given.actions, noise, prefix_noise, self.vocab).repeat_interleave(copies, 0)
        prompts = [prompt for prompt in given.prompts for _ in range(copies)]
        law = self.law(self.module, prompts, context)
        actions = draw(law, rng.at("tokens").uniform(self.layout.tokens).to(law.dtype))
        return replace(self.given(prompts, actions, rng.rows), logp=pick(law, actions), context=context, state=None)


def tokens_as_picture(ids: Tensor, vocab: int) -> Tensor:
    """Pictures [B, 3, 1, L] that `encode` reads as `ids`."""
    red = ids.float() / (vocab - 1)
    return torch.stack([red, torch.zeros_like(red), torch.zeros_like(red)], 1)[:, :, None]
