"""patch(): torch's name leads to ours, and back to torch's very function."""

import concurrent.futures
import inspect
import itertools
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

import softmax_fused
from softmax_fused import patch, patching
from tests.cases import make_indices, make_logits, make_probabilities
from tests.conftest import Place

TORCHS = F.cross_entropy
Calls = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    yield
    assert F.cross_entropy is TORCHS
    assert not patching.patches


def loss_and_gradient(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(logits, target)
    torch.manual_seed(1)
    return value, torch.autograd.grad(value, logits, torch.randn_like(value))[0]


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_function_and_module_compute_with_ours(place: Place, calls: Calls, probabilities: bool, reduction: str) -> None:
    logits = make_logits((8, 10), torch.float32, place.device)
    make = make_probabilities((8, 10), torch.float32, place.device)
    target = make if probabilities else make_indices((8, 10), place.device)
    weight = torch.rand(10, device=place.device)
    criterion = nn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction=reduction)

    def function(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, weight, reduction=reduction)

    for loss in (criterion, function):
        expected = loss_and_gradient(loss, logits, target)
        with patch(backend=place.backend):
            torch.testing.assert_close(loss_and_gradient(loss, logits, target), expected)
    assert calls == [{"backend": place.backend, "grad_in_forward": False}] * 2


def test_it_looks_like_torchs() -> None:
    with patch():
        ours = F.cross_entropy
        assert ours is not TORCHS
        assert inspect.signature(ours) == inspect.signature(TORCHS)
        assert all(
            getattr(ours, name) == getattr(TORCHS, name)
            for name in ("__name__", "__qualname__", "__module__", "__doc__")
        )
        pickled = pickle.dumps((ours, nn.CrossEntropyLoss(label_smoothing=0.1)))
        assert pickle.loads(pickled)[0] is ours
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(TORCHS)
    function, criterion = pickle.loads(pickled)
    assert function is TORCHS
    assert criterion.label_smoothing == 0.1


def test_until_undone(calls: Calls) -> None:
    logits, target = torch.randn(4, 5), torch.arange(4)
    everywhere = patch()
    F.cross_entropy(logits, target)
    everywhere.undo()
    everywhere.undo()
    assert F.cross_entropy is TORCHS
    F.cross_entropy(logits, target)
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match=r"undone; call softmax_fused\.patch\(\) anew"), everywhere:
        pass


def test_undone_by_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), patch():
        raise ZeroDivisionError
    assert F.cross_entropy is TORCHS


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_undone_in_any_order(calls: Calls, order: tuple[int, ...]) -> None:
    options = [
        {"backend": "torch", "grad_in_forward": False},
        {"backend": "torch", "grad_in_forward": True},
        {"backend": "auto", "grad_in_forward": False},
    ]
    patches = [patch(**each) for each in options]
    in_force = [0, 1, 2]
    for i in order:
        F.cross_entropy(torch.randn(4, 5), torch.arange(4))
        assert calls.pop() == options[in_force[-1]]
        patches[i].undo()
        in_force.remove(i)
        assert (F.cross_entropy is TORCHS) == (not in_force)


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton', 'numba' or 'torch'; got 'cuda'"):
        patch(backend="cuda")
    with pytest.raises(TypeError, match="inplace_backward"):
        patch(inplace_backward=True)


def switch_threads(frame: FrameType, _event: str, _: Any) -> Any:
    """Trace patching.py: another thread's turn at every line."""
    if frame.f_globals is vars(patching):
        time.sleep(0)
        return switch_threads
    return None


def test_threads() -> None:
    logits, target = torch.randn(4, 5), torch.arange(4)
    expected, wrong = TORCHS(logits, target), []

    def work() -> None:
        sys.settrace(switch_threads)
        for _ in range(50):
            with patch(backend="torch"):
                if F.cross_entropy is TORCHS or not torch.allclose(F.cross_entropy(logits, target), expected):
                    wrong.append("patched")
            if not torch.allclose(F.cross_entropy(logits, target), expected):
                wrong.append("undone")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    assert not wrong


