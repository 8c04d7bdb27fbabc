"""The outputs of rows whose logits are a slice of the classes, by the kernels of whole rows.

Those save m, log s, A, H and log p of the label for their gradient: the statistics of a slice, and what the gradient of
a slice needs of all slices together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softmax_fused._spec import RowStatistics, class_dim
from softmax_fused.backends.torch.row_outputs import effective
from softmax_fused.backends.triton import row_outputs
from softmax_fused.backends.triton.vocab_parallel import prepare as prepare

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import RowSpec, Upstream


def statistics(logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec) -> RowStatistics:
    """Return what a slice knows of each row."""
    found = RowStatistics.allocate(logits, options)
    if not logits.numel():
        return found
    wanted = {"logsumexp", "prediction", "entropy"} | ({"loss"} if options.spec.has_dense_target else set())
    local = options._replace(outputs=tuple(name for name in options.outputs if name in wanted))
    out, stats = row_outputs.forward(logits, target, weight, local, save=True)
    assert stats is not None
    found.numbers[:5] = stats
    if "loss" in local.outputs:
        found.dense_loss.copy_(out.loss.view(-1))
    if "prediction" in local.outputs:
        dim = class_dim(logits.ndim)
        top, _ = effective(logits.gather(dim, out.prediction.unsqueeze(dim)), options)
        found.top.copy_(top.reshape(-1))
        found = found._replace(prediction=out.prediction.view(-1))
    return found


def gradient(
    upstream: Upstream,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    options: RowSpec,
    grad: Tensor,
) -> None:
    """Fill `grad`, which may be the logits, with the gradient of the slice."""
    row_outputs.gradient(upstream, logits, target, weight, stats, options, grad=grad)
