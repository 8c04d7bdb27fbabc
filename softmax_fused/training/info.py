"""What this installation runs on, and which backend computes the losses where."""

import torch

from softmax_fused.functional import explain_backend
from softmax_fused.training.runs.record import device_name, versions


def describe_installation() -> list[str]:
    """Return versions, devices and backends, a line each."""
    table = {name: version or "not installed" for name, version in versions().items() if name not in ("cuda", "hip")}
    table["built for"] = _runtime()
    for device in devices():
        backend, reason = explain_backend(device)
        table[str(device)] = f"{device_name(device)}; backend {backend}: {reason}"
    if not torch.cuda.is_available():
        table["cuda"] = "none that torch can use"
    return [f"{name:14}{text}" for name, text in table.items()]


def devices() -> list[torch.device]:
    """Return the CPU and every GPU that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _runtime() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda} (torch)"
    return f"ROCm {torch.version.hip} (torch)" if torch.version.hip else "CPU only (torch)"
