"""Compile, for GPUs that need not be there, the very kernels that calls of the loss would launch.

Run as a program (in a process of its own: no interpreter, a driver that only names its target), it prints one JSON line
for every kernel compiled.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from softmax_fused import _launch, cross_entropy, functional

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class NamedDriver:
    """A Triton driver without a device: it tells the compiler the target, and nothing is ever launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def cases() -> list[tuple[dict[str, Any], Any]]:
    """Every dtype and kind of target at small and large C, rows or classes adjacent; the general case; every output."""
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for shape in ((256, 10), (4, 32000), (4, 50257), (2, 19, 64, 64)):
            indices = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
            found.append(((shape, dtype, indices, None), {}))
        found.append((((4, 32000), dtype, torch.zeros(4, 32000, dtype=dtype), torch.ones(32000, dtype=dtype)), {}))
    labels, weight = torch.zeros(64, dtype=torch.uint8), torch.ones(1000)
    found.append((((64, 1000), torch.float32, labels, weight), {"label_smoothing": 0.1, "reduction": "none"}))
    found.append((((8, 5, 6, 7, 3), torch.float32, torch.zeros(8, 6, 7, 3, dtype=torch.long), None), {}))
    return found


def main(names: list[str]) -> None:
    functional.operations = lambda backend, device: _launch
    current: dict[str, Any] = {}

    def compile_only(kernel: Any, programs: int, warps: int, device: torch.device, *args: Any) -> None:
        compiled = kernel.warmup(*args, grid=(programs,), num_warps=warps, **_launch.OPTIONS)
        print(json.dumps(current | {"kernel": kernel.fn.__name__, "outputs": sorted(compiled.asm)}), flush=True)

    _launch.launch = compile_only
    for name in names:
        triton.runtime.driver.set_active(NamedDriver(TARGETS[name]))
        for (shape, dtype, target, weight), options in cases():
            current.update(target=name, shape=shape, dtype=str(dtype))
            logits = torch.zeros(shape, dtype=dtype, requires_grad=True)
            loss = cross_entropy(logits, target, weight, backend="triton", **options)
            torch.autograd.grad(loss, logits, torch.ones_like(loss))


if __name__ == "__main__":
    main(sys.argv[1:])
