"""Bad input raises what torch raises, by type, with a message that says what was expected and what came."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import loss_parallel

from softmax_fused import cross_entropy
from tests.conftest import Place

Z = torch.randn(8, 10)
Y = torch.arange(8)
P = Z.softmax(1)

BAD = {
    "batch": ((Z, torch.arange(9)), {}, r"target must have shape \(8,\).*or \(8, 10\).*got a int64 tensor .*\(9,\)"),
    "class dimension": ((Z, torch.rand(8, 9)), {}, r"target must have shape .*got a float32 tensor of shape \(8, 9\)"),
    "rank": ((Z, torch.zeros(8, 1, 1, dtype=torch.long)), {}, "target must have shape"),
    "spatial": ((torch.randn(2, 3, 4, 5), torch.zeros(2, 5, 4, dtype=torch.long)), {}, r"got .*\(2, 5, 4\)"),
    "0-d target": ((Z, torch.tensor(1)), {}, r"got a int64 tensor of shape \(\)"),
    "two targets for one row": ((Z[0], torch.tensor([1, 2])), {}, r"target must have shape \(\) .*\(10,\)"),
    "0-d input": ((torch.tensor(1.0), torch.tensor(1)), {}, "input must be a floating point tensor of shape"),
    "integer input": ((Z.long(), Y), {}, "input must be a floating point tensor.*int64"),
    "bool input": ((Z > 0, Y), {}, "input must be a floating point tensor.*bool"),
    "complex input": ((Z.to(torch.complex64), Y), {}, "input must be a floating point tensor.*complex64"),
    "int32 target": ((Z, Y.int()), {}, r"target\.long\(\)"),
    "uint8 target of images": (
        (torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.uint8)),
        {},
        r"target\.long\(\)",
    ),
    "float target": ((Z, Y.float()), {}, r"target\.long\(\)"),
    "bool target": ((Z, Y > 3), {}, r"target\.long\(\)"),
    "integer probabilities": ((Z, torch.ones(8, 10, dtype=torch.long)), {}, "must be floating point"),
    "class 10": ((Z, torch.full((8,), 10)), {}, r"class indices from 0 to 9 or ignore_index \(-100\); got 10"),
    "class -1": ((Z, torch.full((8,), -1)), {}, "class indices from 0 to 9.*got -1"),
    "class -100 not ignored": ((Z, torch.full((8,), -100)), {"ignore_index": 3}, "got -100"),
    "weight length": ((Z, Y, torch.ones(9)), {}, r"weight must be a float32 tensor of shape \(10,\).*got .*\(9,\)"),
    "weight rank": ((Z, Y, torch.ones(10, 1)), {}, "weight must be"),
    "weight dtype": ((Z, Y, torch.ones(10, dtype=torch.float64)), {}, "weight must be a float32 tensor.*float64"),
    "weight with a gradient": ((Z, Y, torch.ones(10, requires_grad=True)), {}, "weight must not require a gradient"),
    "reduction": ((Z, Y), {"reduction": "average"}, "reduction must be 'mean', 'sum' or 'none'; got 'average'"),
    "reduction None": ((Z, Y), {"reduction": None}, "reduction must be"),
    "reduction upper case": ((Z, Y), {"reduction": "MEAN"}, "reduction must be"),
    "smoothing": ((Z, Y), {"label_smoothing": 1.5}, "label_smoothing must be a number of at most 1; got 1.5"),
    "smoothing None": ((Z, Y), {"label_smoothing": None}, "label_smoothing must be a number"),
    "smoothing text": ((Z, Y), {"label_smoothing": "0.1"}, "label_smoothing must be a number"),
    "ignore_index float": ((Z, Y), {"ignore_index": 1.5}, "ignore_index must be an integer"),
    "ignore_index None": ((Z, Y), {"ignore_index": None}, "ignore_index must be an integer"),
    "ignore_index huge": ((Z, Y), {"ignore_index": 2**70}, "ignore_index must be an integer of 64 bits"),
    "ignore_index with probabilities": ((Z, P), {"ignore_index": 0}, "ignore_index must be negative"),
    "input not a tensor": (([1.0, 2.0], Y), {}, "input must be a floating point tensor.*list"),
    "target not a tensor": ((Z, [1, 2]), {}, "target must have shape.*list"),
    "weight not a tensor": ((Z, Y, [1.0] * 10), {}, "weight must be a float32 tensor.*list"),
}


def outcome(function: Callable[..., Tensor], arguments: tuple, options: dict) -> Tensor | Exception:
    """Return what a call returns or raises."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        return error


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("arguments", "options", "message"), BAD.values(), ids=BAD.keys())
def test_raises_what_torch_raises(arguments: tuple, options: dict, message: str, backend: str) -> None:
    theirs = outcome(F.cross_entropy, arguments, options)
    assert isinstance(theirs, Exception)
    with pytest.raises(type(theirs), match=message) as ours:
        cross_entropy(*arguments, **options, backend=backend)
    assert ours.type is type(theirs)


