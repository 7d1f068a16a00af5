"""VA-pi (arXiv 2512.19680): GRPO on tokens that are all drawn from the context of one real picture, paid by how well they rebuild it.

A picture's own tokens x* are read, some of them are replaced by others (`prefix_noise`), and from that one context every token of G
pictures is drawn at once: the law q of the paper's bound log p(I) >= E_q[log p(I|x)] - KL(q || policy). The reward stands for the first
term (a Gaussian decoder, up to scale), the cross-entropy of x* in the same context for the second (`prior_weight`); KL to the initial model
is `grpo.beta`. One context for each picture, so one forward pass for its G draws and its own tokens, where the release makes G."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from varl.algorithms.grpo import GRPO, batched, chunks, judged, repeated
from varl.config import VAPIConfig
from varl.rng import Stream
from varl.types import Judge, Judgement, Policy, Prompt, Rollout, TeacherForcedPolicy, TrainBatch


def without_condition(prompts: Sequence[Prompt], gone: Sequence[bool]) -> tuple[Prompt, ...]:
    """The prompts, and in the place of those that are `gone` the empty prompt, guidance's "none"; the reference picture stays."""
    return tuple(Prompt(image=prompt.image) if away else prompt for prompt, away in zip(prompts, gone, strict=True))


def shuffled(judgement: Judgement, order: Float[Tensor, "P G"]) -> Judgement:
    """The judgements dealt out anew inside each group: in the order of G numbers, one set for each group."""
    first = order.shape[1] * torch.arange(len(order))[:, None]
    return judgement.rows((first + order.argsort(1)).flatten().tolist())


def with_own_tokens(batch: TrainBatch, given: Rollout, group: int) -> TrainBatch:
    """After the G draws of each picture a row of its own tokens in their context. It is no draw of the policy: it has no log-prob to be
    compared with (0), no judgement (NaN), no advantage, no weight and no size."""
    slots = list(range(group, len(given) * (group + 1), group + 1))
    batch = batch.rows([row for first in range(0, len(batch), group) for row in (*range(first, first + group), first)])
    rollout, judgement = batch.rollout, batch.judgement
    rollout.actions[slots] = given.actions
    rollout.index[slots] //= group  # the picture's own address, of which `Stream.repeat` made those of its draws
    for part in (rollout.logp, rollout.sampled, rollout.sample_logp, batch.advantage, batch.weight, batch.kl_weight, batch.size):
        if part is not None:
            part[slots] = 0
    for part in (judgement.value, *judgement.parts.values(), judgement.region_value, judgement.region_box):
        if part is not None:
            part[slots] = torch.nan
    return batch


class VAPI:
    """GRPO on draws that share the context of a real picture, and the cross-entropy of its own tokens there. Needs a `TeacherForcedPolicy`,
    and `pictures`: the reference pictures of prompts, in [0, 1]."""

    def __init__(self, config: VAPIConfig, pictures: Callable[[Sequence[Prompt]], Float[Tensor, "P 3 H W"]]) -> None:
        self.config, self.pictures = config, pictures
        self.grpo = GRPO(config.grpo)
        self.num_iterations = config.grpo.num_iterations

    def collect(self, policy: Policy, prompts: Sequence[Prompt], judge: Judge, rng: Stream, step: int) -> Iterator[TrainBatch]:
        """Pieces of whole groups, each picture's G draws and its own tokens, in the order of the prompts. The judge is asked with the
        prompts as they are, though the condition may have been dropped."""
        config, group, teacher = self.config, self.config.grpo.num_generations, cast(TeacherForcedPolicy, policy)

        def draw() -> Iterator[tuple[tuple[Rollout, Rollout, Stream], Rollout]]:
            for some, address in chunks(prompts, rng, max(1, config.grpo.rollouts_per_chunk // group)):
                given, drawn = self.draw(teacher, some, address, group)
                yield (given, drawn, address), replace(drawn, prompts=repeated(some, group))

        for pieces in batched(judged(policy, judge, draw(), group), config.grpo):
            if config.shuffle_rewards:
                pieces = [(item, shuffled(judgement, item[2].at("shuffle").uniform(group))) for item, judgement in pieces]
            credited = self.grpo.credit(policy.layout, [(drawn, judgement) for (_, drawn, _), judgement in pieces])
            for ((given, drawn, _), _), batch in zip(pieces, credited, strict=True):
                metrics = {**batch.metrics, "judged": float(len(drawn))}
                yield replace(with_own_tokens(batch, given, group), metrics=metrics)

    def draw(self, policy: TeacherForcedPolicy, prompts: Sequence[Prompt], rng: Stream, group: int) -> tuple[Rollout, Rollout]:
        """(the prompts' pictures as their own tokens, `group` draws in the context of each), a share of them without their condition."""
        gone = rng.at("condition").uniform() < self.config.drop_condition
        given = policy.encode(self.pictures(prompts), without_condition(prompts, gone.tolist()))
        return given, policy.draw(given, rng.repeat(group), prefix_noise=self.config.prefix_noise)

    def objective(self, policy: Policy, batch: TrainBatch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """GRPO's on the draws, plus prior_weight * G * sum of log-probs of the pictures' own tokens: divided by the P * G * L tokens that
        were drawn, that is minus prior_weight times their mean cross-entropy.

        Metrics: GRPO's, over the draws, and `prior/nll` (nats per token, before its weight)."""
        score = policy.score(batch.rollout)
        objective, metrics = self.grpo.scored(score, batch, policy.layout.steps)
        own = score.logp[~batch.rollout.sampled.any(1)]
        if len(own):
            metrics["prior/nll"] = -own.detach().mean().item()
        if self.config.prior_weight > 0:
            objective = objective + self.config.prior_weight * self.config.grpo.num_generations * own.sum()
        return objective, metrics
