"""Ranks, the processes that torchrun starts to train one model, and their communication."""

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from softmax_fused.training.errors import AllRanksError, LabError, UsageError
from softmax_fused.training.ranks.devices import pick_device
from softmax_fused.training.signals import ignore_signals
from softmax_fused.training.wording import plural

T = TypeVar("T")

CPU = torch.device("cpu")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NO_ID = "none"  # what torchrun calls a job without --rdzv-id


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` that train together. A single process communicates with no other.

    `local_rank` and `local_size` count the ranks on this machine. `job` names the torchrun job and stays the same when
    torchrun restarts the ranks.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    job: str | None = None

    @property
    def program(self) -> str:
        """Return the command that starts this program with as many ranks on this machine."""
        if self.size == 1:
            return "softmax-fused"
        return f"torchrun --nproc-per-node={self.local_size} -m softmax_fused"

    def shard(self, rows: Tensor) -> Tensor:
        """Return rows `rank`, `rank` + `size`, ...; a rank without rows gets the first one, whose loss counts 0 times.

        Every rank must take part in the averaging of gradients, also with nothing to add.
        """
        if self.size == 1:
            return rows
        part = rows[self.rank :: self.size]
        return part if len(part) else rows[:1]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, on the CPU; for a single process, the values as they are."""
        if self.size == 1:
            return values
        total = values.to(CPU, copy=True)
        dist.all_reduce(total)
        return total

    def call_on_first(self, call: Callable[[], T]) -> T:
        """Call on rank 0 and return its result on every rank; if it fails, rank 0 reports that and the others exit."""
        if self.size == 1:
            return call()
        if self.rank == 0:
            try:
                answer = [call(), None]
            except Exception as error:
                dist.broadcast_object_list([None, getattr(error, "status", 1)], src=0, device=CPU)
                raise
        else:
            answer = [None, None]
        dist.broadcast_object_list(answer, src=0, device=CPU)
        if answer[1] is not None:
            raise SystemExit(answer[1])
        return answer[0]  # type: ignore[return-value]

    def call_local_first(self, call: Callable[[], T]) -> T:
        """Call on every rank, on a machine's first rank before its others, which then find the files it has written."""
        if self.size == 1:
            return call()
        try:
            result = call() if self.local_rank == 0 else None
        except Exception:
            self._barrier()
            raise
        self._barrier()
        return call() if result is None else result

    def check_equal(self, what: str, value: Any) -> None:
        """Raise `AllRanksError` unless `value` is equal on all ranks."""
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise AllRanksError(
                    f"expected the same {what} on every rank, got {values[0]} on rank 0 and {other} on rank {rank}; "
                    "give torchrun the same command on every machine"
                )

    def pick_device(self, name: str) -> torch.device:
        """Return the device called `name`; of several ranks, each takes a GPU of its own.

        Raises:
            UsageError: if several ranks would use one device that is not the CPU.
            LabError: if this machine has fewer GPUs than ranks.
        """
        device = pick_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise UsageError(
                f"expected --device auto, cpu or cuda with several ranks, each of which takes its own GPU, got {name}"
            )
        found = torch.cuda.device_count()
        if self.local_rank >= found:
            raise LabError(
                f"expected {self.local_size} {plural('GPU', self.local_size)}, one for each rank here, got {found}; "
                f"choose --nproc-per-node={found} or --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def _barrier(self) -> None:
        self.sum(torch.zeros(1))


SINGLE_PROCESS = Ranks()


def torchrun_ranks() -> Ranks:
    """Return this process's place among the ranks that torchrun started, `SINGLE_PROCESS` without torchrun."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return SINGLE_PROCESS
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in ENVIRONMENT)
    return Ranks(rank, size, local_rank, local_size, _job(os.environ["TORCHELASTIC_RUN_ID"]))


def _job(run_id: str) -> str:
    """Return the job's name, fit for a file name: its id, or else the host and number of torchrun's process."""
    name = f"{socket.gethostname()}-{os.getppid()}" if run_id == NO_ID else run_id
    return re.sub(r"[^\w.-]", "_", name)


@contextmanager
def process_group(ranks: Ranks) -> Iterator[None]:
    """Connect several ranks inside the block: by gloo between CPUs, by NCCL between GPUs.

    Raises:
        LabError: if a rank ends before the block does.
    """
    if ranks.size == 1:
        yield
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        with signals_ignored_on_failure():
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backend, store=_store(ranks), rank=ranks.rank, world_size=ranks.size)
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(ranks: Ranks) -> Any:
    """Return torchrun's store with a prefix of its own for each restart.

    On one machine the store outlives a restart and still holds the addresses of ranks that have ended. Several machines
    count restarts independently, so that their ranks have no common number to use as a prefix.
    """
    from torch.distributed.rendezvous import rendezvous  # absent where torch was built without distributed

    store = next(rendezvous("env://"))[0]
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if ranks.local_size == ranks.size else "any"
    return dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]


@contextmanager
def signals_ignored_on_failure() -> Iterator[None]:
    """Ignore torchrun's SIGTERM while a failing rank reports its own error.

    torchrun stops the other ranks as soon as one has failed, and these fail as well, from the lost connection.
    """
    try:
        yield
    except RuntimeError as error:
        ignore_signals()
        if not is_lost_rank(error):
            raise
        raise LabError(describe_lost_rank(error)) from error
    except BaseException:
        ignore_signals()
        raise


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank no longer answers; gloo raises a plain RuntimeError for it."""
    if isinstance(error, LabError):
        return False
    return isinstance(error, dist.DistError) or re.search(r"gloo|nccl|connection", str(error), re.I) is not None


def describe_lost_rank(error: RuntimeError) -> str:
    """Return the message for a lost rank; why that rank ended is in its own output or in torchrun's report."""
    reason = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]  # without gloo's source line
    return f"expected every rank to go on, got one that ended ({reason}); torchrun names the first to fail"


def refuse_several_ranks(command: str) -> None:
    """Raise `UsageError` if torchrun started several ranks of a command that one process carries out."""
    if torchrun_ranks().size > 1:
        raise UsageError(
            f"expected softmax-fused {command} in one process, got several ranks; start it without torchrun"
        )
