"""Torch's own samples, through ours and through torch's: same values, same gradients, same derivatives of them."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused import CrossEntropyLoss, cross_entropy
from tests.conftest import Place

opinfo = pytest.importorskip("tests.opinfo", reason="needs torch's test modules and expecttest", exc_type=ImportError)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def wanted(values: Any) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def loss_and_gradients(function: Any, call: Any) -> tuple[Tensor, ...]:
    loss = function(*call.args, **call.kwargs)
    leaves = wanted((*call.args, *call.kwargs.values()))
    torch.manual_seed(0)
    upstream = torch.randn(loss.shape, device=loss.device, dtype=torch.float64).to(loss.dtype)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, upstream, allow_unused=True))


def constant_target(call: Any) -> Any:
    """The same call without gradients of target and weight, which torch's own operator would compute."""
    first, *rest = call.args
    rest = [value.detach() if isinstance(value, Tensor) else value for value in rest]
    options = {k: v.detach() if isinstance(v, Tensor) else v for k, v in call.kwargs.items()}
    return opinfo.Call((first, *rest), options)


@pytest.mark.parametrize("constant", [False, True], ids=["as sampled", "constant target"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_samples(place: Place, dtype: torch.dtype, constant: bool) -> None:
    ours = functools.partial(cross_entropy, backend=place.backend)
    samples = list(opinfo.operator_samples(place.device, dtype))
    assert len(samples) > 10
    # 16 bits: torch rounds on the way, ours at the end
    tolerance = {torch.bfloat16: {"rtol": 0.03, "atol": 0.03}, torch.float16: {"rtol": 0.004, "atol": 0.004}}
    for sample in samples:
        call = constant_target(sample) if constant else sample
        results = loss_and_gradients(ours, call), loss_and_gradients(F.cross_entropy, call)
        torch.testing.assert_close(*results, equal_nan=True, **tolerance.get(dtype, {}))


def test_operator_samples_to_second_order_and_forward_mode(place: Place) -> None:
    for sample in opinfo.operator_samples(place.device, torch.float64):
        call = constant_target(sample)
        if not call.args[0].numel() or cross_entropy(*call.args, **call.kwargs).isnan().any():
            continue

        def loss(z: Tensor, call: Any = call) -> Tensor:
            return cross_entropy(z, *call.args[1:], **call.kwargs, backend=place.backend)

        quick = {"fast_mode": place.backend == "triton" and place.device == "cpu"}  # the interpreter is slow
        assert torch.autograd.gradcheck(loss, call.args[:1], check_forward_ad=True, check_batched_grad=True, **quick)
        assert torch.autograd.gradgradcheck(loss, call.args[:1], **quick)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
def test_module_samples(place: Place, dtype: torch.dtype) -> None:
    for construct, forward in opinfo.module_samples(place.device, dtype):
        results = []
        for module, options in ((CrossEntropyLoss, {"backend": place.backend}), (torch.nn.CrossEntropyLoss, {})):
            criterion = module(*construct.args, **construct.kwargs, **options).to(place.device, dtype)
            results.append(loss_and_gradients(criterion, forward))
        torch.testing.assert_close(*results, equal_nan=True)


def test_module_errors(place: Place) -> None:
    for (construct, forward), error in opinfo.module_errors(place.device):
        with pytest.raises(error):
            CrossEntropyLoss(*construct.args, **construct.kwargs, backend=place.backend)(*forward.args)
