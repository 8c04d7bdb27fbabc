"""What four ranks run to train the softmax model on a mesh of two dimensions, rows by classes, against one process."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import softmax_fused
from softmax_fused import cross_entropy, distributed
from softmax_fused.training.config import TrainConfig, learner_for
from softmax_fused.training.data.batches import make_batches
from softmax_fused.training.data.datasets import ImageData, data_root, load_dataset
from softmax_fused.training.models.evaluation import confusion_matrix, predict_classes
from softmax_fused.training.models.loop import train_epoch
from softmax_fused.training.ranks.group import CPU, Ranks
from softmax_fused.training.ranks.shards import EpochShards

GUIDE = Path(__file__).parents[1] / "docs/distributed.md"
CONFIG = TrainConfig(loss="torch", batch_size=50, epochs=2, device="cpu")


class Parallel(NamedTuple):
    """A way to train on the mesh: the loss of a rank's rows, what to optimise, and the whole weight and bias."""

    loss: Callable[[Tensor, Tensor], Tensor]
    parameters: list[Tensor]
    gather: Callable[[], list[Tensor]]
    whole_batches: bool = False


def joined(parameters: Iterable[Tensor], group: Any) -> list[Tensor]:
    """Return the whole of what the ranks of a group hold slices of."""
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, [it.detach() for it in parameters], group=group)
    return [torch.cat(slices) for slices in zip(*parts, strict=True)]


def uneven_slices(model: nn.Sequential, mesh: DeviceMesh) -> Parallel:
    """Plain tensors: 3 and 7 classes."""
    group, sizes = mesh.get_group("classes"), [3, 7]
    rank = mesh.get_local_rank("classes")
    head = nn.Linear(model[1].in_features, sizes[rank])
    for own, whole in zip(head.parameters(), model.parameters(), strict=True):
        own.data.copy_(whole.split(sizes)[rank])
    replica = DistributedDataParallel(head, process_group=mesh.get_group("data"))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return distributed.cross_entropy(replica(x.flatten(1)), y, group=group)

    return Parallel(loss, list(head.parameters()), lambda: joined(head.parameters(), group))


def plan(model: nn.Sequential, mesh: DeviceMesh) -> Parallel:
    """A tensor-parallel plan under DistributedDataParallel."""
    parts = copy.deepcopy(model)
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(parts, mesh["classes"], {"1": head})
    replica = DistributedDataParallel(parts, device_mesh=mesh["data"])
    local = list(replica.parameters())  # it makes plain tensors of them, and DTensors again while the model runs

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(replica(x), y).to_local()

    return Parallel(loss, local, lambda: joined(local, mesh.get_group("classes")))


def dtensors(model: nn.Sequential, mesh: DeviceMesh) -> Parallel:
    """DTensors for all of it: rows divided along one dimension of the mesh, classes along the other."""
    weight, bias = (
        nn.Parameter(distribute_tensor(it.data, mesh, [Replicate(), Shard(0)])) for it in model.parameters()
    )

    def loss(x: Tensor, y: Tensor) -> Tensor:
        rows, labels = (distribute_tensor(it, mesh, [Shard(0), Replicate()]) for it in (x.flatten(1), y))
        return cross_entropy(F.linear(rows, weight, bias), labels).to_local()

    return Parallel(loss, [weight, bias], lambda: [weight.full_tensor(), bias.full_tensor()], whole_batches=True)


def curve(way: Parallel, data: ImageData, config: TrainConfig, ranks: Ranks, group: Any) -> Iterator[float]:
    """Train, and yield each epoch's mean loss."""
    optimizer = torch.optim.SGD(way.parameters, lr=config.lr)
    ranks = Ranks() if way.whole_batches else ranks
    batches = make_batches(data.train, config.batch_size, config.seed, CPU, 0, ranks)
    for epoch in range(1, config.epochs + 1):
        total = torch.zeros((), dtype=torch.float64)
        shards = EpochShards(ranks, len(data.train), config.batch_size)
        for (x, y), shard in zip(batches.epoch(epoch), shards, strict=True):
            optimizer.zero_grad()
            loss = way.loss(x, y)
            (loss * shard.factor).backward()
            optimizer.step()
            total += loss.item() * shard.examples
        if not way.whole_batches:
            dist.all_reduce(total, group=group)
        yield total.item() / len(data.train)


