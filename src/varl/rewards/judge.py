"""Asks rewards in the background, and adds up what they say."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from varl.errors import RewardError, VarlError
from varl.types import GroupRewardFn, Judgement, Prompt, RewardFn

log = logging.getLogger(__name__)


def judge_now(fn: RewardFn, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt], group: int | None = None) -> Judgement:
    """The reward's answer as a Judgement in fp32 on the CPU. What is not finite becomes NaN: the picture failed, if it is the value.
    `group` is how many pictures side by side are one, for rewards to which that matters."""
    answer = fn.of_groups(images, prompts, group) if isinstance(fn, GroupRewardFn) else fn(images, prompts)
    count = len(prompts)
    _demand(fn, "value", answer.value if isinstance(answer, Judgement) else answer, (count,))
    judgement = answer if isinstance(answer, Judgement) else Judgement(value=answer)
    for name, part in judgement.parts.items():
        _demand(fn, f"parts[{name!r}]", part, (count,))
    shares, box = judgement.region_value, judgement.region_box
    if shares is not None:
        _demand(fn, "region_value", shares, (count, shares.shape[-1]))
    if box is not None:
        _demand(fn, "region_box", box, (count, (box[..., 0] if shares is None else shares).shape[-1], 4))
    value = _plain(judgement.value)
    return replace(
        judgement,
        value=value,
        parts={name: _plain(part) for name, part in judgement.parts.items()},
        region_value=None if shares is None else _plain(shares).masked_fill(value.isnan()[:, None], torch.nan),
        region_box=None if box is None else _plain(box),
    )


def _demand(fn: RewardFn, name: str, value: Any, shape: tuple[int, ...]) -> None:
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if got != list(shape):
        said = getattr(fn, "__name__", type(fn).__name__)
        raise RewardError(f"reward {said}: {name} is {got}, must be a tensor of shape {list(shape)}: one row per picture.")


def _plain(tensor: Tensor) -> Tensor:
    plain = tensor.detach().float().cpu()
    return plain.where(plain.isfinite(), torch.nan)


def combine(judgements: Mapping[str, tuple[float, Judgement]]) -> Judgement:
    """The weighted sum of named judgements: value = sum_i w_i value_i, and NaN where a reward of non-zero weight failed.

    parts: `name` is that reward's value, `name/part` its parts, all before weights. region_value: the weighted shares of the rewards that
    say where, and what these leave of value (rewards that do not say where) in equal shares over the picture's regions, so that regions sum
    to value; rewards that say where must mean the same regions; where none says where, None. region_box and found are those of the first
    reward that has them; where some say where, region_box is one of theirs."""
    every = [judgement for _, judgement in judgements.values()]
    local = [(weight * j.region_value, j.region_box) for weight, j in judgements.values() if weight and j.region_value is not None]
    value = sum((weight * judgement.value for weight, judgement in judgements.values() if weight), torch.zeros(len(every[0].value)))
    parts = {}
    for name, (_, judgement) in judgements.items():
        parts |= {name: judgement.value, **{f"{name}/{part}": tensor for part, tensor in judgement.parts.items()}}
    region_value = None
    if local:
        there, *others = (~share.isnan() & ~value.isnan()[:, None] for share, _ in local)
        if any(not torch.equal(there, other) for other in others):
            most = [share.shape[1] for share, _ in local]
            raise RewardError(
                f"rewards {', '.join(judgements)} divide pictures into different regions (at most {most}, NaN where a picture has fewer). "
                "Let one of them say where."
            )
        own = sum((share for share, _ in local), torch.zeros(there.shape))
        rest = (value - own.nansum(1)) / there.sum(1).clamp(min=1)
        region_value = (own + rest[:, None]).masked_fill(~there, torch.nan)
    boxes = [box for _, box in local] if local else [judgement.region_box for judgement in every]
    return Judgement(
        value=value,
        parts=parts,
        region_value=region_value,
        region_box=next((box for box in boxes if box is not None), None),
        found=next((judgement.found for judgement in every if judgement.found is not None), None),
    )


@contextmanager
def _beside(images: Tensor, drawn: Any) -> Iterator[None]:
    """A stream that waits for the pictures (event `drawn`) and for nothing that was queued after them; on the CPU, nothing."""
    if drawn is None:
        yield
        return
    stream = torch.cuda.Stream(images.device)
    stream.wait_event(drawn)
    images.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


Prepare = Callable[[str, Judgement, Sequence[Prompt], int | None], Judgement]
"""What a named reward's judgement of whole groups becomes before it is weighed."""


class RewardJudge:
    """A Judge: named rewards with weights, each asked in a thread of its own while the caller goes on. `prepare`, if given, changes every
    judgement before it is weighed and added up; `parts` tell what it was before.

    A reward that raises fails for that batch: NaN, and once a line in the log. VARL's own errors (a missing engine, a wrong shape)
    and KeyboardInterrupt come out of the future instead. On CUDA pictures are judged on a stream of their own."""

    def __init__(self, parts: Mapping[str, tuple[float, RewardFn]], prepare: Prepare | None = None) -> None:
        if not parts:
            raise RewardError("no rewards: nothing to learn from. Name at least one.")
        self.parts, self.prepare = dict(parts), prepare
        self._askers = {name: ThreadPoolExecutor(1, thread_name_prefix=f"reward-{name}") for name in parts}
        self._adder = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._complained: set[str] = set()

    def submit(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt], group: int | None = None) -> "Future[Judgement]":
        """Asks every reward now, and answers later."""
        drawn = torch.cuda.current_stream(images.device).record_event() if images.is_cuda else None
        asked = {name: self._askers[name].submit(self._ask, name, images, prompts, group, drawn) for name in self.parts}
        return self._adder.submit(lambda: self._add({name: future.result() for name, future in asked.items()}, prompts, group))

    def _add(self, told: Mapping[str, Judgement], prompts: Sequence[Prompt], group: int | None) -> Judgement:
        plain = combine({name: (self.parts[name][0], judgement) for name, judgement in told.items()})
        if self.prepare is None:
            return plain
        ready = {name: self.prepare(name, judgement, prompts, group) for name, judgement in told.items()}
        mixed = combine({name: (self.parts[name][0], judgement) for name, judgement in ready.items()})
        return replace(mixed, parts=plain.parts)

    @torch.no_grad()
    def _ask(self, name: str, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt], group: int | None, drawn: Any) -> Judgement:
        with _beside(images, drawn):
            try:
                return judge_now(self.parts[name][1], images, prompts, group)
            except VarlError:
                raise
            except Exception as error:  # a reward of the user's own may raise anything; the run goes on and counts the failure
                if name not in self._complained:
                    self._complained.add(name)
                    log.warning("reward %s failed for %d pictures: %s: %s", name, len(prompts), type(error).__name__, error, exc_info=error)
                return Judgement(value=torch.full((len(prompts),), torch.nan))

    def close(self) -> None:
        """Waits for what was asked, then ends the threads and closes the rewards that can be closed."""
        for executor in (*self._askers.values(), self._adder):
            executor.shutdown()
        for _, fn in self.parts.values():
            if (close := getattr(fn, "close", None)) is not None:
                close()
