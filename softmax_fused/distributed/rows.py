"""Outputs of rows whose classes are divided among ranks, as a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from softmax_fused import _errors
from softmax_fused._dispatch import get_backend, loss_dtype, slice_row_operations
from softmax_fused._errors import REFUSALS
from softmax_fused._row_outputs import DEFAULT, OUTPUTS, RowOutputs
from softmax_fused._spec import RowSpec, row_shape
from softmax_fused.backends.torch.targets import kind_of, make_spec
from softmax_fused.distributed.exchange import Arguments, validation_error
from softmax_fused.distributed.merge import KNOWN
from softmax_fused.distributed.row_autograd import SliceRows
from softmax_fused.distributed.vocab_parallel import agreed_sizes, backend_error, members
from softmax_fused.functional.rows import check_options, check_target_class

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor


def cross_entropy_rows(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Collection[str] = DEFAULT,
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    backend: str = "auto",
) -> RowOutputs:
    r"""Loss, log-sum-exp, prediction, entropy and more of each row of logits whose classes are divided among ranks.

    .. math::
        m = \max_r m_r, \quad e_r = e^{m_r - m + \log s_r}, \quad s = \sum_r e_r, \quad
        \mathrm{logsumexp} = m + \log s, \quad
        H = \frac{1}{s} \sum_r e_r (H_r - \log e_r) + \log s, \quad
        \mathrm{log\_prob} = x_y - m - \log s

    They are those of :func:`softmax_fused.cross_entropy_rows` on the whole logits, the same on every rank to the bit,
    and so is what is differentiable; the gradient is that of the rank's slice. Ranks hold slices as in
    :func:`cross_entropy`, and all of them must call it.

    Communication for N rows, in numbers of float32 (float64 for float64), all of it independent of C: forward an
    all-reduce of N row maxima and one of packed sums, 2 N for class indices, N more with weights, N more with label
    smoothing, 2 N more with both, 3 N for class probabilities, N more for the entropy. The prediction takes N more
    of the first and a third all-reduce, of N int64: of ties it is the first class. Backward none. Before them, unless
    `sizes` is given, one all-gather of 64 bytes a rank, as in :func:`cross_entropy`.

    Args:
        local_logits: This rank's slice of the logits, (C_r,), (N, C_r) or (N, C_r, d1, ..., dk); any strides.
        target: Class indices among all classes, int64 of the logits' shape without C_r, the same on every rank; or this
            rank's slice of the class probabilities, of the logits' shape.
        weight: Weight of each class of the slice (C_r,), on every rank or on none.
        ignore_index: Class index whose rows have no loss.
        label_smoothing: Share of the target spread evenly over all classes, at most 1.
        logit_scale: What the logits are multiplied by: a number.
        softcap: Bound of the logits after scaling, by tanh; None for none.
        outputs: Names of the outputs wanted: "loss", "logsumexp", "prediction", "entropy"; for class indices also
            "log_prob". By default the first four. There is no "rank".
        dtype: Type of the outputs other than the prediction; None for that of `cross_entropy`.
        group: The ranks; None for all.
        sizes: Number of classes on each rank, where known: no all-gather, and nothing waits for the device.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.

    Returns:
        A :class:`softmax_fused.RowOutputs` of tensors of the logits' shape without C_r; `prediction` holds indices
        among all classes. Not differentiable twice.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU that row's loss, log_prob and gradient are
            NaN.
        ValueError: Unknown output or backend, a cap that is not positive, arguments that differ between ranks, `sizes`
            that do not fit, an output that needs a target class where there are class probabilities.
        RuntimeError: Shapes or dtypes that do not fit, class probabilities or weights that require a gradient,
            label_smoothing above 1, kernels asked for where none can run, another rank's error.
        TypeError: An argument of the wrong type.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> local_logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> rows = cross_entropy_rows(local_logits, torch.tensor([0, 2]), outputs=("entropy", "prediction"))
        >>> rows.entropy
        tensor([0.5243, 0.9753])
        >>> rows.prediction
        tensor([0, 1])
        >>> dist.destroy_process_group()

    References:
        Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism, 2019.
    """
    named = outputs if isinstance(outputs, str) else tuple(outputs)
    transform = (logit_scale, softcap)
    given = Arguments(local_logits, target, weight, ignore_index, "none", label_smoothing, dtype, (*transform, named))
    if torch.compiler.is_compiling():
        from softmax_fused.distributed import untraced

        rows: RowOutputs = untraced.compute_rows(given, *transform, named, group, sizes, backend)
        return rows
    return compute(given, *transform, named, group, sizes, backend)


def options_error(
    logit_scale: Any, softcap: Any, outputs: Any, dtype: Any, has_labels: bool, target: Any
) -> Exception | None:
    """Return what is wrong with the options of outputs of rows, or None."""
    try:
        wanted = check_options(logit_scale, softcap, outputs, dtype)
        if not set(wanted) <= set(KNOWN):
            return _errors.unknown_outputs_of_slices([name for name in wanted if name not in KNOWN], KNOWN)
        check_target_class(wanted, has_labels, target)
    except REFUSALS as error:
        return error
    return None


def row_options(
    it: Arguments, logit_scale: float, softcap: float | None, outputs: Any, sizes: Sequence[int], rank: int
) -> RowSpec:
    """Return what a call asks for of a slice, in the accumulation type."""
    wanted = check_options(logit_scale, softcap, outputs, it.dtype)
    dtype = it.dtype or loss_dtype(it.logits, it.target)
    spec = make_spec(it.logits, it.target, "none", it.ignore_index, it.label_smoothing, dtype)
    spec = spec._replace(classes=sum(sizes), first=sum(sizes[:rank]), dtype=spec.acc)
    return RowSpec(spec, float(logit_scale), None if softcap is None else float(softcap), wanted)


def finished(found: Sequence[Tensor | None], shape: Sequence[int], dtype: torch.dtype) -> RowOutputs:
    """Return the outputs in the rows' shape, those of floating point in the type asked for."""
    outputs = zip(found, OUTPUTS.values(), strict=True)
    return RowOutputs(
        *(None if it is None else it.view(tuple(shape)).to(output.dtype or dtype) for it, output in outputs)  # type: ignore[arg-type]  # None as the caller asked
    )


def compute(
    it: Arguments,
    logit_scale: float,
    softcap: float | None,
    outputs: Any,
    group: dist.ProcessGroup | None,
    sizes: Sequence[int] | None,
    backend: str,
) -> RowOutputs:
    """Check that the ranks' arguments agree, and compute the outputs."""
    ranks, rank = members(group)
    problem = validation_error(it) or backend_error(it.logits, backend)
    problem = problem or options_error(
        logit_scale, softcap, outputs, it.dtype, kind_of(it.logits, it.target).has_labels, it.target
    )
    sizes = agreed_sizes(it, problem, sizes, ranks, rank)
    options = row_options(it, logit_scale, softcap, outputs, sizes, rank)
    others = ranks if len(sizes) > 1 else None
    operations = slice_row_operations(get_backend(backend, it.logits.device.type))
    *found, _ = SliceRows.apply(it.logits, it.target, it.weight, options, others, operations)
    return finished(found, row_shape(it.logits.shape), it.dtype or loss_dtype(it.logits, it.target))
