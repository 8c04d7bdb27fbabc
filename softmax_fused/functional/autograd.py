"""The torch.autograd.Functions: what forward saves, and who computes the gradient in backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from softmax_fused._row_outputs import DIFFERENTIABLE, OUTPUTS
from softmax_fused._spec import class_dim
from softmax_fused.backends.sparse import log_probs, sum_named, sum_of_same_class, write_chosen
from softmax_fused.backends.torch import cross_entropy as torch_loss
from softmax_fused.backends.torch import row_outputs as torch_rows

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import CrossEntropyOperations, RowOutputsOperations, RowSpec, SoftmaxOperations, Spec

is_batched, is_batched_by_autograd = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
is_grad_enabled = torch.is_grad_enabled


def batched(tensor: Tensor) -> bool:
    """Whether vmap is at work: torch.func.vmap, or torch.autograd.grad(..., is_grads_batched=True)."""
    return bool(is_batched(tensor) or is_batched_by_autograd(tensor))


class CrossEntropy(torch.autograd.Function):
    """Saves the logits and two or three numbers a row; backward computes the softmax again.

    `gradient_mode` says where the gradient comes from: "backward" computes it into a new tensor, "in place" over the
    logits, and "forward" with the loss, for an upstream gradient of 1; backward then only rescales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        spec: Spec,
        operations: CrossEntropyOperations,
        gradient_mode: str,
    ) -> Tensor:
        """Compute the loss."""
        precomputed = None
        if gradient_mode == "forward":
            loss, saved, precomputed = operations.loss_and_gradient(logits, target, weight, spec)
        else:
            loss, saved = operations.loss(logits, target, weight, spec, save=True)
        ctx.save_for_backward(logits, target, weight, *saved)
        ctx.call = spec, operations, gradient_mode, precomputed
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits; in torch operations where it is to be differentiated or batched."""
        logits, target, weight, *saved = ctx.saved_tensors
        spec, operations, gradient_mode, precomputed = ctx.call
        if is_grad_enabled() or is_batched(upstream) or is_batched_by_autograd(upstream):
            grad = torch_loss.differentiable_gradient(upstream, logits, target, weight, spec)
        elif gradient_mode == "in place":
            grad = operations.gradient(upstream, logits, target, weight, saved, spec, logits.detach())
            torch.autograd.graph.increment_version(logits)  # autograd raises where the logits are needed later
        elif precomputed is not None:
            # It is returned once, as the caller may change it: a second backward computes its own.
            ctx.call = spec, operations, gradient_mode, None
            grad = operations.rescale_gradient(upstream, logits, target, weight, saved, spec, precomputed)
        else:
            grad = operations.gradient(upstream, logits, target, weight, saved, spec)
        return grad, None, None, None, None, None


class CrossEntropyRows(torch.autograd.Function):
    """Saves the logits and four numbers a row; outputs without an upstream gradient cost backward nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        row_scale: Tensor | None,
        options: RowSpec,
        operations: RowOutputsOperations,
    ) -> tuple[Tensor, ...]:
        """Compute the outputs."""
        out, stats = operations.forward(logits, target, weight, options, save=True, row_scale=row_scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, row_scale, stats)
        ctx.options, ctx.operations = options, operations
        kinds = zip(out, OUTPUTS.values(), strict=True)
        ctx.mark_non_differentiable(*(it for it, output in kinds if it is not None and not output.differentiable))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits; in torch operations where it is to be differentiated or batched."""
        differentiable = tuple(g for g, output in zip(upstream, OUTPUTS.values(), strict=True) if output.differentiable)
        given = [g for g in differentiable if g is not None]
        if not given:
            return None, None, None, None, None, None
        logits, target, weight, row_scale, stats = ctx.saved_tensors
        arguments = (differentiable, logits, target, weight)
        if torch.is_grad_enabled() or any(batched(g) for g in given):
            grad = torch_rows.differentiable_gradient(*arguments, ctx.options, row_scale)
        else:
            grad = ctx.operations.gradient(*arguments, stats, ctx.options, row_scale)
        return grad, None, None, None, None, None


class LogProb(torch.autograd.Function):
    """Log-probabilities of several classes a row (N, K, d1..dk): saves the logits, and the log-sum-exp of each row.

    Backward computes the gradient of the log-sum-exp, and then writes that of the chosen classes: one buffer of the
    logits' size, rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        label: Tensor,
        valid: Tensor,
        target: Tensor,
        row_scale: Tensor | None,
        options: RowSpec,
        operations: RowOutputsOperations,
    ) -> Tensor:
        """Compute x - log sum exp, 0 where it is not valid."""
        dim = class_dim(logits.ndim)
        out, stats = operations.forward(logits, target, None, options, save=True, row_scale=row_scale)
        logsumexp = out.logsumexp.unsqueeze(dim)
        ctx.save_for_backward(logits, label, valid, target, row_scale, stats, logsumexp)
        ctx.call = options, operations
        scale = torch_rows.along_classes(row_scale, logits)
        return log_probs(logits, label, logsumexp, options, scale).masked_fill(~valid, 0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits; in torch operations where it is to be differentiated or batched."""
        logits, label, valid, target, row_scale, stats, logsumexp = ctx.saved_tensors
        options, operations = ctx.call
        dim, scale = class_dim(logits.ndim), torch_rows.along_classes(row_scale, logits)
        g = upstream.masked_fill(~valid, 0)
        if torch.is_grad_enabled() or batched(upstream):
            total = g.sum(dim, keepdim=True)
            x, slope = torch_rows.effective(logits, options, scale)
            grad = torch.zeros_like(x).scatter_add(dim, label, g) - torch.softmax(x, dim) * total
            return (grad * slope).to(logits.dtype), *[None] * 6
        total = sum_named(g, dim, options.spec).unsqueeze(dim)
        by_logsumexp = [-total.squeeze(dim) if name == "logsumexp" else None for name in DIFFERENTIABLE]
        grad = operations.gradient(by_logsumexp, logits, target, None, stats, options, row_scale)
        log_p = log_probs(logits, label, logsumexp, options, scale)
        _, slope = torch_rows.effective(logits.gather(dim, label), options, scale)
        by_label = sum_of_same_class(label, g, dim) - log_p.exp() * total
        unused = (g == 0).all(dim, keepdim=True)
        return write_chosen(grad, label, by_label * slope, unused, logsumexp, dim), *[None] * 6


def differentiable_softmax_gradient(upstream: Tensor, out: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    """Compute the gradient of softmax's input in operations that autograd follows, for derivatives of higher order."""
    acc = torch.promote_types(torch.promote_types(out.dtype, dtype), torch.float32)
    y, g = out.to(acc), upstream.to(acc)
    grad = g - y.exp() * g.sum(dim, keepdim=True) if log else y * (g - (y * g).sum(dim, keepdim=True))
    return grad.to(dtype)


class Softmax(torch.autograd.Function):
    """Saves the output alone, from which the gradient is computed."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, dim: int, dtype: torch.dtype, log: bool, operations: SoftmaxOperations
    ) -> Tensor:
        """Compute the softmax, or its logarithm."""
        out = operations.forward(input, dim, dtype, log)
        ctx.save_for_backward(out)
        ctx.options, ctx.operations = (dim, input.dtype, log), operations
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the input; in torch operations where it is to be differentiated or batched."""
        (out,) = ctx.saved_tensors
        if torch.is_grad_enabled() or batched(upstream):
            grad = differentiable_softmax_gradient(upstream, out, *ctx.options)
        else:
            grad = ctx.operations.backward(upstream, out, *ctx.options)
        return grad, None, None, None, None
