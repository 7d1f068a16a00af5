"""Who we are among the processes of a run."""

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One process of `size`, with its device. A run without torchrun is a world of one."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0


def join(device: str = "auto") -> World:
    """The world that torchrun's environment describes, joined: gloo on the CPU, nccl on CUDA, one GPU per local rank. `auto` takes CUDA
    where there is any."""
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=local)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=local if cuda else None)
    return World(rank=dist.get_rank(), size=size, device=local)


def leave() -> None:
    """Undoes `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        dist.barrier()
