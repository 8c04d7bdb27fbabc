"""The module is torch's, with one more argument."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from softmax_fused import CrossEntropyLoss, LinearCrossEntropyLoss, LogSoftmax, Softmax, cross_entropy, patch
from tests.conftest import Place

Z, X, Y = torch.randn(8, 6), torch.randn(8, 4), torch.arange(8) % 6


def test_signatures_are_torchs_and_keywords() -> None:
    for ours, theirs in ((CrossEntropyLoss, nn.CrossEntropyLoss), (cross_entropy, torch.nn.functional.cross_entropy)):
        mine, torchs = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        keywords = ["dtype", "backend", "grad_in_forward", "inplace_backward", "batch_invariant"]
        assert list(mine) == [*torchs, *keywords]
        assert all((mine[name].kind, mine[name].default) == (p.kind, p.default) for name, p in torchs.items())
        assert all(mine[name].kind is inspect.Parameter.KEYWORD_ONLY for name in keywords)


def test_module_computes_the_function(place: Place) -> None:
    weight = torch.rand(10, device=place.device)
    criterion = CrossEntropyLoss(weight, ignore_index=3, reduction="sum", label_smoothing=0.1, backend=place.backend)
    logits, target = torch.randn(8, 10, device=place.device), torch.arange(8, device=place.device)
    options = {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}
    assert torch.equal(
        criterion(logits, target), cross_entropy(logits, target, weight, backend=place.backend, **options)
    )
    torch.testing.assert_close(criterion(logits, target), nn.CrossEntropyLoss(weight, **options)(logits, target))


def test_module_is_torchs_module() -> None:
    criterion = CrossEntropyLoss(torch.ones(3))
    assert isinstance(criterion, nn.CrossEntropyLoss)
    assert list(criterion.state_dict()) == ["weight"]
    assert criterion.double().weight.dtype is torch.float64
    assert CrossEntropyLoss().state_dict() == {}


def test_module_copies_and_pickles() -> None:
    criterion = CrossEntropyLoss(torch.ones(3), label_smoothing=0.2, backend="torch")
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert (twin.label_smoothing, twin.backend) == (0.2, "torch")
        assert torch.equal(twin.weight, criterion.weight)
        twin.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))


def test_module_without_storage() -> None:
    """Big models are built on the meta device and get their memory later."""
    with torch.device("meta"):
        criterion = CrossEntropyLoss(torch.ones(3))
    assert criterion.weight.is_meta
    assert criterion.to_empty(device="cpu").weight.shape == (3,)


def test_repr_shows_what_differs_from_torch() -> None:
    assert repr(CrossEntropyLoss()) == "CrossEntropyLoss()"
    assert repr(CrossEntropyLoss(backend="torch")) == "CrossEntropyLoss(backend='torch')"


OPTIONS = {
    CrossEntropyLoss: ("backend", "grad_in_forward", "inplace_backward"),
    LinearCrossEntropyLoss: (
        "backend",
        "chunk_rows",
        "out_features",
        "ignore_index",
        "label_smoothing",
        "logit_scale",
        "softcap",
        "loss_dtype",
    ),
}


@pytest.mark.parametrize(
    ("module", "values"), [(CrossEntropyLoss(), Z), (LinearCrossEntropyLoss(4, 6), X)], ids=["loss", "linear"]
)
def test_a_module_from_before_its_options_existed(module: nn.Module, values: Tensor) -> None:
    expected = module(values, Y)
    for name in OPTIONS[type(module)]:
        del module.__dict__[name]
    assert torch.equal(pickle.loads(pickle.dumps(module))(values, Y), expected)
    assert "backend" not in repr(module)


TORCHS = [
    (nn.CrossEntropyLoss(label_smoothing=0.1), CrossEntropyLoss, (Z, Y)),
    (nn.Softmax(1), Softmax, (Z,)),
    (nn.LogSoftmax(1), LogSoftmax, (Z,)),
]
if hasattr(nn, "LinearCrossEntropyLoss"):
    TORCHS.append((nn.LinearCrossEntropyLoss(4, 6, bias=True), LinearCrossEntropyLoss, (X, Y)))


@pytest.mark.parametrize(("module", "ours", "arguments"), TORCHS, ids=lambda it: getattr(it, "__name__", ""))
def test_torchs_module_becomes_ours(module: nn.Module, ours: type[nn.Module], arguments: tuple[Tensor, ...]) -> None:
    expected = module(*arguments)
    module = copy.deepcopy(module)
    module.__class__ = ours
    torch.testing.assert_close(module(*arguments), expected)


class Model(nn.Module):
    """A layer, and one of the modules."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 6), last

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.last(self.layer(x), target)


SCRIPTED = {
    "loss": (CrossEntropyLoss(), (Z, Y)),
    "every option": (
        CrossEntropyLoss(
            torch.rand(6), ignore_index=2, reduction="sum", label_smoothing=0.1, backend="torch", grad_in_forward=True
        ),
        (Z, Y),
    ),
    "probabilities": (CrossEntropyLoss(reduction="none"), (Z, Z.softmax(1))),
    "linear": (LinearCrossEntropyLoss(4, 6), (X, Y)),
    "linear, every option": (
        LinearCrossEntropyLoss(
            4, 6, out_features=(2, 1), bias=True, weight=torch.rand(6), ignore_index=2, label_smoothing=0.1,
            reduction="sum", logit_scale=0.5, softcap=2.0, chunk_rows=3, backend="torch",
        ),
        (X, torch.stack([Y, Y.flip(0)], 1).unsqueeze(-1)),
    ),
    "softmax": (Softmax(1), (Z,)),
    "log softmax": (LogSoftmax(-1), (Z,)),
    "model": (Model(CrossEntropyLoss()), (X, Y)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(("module", "arguments"), SCRIPTED.values(), ids=SCRIPTED.keys())
def test_torch_jit_script(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    expected = module(*arguments)
    with patch():  # a scripted module calls torch's operator, whatever torch's name leads to
        scripted = torch.jit.script(module)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))
    torch.testing.assert_close(scripted(*arguments), expected)
    assert torch.equal(loaded(*arguments), scripted(*arguments))
    assert "softmax_fused::" not in str(loaded.graph)
