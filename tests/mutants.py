# ruff: noqa: E501 - a line a bug
"""Plant one bug at a time and see a test fail: `make mutants`, or python -m tests.mutants [NAME...].

Each mutant is a copy of the tree with one replacement; the quick tests of the loss run in it until the first failure.
A mutant that survives is a hole in the tests: exit status 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = ("layouts", "numerics", "loss", "autograd", "launch", "errors")


class Mutant(NamedTuple):
    file: str
    right: str
    wrong: str


KERNEL, ROWS, LAUNCH, TORCH = (
    "kernels/cross_entropy.py",
    "kernels/rows.py",
    "softmax_fused/_launch.py",
    "softmax_fused/_torch_path.py",
)
MUTANTS = {
    "forward reads classes beyond C": Mutant(KERNEL, 'mask=inside, other=float("-inf")).to(ACC)\n        m_new', 'mask=live[:, None], other=0.0).to(ACC)\n        m_new'),
    "gradient written beyond C": Mutant(KERNEL, "grad.to(grad_ptr.dtype.element_ty), mask=inside", "grad.to(grad_ptr.dtype.element_ty), mask=live[:, None]"),
    "running sum not rescaled": Mutant(KERNEL, "s = s * tl.exp(m - shift) +", "s = s +"),
    "unguarded -inf": Mutant(KERNEL, 'shift = tl.where(m_new == float("-inf"), 0.0, m_new)', "shift = m_new"),
    "0 * (-inf) is NaN": Mutant(KERNEL, "tl.sum(tl.where(a == 0.0, 0.0, a * z), axis=1)", "tl.sum(a * z, axis=1)"),
    "true class cancels in the loss": Mutant(KERNEL, "tl.where(e_true == 1.0, log1p(s), tl.log(s + e_true))", "tl.log(s + e_true)"),
    "true class cancels in the gradient": Mutant(KERNEL, "expm1((z_true - shift) - log_s)", "(tl.exp((z_true - shift) - log_s) - 1.0)"),
    "m and log s saved as one": Mutant(KERNEL, "tl.exp((z - shift[:, None]) - log_s[:, None])", "tl.exp(z - (shift + log_s)[:, None])"),
    "ignored rows have a gradient": Mutant(KERNEL, "grad = tl.where(keep[:, None] == 0.0, 0.0, grad)", "grad = grad"),
    "ignored rows count in the mean": Mutant(KERNEL, "tl.where(live & (keep == 1.0), 1.0, 0.0))\n        loss_sum", "tl.where(live, 1.0, 0.0))\n        loss_sum"),
    "mean divides by rows, not weights": Mutant(KERNEL, "weight = tl.where(labelled, w_true,", "weight = tl.where(labelled, 1.0,"),
    "mean gradient not divided": Mutant(KERNEL, "g = g / tl.load(denominator_ptr)", "g = g"),
    "zero weight sum is not NaN": Mutant(KERNEL, 'weight = tl.where(weight == 0.0, float("nan"), weight)', "weight = weight"),
    "weight ignored for the true class": Mutant(KERNEL, "a_true = tl.where(labelled, on * w_true, 0.0)", "a_true = tl.where(labelled, on, 0.0)"),
    "weight ignored in smoothing": Mutant(KERNEL, "return a * class_weight(weight_ptr, c, exists, ACC)[None, :]", "return a"),
    "smoothing dropped from the gradient": Mutant(KERNEL, "grad -= g[:, None] * spread", "grad -= 0.0 * spread"),
    "partial sums added up twice": Mutant(KERNEL, "tl.load(sums_ptr + programs + i,", "tl.load(sums_ptr + i,"),
    "smoothing in single precision": Mutant(LAUNCH, "return high, value - high", "return high, 0.0"),
    "32-bit row offsets": Mutant(ROWS, "(tl.program_id(0) % tiles).to(tl.int64) * ROWS", "(tl.program_id(0) % tiles).to(tl.int32) * ROWS"),
    "outer stride forgotten": Mutant(ROWS, "offset += (outer % sizes[i]).to(tl.int64) * strides[i]", "offset += (outer % sizes[i]).to(tl.int64)"),
    "class out of range has a loss": Mutant(ROWS, 'tl.where(known, 1.0, float("nan"))', "tl.where(known, 1.0, 1.0)"),
    "rows merged that do not follow one another": Mutant(LAUNCH, "kept[-1] == stride[i] * size for", "kept[-1] >= stride[i] * size for"),
    "upstream gradient read as if contiguous": Mutant(LAUNCH, "rows.sizes, grad_strides, upstream_strides,", "rows.sizes, grad_strides, (*rows.strides[3][:-1][:-1], 1, 0),"),
    "weights read as if contiguous": Mutant(LAUNCH, "weight.contiguous()", "weight"),
    "torch path: smoothing dropped": Mutant(TORCH, "if smoothing:", "if False:"),
    "torch path: weight ignored": Mutant(TORCH, "dot = true if w is None else product(weights[part], true)", "dot = true"),
    "torch path: wrong denominator": Mutant(TORCH, "denominator = weights.sum()", "denominator = torch.ones_like(weights).sum()"),
    "torch path: 0 * (-inf) is NaN": Mutant(TORCH, "return (a * log_p).masked_fill_((a == 0) & (log_p == -torch.inf), 0)", "return a * log_p"),
    "torch path: ignored rows have a gradient": Mutant(TORCH, "if keep is not None:\n            p.masked_fill_", "if False:\n            p.masked_fill_"),
    "torch path: true class cancels": Mutant(TORCH, "torch.where(p_true > 0.5, p.sum(1, keepdim=True), 1 - p_true)", "1 - p_true"),
    "torch path: range not checked": Mutant(TORCH, "if low < 0 or high >= classes:", "if False:"),
    "torch path: last chunk lost": Mutant(TORCH, "range(0, z.shape[0], step)", "range(0, z.shape[0] - step + 1, step)"),
    "second backward doubled": Mutant("softmax_fused/_autograd.py", "grad = ctx.operations.gradient(upstream, logits", "ctx.n = getattr(ctx, 'n', 0) + 1\n            grad = ctx.n * ctx.operations.gradient(upstream, logits"),
    "second-order term dropped": Mutant("softmax_fused/_autograd.py", "if torch.is_grad_enabled() or batched(upstream):", "if batched(upstream):"),
}  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Whether every test passes with the bug in place."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "runs", "docs", "*.egg-info", "__pycache__")
        )
        path = tree / mutant.file
        source = path.read_text()
        if mutant.right not in source:
            raise SystemExit(f"{mutant.file} no longer contains: {mutant.right}")
        path.write_text(source.replace(mutant.right, mutant.wrong))
        tests = [f"tests/test_{name}.py" for name in TESTS]
        place = "not interpreter" if mutant.file == TORCH else "interpreter or launch"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider", "-k", place, *tests]
        run = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True)
        return run.returncode == 0


def main(names: list[str]) -> None:
    """Try every mutant, or those named."""
    alive = []
    for name in names or MUTANTS:
        alive += [name] if survives(MUTANTS[name]) else []
        print(f"{'SURVIVED' if name in alive else 'caught  '}  {name}", flush=True)
    caught = len(names or MUTANTS) - len(alive)
    print(f"{caught} of {len(names or MUTANTS)} planted bugs caught")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main(sys.argv[1:])
