"""Several outputs of each row in torch operations, chunk by chunk, and the gradient of the logits from theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused._row_outputs import DIFFERENTIABLE, OUTPUTS
from softmax_fused._spec import row_shape
from softmax_fused.backends.torch import chunks
from softmax_fused.backends.torch.chunks import with_classes
from softmax_fused.backends.torch.cross_entropy import canonicalize
from softmax_fused.backends.torch.cross_entropy import differentiable_gradient as gradient_of_loss
from softmax_fused.backends.torch.targets import make_target

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._row_outputs import RowOutputs
    from softmax_fused._spec import RowSpec, Upstream


def effective(z: Tensor, options: RowSpec) -> tuple[Tensor, Tensor | float]:
    """Return the logits scaled and capped, in the accumulation type, and what the gradient by them is multiplied by."""
    x = z if z.dtype is options.spec.acc else z.to(options.spec.acc)
    if options.scale != 1:
        x = x * options.scale
    if options.softcap is None:
        return x, options.scale
    t = torch.tanh(x / options.softcap)
    return options.softcap * t, options.scale * (1 - t * t)


def needs_log_p(outputs: tuple[str, ...]) -> bool:
    """Whether one of these outputs needs the logarithm of the softmax."""
    return any(OUTPUTS[name].needs_log_p for name in outputs)


def statistics(x: Tensor, outputs: tuple[str, ...], log_p: Tensor | None) -> dict[str, Tensor]:
    """Return the outputs of (N, C, d1..dk), all but the loss, from the effective logits and, where needed, log p."""
    wanted = [(name, OUTPUTS[name]) for name in outputs]
    prediction = x.argmax(1, keepdim=True) if any(output.needs_prediction for _, output in wanted) else None
    return {name: output.value(x, log_p, prediction) for name, output in wanted if output.value is not None}


def saved_shape(logits: Tensor) -> None:
    """Return that nothing is saved."""
    del logits


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec, save: bool
) -> tuple[RowOutputs, Tensor | None]:
    """Compute the outputs asked for; nothing else is saved."""
    del save
    z, t, _ = canonicalize(logits, target, None)
    batch = make_target(z, t, weight, options.spec)
    out = options.allocate(logits)
    rows = row_shape(z.shape)
    filled = {name: it.view(rows) for name, it in out._asdict().items() if it is not None}
    for part in chunks.row_chunks(z, chunks.CHUNK):
        at = with_classes(part)
        x, _ = effective(z[at], options)
        log_p = torch.log_softmax(x, 1) if needs_log_p(options.outputs) else None
        for name, values in statistics(x, options.outputs, log_p).items():
            filled[name][part] = values
        if "loss" in filled and log_p is not None:
            filled["loss"][part] = batch.loss(log_p, at).squeeze(1)
    if "loss" in filled:
        filled["loss"].copy_(batch.zero_ignored(filled["loss"]))
    return out, None


def gradient(
    upstream: Upstream,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    options: RowSpec,
    grad: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the logits from those of the differentiable outputs, None where there is none.

    It is written to `grad` where given, which may be the logits themselves.
    """
    del stats
    grad = torch.empty_like(logits) if grad is None else grad
    z, t, out = canonicalize(logits, target, grad)
    assert out is not None
    batch = make_target(z, t, weight, options.spec)
    rows = row_shape(z.shape)
    given = named(upstream, options, rows)
    g_loss = given.pop("loss", None)
    g_loss = None if g_loss is None else batch.zero_ignored(g_loss)
    for part in chunks.row_chunks(z, chunks.CHUNK):
        at = with_classes(part)
        x, slope = effective(z[at], options)
        log_p = torch.log_softmax(x, 1)
        by_x = by_logits(log_p, {name: g[part] for name, g in given.items()})
        if g_loss is not None:
            p = log_p.exp_()
            batch.gradient(p, g_loss[part].unsqueeze(1), at, p)
            by_x = p if by_x is None else by_x.add_(p)
        assert by_x is not None
        out[at] = by_x.mul_(slope) if options.changes_logits else by_x
    return grad


def named(upstream: Upstream, options: RowSpec, rows: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the upstream gradients that there are, in the accumulation type and of the rows' shape."""
    pairs = zip(DIFFERENTIABLE, upstream, strict=True)
    return {name: g.to(options.spec.acc).reshape(rows) for name, g in pairs if g is not None}


def by_logits(log_p: Tensor, upstream: dict[str, Tensor]) -> Tensor | None:
    """Return the gradient by the effective logits from those of all outputs but the loss, None where there are none."""
    grad = None
    for name, g in upstream.items():
        add_gradient = OUTPUTS[name].add_gradient
        assert add_gradient is not None
        grad = add_gradient(grad, log_p, g.unsqueeze(1))
    return grad


def differentiable_gradient(
    upstream: Upstream, logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec
) -> Tensor:
    """Compute the gradient in operations that autograd follows, for derivatives of higher order."""
    x, slope = effective(logits, options)
    z, _, _ = canonicalize(x, target, None)
    given = named(upstream, options, row_shape(z.shape))
    g_loss = given.pop("loss", None)
    by_x = by_logits(torch.log_softmax(z, 1), given) if given else None
    grad = torch.zeros_like(x) if by_x is None else by_x.view_as(x)
    if g_loss is not None:
        grad = grad + gradient_of_loss(g_loss, x, target, weight, options.spec)
    return (grad * slope).to(logits.dtype)
