"""Who computes: by device, by request, and without Triton."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from softmax_fused import (
    _dispatch,
    cross_entropy,
    cross_entropy_rows,
    distributed,
    functional,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    log_softmax,
    softmax,
)
from softmax_fused._spec import Backend
from softmax_fused.backends import REGISTRY
from softmax_fused.backends.torch import SMALL_CPU_BYTES, TorchBackend, row_outputs, slice_rows, vocab_parallel
from softmax_fused.backends.torch import cross_entropy as torch_loss
from softmax_fused.functional.autograd import differentiable_softmax_gradient
from tests.conftest import HAS_GPU, installed


def release(name: str) -> tuple[int, ...]:
    return tuple(map(int, (installed(name) or "0.0").split(".")[:2]))


# A process of its own has Triton's interpreter as it is, without what tests/conftest.py does for it.
needs_interpreter = pytest.mark.skipif(
    (release("triton") < (3, 7) and release("numpy") >= (2, 4)) or release("triton") == (3, 9),
    reason="Triton 3.6's interpreter needs numpy < 2.4; 3.9's takes truth values for numbers",
)


def run(program: str, **environment: str) -> str:
    """Run a program in a fresh Python and return what it printed."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=clean | environment, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_import_needs_torch_alone() -> None:
    loaded = run("import sys, softmax_fused; print(*sys.modules)").split()
    for name in (
        "triton",
        "numba",
        "llvmlite",
        "torch._dynamo",
        "torchvision",
        "matplotlib",
        "sklearn",
        "typer",
        "rich",
        "softmax_fused.backends.triton.launch",
    ):
        assert name not in loaded or name in run("import sys, torch; print(*sys.modules)").split()


WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch
from softmax_fused import CrossEntropyLoss, functional
"""


def test_without_triton_the_cpu_path_serves() -> None:
    program = WITHOUT_TRITON + (
        "logits = torch.zeros(3, 4, requires_grad=True)\n"
        "CrossEntropyLoss(backend='torch')(logits, torch.arange(3)).backward()\n"
        "print(CrossEntropyLoss()(logits, torch.arange(3)).item(), logits.grad[0, 0].item())\n"
        "print(functional.explain_backend(torch.device('cuda')))"
    )
    loss, rest = run(program).split(maxsplit=1)
    assert float(loss) == pytest.approx(1.3862944)
    assert "-0.25" in rest
    assert "('torch', 'Triton is not installed" in rest


def test_without_triton_asking_for_kernels_says_how_to_get_them() -> None:
    program = WITHOUT_TRITON + (
        "try:\n    CrossEntropyLoss(backend='triton')(torch.zeros(3, 4), torch.arange(3))\n"
        "except RuntimeError as error:\n    print(error)"
    )
    assert run(program).startswith("backend='triton' is not available. Triton is not installed: pip install triton")


NUMBA_ON_THE_CPU = """
print(*functional.explain_backend(torch.device("cpu")))
print(CrossEntropyLoss()(torch.zeros(3, 4), torch.arange(3)).item())
try:
    CrossEntropyLoss(backend="numba")(torch.zeros(3, 4), torch.arange(3))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("switch", ["", "1"])
def test_without_numba_torch_serves_and_says_how_to_get_it(switch: str) -> None:
    program = WITHOUT_TRITON.replace("triton", "numba") + NUMBA_ON_THE_CPU
    explained, loss, refused = run(program, SOFTMAX_FUSED_NUMBA=switch).splitlines()
    assert explained.startswith("torch ")
    assert "Numba is not installed: pip install 'softmax-fused[cpu]'" in explained
    assert float(loss) == pytest.approx(1.3862944)
    assert refused == "backend='numba' is not available. Numba is not installed: pip install 'softmax-fused[cpu]'"


