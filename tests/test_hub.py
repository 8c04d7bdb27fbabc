"""The kernel that `make hub` writes: what Hugging Face's kernels demands of it, and that it computes."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hub import HUB, build_hub, builder
from tests.tiny import REASON, kernels_package, unregistered


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hub(tmp_path_factory.mktemp("hub"))


def load(variant: Path) -> ModuleType:
    """Load a variant as kernels does, which need not be installed."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_variants(hub: Path) -> None:
    names = {path.name for path in hub.iterdir()}
    assert names == {"torch-universal", *(f"torch-{backend}" for backend in builder.settings()["backends"])}
    identifiers = {json.loads((path / "metadata.json").read_text())["id"] for path in hub.iterdir()}
    assert len(identifiers) == len(names)
    assert all(name.isidentifier() for name in identifiers)


def test_imports_are_relative_and_operators_its_own(hub: Path) -> None:
    """Imports but those of torch, Triton, the standard library and, in its own backend alone, Numba with its own."""
    universal = hub / "torch-universal"
    for path in universal.rglob("*.py"):
        allowed = {*sys.stdlib_module_names, "torch", "triton"}
        if path.is_relative_to(universal / "backends" / "numba"):
            allowed |= {"numba", "llvmlite", "numpy"}
        text = path.read_text()
        assert "torch.ops.softmax_fused" not in text
        assert "softmax_fused::" not in text
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= allowed, path


def test_an_import_that_would_stay_absolute_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a/b\.py: write `from softmax_fused.* instead of `import softmax_fused\.x`"):
        builder.relative("a/b.py", "import torch\n\nimport softmax_fused.x\n")


def test_loaded_without_the_package(hub: Path) -> None:
    """Nothing of the installed softmax_fused is imported, and the operators have a namespace of their own."""
    module = load(hub / "torch-universal")
    assert {name for name in vars(module) if name in module.__all__} == {*module.__all__}
    logits, target = torch.randn(6, 5, requires_grad=True), torch.rand(6, 5).softmax(1)
    expected = nn.functional.cross_entropy(logits, target)
    compiled = torch.compile(module.cross_entropy, backend="aot_eager", fullgraph=True)
    losses = [call(logits, target, backend="torch") for call in (module.cross_entropy, compiled)]
    for loss in losses:
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True) for x in (loss, expected)))
    assert hasattr(getattr(torch.ops, module.__name__), "cross_entropy_backward")
    used = {value.__module__ for value in vars(module.functional.loss).values() if hasattr(value, "__module__")}
    assert not {name for name in used if name and name.startswith("softmax_fused")}


def test_two_builds_in_one_process(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = builder.sources() | {"another.py": ""}
    monkeypatch.setattr(builder, "sources", lambda: sources)
    second = build_hub(tmp_path)
    modules = [load(folder / "torch-cpu") for folder in (hub, second)]
    assert modules[0].__name__ != modules[1].__name__
    for module in modules:
        assert module.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1])).item() == pytest.approx(1.3862944)


@pytest.mark.slow  # imports torch in a process of its own
def test_kernels_of_a_build_in_tritons_interpreter(hub: Path) -> None:
    code = (
        "import sys, torch\n"
        "from tests.test_hub import load\n"
        "from pathlib import Path\n"
        "module = load(Path(sys.argv[1]))\n"
        "logits = torch.randn(6, 50, requires_grad=True)\n"
        "target = torch.arange(6)\n"
        "ours = module.cross_entropy(logits, target, backend='triton', reduction='sum')\n"
        "theirs = torch.nn.functional.cross_entropy(logits, target, reduction='sum')\n"
        "torch.testing.assert_close(ours, theirs)\n"
        "torch.testing.assert_close(*(torch.autograd.grad(loss, logits) for loss in (ours, theirs)))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HUB.parent)}
    command = [sys.executable, "-c", code, str(hub / "torch-cuda")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_make_hub_needs_nothing_but_python(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-E", str(HUB / "build.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(path) for path in map(tmp_path.joinpath, done.stdout.split())]
    assert (tmp_path / "torch-universal" / "layers.py").exists()


# With kernels itself


def test_metadata_and_digests(hub: Path) -> None:
    rust = pytest.importorskip("kernels._rust", reason=REASON)
    assert len(rust.Build.open(HUB).general.backends) == len(builder.settings()["backends"])
    for variant in hub.iterdir():
        metadata = rust.Metadata.read_from_file(variant / "metadata.json")
        assert metadata.name.python_name == "softmax_fused"
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))


@pytest.mark.parametrize("part", ["", "torch-universal"], ids=["the device's build", "torch-universal"])
def test_get_local_kernel(hub: Path, part: str) -> None:
    kernels = kernels_package()
    module = kernels.get_local_kernel(hub / part, backend="cpu")
    assert module.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1])).item() == pytest.approx(1.3862944)
    assert Path(module.__file__).parent.name == (part or "torch-cpu")


LAYERS = {
    "CrossEntropyLoss": nn.CrossEntropyLoss(torch.rand(10), label_smoothing=0.1, ignore_index=3),
    "Softmax": nn.Softmax(dim=1),
    "LogSoftmax": nn.LogSoftmax(dim=1),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", LAYERS)
def test_kernelize(hub: Path, name: str, compiled: bool) -> None:
    kernels = kernels_package()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 10)
            self.last = LAYERS[name]

        def forward(self, x: Tensor, *target: Tensor) -> Tensor:
            return self.last(self.linear(x), *target)

    model = Model()
    x = torch.randn(6, 8)
    target = (torch.arange(6),) if name == "CrossEntropyLoss" else ()
    parameters = list(model.parameters())
    expected = model(x, *target)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, parameters, upstream)
    layer = kernels.LocalLayerRepository(hub, layer_name=name)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    torchs = type(model.last)
    with unregistered(torchs), kernels.use_kernel_mapping({name: {"cpu": layer}}, inherit_mapping=False):
        kernels.replace_kernel_forward_from_hub(torchs, name)
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
        try:
            call: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
            found = call(x, *target)
            assert model.last.forward.__func__.__module__.startswith("_softmax_fused_")
        finally:
            del model.last.forward
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, parameters, upstream), grads)


def test_layers_are_what_kernels_demands() -> None:
    """Also where it is not installed: no constructor, and no members but two."""
    spec = importlib.util.spec_from_file_location("hub_layers", HUB / "torch-ext" / "softmax_fused" / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    classes = [value for value in vars(layers).values() if isinstance(value, type) and value.__module__ == "hub_layers"]
    assert len(classes) == 4
    for layer in classes:
        assert layer.__init__ is nn.Module.__init__
        assert set(dir(layer)) - set(dir(nn.Module)) == {"has_backward", "can_torch_compile"}
