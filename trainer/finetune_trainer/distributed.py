"""This worker's place among the others, and the few collectives that the loop itself needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from finetune_api.errors import SpecError

T = TypeVar("T")

_TORCHRUN: Final = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun gives every worker


@dataclass(frozen=True)
class SequenceGroup:
    """The workers that share one sequence, as one of them sees it: consecutive ranks, so mostly on one node."""

    rank: int  # in the group
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class World:
    """The process group as one worker sees it."""

    rank: int
    size: int
    device: torch.device
    sequence: SequenceGroup | None = None  # None: every worker has sequences of its own

    @property
    def data_rank(self) -> int:
        """Which share of a global batch this worker takes, alone or with those that share its sequences."""
        return self.rank // (self.sequence.size if self.sequence else 1)

    @property
    def data_size(self) -> int:
        """Into how many shares a global batch is cut."""
        return self.size // (self.sequence.size if self.sequence else 1)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the workers, in float64. A collective."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        result: list[float] = tensor.tolist()
        return result

    def from_first(self, value: T) -> T:
        """Rank 0's value. A collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every worker's value, by rank. A collective."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.barrier()


def wait_for_collectives(seconds: float) -> None:
    """Sets how long a collective may take, for every group that is made from now on, also by libraries.

    torch's own default is 10 minutes with nccl: less than a large model takes to be written by one rank.
    """
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # where torch looks; there is no function for it
        assert hasattr(distributed_c10d, name)
        setattr(distributed_c10d, name, timedelta(seconds=seconds))


def join_world(sequence_parallel: int = 1) -> World:
    """Joins the process group: the one that is there (Ray made it), torchrun's, or a group of this process alone.

    Uses the GPU of this worker's local rank with nccl, or the CPU with gloo.

    Args:
        sequence_parallel: workers that share one sequence.

    Raises:
        SpecError: that many do not divide the world.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if cuda:
        # A launcher may show each worker its own GPU only.
        local_rank %= torch.cuda.device_count()
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads it
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if os.environ.keys() >= _TORCHRUN:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return World(dist.get_rank(), dist.get_world_size(), device, _sequence_group(sequence_parallel))


def leave(code: int) -> NoReturn:
    """Ends this process as it is: torch's threads sometimes abort one that is torn down, after all its work is done.

    Seen once in some hundred ends, on a busy machine: "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _sequence_group(size: int) -> SequenceGroup | None:
    if size == 1:
        return None
    if dist.get_world_size() % size:
        raise SpecError(
            f"{dist.get_world_size()} workers cannot be cut into groups of {size}",
            where="spec.deepspeed.sequenceParallel",
            hint="choose a divisor of the number of processes",
        )
    group, _ = dist.new_subgroups(group_size=size)
    return SequenceGroup(dist.get_rank(group), size, group)
