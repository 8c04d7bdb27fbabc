"""The compiled CPU backend: threads and processes, the cache of compiled code, and what becomes of it without Numba."""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused import cross_entropy, cross_entropy_rows, log_softmax, softmax
from softmax_fused._dispatch import get_backend
from softmax_fused._row_outputs import DEFAULT, DIFFERENTIABLE, OUTPUTS
from softmax_fused.backends.numba.call import ROWS
from tests import reference
from tests.cases import assert_right, crossed, make_indices, make_logits, make_probabilities
from tests.conftest import COMPILED, HAS_NUMBA

pytestmark = pytest.mark.skipif(not HAS_NUMBA, reason="needs Numba: pip install 'softmax-fused[cpu]'")

SHAPES = [(2000, 40), (150, 700), (3, 7, 40, 50), (40, 9, 3)]


def run(program: str, cache: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh Python whose backend="auto" may be Numba, with a cache of its own where one is given."""
    not_inherited = ("SOFTMAX_FUSED_NUMBA", "OMP_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if name not in not_inherited}
    if cache is not None:
        environment["NUMBA_CACHE_DIR"] = str(cache)
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=inherited | environment, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished


def loss_and_gradient(logits: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = cross_entropy(leaf, target, backend="numba", **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaf, upstream)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python's threads compute, as where torch has no GNU OpenMP."""
    from softmax_fused.backends.numba import threads

    monkeypatch.setattr(threads, "openmp", lambda: None)


@pytest.fixture
def always_parallel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Share the rows of small batches, too."""
    from softmax_fused.backends.numba import plan

    monkeypatch.setattr(plan, "PARALLEL_NUMEL", 1)
    monkeypatch.setattr(plan, "CHUNK", 256)
    kept = (plan.make_plan, plan.make_rows_plan, plan.make_softmax_plan)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.mark.slow  # eight kernels are compiled
@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("pool", ["openmp", "python"])
@crossed(
    shape=SHAPES,
    dtype=[torch.float32, torch.bfloat16],
    reduction=["mean", "sum", "none"],
    probabilities=[False, True],
    smoothing=[0.0, 0.1],
)
def test_any_number_of_threads_gives_the_same_bits(
    request: pytest.FixtureRequest,
    pool: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    reduction: str,
    probabilities: bool,
    smoothing: float,
) -> None:
    if pool == "python":
        request.getfixturevalue("no_openmp")
    logits = make_logits(shape, dtype, "cpu")
    target = make_probabilities(shape, dtype, "cpu") if probabilities else make_indices(shape, "cpu")
    options = {"reduction": reduction, "label_smoothing": smoothing}
    alone = loss_and_gradient(logits, target, **options)
    request.getfixturevalue("three_threads")
    for _ in range(3):
        together = loss_and_gradient(logits, target, **options)
        assert all(map(torch.equal, alone, together))


def outputs_and_gradient(logits: Tensor, target: Tensor, **options: object) -> list[Tensor]:
    """All outputs of rows that such a target has, then the gradient from an upstream gradient for each."""
    names = DEFAULT if target.is_floating_point() else tuple(OUTPUTS)
    found = cross_entropy_rows(logits, target, outputs=names, **options)
    soft = [getattr(found, name) for name in DIFFERENTIABLE if name in names]
    upstream = [torch.linspace(0.5 + i, 1.5, it.numel()).view(it.shape).to(it.dtype) for i, it in enumerate(soft)]
    (grad,) = torch.autograd.grad(soft, logits, upstream)
    return [*(it.detach() for it in found if it is not None), grad]


@pytest.mark.slow  # sixteen kernels
@pytest.mark.usefixtures("always_parallel")
@crossed(
    shape=SHAPES,
    dtype=[torch.float32, torch.bfloat16],
    probabilities=[False, True],
    softcap=[None, 3.0],
    smoothing=[0.0, 0.1],
)
def test_outputs_of_rows_have_the_same_bits_with_any_number_of_threads(
    request: pytest.FixtureRequest,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    probabilities: bool,
    softcap: float | None,
    smoothing: float,
) -> None:
    logits = make_logits(shape, dtype, "cpu")
    target = make_probabilities(shape, dtype, "cpu") if probabilities else make_indices(shape, "cpu")
    options = {"softcap": softcap, "label_smoothing": smoothing, "backend": "numba"}
    alone = outputs_and_gradient(logits, target, **options)
    request.getfixturevalue("three_threads")
    for _ in range(3):
        assert all(map(torch.equal, alone, outputs_and_gradient(logits, target, **options)))


@pytest.mark.usefixtures("three_threads", "always_parallel")
def test_threads_compute_what_the_maths_says() -> None:
    for shape in SHAPES:
        logits, weight = make_logits(shape, torch.float32, "cpu"), torch.rand(shape[1])
        assert_right(COMPILED, logits, make_indices(shape, "cpu"), weight, label_smoothing=0.1, ignore_index=1)


@pytest.mark.usefixtures("three_threads", "always_parallel")
def test_a_wrong_class_index_raises_before_rows_are_shared() -> None:
    logits, target = torch.zeros(500, 10), torch.zeros(500, dtype=torch.long)
    target[77] = 10
    with pytest.raises(IndexError, match=r"from 0 to 9 or ignore_index \(-100\); got 10"):
        cross_entropy(logits, target, backend="numba")


@pytest.mark.usefixtures("three_threads", "always_parallel")
def test_several_python_threads_call_at_once() -> None:
    batches = [(make_logits((600, 30 + i), torch.float32, "cpu"), make_indices((600, 30 + i), "cpu")) for i in range(6)]
    expected = [loss_and_gradient(*batch) for batch in batches]
    wrong = []

    def work(number: int) -> None:
        found = [loss_and_gradient(*batches[number]) for _ in range(20)]
        wrong.extend(it for it in found if not all(map(torch.equal, it, expected[number])))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FORKED = """
import os, sys, torch
from softmax_fused import cross_entropy
torch.set_num_threads(2)
logits, target = torch.randn(4000, 100), torch.randint(0, 100, (4000,))
expected = cross_entropy(logits, target, backend="numba")  # starts torch's threads before the fork
child = os.fork()
if not child:
    os._exit(0 if torch.equal(cross_entropy(logits, target, backend="numba"), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow  # a process compiles
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    run(FORKED)


FORKED_WHILE_COMPILING = """
import os, sys, time, torch
from softmax_fused import cross_entropy
from softmax_fused.backends.numba import compilation
with compilation.LOCK:
    child = os.fork()
    if not child:
        cross_entropy(torch.zeros(2, 200), torch.full((2, 200), 1 / 200), backend="numba")
        os._exit(0)
for _ in range(600):
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child waits for a lock that nobody will release")
"""


@pytest.mark.slow  # a process compiles
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_process_forked_while_another_thread_compiles_does_not_wait_for_it() -> None:
    run(FORKED_WHILE_COMPILING)


# The kernel that compiles fastest: rows with class probabilities.
CALL = """
import sys, torch
from softmax_fused import cross_entropy
print(cross_entropy(torch.zeros(2, 200), torch.full((2, 200), 1 / 200), backend="numba").item(), "numba" in sys.modules)
"""
LOSS = pytest.approx(math.log(200))


@pytest.mark.slow  # two processes compile
def test_a_process_finds_what_another_has_compiled(tmp_path: Path) -> None:
    first, second = (run(CALL, tmp_path).stdout.split() for _ in range(2))
    assert float(first[0]) == float(second[0]) == LOSS
    assert (first[1], second[1]) == ("True", "False")  # Numba is imported only to compile
    (code,) = (tmp_path / "softmax-fused").iterdir()
    code.write_bytes(code.read_bytes()[:-1])  # as a disk may leave it that has run full
    assert run(CALL, tmp_path).stdout.split()[1] == "True"
    assert run(CALL, tmp_path).stdout.split()[1] == "False"


def test_another_cpu_or_kernel_has_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from softmax_fused.backends.numba import compilation

    before = compilation.environment()
    compilation.environment.cache_clear()
    assert compilation.environment() == before
    monkeypatch.setattr(compilation.llvm(), "get_host_cpu_name", lambda: "another")
    compilation.environment.cache_clear()
    assert compilation.environment() != before
    compilation.environment.cache_clear()


@pytest.mark.slow  # a process compiles
def test_without_a_folder_to_write_to_every_process_compiles(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run(CALL, tmp_path / "file").stdout.split()[1] == "True"


@pytest.mark.slow  # three processes compile
def test_several_processes_compile_at_once(tmp_path: Path) -> None:
    workers = [threading.Thread(target=run, args=(CALL, tmp_path)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(list((tmp_path / "softmax-fused").iterdir())) == 1
    assert run(CALL, tmp_path).stdout.split()[1] == "False"


@pytest.mark.slow  # a process compiles
def test_long_compilation_says_what_is_going_on(tmp_path: Path) -> None:
    patient = "from softmax_fused.backends.numba import compilation\ncompilation.PATIENCE = 0.0\n"
    finished = run(patient + CALL, tmp_path)
    message = (
        "compiling for the loss of float32 logits and float32 class probabilities: some seconds once, then it is in"
    )
    assert message in finished.stderr
    assert not run(patient + CALL, tmp_path).stderr


def test_where_numba_cannot_compile_torch_computes(tmp_path: Path) -> None:
    broken = "from softmax_fused.backends.numba import compilation\ncompilation.compile_object = None\n"
    finished = run(broken + CALL, tmp_path)
    assert float(finished.stdout.split()[0]) == LOSS
    assert (
        finished.stderr.count("backend 'torch' computes, as Numba cannot compile for the loss of float32 logits") == 1
    )


AUTO = """
import sys, torch
from softmax_fused import cross_entropy, cross_entropy_rows, functional, linear_cross_entropy
print(*functional.explain_backend(torch.device("cpu")))
def name(*shape):
    z = torch.zeros(shape, requires_grad=True)
    return type(cross_entropy(z, torch.zeros(shape[0], dtype=torch.long)).grad_fn).__name__
print(name(256, 10), name(3, 4), name(700, 100), name(70, 100), name(1100, 1000))
z = torch.zeros(3, 4, requires_grad=True)
for outputs in (("loss", "entropy"), ("loss", "prediction"), ("loss",)):
    print(type(cross_entropy_rows(z, torch.arange(3), outputs=outputs).loss.grad_fn).__name__, end=" ")
print()
print(type(linear_cross_entropy(z, torch.zeros(5, 4), torch.arange(3)).grad_fn).__name__)
print(sorted({"numba", "llvmlite"} & set(sys.modules)))
"""
OURS, TORCH = "CrossEntropyBackward", "NllLossBackward0"


@pytest.mark.parametrize("switch", ["unset", "1"])
def test_auto_takes_numba_where_it_is_faster(switch: str) -> None:
    from softmax_fused.backends.numba import tried

    environment = {} if switch == "unset" else {"SOFTMAX_FUSED_NUMBA": switch}
    explained, losses, rows, layer, modules = run(AUTO, **environment).stdout.splitlines()
    if switch == "unset" and not tried():
        assert "SOFTMAX_FUSED_NUMBA=1 has Numba compile for this CPU" in explained
        return
    assert explained.startswith("numba ")
    assert "Numba compiles for this CPU" in explained
    assert losses.split() == [OURS, TORCH, OURS, TORCH, OURS]
    assert rows.split() == ["CrossEntropyRowsBackward", TORCH, TORCH]
    assert layer == TORCH
    assert "llvmlite" in modules


def test_auto_leaves_numba_alone_where_it_is_switched_off() -> None:
    explained, losses, _, layer, modules = run(AUTO, SOFTMAX_FUSED_NUMBA="0").stdout.splitlines()
    assert explained.startswith("torch Triton kernels need a GPU")
    assert "SOFTMAX_FUSED_NUMBA=0 has Numba compile nothing unasked" in explained
    assert losses.split() == [TORCH, TORCH, TORCH, TORCH, OURS]
    assert layer == TORCH
    assert modules == "[]"


def test_auto_leaves_numba_alone_where_nobody_has_tried_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from softmax_fused.backends import numba

    monkeypatch.delenv("SOFTMAX_FUSED_NUMBA")
    monkeypatch.setattr(numba.platform, "machine", lambda: "arm64")
    suits, reason = numba.suits(torch.device("cpu"))
    assert not suits
    assert reason.startswith("SOFTMAX_FUSED_NUMBA=1 has Numba compile for this CPU")
    monkeypatch.setenv("SOFTMAX_FUSED_NUMBA", "1")
    assert numba.suits(torch.device("cpu"))[0]


@pytest.mark.parametrize(
    ("shape", "with_gradient", "left"),
    [
        ((256, 10), True, False),
        ((200, 10), True, True),
        ((10,), True, True),
        ((128, 16), True, True),
        ((64, 1024), True, False),
        ((63, 1024), True, True),
        ((2, 15, 40, 40), True, False),
        ((2, 16, 40, 40), True, True),
        ((103, 10), False, False),
        ((102, 10), False, True),
        ((1023, 1024), False, True),
        ((1024, 1024), False, False),
    ],
)
def test_calls_that_torch_computes_faster_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], with_gradient: bool, left: bool
) -> None:
    from softmax_fused.backends.numba import backend, compilation

    monkeypatch.setattr(backend, "FAILED", set())
    logits = torch.empty(shape)
    assert backend.BACKEND.leaves_to_torch(logits, with_gradient) is left
    backend.FAILED.add(compilation.Key(torch.float32, None, torch.float32, True))
    torchs = get_backend("torch", "cpu").leaves_to_torch
    assert backend.BACKEND.leaves_to_torch(logits, with_gradient) is torchs(logits, with_gradient)


@pytest.mark.parametrize(
    ("shape", "dim", "dtype", "left"),
    [
        ((256, 10), 1, torch.float32, False),
        ((200, 10), 1, torch.float32, True),
        ((10, 256), 0, torch.float32, True),  # they do not lie side by side
        ((1000, 16), 1, torch.float32, True),
        ((8191, 1024), 1, torch.float32, True),
        ((8192, 1024), 1, torch.float32, False),
        ((8192, 1024), 1, torch.bfloat16, True),
        ((64, 64, 64, 64), 1, torch.bfloat16, False),
    ],
)
def test_softmaxes_that_torch_computes_faster_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dim: int, dtype: torch.dtype, left: bool
) -> None:
    from softmax_fused.backends.numba import backend

    monkeypatch.setattr(backend, "FAILED", set())
    numbers = torch.empty(shape, dtype=dtype)
    assert backend.BACKEND.leaves_softmax_to_torch(numbers, dim) is left
    backend.FAILED.add(None)
    assert backend.BACKEND.leaves_softmax_to_torch(numbers, dim)


def softmax_and_gradient(function: Callable[..., Tensor], numbers: Tensor, dim: int, upstream: Tensor) -> list[Tensor]:
    out = function(numbers, dim, backend="numba")
    return [out, *torch.autograd.grad(out, numbers, upstream)]


@pytest.mark.slow  # eight kernels
@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize(("shape", "dim"), [((2000, 40), 1), ((150, 700), 1), ((3, 7, 40, 50), 1), ((40, 9, 130), 0)])
def test_softmax_has_the_same_bits_with_any_number_of_threads(
    request: pytest.FixtureRequest, function: Callable[..., Tensor], shape: tuple[int, ...], dim: int
) -> None:
    numbers, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)
    alone = softmax_and_gradient(function, numbers, dim, upstream)
    request.getfixturevalue("three_threads")
    for _ in range(3):
        assert all(map(torch.equal, alone, softmax_and_gradient(function, numbers, dim, upstream)))


@pytest.mark.slow  # four kernels
@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_softmax_of_rows_at_no_common_stride_is_that_of_a_copy(function: Callable[..., Tensor]) -> None:
    rows = torch.randn(6, 5, 4, 130)[:, ::2, 1:3, ::2].requires_grad_()
    copy = rows.detach().contiguous().requires_grad_()
    upstream = torch.randn(rows.shape)
    for dim in range(4):
        strided, dense = (softmax_and_gradient(function, it, dim, upstream) for it in (rows, copy))
        assert all(map(torch.allclose, strided, dense))


def test_where_numba_cannot_compile_softmax_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    from softmax_fused.backends.numba import plan

    monkeypatch.setattr(plan.compilation, "load_kernel", lambda key: None)
    plan.make_softmax_plan.cache_clear()
    numbers, upstream = torch.randn(30, 40, dtype=torch.float64, requires_grad=True), torch.randn(30, 40).double()
    for ours, torchs in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        expected = torchs(numbers, 1)
        found = softmax_and_gradient(ours, numbers, 1, upstream)
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], *torch.autograd.grad(expected, numbers, upstream))
    plan.make_softmax_plan.cache_clear()


