"""patch() under torch.compile: ours in the graph while patched, torch's before and after."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from softmax_fused import patch
from tests.conftest import Place

IN_A_NEW_PROCESS = """
import sys
import torch
import torch.nn.functional as F
torchs = F.cross_entropy
from softmax_fused import patch
assert F.cross_entropy is torchs, "patched on import"
assert "torch._dynamo" not in sys.modules

graphs = []
def backend(module, inputs):
    graphs.append([str(node.target) for node in module.graph.nodes])
    return module.forward

logits, target = torch.randn(4, 5, requires_grad=True), torch.arange(4)
criterion = torch.compile(torch.nn.CrossEntropyLoss(), backend=backend, fullgraph=True)
for _ in range(2):
    with patch(backend="torch"):
        loss = criterion(logits, target)
    assert len(graphs) == 1, "compiled again"
    assert "softmax_fused.cross_entropy.default" in graphs[0], graphs
    torch.testing.assert_close(loss, torchs(logits, target))
criterion(logits, target)
assert len(graphs) == 2
assert not any("softmax_fused" in name for name in graphs[1]), graphs
assert any(torchs.__name__ in name for name in graphs[1]), graphs
"""


def test_compiled_before_anything_else_was() -> None:
    """Torch lists its functions by name when it first compiles; ours must not be taken for one of them."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow  # the C++ compiler's time
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_with_inductor(place: Place) -> None:
    torch.use_deterministic_algorithms(False)  # Inductor and the NaN filling of memory do not go together
    torch._dynamo.reset()
    model = nn.Linear(6, 5, device=place.device)
    x, target = torch.randn(4, 6, device=place.device), torch.arange(4, device=place.device)

    def step(x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), target, label_smoothing=0.1)

    expected = step(x, target)
    compiled = torch.compile(step, fullgraph=True)
    with patch(backend=place.backend):
        loss = compiled(x, target)
        torch.testing.assert_close(loss, expected)
        loss.backward()
    torch.testing.assert_close(compiled(x, target), expected)
