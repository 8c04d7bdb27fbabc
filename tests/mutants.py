# ruff: noqa: E501 - a line a bug
"""Plant one bug at a time and see a test fail: `make mutants`, or python -m tests.mutants [NAME...].

Each mutant is a copy of the tree with one replacement; the tests of its file run in it until the first failure, those of
`make test` before the slow ones. A mutant that survives is a hole in the tests: exit status 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = ("long_rows", "gradient_options", "layouts", "numerics", "loss", "autograd", "launch", "errors", "torch_path")


class Mutant(NamedTuple):
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...] = ()  # where not those of its file


LINEAR_TESTS = ("linear", "linear_transforms")
KERNEL, LONG, ROWS, LAUNCH, TORCH, TARGETS, CHUNKS, LINEAR = (
    "kernels/cross_entropy.py",
    "kernels/long_rows.py",
    "kernels/rows.py",
    "softmax_fused/_launch.py",
    "softmax_fused/_torch_path.py",
    "softmax_fused/_torch_targets.py",
    "softmax_fused/_torch_rows.py",
    "softmax_fused/_linear.py",
)
PATCHING, SOFTMAX, OUTPUTS = "softmax_fused/patching.py", "kernels/softmax.py", "kernels/row_outputs.py"
LONG_OUTPUTS = "kernels/long_row_outputs.py"
TORCH_OUTPUTS = "softmax_fused/_torch_row_outputs.py"
SLICE_KERNELS, SLICES, TORCH_SLICES, EXCHANGE, DTENSOR = (
    "kernels/slices.py",
    "softmax_fused/_slices.py",
    "softmax_fused/_torch_slices.py",
    "softmax_fused/_exchange.py",
    "softmax_fused/_dtensor.py",
)
LAB = "softmax_fused/training"
RANKS, SHARES, LOOP, FOLDER = (f"{LAB}/{name}.py" for name in ("ranks", "shares", "loop", "checkpoint"))
OWN = {
    PATCHING: ("patch", "patch_compile"),
    LINEAR: LINEAR_TESTS,
    SOFTMAX: ("softmax",),
    OUTPUTS: ("row_outputs",),
    LONG_OUTPUTS: ("row_outputs",),
    TORCH_OUTPUTS: ("row_outputs",),
    **dict.fromkeys((SLICE_KERNELS, SLICES, TORCH_SLICES, EXCHANGE, DTENSOR), ("distributed_loss",)),
    **dict.fromkeys((RANKS, SHARES, LOOP, FOLDER), ("training_parallel",)),
}
MUTANTS = {
    "tile reads classes beyond C": Mutant(KERNEL, "inside = exists[:, None] & live[None, :]\n        z = load_tile", "inside = (exists | True)[:, None] & live[None, :]\n        z = load_tile"),
    "tile's gradient written beyond C": Mutant(KERNEL, "convert(grad, grad_ptr.dtype.element_ty), mask=inside", "convert(grad, grad_ptr.dtype.element_ty), mask=live[None, :]"),
    "running sum not rescaled": Mutant(ROWS, "s = s * exponential(m - m_new) +", "s = s +"),
    "running maximum starts too high": Mutant(ROWS, "-3.4028234663852886e38", "-1e38"),
    "0 * (-inf) is NaN": Mutant(ROWS, "lane_sum(tl.where(a == 0.0, 0.0, a * (z - along(m_new, z))))", "lane_sum(a * (z - along(m_new, z)))"),
    "<a, z - m> not shifted with m": Mutant(ROWS, "dot += tl.where(total == 0.0, 0.0, total * (m - m_new))", "dot += 0.0"),
    "true class cancels in the loss": Mutant(KERNEL, "tl.where(e_true == 1.0, log1p(s), tl.log(s + e_true))", "tl.log(s + e_true)"),
    "true class cancels in the gradient": Mutant(KERNEL, "total * expm1(log_p)", "total * (tl.exp(log_p) - 1.0)"),
    "infinite weight's loss is NaN": Mutant(KERNEL, "tl.where(infinite & (loss != loss), total, loss)", "loss"),
    "infinite weight spoils the true class of other rows": Mutant(KERNEL, "grad = tl.where(tl.abs(total) == float(\"inf\"), total * exponential(log_p) - a_true, grad)", "pass"),
    "NaN logits hidden by an infinite weight": Mutant(KERNEL, " & (tl.abs(log_s) < float(\"inf\"))", ""),
    "bfloat16 not by way of float32": Mutant(ROWS, "if DTYPE == tl.bfloat16:", "if False:"),
    "a part of the benchmark that fails ends the others": Mutant("bench/parts.py", 'error = f"{type(problem).__name__}: {problem}"', "raise", ("bench_gpu",)),
    "a forward pass's tiles swept for its backward pass": Mutant("bench/sweep.py", "found.clear()", "pass", ("bench_gpu",)),
    "true class counted twice": Mutant(LONG, 'tl.where(c == true, float("-inf"), z)', "z"),
    "true class's gradient forgotten": Mutant(LONG, "grad = tl.where(c == true, g_true, grad)", "grad = grad"),
    "m and log s saved as one": Mutant(LONG, "scale * exponential(z - shift)", "g * total * exponential(z - (shift + log_s))"),
    "ignored rows have a gradient": Mutant(KERNEL, "grad = tl.where(keep[None, :] == 0.0, 0.0, grad)", "grad = grad"),
    "ignored long rows are left unwritten": Mutant(LONG, "fill_stop = tl.where(fill, stop, begin)", "fill_stop = begin"),
    "ignored rows count in the mean": Mutant(KERNEL, "tl.where(keep == 1.0, 1.0, 0.0))", "1.0)"),
    "mean divides by rows, not weights": Mutant(KERNEL, "return tl.where(label >= 0, w_true,", "return tl.where(label >= 0, 1.0,"),
    "mean gradient not divided": Mutant(KERNEL, "g = g / tl.load(denominator_ptr)", "g = g"),
    "long mean gradient not divided": Mutant(LONG, "upstream = upstream / tl.load(denominator_ptr)", "upstream = upstream"),
    "gradient in forward not divided": Mutant(KERNEL, "return 1.0 / denominator", "return denominator * 0.0 + 1.0"),
    "gradient in forward divided by a part": Mutant(KERNEL, "denominator = tl.sum(tl.load(weights_ptr + tl.arange(0, WEIGHT_PARTS)), axis=0)", "denominator = tl.load(weights_ptr)"),
    "gradient in forward never corrected": Mutant(KERNEL, "live &= g != 1.0", "live &= g == 2.0"),
    "long gradient in forward never corrected": Mutant(LONG, "wanted = upstream != 1.0", "wanted = upstream == 2.0"),
    "gradient in forward given away twice": Mutant("softmax_fused/_autograd.py", "grad, ctx.ready = ctx.ready, None", "grad = ctx.ready"),
    "logits lost, and nobody told": Mutant("softmax_fused/_autograd.py", "torch.autograd.graph.increment_version(logits)", "logits"),
    "the last program does not reduce": Mutant(KERNEL, "== tl.num_programs(0) - 1:", "== tl.num_programs(0):"),
    "zero weight sum is not NaN": Mutant(KERNEL, 'weight = tl.where(weight == 0.0, float("nan"), weight)', "weight = weight"),
    "weight ignored for the true class": Mutant(KERNEL, "a_true = tl.where(labelled, on * w_true, 0.0)", "a_true = tl.where(labelled, on, 0.0)"),
    "weight ignored in smoothing": Mutant(KERNEL, "w = class_weight(weight_ptr, c, exists, ACC)[:, None]", "w = class_weight(None, c, exists, ACC)[:, None]"),
    "smoothing dropped from the gradient": Mutant(KERNEL, "grad -= g[None, :] * spread", "grad -= 0.0 * spread"),
    "partial sums added up twice": Mutant(KERNEL, "tl.load(sums_ptr + programs + i,", "tl.load(sums_ptr + i,"),
    "a row's beginning is read unaligned": Mutant(LONG, "tl.where((skip > 0) & (begin < edge) & (begin == 0), EDGE, begin)", "begin"),
    "a row's end is forgotten": Mutant(LONG, "tl.where(part == 2, tl.where(found, stop, low)", "tl.where(part == 2, low"),
    "elements before the row are read": Mutant(LONG, "(j >= skip) & (j < end)", "j < end"),
    "parts of a row overlap": Mutant(LONG, "stop = tl.where(wanted, tl.minimum(begin + size, length), begin)", "stop = tl.where(wanted, length, begin)"),
    "parts of a row joined without rescaling": Mutant(LONG, "s = tl.sum(rounded_product(s, exponential(delta)), axis=1)", "s = tl.sum(s, axis=1)"),
    "smoothing in single precision": Mutant(LAUNCH, "return high, value - high", "return high, 0.0"),
    "32-bit row offsets": Mutant(ROWS, "(tile % tiles).to(tl.int64) * ROWS", "(tile % tiles).to(tl.int32) * ROWS"),
    "outer stride forgotten": Mutant(ROWS, "offset += (outer % sizes[i]).to(tl.int64) * strides[i]", "offset += (outer % sizes[i]).to(tl.int64)"),
    "class out of range has a loss": Mutant(ROWS, 'tl.where(known, 1.0, float("nan"))', "tl.where(known, 1.0, 1.0)"),
    "rows merged that do not follow one another": Mutant("softmax_fused/_layout.py", "kept[-1] == stride[i] * size for", "kept[-1] >= stride[i] * size for"),
    "upstream gradient read as if contiguous": Mutant(LAUNCH, "*tensors, grad_strides, upstream_strides,", "*tensors, grad_strides, (*rows.strides[3][:-1][:-1], 1, 0),"),
    "weights read as if contiguous": Mutant(LAUNCH, "weight.contiguous()", "weight"),
    "torch path: smoothing dropped": Mutant(TARGETS, "if not self.smoothing:", "if True:"),
    "torch path: weight ignored": Mutant(TARGETS, "true = product(self.true[at], true)", "pass"),
    "compile: our operator in an exported program": Mutant("softmax_fused/functional.py", "or _untraced.exporting()", "or False", ("torch_compile",)),
    "compile: a cache asked for in a graph": Mutant("softmax_fused/row_outputs.py", "and not compiling  #", "and True  #", ("torch_compile",)),
    "errors: to explain one raises another": Mutant("softmax_fused/_check.py", "except Exception:", "except ArithmeticError:", ("errors",)),
    "torch path: an infinite weight times no smoothing": Mutant(TARGETS, "if self.smoothing:  # else", "if True:  # else"),
    "torch path: second order of an infinite weight": Mutant(TORCH, "    if not spec.label_smoothing:\n        return a\n", ""),
    "slices: an infinite weight of the true class": Mutant(TORCH_SLICES, "torch.where(a_true == 0, 0, a_true * (log_s - z_true))", "a_true * log_s - a_true * z_true", ("slices",)),
    "torch path: wrong denominator": Mutant(TARGETS, "self.rows if self.w is None else self.true.squeeze(1)", "self.rows"),
    "torch path: 0 * (-inf) is NaN": Mutant(TARGETS, "return (a * log_p).masked_fill_((a == 0) & (log_p == -torch.inf), 0)", "return a * log_p"),
    "torch path: ignored rows have a gradient": Mutant(TORCH, "g = a.live(g.expand((z.shape[0], *z.shape[2:]))).unsqueeze(1)", "g = g.expand((z.shape[0], *z.shape[2:])).unsqueeze(1)"),
    "torch path: ignored NaN reaches the gradient": Mutant(TARGETS, "if self.keep is not None:  #", "if False:  #"),
    "torch path: true class cancels": Mutant(TARGETS, "confident = true > 0.5", "confident = true > 2"),
    "torch path: range not checked": Mutant(TARGETS, "if low < 0 or high >= classes:", "if False:"),
    "torch path: last chunk lost": Mutant(CHUNKS, "range(0, size, step)", "range(0, size - step + 1, step)"),
    "torch path: a few confident rows cancel": Mutant(TARGETS, "return (1 - true).index_copy_(0, rows, without(p[rows], label[rows]))", "return 1 - true"),
    "torch path: confident rows' sums misplaced": Mutant(TARGETS, "index_copy_(0, rows,", "index_copy_(0, rows.flip(0),"),
    "torch path: any upstream gradient is 1": Mutant(TORCH, "bool((upstream == 1).all())", "True"),
    "second backward doubled": Mutant("softmax_fused/_autograd.py", "grad = ctx.operations.gradient(*arguments)\n        return", "ctx.n = getattr(ctx, 'n', 0) + 1\n            grad = ctx.n * ctx.operations.gradient(*arguments)\n        return"),
    "linear: last chunk lost": Mutant(LINEAR, "for part in parts:", "for part in parts[: max(1, len(parts) - 1)]:"),
    "linear: first rows' targets for every chunk": Mutant(LINEAR, "target=layer.target[part]", "target=layer.target[: len(z)]"),
    "linear: weight's gradient of one chunk": Mutant(LINEAR, "total.addmm_(g.t(), x)", "total.addmm_(g.t(), x, beta=0)"),
    "linear: 16-bit products summed in 16 bits": Mutant(LINEAR, "total.add_(g.t() @ x)", "total.copy_(total.to(g.dtype) + g.t() @ x)"),
    "linear: mean gradient not divided": Mutant(LINEAR, "torch.where(any_row, 1 / denominator, 0)", "any_row.to(denominator.dtype)"),
    "linear: gradient of a mean of nothing is NaN": Mutant(LINEAR, "torch.where(any_row, 1 / denominator, 0)", "1 / denominator"),
    "linear: ignored rows count in the mean": Mutant(LINEAR, "keep = layer.target != spec.ignore_index", "pass"),
    "linear: kept gradients given away twice": Mutant(LINEAR, "grads, ctx.ready = ctx.ready, None", "grads = ctx.ready"),
    "linear: second-order term dropped": Mutant(LINEAR, "if torch.is_grad_enabled() or batched(upstream):", "if batched(upstream):"),
    "upstream gradient of images not flattened": Mutant(TORCH, "g.reshape(rows)", "g.expand(rows)", ("derivatives",)),
    "second-order term dropped": Mutant("softmax_fused/_autograd.py", "if torch.is_grad_enabled() or batched(upstream):", "if batched(upstream):"),
    "softmax: beginning of an unaligned row twice": Mutant(SOFTMAX, "tl.where(start < high, 0, start)", "start"),
    "softmax: maximum of one lane": Mutant(SOFTMAX, "row_m = tl.max(m, axis=0)", "row_m = tl.min(m, axis=0)"),
    "softmax: padding in the sum of gradients": Mutant(SOFTMAX, "lane_sum(tl.where(inside, x, 0.0))", "lane_sum(x)"),
    "softmax: logarithm's gradient without the sum": Mutant(SOFTMAX, "x = g - exponential(y) * dot", "x = g - exponential(y)"),
    "softmax: upstream gradient read with the output's strides": Mutant(SOFTMAX, "if upstream_strides is not None:", "if upstream_strides is not None and LOG:"),
    "rows: last of equal maxima": Mutant(OUTPUTS, "index = tl.where(top > best, first, index)", "index = tl.where(top >= best, first, index)"),
    "rows: entropy not shifted with m": Mutant(OUTPUTS, "u = shifted(u, s, m - m_new) +", "u = u * exponential(m - m_new) +"),
    "rows: masked logits capped": Mutant(OUTPUTS, 'x = tl.where(inside, x, float("-inf"))', "pass"),
    "rows: slope of the cap forgotten": Mutant(OUTPUTS, "slope *= cap * (1.0 - t * t)", "slope *= cap"),
    "rows: entropy's gradient without H": Mutant(OUTPUTS, "(log_p + entropy))", "log_p)"),
    "rows: ignored row's gradient": Mutant(OUTPUTS, "grad = tl.where(wanted[None, :], grad, 0.0)", "pass"),
    "rows: infinite weight in ignored rows": Mutant(OUTPUTS, "a = tl.where(keep[None, :] == 0.0, 0.0, a)", "pass"),
    "long rows: infinite weight in ignored rows": Mutant(LONG_OUTPUTS, "weighted = tl.where(tl.max(keep, axis=0) == 0.0, 0, classes)", "weighted = classes"),
    "torch rows: slope forgotten": Mutant(TORCH_OUTPUTS, "out[at] = by_x.mul_(slope)", "out[at] = by_x"),
    "torch rows: 0 log 0 has no derivative": Mutant(TORCH_OUTPUTS, "return -(log_p.exp() * finite_log(log_p)).sum(1)", "return -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(1)"),
    "torch rows: one chunk's upstream for all": Mutant(TORCH_OUTPUTS, "None if g_lse is None else g_lse[part]", "None if g_lse is None else g_lse[: len(g_lse[part])]"),
    "patch: the first undo puts torch back": Mutant(PATCHING, "elif not patches and current is replacement", "elif current is replacement"),
    "patch: options of the first hold": Mutant(PATCHING, "patches[-1].options", "patches[0].options"),
    "patch: what was found is forgotten": Mutant(PATCHING, "F.cross_entropy = found", "F.cross_entropy = torch_function"),
    "patch: ours after undo": Mutant(PATCHING, "if chosen is None:", "chosen = chosen or {}\n    if False:"),
    "patch: subclasses see ours": Mutant(PATCHING, "return replacement if all", "return replacement if True or all"),
    "patch: torch lists ours as its own": Mutant(PATCHING, "    fill_tables()\n    with lock", "    with lock"),
    "patch: another's replacement clobbered": Mutant(PATCHING, "elif not patches and current is not found:", "elif not patches:\n        F.cross_entropy = found"),
    "slices: maxima of one rank": Mutant(SLICES, 'all_reduce(parts[0].clone(), "MAX", group)', "parts[0]"),
    "slices: sums not rescaled": Mutant(TORCH_SLICES, "found = [s * delta.exp()]", "found = [s]"),
    "slices: <a, z - m> not shifted": Mutant(TORCH_SLICES, "dot + torch.where((total == 0) | (delta == 0), 0, total * delta)", "dot"),
    "slices: true class cancels": Mutant(TORCH_SLICES, "torch.where(e_true == 1, s.log1p(), (s + e_true).log())", "(s + e_true).log()"),
    "slice kernels: sums not rescaled": Mutant(SLICE_KERNELS, "s * exponential(delta)", "s"),
    "slice kernels: <a, z - m> not shifted": Mutant(SLICE_KERNELS, "dot + tl.where(total == 0.0, 0.0, total * delta)", "dot"),
    "slice kernels: true class of another rank": Mutant(SLICE_KERNELS, "tl.where(here, z - m, 0.0)", "z - m"),
    "slice kernels: ignored rows count in the mean": Mutant(SLICE_KERNELS, "tl.where(keep == 1.0, w_true, 0.0)", "w_true"),
    "slice kernels: labels of other slices": Mutant(ROWS, "found = (keep == 1.0) & (here >= 0) & (here < classes)", "found = keep == 1.0", ("distributed_loss",)),
    "slices: smoothing over the slice's classes": Mutant(TORCH_SLICES, "off = spec.label_smoothing / spec.classes\n    out", "off = spec.label_smoothing / max(1, z.shape[1])\n    out"),
    "slices: another's bad arguments go unnoticed": Mutant(EXCHANGE, "if bad:", "if False:"),
    "slices: ranks may differ in their targets": Mutant(EXCHANGE, "for name, meaning in AGREED.items():", "for name, meaning in list(AGREED.items())[:-1]:"),
    "dtensor: mean of the ranks' means": Mutant(DTENSOR, 'here = "sum" if mean_of_parts else reduction', "here, mean_of_parts = reduction, False"),
    "ranks: uneven shares weigh the same": Mutant(LOOP, "loss * share.factor", "loss"),
    "ranks: an empty share is empty": Mutant(RANKS, "return part if len(part) else rows[:1]", "return part"),
    "ranks: an empty share counts": Mutant(SHARES, "yield Share(own,", "yield Share(max(own, 1),"),
    "ranks: metrics of one rank": Mutant(RANKS, "dist.all_reduce(total)", "pass"),
    "ranks: any job's run is continued": Mutant(FOLDER, 'load_checkpoint(f).get("job") == job', 'load_checkpoint(f).get("job")'),
    "ranks: test loss of one rank": Mutant(LOOP, 'ranks, of="test")', 'of="test")'),
    "test loss: a short slice weighs as much": Mutant(LOOP, "sizes.append(len(target))", "sizes.append(1)", ("training_loop",)),
    "test loss: logits not scaled": Mutant("softmax_fused/training/learner.py", "return replace(self, forward=body,", "return replace(self, scale=1.0, forward=body,", ("training_loop",)),
    "claim: two may hold it": Mutant(f"{LAB}/claim.py", "fcntl.LOCK_EX", "fcntl.LOCK_SH", ("training_run",)),
    "claim: workers hold it too": Mutant(f"{LAB}/claim.py", "            _close_in_children(file)\n", "", ("training_run",)),
    "checkpoint: checksums are not read": Mutant(FOLDER, "wrong = archive.testzip()", "wrong = None", ("training_checkpoint",)),
    "checkpoint: an optimizer's state is not tried": Mutant(f"{LAB}/restore.py", "        _try_step(learner)\n", "", ("training_checkpoint",)),
    "pictures: white strokes on white": Mutant(f"{LAB}/pictures.py", "return 255 if (middle > BRIGHT) == own_background else 0", "return 255", ("training_predict",)),
    "pictures: 12 bits of 16 are dark": Mutant(f"{LAB}/pictures.py", "1023, 4095, 16383, 65535", "65535", ("training_predict",)),
    "loop: the last step's weights are not looked at": Mutant(LOOP, "    check_weights(learner)\n", "", ("training_loop",)),
    "patch: no lock": Mutant(PATCHING, "lock = threading.Lock()", "import contextlib\nlock = contextlib.nullcontext()"),
}  # fmt: skip


def plant(mutant: Mutant, tree: Path) -> None:
    """Copy the checkout to `tree`, with the bug in place."""
    hidden = shutil.ignore_patterns(".*", "runs", "docs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=hidden)
    path = tree / mutant.file
    path.write_text(path.read_text().replace(mutant.right, mutant.wrong))


def fails(mutant: Mutant, tree: Path, marks: str) -> bool:
    """Whether a test of those marks fails."""
    tests = [f"tests/test_{name}.py" for name in mutant.tests or OWN.get(mutant.file, TESTS)]
    on_cpu = mutant.tests or mutant.file in {TORCH, TARGETS, CHUNKS, *OWN} - {SOFTMAX, OUTPUTS, LONG_OUTPUTS}
    place = "not interpreter" if on_cpu else "interpreter or launch"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", marks, "-k", place, *tests]
    run = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if run.returncode in (0, 5):  # passed, or there are no such tests
        return False
    if run.returncode == 1 or run.returncode < 0:  # failed, or writing out of bounds ended the process
        return True
    raise RuntimeError(f"pytest ended with status {run.returncode}:\n{run.stdout}{run.stderr}")


def caught_by(name: str) -> str | None:
    """Return the target whose tests fail with the bug in place, None where all pass."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        plant(MUTANTS[name], tree)
        if fails(MUTANTS[name], tree, "not slow"):
            return "make test"
        return "make test-slow" if fails(MUTANTS[name], tree, "slow") else None


def main(names: list[str]) -> None:
    """Try every mutant, or those named, a core each."""
    names = names or list(MUTANTS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict.fromkeys(names, "")
        for name, target in zip(names, pool.map(caught_by, names), strict=True):
            found[name] = target or ""
            print(f"{f'caught by {target}' if target else 'SURVIVED':25}  {name}", flush=True)
    caught = sum(map(bool, found.values()))
    print(f"{caught} of {len(names)} planted bugs caught, {list(found.values()).count('make test')} by make test")
    sys.exit(caught < len(names))


if __name__ == "__main__":
    main(sys.argv[1:])
