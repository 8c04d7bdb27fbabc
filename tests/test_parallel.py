"""The loss in several threads, in forked workers, and under DistributedDataParallel."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from softmax_fused import CrossEntropyLoss, cross_entropy
from tests.cases import make_indices, make_logits
from tests.conftest import Place


def test_threads_at_once(place: Place) -> None:
    logits = [make_logits((64, 20), torch.float32, place.device) for _ in range(16)]
    target = make_indices((64, 20), place.device)

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad(cross_entropy(z, target, backend=place.backend), z)[0]

    expected = [gradient(z) for z in logits]
    if place.backend == "triton" and place.device == "cpu":
        pytest.skip("Triton's interpreter patches its language module while a kernel runs: one thread only")
    with ThreadPoolExecutor(8) as pool:
        for ours, alone in zip(pool.map(gradient, logits), expected, strict=True):
            assert torch.equal(ours, alone)


class Losses(Dataset[Tensor]):
    """Computes a loss in the worker process."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return cross_entropy(torch.zeros(2, index + 2), torch.zeros(2, dtype=torch.long), backend="torch")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_loader_workers() -> None:
    cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), backend="torch")  # used before the fork
    losses = torch.cat(list(DataLoader(Losses(), num_workers=2, multiprocessing_context="fork")))
    torch.testing.assert_close(losses, torch.arange(2.0, 6.0).log())


def train_one_step(rank: int, world: int, folder: str) -> None:
    os.environ.update(OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(6, 4))
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    CrossEntropyLoss(backend="torch")(model(x[part]), y[part]).backward()
    torch.save(model.module.weight.grad, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_distributed_data_parallel_on_gloo(tmp_path: Path) -> None:
    mp.start_processes(train_one_step, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    nn.CrossEntropyLoss()(model(x), y).backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), model.weight.grad)