@pytest.mark.parametrize("unknown", ["target", "batch_invariant"])
def test_what_there_is_no_kernel_for_is_computed_by_pure_torch(unknown: str) -> None:
    from softmax_fused.backends.torch import cross_entropy as torch_loss
    from softmax_fused.backends.torch.targets import ClassIndices, make_spec

    class Another(ClassIndices):
        reader = "another"

    logits, target = make_logits((70, 100), torch.float32, "cpu").detach(), make_indices((70, 100), "cpu")
    spec = make_spec(logits, target, "mean", -100, 0.0, torch.float32)
    spec = spec._replace(target=Another) if unknown == "target" else spec._replace(batch_invariant=True)
    operations = get_backend("numba", "cpu").cross_entropy
    found = operations.loss_and_gradient(logits, target, None, spec)
    expected = torch_loss.loss_and_gradient(logits, target, None, spec)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])


def test_outputs_of_rows_in_no_batch_that_varies_are_pure_torchs() -> None:
    logits, target = make_logits((70, 100), torch.float32, "cpu"), make_indices((70, 100), "cpu")
    ours, torchs = (
        outputs_and_gradient(logits, target, backend=name, batch_invariant=True) for name in ("numba", "torch")
    )
    assert all(map(torch.equal, ours, torchs))