def test_a_reference_that_outlives_the_patch_is_torchs(calls: Calls) -> None:
    with patch():
        kept = F.cross_entropy
    torch.testing.assert_close(kept(torch.zeros(1, 4), torch.tensor([0])).item(), 1.3862944)
    assert not calls


def test_what_was_found_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: Any) -> Tensor:
        return torch.tensor(7.0)

    with monkeypatch.context() as context:
        context.setattr(F, "cross_entropy", other)
        with patch():
            assert F.cross_entropy(torch.zeros(1, 4), torch.tensor([0])) < 2
        assert F.cross_entropy is other


def test_anothers_replacement_is_not_clobbered(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: Any) -> Tensor:
        return torch.tensor(7.0)

    ours = patch()
    with monkeypatch.context() as context:
        context.setattr(F, "cross_entropy", other)
        with pytest.raises(RuntimeError, match=r"replaced by .*other.* undo that first"):
            patch()
        with pytest.warns(RuntimeWarning, match=r"replaced by .*other.* left as it is"):
            ours.undo()
        assert F.cross_entropy is other
    # now the other library has put back what it had found: ours, which is no patch any more
    with patch():
        assert F.cross_entropy is not other
    assert F.cross_entropy is TORCHS


class Watch(TorchFunctionMode):
    """Remembers the functions it is told."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    """A type that has its own idea of some of torch's functions."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is TORCHS:
            return "mine"
        return super().__torch_function__(function, types, args, kwargs or {})


def test_torch_function(calls: Calls) -> None:
    logits, target = torch.randn(4, 5), torch.arange(4)
    with patch():
        with Watch() as watch:
            F.cross_entropy(logits, target)
        assert watch.seen == [F.cross_entropy]
        assert len(calls) == 1
        for function in (F.cross_entropy, softmax_fused.cross_entropy):
            assert function(logits.as_subclass(Tagged), target) == "mine"
        graph = torch.fx.symbolic_trace(nn.CrossEntropyLoss()).graph
        assert TORCHS in [node.target for node in graph.nodes]
    assert resolve_name(F.cross_entropy) == "torch.nn.functional.cross_entropy"


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_torchs_own_callers(calls: Calls) -> None:
    with patch():
        F.linear_cross_entropy(torch.randn(4, 3), torch.randn(5, 3), torch.arange(4))
    assert len(calls) == 1


def test_default_device_is_a_mode_and_ours_computes(calls: Calls) -> None:
    with patch(), torch.device("cpu"):
        F.cross_entropy(torch.randn(4, 5), torch.arange(4))
    assert len(calls) == 1


FALLBACKS = {
    "vmap": lambda: torch.func.vmap(F.cross_entropy)(torch.ones(3, 4, 5), torch.zeros(3, 4, dtype=torch.long)),
    "grad": lambda: torch.func.grad(F.cross_entropy)(torch.ones(4, 5), torch.arange(4)),
    "meta": lambda: F.cross_entropy(torch.ones(4, 5, device="meta"), torch.arange(4, device="meta")).shape,
    "gradient of probabilities": lambda: F.cross_entropy(torch.ones(4, 5), torch.ones(4, 5, requires_grad=True) / 5),
    "legacy": lambda: F.cross_entropy(torch.ones(4, 5), torch.arange(4), size_average=False),
    "trace": lambda: torch.jit.trace(nn.CrossEntropyLoss(), (torch.ones(4, 5), torch.arange(4)))(
        torch.ones(4, 5), torch.arange(4)
    ),
}


@pytest.mark.filterwarnings(
    "ignore:size_average and reduce args will be deprecated:UserWarning",
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:`torch.jit:FutureWarning",
)
@pytest.mark.parametrize("call", FALLBACKS.values(), ids=FALLBACKS.keys())
def test_what_is_left_to_torch(call: Callable[[], Any]) -> None:
    expected = call()
    with patch(backend="torch"):
        torch.testing.assert_close(call(), expected)


def test_errors_are_torchs_types() -> None:
    with patch(), pytest.raises(ValueError, match=r"target must have shape \(4,\)"):
        F.cross_entropy(torch.randn(4, 5), torch.arange(3))
