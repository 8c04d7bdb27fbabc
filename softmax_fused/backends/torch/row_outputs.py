"""Several outputs of each row in torch operations, chunk by chunk, and the gradient of the logits from theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from softmax_fused._row_outputs import DIFFERENTIABLE, LEAST_LOG, OUTPUTS, finite_log
from softmax_fused._spec import class_dim, row_shape
from softmax_fused.backends.torch import chunks
from softmax_fused.backends.torch.chunks import Workspace, with_classes
from softmax_fused.backends.torch.cross_entropy import canonicalize
from softmax_fused.backends.torch.cross_entropy import differentiable_gradient as gradient_of_loss
from softmax_fused.backends.torch.targets import make_target

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._row_outputs import RowOutputs
    from softmax_fused._spec import RowSpec, Spec, Upstream
    from softmax_fused.backends.torch.targets import Target


def scaled(z: Tensor, options: RowSpec, row_scale: Tensor | None = None) -> Tensor:
    """Return the logits scaled, in the accumulation type: in the order of the capped ones, without new ties."""
    x = z if z.dtype is options.spec.acc else z.to(options.spec.acc)
    scale = options.scale if row_scale is None else row_scale.to(options.spec.acc)
    return x * scale if row_scale is not None or options.scale != 1 else x


def effective(z: Tensor, options: RowSpec, row_scale: Tensor | None = None) -> tuple[Tensor, Tensor | float]:
    """Return the logits scaled and capped, in the accumulation type, and what the gradient by them is multiplied by.

    `row_scale` broadcasts against them.
    """
    x = scaled(z, options, row_scale)
    scale = options.scale if row_scale is None else row_scale.to(options.spec.acc)
    if options.softcap is None:
        return x, scale
    t = torch.tanh(x / options.softcap)
    return options.softcap * t, scale * (1 - t * t)


def along_classes(row_scale: Tensor | None, logits: Tensor) -> Tensor | None:
    """Return the scales of all rows, to be broadcast against the logits."""
    return None if row_scale is None else row_scale.unsqueeze(class_dim(logits.ndim))


def needs_log_p(outputs: tuple[str, ...]) -> bool:
    """Whether one of these outputs needs the logarithm of the softmax."""
    return any(OUTPUTS[name].needs_log_p for name in outputs)


def statistics(x: Tensor, outputs: tuple[str, ...], log_p: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the outputs of (N, C, d1..dk), all but the loss, from the effective logits and, where needed, log p.

    `dtype` is that in which they will be kept.
    """
    wanted = [(name, OUTPUTS[name]) for name in outputs]
    prediction = x.argmax(1, keepdim=True) if any(output.needs_prediction for _, output in wanted) else None
    return {name: output.value(x, log_p, prediction, dtype) for name, output in wanted if output.value is not None}


def saved_shape(logits: Tensor) -> tuple[int, int]:
    """Return the shape of what `forward` saves: the entropy of each row, if that is an output."""
    return 1, logits.numel() // logits.shape[class_dim(logits.ndim)]


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: RowSpec,
    save: bool,
    row_scale: Tensor | None = None,
) -> tuple[RowOutputs, Tensor | None]:
    """Compute the outputs asked for and, with `save`, what `gradient` needs."""
    z, t, _ = canonicalize(logits, target, None)
    batch = make_target(z, t, weight, options.spec)
    out = options.allocate(logits)
    saved = logits.new_empty(saved_shape(logits), dtype=options.spec.acc) if save else None
    rows = row_shape(z.shape)
    scales = None if row_scale is None else row_scale.reshape(rows)
    filled = {name: it.view(rows) for name, it in out._asdict().items() if it is not None}
    simple = tuple(name for name in options.outputs if name != "entropy")
    logs = Workspace(z, None, options.spec.acc) if needs_log_p(options.outputs) else None
    exponentials = Workspace(z, None, options.spec.acc) if {"entropy", "log_prob"} & filled.keys() else None
    for part in chunks.row_chunks(z, chunks.CHUNK):
        at = with_classes(part)
        scale = scales_of(scales, part)
        x, _ = effective(z[at], options, scale)
        if "rank" in filled:
            y = x if options.softcap is None else scaled(z[at], options, scale)
            filled["rank"][part] = batch.rank(y, at).squeeze(1)
        log_p = None
        if logs is not None:
            log_p = logs.chunk(x, at)
            chunks.log_softmax(x, log_p, options.spec)
        for name, values in statistics(x, simple, log_p, options.spec.dtype).items():
            filled[name][part] = values
        if log_p is None:
            continue
        if "loss" in filled:
            filled["loss"][part] = batch.loss(log_p, at).squeeze(1)
        if exponentials is None:
            continue
        p = torch.exp(log_p, out=exponentials.chunk(x, at))
        log_p_label = batch.at_label(log_p, at) if "log_prob" in filled else None
        if "entropy" in filled:  # from here on log_p is written over
            entropy = chunks.sum_classes(log_p.clamp_(min=LEAST_LOG).mul_(p), options.spec).squeeze(1).neg()
            filled["entropy"][part] = entropy
            if saved is not None:
                saved.view(rows)[part] = entropy
        if log_p_label is not None:  # and p
            filled["log_prob"][part] = batch.log_prob(log_p_label, p, at).squeeze(1)
    for name in ("loss", "log_prob"):
        if name in filled:
            filled[name].copy_(batch.zero_ignored(filled[name]))
    if "rank" in filled and batch.valid is not None:
        filled["rank"].masked_fill_(~batch.valid, -1)
    return out, saved


