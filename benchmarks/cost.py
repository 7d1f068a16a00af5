"""What a step costs, and which part of it pays for what: forked continuations, prefix updates, phases of a training step, log-prob memory.

    python benchmarks/cost.py [--minutes 3] [--model bundled:words|random]

Every figure is the median of alternating runs in one process, quartiles in brackets."""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import RANDOM, alternate, arguments, config, machine, milliseconds, policy_of, random_policy, spread, table
from torch import Tensor

from varl.build import build_algorithm, build_judge, build_prompts, build_sampler
from varl.config import BSQConfig, CaptionConfig, InfinityConfig, NextScaleConfig, RunConfig, TokenizerConfig, infinity_grids
from varl.distributed.mesh import World
from varl.models.infinity import Infinity
from varl.plan.rewards import peak_bytes
from varl.policies import sampling
from varl.policies.infinity import InfinityPolicy
from varl.policies.next_scale import NextScalePolicy
from varl.policies.scales import ScalesPolicy
from varl.probe import training_pass
from varl.recipes.grpo import words_cpu as grpo_words_cpu
from varl.rewards.judge import judge_now
from varl.rng import Stream
from varl.tokenizers.bsq import BSQ
from varl.train.loop import Trainer
from varl.types import Prompt

BATCH, LARGE_BATCH = 64, 8
FORK_BAR, PREFIX_BAR = 1.15, 1.3

VAR_LIKE = NextScaleConfig(
    depth=4,
    width=192,
    heads=6,
    num_classes=10,
    grids=tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    tokenizer=TokenizerConfig(vocab=1024, channels=16, width=16, multipliers=(1,), blocks=1, attention=False, patch=4),
)
"""VAR's schedule of ten scales and 680 tokens, at a width that a CPU can bear."""

INFINITY_LIKE = InfinityConfig(
    depth=4,
    width=192,
    heads=6,
    chunks=2,
    grids=infinity_grids("0.06M"),
    captions=CaptionConfig(tokens=12, width=128, lowercase=False),
    tokenizer=BSQConfig(channels=16, width=16, multipliers=(1,), blocks=1, patch=4),
)
"""Infinity's schedule of seven scales and 521 tokens, of 16 bits each."""


def infinity_policy(device: torch.device) -> InfinityPolicy:
    """Random weights, and random captions of 12 tokens."""
    shape = INFINITY_LIKE.captions.tokens, INFINITY_LIKE.captions.width
    tokenizer = BSQ(INFINITY_LIKE.tokenizer, INFINITY_LIKE.grids).to(device)
    return InfinityPolicy(
        Infinity(INFINITY_LIKE).to(device), tokenizer, captions=lambda texts: [torch.randn(shape, device=device) for _ in texts]
    )