def test_messages_survive_a_large_batch() -> None:
    """The fused path finds a class out of range as torch does."""
    logits = torch.zeros(120_000, 10)
    with pytest.raises(IndexError, match="class indices from 0 to 9"):
        cross_entropy(logits, torch.full((120_000,), 10))


def two_batches(function: Callable[..., Tensor]) -> Tensor:
    return torch.vmap(function)(torch.stack([Z, Z]), torch.stack([Y, Y + 3]))


def fake(function: Callable[..., Tensor]) -> Tensor:
    """The target's shape and dtype are right, its device is not."""
    with FakeTensorMode():
        return function(torch.empty(8, 10, device="meta"), torch.empty(8, dtype=torch.long))


class Unprintable:
    def __repr__(self) -> str:
        raise AssertionError("cannot be shown")


UNREADABLE = {
    "vmap": two_batches,
    "fake": fake,
    "not printable": lambda function: function(Z, Unprintable()),
}


@pytest.mark.parametrize("call", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_explaining_an_error_never_raises_another(call: Callable[[Callable[..., Tensor]], Tensor]) -> None:
    theirs, ours = outcome(call, (F.cross_entropy,), {}), outcome(call, (cross_entropy,), {})
    assert isinstance(theirs, Exception)
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("parallel", [False, True], ids=["", "loss_parallel"])
def test_explaining_an_error_of_dtensors_never_raises_another(mesh: DeviceMesh, parallel: bool) -> None:
    logits, target = DTensor.from_local(Z, mesh, [Partial()]), DTensor.from_local(Y + 3, mesh, [Replicate()])
    with loss_parallel() if parallel else nullcontext():
        theirs, ours = (outcome(function, (logits, target), {}) for function in (F.cross_entropy, cross_entropy))
    assert isinstance(theirs, Exception)
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton', 'numba' or 'torch'; got 'cuda'"):
        cross_entropy(Z, Y, backend="cuda")


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError):
        cross_entropy(Z, Y, axis=1)


ACCEPTED = {
    "negative smoothing": ((Z, Y), {"label_smoothing": -0.5}),
    "nan smoothing": ((Z, Y), {"label_smoothing": float("nan")}),
    "integer smoothing": ((Z, Y), {"label_smoothing": 1}),
    "tensor ignore_index": ((Z, Y), {"ignore_index": torch.tensor(2)}),
    "one-element target": ((Z[0], torch.tensor([3])), {"reduction": "none"}),
    "values beyond probabilities": ((Z, 5 * Z), {}),
    "integer weights for probabilities": ((Z, P, torch.arange(10)), {}),
    "empty batch": ((Z[:0], Y[:0]), {}),
    "empty batch, sum": ((Z[:0], Y[:0]), {"reduction": "sum"}),
    "empty batch, none": ((Z[:0], Y[:0]), {"reduction": "none"}),
    "no classes": ((Z[:, :0], P[:, :0]), {}),
    "positional": ((Z, Y, torch.ones(10), None, -100, None, "sum", 0.1), {}),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("arguments", "options"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts_what_torch_accepts(arguments: tuple, options: dict, backend: str) -> None:
    ours = outcome(cross_entropy, arguments, options | {"backend": backend})
    theirs = outcome(F.cross_entropy, arguments, options)
    if isinstance(theirs, Exception):  # an older torch
        assert type(ours) is type(theirs)
    else:
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
@pytest.mark.parametrize("size_average", [None, False, True])
@pytest.mark.parametrize("reduce", [None, False, True])
def test_legacy_reduction(place: Place, size_average: bool | None, reduce: bool | None) -> None:
    logits, target = Z.to(place.device), Y.to(place.device)
    ours = cross_entropy(logits, target, size_average=size_average, reduce=reduce, backend=place.backend)
    theirs = F.cross_entropy(logits, target, size_average=size_average, reduce=reduce)
    torch.testing.assert_close(ours, theirs)
