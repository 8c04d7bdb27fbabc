"""Targets of a few classes a row, and their cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from softmax_fused import _errors
from softmax_fused._dispatch import SPARSE, can_read, get_backend, loss_dtype, route, row_operations, supports_fused
from softmax_fused._errors import TENSORS
from softmax_fused._fallback import validate
from softmax_fused._spec import FLOATS, RowSpec, class_dim, row_shape
from softmax_fused.backends.torch.targets import make_spec, named_classes, product, shares
from softmax_fused.functional.autograd import CrossEntropyRows

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import Spec

LOSS = ("loss",)


class SparseTarget(NamedTuple):
    """A target that names K classes a row with their probabilities; :func:`sparse_target` makes one.

    Both are of the logits' shape with K in the place of C. It is passed where a target goes.
    """

    classes: Tensor
    probabilities: Tensor


def sparse_target(classes: Tensor, probabilities: Tensor) -> SparseTarget:
    r"""A target that gives K classes a row a probability, and all others none: a teacher's most probable classes.

    .. math::
        t_{nc} = \sum_{k:\, \mathrm{classes}_{nk} = c} \mathrm{probabilities}_{nk}

    It goes where :func:`cross_entropy`, :func:`cross_entropy_rows`, :func:`linear_cross_entropy`,
    :func:`linear_cross_entropy_rows` and the modules take a target, and gives what the dense class probabilities t
    give, without a tensor of the logits' size. Nothing is normalised: where the probabilities of a row sum to less than
    1, the missing mass is no class's, and the loss is the part of the cross-entropy that the named classes have. Divide
    by `probabilities.sum(1, keepdim=True)` to spread it over them.

    An entry whose class is `ignore_index` counts nothing, so that rows may name fewer than K classes. A row in which
    all are ignored has no loss and no gradient, and is not counted by a mean; like that of dense probabilities, a mean
    divides by the number of rows, also with class weights. `grad_in_forward` and `inplace_backward` have no effect.

    Args:
        classes: Class indices, int64, (K,), (N, K) or (N, K, d1, ..., dk). A class may be named more than once.
        probabilities: Their probabilities, of the same shape; float16, bfloat16, float32 or float64. The loss can be
            differentiated by them.

    Returns:
        A :class:`SparseTarget`, a named tuple of the two.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes that differ, or types other than these.

    Example:
        >>> import torch
        >>> from softmax_fused import cross_entropy
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> target = sparse_target(torch.tensor([[0, 1], [1, -100]]), torch.tensor([[0.9, 0.1], [1.0, 0.0]]))
        >>> cross_entropy(logits, target)
        tensor(0.4607)

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015. Anshumann et al., Sparse Logit Sampling:
        Accelerating Knowledge Distillation in LLMs, 2025 (the bias of top-k targets).
    """
    for name, value in (("classes", classes), ("probabilities", probabilities)):
        if not isinstance(value, torch.Tensor):
            raise _errors.not_a_tensor(name, value)
    if classes.dtype is not torch.int64 or probabilities.dtype not in FLOATS or classes.shape != probabilities.shape:
        raise _errors.wrong_sparse_target(classes, probabilities)
    return SparseTarget(classes, probabilities)


def stand_in(logits: Tensor, target: SparseTarget) -> Tensor:
    """Return class indices, for what only asks whether a call with such logits is covered.

    Raises:
        TypeError: If the logits are no tensor.
        ValueError: If the target does not fit them.
    """
    if not isinstance(logits, torch.Tensor):
        raise _errors.not_a_tensor("input", logits)
    classes, rows, dim = target.classes, row_shape(logits.shape), class_dim(logits.ndim)
    of_rows = tuple(size for place, size in enumerate(classes.shape) if place != dim)
    if logits.ndim == 0 or classes.ndim != logits.ndim or of_rows != rows or classes.device != logits.device:
        raise _errors.unfit_sparse_target(tuple(logits.shape), classes, logits.device)
    return torch.zeros((), dtype=torch.int64, device=logits.device).expand(rows)


def pack(target: SparseTarget) -> Tensor:
    """Return the target as backends take it, see `SparseProbabilities`."""
    both = [target.classes.double(), target.probabilities.detach().double()]
    return torch.stack(both, class_dim(target.classes.ndim))


def can_pack(target: SparseTarget) -> bool:
    """Whether both are ordinary tensors, and the loss is not to be differentiated by the probabilities."""
    plain = type(target.classes) in TENSORS and type(target.probabilities) in TENSORS
    return plain and not (torch.is_grad_enabled() and target.probabilities.requires_grad)


def cross_entropy(
    input: Tensor,
    target: SparseTarget,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype | None,
    backend: str,
    batch_invariant: bool,
) -> Tensor:
    """Return the loss for a sparse target."""
    labels = stand_in(input, target)
    arguments = (input, labels, weight, ignore_index, reduction, label_smoothing)
    path = route(SPARSE, backend, (*arguments, dtype), batch_invariant)
    if path != "backend" and not supports_fused(*arguments, dtype):
        validate(*arguments, values=False)
    dtype = dtype or loss_dtype(input, target.probabilities)
    acc = torch.promote_types(dtype, torch.float32)
    options_of_spec = ("none", ignore_index, label_smoothing, acc, batch_invariant)
    spec = make_spec(input, labels, *options_of_spec)
    if path != "backend" or not can_pack(target):
        losses, valid = composed_losses(input, target, weight, spec)
    else:
        packed = pack(target)
        options = RowSpec(make_spec(input, packed, *options_of_spec), 1.0, None, LOSS)
        operations = row_operations(get_backend(backend, input.device.type), options.spec)
        if input.requires_grad and torch.is_grad_enabled():
            losses = CrossEntropyRows.apply(input, packed, weight, None, options, operations)[0]
        else:
            losses = operations.forward(input, packed, weight, options, save=False)[0].loss
        valid = (target.classes != ignore_index).any(class_dim(input.ndim))
    if reduction == "none":
        return losses.to(dtype)
    return (losses.sum() if reduction == "sum" else losses.sum() / valid.sum()).to(dtype)


def composed_losses(input: Tensor, target: SparseTarget, weight: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return the losses and which rows are not ignored, in torch operations that transforms and torch.compile know."""
    dim, classes, acc = class_dim(input.ndim), input.shape[class_dim(input.ndim)], spec.acc
    log_p = torch.log_softmax(input, dim, dtype=acc)
    label, valid, wrong = named_classes(target.classes, classes, spec.ignore_index, can_read(target.classes))
    share = shares(target.probabilities, label, valid, wrong, weight, spec)
    found = log_p.gather(dim, label)
    losses = -(share * found.masked_fill((share == 0) & found.isneginf(), 0)).sum(dim)
    if spec.label_smoothing:
        of_class: Any = torch.ones((), dtype=acc, device=input.device) if weight is None else weight.to(acc)
        of_class = of_class if weight is None else of_class.view(-1, *[1] * (input.ndim - dim - 1))
        losses = losses - spec.label_smoothing / classes * product(of_class.expand_as(log_p), log_p).sum(dim)
    used = valid.any(dim)
    return losses.masked_fill(~used, 0), used
