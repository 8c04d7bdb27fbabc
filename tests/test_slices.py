"""Slices of the classes, their statistics and terms brought together here instead of by ranks, against float64."""

from __future__ import annotations

import torch

from softmax_fused import functional
from softmax_fused._autograd import make_spec
from softmax_fused._slices import slice_operations
from tests import reference
from tests.cases import crossed
from tests.conftest import Place
from tests.ranks import assert_close, part_of, problem

SHAPES = {(5, 23): [2, 0, 20, 1], (3, 6, 7): [1, 5], (2, 3, 4, 5): [3], (2, 700): [150, 550], (300, 5): [4, 1]}


@crossed(
    shape=list(SHAPES),
    reduction=["none", "sum", "mean"],
    soft=[False, True],
    weighted=[False, True],
    smoothing=[0.0, 0.1],
)
def test_slices_are_the_whole(
    place: Place, shape: tuple[int, ...], reduction: str, soft: bool, weighted: bool, smoothing: float
) -> None:
    dtype = (torch.float32, torch.float64)[soft]
    logits, target, weight = (
        it if it is None else it.to(place.device) for it in problem(shape, dtype, soft, weighted, 0)
    )
    sizes = SHAPES[shape]
    module = slice_operations(functional.operations(place.backend, logits.device))
    spec = make_spec(logits, target, reduction, -100, smoothing, dtype)._replace(classes=shape[1])
    slices = []
    for rank, size in enumerate(sizes):
        z = part_of(logits, sizes, rank, 1)
        t = part_of(target, sizes, rank, 1) if soft else target
        w = None if weight is None else part_of(weight, sizes, rank, 0)
        it = spec._replace(first=sum(sizes[:rank]))
        slices.append((z, module.prepare(z, t, it), w, it, torch.zeros(z.shape, dtype=dtype, device=z.device)))
        assert z.shape[1] == size
    parts = [module.statistics(z, t, w, it) for z, t, w, it, _ in slices]
    m = torch.stack([part[0] for part in parts]).amax(0)
    sums = sum(module.terms(part, m, z, t, w, it) for part, (z, t, w, it, _) in zip(parts, slices, strict=True))
    upstream = torch.randn((), dtype=torch.float64, device=place.device).expand(
        (shape[0], *shape[2:]) if reduction == "none" else ()
    )
    truth = reference.cross_entropy(
        logits, target, weight, upstream=upstream, reduction=reduction, label_smoothing=smoothing
    )
    for rank, (z, t, w, it, grad) in enumerate(slices):
        loss, saved = module.close(sums, m, z, t, w, it)
        assert_close(loss, truth.loss, dtype)
        if z.numel():
            module.gradient(upstream.to(dtype), z, t, w, saved, it, grad)
        assert_close(grad, part_of(truth.grad, sizes, rank, 1), dtype)
