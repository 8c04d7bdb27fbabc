"""The device that a process computes on."""

import platform

import torch

from softmax_fused.training.errors import LabError, UsageError
from softmax_fused.training.wording import plural


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; ``auto`` is the first CUDA (or ROCm) device, else the CPU.

    Raises:
        UsageError: if torch knows no such device.
        LabError: if this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"expected --device to be auto, cpu, cuda or cuda:N, got {name!r}; use --device auto"
        ) from None
    try:
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise LabError(f"expected a {name} device on this machine, got none ({reason}); use --device auto") from error
    return device


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's architecture and the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{platform.machine()}, {threads} {plural('thread', threads)}"
    return device.type
