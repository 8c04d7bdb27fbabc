"""How functions are compiled that compiled functions call: without wrappers for Python, division as in IEEE 754.

None may assume that a number is neither NaN nor infinite. What floating-point arithmetic may do beyond IEEE 754 is said
by the choice of one of these.
"""

from __future__ import annotations

from numba import njit

OPTIONS = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

exact = njit(**OPTIONS)
"""Nothing."""

contracted = njit(fastmath={"contract"}, **OPTIONS)
"""Round a product and a sum once."""

reordered = njit(fastmath={"contract", "reassoc"}, **OPTIONS)
"""Take sums in any order, too, so that each lane of a vector has its own."""
