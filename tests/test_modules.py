"""The module is torch's, with one more argument."""

import copy
import inspect
import io
import pickle

import torch
from torch import nn

from softmax_fused import CrossEntropyLoss, cross_entropy
from tests.conftest import Place


def test_signatures_are_torchs_and_keywords() -> None:
    for ours, theirs in ((CrossEntropyLoss, nn.CrossEntropyLoss), (cross_entropy, torch.nn.functional.cross_entropy)):
        mine, torchs = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        keywords = ["backend", "grad_in_forward", "inplace_backward"]
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
