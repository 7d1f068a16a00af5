"""Run by test_distributed.py under torchrun: rank 0 writes what the processes found, as JSON."""

import copy
import json
import sys

import torch
from torch import nn

from varl.config import OptimConfig
from varl.distributed.mesh import barrier, join, leave
from varl.distributed.reduce import all_sum, clip_gradients, gather_metrics, sum_gradients
from varl.distributed.shard import full_state, load_full, load_full_optimizer, shard_, whole
from varl.train.optim import build_optimizer


class Tiny(nn.Module):
    """Two attention blocks, entered by forward and left by `read`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(12, 11)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x

    def read(self, x):
        return self.head(x)


def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


IDS = torch.randint(11, (8, 5), generator=torch.Generator().manual_seed(1))


def loss(net: Tiny, ids) -> torch.Tensor:
    return nn.functional.cross_entropy(net.read(net(ids)).flatten(0, 1), ids.roll(1, 1).flatten(), reduction="sum")


def rows(rank: int, size: int):
    """Unequal shares, so that a mean of means would be wrong."""
    return IDS if size == 1 else IDS[:3] if rank == 0 else IDS[3:]


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad).clone() for name, p in net.named_parameters() if p.grad is not None}


def gap(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def steps(net: nn.Module, optimizer, world, count: int) -> float:
    norm = torch.zeros(())
    for _ in range(count):
        optimizer.zero_grad()
        loss(net, rows(world.rank, world.size)).backward()
        sum_gradients(net.parameters())
        norm = clip_gradients(net.parameters(), 1.0)
        optimizer.step()
    return float(norm)


def main() -> None:
    world = join("cpu")
    alone = model()
    loss(alone, IDS).backward()
    want = gradients(alone)
    found = {"size": world.size, "largest": max(float(g.abs().max()) for g in want.values()), "norms": {}, "gaps": {}}
    found["norms"]["alone"] = float(clip_gradients(alone.parameters(), 1.0))
    ours = torch.tensor([float(world.rank + 1)])
    found["sums"] = [all_sum(0.1).item(), all_sum(ours).item(), ours.item() - world.rank]
    found["metrics"] = gather_metrics(
        {"both": world.rank * 4.0, "gap/max": 1.0 - world.rank, **({"one": 7.0} if world.rank else {})}, weight=1.0 + 2 * world.rank
    )

    nets = {"replicated": model(), "sharded": shard_(model(), world, methods=["read"])}
    for name, net in nets.items():
        loss(net, rows(world.rank, world.size)).backward()
        sum_gradients(net.parameters())
        found["gaps"][name] = gap(want, gradients(net))
        found["norms"][name] = float(clip_gradients(net.parameters(), 1.0))

    single = model()
    lone = build_optimizer(single, OptimConfig(name="muon", lr=1e-2))
    for _ in range(4):
        lone.zero_grad()
        loss(single, IDS).backward()
        clip_gradients(single.parameters(), 1.0)
        lone.step()
    split = shard_(model(), world, methods=["read"])
    optimizer = build_optimizer(split, OptimConfig(name="muon", lr=1e-2))
    steps(split, optimizer, world, 2)
    saved, moments = full_state(split.state_dict()), copy.deepcopy(full_state(optimizer.state_dict()))
    again = shard_(Tiny(), world, methods=["read"])
    resumed = build_optimizer(again, OptimConfig(name="muon", lr=1e-2))
    load_full(again, saved)
    load_full_optimizer(resumed, moments)
    for net, mover in ((split, optimizer), (again, resumed)):
        steps(net, mover, world, 2)
    found["resumed"] = gap(full_state(split.state_dict()), full_state(again.state_dict()))
    # logits, because weights that do not matter (a key's bias) have gradients of pure rounding, which AdamW makes large
    start, one, two = (net.read(net(IDS)).detach() for net in (model(), single, split))
    found["moved"], found["trained"] = float((one - start).abs().max()), float((one - two).abs().max())
    barrier()
    if world.first:
        with open(sys.argv[1], "w") as out:
            json.dump(found, out)
    leave()


if __name__ == "__main__":
    main()
