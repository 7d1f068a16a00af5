"""Does the model still know real pictures? Held-out pictures, drawn again token by token in their own context."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from varl.rng import Stream
from varl.types import Judge, Prompt, TeacherForcedPolicy


def teacher_forced_metrics(
    policy: TeacherForcedPolicy,
    prompts: Sequence[Prompt],
    pictures: Callable[[Sequence[Prompt]], Tensor],
    judge: Judge,
    *,
    seed: int,
    batch: int = 64,
) -> dict[str, float]:
    """`reward`: mean judgement of one draw in the context of each picture, failures left out; `rewards/<part>`: of its parts; `nll`:
    cross-entropy of the pictures' own tokens, nats per token. The same draws in every run: at addresses (seed, "eval", row)."""
    rng = Stream(seed=seed, path=("eval",), rows=tuple(range(len(prompts))))
    values, losses, parts = [], [], dict[str, list[Tensor]]()
    for start in range(0, len(prompts), batch):
        rows = range(start, min(start + batch, len(prompts)))
        some = [prompts[i] for i in rows]
        given = policy.encode(pictures(some), some)
        drawn = policy.draw(given, rng.select(rows), prefix_noise=0.0)
        judgement = judge.submit(policy.decode(drawn), some).result()
        values.append(judgement.value.float().cpu())
        for name, part in judgement.parts.items():
            parts.setdefault(name, []).append(part.float().cpu())
        with torch.no_grad():
            losses.append(-policy.score(given).logp.cpu())
    whole = {name: torch.cat(part) for name, part in parts.items()}
    means = {f"rewards/{name}": float(part.nanmean()) for name, part in whole.items() if not part.isnan().all()}
    return {"reward": float(torch.cat(values).nanmean()), **means, "nll": float(torch.cat(losses).mean())}
