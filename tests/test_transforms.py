"""torch.func and its kin: everything that works with torch's loss works with ours."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softmax_fused import cross_entropy
from tests.cases import make_indices, make_logits, make_probabilities
from tests.conftest import Place

Loss = Callable[[Tensor, Tensor], Tensor]


def per_sample(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.func.vmap(torch.func.grad(loss))


def tangent(loss: Loss) -> Callable[[Tensor, Tensor], object]:
    return lambda z, t: torch.func.jvp(lambda z: loss(z, t), (z,), (torch.ones_like(z),))


def linear(loss: Loss) -> Callable[[Tensor, Tensor], object]:
    def evaluate(z: Tensor, t: Tensor) -> object:
        value, pushforward = torch.func.linearize(lambda z: loss(z, t), z)
        return value, pushforward(torch.ones_like(z))

    return evaluate


TRANSFORMS = {
    "grad": torch.func.grad,
    "vmap": torch.func.vmap,
    "vmap of grad": per_sample,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "jvp": tangent,
    "linearize": linear,
    "functionalize": torch.func.functionalize,
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch.func.linearize's own
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_transform(place: Place, transform: Callable[[Loss], Callable[..., object]], probabilities: bool) -> None:
    shape = (4, 3, 5)  # a leading dimension for vmap to take away
    logits = make_logits(shape, torch.float64, place.device).detach()
    make = make_probabilities(shape, torch.float64, place.device)
    target = make if probabilities else make_indices(shape, place.device) % 3

    def ours(z: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(z, t, label_smoothing=0.1, backend=place.backend)

    def theirs(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, label_smoothing=0.1)

    if not probabilities and transform in (torch.func.vmap, per_sample):
        target = target % 3  # rows are (3, 5) then: classes lie first
        logits = logits.transpose(1, 2).contiguous()
    torch.testing.assert_close(transform(ours)(logits, target), transform(theirs)(logits, target))


def test_batched_upstream_gradients(place: Place) -> None:
    logits, target = make_logits((3, 4), torch.float64, place.device), make_indices((3, 4), place.device)
    loss = cross_entropy(logits, target, reduction="none", backend=place.backend)
    eye = torch.eye(3, dtype=torch.float64, device=place.device)
    (batched,) = torch.autograd.grad(loss, logits, eye, is_grads_batched=True, retain_graph=True)
    for row, upstream in zip(batched, eye, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0])


def test_forward_mode(place: Place) -> None:
    logits, target = make_logits((3, 4), torch.float64, place.device).detach(), make_indices((3, 4), place.device)
    direction = torch.randn_like(logits)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, direction)
        tangents = [
            torch.autograd.forward_ad.unpack_dual(loss).tangent
            for loss in (cross_entropy(dual, target, backend=place.backend), F.cross_entropy(dual, target))
        ]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(place: Place, reentrant: bool) -> None:
    logits, target = make_logits((8, 10), torch.float32, place.device), make_indices((8, 10), place.device)

    def loss(z: Tensor) -> Tensor:
        return cross_entropy(2 * z, target, backend=place.backend)

    (expected,) = torch.autograd.grad(loss(logits), logits)
    checkpoint(loss, logits, use_reentrant=reentrant).backward()
    assert torch.equal(logits.grad, expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode(place: Place) -> None:
    logits, target = make_logits((8, 10), torch.float32, place.device), make_indices((8, 10), place.device)
    with torch.autograd.detect_anomaly(check_nan=True):
        cross_entropy(logits, target, backend=place.backend).backward()
    bad = logits.detach().clone().fill_(torch.nan).requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="returned nan"):
        cross_entropy(bad, target, backend=place.backend).backward()


def test_every_subset_of_gradients(place: Place) -> None:
    for wanted in range(1, 8):
        tensors = [
            make_logits((4, 5), torch.float64, place.device).detach(),
            make_probabilities((4, 5), torch.float64, place.device),
            torch.rand(5, dtype=torch.float64, device=place.device),
        ]
        leaves = [t.requires_grad_() for i, t in enumerate(tensors) if wanted >> i & 1]
        ours = torch.autograd.grad(cross_entropy(*tensors, backend=place.backend), leaves)
        torch.testing.assert_close(ours, torch.autograd.grad(F.cross_entropy(*tensors), leaves))
