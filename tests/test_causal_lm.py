"""The loss of causal language models is transformers' own, of logits or of hidden states, 16-bit or not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from softmax_fused import causal_lm_loss, patch
from tests.conftest import Place
from tests.tiny import REASON, language_model, sentences

B, T, D, V = 2, 9, 5, 37
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias of the last layer, and labels of which some are ignored."""
    x, w, b = ((2 * torch.randn(*shape)).to(dtype).to(device) for shape in ((B, T, D), (V, D), (V,)))
    labels = torch.randint(V, (B, T), device=device)
    labels[:, :3] = labels[0, -1] = -100
    return x, w, b, labels


def truth(logits: Tensor, shifted: Tensor, items: Any) -> Tensor:
    """From the definition, in float64."""
    log_p = logits.double().log_softmax(-1).reshape(-1, V)
    rows = [-log_p[i, y] for i, y in enumerate(shifted.reshape(-1).tolist()) if y >= 0]
    return torch.stack(rows).sum() / (len(rows) if items is None else items)


def shift(labels: Tensor) -> Tensor:
    return torch.cat([labels[:, 1:], labels.new_full((B, 1), -100)], 1)


@pytest.mark.parametrize("items", [None, 20, "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_logits(place: Place, dtype: torch.dtype, items: Any) -> None:
    x, w, _, labels = make(dtype, place.device)
    items = torch.tensor(20, device=place.device) if items == "tensor" else items
    logits = (x @ w.T).requires_grad_()
    shifted = shift(labels)
    expected = truth(logits, shifted, items)
    (grad,) = torch.autograd.grad(3 * expected, logits)
    ours = causal_lm_loss(logits, labels, V, items, backend=place.backend)
    assert ours.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(3 * ours, logits)[0], grad)
    others = (
        causal_lm_loss(logits, None, V, items, shift_labels=shifted, backend=place.backend),
        causal_lm_loss(logits.transpose(0, 1).contiguous().transpose(0, 1), labels, V, items, backend=place.backend),
        causal_lm_loss(logits, labels.where(labels >= 0, 7), V, items, ignore_index=7, backend=place.backend),
    )
    assert all(torch.equal(other, ours) for other in others[:2])
    sevens = truth(logits, shift(labels.where(labels != 7, -100)), items)
    torch.testing.assert_close(others[2].double(), sevens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("items", [None, 20])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_of_hidden_states(place: Place, dtype: torch.dtype, items: int | None) -> None:
    tensors = make(dtype, place.device)
    x, w, b = (tensor.requires_grad_() for tensor in tensors[:3])
    layer: dict[str, Any] = {"hidden_states": x, "lm_head_weight": w, "lm_head_bias": b, "backend": place.backend}
    ours = causal_lm_loss(None, tensors[3], V, items, **layer)
    theirs = causal_lm_loss(torch.nn.functional.linear(x, w, b), tensors[3], V, items)
    assert ours.dtype is theirs.dtype
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype is torch.bfloat16 else {}  # of the layer's own rounding
    torch.testing.assert_close(ours, theirs, rtol=1e-3 if tolerance else None, atol=1e-3 if tolerance else None)
    for mine, other in zip(*(torch.autograd.grad(loss, (x, w, b)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def test_all_labels_ignored() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, labels = torch.randn(B, T, V, dtype=dtype), torch.full((B, T), -100)
        assert causal_lm_loss(logits, labels, V).isnan()
        assert causal_lm_loss(logits, labels, V, 3) == 0


def test_errors() -> None:
    logits, labels, x, w = torch.randn(B, T, V), torch.zeros(B, T).long(), torch.randn(B, T, D), torch.randn(V, D)
    for arguments in ({}, {"hidden_states": x}, {"lm_head_weight": w}):
        with pytest.raises(ValueError, match="either logits, or hidden_states and lm_head_weight"):
            causal_lm_loss(None, labels, V, **arguments)
    with pytest.raises(ValueError, match="either logits, or hidden_states and lm_head_weight"):
        causal_lm_loss(logits, labels, V, hidden_states=x, lm_head_weight=w)
    with pytest.raises(ValueError, match="labels must be a tensor where shift_labels is None"):
        causal_lm_loss(logits, None, V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("items", [None, 20])
def test_compiled(dtype: torch.dtype, items: int | None) -> None:
    x, w, b, labels = make(dtype, "cpu")
    logits = x @ w.T
    layer = {"hidden_states": x, "lm_head_weight": w, "lm_head_bias": b}
    for source, names in ((logits, {}), (None, layer)):
        for tensor in (logits, *layer.values()):
            tensor.requires_grad_()
        inputs = [*names.values()] or [logits]
        plain = causal_lm_loss(source, labels, V, items, **names)
        compiled = torch.compile(causal_lm_loss, backend="aot_eager", fullgraph=True)(source, labels, V, items, **names)
        torch.testing.assert_close(compiled, plain)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, inputs) for loss in (compiled, plain)), rtol=0.02, atol=1e-3
        )


@pytest.mark.parametrize("items", [None, 50, "tensor"])
@pytest.mark.parametrize("way", ["loss_function", "patch"])
def test_of_a_transformers_model(way: str, items: Any, calls: list[dict[str, Any]]) -> None:
    model = language_model()
    batch = torch.utils.data.default_collate(sentences())
    if items is not None:
        batch["num_items_in_batch"] = torch.tensor(50) if items == "tensor" else items
    parameters = list(model.parameters())
    expected = model(**batch).loss
    grads = torch.autograd.grad(expected, parameters)
    if way == "patch":
        with patch():
            loss = model(**batch).loss
        assert len(calls) == 1
    else:
        model.loss_function = causal_lm_loss
        loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), grads)


@pytest.mark.parametrize("way", ["loss_function", "patch"])
def test_of_a_compiled_transformers_model(way: str) -> None:
    """Micro-batches of different numbers of tokens, of which two make a step."""
    model = language_model()
    rows = sentences()
    for i, row in enumerate(rows):
        row["labels"][: i + 1] = -100
    batches = [torch.utils.data.default_collate(rows[i : i + 4]) for i in (0, 4)]
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    parameters = list(model.parameters())

    def gradients(call: Any) -> list[Tensor]:
        for batch in batches:
            call(**batch, num_items_in_batch=items).loss.backward()
        found = [parameter.grad for parameter in parameters]
        model.zero_grad()
        return found

    expected = gradients(model)
    if way == "patch":
        with patch(backend="torch"):
            found = gradients(torch.compile(model, backend="aot_eager"))
    else:
        model.loss_function = causal_lm_loss
        found = gradients(torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(found, expected)


def test_arguments_are_those_of_transformers() -> None:
    theirs = pytest.importorskip("transformers.loss.loss_utils", reason=REASON).ForCausalLMLoss
    parameters = inspect.signature(theirs).parameters
    ours = inspect.signature(causal_lm_loss).parameters
    assert [name for name in ours if ours[name].kind is not inspect.Parameter.KEYWORD_ONLY] == list(parameters)
    assert all(ours[name].default == parameters[name].default for name in parameters)
