"""The layers of the package: a module imports from its own layer or below, without circles, at the top of its file."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A name stands for a module, or for a package with those of its modules that have no name of their own.
LAYERS = (
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
    ("cli", "__main__"),
)
LAYER = {f"softmax_fused.{name}": number for number, names in enumerate(LAYERS) for name in names}
PACKAGES = ("softmax_fused/training",)  # those whose modules all have a layer


def read_module(path: Path) -> tuple[str, ast.Module]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text())


MODULES = dict(read_module(path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield what is imported anywhere in a tree; ``from package import name`` may import a module of that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "expected absolute imports"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in submodules)


def layer_of(module: str) -> int | None:
    """Return the number of a module's layer, None for a module without one."""
    while module and module not in LAYER:
        module = module.rpartition(".")[0]
    return LAYER.get(module)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_layer_or_below(module: str) -> None:
    own = layer_of(module)
    assert own is not None, "expected a layer in LAYERS"
    layers = {name: layer_of(name) for name in imported(MODULES[module])}
    assert not {name: layer for name, layer in layers.items() if layer is not None and layer > own}


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: set(imported(tree)) & set(MODULES) for module, tree in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", MODULES)
def test_our_own_modules_are_imported_at_the_top(module: str) -> None:
    """Only an optional package is imported inside a function, which keeps the import of the module light."""
    functions = [
        node for node in ast.walk(MODULES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    inside = {name for function in functions for name in imported(function)}
    assert not {name for name in inside if name.partition(".")[0] == "softmax_fused"}
