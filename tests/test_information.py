"""Entropies and divergences, against float64 formulas written with Python's math."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from softmax_fused import information as info

INF = torch.inf
HALVES = [torch.float16, torch.bfloat16]
SINGLE = [info.entropy, info.entropy_from_logits, info.perplexity, info.perplexity_from_logits]
PAIRED = [info.cross_entropy, info.cross_entropy_from_logits, info.kl_divergence, info.kl_divergence_from_logits]
IN_UNITS = [info.information_content, info.information_content_from_logits, *SINGLE[:2], *PAIRED]


def takes_logits(function: Callable[..., Tensor]) -> bool:
    return function.__name__.endswith("logits")


def expected(p: list[float], q: list[float]) -> tuple[float, float, float]:
    """H(P), H(P, Q) and KL(P || Q), in nats."""
    pairs = [(a, b) for a, b in zip(p, q, strict=True) if a > 0]
    entropy = -sum(a * math.log(a) for a, _ in pairs)
    cross = math.inf if any(b == 0 for _, b in pairs) else -sum(a * math.log(b) for a, b in pairs)
    return entropy, cross, cross - entropy


@st.composite
def rows(draw: st.DrawFn, count: int = 2) -> list[Tensor]:
    """Logits of several distributions over the same outcomes, some of them impossible, shifted far from 0."""
    size = draw(st.integers(1, 9))
    drawn = []
    for _ in range(count):
        values = draw(st.lists(st.floats(-30, 30), min_size=size, max_size=size))
        excluded = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        excluded[draw(st.integers(0, size - 1))] = False
        offset = draw(st.sampled_from([0.0, 1e4, -1e4]))
        drawn.append(
            torch.tensor(
                [-INF if gone else value + offset for value, gone in zip(values, excluded, strict=True)],
                dtype=torch.float64,
            )
        )
    return drawn


@given(logits=rows())
def test_equals_the_formulas(logits: list[Tensor]) -> None:
    p, q = (z.softmax(0) for z in logits)
    truth = expected(p.tolist(), q.tolist())
    ours = info.entropy(p), info.cross_entropy(p, q), info.kl_divergence(p, q)
    from_logits = (
        info.entropy_from_logits(logits[0]),
        info.cross_entropy_from_logits(*logits),
        info.kl_divergence_from_logits(*logits),
    )
    assert [x.item() for x in ours] == pytest.approx(truth, rel=1e-9, abs=1e-10)
    assert [x.item() for x in from_logits] == pytest.approx(truth, rel=1e-9, abs=1e-10)
    assert info.perplexity(p).item() == pytest.approx(math.exp(truth[0]))
    assert info.perplexity_from_logits(logits[0]).item() == pytest.approx(math.exp(truth[0]))


@given(logits=rows())
def test_cross_entropy_is_entropy_plus_divergence_and_never_below_entropy(logits: list[Tensor]) -> None:
    p, q = (z.softmax(0) for z in logits)
    cases = (
        (info.entropy(p), info.cross_entropy(p, q), info.kl_divergence(p, q)),
        (
            info.entropy_from_logits(logits[0]),
            info.cross_entropy_from_logits(*logits),
            info.kl_divergence_from_logits(*logits),
        ),
    )
    for entropy, cross, divergence in cases:
        torch.testing.assert_close(cross, entropy + divergence, rtol=1e-9, atol=1e-9)
        assert cross >= entropy - 1e-9
        assert divergence >= -1e-9
        assert -1e-9 <= entropy <= math.log(len(p)) + 1e-9


@given(logits=rows(count=1))
def test_a_distribution_does_not_diverge_from_itself(logits: list[Tensor]) -> None:
    (z,) = logits
    assert info.kl_divergence_from_logits(z, z).item() == 0
    assert info.kl_divergence(z.softmax(0), z.softmax(0)).item() == pytest.approx(0, abs=1e-12)


@given(logits=rows())
def test_no_gradient_is_nan(logits: list[Tensor]) -> None:
    for function in (info.entropy_from_logits, info.perplexity_from_logits):
        leaf = logits[0].clone().requires_grad_()
        assert torch.autograd.grad(function(leaf), leaf)[0].isfinite().all()
    for function in (info.cross_entropy_from_logits, info.kl_divergence_from_logits):
        leaves = [z.clone().requires_grad_() for z in logits]
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(function(*leaves), leaves))
    for function in (info.cross_entropy, info.kl_divergence):
        leaves = [z.softmax(0).requires_grad_() for z in logits]
        assert not any(grad.isnan().any() for grad in torch.autograd.grad(function(*leaves), leaves))


def test_the_book() -> None:
    assert info.information_content(torch.tensor(1 / 64), unit="bits").item() == 6
    assert info.entropy(torch.tensor([0.1, 0.5, 0.1, 0.3]), unit="bits").item() == pytest.approx(1.6855, abs=1e-4)
    labels = torch.eye(3)[[0, 2]]
    predicted = torch.tensor([[0.3, 0.6, 0.1], [0.2, 0.3, 0.5]])
    assert info.cross_entropy(labels, predicted).mean().item() == pytest.approx(0.9486, abs=1e-4)


@pytest.mark.parametrize("function", IN_UNITS, ids=lambda f: f.__name__)
def test_bits_are_nats_over_log_2(function: Callable[..., Tensor]) -> None:
    values = torch.randn(2, 4, 5, dtype=torch.float64)
    arguments = (values if takes_logits(function) else values.softmax(-1))[: 2 if function in PAIRED else 1].unbind()
    nats, bits = function(*arguments), function(*arguments, unit="bits")
    torch.testing.assert_close(bits, nats / math.log(2))
    assert torch.equal(function(*arguments, unit="nats"), nats)


@pytest.mark.parametrize("function", [*IN_UNITS, *SINGLE[2:]], ids=lambda f: f.__name__)
def test_gradcheck(function: Callable[..., Tensor]) -> None:
    values = torch.randn(2, 3, 4, dtype=torch.float64)
    values = values if takes_logits(function) else values.softmax(1).clamp(min=0.05)
    arguments = [x.clone().requires_grad_() for x in values[: 2 if function in PAIRED else 1]]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_any_axis(dim: int) -> None:
    z, y = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    moved = z.movedim(dim, -1), y.movedim(dim, -1)
    for function in SINGLE:
        x, m = (z, moved[0]) if takes_logits(function) else (z.softmax(dim), moved[0].softmax(-1))
        torch.testing.assert_close(function(x, dim), function(m))
    for function in PAIRED:
        pair, last = (z, y), moved
        if not takes_logits(function):
            pair, last = (z.softmax(dim), y.softmax(dim)), tuple(m.softmax(-1) for m in moved)
        torch.testing.assert_close(function(*pair, dim), function(*last))
    assert info.information_content_from_logits(z, dim).shape == z.shape


@pytest.mark.parametrize("function", PAIRED, ids=lambda f: f.__name__)
def test_shapes_broadcast(function: Callable[..., Tensor]) -> None:
    p, q = torch.rand(5).softmax(-1), torch.rand(4, 3, 5).softmax(-1)
    torch.testing.assert_close(function(p, q), function(p.expand_as(q), q))
    assert function(q, p, 2).shape == (4, 3)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    z, y = (3 * torch.randn(2, 7, 50)).to(dtype)
    for function in [*SINGLE, *PAIRED]:
        arguments = (z, y) if function in PAIRED else (z,)
        if not takes_logits(function):
            arguments = tuple(x.softmax(-1) for x in arguments)
        ours = function(*arguments)
        assert ours.dtype is dtype
        torch.testing.assert_close(ours, function(*[x.float() for x in arguments]).to(dtype), rtol=0, atol=0)
    assert info.cross_entropy_from_logits(z, y.double()).dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype) -> None:
    z = torch.tensor([[1e4, 1e4, -1e4, -INF], [1e4, -1e4, 0, 3], [-1e4, -1e4, -1e4, -1e4]], dtype=dtype)
    entropies = info.entropy_from_logits(z, unit="bits")
    torch.testing.assert_close(entropies, torch.tensor([1, 0, 2], dtype=dtype))
    # P's third outcome has a probability that underflows and is not 0, so excluding it costs infinitely much
    assert info.cross_entropy_from_logits(z[0], torch.tensor([0, 0, -INF, 0], dtype=dtype)).item() == INF
    assert info.kl_divergence_from_logits(z[0], torch.tensor([0, 0, -INF, 0], dtype=dtype)).item() == INF
    assert info.cross_entropy_from_logits(z[1], z[1].flip(0)).item() == pytest.approx(9997)
    assert info.information_content_from_logits(z[0])[3].item() == INF


def test_nothing_is_infinite_but_what_must_be() -> None:
    sure, half, other = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])
    assert info.entropy(sure).item() == 0
    assert math.copysign(1, info.cross_entropy(sure, sure).item()) == 1
    assert info.cross_entropy(sure, half).item() == pytest.approx(math.log(2))
    assert info.kl_divergence(sure, half).item() == pytest.approx(math.log(2))
    assert info.cross_entropy(half, sure).item() == info.kl_divergence(half, sure).item() == INF
    assert info.kl_divergence(sure, other).item() == INF


def test_gradients_at_zero_are_the_limits() -> None:
    p = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    q = torch.tensor([0.0, 0.5, 0.5], requires_grad=True)
    p_grad, q_grad = torch.autograd.grad(info.cross_entropy(p, q), (p, q))
    assert q_grad.tolist() == [0, 0, -2]
    assert p_grad[1:].tolist() == pytest.approx([math.log(2)] * 2)
    assert torch.autograd.grad(info.entropy(p), p)[0].tolist() == [INF, INF, -1]


@pytest.mark.parametrize("function", [info.entropy_from_logits, info.perplexity_from_logits, *PAIRED[1::2]])
def test_an_impossible_outcome_changes_no_second_derivative(function: Callable[..., Tensor]) -> None:
    masked, kept = torch.tensor([0, -INF, 0, -INF, 0], dtype=torch.float64), [0, 2, 4]
    arguments = torch.randn(2 if function in PAIRED else 1, 5, dtype=torch.float64).unbind()
    for position in range(len(arguments)):
        found = torch.func.hessian(lambda *logits: function(*(z + masked for z in logits)), position)(*arguments)
        expected = torch.func.hessian(lambda *logits: function(*(z[kept] for z in logits)), position)(*arguments)
        torch.testing.assert_close(found, expected)


def test_transforms_and_compilers_see_plain_operations() -> None:
    z, y = torch.randn(2, 4, 5, dtype=torch.float64)
    for function in PAIRED[1::2]:
        torch.testing.assert_close(torch.vmap(function)(z, y), function(z, y))
        tangent = torch.func.jvp(function, (z, y), (y, z))[1]
        grads = torch.autograd.functional.vjp(function, (z, y), torch.ones(4, dtype=torch.float64))[1]
        torch.testing.assert_close(tangent.sum(), (grads[0] * y).sum() + (grads[1] * z).sum())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: info.entropy(torch.ones(2), unit="bit"), ValueError, "unit must be 'nats' or 'bits'; got 'bit'"),
        (
            lambda: info.entropy(torch.tensor([0, 1])),
            RuntimeError,
            "p must be a floating point tensor with an axis of outcomes; got a int64 tensor of shape (2,)",
        ),
        (
            lambda: info.entropy_from_logits(torch.tensor(1.0)),
            RuntimeError,
            "logits must be a floating point tensor with an axis of outcomes; got a float32 tensor of shape ()",
        ),
        (
            lambda: info.information_content([0.5]),
            RuntimeError,
            "p must be a floating point tensor; got list [0.5]",
        ),
        (
            lambda: info.cross_entropy(torch.ones(2), torch.tensor([0, 1])),
            RuntimeError,
            "q must be a floating point tensor with an axis of outcomes; got a int64 tensor of shape (2,)",
        ),
        (
            lambda: info.kl_divergence(torch.ones(3, 2), torch.ones(4, 2)),
            RuntimeError,
            "p and q must have shapes that broadcast, with as many outcomes along dim -1; got (3, 2) and (4, 2)",
        ),
        (
            lambda: info.kl_divergence_from_logits(torch.ones(3, 1), torch.ones(3, 2)),
            RuntimeError,
            "p_logits and q_logits must have shapes that broadcast, with as many outcomes along dim -1; "
            "got (3, 1) and (3, 2)",
        ),
        (
            lambda: info.cross_entropy(torch.ones(2), torch.ones(3, 2), dim=0),
            RuntimeError,
            "p and q must have shapes that broadcast, with as many outcomes along dim 0; got (2,) and (3, 2)",
        ),
        (
            lambda: info.cross_entropy(torch.ones(2), torch.ones(3, 2), dim=2),
            IndexError,
            "dim must be from -2 to 1 for shape (3, 2); got 2",
        ),
        (lambda: info.entropy(torch.ones(2), dim=1), IndexError, "Dimension out of range"),
    ],
)
def test_mistakes_are_named(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_it_comes_with_the_package_and_needs_torch_alone() -> None:
    code = (
        "import sys, softmax_fused; softmax_fused.information.entropy\n"
        "print([name for name in ('triton', 'matplotlib', 'torchvision', 'jinja2', 'typer') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