def scales_of(scales: Tensor | None, part: tuple[slice, ...]) -> Tensor | None:
    """Return the scales of a chunk's rows, to be broadcast against its logits."""
    return None if scales is None else scales[part].unsqueeze(1)


def gradient(
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
    grad = torch.empty_like(logits) if grad is None else grad
    z, t, out = canonicalize(logits, target, grad)
    assert out is not None
    rows = row_shape(z.shape)
    given = named(upstream, options, rows)
    scales = None if row_scale is None else row_scale.reshape(rows)
    losses = losses_of(z, t, weight, options.spec, given)
    entropy = None if stats is None else stats.view(rows)
    changed = options.changes_logits or scales is not None
    logs = Workspace(z, out, options.spec.acc)
    exponentials = Workspace(z, None, options.spec.acc) if given or len(losses) > 1 else None
    for part in chunks.row_chunks(z, chunks.CHUNK):
        at = with_classes(part)
        x, slope = effective(z[at], options, scales_of(scales, part))
        work = logs.chunk(x, at)
        chunks.log_softmax(x, work, options.spec)
        if exponentials is None:  # one loss alone
            ((batch, g),) = losses
            batch.gradient(work.exp_(), g[part].unsqueeze(1), at, work)
        else:
            p = torch.exp(work, out=exponentials.chunk(x, at))
            of_rows = None if entropy is None else entropy[part].unsqueeze(1)
            c, d = coefficients({name: g[part].unsqueeze(1) for name, g in given.items()}, of_rows)
            if isinstance(d, torch.Tensor):
                torch.addcmul(c, work.clamp_(min=LEAST_LOG), d, out=work).mul_(p)
            else:
                torch.mul(p, c, out=work)
            for count, (batch, g) in enumerate(losses, 1):
                q = p if count == len(losses) else p.clone()
                batch.gradient(q, g[part].unsqueeze(1), at, q)
                work.add_(q)
        if changed:
            work.mul_(slope)
        if logs.scratch is not None:
            out[at] = work
    return grad


def coefficients(upstream: dict[str, Tensor], entropy: Tensor | None) -> tuple[Any, Any]:
    """Return c and d of the gradient p (c + d log p) of outputs without a target; 0 where there are none.

    The upstream gradients and the entropy are (N, 1, d1..dk).
    """
    c: Any = 0
    d: Any = 0
    for name, g in upstream.items():
        find = OUTPUTS[name].coefficients
        assert find is not None
        more_c, more_d = find(g, entropy)
        c, d = c + more_c, d + more_d
    return c, d


def losses_of(
    z: Tensor, t: Tensor, weight: Tensor | None, spec: Spec, given: dict[str, Tensor]
) -> list[tuple[Target, Tensor]]:
    """Take the loss and the target's log p out of `given`; return targets and the gradients of their losses.

    Log p is minus the loss without class weights and label smoothing: where there are none, one loss does for both.
    """
    g_loss, g_log_prob = given.pop("loss", None), given.pop("log_prob", None)
    if g_log_prob is not None and weight is None and not spec.label_smoothing:
        g_loss, g_log_prob = -g_log_prob if g_loss is None else g_loss - g_log_prob, None
    found = []
    if g_loss is not None:
        batch = make_target(z, t, weight, spec)
        found.append((batch, batch.zero_ignored(g_loss)))
    if g_log_prob is not None:
        batch = make_target(z, t, None, plain(spec))
        found.append((batch, batch.zero_ignored(-g_log_prob)))
    return found


def plain(spec: Spec) -> Spec:
    """Return what a call asks for without label smoothing: that loss is minus the target's log p."""
    return spec._replace(label_smoothing=0.0)


def named(upstream: Upstream, options: RowSpec, rows: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the upstream gradients that there are, in the accumulation type and of the rows' shape."""
    pairs = zip(DIFFERENTIABLE, upstream, strict=True)
    return {name: g.to(options.spec.acc).reshape(rows) for name, g in pairs if g is not None}


def differentiable_gradient(
    upstream: Upstream,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: RowSpec,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Compute the gradient in operations that autograd follows, for derivatives of higher order."""
    x, slope = effective(logits, options, along_classes(row_scale, logits))
    z, _, _ = canonicalize(x, target, None)
    given = named(upstream, options, row_shape(z.shape))
    g_loss, g_log_prob = given.pop("loss", None), given.pop("log_prob", None)
    grad = torch.zeros_like(x)
    if given:
        log_p = torch.log_softmax(z, 1)
        p, finite = log_p.exp(), finite_log(log_p)
        entropy = -(p * finite).sum(1, keepdim=True)
        c, d = coefficients({name: g.unsqueeze(1) for name, g in given.items()}, entropy)
        grad = (p * (c + d * finite)).view_as(x)
    if g_loss is not None:
        grad = grad + gradient_of_loss(g_loss, x, target, weight, options.spec)
    if g_log_prob is not None:
        grad = grad - gradient_of_loss(g_log_prob, x, target, None, plain(options.spec))
    return (grad * slope).to(logits.dtype)
