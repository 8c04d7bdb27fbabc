"""Imports go down only, and each module knows no more than it should: read from the source, nothing is imported."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = "softmax_fused"

# From the top down: a module imports those of lower layers and of its own. A name stands for a package's modules, too.
LAYERS = [
    [OURS],
    [f"{OURS}.modules", f"{OURS}.patching"],
    [f"{OURS}.functional"],
    [f"{OURS}.distributed"],
    [f"{OURS}._dispatch", f"{OURS}._fallback", f"{OURS}._tracing"],
    [f"{OURS}.backends"],
    [f"{OURS}._spec"],
    [f"{OURS}._row_outputs", f"{OURS}.kernels", f"{OURS}.information"],
    [f"{OURS}._errors"],
]
LAB = (f"{OURS}.training", f"{OURS}.cli", f"{OURS}.__main__")  # on top of the library

# What `import softmax_fused` must not load. A module that needs one of these may be imported inside a function.
HEAVY = ("triton", "torch._dynamo", "torch.distributed.tensor", f"{OURS}.distributed.untraced")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = (OURS, *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = [path for folder in (OURS, "kernels") for path in (ROOT / folder).rglob("*.py")]
SOURCES = {module_name(path): ast.parse(path.read_text()) for path in FILES}
LIBRARY = sorted(name for name in SOURCES if not name.startswith(LAB))


def named(module: str, node: ast.AST) -> set[str]:
    """The modules that an import statement of `module` names; of this project the very module, not its package."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    package = module.split(".")[: -node.level] if node.level else []  # kernels import one another relatively
    base = ".".join([*package, *([node.module] if node.module else [])])
    return {full if (full := f"{base}.{alias.name}") in SOURCES else base for alias in node.names}


def imports(module: str, *, late: bool = False) -> set[str]:
    """The modules that a module imports at its top (types included) or, with `late`, inside its functions."""
    nodes = list(ast.walk(SOURCES[module]))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    return {it for node in nodes if (id(node) in inside) == late for it in named(module, node)}


def layer(module: str) -> int:
    """The layer of the module or, where none names it, of the closest package around it."""
    found = [i for i, names in enumerate(LAYERS) if module in names]
    return found[0] if found else layer(module.rpartition(".")[0])


def needs(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is of these packages, or imports one that is."""
    return module.startswith(packages) or (module in SOURCES and any(needs(it, packages) for it in imports(module)))


@pytest.mark.parametrize("module", LIBRARY)
def test_imports_go_down_only(module: str) -> None:
    for other in imports(module) | imports(module, late=True):
        if other in SOURCES and other != OURS:
            assert not other.startswith(LAB), f"{module} imports {other}"
            assert layer(other) >= layer(module), f"{module} imports {other}, which is above it"
        if other.startswith(("triton", f"{OURS}.kernels")):
            assert module.startswith((f"{OURS}.backends.triton", f"{OURS}.kernels")), f"{module} imports {other}"


@pytest.mark.parametrize("module", LIBRARY)
def test_only_what_is_heavy_is_imported_inside_a_function(module: str) -> None:
    for other in imports(module, late=True):
        assert needs(other, HEAVY), f"{module} can import {other} at its top"


def test_there_is_no_circle() -> None:
    graph = {module: {it for it in imports(module) if it in SOURCES} for module in LIBRARY}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "package", [module for module in LIBRARY if any(it.startswith(f"{module}.") for it in LIBRARY)]
)
def test_no_module_is_named_like_what_its_package_exports(package: str) -> None:
    nodes = [node for node in SOURCES[package].body if isinstance(node, ast.ImportFrom)]
    exported = {(alias.asname or alias.name, f"{node.module}.{alias.name}") for node in nodes for alias in node.names}
    assert not [name for name, full in exported if f"{package}.{name}" in SOURCES and full not in SOURCES]
