"""What a call asks for, and what a backend offers: all that the functions and those that compute know of each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

import torch

from softmax_fused._row_outputs import OUTPUTS, RowOutputs

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    Upstream = Sequence[Tensor | None]


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The types of logits, class probabilities and results."""


def class_dim(ndim: int) -> int:
    """Return the dimension along which the classes of logits (C,) or (N, C, d1..dk) lie."""
    return min(ndim - 1, 1)


def row_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of logits (C,) or (N, C, d1..dk) without the classes."""
    if len(shape) == 2:
        return (shape[0],)
    return (shape[0], *shape[2:]) if shape[1:] else ()


class TargetKind:
    """A kind of target: what callers and backends ask of it. The kinds are classes of backends/torch/targets.py."""

    reader: ClassVar[str]
    """What kernels/targets.py calls it."""

    slice_reader: ClassVar[str]
    """The same where the logits are a slice of the classes."""

    has_labels: ClassVar[bool]
    """Whether it is a class index a row, of which `ignore_index` stands for no class."""

    dense: ClassVar[bool]
    """Whether every class has a share of it, also without label smoothing."""

    unit_sum: ClassVar[bool]
    """Whether a row of it sums to 1, so that without class weights A = 1 need not be saved."""

    weighted_mean: ClassVar[bool]
    """Whether a mean divides by the weights of the rows' classes instead of the number of rows."""

    sparse: ClassVar[bool] = False
    """Whether it names a few classes a row: `backends.sparse` computes it with operations for outputs of rows."""


class Spec(NamedTuple):
    """What a call of the loss asks for, beside its tensors."""

    target: type[TargetKind]
    reduction: str
    ignore_index: int
    label_smoothing: float
    dtype: torch.dtype  # of the loss
    acc: torch.dtype  # arithmetic: float32, or float64 where a tensor is float64
    classes: int = 0  # of all slices, where the logits are a slice of the classes
    first: int = 0  # class of the slice
    batch_invariant: bool = False  # what is computed of a row has the same bits in every batch

    @property
    def has_dense_target(self) -> bool:
        """Whether a is more than the target class's: every class has a share of it."""
        return self.target.dense or self.label_smoothing > 0

    @property
    def reader(self) -> str:
        """What the kernels call the kind of target, or the kind that they read where the logits are a slice."""
        return self.target.slice_reader if self.classes else self.target.reader

    def saves_target_sum(self, weight: Tensor | None) -> bool:
        """Whether A is saved beside m and log s of each row: it is 1 otherwise."""
        return weight is not None or not self.target.unit_sum


class RowSpec(NamedTuple):
    """What a call of :func:`cross_entropy_rows`, or of a linear layer's loss, asks for, beside its tensors."""

    spec: Spec
    scale: float
    softcap: float | None
    outputs: tuple[str, ...]

    @property
    def changes_logits(self) -> bool:
        """Whether the logits are scaled or capped."""
        return self.scale != 1 or self.softcap is not None

    def allocate(self, logits: Tensor) -> RowOutputs:
        """Return memory for the outputs asked for, None for the others."""
        shape = row_shape(logits.shape)
        return RowOutputs(
            *(
                logits.new_empty(shape, dtype=output.dtype or self.spec.dtype) if name in self.outputs else None
                for name, output in OUTPUTS.items()
            )  # type: ignore[arg-type]  # None where the caller named no such output
        )


class RowStatistics(NamedTuple):
    """What a slice of the classes knows of each row of effective logits x; rows are numbered flat.

    A row without classes, or whose logits are all -inf, has log s = -inf; its H, log p and loss mean nothing.
    """

    numbers: Tensor
    """(7, rows). The first five are m = max x, log s with s = sum exp(x - m), the sum A of the slice of the target, the
    entropy H, and log p of the label where the slice has it. Then come the loss by the slice, -<a, log p>, and the
    largest logit. A and the loss are there where the target is dense. What is not asked for means nothing."""

    prediction: Tensor | None
    """The slice's class of the largest logit, NaN being the largest; None where it is not asked for."""

    @property
    def m(self) -> Tensor:
        """The largest logit, or the least finite number where that is -inf."""
        return self.numbers[0]

    @property
    def log_s(self) -> Tensor:
        """The logarithm of s, from log1p where one class is all there is."""
        return self.numbers[1]

    @property
    def target_sum(self) -> Tensor:
        """A of the slice of the target, if it is dense."""
        return self.numbers[2]

    @property
    def entropy(self) -> Tensor:
        """H of the slice's softmax."""
        return self.numbers[3]

    @property
    def log_prob(self) -> Tensor:
        """Log p of the label by the slice's softmax."""
        return self.numbers[4]

    @property
    def dense_loss(self) -> Tensor:
        """The loss by the slice's softmax, if the target is dense."""
        return self.numbers[5]

    @property
    def top(self) -> Tensor:
        """The logit of the prediction, computed alike on every rank."""
        return self.numbers[6]

    @staticmethod
    def allocate(logits: Tensor, options: RowSpec) -> RowStatistics:
        """Return the statistics of rows of which nothing is known: those of a slice without classes."""
        rows = math.prod(row_shape(logits.shape))
        numbers = logits.new_zeros((7, rows), dtype=options.spec.acc)
        for place in (0, 1, 6):
            numbers[place] = -torch.inf
        prediction = logits.new_zeros(rows, dtype=torch.int64) if "prediction" in options.outputs else None
        return RowStatistics(numbers, prediction)


RowsKind = Literal["loss", "several", "sparse"]
"""Outputs of rows of which the loss is one, by what torch's operators would take: no more than the loss and the
prediction, a pass for each of several outputs, or a gather for a sparse target."""


