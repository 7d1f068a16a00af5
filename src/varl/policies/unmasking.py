"""How many tokens each step of a masked model settles."""

import math
from typing import Literal

from varl.errors import ConfigError


def settled_counts(tokens: int, steps: int, rounding: Literal["floor", "round"] = "floor") -> tuple[int, ...]:
    """Tokens settled at each step by the cosine schedule, which leaves L cos(pi/2 (i+1)/n) of L tokens open after step i of n:

        floor   MAR (arXiv 2406.11838): rounded down, but at least one token at each step, and at least one left for the last
        round   NOVA: rounded to the nearest; a step that settles nothing is left out, so there may be fewer than n

    Together they are all L tokens."""
    if not 1 <= steps <= tokens:
        raise ConfigError(f"{steps} steps for {tokens} tokens: every step settles a token or more. Set 1 to {tokens} steps.")
    left, counts = tokens, []
    for i in range(steps):
        open_ = tokens * math.cos(math.pi / 2 * (i + 1) / steps)
        if i == steps - 1:
            after = 0
        else:
            after = round(open_) if rounding == "round" else max(1, min(left - 1, math.floor(open_)))
        counts.append(left - after)
        left = after
    return tuple(count for count in counts if count)
