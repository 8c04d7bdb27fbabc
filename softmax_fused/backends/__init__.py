"""What computes: a folder a backend, and the table of all.

A backend's package is cheap to import and answers two questions, see `_spec.Registration`; its `load` imports what
computes, see `_spec.Backend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softmax_fused.backends import numba, torch, triton

if TYPE_CHECKING:
    from softmax_fused._spec import Registration

REGISTRY: dict[str, Registration] = {
    "triton": triton,
    "numba": numba,
    "torch": torch,
}
"""By the name that users pass as `backend`; "auto" takes the first that suits the device."""
