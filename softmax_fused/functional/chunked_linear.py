"""A linear layer and its cross-entropy, loss and gradients, with the logits of one chunk of rows at a time.

z = x W^T + b,  G = d loss / d z,  d loss / d x = G W,  d loss / d W = G^T x,  d loss / d b = sum of G over the rows

Forward computes the gradients of the sum of the losses; backward multiplies them by the upstream gradient and, for a
mean, by 1 / N. G / N in forward would be rounded to 0 in float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from softmax_fused._dispatch import get_backend, row_operations
from softmax_fused._row_outputs import DIFFERENTIABLE
from softmax_fused._spec import RowSpec
from softmax_fused.backends.torch import cross_entropy as torch_loss
from softmax_fused.backends.torch.chunks import pieces
from softmax_fused.backends.torch.row_outputs import effective
from softmax_fused.backends.torch.targets import kind, make_spec
from softmax_fused.functional.autograd import batched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from softmax_fused._spec import CrossEntropyOperations, RowOutputsOperations, Spec

SMALLEST_CHUNK = 2**24
"""The fewest logits in a chunk by default: below 64 MiB of float32 there is no memory worth saving."""


class Plan(NamedTuple):
    """What a call asks for, beside its tensors."""

    options: RowSpec  # its spec has the reduction of the loss
    operations: CrossEntropyOperations
    row_operations: RowOutputsOperations
    sizes: tuple[int, ...]  # shape (C, d1, ..., dk) of a row of logits
    rows: int  # the most rows in a chunk
    dtype: torch.dtype  # of the layer: what autocast casts its tensors to, or their own
    products: torch.dtype  # of the matrix products

    @property
    def spec(self) -> Spec:
        """What is asked of the loss."""
        return self.options.spec


class Layer(NamedTuple):
    """The tensors: x (N, D), W (K, D) and b (K,) with K = C * d1 * ... * dk, and those of the loss."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None

    def operands(self, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x, W and b as the matrix products take them."""
        x, w, b = (None if t is None else t.to(plan.dtype).to(plan.products) for t in self[:3])
        assert x is not None
        assert w is not None
        return x, w, b


def default_rows(rows: int, features: int, classes: int) -> int:
    """Return how many rows make a chunk of logits as large as the input or W, whichever is larger.

    Those are in memory anyway. Chunks are few, min(N, C) / D of them, and each matrix product is large.
    """
    return max(1, max(features * max(rows, classes), SMALLEST_CHUNK) // classes)


def make_plan(
    layer: Layer,
    outputs: tuple[str, ...],
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    sizes: Sequence[int],
    rows: int,
    layer_dtype: torch.dtype,
    backend: str,
    batch_invariant: bool = False,
) -> Plan:
    """Put together what a call asks for, in the order of the custom operators' arguments."""
    x = layer.input
    logits = x.new_empty(1).expand(x.shape[0], *sizes)
    spec = make_spec(logits, layer.target, reduction, ignore_index, label_smoothing, dtype, batch_invariant)
    options = RowSpec(spec, float(logit_scale), None if softcap is None else float(softcap), outputs)
    chosen = get_backend(backend, x.device.type)
    products = product_dtype(layer_dtype, x.device)
    of_rows = row_operations(chosen, spec)
    return Plan(options, chosen.cross_entropy, of_rows, tuple(sizes), rows, layer_dtype, products)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which products of `dtype` are summed over chunks."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type of the matrix products: not 16 bits on the CPU, where G W took 50 times as long as in float32."""
    return sum_dtype(dtype) if device.type == "cpu" else dtype


def project(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
    """Fill `out` with x W^T + b."""
    return torch.mm(x, w.t(), out=out) if b is None else torch.addmm(b, x, w.t(), out=out)


def add_product(total: Tensor, g: Tensor, x: Tensor) -> None:
    """Add G^T x to `total`, in its type: float32 where G and x are of 16 bits."""
    if total.dtype == g.dtype:
        total.addmm_(g.t(), x)
    elif g.is_cuda and not torch.version.hip and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.ops.aten.addmm.dtype_out(total, g.t(), x, total.dtype, out=total)
    else:  # torch before 2.8, ROCm: each chunk's product is rounded, their sum is not
        total.add_(g.t() @ x)


def multiply_gradient(g: Tensor, w: Tensor, at: slice | Tensor, out: Tensor) -> None:
    """Write g W to the rows `at` of `out`."""
    if isinstance(at, slice):
        torch.mm(g, w, out=out[at])
    else:  # autocast leaves a product with `out` in its type
        product = torch.mm(g, w, out=out.new_empty(len(g), w.shape[1]))
        out.index_copy_(0, at, product)


def chunk_losses(z: Tensor, layer: Layer, plan: Plan, upstream: Tensor | None, differentiate: bool) -> Tensor:
    """Return the losses of a chunk of logits; with `differentiate` write their gradient over it."""
    spec, operations = plan.spec._replace(reduction="none", dtype=plan.spec.acc), plan.operations
    arguments = (z, layer.target, layer.weight)
    if plan.options.changes_logits or spec.target.sparse:
        return changed_losses(
            arguments, plan._replace(options=plan.options._replace(spec=spec)), upstream, differentiate
        )
    if not differentiate:
        return operations.loss(*arguments, spec, save=False)[0]
    if upstream is None:
        losses, saved, grad = operations.loss_and_gradient(*arguments, spec, z)
        if grad is not None:
            return losses
        upstream = losses.new_ones(()).expand_as(losses)
    else:
        losses, saved = operations.loss(*arguments, spec, save=True)
    operations.gradient(upstream, *arguments, saved, spec, z)
    return losses


def changed_losses(
    arguments: tuple[Tensor, Tensor, Tensor | None], plan: Plan, upstream: Tensor | None, differentiate: bool
) -> Tensor:
    """Do the same for changed logits and sparse targets, which the operations for outputs of rows know."""
    out, stats = plan.row_operations.forward(*arguments, plan.options, save=differentiate)
    if differentiate:
        g = out.loss.new_ones(()).expand_as(out.loss) if upstream is None else upstream
        of_outputs = [g if name == "loss" else None for name in DIFFERENTIABLE]
        plan.row_operations.gradient(of_outputs, *arguments, stats, plan.options, grad=arguments[0])
    return out.loss


def numbers_of(rows: Tensor) -> Tensor | None:
    """Return the numbers of the rows (N, d1..dk) of a mask in which anything is True; None where all N have it."""
    numbers = rows.flatten(1).any(1) if rows.ndim > 1 else rows
    return None if bool(numbers.all()) else numbers.nonzero().squeeze(1)


def valid_rows(layer: Layer, plan: Plan) -> Tensor | None:
    """Return the numbers of the rows that are not ignored, None where all rows are multiplied.

    All are on a GPU. The host fixes the shape of a matrix product, and how many rows are ignored is known on the device
    alone: moving the ignored rows to the end would leave the product as large, and to ask for their number would have
    the host wait for the device.
    """
    if not layer.target.is_cpu:
        return None
    valid = kind(plan.spec).rows_used(layer.target, plan.spec.ignore_index)
    return None if valid is None else numbers_of(valid)


def chunk_logits(
    x: Tensor, w: Tensor, b: Tensor | None, plan: Plan, rows: Tensor | None
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Yield the rows of each chunk of `rows`, or of all, with their features and, in one buffer, their logits."""
    count = len(x) if rows is None else len(rows)
    parts = pieces(count, len(w), plan.rows * len(w)) if count else []
    buffer = x.new_empty((parts[0].stop if parts else 0, len(w)))
    for part in parts:
        at = part if rows is None else rows[part]
        features = x[at]
        yield at, features, project(features, w, b, buffer[: len(features)])


class Gradients:
    """The gradients of x, W and b that are needed, from those of the chunks' logits."""

    def __init__(self, x: Tensor, w: Tensor, needs: Sequence[bool], rows: Tensor | None) -> None:
        dtype = sum_dtype(w.dtype)
        self.w = w
        self.of_x = (torch.empty_like(x) if rows is None else torch.zeros_like(x)) if needs[0] else None
        self.of_w = torch.zeros_like(w, dtype=dtype) if needs[1] else None
        self.of_b = w.new_zeros(len(w), dtype=dtype) if needs[2] else None

    def add(self, g: Tensor, x: Tensor, at: slice | Tensor) -> None:
        """Add what the rows `at`, with features x and gradient g of their logits, contribute."""
        if self.of_x is not None:
            multiply_gradient(g, self.w, at, self.of_x)
        if self.of_w is not None:
            add_product(self.of_w, g, x)
        if self.of_b is not None:
            self.of_b.add_(g.sum(0, dtype=self.of_b.dtype))

    def found(self) -> list[Tensor | None]:
        """Return them in the order of x, W and b."""
        return [self.of_x, self.of_w, self.of_b]


def run_chunks(
    layer: Layer, plan: Plan, needs: Sequence[bool], upstream: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss of each row, and those gradients of x, W and b that `needs` asks for.

    They are for the upstream gradient `upstream` of each row's loss or, where that is None, for 1. What is
    said of ignored rows, loss 0 and gradient 0, is not computed where `valid_rows` leaves them out.
    """
    x, w, b = layer.operands(plan)
    rows = valid_rows(layer, plan)
    losses = x.new_empty((len(x), *plan.sizes[1:]), dtype=plan.spec.acc)
    if rows is not None:
        losses.zero_()
    gradients = Gradients(x, w, needs, rows)
    for at, features, z in chunk_logits(x, w, b, plan, rows):
        chunk = layer._replace(target=layer.target[at])
        g = None if upstream is None else upstream[at]
        losses[at] = chunk_losses(z.view(-1, *plan.sizes), chunk, plan, g, any(needs))
        gradients.add(z, features, at)
    return losses, gradients.found()


def reduce(losses: Tensor, layer: Layer, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Return the loss and, for a mean, what its gradients are multiplied by: they were computed for the sum."""
    if plan.spec.reduction == "none":
        return losses.to(plan.spec.dtype), None
    if plan.spec.reduction == "sum":
        return losses.sum().to(plan.spec.dtype), None
    spec, shape = plan.spec, tuple(losses.shape)
    denominator, any_row = kind(spec).mean_over(layer.target, layer.weight, spec.ignore_index, shape, losses.dtype)
    denominator = denominator.masked_fill(denominator == 0, torch.nan)
    return (losses.sum() / denominator).to(plan.spec.dtype), torch.where(any_row, 1 / denominator, 0)


class LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of a mean or sum with the loss; those of single losses need their upstream gradients.

    The first backward returns the precomputed gradients, rescaled in place. A second one computes them again, and gets
    the same bits.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> Tensor:
        """Compute the loss."""
        layer = Layer(*tensors)
        needs = ctx.needs_input_grad[1:4] if plan.spec.reduction != "none" else (False, False, False)
        losses, ctx.precomputed_grads = run_chunks(layer, plan, needs)
        loss, ctx.factor = reduce(losses, layer, plan)
        ctx.save_for_backward(*tensors)
        ctx.plan = plan
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients; where they will be differentiated or are batched, in torch operations."""
        plan, layer, needs = ctx.plan, Layer(*ctx.saved_tensors), ctx.needs_input_grad[1:4]
        scale: Tensor | None = None
        grads: list[Tensor | None] | None
        if torch.is_grad_enabled() or batched(upstream):
            grads = differentiable_gradients(upstream, layer, plan)
        elif plan.spec.reduction == "none":
            grads = run_chunks(layer, plan, needs, upstream)[1]
        else:
            grads, ctx.precomputed_grads = ctx.precomputed_grads, None
            if grads is None:
                grads = run_chunks(layer, plan, needs)[1]
            scale = upstream.to(plan.spec.acc) if ctx.factor is None else upstream.to(plan.spec.acc) * ctx.factor
        results = [
            None if grad is None or tensor is None else scaled(grad, scale).to(tensor.dtype)
            for grad, tensor in zip(grads, layer[:3], strict=True)
        ]
        return None, *results, None, None


def scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    """Return grad * scale: in place, but for 16-bit gradients, where the scale would be rounded to 16 bits, too."""
    return grad if scale is None else grad.to(sum_dtype(grad.dtype)).mul_(scale)


def differentiable_gradients(upstream: Tensor, layer: Layer, plan: Plan) -> list[Tensor | None]:
    """Compute the gradients in operations that autograd follows, with all logits at once."""
    with torch.autocast(layer.input.device.type, enabled=False):
        x, w, b = layer.operands(plan)
        logits, slope = effective(F.linear(x, w, b).view(-1, *plan.sizes), plan.options)
        g = slope * torch_loss.differentiable_gradient(upstream, logits, layer.target, layer.weight, plan.spec)
        g = g.reshape(len(x), len(w)).to(x.dtype)
        return [g @ w, g.t() @ x, g.sum(0)]
