"""What autograd promises: backward twice, any upstream gradient, second order, saved tensors that changed."""

import pytest
import torch
import torch.nn.functional as F

from softmax_fused import cross_entropy
from tests.cases import make_indices, make_logits, make_probabilities
from tests.conftest import INTERPRETER, Place


def test_backward_twice_gives_the_same_gradient_twice(place: Place) -> None:
    logits, target = make_logits((8, 10), torch.float32, place.device), make_indices((8, 10), place.device)
    loss = cross_entropy(logits, target, backend=place.backend)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    assert first.abs().sum() > 0


def test_gradients_accumulate_over_uses_of_the_same_logits(place: Place) -> None:
    logits, target = make_logits((8, 10), torch.float64, place.device), make_indices((8, 10), place.device)
    loss = cross_entropy(logits, target, backend=place.backend)
    (once,) = torch.autograd.grad(loss, logits)
    total = cross_entropy(logits, target, backend=place.backend) + 2 * cross_entropy(
        logits, target, backend=place.backend
    )
    total.backward()
    torch.testing.assert_close(logits.grad, 3 * once)


@pytest.mark.parametrize("upstream", [0.0, 1.0, -3.0, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_gradient_scales(place: Place, upstream: float, reduction: str) -> None:
    logits, target = make_logits((8, 10), torch.float64, place.device), make_indices((8, 10), place.device)
    loss = cross_entropy(logits, target, reduction=reduction, backend=place.backend)
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, logits, torch.tensor(upstream, device=place.device, dtype=torch.float64))
    torch.testing.assert_close(scaled, upstream * one)


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_first_and_second_derivatives(place: Place, reduction: str, weighted: bool, probabilities: bool) -> None:
    shape = (2, 3, 2)
    logits = make_logits(shape, torch.float64, place.device, scale=1.0)
    make = make_probabilities(shape, torch.float64, place.device)
    target = make if probabilities else make_indices(shape, place.device)
    if not probabilities:
        target[0, 0] = -100
    weight = torch.rand(3, dtype=torch.float64, device=place.device) if weighted else None

    def loss(z: torch.Tensor) -> torch.Tensor:
        return cross_entropy(z, target, weight, reduction=reduction, label_smoothing=0.1, backend=place.backend)

    quick = {"fast_mode": place == INTERPRETER}  # every entry of the Jacobian is a launch: slow there
    assert torch.autograd.gradcheck(loss, (logits,), **quick)
    assert torch.autograd.gradgradcheck(loss, (logits,), **quick)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 4, 5)], ids=str)
def test_second_order_is_not_dropped(place: Place, shape: tuple[int, ...], reduction: str) -> None:
    logits, target = make_logits(shape, torch.float64, place.device), make_indices(shape, place.device)
    results = []
    for function, options in ((cross_entropy, {"backend": place.backend}), (F.cross_entropy, {})):
        loss = function(logits, target, reduction=reduction, **options).sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), logits)[0])
    torch.testing.assert_close(*results)
    assert results[0].abs().sum() > 0


@pytest.mark.parametrize("changed", ["target", "logits", "weight"])
def test_tensors_changed_between_forward_and_backward_raise(place: Place, changed: str) -> None:
    base = make_logits((4, 5), torch.float32, place.device)
    logits = base * 1
    target, weight = make_indices((4, 5), place.device), torch.rand(5, device=place.device)
    loss = cross_entropy(logits, target, weight, backend=place.backend)
    with torch.no_grad():
        {"target": target, "logits": logits, "weight": weight}[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_wanted(place: Place) -> None:
    logits, target = make_logits((4, 5), torch.float32, place.device), make_indices((4, 5), place.device)
    expected = cross_entropy(logits, target, backend=place.backend)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = cross_entropy(logits, target, backend=place.backend)
        assert not loss.requires_grad
        assert torch.equal(loss, expected)
    assert not cross_entropy(logits.detach(), target, backend=place.backend).requires_grad


def test_gradients_of_probabilities_and_weights(place: Place) -> None:
    logits = make_logits((4, 5), torch.float64, place.device)
    target = make_probabilities((4, 5), torch.float64, place.device).requires_grad_()
    weight = torch.rand(5, dtype=torch.float64, device=place.device, requires_grad=True)
    wanted = (logits, target, weight)
    ours = torch.autograd.grad(cross_entropy(*wanted, backend=place.backend), wanted)
    torch.testing.assert_close(ours, torch.autograd.grad(F.cross_entropy(*wanted), wanted))


def test_transforms_hand_over_to_torch(place: Place) -> None:
    logits, target = make_logits((4, 5), torch.float64, place.device).detach(), make_indices((4, 5), place.device)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return cross_entropy(z, target, backend=place.backend)

    def expected(z: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z, target)

    torch.testing.assert_close(torch.func.grad(loss)(logits), torch.func.grad(expected)(logits))
    torch.testing.assert_close(torch.func.hessian(loss)(logits), torch.func.hessian(expected)(logits))
    direction = torch.randn_like(logits)
    torch.testing.assert_close(
        torch.func.jvp(loss, (logits,), (direction,)), torch.func.jvp(expected, (logits,), (direction,))
    )


def test_labels_reached_through_saved_tensor_hooks(place: Place) -> None:
    logits, target = make_logits((4, 5), torch.float32, place.device), make_indices((4, 5), place.device)
    (expected,) = torch.autograd.grad(cross_entropy(logits, target, backend=place.backend), logits)
    with torch.autograd.graph.save_on_cpu():
        loss = cross_entropy(logits, target, backend=place.backend)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], expected)
