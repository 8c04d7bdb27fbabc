"""Triton's whole launch path without a GPU: kernels compiled for sm_90, and a CUDA driver that answers at once.

The driver's library is compiled from bench/no_device.c. Tensors are CPU tensors; nothing is computed, and memory that a
kernel would fill holds whatever it held.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
COMPILER = os.environ.get("CC", "cc")

# glibc, so that memory of any size is taken from the heap and stays there, as a GPU's stays with PyTorch's allocator
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def library(folder: Path) -> Path:
    """Compile the driver's library into a folder, and have Triton and this process take it."""
    path = folder / "libcuda.so.1"
    name = f"-Wl,-soname,{path.name}"
    subprocess.run([COMPILER, "-O2", "-shared", "-fPIC", name, "-o", str(path), str(SOURCE)], check=True)
    (folder / "libcuda.so").symlink_to(path)  # as Triton 3.3 links it
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return path


def keep_memory() -> None:
    """Have malloc keep what is freed."""
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def install(folder: Path) -> ModuleType:
    """Make the driver Triton's, let the kernels take CPU tensors, and return the library of kernels.

    Triton must not have been imported with its interpreter on.
    """
    library(folder)
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver:
        """What Triton asks of a driver, as the one for CUDA has it."""

        launcher_cls = nvidia.CudaLauncher

        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:  # noqa: ARG002
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            return torch.cpu

    triton.runtime.driver.set_active(Driver())
    from softmax_fused.backends.triton import launch

    launch.INTERPRETED = True
    return launch
