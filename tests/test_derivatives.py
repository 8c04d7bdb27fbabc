"""Second derivatives, batched upstream gradients, forward mode and vmap of random calls, against torch's in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from softmax_fused import cross_entropy, cross_entropy_rows, linear_cross_entropy, log_softmax, softmax
from tests.cases import make_probabilities, row_shape
from tests.conftest import INTERPRETER, Place

Function = Callable[..., Tensor]
SOFT = ("loss", "logsumexp", "entropy")


class Call(NamedTuple):
    """A function of the tensors that are differentiated, ours and torch's."""

    ours: Function
    theirs: Function
    tensors: list[Tensor]


def class_dim(shape: tuple[int, ...]) -> int:
    return min(len(shape) - 1, 1)


def in_other_order(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values, every other time with the dimensions in another order in memory."""
    if x.ndim < 2 or draw(st.booleans()):
        return x
    order = draw(st.permutations(range(x.ndim)))
    return x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())


def stacked_outputs(z: Tensor, target: Tensor, backend: str, **options: Any) -> Tensor:
    rows = cross_entropy_rows(z, target, outputs=SOFT, backend=backend, **options)
    return torch.stack([rows.loss, rows.logsumexp, rows.entropy])


def torchs_outputs(z: Tensor, target: Tensor, **options: Any) -> Tensor:
    log_p = z.log_softmax(class_dim(z.shape))
    entropy = -(log_p.exp() * log_p).sum(class_dim(z.shape))
    loss = F.cross_entropy(z, target, reduction="none", **options)
    return torch.stack([loss, z.logsumexp(class_dim(z.shape)), entropy])


def torchs_layer(x: Tensor, w: Tensor, b: Tensor, target: Tensor, **options: Any) -> Tensor:
    logits = F.linear(x, w.flatten(0, -2), b.flatten()).reshape(*x.shape[:-1], *w.shape[:-1])
    return F.cross_entropy(logits, target, **options)


def random_target(draw: st.DrawFn, shape: tuple[int, ...], place: Place) -> tuple[Tensor, dict[str, Any]]:
    """A target of either kind, weights and smoothing, for logits of a shape."""
    classes, options = shape[class_dim(shape)], {}
    if draw(st.booleans()):
        target = make_probabilities(shape, torch.float64, place.device)
    else:
        target = torch.randint(0, classes, row_shape(shape), device=place.device)
        target.masked_fill_(torch.rand(target.shape, device=place.device) < draw(st.sampled_from([0.0, 0.3])), -100)
        target.view(-1)[:1] = 0  # a mean of nothing is NaN
    if draw(st.booleans()):
        options["weight"] = torch.rand(classes, dtype=torch.float64, device=place.device) + 0.5
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
    return in_other_order(draw, target), options


SHAPES = [(4,), (3, 4), (2, 3, 4), (2, 3, 2, 2), (1, 3, 2, 2)]


def logits_call(draw: st.DrawFn, function: str, place: Place) -> Call:
    shape = draw(st.sampled_from(SHAPES))
    z = in_other_order(draw, torch.randn(shape, dtype=torch.float64, device=place.device))
    if function in ("softmax", "log_softmax"):
        ours, theirs = (softmax, F.softmax) if function == "softmax" else (log_softmax, F.log_softmax)
        dim = draw(st.integers(-len(shape), len(shape) - 1))
        return Call(lambda z: ours(z, dim, backend=place.backend), lambda z: theirs(z, dim), [z])
    target, options = random_target(draw, shape, place)
    if function == "rows":
        return Call(
            lambda z: stacked_outputs(z, target, place.backend, **options),
            lambda z: torchs_outputs(z, target, **options),
            [z],
        )
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    options_of_ours = options | {"grad_in_forward": draw(st.booleans()), "backend": place.backend}
    return Call(
        lambda z: cross_entropy(z, target, **options_of_ours), lambda z: F.cross_entropy(z, target, **options), [z]
    )


def linear_call(draw: st.DrawFn, place: Place) -> Call:
    sizes, features = draw(st.sampled_from([(4,), (3, 2, 2)])), 2
    rows = draw(st.sampled_from([(3,), (2,)] if len(sizes) > 1 else [(3,), ()]))
    shapes = ((*rows, features), (*sizes, features), sizes)
    tensors = [in_other_order(draw, torch.randn(s, dtype=torch.float64, device=place.device)) for s in shapes]
    target, options = random_target(draw, (*rows, *sizes), place)
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=2, backend=place.backend, **options)

    return Call(ours, lambda *tensors: torchs_layer(*tensors, target, **options), tensors)


def leaves(call: Call) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in call.tensors]


def like(x: Tensor, data: st.DataObject) -> Tensor:
    """A random tensor of a shape, in any order in memory."""
    return in_other_order(data.draw, torch.randn_like(x, memory_format=torch.contiguous_format))


def second_derivatives(function: Function, call: Call, upstream: Tensor, directions: list[Tensor]) -> Any:
    """Derivatives of the gradients, by the tensors and by the upstream gradient."""
    tensors, upstream = leaves(call), upstream.detach().requires_grad_()
    grads = torch.autograd.grad(function(*tensors), tensors, upstream, create_graph=True)
    return torch.autograd.grad(grads, (*tensors, upstream), directions, allow_unused=True, materialize_grads=True)


def batched_gradients(function: Function, call: Call, upstream: Tensor, directions: list[Tensor]) -> Any:
    tensors = leaves(call)
    both = torch.stack([upstream, -2 * upstream.flip(-1) if upstream.ndim else -upstream])
    return torch.autograd.grad(function(*tensors), tensors, both, is_grads_batched=True)


def forward_mode(function: Function, call: Call, upstream: Tensor, directions: list[Tensor]) -> Any:
    return torch.func.jvp(function, tuple(call.tensors), tuple(directions))


def batch_of_calls(function: Function, call: Call, upstream: Tensor, directions: list[Tensor]) -> Any:
    batch = [torch.stack([tensor, other]) for tensor, other in zip(call.tensors, directions, strict=True)]
    return torch.vmap(function)(*batch)


def gradients_of_a_batch_of_calls(function: Function, call: Call, upstream: Tensor, directions: list[Tensor]) -> Any:
    batch = [torch.stack([tensor, other]) for tensor, other in zip(call.tensors, directions, strict=True)]
    return torch.vmap(torch.func.grad(lambda *tensors: (function(*tensors) * upstream).sum()))(*batch)


KINDS = [second_derivatives, batched_gradients, forward_mode, batch_of_calls, gradients_of_a_batch_of_calls]
EXAMPLES = {"cross_entropy": 100, "rows": 60, "softmax": 10, "log_softmax": 10, "linear": 60}


@pytest.mark.parametrize("function", EXAMPLES)
def test_derivatives_are_torchs(place: Place, function: str) -> None:
    count = EXAMPLES[function] // (4 if place == INTERPRETER else 1)

    # The same examples every time; a failing one is small as it is, and to shrink it takes minutes.
    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate])
    @given(data=st.data(), seed=st.integers(0, 2**31))
    def check(data: st.DataObject, seed: int) -> None:
        torch.manual_seed(seed)
        call = linear_call(data.draw, place) if function == "linear" else logits_call(data.draw, function, place)
        upstream = like(call.theirs(*call.tensors), data)
        directions = [like(tensor, data) for tensor in call.tensors]
        for kind in KINDS:
            found, expected = (kind(f, call, upstream, directions) for f in (call.ours, call.theirs))
            torch.testing.assert_close(found, expected, msg=lambda text, kind=kind: f"{kind.__name__}: {text}")

    check()
