"""Set-up of the suite: the kernels run in Triton's interpreter where there is no GPU, compiled where there is one."""

import base64
import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

import softmax_fused.functional
from softmax_fused import _dispatch
from softmax_fused.backends.triton import tiles

HAS_GPU = torch.cuda.is_available()

# Numba compiles where a test asks for it by name, and nothing else, wherever it is installed.
os.environ["SOFTMAX_FUSED_NUMBA"] = "0"

# The interpreter is chosen when the kernels are imported, and asked for again while they run (see `interpreted`). In
# between the variable is unset, so that backend="auto" and child processes do what they do for users.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    import softmax_fused.backends.triton.backend

    del os.environ["TRITON_INTERPRET"]
    _dispatch.automatic("cpu")  # pins the decision

import triton.language  # noqa: E402
from triton.runtime import interpreter  # noqa: E402 - triton asks for the variable when imported
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

# Test processes run side by side, and sums of child processes must come out the same: one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# On a machine with a GPU the kernels are tested without what the lab needs.
LAB = ("jinja2", "matplotlib", "rich", "sklearn", "tensorboard", "torchvision", "typer")
HAS_NUMBA = find_spec("numba") is not None
MISSING = [name for name in LAB if find_spec(name) is None]
if MISSING:
    collect_ignore_glob = [
        "test_training_*",
        "test_cli.py",
        "test_distributed_loss.py",
        "lab*",
        "mesh_*",
        "torchrun.py",
    ]

collect_ignore = [] if find_spec("expecttest") else ["opinfo.py"]  # whose modules of torch import it


CONSTRAINTS = Path(__file__).parents[1] / ".ci" / "constraints.txt"


def unpinned() -> list[str]:
    """Return the installed packages whose versions are not those that development is pinned to."""
    pins = re.findall(r"^([\w.-]+)==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE) if CONSTRAINTS.exists() else []
    return [name for name, pin in pins if installed(name) not in (None, pin)] if pins else ["constraints.txt"]


def installed(name: str) -> str | None:
    """Return a package's version without its local part, such as +cpu; None where it is not installed."""
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None


def pytest_configure(config: pytest.Config) -> None:
    """Make warnings errors under the pinned versions; a newer release's deprecation only shows in the summary."""
    if not unpinned():
        config.getini("filterwarnings").insert(0, "error")


def pytest_report_header() -> list[str]:
    """Say what is left out, and whether warnings are errors."""
    lines = [f"without the tests of the lab and of ranks: {', '.join(MISSING)} missing"] if MISSING else []
    if not HAS_NUMBA:
        lines += ["without the compiled CPU backend: Numba is missing"]
    others = unpinned()
    return [*lines, f"warnings are reported: {', '.join(others)} not as pinned" if others else "warnings are errors"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests of a GPU where there is none, rather than skip each; compile little where time is short."""
    if not HAS_GPU:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    for item in items:
        if COMPILED in getattr(item, "callspec", NO_PARAMETERS).params.values():
            item.add_marker(pytest.mark.slow)  # dozens of kernels, each of which takes seconds to compile


settings.register_profile("default", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("default"), max_examples=20_000)
settings.load_profile("default")


class Place(NamedTuple):
    """Where a test computes: a device, and the backend that serves it."""

    device: str
    backend: str


CPU = Place("cpu", "torch")
COMPILED = Place("cpu", "numba")
INTERPRETER = Place("cpu", "triton")
GPU = Place("cuda", "triton")
GPU_TORCH = Place("cuda", "torch")


NO_PARAMETERS = SimpleNamespace(params={})


def on_gpu(*places: tuple[str, Place]) -> list[Any]:
    """Return the parameters of a machine with a GPU; elsewhere these cases do not exist."""
    return [pytest.param(place, id=name, marks=pytest.mark.gpu) for name, place in places if HAS_GPU]


patched: set[str] = set()
patch_and_call = InterpretedFunction.__call__


def call_helper(self: InterpretedFunction, *args: object, **options: object) -> object:
    """Call a helper; Triton's language is patched once a module, not at every call: half of the interpreter's time."""
    if self.fn.__module__ in patched:
        return self.rewrite()(*args, **options)
    patched.add(self.fn.__module__)
    return patch_and_call(self, *args, **options)


patch_tensor = interpreter._patch_lang_tensor


def patch_tensor_for_numpy(tensor: Any, *scope: Any) -> None:
    """Let numpy 2.4 and newer convert arrays of one element, which Triton before 3.7 takes for scalars."""
    patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


create_splat = interpreter.InterpreterBuilder.create_splat


def create_splat_of_truth(self: Any, block_type: Any, number: Any) -> Any:
    """Spread a truth value as one: Triton 3.9 takes it for a number of the type that was compared."""
    if number.data.dtype == bool:
        number = interpreter.TensorHandle(number.data, triton.language.int1)
    return create_splat(self, block_type, number)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let backend="triton" serve CPU tensors, through Triton's interpreter."""
    if HAS_GPU:
        pytest.skip("the kernels run compiled on this machine's GPU instead")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(InterpretedFunction, "__call__", call_helper)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_for_numpy)
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", create_splat_of_truth)
    with tiles.override(target_programs=8):  # rows are split in two or more, not in hundreds
        yield


def resolve(request: pytest.FixtureRequest) -> Place:
    if request.param == INTERPRETER:
        request.getfixturevalue("interpreted")
    return request.param


@pytest.fixture(
    params=[
        pytest.param(CPU, id="cpu"),
        *([pytest.param(COMPILED, id="compiled")] if HAS_NUMBA else []),
        pytest.param(INTERPRETER, id="interpreter"),
        *on_gpu(("gpu", GPU), ("gpu-torch", GPU_TORCH)),
    ]
)
def place(request: pytest.FixtureRequest) -> Place:
    """Every device and backend."""
    return resolve(request)


@pytest.fixture(params=[pytest.param(INTERPRETER, id="interpreter"), *on_gpu(("gpu", GPU))])
def kernels(request: pytest.FixtureRequest) -> Place:
    """The Triton kernels, wherever they can run."""
    return resolve(request)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of each call that a patched name hands to our function."""
    seen: list[dict[str, Any]] = []
    ours = softmax_fused.functional.cross_entropy

    def counted(*arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.append(keywords)
        return ours(*arguments, **keywords)

    monkeypatch.setattr(softmax_fused.functional, "cross_entropy", counted)
    return seen


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fill torch.empty with NaN: memory that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the lab's figures as one white pixel where no test looks at them: drawing is nine tenths of a short run."""
    of_the_lab = request.module.__name__.startswith(("tests.test_training", "tests.test_cli"))
    if of_the_lab and not request.node.get_closest_marker("pictures"):
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(BLANK))
