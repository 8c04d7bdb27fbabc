"""Ranks: the processes that torchrun starts to train one model, and what they tell one another."""

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

from softmax_fused.training.config import pick_device
from softmax_fused.training.errors import CommonError, LabError, UsageError
from softmax_fused.training.signals import ignore_signals
from softmax_fused.training.wording import plural

T = TypeVar("T")

CPU = torch.device("cpu")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NO_ID = "none"  # what torchrun calls a job without --rdzv-id


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone, it asks nobody.

    `local` and `local_size` count the ranks of this machine. `job` is the same when torchrun starts its ranks again.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    job: str | None = None

    @property
    def program(self) -> str:
        """Return how this program is started on this machine, with as many ranks."""
        if self.size == 1:
            return "softmax-fused"
        return f"torchrun --nproc-per-node={self.local_size} -m softmax_fused"

    def share(self, rows: Tensor) -> Tensor:
        """Return every size-th row, from the rank-th on; where there is none, the first, to be counted 0 times."""
        if self.size == 1:
            return rows
        part = rows[self.rank :: self.size]
        return part if len(part) else rows[:1]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, on the CPU; alone, the values as they are."""
        if self.size == 1:
            return values
        total = values.to(CPU, copy=True)
        dist.all_reduce(total)
        return total

    def from_first(self, call: Callable[[], T]) -> T:
        """Return on every rank what `call` returns on the first; if it fails there, that rank alone reports it."""
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

    def by_turns(self, call: Callable[[], T]) -> T:
        """Return what `call` returns; the first rank of a machine calls it before the others, which find its files."""
        if self.size == 1:
            return call()
        try:
            result = call() if self.local == 0 else None
        except Exception:
            self._meet()
            raise
        self._meet()
        return call() if result is None else result

    def check_same(self, what: str, value: Any) -> None:
        """Raise `CommonError` unless all have an equal `value`."""
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise CommonError(
                    f"expected the same {what} on every rank, got {values[0]} on rank 0 and {other} on rank {rank}; "
                    "give torchrun the same command on every machine"
                )

    def pick_device(self, name: str) -> torch.device:
        """Return the device called `name`: of several ranks on GPUs each takes its own.

        Raises:
            UsageError: if several ranks are to share a device that is not the CPU.
            LabError: if this machine has too few GPUs.
        """
        device = pick_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise UsageError(
                f"expected --device auto, cpu or cuda with several ranks, each of which takes its own GPU, got {name}"
            )
        found = torch.cuda.device_count()
        if self.local >= found:
            raise LabError(
                f"expected {self.local_size} {plural('GPU', self.local_size)}, one for each rank here, got {found}; "
                f"choose --nproc-per-node={found} or --device cpu"
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def _meet(self) -> None:
        self.sum(torch.zeros(1))


ALONE = Ranks()


def torchrun_ranks() -> Ranks:
    """Return what torchrun's environment says of this process; without torchrun it is alone."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return ALONE
    rank, size, local, here = (int(os.environ[name]) for name in ENVIRONMENT)
    return Ranks(rank, size, local, here, _job(os.environ["TORCHELASTIC_RUN_ID"]))


def _job(run_id: str) -> str:
    """Return the name of the job, fit for a file name; without an id it is that of torchrun's process."""
    name = f"{socket.gethostname()}-{os.getppid()}" if run_id == NO_ID else run_id
    return re.sub(r"[^\w.-]", "_", name)


@contextmanager
def connected(ranks: Ranks) -> Iterator[None]:
    """Have several ranks reach one another inside the block: by gloo, and from GPU to GPU by NCCL.

    Raises:
        LabError: if one of them ends before the block does.
    """
    if ranks.size == 1:
        yield
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        with ending_heard_out():
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backend, store=_store(ranks), rank=ranks.rank, world_size=ranks.size)
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(ranks: Ranks) -> Any:
    """Return torchrun's store, which on one machine outlives a restart: no rank may find addresses of dead ones there.

    Machines count restarts each by itself, so that their ranks have no number in common.
    """
    from torch.distributed.rendezvous import rendezvous  # not there where torch was built without distributed

    store = next(rendezvous("env://"))[0]
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if ranks.local_size == ranks.size else "any"
    return dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]


@contextmanager
def ending_heard_out() -> Iterator[None]:
    """Have a rank that fails say why, though torchrun tells it to stop as soon as another has failed."""
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
    """Whether an error is that of a collective whose other ranks no longer answer; gloo's has no class of its own."""
    if isinstance(error, LabError):
        return False
    return isinstance(error, dist.DistError) or re.search(r"gloo|nccl|connection", str(error), re.I) is not None


def describe_lost_rank(error: RuntimeError) -> str:
    """Return what to say of it: the other rank's own output, or torchrun's report, says why it ended."""
    reason = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]  # without gloo's source line
    return f"expected every rank to go on, got one that ended ({reason}); torchrun names the first to fail"


def refuse_several(command: str) -> None:
    """Raise `UsageError` if torchrun started several ranks of a command that one process does."""
    if torchrun_ranks().size > 1:
        raise UsageError(
            f"expected softmax-fused {command} in one process, got several ranks; start it without torchrun"
        )