def test_an_output_of_rows_that_the_kernels_do_not_know_is_left_to_torch() -> None:
    from softmax_fused._spec import RowSpec
    from softmax_fused.backends.numba import plan
    from softmax_fused.backends.torch.targets import make_spec

    logits, target = torch.zeros(7, 10), torch.zeros(7, dtype=torch.long)
    spec = make_spec(logits, target, "none", -100, 0.0, torch.float32)
    options = RowSpec(spec, 1.0, None, ("loss", "another"))
    given = (logits.shape, logits.stride(), target.stride(), None, logits.dtype, target.dtype, 1)
    assert plan.make_rows_plan(ROWS, options, *given) is plan.NO_KERNEL


@pytest.mark.slow  # two kernels
def test_where_the_gradient_of_rows_cannot_be_compiled_torch_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs' kernel has saved nothing, and torch's gradient needs their entropy."""
    from softmax_fused.backends.numba import compilation, plan

    logits, target = make_logits((70, 100), torch.float32, "cpu"), make_indices((70, 100), "cpu")
    expected = outputs_and_gradient(logits, target, backend="torch")
    load = compilation.load_kernel
    monkeypatch.setattr(compilation, "load_kernel", lambda key: None if "gradient" in key.operation else load(key))
    plan.make_rows_plan.cache_clear()
    found = outputs_and_gradient(logits, target, backend="numba")
    plan.make_rows_plan.cache_clear()
    assert torch.equal(found[-1], expected[-1])
    assert not torch.equal(found[0], expected[0])  # another order of its sums


@pytest.mark.slow  # four kernels
@pytest.mark.parametrize("probabilities", [False, True])
def test_outputs_of_rows_at_no_common_stride_are_those_of_a_copy(probabilities: bool) -> None:
    logits = torch.randn(3, 4, 8, 20)[:, :, ::2].requires_grad_()
    target = (
        make_probabilities(logits.shape, torch.float32, "cpu") if probabilities else make_indices(logits.shape, "cpu")
    )
    copy = logits.detach().contiguous().requires_grad_()
    ours, copys = (outputs_and_gradient(it, target, backend="numba") for it in (logits, copy))
    assert all(map(torch.equal, ours, copys))


@pytest.mark.slow  # four kernels
@pytest.mark.parametrize("shape", [(5, 40), (5, 300)], ids=str)
def test_no_gradient_comes_from_rows_of_which_nothing_is_asked(shape: tuple[int, ...]) -> None:
    logits, target = make_logits(shape, torch.float32, "cpu"), make_indices(shape, "cpu")
    logits.data[1] = math.nan
    target[1] = target[2] = -100
    found = cross_entropy_rows(logits, target, outputs=("loss", "logsumexp"), backend="numba")
    upstream = torch.tensor([1.0, 0, 1, 0, 1])
    (grad,) = torch.autograd.grad([found.loss, found.logsumexp], logits, [torch.ones(5), upstream])
    assert (grad[1] == 0).all()
    torch.testing.assert_close(grad[2], logits[2].softmax(0))
    assert (grad[3] != 0).all()


@pytest.mark.slow  # twenty-four kernels
@crossed(
    shape=[(700, 10), (90, 300), (3, 19, 24, 24)],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    probabilities=[False, True],
    softcap=[None, 3.0],
)
def test_outputs_of_rows_are_no_less_accurate_than_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, probabilities: bool, softcap: float | None
) -> None:
    logits = make_logits(shape, dtype, "cpu")
    target = make_probabilities(shape, dtype, "cpu") if probabilities else make_indices(shape, "cpu")
    wide, exact = logits.detach().double().requires_grad_(), target.double() if probabilities else target
    options = {"softcap": softcap, "logit_scale": 0.7}
    truth = outputs_and_gradient(wide, exact, backend="torch", **options)
    ours, torchs = (outputs_and_gradient(logits, target, backend=name, **options) for name in ("numba", "torch"))
    quarter = torch.finfo(dtype).eps / 4
    for mine, theirs, right in zip(ours, torchs, truth, strict=True):
        assert mine.dtype is theirs.dtype
        if mine.is_floating_point():
            errors = [(it.double() - right).abs().max() for it in (mine, theirs)]
            assert errors[0] <= 1.5 * errors[1] + quarter * right.abs().max()


@pytest.mark.parametrize(
    ("shape", "with_gradient", "kind", "left"),
    [
        ((4, 10), False, "several", False),
        ((4, 10), True, "several", False),
        ((1023, 1024), True, "loss", True),
        ((1024, 1024), True, "loss", False),
        ((1023, 1024), True, "sparse", True),
        ((1024, 1024), True, "sparse", False),
    ],
)
def test_outputs_of_rows_that_torch_computes_faster_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], with_gradient: bool, kind: str, left: bool
) -> None:
    from softmax_fused.backends.numba import backend

    monkeypatch.setattr(backend, "FAILED", set())
    logits = torch.empty(shape)
    assert backend.BACKEND.leaves_rows_to_torch(logits, with_gradient, kind) is left
    backend.FAILED.add(None)
    torchs = get_backend("torch", "cpu").leaves_rows_to_torch
    assert backend.BACKEND.leaves_rows_to_torch(logits, with_gradient, kind) is torchs(logits, with_gradient, kind)


def test_other_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="backend='numba' needs CPU tensors"):
        get_backend("numba", "cuda")


def test_gradients_are_to_the_bit_those_of_the_loss() -> None:
    logits, target = make_logits((70, 300), torch.float32, "cpu"), make_indices((70, 300), "cpu")
    loss = cross_entropy(logits, target, backend="numba")
    first, second = (torch.autograd.grad(loss, logits, torch.tensor(0.3), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.slow  # sixteen kernels
@crossed(
    shape=[(700, 10), (90, 300), (3, 19, 24, 24)],
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    probabilities=[False, True],
)
def test_no_less_accurate_than_torch(shape: tuple[int, ...], dtype: torch.dtype, probabilities: bool) -> None:
    logits = make_logits(shape, dtype, "cpu")
    target = make_probabilities(shape, dtype, "cpu") if probabilities else make_indices(shape, "cpu")
    truth = reference.cross_entropy(logits, target, reduction="none")
    errors = []
    for function, options in ((cross_entropy, {"backend": "numba"}), (F.cross_entropy, {})):
        loss = function(logits, target, reduction="none", **options)
        (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        errors.append([(loss - truth.loss).abs().max().item(), (grad - truth.grad).abs().max().item()])
    quarter = torch.finfo(dtype).eps / 4
    for ours, torchs, size in zip(*errors, (truth.loss.abs().max(), truth.grad.abs().max()), strict=True):
        assert ours <= 1.5 * torchs + quarter * size
