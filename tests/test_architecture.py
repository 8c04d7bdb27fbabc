"""The layers of the package: a module imports from its own layer or below, without circles, at the top of its file."""

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A name stands for a module, or for a package with those of its modules that have no name of their own.
LAYERS = (
    ("_errors",),
    ("_row_outputs", "information", "kernels"),
    ("_spec",),
    ("backends",),
    ("_dispatch", "_fallback", "_tracing"),
    ("distributed.autograd", "distributed.dtensor", "distributed.exchange", "distributed.merge"),
    ("functional", "distributed.dtensor_linear", "distributed.row_autograd"),
    ("distributed",),
    ("modules", "patching"),
    ("__init__",),
    ("training", "training.errors", "training.versions", "training.wording"),
    ("training.files", "training.signals"),
    ("training.ranks",),
    ("training.data",),
    ("training.models",),
    ("training.config",),
    ("training.report",),
    ("training.runs",),
    ("training.info", "training.predict"),
    ("training.commands",),
)
LAYER = {f"softmax_fused.{name}".removesuffix(".__init__"): i for i, names in enumerate(LAYERS) for name in names}
LAB = ("softmax_fused.cli", "softmax_fused.__main__")  # they use all the others

# What `import softmax_fused` must not load. A module that imports one of these may be imported inside a function.
HEAVY = (
    "triton",
    "numba",
    "llvmlite",
    "softmax_fused.backends.numba.backend",
    "torch._dynamo",
    "torch.distributed.tensor",
    "softmax_fused.distributed.untraced",
)
# What the lab must not load before a command needs it.
EXTRA = (
    "matplotlib",
    "platformdirs",
    "sklearn",
    "torchvision",
    "torch.utils.tensorboard",
    "torch.distributed.rendezvous",
)


def read_module(path: Path) -> tuple[str, ast.Module]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("softmax_fused", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text())


PATHS = [path for folder in ("softmax_fused", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {name: tree for name, tree in map(read_module, PATHS) if not name.startswith(LAB)}


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Yield what is imported anywhere in a tree; ``from package import name`` may import a module of that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = [*module.split(".")[: -node.level], node.module] if node.level else [node.module]  # kernels
            submodules = [".".join([*map(str, package), alias.name]) for alias in node.names]
            yield from (name if name in MODULES else name.rpartition(".")[0] for name in submodules)


def inside_functions(module: str) -> set[str]:
    """What a module imports inside its functions."""
    functions = [
        node for node in ast.walk(MODULES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return {name for function in functions for name in imported(module, function)}


def at_the_top(module: str) -> set[str]:
    """What a module imports outside its functions, types included."""
    return set(imported(module, MODULES[module])) - inside_functions(module)


def layer_of(module: str) -> int:
    """Return the number of a module's layer."""
    while module not in LAYER:
        module = module.rpartition(".")[0]
    return LAYER[module]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_layer_or_below(module: str) -> None:
    names = set(imported(module, MODULES[module])) - {"softmax_fused"}
    assert not {name for name in names if name in MODULES and layer_of(name) > layer_of(module)}
    assert not {name for name in names if name.startswith(LAB)}


@pytest.mark.parametrize("module", MODULES)
def test_the_triton_backend_alone_imports_kernels_and_triton(module: str) -> None:
    if not module.startswith(("softmax_fused.backends.triton", "softmax_fused.kernels")):
        names = set(imported(module, MODULES[module]))
        assert not {name for name in names if name.startswith(("triton", "softmax_fused.kernels"))}


@pytest.mark.parametrize("module", MODULES)
def test_the_numba_backend_alone_imports_numba_and_its_kernels_alone_at_the_top(module: str) -> None:
    if not module.startswith("softmax_fused.backends.numba.kernels"):
        assert not {name for name in at_the_top(module) if name.partition(".")[0] == "numba"}
    if not module.startswith("softmax_fused.backends.numba"):
        assert not {
            name for name in imported(module, MODULES[module]) if name.partition(".")[0] in ("numba", "llvmlite")
        }


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: at_the_top(module) & set(MODULES) for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_functions_keep_the_import_of_the_package_light(module: str) -> None:
    assert not {name for name in inside_functions(module) if not is_heavy(name)}


@functools.cache
def is_heavy(module: str) -> bool:
    """Whether to import a module imports one of HEAVY."""
    return module.startswith((*HEAVY, *EXTRA)) or (module in MODULES and any(map(is_heavy, at_the_top(module))))


@pytest.mark.parametrize("package", [name for name in MODULES if any(it.startswith(f"{name}.") for it in MODULES)])
def test_no_module_is_named_like_a_function_that_its_package_exports(package: str) -> None:
    imports = [node for node in MODULES[package].body if isinstance(node, ast.ImportFrom)]
    functions = {alias.name for node in imports for alias in node.names if f"{node.module}.{alias.name}" not in MODULES}
    assert not {name for name in functions if f"{package}.{name}" in MODULES}


def kernel_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.name}: {node.name}", node


def test_device_functions_are_short() -> None:
    long = {
        name: (len(node.args.args), node.end_lineno - node.lineno + 1)
        for name, node in kernel_functions()
        if node.end_lineno
    }
    assert not {name: sizes for name, sizes in long.items() if sizes[0] > 14 or sizes[1] > 60}