def trained_on_mesh(data: ImageData, config: TrainConfig, tolerance: float = 1e-5) -> None:
    """Each way gives the loss curve, the weights and the confusion matrix of one process."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    ranks = Ranks(mesh.get_local_rank("data"), 2)
    learner = learner_for(config, len(data.classes), CPU)
    start = copy.deepcopy(learner.model)
    batches = make_batches(data.train, config.batch_size, config.seed, CPU)
    alone = [train_epoch(learner, batches.epoch(epoch))[0] for epoch in range(1, config.epochs + 1)]
    expected = [it.detach().clone() for it in learner.model.parameters()]
    counts = confusion_matrix(predict_classes(learner, data.test), data.test, 10)
    for build in (uneven_slices, plan, dtensors):
        way = build(copy.deepcopy(start), mesh)
        losses = list(curve(way, data, config, ranks, mesh.get_group("data")))
        torch.testing.assert_close(
            losses, alone, rtol=0, atol=tolerance, msg=lambda text, build=build: f"{build} {text}"
        )
        whole = way.gather()
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=tolerance)
        with torch.no_grad():
            for own, gathered in zip(learner.model.parameters(), whole, strict=True):
                own.copy_(gathered)
        found = confusion_matrix(predict_classes(learner, data.test), data.test, 10)
        assert (found - counts).abs().sum() <= 0.002 * len(data.test)


def guide(rank: int, world: int) -> None:
    """The blocks of the guide, as they stand there."""
    text = GUIDE.read_text()
    slices, layer, recipes, both = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    x, y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    names: dict[str, Any] = {"torch": torch, "features": 8, "local_classes": rank + 1, "x": x, "target": y}
    with mock.patch.object(dist, "init_process_group"):  # done
        exec(slices, names)
    logits: list[Any] = [None] * world
    dist.all_gather_object(logits, names["head"](x).detach())
    expected = F.cross_entropy(torch.cat(logits, 1), y, label_smoothing=0.1)
    torch.testing.assert_close(names["loss"].detach(), expected)
    exec(layer, names)
    expected = F.cross_entropy(torch.cat(logits, 1), y)
    torch.testing.assert_close(names["loss"].detach(), expected)
    names |= {"target": torch.where(y % 3 == 1, -100, y), "token_weight": torch.arange(6)}
    exec(recipes, names)
    p, kept = torch.cat(logits, 1).softmax(1), y % 3 != 1
    losses, of_label = F.cross_entropy(torch.cat(logits, 1), y, reduction="none") * kept, p[torch.arange(6), y]
    expected_losses = {
        "z_loss": (losses + 1e-4 * kept * torch.cat(logits, 1).logsumexp(1).square()).sum() / kept.sum(),
        "weighted": (torch.arange(6) * losses).sum() / 15,
        "fine_tuned": (of_label * losses).sum() / kept.sum(),
        "with_entropy": (losses + 0.01 * kept * (p * p.log()).sum(1)).sum() / kept.sum(),
    }
    for name, value in expected_losses.items():
        torch.testing.assert_close(names[name].detach(), value)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 10))
    alone = copy.deepcopy(model)
    share = slice(rank // 2 * 3, rank // 2 * 3 + 3)
    names = {"torch": torch, "softmax_fused": softmax_fused, "device": "cpu", "model": model}
    names["batches"] = [(x[share], y[share])]
    exec(both, names)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    F.cross_entropy(alone(x), y).backward()
    optimizer.step()
    for own, whole in zip(names["optimizer"].param_groups[0]["params"], alone.parameters(), strict=True):
        torch.testing.assert_close(own, whole.chunk(2)[rank % 2])


def softmax_model_on_a_mesh(rank: int, world: int) -> None:
    """Digits, with a last batch of one image: a rank has none of it."""
    trained_on_mesh(load_dataset("digits", Path()).head(301, 99), CONFIG)


def softmax_model_on_a_mesh_with_real_data(rank: int, world: int) -> None:
    """Fashion-MNIST."""
    data = load_dataset("fashion-mnist", data_root()).head(6_000, 2_000)
    trained_on_mesh(data, replace(CONFIG, batch_size=256))
