"""Who we are among the processes of a run."""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from varl.errors import VarlError

PATIENCE = 30.0
"""Seconds that the other processes have to end after the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One process of `size`, with its device. A run of one process is a world of one."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Which process of how many this is, and where they meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Which GPU of its machine is its own."""
    meeting: str = "env://"
    """torch's `init_method`."""


def torchrun_seat() -> Seat:
    """What torchrun's environment says; the only process without it."""
    rank, size, local = (int(os.environ.get(name, other)) for name, other in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    return Seat(rank=rank, size=size, local_rank=local)


def join(device: str = "auto", seat: Seat | None = None) -> World:
    """The world in which `seat` (torchrun's, if none is given) is a place: gloo on the CPU, nccl on CUDA, one GPU per local rank. `auto`
    takes CUDA where there is any."""
    seat = seat or torchrun_seat()
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = torch.device("cuda", seat.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    if seat.size > 1:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=seat.meeting, rank=seat.rank, world_size=seat.size, device_id=local if cuda else None)
    return World(rank=seat.rank, size=seat.size, device=local)


def leave() -> None:
    """Undoes `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def side_by_side(processes: int, work: Callable[[Seat], object]) -> Iterator[Seat]:
    """This process is the first of `processes` on this machine, which meet in a file: within, the others do `work` (picklable) at their
    seats, and all share the threads that this one has. For more than one machine there is torchrun.

    Raises VarlError where another process ended before its work was done; one that is still at it when this one fails is killed."""
    if processes == 1:
        yield torchrun_seat()
        return
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    each = max(1, threads // processes)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", next(name for _, name in socket.if_nameindex() if name.startswith("lo")))
    with tempfile.TemporaryDirectory(prefix="varl-") as folder:
        seats = [Seat(rank=r, size=processes, local_rank=r, meeting=f"file://{folder}/meeting") for r in range(processes)]
        others = [context.Process(target=_work, args=(work, seat, each)) for seat in seats[1:]]
        for other in others:
            other.start()
        torch.set_num_threads(each)
        try:
            yield seats[0]
            for other in others:
                other.join(PATIENCE)
        except RuntimeError as error:  # gloo's and nccl's, when another process is gone
            lost = [seat.rank for seat, other in zip(seats[1:], others, strict=True) if other.exitcode not in (None, 0)]
            if lost:
                raise VarlError(f"process {lost[0]} of this run ended early; its reason is above. The last checkpoint is whole.") from error
            raise
        finally:
            torch.set_num_threads(threads)
            for other in others:
                if other.exitcode is None:
                    other.kill()
                other.join()


def _work(work: Callable[[Seat], object], seat: Seat, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        work(seat)
    except VarlError as error:
        sys.exit(f"process {seat.rank}: {error}")
