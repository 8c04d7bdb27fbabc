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
TESTS = (
    "long_rows",
    "gradient_options",
    "layouts",
    "numerics",
    "loss",
    "autograd",
    "launch",
    "errors",
    "torch_path",
    "softmax",
    "plan",
    "batch_invariant",
)


class Mutant(NamedTuple):
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...] = ()  # where not those of its file
    kernels: bool = False  # whether these run in the interpreter


LINEAR_TESTS = ("linear", "linear_transforms")
KERNEL, ROWS, ONLINE, MATH, READERS, REDUCE, LAUNCH, TORCH, TARGETS, CHUNKS, LINEAR = (
    "kernels/cross_entropy.py",
    "kernels/rows.py",
    "kernels/online.py",
    "kernels/math.py",
    "kernels/targets.py",
    "kernels/reduce.py",
    "softmax_fused/backends/triton/launch.py",
    "softmax_fused/backends/torch/cross_entropy.py",
    "softmax_fused/backends/torch/targets.py",
    "softmax_fused/backends/torch/chunks.py",
    "softmax_fused/functional/chunked_linear.py",
)
PATCHING, SOFTMAX, OUTPUTS = "softmax_fused/patching.py", "kernels/softmax.py", "kernels/row_outputs.py"
LINEAR_ROWS, LINEAR_ROW_OPERATORS = (
    "softmax_fused/functional/chunked_linear_rows.py",
    "softmax_fused/functional/linear_row_operators.py",
)
CAUSAL, HUB = "softmax_fused/functional/causal_lm.py", "hub/build.py"
HUB_LAYERS = "hub/torch-ext/softmax_fused/layers.py"
SOFTMAX_HOST = "softmax_fused/backends/triton/softmax.py"
TORCH_OUTPUTS, OUTPUT_TABLE = "softmax_fused/backends/torch/row_outputs.py", "softmax_fused/_row_outputs.py"
SLICE_KERNELS, SLICES, TORCH_SLICES, EXCHANGE, DTENSOR = (
    "kernels/vocab_parallel.py",
    "softmax_fused/distributed/autograd.py",
    "softmax_fused/backends/torch/vocab_parallel.py",
    "softmax_fused/distributed/exchange.py",
    "softmax_fused/distributed/dtensor.py",
)
MERGE, ROW_SLICES, DTENSOR_LAYER = (
    f"softmax_fused/distributed/{name}.py" for name in ("merge", "row_autograd", "dtensor_linear")
)
TORCH_ROW_SLICES = "softmax_fused/backends/torch/slice_rows.py"
PLAN = "softmax_fused/backends/triton/plan.py"
SPARSE = "softmax_fused/backends/sparse.py"
NUMBA = "softmax_fused/backends/numba"
NUMBA_ROWS, NUMBA_OUTPUTS, NUMBA_SINGLE, NUMBA_TILES = (
    f"{NUMBA}/kernels/{name}.py" for name in ("rows", "row_outputs", "single_rows", "row_tiles")
)
AUTOGRAD = "softmax_fused/functional/autograd.py"
HOST = "softmax_fused/backends/triton/cross_entropy.py"
LAB = "softmax_fused/training"
RANKS, SHARDS, LOOP, EVALUATION, FOLDER, CHECKPOINT, LOCK = (
    f"{LAB}/{name}.py"
    for name in (
        "ranks/group",
        "ranks/shards",
        "models/loop",
        "models/evaluation",
        "runs/folder",
        "runs/checkpoint",
        "runs/lock",
    )
)
OWN = {
    PATCHING: ("patch", "patch_compile"),
    CAUSAL: ("causal_lm",),
    **dict.fromkeys((HUB, HUB_LAYERS), ("hub",)),
    LINEAR: LINEAR_TESTS,
    **dict.fromkeys((LINEAR_ROWS, LINEAR_ROW_OPERATORS), ("linear_rows",)),
    **dict.fromkeys((SOFTMAX, SOFTMAX_HOST), ("softmax",)),
    OUTPUTS: ("row_outputs", "log_prob"),
    SPARSE: ("sparse_target",),
    TORCH_OUTPUTS: ("row_outputs",),
    OUTPUT_TABLE: ("row_outputs",),
    **dict.fromkeys((SLICE_KERNELS, SLICES, TORCH_SLICES, EXCHANGE, DTENSOR), ("distributed_loss",)),
    **dict.fromkeys((MERGE, ROW_SLICES, TORCH_ROW_SLICES), ("slice_rows",)),
    DTENSOR_LAYER: ("distributed_loss",),
    **dict.fromkeys((RANKS, SHARDS, LOOP, EVALUATION, FOLDER), ("training_parallel",)),
}
MUTANTS = {
    "tile reads classes beyond C": Mutant(ROWS, "class_mask = c < rows.classes", "class_mask = c < rows.classes + 1"),
    "tile's gradient written beyond its rows": Mutant(ROWS, "mask = class_mask & segment[2][None, :]", "mask = class_mask & (segment[2] | True)[None, :]"),
    "running sum not rescaled": Mutant(ONLINE, "s = s * exponential(m - m_new) +", "s = s +"),
    "running maximum starts too high": Mutant(MATH, "-3.4028234663852886e38", "-1e38"),
    "0 * (-inf) is NaN": Mutant(KERNEL, "lane_reduce(tl.where(a == 0.0, 0.0, a * (z - broadcast_lanes(m_new, z))), tl.sum, INVARIANT)", "lane_reduce(a * (z - broadcast_lanes(m_new, z)), tl.sum, INVARIANT)"),
    "<a, z - m> not shifted with m": Mutant(KERNEL, "dot = shift_dot(dot, total, m - m_new)", "pass"),
    "parts of <a, z - m> not shifted": Mutant(ONLINE, "sum_parts(shift_dot(dot, total, delta), INVARIANT)", "sum_parts(dot, INVARIANT)"),
    "target class cancels in the loss": Mutant(KERNEL, "tl.where(e_target == 1.0, log1p(s), tl.log(s + e_target))", "tl.log(s + e_target)"),
    "target class cancels in the gradient": Mutant(KERNEL, "total * expm1(log_p)", "total * (tl.exp(log_p) - 1.0)"),
    "infinite weight's loss is NaN": Mutant(KERNEL, "tl.where(infinite & (loss != loss), total, loss)", "loss"),
    "infinite weight spoils the target class of other rows": Mutant(KERNEL, "grad = tl.where(tl.abs(total) == float(\"inf\"), total * exponential(log_p) - a_target, grad)", "pass"),
    "NaN logits hidden by an infinite weight": Mutant(KERNEL, " & (tl.abs(log_s) < float(\"inf\"))", ""),
    "bfloat16 not by way of float32": Mutant(MATH, "if DTYPE == tl.bfloat16:", "if False:"),
    "target class counted twice": Mutant(KERNEL, 'others = tl.where(is_target, float("-inf"), z)', "others = z"),
    "target class in a block of a long row": Mutant(ROWS, "class_mask = (vector < segment[2]) & (vector != segment[3])", "class_mask = vector < segment[2]"),
    "another element of the edge taken for the target class": Mutant(ROWS, "c = tl.where(mask, c, -2)", "pass"),
    "NaN of the target class's logit is lost": Mutant(KERNEL, "target_logit += lane_reduce(tl.where(is_target, z, 0.0), tl.sum)", "target_logit += lane_reduce(tl.where(is_target & (z == z), z, 0.0), tl.sum)"),
    "target class's gradient forgotten": Mutant(KERNEL, "grad = tl.where(c == broadcast_rows(label, z), broadcast_rows(at_target, z), grad)", "pass"),
    "m and log s saved as one": Mutant(KERNEL, "return row_max, log_s, total, loss, z_target - log_s", "return row_max + log_s, log_s * 0.0, total, loss, z_target - log_s"),
    "ignored rows have a gradient": Mutant(KERNEL, "grad = tl.where(broadcast_rows(valid, z) == 0.0, 0.0, grad)", "pass"),
    "ignored long rows are left unwritten": Mutant(ROWS, "return low, high, tl.where(part == 0, rest, stop)", "return low, high, tl.where(read, tl.where(part == 0, rest, stop), low)"),
    "ignored rows count in the mean": Mutant(READERS, "tl.where(valid == 1.0, 1.0, 0.0))", "1.0)"),
    "mean divides by rows, not weights": Mutant(READERS, "return tl.where(label >= 0, w,", "return tl.where(label >= 0, 1.0,"),
    "mean gradient not divided": Mutant(KERNEL, "g = g / tl.load(stats_ptr + statistics_size(count_rows(rows), SAVES_TOTAL, KIND))", "pass"),
    "gradient in forward not divided": Mutant(REDUCE, "return 1.0 / denominator", "return denominator * 0.0 + 1.0"),
    "gradient in forward divided by a part": Mutant(REDUCE, "denominator = tl.sum(tl.load(out.weights_ptr + tl.arange(0, WEIGHT_PARTS)), axis=0)", "denominator = tl.load(out.weights_ptr)"),
    "gradient in forward never corrected": Mutant(KERNEL, "row_mask = row_mask & (g != 1.0)", "row_mask = row_mask & (g == 2.0)"),
    "gradient in forward given away twice": Mutant("softmax_fused/functional/autograd.py", "ctx.call = spec, operations, gradient_mode, None\n", "pass\n"),
    "logits lost, and nobody told": Mutant("softmax_fused/functional/autograd.py", "torch.autograd.graph.increment_version(logits)", "logits"),
    "the last program does not reduce": Mutant(REDUCE, "== tl.num_programs(0) - 1\n", "== tl.num_programs(0)\n"),
    "plan: unaligned memory taken for aligned": Mutant(HOST, "        spec, save, False, logits.dtype, logits.shape, logits.stride(), target.stride(), None, weight is not None,\n        logits.device, target.dtype, logits.data_ptr() % 16,", "        spec, save, False, logits.dtype, logits.shape, logits.stride(), target.stride(), None, weight is not None,\n        logits.device, target.dtype, 0,"),
    "plan: launches hidden from hooks": Mutant(PLAN, "self.ready is not None and not watched()", "self.ready is not None"),
    "plan: another device's compiled kernel": Mutant(PLAN, "and active.get_current_device() == device and", "and"),
    "plan: the first call's stream for all": Mutant(PLAN, "stream = active.get_current_stream(device)", "stream = 7"),
    "plan: tickets of all streams in one place": Mutant(PLAN, "place = index, active.get_current_stream(index)", "place = index, 0"),
    "plan: other tile sizes, old plans": Mutant("softmax_fused/backends/triton/tiles.py", "        cache.cache_clear()", "        pass"),
    "autocast's decision kept without it": Mutant("softmax_fused/_dispatch.py", "backend, any_autocast() and torch.is_autocast_enabled(input.device.type),", "backend, False,", ("plan",), kernels=True),
    "a decision kept for other backends": Mutant("softmax_fused/_dispatch.py", "backend, any_autocast() and", "any_autocast() and", ("plan",), kernels=True),
    "tickets are not given back": Mutant(REDUCE, "    if last:\n        tl.store(ticket_ptr, 0)\n", ""),
    "zero weight sum is not NaN": Mutant(REDUCE, 'weight = tl.where(weight == 0.0, float("nan"), weight)', "weight = weight"),
    "weight ignored for the target class": Mutant(KERNEL, "tl.where(has_label, confidence * class_weight(target, label, has_label, ACC), 0.0)", "tl.where(has_label, confidence, 0.0)"),
    "weight ignored in smoothing": Mutant(READERS, "a = rounded_product(a, w) if SUMMED else a * w", "a = tl.where(mask, a, 0.0)"),
    "smoothing dropped from the gradient": Mutant(KERNEL, "grad -= broadcast_rows(g, z) * a", "pass"),
    "partial sums added up twice": Mutant(REDUCE, "add_sums(sums_ptr + programs, programs, 512)", "add_sums(sums_ptr, programs, 512)"),
    "a row's beginning is forgotten": Mutant(ROWS, "((piece == 0) & (head_offset > 0))", "(piece == 3)"),
    "a row's end is forgotten": Mutant(ROWS, "(piece == 2) | (", "(piece < 0) | ("),
    "elements before the row are read": Mutant(ROWS, "mask = mask & (c >= 0) &", "mask = mask &"),
    "elements after the row are read": Mutant(ROWS, "& (c < rows.classes) & has_edge", "& has_edge"),
    "parts of a row overlap": Mutant(ROWS, "stop = tl.minimum(begin + size, last)", "stop = last"),
    "every part has the edge": Mutant(ROWS, "wanted & (part == 0), is_read)", "wanted, is_read)"),
    "blocks before the target class are taken twice": Mutant(ROWS, "low = tl.where(part == 0, begin, rest)", "low = begin"),
    "parts of a row merged without rescaling": Mutant(ONLINE, "s = sum_parts(rounded_product(s, exponential(delta)), INVARIANT)", "s = sum_parts(s, INVARIANT)"),
    "smoothing in single precision": Mutant(LAUNCH, "return high, value - high", "return high, 0.0"),
    "32-bit row offsets": Mutant(ROWS, "(program % tiles).to(tl.int64) * LANES", "(program % tiles).to(tl.int32) * LANES"),
    "outer stride forgotten": Mutant(ROWS, "offset += (outer % rows.sizes[i]).to(tl.int64) * strides[i]", "offset += (outer % rows.sizes[i]).to(tl.int64)"),
    "class out of range has a loss": Mutant(READERS, 'label < rows.classes)\n            valid = tl.where(label == ignore_index, 0.0, tl.where(known, 1.0, float("nan")))', "label < rows.classes)\n            valid = tl.where(label == ignore_index, 0.0, 1.0)"),
    "rows merged that do not follow one another": Mutant("softmax_fused/backends/triton/layout.py", "kept[-1] == stride[i] * size for", "kept[-1] >= stride[i] * size for"),
    "upstream gradient read as if contiguous": Mutant(HOST, "(upstream, plan.upstream, plan.mean),", "(upstream, (*plan.upstream[:-2], 1, 0), plan.mean),"),
    "weights read as if contiguous": Mutant(HOST, "        weight = weight.contiguous()\n    plan = plan_gradient(", "        weight = weight[:]\n    plan = plan_gradient("),
    "torch path: smoothing dropped": Mutant(TARGETS, "if not self.smoothing:\n            return -log_p_label", "if True:\n            return -log_p_label"),
    "torch path: weight ignored": Mutant(TARGETS, "log_p_label = product(self.label_weight[at], log_p_label)", "pass"),
    "compile: our operator in an exported program": Mutant("softmax_fused/_dispatch.py", "or exporting()", "or False", ("torch_compile",)),
    "compile: a cache asked for in a graph": Mutant("softmax_fused/functional/rows.py", "(check_options if is_compiling() else known_options)", "known_options", ("torch_compile",)),
    "errors: to explain one raises another": Mutant("softmax_fused/_errors.py", "except Exception:", "except ArithmeticError:", ("errors",)),
    "torch path: an infinite weight times no smoothing": Mutant(TARGETS, "if self.smoothing:  # else", "if True:  # else"),
    "torch path: second order of an infinite weight": Mutant(TARGETS, "        if not self.smoothing:\n            return a\n", ""),
    "slices: an infinite weight of the true class": Mutant(TORCH_SLICES, "torch.where(a_label == 0, 0, a_label * (log_s - target_logit))", "a_label * log_s - a_label * target_logit", ("slices",)),
    "torch path: wrong denominator": Mutant(TARGETS, "self.ones if self.w is None else self.label_weight.squeeze(1)", "self.ones"),
    "torch path: 0 * (-inf) is NaN": Mutant(TARGETS, "return (a * log_p).masked_fill_((a == 0) & (log_p == -torch.inf), 0)", "return a * log_p"),
    "torch path: ignored rows have a gradient": Mutant(TORCH, "g = batch.zero_ignored(g.expand(row_shape(z.shape))).unsqueeze(1)", "g = g.expand(row_shape(z.shape)).unsqueeze(1)"),
    "torch path: ignored NaN reaches the gradient": Mutant(TARGETS, "if self.valid is not None:  #", "if False:  #"),
    "torch path: true class cancels": Mutant(TARGETS, "confident = p_label > 0.5", "confident = p_label > 2"),
    "torch path: range not checked": Mutant(TARGETS, "if low < 0 or high >= classes:", "if False:"),
    "torch path: last chunk lost": Mutant(CHUNKS, "range(0, size, step)", "range(0, size - step + 1, step)"),
    "torch path: a few confident rows cancel": Mutant(TARGETS, "return (1 - p_label).index_copy_(0, rows, sum_excluding(p[rows], label[rows], self.spec))", "return 1 - p_label"),
    "torch path: confident rows' sums misplaced": Mutant(TARGETS, "index_copy_(0, rows,", "index_copy_(0, rows.flip(0),"),
    "torch path: any upstream gradient is 1": Mutant(TORCH, "bool((upstream == 1).all())", "True"),
    "second backward doubled": Mutant("softmax_fused/functional/autograd.py", "grad = operations.gradient(upstream, logits, target, weight, saved, spec)\n        return", "ctx.n = getattr(ctx, 'n', 0) + 1\n            grad = ctx.n * operations.gradient(upstream, logits, target, weight, saved, spec)\n        return"),
    "linear: last chunk lost": Mutant(LINEAR, "for part in parts:", "for part in parts[: max(1, len(parts) - 1)]:"),
    "linear: first rows' targets for every chunk": Mutant(LINEAR, "target=layer.target[at]", "target=layer.target[: len(z)]"),
    "linear: weight's gradient of one chunk": Mutant(LINEAR, "total.addmm_(g.t(), x)", "total.addmm_(g.t(), x, beta=0)"),
    "linear: 16-bit products summed in 16 bits": Mutant(LINEAR, "total.add_(g.t() @ x)", "total.copy_(total.to(g.dtype) + g.t() @ x)"),
    "linear: mean gradient not divided": Mutant(LINEAR, "torch.where(any_row, 1 / denominator, 0)", "any_row.to(denominator.dtype)"),
    "linear: gradient of a mean of nothing is NaN": Mutant(LINEAR, "torch.where(any_row, 1 / denominator, 0)", "1 / denominator"),
    "linear: ignored rows count in the mean": Mutant(TARGETS, "valid = ClassIndices.rows_used(target, ignore_index)", "valid = target == target", LINEAR_TESTS),
    "linear: ignored rows are multiplied": Mutant(LINEAR, "return None if bool(numbers.all()) else", "return None if bool(numbers.any()) else"),
    "linear: rows with one ignored position are dropped": Mutant(LINEAR, "rows.flatten(1).any(1)", "rows.flatten(1).all(1)"),
    "linear: gradients of ignored rows are what memory held": Mutant(LINEAR, "torch.empty_like(x) if rows is None else torch.zeros_like(x)", "torch.empty_like(x)"),
    "linear: losses of ignored rows are what memory held": Mutant(LINEAR, "        losses.zero_()", "        pass"),
    "linear: gradients of the rows that are left in the first rows": Mutant(LINEAR, "out.index_copy_(0, at, product)", "out[: len(at)] = product"),
    "linear: a product for a frozen weight": Mutant(LINEAR, "if needs[1] else None\n        self", "if True else None\n        self"),
    "linear: capped logits' gradient for an upstream gradient of 1": Mutant(LINEAR, "expand_as(out.loss) if upstream is None else upstream", "expand_as(out.loss)"),
    "linear: second order without the cap's slope": Mutant(LINEAR, "g = slope * torch_loss", "g = torch_loss"),
    "linear: logits at once are not capped": Mutant("softmax_fused/functional/linear.py", "if logit_scale == 1 and softcap is None:", "if True:", LINEAR_TESTS),
    "rows: the gradient beside the logits it shall overwrite": Mutant(TORCH_OUTPUTS, "torch.empty_like(logits) if grad is None else grad", "torch.empty_like(logits)", LINEAR_TESTS),
    "linear rows: what is saved of other rows": Mutant(LINEAR_ROWS, "by_row(saved, layer)[:, at].flatten(1)", "by_row(saved, layer)[:, : len(z)].flatten(1)"),
    "linear rows: what is saved of a chunk is read with the stride of all rows": Mutant(LINEAR_ROWS, ".flatten(1).contiguous()", ".flatten(1)"),
    "linear rows: upstream gradients of the first rows": Mutant(LINEAR_ROWS, "None if g is None else g[at] for g", "None if g is None else g[: len(z)] for g"),
    "linear rows: outputs of ignored rows are left out": Mutant(LINEAR_ROWS, "rows = valid_rows(layer, plan) if known else None", "rows = valid_rows(layer, plan)"),
    "linear rows: ignored rows are multiplied": Mutant(LINEAR_ROWS, "rows = valid_rows(layer, plan) if known else None", "rows = None"),
    "linear rows: losses of ignored rows are what memory held": Mutant(LINEAR_ROWS, "                values.fill_(output.if_ignored)", "                pass"),
    "linear rows: ignored rows have rank 0": Mutant(LINEAR_ROWS, "values.fill_(output.if_ignored)", "values.zero_()"),
    "linear rows: log p of class probabilities": Mutant("softmax_fused/functional/linear_rows.py", "check_target_class(wanted, isinstance(target, torch.Tensor) and target.ndim < len(shape), call.loss[0])", "pass", ("linear_rows",)),
    "linear rows: gradients of one output choose the rows": Mutant(LINEAR_ROWS, "found |= wanted", "found = wanted"),
    "linear rows: ignored rows' entropy has no gradient": Mutant(LINEAR_ROWS, "if OUTPUTS[name].zero_if_ignored and valid", "if valid"),
    "linear rows: ignored rows' losses are multiplied in backward": Mutant(LINEAR_ROWS, "if OUTPUTS[name].zero_if_ignored and valid", "if not OUTPUTS[name].zero_if_ignored and valid"),
    "linear rows: the gradient of the logits beside them": Mutant(LINEAR_ROWS, "*arguments, plan.options, grad=logits)", "*arguments, plan.options)"),
    "linear rows: second-order term dropped": Mutant(LINEAR_ROWS, "if torch.is_grad_enabled() or any(batched(g) for g in given):", "if any(batched(g) for g in given):"),
    "linear rows: batched gradients are not seen": Mutant(LINEAR_ROWS, "if torch.is_grad_enabled() or any(batched(g) for g in given):", "if torch.is_grad_enabled():"),
    "linear rows compiled: empty outputs given away": Mutant("softmax_fused/functional/linear_rows.py", "found[place] if name in outputs else None for", "found[place] for", ("linear_rows",)),
    "linear rows compiled: what is saved is not used": Mutant(LINEAR_ROW_OPERATORS, "saved if saved.numel() else None", "None"),
    "linear: kept gradients given away twice": Mutant(LINEAR, "grads, ctx.precomputed_grads = ctx.precomputed_grads, None", "grads = ctx.precomputed_grads"),
    "linear: second-order term dropped": Mutant(LINEAR, "if torch.is_grad_enabled() or batched(upstream):", "if batched(upstream):"),
    "upstream gradient of images not flattened": Mutant(TORCH, "g.reshape(rows)", "g.expand(rows)", ("derivatives",)),
    "second-order term dropped": Mutant("softmax_fused/functional/autograd.py", "if is_grad_enabled() or is_batched(upstream) or is_batched_by_autograd(upstream):", "if is_batched(upstream) or is_batched_by_autograd(upstream):"),
    "softmax: maximum of one lane": Mutant(SOFTMAX, "row_max = tl.max(m, axis=0)", "row_max = tl.min(m, axis=0)"),
    "softmax: padding in the sum of gradients": Mutant(ROWS, '0.0 if KIND == "gradient" or KIND == "log gradient" else float("-inf")\n    segment = places[3]\n    if VECTOR > 0:\n        edge', 'float("-inf")\n    segment = places[3]\n    if VECTOR > 0:\n        edge'),
    "softmax: logarithm's gradient without the sum": Mutant(SOFTMAX, "grad = g - exponential(y) * product", "grad = g - exponential(y)"),
    "softmax: upstream gradient read with the output's strides": Mutant(SOFTMAX_HOST, "(upstream, plan.second)", "(upstream, plan.first)"),
    "rows: last of equal maxima": Mutant(OUTPUTS, "index = tl.where(top > best, first, index)", "index = tl.where(top >= best, first, index)"),
    "rows: entropy not shifted with m": Mutant(OUTPUTS, "u = shift_dot(u, s, m - m_new) * exponential(m - m_new) +", "u = u * exponential(m - m_new) +"),
    "rows: masked logits capped": Mutant(OUTPUTS, 'x = tl.where(class_mask, x, float("-inf"))', "pass"),
    "rows: slope of the cap forgotten": Mutant(OUTPUTS, "slope *= softcap * (1.0 - t * t)", "slope *= softcap"),
    "rows: entropy's gradient without H": Mutant(OUTPUTS, "(log_p + entropy))", "log_p)"),
    "rows: ignored row's gradient": Mutant(OUTPUTS, "return tl.where(broadcast_rows(wanted, z) != 0, grad * transform_slope(x, target, row_scale, ACC), 0.0)", "return grad * transform_slope(x, target, row_scale, ACC)"),
    "rows: infinite weight in ignored rows": Mutant(OUTPUTS, "a = tl.where(broadcast_rows(valid, z) == 0.0, 0.0, a)", "pass"),
    "rows: a row's scale is missing from its slope": Mutant(OUTPUTS, "slope *= broadcast_rows(row_scale, x)", "pass"),
    "rows: a row's scale, not divided by the cap": Mutant(OUTPUTS, "row_scale *= from_parts(target.scale, ACC)", "pass"),
    "torch rows: one chunk's scales for all": Mutant(TORCH_OUTPUTS, "None if scales is None else scales[part].unsqueeze(1)", "None if scales is None else scales[: part[0].stop - part[0].start].unsqueeze(1)"),
    "rows: rank counts ties": Mutant(OUTPUTS, "larger = tl.where(y <= broadcast_rows(y_target, z), 0.0, 1.0)", "larger = tl.where(y < broadcast_rows(y_target, z), 0.0, 1.0)"),
    "rows: rank counts what is no class": Mutant(OUTPUTS, "lane_reduce(tl.where(class_mask, larger, 0.0), tl.sum)", "lane_reduce(larger, tl.sum)"),
    "torch rows: rank of an ignored row": Mutant(TORCH_OUTPUTS, 'filled["rank"].masked_fill_(~batch.valid, -1)', "pass"),
    "torch rows: NaN is not larger": Mutant(TARGETS, "others = y <= self.at_label(y, at)", "others = ~(y > self.at_label(y, at))", ("row_outputs",)),
    "rows: ignored rows' log p": Mutant(OUTPUTS, "tl.where(valid == 1.0, log_p, valid)", "log_p"),
    "rows: log p's gradient cancels near p = 1": Mutant(OUTPUTS, "g_log_prob * expm1(log_p)", "g_log_prob * (exponential(log_p) - 1.0)"),
    "torch rows: log p cancels near p = 1": Mutant(TARGETS, "torch.where(complement < 0.5, torch.log1p(-complement), log_p_label)", "log_p_label", ("row_outputs",)),
    "torch rows: log p is weighted": Mutant(TORCH_OUTPUTS, "batch = make_target(z, t, None, plain(spec))", "batch = make_target(z, t, weight, plain(spec))"),
    "log_prob: the last of equal classes alone has a gradient": Mutant(AUTOGRAD, "by_label = sum_of_same_class(label, g, dim)", "by_label = g", ("log_prob",)),
    "log_prob: digits are lost to the size of the logits": Mutant(OUTPUTS, "            top = row_max.to(tl.float64)", "            top = row_max"),
    "torch log_prob: digits are lost to the size of the logits": Mutant(OUTPUT_TABLE, "        top = top.double()", "        pass", ("log_prob",)),
    "sparse: a class that is named twice": Mutant(SPARSE, "torch.where(same, share.unsqueeze(-2), 0).sum(-1)", "share[..., part]"),
    "sparse: missing mass": Mutant(SPARSE, "total = sum_named(share, dim, spec)", "total = torch.ones_like(share.sum(dim))"),
    "sparse: spread evenly as a whole": Mutant(SPARSE, "loss += spec.label_smoothing * out.loss", "loss += out.loss"),
    "sparse: weights of the even share": Mutant(SPARSE, "of_class = weights.sum() * p - weights[label]", "of_class = p.new_tensor(logits.shape[dim]) * p - 1"),
    "sparse: the entropy at the named classes": Mutant(SPARSE, 'at_label -= p * (finite_log(log_p) + entropy) * given["entropy"].unsqueeze(dim)', "pass"),
    "sparse: ignored entries are class 0": Mutant(TARGETS, "share.masked_fill(~valid, 0).masked_fill(wrong, torch.nan)", "share.masked_fill(wrong, torch.nan)", ("sparse_target",)),
    "sparse: rows that name no class are multiplied": Mutant(TARGETS, "return (target.select(1, 0) != ignore_index).any(1)", "return (target.select(1, 0) != ignore_index).any(1) | True", ("sparse_target",)),
    "sparse: logits are read after they were written over": Mutant(SPARSE, "return write_chosen(grad, label, at_label * slope, unused, logsumexp, dim)", "_, slope = effective(logits.gather(dim, label), options, scale)\n        return write_chosen(grad, label, at_label * slope, unused, logsumexp, dim)"),
    "sparse: a mean counts rows that name no class": Mutant("softmax_fused/functional/sparse.py", "losses.sum() / valid.sum()", "losses.mean()", ("sparse_target",)),
    "sparse: the operator's mean counts them": Mutant(TARGETS, "        del weight, shape\n        valid = SparseProbabilities.rows_used(target, ignore_index)", "        del weight, shape\n        valid = SparseProbabilities.rows_used(target, ignore_index) | True", ("sparse_target",)),
    "sparse: 0 log 0 in torch's operations": Mutant("softmax_fused/functional/sparse.py", "found.masked_fill((share == 0) & found.isneginf(), 0)", "found", ("sparse_target",)),
    "log_prob: the rest of a row has no gradient": Mutant(AUTOGRAD, '-total.squeeze(dim) if name == "logsumexp" else None', '0 * total.squeeze(dim) if name == "logsumexp" else None', ("log_prob",)),
    "log_prob: second-order term dropped": Mutant(AUTOGRAD, "if torch.is_grad_enabled() or batched(upstream):\n            total = g", "if batched(upstream):\n            total = g", ("log_prob",)),
    "loss: its type is the logits'": Mutant("softmax_fused/_dispatch.py", "result = dtype or loss_dtype(input, target)", "result = loss_dtype(input, target)", ("loss_dtype",)),
    "loss: 16-bit logits for torch's operator": Mutant("softmax_fused/functional/loss.py", "it.to(torch.promote_types(it.dtype, dtype)) if", "it if", ("loss_dtype",)),
    "torch rows: slope forgotten": Mutant(TORCH_OUTPUTS, "            work.mul_(slope)", "            pass"),
    "torch rows: 0 log 0 has no derivative": Mutant(OUTPUT_TABLE, "return -(log_p.exp() * finite_log(log_p)).sum(1)", "return -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(1)", ("row_outputs",)),
    "torch rows: one chunk's upstream for all": Mutant(TORCH_OUTPUTS, "{name: g[part].unsqueeze(1) for name, g in given.items()}", "{name: g[: len(g[part])].unsqueeze(1) for name, g in given.items()}"),
    "torch rows: another chunk's entropy in the gradient": Mutant(TORCH_OUTPUTS, "None if entropy is None else entropy[part].unsqueeze(1)", "None if entropy is None else entropy[: len(entropy[part])].unsqueeze(1)"),
    "torch rows: the logs are overwritten before the label's is read": Mutant(TORCH_OUTPUTS, "exponentials = Workspace(z, None, options.spec.acc) if {", "exponentials = logs if {"),
    "patch: the first undo puts torch back": Mutant(PATCHING, "elif not patches and current is replacement", "elif current is replacement"),
    "patch: options of the first hold": Mutant(PATCHING, "patches[-1].options", "patches[0].options"),
    "patch: what was found is forgotten": Mutant(PATCHING, "F.cross_entropy = found", "F.cross_entropy = torch_function"),
    "patch: ours after undo": Mutant(PATCHING, "if chosen is None:", "chosen = chosen or {}\n    if False:"),
    "patch: subclasses see ours": Mutant(PATCHING, "return replacement if all", "return replacement if True or all"),
    "patch: torch lists ours as its own": Mutant(PATCHING, "    fill_tables()\n    with lock", "    with lock"),
    "patch: another's replacement clobbered": Mutant(PATCHING, "elif not patches and current is not found:", "elif not patches:\n        F.cross_entropy = found"),
    "slices: maxima of one rank": Mutant(SLICES, 'all_reduce(parts[0].clone(), "MAX", group)', "parts[0]"),
    "slices: sums not rescaled": Mutant(TORCH_SLICES, "found = [s * delta.exp()]", "found = [s]"),
    "slices: <a, z - m> not shifted": Mutant(TORCH_SLICES, "dot + torch.where((target_sum == 0) | (delta == 0), 0, target_sum * delta)", "dot"),
    "slices: true class cancels": Mutant(TORCH_SLICES, "torch.where(e_label == 1, s.log1p(), (s + e_label).log())", "(s + e_label).log()"),
    "slice kernels: sums not rescaled": Mutant(SLICE_KERNELS, "s * exponential(delta)", "s"),
    "slice kernels: <a, z - m> not shifted": Mutant(SLICE_KERNELS, "shift_dot(dot, total, delta)", "dot"),
    "slice kernels: true class of another rank": Mutant(SLICE_KERNELS, "tl.where(label >= 0, target_logit - m, 0.0)", "target_logit - m"),
    "slice kernels: ignored rows count in the mean": Mutant(SLICE_KERNELS, "tl.where(valid == 1.0, w_target, 0.0)", "w_target"),
    "slice kernels: labels of other slices": Mutant(READERS, "found = (valid == 1.0) & (label >= 0) & (label < rows.classes)", "found = valid == 1.0", ("distributed_loss",)),
    "slices: smoothing over the slice's classes": Mutant(TARGETS, "smoothing_per_class = spec.label_smoothing / spec.classes", "smoothing_per_class = spec.label_smoothing / z.shape[1]", ("slices",)),
    "slices: another's bad arguments go unnoticed": Mutant(EXCHANGE, "if bad:", "if False:"),
    "slices: ranks may differ in their targets": Mutant(EXCHANGE, "for name in AGREED:", "for name in list(AGREED)[:-1]:"),
    "slices: options of the outputs may differ": Mutant(EXCHANGE, "it.dtype, *it.others)", "it.dtype)"),
    "rows of slices: the label's class is summed twice": Mutant(MERGE, "torch.where(labels.own, others, e)", "e"),
    "rows of slices: confident rows lose their digits": Mutant(MERGE, "-e * local.log_prob.expm1()", "e * (1 - local.log_prob.exp())"),
    "rows of slices: entropies without that of the shares": Mutant(MERGE, "e * (local.entropy - log_e)", "e * local.entropy"),
    "rows of slices: the prediction within its slice": Mutant(MERGE, "local.prediction + spec.first + order", "local.prediction + order"),
    "rows of slices: NaN is not the largest": Mutant(MERGE, "torch.where(local.top.isnan(), 0,", "torch.where(local.top.isnan(), 2,"),
    "rows of slices: a slice wholly -inf has an entropy": Mutant(MERGE, "torch.where(e == 0, 0, e * (local.entropy", "torch.where(e < 0, 0, e * (local.entropy"),
    "rows of slices: the input's gradient is of one slice": Mutant(ROW_SLICES, "if grads[0] is not None:", "if False:"),
    "rows of slices: the entropy's gradient by the slice": Mutant(TORCH_ROW_SLICES, "coefficients(given, entropy)", "coefficients(given, 0 * entropy)"),
    "dtensor: a layer's gradient of the rank's rows": Mutant(DTENSOR_LAYER, "Partial() if isinstance(by_row, Shard) else by_class", "by_class"),
    "dtensor: mean of the ranks' means": Mutant(DTENSOR, 'local_reduction = "sum" if mean_of_parts else reduction', "local_reduction, mean_of_parts = reduction, False"),
    "ranks: uneven shards weigh the same": Mutant(LOOP, "loss * shard.factor", "loss"),
    "ranks: an empty shard stays empty": Mutant(RANKS, "return part if len(part) else rows[:1]", "return part"),
    "ranks: the filler of an empty shard counts": Mutant(SHARDS, "yield Shard(own,", "yield Shard(max(own, 1),"),
    "ranks: metrics of one rank": Mutant(RANKS, "dist.all_reduce(total)", "pass"),
    "ranks: the run of any job is resumed": Mutant(FOLDER, 'load_checkpoint(f).get("job") == job', 'load_checkpoint(f).get("job")'),
    "ranks: test loss of one rank": Mutant(EVALUATION, 'ranks, split="test")', 'split="test")'),
    "test loss: a smaller batch weighs as much": Mutant(EVALUATION, "sizes.append(len(target))", "sizes.append(1)", ("training_loop",)),
    "test loss: logits not scaled": Mutant(f"{LAB}/models/learner.py", "return replace(self, forward=body,", "return replace(self, logit_scale=1.0, forward=body,", ("training_loop",)),
    "lock: two processes may hold it": Mutant(LOCK, "fcntl.LOCK_EX", "fcntl.LOCK_SH", ("training_run",)),
    "lock: workers hold it too": Mutant(LOCK, "            _close_in_children(file)\n", "", ("training_run",)),
    "checkpoint: checksums are not verified": Mutant(CHECKPOINT, "wrong = archive.testzip()", "wrong = None", ("training_checkpoint",)),
    "checkpoint: an optimizer's state is not tried": Mutant(f"{LAB}/runs/restore.py", "        _try_steps(learner)\n", "", ("training_checkpoint",)),
    "pictures: white strokes on white": Mutant(f"{LAB}/data/pictures.py", "return 255 if (median > MIDDLE_GREY) == has_background else 0", "return 255", ("training_predict",)),
    "pictures: 12 bits of 16 are dark": Mutant(f"{LAB}/data/pictures.py", "1023, 4095, 16383, 65535", "65535", ("training_predict",)),
    "architecture: an import from a higher layer": Mutant(f"{LAB}/data/idx.py", "if TYPE_CHECKING:\n", "if TYPE_CHECKING:\n    from softmax_fused.training.config import TrainConfig as TrainConfig\n", ("architecture",)),
    "architecture: a circle within a layer": Mutant(f"{LAB}/data/idx.py", "if TYPE_CHECKING:\n", "if TYPE_CHECKING:\n    from softmax_fused.training.data.datasets import Split as Split\n", ("architecture",)),
    "architecture: a module of ours imported late": Mutant(RANKS, "    from torch.distributed.rendezvous", "    from softmax_fused.training import files as files\n    from torch.distributed.rendezvous", ("architecture",)),
    "loop: the last step's weights are not looked at": Mutant(LOOP, "    check_weights(learner)\n", "", ("training_loop",)),
    "backends: one is never asked for outputs of rows": Mutant("softmax_fused/_dispatch.py", "operations = backend.row_outputs or TORCH.row_outputs", "operations = TORCH.row_outputs", ("backend",)),
    "backends: on the CPU the gradient is computed apart": Mutant("softmax_fused/_dispatch.py", "input.device.type in chosen.gradient_with_loss", "False", ("backend",)),
    "rows: the loss is computed to check the arguments": Mutant("softmax_fused/_fallback.py", "    if suspect:", "    if True:", ("row_outputs",)),
    "rows: arguments are not checked": Mutant("softmax_fused/_fallback.py", "    if suspect:", "    if False:", ("row_outputs",)),
    "architecture: an import that goes up": Mutant("softmax_fused/_spec.py", "    from torch import Tensor\n", "    from torch import Tensor\n\n    from softmax_fused.functional import loss  # noqa: F401\n", ("architecture",)),
    "causal: labels are not shifted": Mutant(CAUSAL, "value=ignore_index)[..., 1:]", "value=ignore_index)[..., :-1]"),
    "causal: ignored labels count in the mean": Mutant(CAUSAL, "(target != ignore_index).sum()", "target.numel()"),
    "causal: the mean is divided by the number of items": Mutant(CAUSAL, 'reduction = "mean" if num_items_in_batch is None else "sum"', 'reduction = "mean"'),
    "causal: 16-bit features have a 16-bit loss": Mutant(CAUSAL, "return torch.autocast(device, dtype=rows.dtype)", "return contextlib.nullcontext()"),
    "hub: two builds share their operators": Mutant(HUB, 'text.replace(f"{NAME}::", f"{identifier}::")', "text"),
    "hub: absolute imports stay": Mutant(HUB, "    if left:\n", "    if False:\n"),
    "hub: an operator of the installed package is called": Mutant(HUB, '.replace(f"torch.ops.{NAME}.", f"torch.ops.{identifier}.")', ""),
    "hub: a layer's smoothing is lost": Mutant(HUB_LAYERS, "            label_smoothing=self.label_smoothing,  # type: ignore[arg-type]\n", ""),
    "invariant: torch chooses the order of a sum": Mutant(CHUNKS, "    if not spec.batch_invariant:\n        return x.sum(1, keepdim=True)", "    if True:\n        return x.sum(1, keepdim=True)", ("batch_invariant",)),
    "invariant: small batches by torch's operator": Mutant("softmax_fused/_dispatch.py", "and not batch_invariant and operation.small(*arguments)", "and operation.small(*arguments)", ("batch_invariant",)),
    "invariant: small batches by torch's operator at once": Mutant("softmax_fused/functional/loss.py", "        and not batch_invariant\n", "", ("batch_invariant",)),
    "invariant: torch's operations in a graph": Mutant("softmax_fused/_dispatch.py", "and not batch_invariant and operation.small_in_graph(*arguments)", "and operation.small_in_graph(*arguments)", ("batch_invariant",)),
    "invariant: a decision kept for calls without it": Mutant("softmax_fused/_dispatch.py", "dtype, batch_invariant,\n    )  # fmt: skip", "dtype,\n    )  # fmt: skip", ("batch_invariant",)),
    "invariant: a lone row's gradient rescaled": Mutant(TORCH, 'if spec.batch_invariant and spec.reduction == "none":', "if False:", ("batch_invariant",)),
    "invariant: few long rows are split": Mutant(HOST, "if tile.lanes and not spec.batch_invariant else 1", "if tile.lanes else 1"),
    "invariant: vectors count from the boundary before a row": Mutant(ROWS, "        if rows.invariant is None:\n", "        if True:\n"),
    "invariant: unaligned rows taken for aligned": Mutant(LAUNCH, "1 if unaligned else None", "None"),
    "patch: no lock": Mutant(PATCHING, "lock = threading.Lock()", "import contextlib\nlock = contextlib.nullcontext()"),
    "a part of the benchmark that fails ends the others": Mutant("bench/parts.py", 'error = f"{type(problem).__name__}: {problem}"', "raise", ("bench_gpu",)),
    "a forward pass's tiles swept for its backward pass": Mutant("bench/sweep.py", "found.clear()", "pass", ("bench_gpu",)),
    "numba: the label counted twice": Mutant(NUMBA_ROWS, "                store(real, x, label, minus_infinity)\n", "", ("numba",)),
    "numba: padding of the last block counts": Mutant(NUMBA_ROWS, "            store(real, x, c, minus_infinity)\n", "            store(real, x, c, zero)\n", ("numba",)),
    "numba: a full last block is forgotten": Mutant(NUMBA_ROWS, "special + BLOCK, whole)\n        return s", "special + BLOCK, whole - BLOCK)\n        return s", ("numba",)),
    "numba: exp of -inf is no 0": Mutant(f"{NUMBA}/kernels/math.py", "zero if x < smallest else exp_of_rest(r) * scale", "exp_of_rest(r) * scale", ("numba",)),
    "numba: ignored rows count in the mean": Mutant(f"{NUMBA}/kernels/stages.py", "valid += counts", "valid += 1", ("numba", "loss", "gradient_options")),
    "numba: ignored rows keep what memory held": Mutant(f"{NUMBA}/kernels/labels.py", "                    store(logits_type, grad, c, zero)\n", "                    pass\n", ("numba", "loss", "gradient_options")),
    "numba: 0 * inf is NaN": Mutant(f"{NUMBA}/kernels/losses.py", "loss = zero if a == zero and nll == infinity else a * nll", "loss = a * nll", ("numerics", "loss")),
    "numba: bfloat16 is cut off, not rounded": Mutant(f"{NUMBA}/kernels/memory.py", "builder.add(odd, INT32(0x7FFF))", "INT32(0)", ("numba",)),
    "numba: half a file of the cache is code": Mutant(f"{NUMBA}/cache.py", "if hashlib.sha256(content[32:]).digest() == content[:32]:", "if True:", ("numba",)),
    "numba: code of another CPU": Mutant(f"{NUMBA}/compilation.py", '"\\0".join(versions + machine)', '"\\0".join(versions)', ("numba",)),
    "numba: a fork waits for its parent's lock": Mutant(f"{NUMBA}/compilation.py", "    global LOCK\n", "", ("numba",)),
    "numba: small calls are not left to torch": Mutant(f"{NUMBA}/backend.py", "return logits.numel() < LEAST_NUMEL[with_gradient, few_classes]", "return False", ("numba",)),
    "numba: an infinite weight where log s rounds to 0 is NaN": Mutant(f"{NUMBA}/kernels/losses.py", "(total if log_s == zero and np.isinf(total) else total * log_s) - d", "total * log_s - d", ("numerics",)),
    "numba: rows: an infinite weight of the largest class is NaN": Mutant(NUMBA_SINGLE, "(share == zero) | (difference == zero)", "share == zero", ("row_outputs",)),
    "numba: any kind of target is class indices": Mutant(f"{NUMBA}/plan.py", "return spec.target.reader in READERS and not", "return not", ("numba",)),
    "numba: rows: NaN is not the largest": Mutant(NUMBA_SINGLE, "return np.int64(first_nan if first_nan < count else first)", "return np.int64(min(first, count - 1))", ("row_outputs",)),
    "numba: rows: the largest logit counted twice": Mutant(NUMBA_SINGLE, "        store(real, x, top, minus_infinity)\n", "", ("row_outputs",)),
    "numba: rows: the cap's slope forgotten": Mutant(NUMBA_SINGLE, "(scale * (one - tanh * tanh))", "scale", ("row_outputs",)),
    "numba: rows: padding is a class": Mutant(NUMBA_SINGLE, "        for c in range(classes, count):\n            store(real, x, c, minus_infinity)\n", "", ("row_outputs",)),
    "numba: rows: -inf in the entropy is NaN": Mutant(NUMBA_SINGLE, "u += value * (least if difference < least else difference)", "u += value * difference", ("row_outputs",)),
    "numba: rows: a share is subtracted where none is asked for": Mutant(NUMBA_SINGLE, "if dense(p) and factors.of_share != zero:", "if dense(p):", ("row_outputs", "numba")),
    "numba: tiles: ties go to the last class": Mutant(NUMBA_TILES, "better = (value > best)", "better = (value >= best)", ("row_outputs",)),
    "numba: tiles: the largest logit counted twice": Mutant(NUMBA_TILES, "zero if load(real, top, lane) == real(c) else value", "value", ("row_outputs",)),
    "numba: tiles: the cap's slope forgotten": Mutant(NUMBA_TILES, "            undo_cap(t, e, classes * LANES)\n", "            pass\n", ("row_outputs",)),
    "numba: tiles: rows of which nothing is asked are NaN": Mutant(NUMBA_TILES, "zero if (factor == zero) & (by_difference == zero) else value", "value", ("numba",)),
    "numba: tiles: ranks of capped logits": Mutant(NUMBA_TILES, "            rank(p, n, first, lanes, classes, scales, x, at_label, larger)\n        sweeps.read(p, n, first, lanes, classes, scales, x, e)\n", "            pass\n        sweeps.read(p, n, first, lanes, classes, scales, x, e)\n        if ranked:\n            for lane in range(lanes):\n                store(real, at_label, lane, load(real, x, max(addresses.label(p, n, first + lane), 0) * LANES + lane))\n            count_larger(x, classes, at_label, larger)\n", ("row_outputs",)),
    "numba: rows: log-sum-exp in float32": Mutant(NUMBA_OUTPUTS, "np.float64(row.m) + (np.float64(0) if np.isinf(row.m) else np.float64(log_s))", "np.float64(row.m + (real(0) if np.isinf(row.m) else log_s))", ("log_prob",)),
    "numba: rows: ignored rows have a rank": Mutant(NUMBA_OUTPUTS, "store(np.int64, get(p, ROW_FIELDS.rank), number, -1)", "pass", ("row_outputs",)),
    "numba: rows: the gradient of torch without its entropy": Mutant(f"{NUMBA}/row_outputs.py", "    if covers(spec):", "    if False:", ("numba",)),
    "numba: tanh is cut off near 0": Mutant(f"{NUMBA}/kernels/math.py", "(one - scale) - p * scale) / (one + w)", "one - w) / (one + w)", ("row_outputs",)),
}  # fmt: skip