KERNELS_ON_THE_CPU = """
import torch
from softmax_fused import cross_entropy, functional
try:
    print(cross_entropy(torch.zeros(3, 4), torch.arange(3), backend=BACKEND).item())
except RuntimeError as error:
    print(error)
print(*functional.explain_backend(torch.device("cpu")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Triton")
@needs_interpreter
def test_kernels_for_cpu_tensors_need_the_interpreter() -> None:
    refused = run(KERNELS_ON_THE_CPU.replace("BACKEND", "'triton'"))
    assert "needs tensors on a GPU; got CPU tensors" in refused
    assert "TRITON_INTERPRET=1" in refused
    served = run(KERNELS_ON_THE_CPU.replace("BACKEND", "'triton'"), TRITON_INTERPRET="1").split("\n")
    assert float(served[0]) == pytest.approx(1.3862944)
    assert served[1].startswith("triton TRITON_INTERPRET=1")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Triton")
@needs_interpreter
def test_auto_means_kernels_under_the_interpreter() -> None:
    program = (
        "import torch\nfrom softmax_fused import cross_entropy\n"
        "from softmax_fused.backends.triton import launch as module\n"
        "launch, names = module.launch, []\n"
        "module.launch = lambda kernel, *rest: (names.append(kernel.fn.__name__), launch(kernel, *rest))\n"
        "logits = torch.zeros(3, 4, requires_grad=True)\n"
        "cross_entropy(logits, torch.arange(3)).backward()\nprint(*names)"
    )
    assert run(program, TRITON_INTERPRET="1") == "cross_entropy_forward cross_entropy_backward"


@needs_interpreter
def test_all_kernels_are_interpreted_or_none() -> None:
    program = (
        "import os, torch, softmax_fused\nsoftmax_fused.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))\n"
        "del os.environ['TRITON_INTERPRET']\n"
        "from softmax_fused.kernels import cross_entropy as a, row_outputs as b, vocab_parallel as c, softmax as d\n"
        "kernels = a.cross_entropy_forward, b.row_outputs_forward, c.cross_entropy_from_terms, d.softmax_forward\n"
        "print(*{type(kernel).__name__ for kernel in kernels})"
    )
    assert run(program, TRITON_INTERPRET="1") == "InterpretedFunction"


def test_auto_on_the_cpu_hands_small_inputs_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch_loss, "loss", lambda *args, **options: (calls.append(args), (None, []))[1])
    cross_entropy(torch.zeros(256, 10), torch.zeros(256, dtype=torch.long))
    assert not calls
    rows = SMALL_CPU_BYTES // (8 * 4)
    cross_entropy(torch.zeros(rows, 8), torch.zeros(rows, dtype=torch.long))
    assert len(calls) == 1
    cross_entropy(torch.zeros(256, 10), torch.zeros(256, 10))
    assert len(calls) == 1


def test_auto_on_the_cpu_hands_16_bits_to_torch_as_long_as_buffers_come_without_page_faults() -> None:
    target = torch.zeros(512, dtype=torch.long)
    for classes, dtype, name in (
        (32_000, torch.bfloat16, "NllLossBackward0"),
        (33_000, torch.bfloat16, "CrossEntropyBackward"),
        (16_000, torch.float32, "CrossEntropyBackward"),
    ):
        logits = torch.zeros(512, classes, dtype=dtype, requires_grad=True)
        assert type(cross_entropy(logits, target).grad_fn).__name__ == name
    made = torch.zeros(512, 16_000, dtype=torch.bfloat16, requires_grad=True) * 1
    assert type(cross_entropy(made, target, inplace_backward=True).grad_fn).__name__ == "CrossEntropyBackward"


def test_auto_takes_the_better_limit_at_every_size() -> None:
    logits, inf = torch.zeros(2, 4), float("inf")
    logits[:, 2:] = -inf
    probabilities = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2)
    weight = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert F.cross_entropy(logits, probabilities).isnan()
    assert cross_entropy(logits, probabilities).item() == pytest.approx(0.6931472)
    labels = torch.tensor([0, 2])
    assert F.cross_entropy(logits, labels, weight, reduction="sum").isnan()
    assert cross_entropy(logits, labels, weight, reduction="sum").item() == pytest.approx(0.6931472)
    assert cross_entropy(logits * torch.nan, probabilities).isnan()


@pytest.mark.skipif(HAS_GPU, reason="asks for the answer without a GPU")
def test_explanations() -> None:
    assert functional.explain_backend(torch.device("cuda"))[0] in ("triton", "torch")
    chosen, reason = functional.explain_backend(torch.device("cpu"))
    assert chosen == "torch"
    assert "SOFTMAX_FUSED_NUMBA=0 has Numba compile nothing unasked" in reason
    assert "meta" in functional.explain_backend(torch.device("meta"))[1]


def test_meta_and_fake_tensors_have_shapes() -> None:
    loss = cross_entropy(torch.zeros(8, 10, device="meta"), torch.zeros(8, dtype=torch.long, device="meta"))
    assert (loss.shape, loss.device.type) == ((), "meta")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert cross_entropy(torch.zeros(8, 10), torch.zeros(8, dtype=torch.long), reduction="none").shape == (8,)


def test_torch_function_modes_and_subclasses() -> None:
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        loss = cross_entropy(torch.zeros(3, 4), torch.arange(3))
    assert cross_entropy in seen
    assert loss.item() == pytest.approx(1.3862944)

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function

    assert cross_entropy(torch.zeros(3, 4).as_subclass(Own), torch.arange(3)) is torch.nn.functional.cross_entropy


class Recorder:
    """The operations of a module, and the names of those that were called."""

    def __init__(self, module: object) -> None:
        self.module, self.calls = module, []

    def __getattr__(self, name: str) -> object:
        operation = getattr(self.module, name)
        return lambda *args, **options: (self.calls.append(name), operation(*args, **options))[1]

    def called(self) -> set[str]:
        calls, self.calls = self.calls, []
        return set(calls)


class TorchSoftmax:
    """Softmax in torch operations, as a backend offers it."""

    def forward(self, input: torch.Tensor, dim: int, dtype: torch.dtype, log: bool) -> torch.Tensor:
        return (torch.log_softmax if log else torch.softmax)(input, dim, dtype)

    backward = staticmethod(differentiable_softmax_gradient)


class Third(Backend):
    """A backend that is one class and one line of the registry; here it is the registration, too."""

    name = "third"

    def __init__(self, everything: bool) -> None:
        self.cross_entropy = Recorder(torch_loss)
        if everything:
            self.row_outputs, self.softmax = Recorder(row_outputs), Recorder(TorchSoftmax())
            self.vocab_parallel, self.slice_rows = Recorder(vocab_parallel), Recorder(slice_rows)

    def suits(self, device: torch.device) -> tuple[bool, str]:
        return device.type == "meta", "made for meta tensors"

    def load(self) -> Backend:
        return self

    def refusal(self, device_type: str) -> str | None:
        return "the third backend has no GPU" if device_type == "cuda" else None


def register(monkeypatch: pytest.MonkeyPatch, everything: bool) -> Third:
    third = Third(everything)
    monkeypatch.setitem(REGISTRY, "third", third)
    _dispatch.get_backend.cache_clear()
    _dispatch.CALLS.clear()
    return third


def losses_and_gradients(**options: object) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What every function computes."""
    torch.manual_seed(0)
    z, w, target = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5), torch.arange(6) % 5
    calls = {
        "cross_entropy": lambda: cross_entropy(z, target, **options),
        "grad_in_forward": lambda: cross_entropy(z, target, grad_in_forward=True, **options),
        "inplace_backward": lambda: cross_entropy(z * 1, target, inplace_backward=True, **options),
        "linear_cross_entropy": lambda: linear_cross_entropy(z, w, target, reduction="none", chunk_rows=4, **options),
        "linear_cross_entropy, capped": lambda: linear_cross_entropy(
            z, w, target, softcap=2.0, chunk_rows=4, **options
        ),
        "linear_cross_entropy_rows": lambda: sum(
            linear_cross_entropy_rows(z, w, target, outputs=("loss", "entropy"), chunk_rows=4, **options)[:4:3]
        ),
        "cross_entropy_rows": lambda: sum(
            it.float() for it in cross_entropy_rows(z, target, **options) if it is not None
        ),
        "softmax": lambda: softmax(z, 1, **options),
        "log_softmax": lambda: log_softmax(z, 1, **options),
        "distributed": lambda: distributed.cross_entropy(z, target, **options),
        "distributed rows": lambda: sum(
            it.float() for it in distributed.cross_entropy_rows(z, target, **options) if it is not None
        ),
        "distributed layer": lambda: distributed.linear_cross_entropy(z, w, target, **options),
    }
    found = {}
    for name, call in calls.items():
        result = call()
        found[name] = (result.detach(), *torch.autograd.grad(result, z, torch.ones_like(result)))
    return found


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_every_operation_reaches_a_third_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    third = register(monkeypatch, everything=True)
    found = losses_and_gradients(backend="third")
    assert third.cross_entropy.called() == {"loss", "gradient", "loss_and_gradient", "rescale_gradient"}
    assert third.row_outputs.called() == {"saved_shape", "forward", "gradient"}
    assert third.softmax.called() == {"forward", "backward"}
    assert third.vocab_parallel.called() == {"prepare", "statistics", "terms", "finalize", "gradient"}
    assert third.slice_rows.called() == {"prepare", "statistics", "gradient"}
    torch.testing.assert_close(found, losses_and_gradients())
    monkeypatch.setattr(Third, "gradient_with_loss", ("cpu",))
    cross_entropy(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1]), backend="third")
    assert third.cross_entropy.called() == {"loss_and_gradient"}
    x, w = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3)
    linear_cross_entropy(x, w, torch.tensor([0, 1]), backend="third")
    assert third.cross_entropy.called() == {"loss_and_gradient"}


