"""Softmax and its logarithm against float64 and torch: values, gradients, layouts, types, transforms, errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softmax_fused
from softmax_fused.functional.autograd import Softmax
from tests.cases import ULPS, make_logits
from tests.conftest import INTERPRETER, Place

INF = float("inf")
PAIRS = {"softmax": (softmax_fused.softmax, F.softmax), "log_softmax": (softmax_fused.log_softmax, F.log_softmax)}
names = pytest.mark.parametrize("name", PAIRS)


def assert_near(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    eps = ULPS[dtype] * torch.finfo(dtype).eps
    size = truth.nan_to_num(posinf=0, neginf=0).abs().max().item()
    atol = eps * size + 1e-7 * (eps > 1e-4)
    torch.testing.assert_close(got.double(), truth, rtol=eps, atol=atol, equal_nan=True)


def assert_right(place: Place, name: str, z: Tensor, dim: int, dtype: torch.dtype | None = None) -> None:
    """Compare values and gradient, under a random upstream gradient, with float64; the input must stay as it is."""
    ours, torchs = PAIRS[name]
    before, version = z.detach().clone(), z._version
    y = ours(z, dim, dtype, backend=place.backend)
    assert (y.shape, y.dtype) == (z.shape, dtype or z.dtype)
    exact = z.detach().double().requires_grad_()
    truth = torchs(exact, dim)
    coarse = min(y.dtype, z.dtype, key=lambda kind: -torch.finfo(kind).eps)
    assert_near(y, truth.detach(), y.dtype)
    upstream = torch.randn(z.shape, dtype=torch.float64).to(y.device, y.dtype)
    (grad,) = torch.autograd.grad(y, z, upstream)
    assert (grad.shape, grad.dtype) == (z.shape, z.dtype)
    (exact_grad,) = torch.autograd.grad(truth, exact, upstream.double())
    assert_near(grad, exact_grad, coarse)
    assert torch.equal(z.detach(), before)
    assert z._version == version


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (300,), (5, 1), (9, 10), (33, 16), (3, 100), (2, 129), (3, 1003), (2, 5000)], ids=str
)
def test_last_dimension(place: Place, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    if place == INTERPRETER and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter cuts off where a GPU rounds to bfloat16")
    assert_right(place, name, make_logits(shape, dtype, place.device), -1)


@names
@pytest.mark.parametrize("dim", [0, 1, -1, 2])
@pytest.mark.parametrize("shape", [(3, 7, 40), (2, 19, 33), (40, 2, 8)], ids=str)
def test_every_dimension(place: Place, shape: tuple[int, ...], dim: int, name: str) -> None:
    assert_right(place, name, make_logits(shape, torch.float32, place.device), dim)


LAYOUTS = {
    "transposed": lambda z: z.transpose(0, 1),
    "gaps": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "row gaps": lambda z: F.pad(z, (0, 3))[..., : z.shape[-1]],
    "offset by one": lambda z: F.pad(z, (1, 0))[..., 1:],
    "expanded": lambda z: z[:1].expand(4, -1),
}


@names
@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place: Place, layout: str, classes: int, name: str) -> None:
    z = LAYOUTS[layout](make_logits((6, classes), torch.float32, place.device).detach()).requires_grad_()
    assert_right(place, name, z, 1)
    assert_right(place, name, z, 0)


@names
@pytest.mark.parametrize("classes", [10, 300])
def test_upstream_gradients_of_any_strides(place: Place, classes: int, name: str) -> None:
    ours, torchs = PAIRS[name]
    z = make_logits((5, classes), torch.float64, place.device)
    row = torch.randn(classes, dtype=torch.float64, device=place.device)
    for upstream in (row.expand(5, -1), row[:5, None].expand(5, classes), torch.randn(classes, 5).double().t()):
        grads = [
            torch.autograd.grad(y, z, upstream.to(place.device))[0]
            for y in (ours(z, 1, backend=place.backend), torchs(z, 1))
        ]
        torch.testing.assert_close(*grads)


@names
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float16, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 10), (3, 500), (2, 6, 40)], ids=str)
def test_result_of_another_type(place: Place, shape: tuple[int, ...], dtypes: Any, name: str) -> None:
    assert_right(place, name, make_logits(shape, dtypes[0], place.device), 1, dtypes[1])


@names
@pytest.mark.parametrize("classes", [10, 400])
def test_infinities_and_nan_as_torch(place: Place, classes: int, name: str) -> None:
    ours, torchs = PAIRS[name]
    z = make_logits((6, classes), torch.float32, place.device).detach()
    z[0] = -INF
    z[1, 3] = INF
    z[2, 4] = float("nan")
    z[3, :-1] = -INF
    z[4] = torch.finfo(torch.float32).min
    z[5] *= 1e30
    expected = torchs(z, 1)
    torch.testing.assert_close(ours(z, 1, backend=place.backend), expected, equal_nan=True)
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    ours(leaves[0], 1, backend=place.backend)[3:].square().nansum().backward()
    torchs(leaves[1], 1)[3:].square().nansum().backward()
    torch.testing.assert_close(leaves[0].grad[5], leaves[1].grad[5])


@names
def test_second_derivatives(place: Place, name: str) -> None:
    z = make_logits((3, 5), torch.float64, place.device, 1.0)
    function = lambda x: PAIRS[name][0](x, 1, backend=place.backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, (z,), fast_mode=False)
    assert torch.autograd.gradgradcheck(function, (z,))


@names
def test_torch_func_and_forward_mode(place: Place, name: str) -> None:
    ours, torchs = PAIRS[name]
    z = make_logits((4, 6), torch.float64, place.device).detach()
    mine = lambda x: ours(x, -1, backend=place.backend)  # noqa: E731
    theirs = lambda x: torchs(x, -1)  # noqa: E731
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian, torch.vmap):
        torch.testing.assert_close(transform(mine)(z), transform(theirs)(z))
    tangents = [torch.func.jvp(function, (z,), (torch.ones_like(z),))[1] for function in (mine, theirs)]
    torch.testing.assert_close(*tangents)
    leaf = z.clone().requires_grad_()
    basis = torch.eye(leaf.numel(), dtype=leaf.dtype, device=place.device).view(-1, *leaf.shape)
    rows = [torch.autograd.grad(f(leaf), leaf, basis, is_grads_batched=True)[0] for f in (mine, theirs)]
    torch.testing.assert_close(*rows)


@names
def test_backward_twice(place: Place, name: str) -> None:
    z = make_logits((4, 300), torch.float32, place.device)
    y = PAIRS[name][0](z, 1, backend=place.backend)
    upstream = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, z, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@names
def test_autocast(place: Place, name: str) -> None:
    ours, torchs = PAIRS[name]
    for dtype in (torch.float16, torch.float32, torch.float64):
        z = make_logits((4, 10), dtype, place.device)
        with torch.autocast(place.device, torch.bfloat16):
            y, expected = ours(z, 1, backend=place.backend), torchs(z, 1)
        assert y.dtype == expected.dtype
        assert_near(y, torchs(z.double(), 1).detach(), y.dtype)
        assert torch.autograd.grad(y.sum(), z)[0].dtype == dtype


@names
@pytest.mark.parametrize("dim", [0, 1])
def test_torch_compile(place: Place, name: str, dim: int) -> None:
    ours, torchs = PAIRS[name]
    z = make_logits((4, 10), torch.float32, place.device)
    compiled = torch.compile(lambda x: ours(x, dim) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), torchs(z, dim) * 2)


@names
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: torch.zeros(2, 3), (2,)),
        (lambda: torch.zeros(2, 3), (-3,)),
        (lambda: torch.zeros(2, 3, dtype=torch.long), (1,)),
        (lambda: torch.zeros(2, 3), ("channels",)),
        (lambda: [1.0, 2.0], (0,)),
    ],
    ids=["dim too large", "dim too small", "integers", "named dimension", "a list"],
)
def test_torchs_errors(place: Place, make: Any, arguments: tuple[Any, ...], name: str) -> None:
    ours, torchs = PAIRS[name]
    with pytest.raises(Exception) as theirs:
        torchs(make(), *arguments)
    with pytest.raises(type(theirs.value)):
        ours(make(), *arguments, backend=place.backend)


@names
def test_what_torch_takes_beyond(name: str) -> None:
    """Scalars, empty tensors, integers with a dtype, a guessed dimension, subclasses."""
    ours, torchs = PAIRS[name]
    for z, dim, dtype in (
        (torch.tensor(2.0), 0, None),
        (torch.zeros(0, 3), 1, None),
        (torch.zeros(3, 0), 1, None),
        (torch.arange(6).view(2, 3), 1, torch.float32),
    ):
        torch.testing.assert_close(ours(z, dim, dtype), torchs(z, dim, dtype=dtype))
    z = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        assert torch.equal(ours(z), torch.softmax(z, 1) if name == "softmax" else torch.log_softmax(z, 1))
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton', 'numba' or 'torch'; got 'cuda'"):
        ours(z, 1, backend="cuda")

    class Tagged(torch.Tensor):
        pass

    assert type(ours(z.as_subclass(Tagged), 1)) is Tagged


@pytest.mark.parametrize("log", [False, True])
def test_modules_are_torchs(log: bool) -> None:
    ours, torchs = (softmax_fused.LogSoftmax, nn.LogSoftmax) if log else (softmax_fused.Softmax, nn.Softmax)
    module, z = ours(dim=1), torch.randn(2, 3)
    assert isinstance(module, torchs)
    assert repr(module) == repr(torchs(dim=1))
    assert torch.equal(module(z), torchs(dim=1)(z))
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(z), module(z))


def test_cpu_tensors_are_torchs_own() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    assert softmax_fused.softmax(z, 1).grad_fn.name() == "SoftmaxBackward0"
    assert softmax_fused.log_softmax(z, 1).grad_fn.name() == "LogSoftmaxBackward0"


def test_kernels_compute_where_they_are_asked_for(kernels: Place) -> None:
    z = torch.randn(3, 4, requires_grad=True, device=kernels.device)
    for y in (softmax_fused.softmax(z, 1, backend="triton"), softmax_fused.log_softmax(z, 1, backend="triton")):
        assert type(y.grad_fn).__name__ == f"{Softmax.__name__}Backward"
