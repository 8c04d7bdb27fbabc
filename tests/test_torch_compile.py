"""Under torch.compile, torch.export and make_fx: one graph, and what eager computes."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from softmax_fused import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LogSoftmax,
    RowOutputs,
    Softmax,
    cross_entropy,
    cross_entropy_rows,
    information,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    log_prob,
    log_softmax,
    softmax,
)
from softmax_fused.functional import operators
from tests.cases import make_indices, make_logits, make_probabilities
from tests.conftest import Place

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # torch's compiler stack raises its own
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
)


LOSS, LINEAR_LOSS = CrossEntropyLoss(torch.ones(6), grad_in_forward=True), LinearCrossEntropyLoss(6, 6, bias=True)
EVERY_CALL: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "cross_entropy": lambda z, y, w: cross_entropy(z, y),
    "cross_entropy, weights": lambda z, y, w: cross_entropy(z, y, w[0]),
    "cross_entropy, probabilities": lambda z, y, w: cross_entropy(z, w.softmax(1), reduction="none"),
    "cross_entropy, torch": lambda z, y, w: cross_entropy(z, y, label_smoothing=0.1, backend="torch"),
    "cross_entropy_rows": lambda z, y, w: cross_entropy_rows(z, y),
    "cross_entropy_rows, torch": lambda z, y, w: cross_entropy_rows(
        z, y, w[0], softcap=3.0, outputs=["loss"], backend="torch"
    ),
    "cross_entropy_rows, every output": lambda z, y, w: cross_entropy_rows(z, y, outputs=RowOutputs._fields),
    "cross_entropy_rows, scales": lambda z, y, w: cross_entropy_rows(z, y, logit_scale=w[0], outputs=["loss", "rank"]),
    "log_prob": lambda z, y, w: log_prob(z, y),
    "log_prob, several": lambda z, y, w: log_prob(z, y.view(3, 2).repeat(2, 1), logit_scale=0.5),
    "linear_cross_entropy": lambda z, y, w: linear_cross_entropy(z, w, y),
    "linear_cross_entropy, chunks": lambda z, y, w: linear_cross_entropy(z, w, y, chunk_rows=3),
    "linear_cross_entropy, torch": lambda z, y, w: linear_cross_entropy(z, w, y, weight=w[0], backend="torch"),
    "linear_cross_entropy_rows": lambda z, y, w: linear_cross_entropy_rows(z, w, y),
    "linear_cross_entropy_rows, chunks": lambda z, y, w: linear_cross_entropy_rows(
        z, w, y, outputs=["loss", "entropy", "prediction"], softcap=3.0, chunk_rows=3
    ),
    "softmax": lambda z, y, w: softmax(z, 1),
    "log_softmax": lambda z, y, w: log_softmax(z, 1, backend="torch"),
    "information": lambda z, y, w: information.kl_divergence_from_logits(z, w) + information.entropy(z.softmax(1)),
    "CrossEntropyLoss": lambda z, y, w: LOSS(z, y),
    "LinearCrossEntropyLoss": lambda z, y, w: LINEAR_LOSS(z, y),
    "Softmax": lambda z, y, w: Softmax(1)(z),
    "LogSoftmax": lambda z, y, w: LogSoftmax(1)(z),
}
ARGUMENTS = (torch.randn(6, 6), torch.arange(6), torch.rand(6, 6))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.use_deterministic_algorithms(False)  # Inductor and the NaN filling of memory do not go together
    torch._dynamo.reset()


def counted(function: Callable[..., Tensor], dynamic: bool | None = None, backend: str = "inductor") -> tuple[Any, Any]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic), counter


def loss_and_gradient(function: Callable[..., Tensor], logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    loss = function(logits, *rest)
    torch.manual_seed(0)
    return loss, torch.autograd.grad(loss, logits, torch.randn_like(loss))[0]


@pytest.mark.parametrize("backend", ["auto", "as placed"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager(place: Place, reduction: str, probabilities: bool, backend: str) -> None:
    chosen = place.backend if backend == "as placed" else backend

    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=0.1, backend=chosen)

    compiled, counter = counted(loss, dynamic=True)
    for rows in (8, 9, 30):
        shape = (rows, 11)
        logits = make_logits(shape, torch.float32, place.device)
        make = make_probabilities(shape, torch.float32, place.device)
        target = make if probabilities else make_indices(shape, place.device)
        weight = torch.rand(11, device=place.device)
        eager = loss_and_gradient(loss, logits, target, weight)
        torch.testing.assert_close(loss_and_gradient(compiled, logits, target, weight), eager)
    assert counter.frame_count == 1


def test_the_better_limit_survives_compilation(place: Place) -> None:
    logits, target = make_logits((4, 6), torch.float32, place.device), torch.zeros(4, 6, device=place.device)
    with torch.no_grad():
        logits[:, 3:] = -torch.inf
        target[:, 0] = 1
    compiled, _ = counted(lambda z, t: cross_entropy(z, t, backend=place.backend))
    assert compiled(logits, target).isfinite()


def test_module_and_autocast(place: Place) -> None:
    criterion = CrossEntropyLoss(torch.rand(5, device=place.device), backend=place.backend)
    layer = torch.nn.Linear(7, 5, device=place.device)
    target = torch.arange(5, device=place.device)

    def step(x: Tensor) -> Tensor:
        with torch.autocast(place.device, dtype=torch.bfloat16):
            return criterion(layer(x), target)

    compiled, counter = counted(step)
    x = torch.randn(5, 7, device=place.device)
    loss = compiled(x)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, step(x), rtol=0.01, atol=0.01)
    loss.backward()
    assert layer.weight.grad.isfinite().all()
    assert counter.frame_count == 1


@pytest.mark.parametrize("call", EVERY_CALL.values(), ids=EVERY_CALL.keys())
def test_one_graph_and_no_warning(call: Callable[..., object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
        found = torch.compile(call, fullgraph=True, backend="eager")(*ARGUMENTS)
    torch.testing.assert_close(found, call(*ARGUMENTS))


def test_values_recompile_no_more_often_than_torchs_own() -> None:
    """torch.compile itself makes a constant of a float argument; ignore_index becomes dynamic at its second value."""

    def recompilations(function: Callable[..., Tensor], **options: Any) -> int:
        torch._dynamo.reset()
        compiled, counter = counted(
            lambda z, t, e, i: function(z, t, label_smoothing=e, ignore_index=i, **options), backend="eager"
        )
        logits, target = make_logits((8, 10), torch.float32, "cpu"), make_indices((8, 10), "cpu")
        for smoothing, ignore_index in ((0.1, -100), (0.2, -100), (0.2, 3), (0.2, 4), (0.2, 5)):
            compiled(logits, target, smoothing, ignore_index)
        return counter.frame_count

    for backend in ("auto", "torch"):
        assert recompilations(cross_entropy, backend=backend) <= recompilations(F.cross_entropy)


def test_operators_pass_opcheck(place: Place) -> None:
    for target in (make_indices((8, 10), place.device), make_probabilities((8, 10), torch.float32, place.device)):
        for reduction in ("mean", "sum", "none"):
            logits = make_logits((8, 10), torch.float32, place.device)
            options = (None, reduction, -100, 0.1, torch.float32, False, place.backend, operators.LAYOUT)
            torch.library.opcheck(operators.cross_entropy, (logits, target, *options))
            loss, *saved = operators.cross_entropy(logits, target, *options)
            upstream = torch.randn_like(loss)
            torch.library.opcheck(
                operators.cross_entropy_backward,
                (upstream, logits.detach(), target, [s.detach() for s in saved], *options),
            )


class Exported(torch.nn.Module):
    """A call as a model, to which the modules it uses belong."""

    def __init__(self, call: Callable[..., object]) -> None:
        super().__init__()
        self.call, self.loss, self.linear_loss = call, LOSS, LINEAR_LOSS

    def forward(self, *arguments: Tensor) -> object:
        return self.call(*arguments)


NOT_STRICT = ("cross_entropy, weights", "cross_entropy_rows", "linear_cross_entropy, chunks")


@pytest.mark.parametrize(("name", "strict"), [*((it, True) for it in EVERY_CALL), *((it, False) for it in NOT_STRICT)])
def test_an_exported_program_has_no_operator_of_ours(name: str, strict: bool) -> None:
    call = EVERY_CALL[name]
    program = torch.export.export(Exported(call), ARGUMENTS, strict=strict)
    assert "softmax_fused" not in str([node.target for node in program.graph.nodes])
    torch.testing.assert_close(program.module()(*ARGUMENTS), call(*ARGUMENTS))


@pytest.mark.slow  # another Python imports torch
def test_an_exported_program_loads_without_this_library(tmp_path: Path) -> None:
    call = EVERY_CALL["linear_cross_entropy, torch"]
    torch.export.save(torch.export.export(Exported(call), ARGUMENTS, strict=True), tmp_path / "program.pt2")
    torch.save(ARGUMENTS, tmp_path / "arguments.pt")
    code = (
        "import sys, torch; program = torch.export.load('program.pt2')\n"
        "print(program.module()(*torch.load('arguments.pt')).item(), 'softmax_fused' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loss, imported = found.stdout.split()
    assert float(loss) == pytest.approx(call(*ARGUMENTS).item())
    assert imported == "False"


def test_make_fx(place: Place) -> None:
    logits, target = make_logits((6, 5), torch.float32, place.device), make_indices((6, 5), place.device)

    def gradient(z: Tensor, t: Tensor) -> Tensor:
        return torch.autograd.grad(cross_entropy(z, t, backend=place.backend), z)[0]

    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(gradient, tracing_mode=mode)(logits, target)
        torch.testing.assert_close(traced(logits, target), gradient(logits, target))


def test_transforms_inside_a_compiled_function(place: Place) -> None:
    target = make_indices((6, 5), place.device)

    def gradient(z: Tensor) -> Tensor:
        return torch.func.grad(lambda z: cross_entropy(z, target, backend=place.backend))(z)

    logits = make_logits((6, 5), torch.float32, place.device).detach()
    compiled, _ = counted(gradient)
    torch.testing.assert_close(compiled(logits), gradient(logits))