class CrossEntropyOperations(Protocol):
    """The loss and its gradient. Every backend offers them."""

    def loss(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the loss and, with `save`, what `gradient` needs."""

    def saved_shapes(self, logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:
        """Return the shapes of what `loss` saves."""

    def gradient(
        self,
        upstream: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        spec: Spec,
        grad: Tensor | None = None,
    ) -> Tensor:
        """Compute the gradient of the logits, into `grad` where given, which may be the logits themselves."""

    def loss_and_gradient(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, grad: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Compute the loss, what `gradient` needs, and the gradient for an upstream gradient of 1.

        It is written to `grad` where given, which may be the logits themselves. None for it where a backend does better
        to compute the gradient apart.
        """

    def rescale_gradient(
        self,
        upstream: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        spec: Spec,
        grad: Tensor,
    ) -> Tensor:
        """Rescale `grad`, computed for an upstream gradient of 1, without a device synchronisation."""


class RowOutputsOperations(Protocol):
    """Several outputs of each row, and their gradient."""

    def saved_shape(self, logits: Tensor) -> tuple[int, int] | None:
        """Return the shape of what `forward` saves, numbers of each row of logits (N, C, d1..dk), or None."""

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: RowSpec,
        save: bool,
        row_scale: Tensor | None = None,
    ) -> tuple[RowOutputs, Tensor | None]:
        """Compute the outputs asked for and, with `save`, what `gradient` needs.

        `row_scale`, of the rows' shape, is what each row is multiplied by; the scale of the options is then 1.
        """

    def gradient(
        self,
        upstream: Upstream,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        stats: Tensor | None,
        options: RowSpec,
        row_scale: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> Tensor:
        """Compute the gradient of the logits from those of the differentiable outputs, None where there is none.

        It is written to `grad` where given, which may be the logits themselves.
        """


class SoftmaxOperations(Protocol):
    """Softmax or, with `log`, its logarithm along a dimension, and the gradient."""

    def forward(self, input: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
        """Compute it, of `dtype`."""

    def backward(self, upstream: Tensor, out: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
        """Compute the gradient of the input, of `dtype`, from the output."""


class VocabParallelOperations(Protocol):
    """The loss where the logits are a slice of the classes; `spec` says which. Rows are numbered flat."""

    def prepare(self, logits: Tensor, target: Tensor, spec: Spec) -> Tensor:
        """Return the target in the form that the others take."""

    def statistics(self, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
        """Return m, s and, with a dense target, its sum and <a, z - m> of each row of the slice.

        They leave out the target class.
        """

    def terms(
        self, parts: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
    ) -> Tensor:
        """Return what is summed over ranks, from the slice's statistics and the m of all slices."""

    def finalize(
        self, sums: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and what `gradient` needs, from the sums over ranks: the same on every rank."""

    def gradient(
        self,
        upstream: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        spec: Spec,
        grad: Tensor,
    ) -> object:
        """Fill `grad` with the gradient of the slice."""


class SliceRowsOperations(Protocol):
    """The outputs of rows where the logits are a slice of the classes; the options' `spec` says which."""

    def prepare(self, logits: Tensor, target: Tensor, spec: Spec) -> Tensor:
        """Return the target in the form that the others take."""

    def statistics(self, logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec) -> RowStatistics:
        """Return what the slice knows of each row."""

    def gradient(
        self,
        upstream: Upstream,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        stats: Tensor,
        options: RowSpec,
        grad: Tensor,
    ) -> object:
        """Fill `grad` with the gradient of the slice from those of the differentiable outputs.

        `stats` are (5, rows), of all slices together: m, log s, A, H, and log p of the label. `grad` may be the logits.
        """


class Backend(Protocol):
    """What computes. A family of operations is offered as a whole, or is None and computed as its line says.

    The functions that users call are `cross_entropy` (also chunk by chunk, for a linear layer), `row_outputs`,
    `softmax` (with its logarithm), `vocab_parallel` and `slice_rows` (also chunk by chunk).
    """

    name: str
    cross_entropy: CrossEntropyOperations
    row_outputs: RowOutputsOperations | None = None  # None: the torch backend's
    softmax: SoftmaxOperations | None = None  # None: torch's own functions
    vocab_parallel: VocabParallelOperations | None = None  # None: the torch backend's
    slice_rows: SliceRowsOperations | None = None  # None: the torch backend's
    gradient_with_loss: Collection[str] = ()
    """Types of the devices on which the gradient of a mean or sum is best computed with the loss, also unasked."""

    def refusal(self, device_type: str) -> str | None:  # noqa: ARG002 - a default
        """Say why it cannot serve tensors on such a device, None if it can."""
        return None

    least_numel: int = 0
    """Fewer logits than this on the CPU it always leaves to torch's own operator, under backend="auto"."""

    def leaves_to_torch(self, logits: Tensor, with_gradient: bool) -> bool:  # noqa: ARG002 - a default
        """Whether torch's own operator is faster for the loss of such logits on the CPU, under backend="auto"."""
        return False

    def leaves_rows_to_torch(self, logits: Tensor, with_gradient: bool, kind: RowsKind) -> bool:  # noqa: ARG002
        """Whether the same holds for outputs of rows of this kind."""
        return False

    def leaves_softmax_to_torch(self, input: Tensor, dim: int) -> bool:  # noqa: ARG002 - a default
        """Whether the same holds for its softmax along `dim`."""
        return False


class Registration(Protocol):
    """A backend before it is loaded: a package of `backends` whose import is cheap."""

    def suits(self, device: torch.device) -> tuple[bool, str]:
        """Return whether backend="auto" takes it for tensors on `device`, and why or why not, if there is a reason."""

    def load(self) -> Backend:
        """Import what computes.

        Raises:
            RuntimeError: If it cannot be had on this machine.
        """
