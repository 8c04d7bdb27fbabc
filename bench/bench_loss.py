"""Loss, gradient and both, ours beside torch's: `make bench` on the CPU, `make bench-gpu` where there is a GPU.

Every call is timed until the device is done, with inputs made and kernels compiled before. Read the ratio between the
rows of a group; absolute times belong to one machine.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import softmax_fused

CPU_SHAPES = [(256, 10), (60_000, 10), (4096, 1000), (512, 32_000), (256, 128_256), (16, 19, 128, 256)]
GPU_SHAPES = [
    (8192, 32_000),
    (8192, 50_304),
    (8192, 128_256),
    (8192, 262_144),
    (4096, 1000),
    (60_000, 10),
    (256, 10),
    (16, 19, 512, 1024),
]
PROVIDERS: dict[str, Callable[..., Tensor]] = {"ours": softmax_fused.cross_entropy, "torch": F.cross_entropy}

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CASES = [
    pytest.param("cpu", shape, torch.float32, id=f"cpu-float32-{'x'.join(map(str, shape))}") for shape in CPU_SHAPES
]
CASES += [
    pytest.param("cuda", shape, dtype, id=f"cuda-{str(dtype)[6:]}-{'x'.join(map(str, shape))}", marks=gpu)
    for dtype in (torch.bfloat16, torch.float32)
    for shape in GPU_SHAPES
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize(("device", "shape", "dtype"), CASES)
def bench_cross_entropy(
    benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...], dtype: torch.dtype, mode: str, provider: str
) -> None:
    loss_function = PROVIDERS[provider]
    logits = torch.randn(shape, dtype=torch.float32, device=device).to(dtype).requires_grad_()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=device)
    recorded = loss_function(logits, target)

    def call() -> None:
        loss = recorded if mode == "backward" else loss_function(logits, target)
        if mode != "forward":
            torch.autograd.grad(loss, logits, retain_graph=mode == "backward")
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    benchmark.group = f"{device} {str(dtype)[6:]} {'x'.join(map(str, shape))} {mode}"
    benchmark.extra_info.update(
        provider=provider,
        mode=mode,
        shape=shape,
        dtype=str(dtype),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
    )
    benchmark.pedantic(call, rounds=15, iterations=max(1, 200_000 // logits.numel()), warmup_rounds=3)