def prompts_of(policy: ScalesPolicy, count: int) -> list[Prompt]:
    """Groups of 16, as in training."""
    text = policy.module.config.num_classes is None
    return [Prompt(text="WORD"[: 1 + i // 16 % 4]) if text else Prompt(label=i // 16 % 10) for i in range(count)]


def fork(name: str, policy: ScalesPolicy, copies: int, batch: int, budget: float) -> list[list[object]]:
    """K continuations of a prefix, against what the same steps take in whole rollouts of as many pictures: their time less that of their
    first m steps."""
    layout, rows = policy.layout, []
    prompts = prompts_of(policy, batch)
    rng = Stream(seed=0, path=("fork",), rows=tuple(range(batch)))
    few, addresses = prompts[::copies], rng.select(range(0, batch, copies))
    marks = middle_steps(policy)
    for m in marks:
        prefix = policy.prefix(few, addresses, steps=m)
        taken = alternate(
            {
                "fork": lambda prefix=prefix: policy.complete(prefix, addresses.at("continuation").repeat(copies)),
                "whole": lambda: policy.rollout(prompts, rng),
                "first": lambda m=m: policy.prefix(prompts, rng, steps=m),
            },
            policy.device,
            budget / len(marks),
        )
        own = taken["whole"] - taken["first"]
        share = sum(h * w for h, w in layout.grids[:m]) / layout.tokens
        ratio = taken["fork"].median() / (taken["whole"].median() - taken["first"].median())
        cells = [milliseconds(taken["fork"]), milliseconds(own), f"**{ratio:.2f}** ({spread(taken['fork'] / own)})"]
        rows.append([name, f"{m} of {layout.steps}", f"{share:.3f}", copies, *cells])
    return rows


def middle_steps(policy: ScalesPolicy) -> list[int]:
    """About a third, half and two thirds of the schedule."""
    steps = policy.layout.steps
    return sorted({max(1, round(steps * share)) for share in (0.4, 0.6, 0.8)})


def prefix_update(name: str, policy: ScalesPolicy, batch: int, budget: float) -> list[list[object]]:
    """Forward and backward over the first m steps against all steps, beside the share of tokens."""
    layout, rows = policy.layout, []
    prompts, rng = prompts_of(policy, batch), Stream(seed=0, path=("train",), rows=tuple(range(batch)))
    whole = policy.rollout(prompts, rng)
    marks = middle_steps(policy)
    for m in marks:
        prefix = policy.prefix(prompts, rng, steps=m).rows(range(batch))
        taken = alternate(
            {"prefix": lambda prefix=prefix: training_pass(policy, prefix), "whole": lambda: training_pass(policy, whole)},
            policy.device,
            budget / len(marks),
        )
        share = sum(h * w for h, w in layout.grids[:m]) / layout.tokens
        ratio = taken["prefix"] / taken["whole"]
        cells = [milliseconds(taken["prefix"]), milliseconds(taken["whole"]), spread(ratio, digits=3), f"**{ratio.median() / share:.2f}**"]
        rows.append([name, f"{m} of {layout.steps}", f"{share:.3f}", *cells])
    return rows


def phases(title: str, run: RunConfig, policy: NextScalePolicy, budget: float) -> list[object]:
    """Wall clock of a training step by phase, as the loop reports it, and the reader's own time for the step's pictures."""
    prompts = build_prompts(run.data, run.seed, run.eval.samples)
    judge = build_judge(run, prompts.pictures)
    (reward,) = (part for _, part in judge.parts.values())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            run.train,
            seed=run.seed,
            policy=policy,
            algorithm=build_algorithm(run.algorithm, policy),
            judge=judge,
            prompts=build_sampler(prompts.train, run, 0, 1),
            world=World(device=policy.device),
            failures=Path(folder),
        )
        trainer.update()
        steps, end = [], time.perf_counter() + budget
        while time.perf_counter() < end or len(steps) < 4:
            steps.append(trainer.update())
    some = list(prompts.train[:32])
    images = policy.decode(policy.rollout(some, Stream(seed=1, rows=tuple(range(32)))))
    start = time.perf_counter()
    judge_now(reward, images, some)
    per_picture = (time.perf_counter() - start) / 32
    judge.close()
    pictures = round(statistics.median(s["images_per_second"] * s["seconds/total"] for s in steps))

    def median(name: str) -> float:
        return statistics.median(s.get(f"seconds/{name}", 0.0) for s in steps)

    total = median("total")
    named = [median(name) for name in ("rollout", "decode", "reward_wait", "train", "optimizer")]
    reading = per_picture * pictures
    return [
        title,
        pictures,
        *(f"{1e3 * x:.0f} ({x / total:.0%})" for x in named),
        f"{1e3 * total:.0f}",
        f"{1e3 * reading:.0f} ({reading / total:.0%})",
    ]


def log_prob_memory(device: torch.device) -> list[list[object]]:
    """Head, log-softmax, gather and entropy of B x L tokens, forward and backward: in slices of rows as the policies do it, and at once."""
    batch, tokens, width, rows = 16, 170, 64, []
    for vocab in (1024, 4096, 16384):
        head = torch.nn.Linear(width, vocab).to(device)
        hidden = torch.randn(batch, tokens, width, device=device, requires_grad=True)
        ids = torch.randint(vocab, (batch, tokens), device=device)

        def one(at: slice, head=head, hidden=hidden, ids=ids) -> tuple[Tensor, ...]:
            return sampling.token_scores(head(hidden[at]).log_softmax(-1), ids[at])

        def backward(limit: int, one=one, vocab=vocab) -> None:
            kept, sampling.CHUNK_ELEMENTS = sampling.CHUNK_ELEMENTS, limit
            logp, _ = sampling.in_row_chunks(one, batch, tokens * vocab)
            logp.sum().backward()
            sampling.CHUNK_ELEMENTS = kept

        logits = batch * tokens * vocab * 4
        # a limit that the smallest vocabulary just meets; a slice cannot be smaller than one row
        sliced, whole = (peak_bytes(device, lambda limit=limit: backward(limit)) for limit in (batch * tokens * 1024, 1 << 60))
        rows.append([vocab, f"{logits / 2**20:.0f}", f"{sliced / 2**20:.0f}", f"{whole / 2**20:.0f}", f"{whole / sliced:.1f}"])
    return rows


def main() -> None:
    given = arguments(__doc__, 3.0)
    budget = 60 * given.minutes / 8
    words, large, infinity = policy_of(given.model, given.device), random_policy(VAR_LIKE, given.device), infinity_policy(given.device)
    print(f"## Cost\n\n{machine(given.device)}.")
    print(f"Medians (quartiles) of alternating runs; batches of {BATCH}, of the large model {LARGE_BATCH}.\n")

    print(f"### K continuations fork one prefix (bar: ratio at most {FORK_BAR})\n")
    rows = [*fork("words", words, 4, BATCH, budget), *fork("ten scales", large, 4, LARGE_BATCH, budget)]
    rows += fork("infinity", infinity, 4, LARGE_BATCH, budget)
    print(table(["model", "m", "prefix token share", "K", "fork, ms", "suffix of whole rollouts, ms", "ratio"], rows))

    print(f"### A prefix update's training pass (bar: time share at most {PREFIX_BAR} x token share)\n")
    rows = [*prefix_update("words", words, BATCH, budget), *prefix_update("ten scales", large, LARGE_BATCH, budget)]
    rows += prefix_update("infinity", infinity, LARGE_BATCH, budget)
    print(table(["model", "m", "token share", "prefix, ms", "whole, ms", "time share", "time share / token share"], rows))

    print("### Phases of a training step, wall-clock ms (share of the step)\n")
    name = given.model if given.model != RANDOM else "bundled:words"
    recipes = (config(name), replace(grpo_words_cpu(), model=name))
    rows = [phases(run.name, run, policy_of(given.model, given.device), budget) for run in recipes]
    head = ["recipe", "pictures", "rollout", "decode", "waiting for the reader", "train", "optimizer", "step", "the reader's own time"]
    print(table(head, rows))

    print("### Log-probs of 16 x 170 tokens, forward and backward: peak MiB\n")
    head = ["vocabulary", "one copy of the logits", "in slices of rows", "at once", "at once / sliced"]
    print(table(head, log_prob_memory(given.device)))


if __name__ == "__main__":
    main()
