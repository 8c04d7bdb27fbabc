"""What this installation consists of, and the backend that computes the losses on each device."""

import torch

from softmax_fused.backends import triton
from softmax_fused.backends.numba import cache
from softmax_fused.functional import explain_backend
from softmax_fused.training.ranks.devices import device_name
from softmax_fused.training.versions import versions


def describe_installation() -> list[str]:
    """Return lines with versions, devices and backends."""
    table = {name: version or "not installed" for name, version in versions().items() if name not in ("cuda", "hip")}
    table["built for"] = _runtime()
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (torch.device("cpu"), *gpus):
        backend, reason = explain_backend(device)
        table[str(device)] = f"{device_name(device)}; backend {backend}: {reason}"
    if explain_backend(torch.device("cpu"))[0] == "numba":
        table["compiled code"] = str(cache.folder())
    if not torch.cuda.is_available():
        table["cuda"] = "none that torch can use"
    if not triton.problem():
        from softmax_fused.backends.triton.plan import direct_launches

        direct, reason = direct_launches()
        table["launches"] = f"{'straight to compiled kernels' if direct else 'through Triton every time'}: {reason}"
    return [f"{name:14}{text}" for name, text in table.items()]


def _runtime() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda} (torch)"
    return f"ROCm {torch.version.hip} (torch)" if torch.version.hip else "CPU only (torch)"