@pytest.mark.usefixtures("one_rank")
def test_what_a_third_backend_does_not_offer_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    third = register(monkeypatch, everything=False)
    rows, slices, rows_of_slices = Recorder(row_outputs), Recorder(vocab_parallel), Recorder(slice_rows)
    monkeypatch.setattr(TorchBackend, "row_outputs", rows)
    monkeypatch.setattr(TorchBackend, "vocab_parallel", slices)
    monkeypatch.setattr(TorchBackend, "slice_rows", rows_of_slices)
    found = losses_and_gradients(backend="third")
    assert third.cross_entropy.called() == {"loss", "gradient", "loss_and_gradient", "rescale_gradient"}
    assert rows.called() == {"saved_shape", "forward", "gradient"}
    assert slices.called() >= {"statistics", "finalize", "gradient"}
    assert rows_of_slices.called() == {"prepare", "statistics", "gradient"}
    torch.testing.assert_close(found, losses_and_gradients())
    z = torch.zeros(2, 3, requires_grad=True)
    assert softmax(z, 1, backend="third").grad_fn.name() == "SoftmaxBackward0"


def test_the_registry_names_chooses_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, everything=False)
    z, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton', 'numba', 'torch' or 'third'; got 'fourth'"):
        cross_entropy(z, target, backend="fourth")
    with pytest.raises(RuntimeError, match="the third backend has no GPU"):
        _dispatch.get_backend("third", "cuda")
    monkeypatch.setattr(_dispatch, "REGISTRY", {"third": REGISTRY["third"], **REGISTRY})
    assert _dispatch.explain_backend(torch.device("meta")) == ("third", "made for meta tensors")
    compiled = torch.compile(lambda z: cross_entropy(z, target, backend="third"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), F.cross_entropy(z, target))
    assert "loss" in REGISTRY["third"].cross_entropy.called()
