"""What a call costs the host: python -m bench.host [--json FILE] [--rounds N].

Without a GPU: Python, Triton's launcher and PyTorch's dispatcher run as they do with one, the kernels compiled for
sm_90, and the CUDA driver below does nothing (bench/no_device.py). Torch's own loss is called on 2 x 10 numbers on the
CPU, which costs its dispatcher as much as any other number, and launches nothing; ours on tensors of the shapes in the
table. Liger-Kernel waits for the GPU in its forward pass, which costs more there than here.

With a GPU: the same calls on it, from the first to the end of the last one's kernels.

The floor is a torch.autograd.Function that does nothing; with launches, one that saves what ours saves, allocates what
ours allocates, and calls the launcher of our kernels with arguments that were put together before. Providers take turns
within each round; the table shows medians.
"""

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from bench import no_device
from bench.record import RESULTS, processor, versions, write_json
from bench.tables import markdown

SHAPES = ((256, 10), (8192, 32_000), (16, 19, 512, 1024))
TORCH, NOTHING, LAUNCHES, OURS, LIGER = "torch", "empty function", "with bare launches", "softmax_fused", "Liger"
MODES = ("forward", "both")
CALLS = 100
"""In a round, of each provider."""

Call = Callable[[], Any]


def without_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Call:
    """The loss alone."""

    def call() -> None:
        with torch.no_grad():
            loss(logits, target)

    return call


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Call:
    """Loss and gradient."""
    return lambda: torch.autograd.grad(loss(logits, target), logits)


def make_tensors(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Logits that need a gradient, and their target; on the CPU nobody reads them, and they take no memory."""
    logits = torch.empty(shape, device=device).requires_grad_()
    return logits, torch.zeros((*shape[:1], *shape[2:]), dtype=torch.int64, device=device)


def empty_function(grad: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Forward and backward of nothing."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:  # noqa: ARG004
            return logits.new_empty(())

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
            return grad, None

    return Nothing.apply


def bare_launches(logits: Tensor, target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Forward and backward of what cannot be left out: memory, tensors saved, and two launches decided before."""
    launched = record_launches(logits, target)
    if len(launched) != 2 or any(launch.ready is None for launch, _ in launched):
        raise RuntimeError("expected one launch each way, straight to the launcher")
    calls = []
    for launch, tensors in launched:
        _, _, launcher, fixed, packs, _ = launch.ready
        arguments = (*tensors, *launch.arguments)
        rest = (arguments,) if packs else arguments
        calls.append(lambda it=launcher, first=(launch.programs, 1, 1, 0, *fixed, *rest): it(*first))
    forward_launch, backward_launch = calls
    size = launched[1][1][0].numel()

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
            loss, scratch = logits.new_empty(()), logits.new_empty(size)
            forward_launch()
            ctx.save_for_backward(logits, target, None, scratch)
            return loss

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
            logits, _, _, _ = ctx.saved_tensors
            grad = torch.empty_like(logits)
            backward_launch()
            return grad, None

    return Bare.apply


def record_launches(logits: Tensor, target: Tensor) -> list[tuple[Any, tuple[Any, ...]]]:
    """The launches of loss and gradient, with their tensors."""
    from softmax_fused.backends.triton.plan import Launch

    found: list[tuple[Any, tuple[Any, ...]]] = []
    real = Launch.__call__
    for _ in range(2):  # the first compiles
        found.clear()
        Launch.__call__ = lambda self, *tensors: (found.append((self, tensors)), real(self, *tensors))[1]
        try:
            with_gradient(ours(), logits, target)()
        finally:
            Launch.__call__ = real
    return found


def ours() -> nn.Module:
    import softmax_fused

    return softmax_fused.CrossEntropyLoss(backend="triton")


def make_calls(shape: tuple[int, ...], device: str) -> dict[tuple[str, str], Call]:
    """Every provider's calls at a shape."""
    logits, target = make_tensors(shape, device)
    on_gpu = device == "cuda"
    of_torch = (
        (logits, target) if on_gpu else (torch.zeros(2, 10, requires_grad=True), torch.zeros(2, dtype=torch.int64))
    )
    losses: dict[str, tuple[Any, tuple[Tensor, Tensor]]] = {
        TORCH: (nn.CrossEntropyLoss(), of_torch),
        NOTHING: (empty_function(torch.empty_like(logits)), (logits, target)),
        OURS: (ours(), (logits, target)),
    }
    if not on_gpu:
        losses[LAUNCHES] = bare_launches(logits, target), (logits, target)
    if len(shape) == 2:
        try:
            from liger_kernel.transformers import LigerCrossEntropyLoss
        except ImportError:
            pass
        else:
            losses[LIGER] = LigerCrossEntropyLoss(), (logits, target)
    calls = {}
    for name, (loss, tensors) in losses.items():
        calls[name, "forward"] = without_gradient(loss, *tensors)
        calls[name, "both"] = with_gradient(loss, *tensors)
    return calls


def clock(call: Call, device: str) -> float:
    """Microseconds a call."""
    start = perf_counter()
    for _ in range(CALLS):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (perf_counter() - start) / CALLS * 1e6


def measure(shape: tuple[int, ...], device: str, rounds: int) -> dict[tuple[str, str], float]:
    """Median microseconds of every provider and mode."""
    calls = make_calls(shape, device)
    for call in calls.values():
        for _ in range(10):
            call()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(clock(call, device))
    return {key: median(found) for key, found in times.items()}


def table(record: dict[str, Any]) -> str:
    """The record as a table in Markdown: microseconds, and how many times torch's they are."""
    titles = {"forward": "loss, no_grad", "both": "loss + gradient"}
    rows = []
    for shape in dict.fromkeys(tuple(point["shape"]) for point in record["calls"]):
        of_shape = {(it["provider"], it["mode"]): it["us"] for it in record["calls"] if tuple(it["shape"]) == shape}
        for name in dict.fromkeys(provider for provider, _ in of_shape):
            times = [(of_shape[name, mode], of_shape[name, mode] / of_shape[TORCH, mode]) for mode in MODES]
            rows.append(["x".join(map(str, shape)), name, *(f"{us:.1f} ({ratio:.2f})" for us, ratio in times)])
    return markdown(["logits", "call", *(f"{titles[mode]}, µs (times torch's)" for mode in MODES)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="default: bench/results/host-DEVICE.json")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    path = options.json or RESULTS / f"host-{device}.json"
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    with tempfile.TemporaryDirectory() as folder:
        if device == "cpu":
            no_device.keep_memory()
            no_device.install(Path(folder))
        record: dict[str, Any] = {
            "machine": {"device": device, "name": name},
            "versions": versions(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "command": " ".join(["python -m bench.host", *sys.argv[1:]]),
            "calls": [],
        }
        for shape in SHAPES:
            for (provider, mode), us in measure(shape, device, options.rounds).items():
                record["calls"].append({"shape": shape, "provider": provider, "mode": mode, "us": round(us, 2)})
            write_json(path, record)
    print(table(record))


if __name__ == "__main__":
    main()
