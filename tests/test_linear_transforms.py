"""The linear layer and its loss as a module, under autograd's and torch's transforms, and what it refuses."""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from softmax_fused import LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy
from softmax_fused.functional import chunked_linear
from tests.cases import make_indices, make_probabilities
from tests.conftest import CPU, Place
from tests.test_errors import outcome
from tests.test_linear import at_once, make_layer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"  # opcheck's own
)
needs_torchs = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none of its own")
X, W, B = torch.randn(8, 4), torch.randn(10, 4), torch.randn(10)
Y = torch.arange(8)


def second(loss: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the gradients' squares."""
    grads = torch.autograd.grad(loss.square().sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", [(6,), (6, 2)], ids=str)
def test_derivatives_of_higher_order(place: Place, sizes: tuple[int, ...], reduction: str) -> None:
    tensors = make_layer((5,), sizes, 3, torch.float64, place)
    target = make_indices((5, *sizes), place.device)
    target.view(-1)[0] = -100
    options = {"reduction": reduction, "label_smoothing": 0.1}
    x, w, b = tensors
    for changes in ({}, {"logit_scale": -0.5, "softcap": 2.0}):
        loss = linear_cross_entropy(
            x, w, target, linear_bias=b, chunk_rows=2, backend=place.backend, **options, **changes
        )
        expected = second(at_once(tensors, target, **options, **changes), tensors)
        for ours, theirs in zip(second(loss, tensors), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_second_derivatives_where_the_weight_comes_from_the_input(place: Place) -> None:
    (x, *_) = make_layer((6,), (6,), 3, torch.float64, place)
    target = make_indices((6, 6), place.device)
    loss = linear_cross_entropy(x, x.sin(), target, chunk_rows=2, backend=place.backend)
    expected = F.cross_entropy(F.linear(x, x.sin()), target)
    torch.testing.assert_close(second(loss, [x]), second(expected, [x]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_numerical_derivatives(reduction: str) -> None:
    tensors = make_layer((3,), (4,), 2, torch.float64, CPU)
    probabilities = make_probabilities((3, 4), torch.float64, "cpu")

    for softcap in (None, 1.5):

        def loss(x: Tensor, w: Tensor, b: Tensor, softcap: float | None = softcap) -> Tensor:
            return linear_cross_entropy(
                x, w, probabilities, linear_bias=b, reduction=reduction, softcap=softcap, chunk_rows=2
            )

        assert torch.autograd.gradcheck(loss, tensors, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss, tensors)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_gives_the_same_gradient_twice(place: Place, reduction: str) -> None:
    x, w, b = tensors = make_layer((7,), (11,), 5, torch.float32, place)
    target = make_indices((7, 11), place.device)
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_rows=3, backend=place.backend)
    upstream = torch.rand_like(loss) + 0.5
    first, again, doubled = (
        torch.autograd.grad(loss, tensors, scale * upstream, retain_graph=True) for scale in (1, 1, 2)
    )
    for one, other, twice in zip(first, again, doubled, strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
        torch.testing.assert_close(twice, 2 * one)


def test_changed_weights_are_refused_in_backward(place: Place) -> None:
    x, w, _ = make_layer((7,), (11,), 5, torch.float32, place)
    loss = linear_cross_entropy(x, w, make_indices((7, 11), place.device), chunk_rows=3, backend=place.backend)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_probabilities_are_torchs(place: Place) -> None:
    x, w, b = tensors = make_layer((7,), (11,), 5, torch.float32, place)
    target = make_probabilities((7, 11), torch.float32, place.device).requires_grad_()
    loss = linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=3, backend=place.backend)
    ours, theirs = (torch.autograd.grad(value, [*tensors, target]) for value in (loss, at_once(tensors, target)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


TRANSFORMS: dict[str, Callable[..., object]] = {
    "grad": lambda f, x, w, b: torch.func.grad(f, argnums=(0, 1, 2))(x, w, b),
    "vmap of grad": lambda f, x, w, b: torch.func.vmap(torch.func.grad(f), (0, None, None))(torch.stack([x, -x]), w, b),
    "jvp": lambda f, x, w, b: torch.func.jvp(f, (x, w, b), (x, w, b)),
    "jacfwd": lambda f, x, w, b: torch.func.jacfwd(f, argnums=1)(x, w, b),
    "hessian": lambda f, x, w, b: torch.func.hessian(f)(x, w, b),
    "compile": lambda f, x, w, b: compiled_gradients(f, x, w, b),
    "checkpoint": lambda f, x, w, b: torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(f, x, w, b, use_reentrant=False).sum(), (x, w, b)
    ),
}


def compiled_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    loss = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    return loss, *torch.autograd.grad(loss.sum(), tensors)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize(("reduction", "changes"), [("mean", {}), ("none", {}), ("mean", {"softcap": 2.0})], ids=str)
def test_transforms(place: Place, transform: Callable[..., object], reduction: str, changes: dict) -> None:
    if reduction == "none" and "grad" in transform.__code__.co_names and transform is not TRANSFORMS["checkpoint"]:
        reduction = "sum"  # torch.func.grad wants a scalar
    tensors = make_layer((5,), (6,), 3, torch.float64, place)
    target = make_indices((5, 6), place.device)

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, chunk_rows=2, backend=place.backend, **changes
        )

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return at_once((x, w, b), target, reduction=reduction, **changes)

    torch.testing.assert_close(transform(ours, *tensors), transform(theirs, *tensors))


@pytest.mark.parametrize(
    ("wanted", "reduction"), [*((wanted, "mean") for wanted in range(1, 8)), (7, "sum"), (7, "none"), (1, "none")]
)
def test_compiled_it_goes_in_chunks_too(wanted: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    project = chunked_linear.project
    monkeypatch.setattr(chunked_linear, "project", lambda *args: (seen.append(len(args[0])), project(*args))[1])
    torch.compiler.reset()
    counter, frames = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(
        lambda *tensors: linear_cross_entropy(*tensors[:3], linear_bias=tensors[3], reduction=reduction, chunk_rows=3),
        fullgraph=True, backend=counter, dynamic=True,
    )  # fmt: skip
    for rows in (7, 5):
        tensors = make_layer((rows,), (11,), 5, torch.float32, CPU)
        target = make_indices((rows, 11), "cpu")
        asked = [t.requires_grad_(bool(wanted & bit)) for t, bit in zip(tensors, (4, 2, 1), strict=True)]
        asked = [t for t in asked if t.requires_grad]
        loss, expected = compiled(*tensors[:2], target, tensors[2]), at_once(tensors, target, reduction=reduction)
        frames.append(counter.frame_count)
        upstream = torch.rand_like(expected)
        ours, theirs = (torch.autograd.grad(value, asked, upstream) for value in (loss, expected))
        torch.testing.assert_close((loss, ours), (expected, theirs))
    assert len(set(frames)) == 1, "the second batch was compiled anew"
    chunks = [3, 3, 1] if reduction != "none" else [3, 3, 1] * 2
    assert seen == [*chunks, *([3, 2] if reduction != "none" else [3, 2] * 2)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operator_is_what_it_says(reduction: str, softcap: float | None) -> None:
    x, w, _ = make_layer((7,), (11,), 5, torch.float32, CPU)
    target = make_indices((7, 11), "cpu")
    transform = (-100, 0.1, 0.5, softcap)
    options = ([True, True, False], reduction, *transform, torch.float32, [11], 3, torch.float32, "torch", False)
    torch.library.opcheck(torch.ops.softmax_fused.linear_cross_entropy.default, (x, w, None, target, None, *options))


def test_forward_mode() -> None:
    x, w, _ = make_layer((5,), (6,), 3, torch.float64, CPU)
    target = make_indices((5, 6), "cpu")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(loss).tangent
            for loss in (
                linear_cross_entropy(dual, w.detach(), target, chunk_rows=2),
                F.cross_entropy(F.linear(dual, w.detach()), target),
            )
        ]
    torch.testing.assert_close(*tangents)


class Labelled(Tensor):
    """A subclass that keeps its type through every function."""


def test_subclasses_and_modes() -> None:
    x = X.as_subclass(Labelled)
    loss = linear_cross_entropy(x, W, Y, chunk_rows=3)
    assert type(loss) is Labelled
    torch.testing.assert_close(loss.as_subclass(Tensor), F.cross_entropy(F.linear(X, W), Y))
    seen: dict[str, object] = {}

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is linear_cross_entropy:
                seen.update(kwargs or {})
            return func(*args, **(kwargs or {}))

    with Mode():
        linear_cross_entropy(X, W, Y, linear_bias=B, chunk_rows=3)
    assert (seen["chunk_rows"], seen["linear_bias"] is B, seen["reduction"]) == (3, True, "mean")


BAD = {
    "3-d input": ((torch.randn(2, 3, 4), W, Y), {}, r"input must have shape \(D,\) or \(N, D\).*got .*\(2, 3, 4\)"),
    "0-d input": ((torch.tensor(1.0), W, Y), {}, r"input must have shape .*got .*\(\)"),
    "1-d weight": ((X, W[0], Y), {}, r"linear_weight must have shape \(C, D\).*D = 4.*got .*\(4,\)"),
    "features": ((X[:, :3], W, Y), {}, r"with D = 3 for input of shape \(8, 3\); got .*\(10, 4\)"),
    "bias": ((X, W, Y), {"linear_bias": B[:9]}, r"linear_bias must have shape \(10,\).*got .*\(9,\)"),
    "one row of images": ((X[0], W.view(5, 2, 4), Y[:2]), {}, r"input must have shape \(N, 4\)"),
    "batch": ((X, W, torch.arange(9)), {}, r"target must have shape \(8,\) .*\(8, 10\).*got .*\(9,\)"),
    "class 10": ((X, W, torch.full((8,), 10)), {}, "class indices from 0 to 9.*got 10"),
    "int32 target": ((X, W, Y.int()), {}, r"target\.long\(\)"),
    "weight length": ((X, W, Y), {"weight": torch.ones(9)}, r"weight must be a float32 tensor of shape \(10,\)"),
    "reduction": ((X, W, Y), {"reduction": "average"}, "reduction must be 'mean', 'sum' or 'none'; got 'average'"),
    "smoothing": ((X, W, Y), {"label_smoothing": 1.5}, "label_smoothing must be a number of at most 1; got 1.5"),
    "dtypes": ((X, W.double(), Y), {}, "dtype"),
    "integers": ((X.long(), W.long(), Y), {}, "floating point"),
    "ignore_index": ((X, W, X @ W.T), {"ignore_index": 0}, "ignore_index must be negative with class probabilities"),
}


def torchs(x: Tensor, w: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options: object) -> Tensor:
    """What torch computes or raises: its own function where there is one."""
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(x, w, target, linear_bias=linear_bias, **options)
    return F.cross_entropy(F.linear(x, w, linear_bias), target, **options)


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize(("arguments", "options", "message"), BAD.values(), ids=BAD.keys())
def test_raises_what_torch_raises(arguments: tuple, options: dict, message: str, rows: int | None) -> None:
    with pytest.raises((IndexError, RuntimeError, ValueError), match=message) as ours:
        linear_cross_entropy(*arguments, **options, chunk_rows=rows)
    if hasattr(F, "linear_cross_entropy"):
        assert ours.type is type(outcome(torchs, arguments, options))


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize(("arguments", "options", "message"), BAD.values(), ids=BAD.keys())
def test_raises_the_same_where_logits_are_capped(
    arguments: tuple, options: dict, message: str, rows: int | None
) -> None:
    with pytest.raises((IndexError, RuntimeError, ValueError), match=message):
        linear_cross_entropy(*arguments, **options, chunk_rows=rows, softcap=5.0)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="softcap must be a positive number or None; got 0"):
        linear_cross_entropy(X, W, Y, softcap=0)
    with pytest.raises(TypeError, match="logit_scale must be a number; got str '2'"):
        linear_cross_entropy(X, W, Y, logit_scale="2")
    for rows in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="chunk_rows must be a positive integer or None; got"):
            linear_cross_entropy(X, W, Y, chunk_rows=rows)
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton', 'numba' or 'torch'; got 'cuda'"):
        linear_cross_entropy(X, W, Y, backend="cuda")
    with pytest.raises(TypeError, match="linear_weight must be a tensor; got list"):
        linear_cross_entropy(X, [1.0], Y)


@needs_torchs
def test_the_arguments_are_torchs() -> None:
    for ours, theirs, ours_alone in (
        (linear_cross_entropy, F.linear_cross_entropy, ["logit_scale", "softcap", "dtype"]),
        (LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss, ["logit_scale", "softcap", "loss_dtype"]),
    ):
        expected = [name for name in inspect.signature(theirs).parameters if name != "options"]
        last = ["chunk_rows", "backend", "batch_invariant"]
        assert list(inspect.signature(ours).parameters) == [*expected, *ours_alone, *last]


def module_pair() -> tuple[LinearCrossEntropyLoss, torch.nn.Module]:
    options = {"out_features": (2,), "bias": True, "weight": torch.rand(6), "label_smoothing": 0.1, "ignore_index": 3}
    ours = LinearCrossEntropyLoss(4, 6, chunk_rows=2, **options)
    theirs = torch.nn.LinearCrossEntropyLoss(4, 6, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@needs_torchs
def test_the_module_takes_torchs_state_and_computes_its_loss() -> None:
    ours, theirs = module_pair()
    x, target = torch.randn(5, 4), torch.randint(6, (5, 2))
    loss, expected = copy.deepcopy(ours)(x, target), theirs(x, target)
    torch.testing.assert_close(loss, expected)
    ours(x, target).backward()
    expected.backward()
    torch.testing.assert_close(ours.linear.weight.grad, theirs.linear.weight.grad)
    torch.testing.assert_close(ours.linear.bias.grad, theirs.linear.bias.grad)


def test_the_module_without_torchs() -> None:
    module = LinearCrossEntropyLoss(4, 6, reduction="sum", chunk_rows=2, backend="torch")
    assert list(module.state_dict()) == ["linear.weight"]
    x, target = torch.randn(5, 4), torch.randint(6, (5,))
    expected = cross_entropy(module.linear(x), target, reduction="sum")
    torch.testing.assert_close(module(x, target), expected)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(6,\); got \(5,\)"):
        LinearCrossEntropyLoss(4, 6, weight=torch.ones(5))
    with pytest.raises(RuntimeError, match="label_smoothing must be from 0 to 1; got 2"):
        LinearCrossEntropyLoss(4, 6, label_smoothing=2)