def plant(mutant: Mutant, tree: Path) -> None:
    """Copy the checkout to `tree`, with the bug in place."""
    hidden = shutil.ignore_patterns(".*", "docs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=lambda folder, names: hidden(folder, names) | runs_of(folder))
    path = tree / mutant.file
    path.write_text(path.read_text().replace(mutant.right, mutant.wrong))


def runs_of(folder: str) -> set[str]:
    """Return the folder of training runs at the root, which is not copied; the lab has a package of the same name."""
    return {"runs"} if Path(folder) == ROOT else set()


def fails(mutant: Mutant, tree: Path, marks: str) -> bool:
    """Whether a test of those marks fails."""
    tests = [f"tests/test_{name}.py" for name in mutant.tests or OWN.get(mutant.file, TESTS)]
    on_cpu = (mutant.tests and not mutant.kernels) or mutant.file in {TORCH, TARGETS, CHUNKS, *OWN} - {
        SOFTMAX,
        SOFTMAX_HOST,
        OUTPUTS,
        LINEAR_ROWS,
        LINEAR_ROW_OPERATORS,
    }
    place = "not interpreter" if on_cpu else "interpreter or launch"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", marks, "-k", place, *tests]
    run = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "NUMBA_CACHE_DIR": str(tree)},
        capture_output=True,
        text=True,
    )
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
