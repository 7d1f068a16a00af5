"""Sums over processes. In a world of one each is the identity."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

BUCKET = 2**25
"""Elements per message."""


def all_sum(value: Tensor | float) -> Tensor:
    """The sum of `value` over processes, the same bits on each, where `value` was; a number is summed in fp64."""
    total = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64).detach().clone()
    if dist.is_initialized():
        sent = total.to(_device())
        dist.all_reduce(sent)
        total = sent.to(total.device)
    return total


@torch.no_grad()
def sum_gradients(parameters: Iterable[Parameter]) -> None:
    """Each gradient becomes its sum over processes. One that a process lacks counts as 0; one that all lack stays None. Backward has
    averaged the gradients of sharded parameters already; they are only multiplied."""
    if not dist.is_initialized():
        return
    parameters = list(parameters)
    for p in parameters:
        if isinstance(p, DTensor) and p.grad is not None:
            p.grad.mul_(dist.get_world_size())
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    have = all_sum(torch.tensor([float(p.grad is not None) for p in whole]))
    used = [p for p, processes in zip(whole, have.tolist(), strict=True) if processes]
    for bucket in _buckets(used):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        dist.all_reduce(flat)
        for p, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = grad.view_as(p).clone()


def clip_gradients(parameters: Iterable[Parameter], max_norm: float) -> Tensor:
    """The norm of all gradients, of which sharded ones count in full, before they are scaled down to `max_norm`."""
    norm = clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gather_metrics(metrics: Mapping[str, float], weight: float) -> dict[str, float]:
    """Means over processes with their `weight`, of each name over the processes that have it; names that end in /max are maxima."""
    if not dist.is_initialized():
        return dict(metrics)
    names = sorted({name for part in _gather(list(metrics)) for name in part})
    here = torch.tensor([weight if name in metrics else 0.0 for name in names], dtype=torch.float64)
    value = torch.tensor([metrics.get(name, 0.0) for name in names], dtype=torch.float64)
    mean = all_sum(torch.where(here > 0, here * value, 0.0)) / all_sum(here)
    most = torch.tensor([metrics.get(name, -torch.inf) for name in names], dtype=torch.float64).to(_device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {name: m if name.endswith("/max") else x for name, m, x in zip(names, most.tolist(), mean.tolist(), strict=True)}


def _gather(names: list[str]) -> list[list[str]]:
    """The lists of all processes. Names travel as UTF-8 bytes: nothing is pickled."""
    data = torch.frombuffer(bytearray("\n".join(names).encode() or b"\n"), dtype=torch.uint8).to(_device())
    sizes = [torch.zeros(1, dtype=torch.long, device=data.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=data.device))
    longest = max(int(size) for size in sizes)
    padded = torch.cat([data, data.new_zeros(longest - len(data))])
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    texts = [bytes(part[: int(size)].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]
    return [[name for name in text.split("\n") if name] for text in texts]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _buckets(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """Runs of parameters of one dtype and device, of at most BUCKET elements together."""
    buckets: list[list[Parameter]] = []
    room = 0
    for p in parameters:
        if not buckets or room < p.numel() or (p.dtype, p.device) != (buckets[-1][-1].dtype, buckets[-1][-1].device):
            buckets.append([])
            room = BUCKET
        buckets[-1].append(p)
        room -= p.numel()
    return buckets
