"""Any strides: equal to contiguous, and no logits-sized copy."""

import pytest
import torch
from torch import Tensor

from softmax_fused import cross_entropy
from tests.cases import assert_right, make_indices, make_logits, make_probabilities
from tests.conftest import Place

LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "rows sliced": lambda x: torch.cat([x, x])[: x.shape[0]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "class range": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one class expanded": lambda x: x[:, :1].expand_as(x),
}
LAYOUTS_4D = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "expanded": lambda x: x[:, :, :1].expand_as(x),
    "batch sliced": lambda x: x.repeat_interleave(3, 0)[::3],
}


def laid_out(layout: object, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layout(x).detach().requires_grad_(x.requires_grad)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matrix_of_logits(place: Place, layout: object, reduction: str) -> None:
    logits = laid_out(layout, make_logits((33, 17), torch.float32, place.device))
    assert_right(place, logits, make_indices((33, 17), place.device), reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("layout", LAYOUTS_4D.values(), ids=LAYOUTS_4D.keys())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_images_of_logits(place: Place, layout: object, reduction: str) -> None:
    shape = (2, 5, 6, 7)
    logits = laid_out(layout, make_logits(shape, torch.float32, place.device))
    assert_right(place, logits, make_indices(shape, place.device), reduction=reduction)
    probabilities = laid_out(layout, make_probabilities(shape, torch.float32, place.device))
    assert_right(place, make_logits(shape, torch.float32, place.device), probabilities, reduction=reduction)


def test_volumes_that_merge_nowhere(place: Place) -> None:
    logits = make_logits((4, 6, 6, 8, 10), torch.float32, place.device)[::2, ::2, ::3, ::2, ::5].detach()
    target = make_indices((4, 6, 6, 8, 10), place.device)[::2, ::3, ::2, ::5] % 3
    assert_right(place, logits.requires_grad_(), target, reduction="none")


def test_offsets_beyond_32_bits(place: Place) -> None:
    """Rows 2**30 elements apart: 4 GiB of addresses, of which only what is used is ever touched."""
    torch.use_deterministic_algorithms(False)  # it would fill all of it
    stride = 2**30 + 8
    memory = torch.empty(2 * stride + 10, dtype=torch.bfloat16, device=place.device)
    logits = memory.as_strided((3, 10), (stride, 1))
    logits.copy_(torch.randn(3, 10))
    target = make_indices((3, 10), place.device)
    assert_right(place, logits.requires_grad_(), target, reduction="none")
    sideways = memory.as_strided((10, 3), (1, stride)).detach()
    assert_right(place, sideways.requires_grad_(), target.new_tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0]), reduction="none")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_probabilities_weights_and_upstream(place: Place, layout: object) -> None:
    logits = make_logits((33, 17), torch.float32, place.device)
    probabilities = laid_out(layout, make_probabilities((33, 17), torch.float32, place.device))
    weight = torch.rand(17, 3, device=place.device)[:, 1]
    assert_right(place, logits, probabilities, weight, reduction="none")


def test_targets_with_gaps_and_offsets(place: Place) -> None:
    labels = torch.randint(0, 17, (34,), device=place.device)
    assert_right(place, make_logits((33, 17), torch.float32, place.device), labels[1:])
    assert_right(place, make_logits((17, 17), torch.float32, place.device), labels[::2])
    assert_right(place, make_logits((33, 17), torch.float32, place.device), labels[:1].expand(33))


@pytest.mark.parametrize("upstream", [torch.rand(12)[::2], torch.rand(1).expand(6), torch.rand(6, 6).t()[2]])
def test_upstream_gradient_is_read_with_its_strides(place: Place, upstream: Tensor) -> None:
    logits, target = make_logits((6, 10), torch.float32, place.device), make_indices((6, 10), place.device)
    upstream = upstream.to(place.device) if place.device == "cuda" else upstream
    loss = cross_entropy(logits, target, reduction="none", backend=place.backend)
    (grad,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, logits, upstream.contiguous())
    assert torch.equal(grad, expected)


def test_gradient_keeps_the_layout_of_dense_logits(place: Place) -> None:
    logits = make_logits((2, 5, 6, 7), torch.float32, place.device).detach()
    logits = logits.contiguous(memory_format=torch.channels_last).requires_grad_()
    cross_entropy(logits, make_indices((2, 5, 6, 7), place.device), backend=place.backend).backward()
    assert logits.grad.is_contiguous(memory_format=torch.channels_last)
