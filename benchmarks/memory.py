"""What a training pass holds, with blocks computed again and with adapters: planned and measured; and what it costs in time.

    python benchmarks/memory.py [--minutes 2]

Peaks are what torch allocates above what was there before (its profiler on a CPU), medians of alternating runs in one process."""

import copy
from dataclasses import replace

import torch
from common import alternate, arguments, machine, random_policy, spread, table
from cost import VAR_LIKE

from varl.config import LoraConfig, NextScaleConfig
from varl.models.layers import recompute
from varl.models.lora import with_adapters
from varl.plan.cost import learned, training_bytes
from varl.plan.families import as_family, without_memory
from varl.plan.rewards import peak_bytes
from varl.policies.next_scale import NextScalePolicy
from varl.rng import Stream
from varl.types import Prompt

ROWS = 4
SHAPE = replace(VAR_LIKE, depth=8, width=256, heads=8)
"""680 tokens on ten scales."""
SIDES = {"weights": (False, False), "computed again": (True, False), "adapters": (False, True), "both": (True, True)}
"""Whether blocks are computed again, and whether adapters of rank 16 are trained."""
LORA = LoraConfig(r=16)


def sides(shape: NextScaleConfig, device: torch.device) -> dict[str, NextScalePolicy]:
    plain, made = random_policy(shape, device), {}
    for name, (again, adapted) in SIDES.items():
        made[name] = copy.deepcopy(plain)
        if again:
            recompute(made[name].module.blocks)
        if adapted:
            with_adapters(made[name].module, LORA)
    return made


def planned(shape: NextScaleConfig, name: str) -> int:
    """Bytes of activations, logits and gradients."""
    again, adapted = SIDES[name]
    pair = without_memory(shape)
    if adapted:
        with_adapters(pair[0], LORA)
    family = as_family(pair, again=again)
    return sum(training_bytes(family, family.layout.steps, ROWS, 4).values()) + 4 * learned(pair[0])  # type: ignore[arg-type]


def main() -> None:
    asked = arguments(__doc__ or "", 2.0, model=None)
    policies = sides(SHAPE, asked.device)
    prompts = [Prompt(label=i) for i in range(ROWS)]
    rollout = policies["weights"].rollout(prompts, Stream(seed=0, rows=tuple(range(ROWS))))

    def step(policy: NextScalePolicy) -> None:
        policy.module.zero_grad(set_to_none=True)
        policy.score(rollout).logp.sum().backward()

    peaks = {}
    for name, policy in policies.items():
        step(policy)
        policy.module.zero_grad(set_to_none=True)
        peaks[name] = peak_bytes(asked.device, lambda policy=policy: step(policy))
    taken = alternate({name: lambda policy=policy: step(policy) for name, policy in policies.items()}, asked.device, 60 * asked.minutes)
    rows = []
    for name in policies:
        plan, ratio = planned(SHAPE, name), taken[name] / taken["weights"]
        rows.append(
            (name, f"{plan / 2**20:.0f}", f"{peaks[name] / 2**20:.0f}", f"{peaks[name] / plan:.2f}", spread(taken[name]), spread(ratio))
        )
    print(f"{machine(asked.device)}\n\n{ROWS} pictures of 680 tokens, {SHAPE.depth} blocks of width {SHAPE.width}; training pass.\n")
    print(table(("trained", "planned, MiB", "measured, MiB", "measured / planned", "seconds", "time / weights"), rows))


if __name__ == "__main__":
    main()
