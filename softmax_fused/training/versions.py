"""The versions of what results depend on."""

import platform
from importlib import metadata

import torch

from softmax_fused import __version__


def versions() -> dict[str, str | None]:
    """Return versions by name; None for what is not installed."""
    packages = ("softmax-fused", "torch", "triton", "numba", "torchvision", "scikit-learn", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _version(package) for package in packages},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def describe_version() -> str:
    """Return one line with the versions of this package, of torch and, where it is installed, of Triton."""
    triton = _version("triton")
    return f"softmax-fused {__version__} (torch {torch.__version__}, {f'triton {triton}' if triton else 'no triton'})"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
