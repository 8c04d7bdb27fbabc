"""Memory by address: numbers of any type of logits, read and written in the type of the arithmetic.

An address is an int64, an index counts numbers of `dtype`. Numba knows no bfloat16, so `np.uint16` stands for it: no
tensor that a kernel reads holds uint16. float16 and bfloat16 are read as float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

SIZES = {np.float32: 4, np.float64: 8, np.float16: 2, np.uint16: 2}


class Types(NamedTuple):
    """What a kernel is compiled for; the target's type is None for class indices."""

    logits: Any
    target: Any
    real: Any  # of the arithmetic


def types_called(*names: str | None) -> Types:
    """Return types by their names."""
    return Types(*(None if name is None else getattr(np, name) for name in names))


INT16, INT32, INT64 = (ir.IntType(bits) for bits in (16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()

LAYOUTS = {
    types.float32: (FLOAT, types.float32),
    types.float64: (DOUBLE, types.float64),
    types.float16: (HALF, types.float32),
    types.uint16: (INT16, types.float32),  # bfloat16
    types.int64: (INT64, types.int64),
}
"""What lies in memory, and what a read returns, by type."""

ORDERS = {
    types.float32: (INT32, types.int32),
    types.float64: (INT64, types.int64),
    types.float16: (INT16, types.int16),
    types.uint16: (INT16, types.int16),
}
"""The integer of the same size, for LLVM and for Numba."""


def pointer(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    """Return a pointer to one element; a GEP from the address, as LLVM's vectoriser understands no other form."""
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


def reader(apart: bool) -> Any:
    """Return `load` or `load_apart`."""

    @intrinsic
    def read(typing_context, dtype, address, index):
        element, result = LAYOUTS[dtype.dtype]

        def generate(context, builder, signature, arguments):
            where = pointer(builder, arguments[1], arguments[2], element)
            size = context.get_abi_sizeof(element)
            value = builder.load_atomic(where, "unordered", size) if apart else builder.load(where)
            if dtype.dtype == types.uint16:
                return builder.bitcast(builder.shl(builder.zext(value, INT32), INT32(16)), FLOAT)
            return builder.fpext(value, FLOAT) if element is HALF else value

        return result(dtype, types.int64, types.int64), generate

    return read


load = reader(apart=False)
"""Return element `index` of the numbers of type `dtype` at `address`."""

load_apart = reader(apart=True)
"""The same in a loop over elements that do not lie side by side. LLVM does not vectorise it: a vector gathered from
memory costs more than its elements one by one, and much code."""


@intrinsic
def reinterpret(typing_context, dtype, value):
    """Return the number of type `dtype` that has the bits of `value`, which is of the same size."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[1], context.get_value_type(dtype.dtype))

    return dtype.dtype(dtype, value), generate


@intrinsic
def load_order(typing_context, dtype, address, index):
    """Return an integer of the size of `dtype` whose order is that of the floating-point numbers.

    LLVM vectorises a maximum of integers, but one of floating-point numbers only where it may assume that none is NaN.
    A positive NaN is above infinity, a negative one below minus infinity.
    """
    integer, result = ORDERS[dtype.dtype]

    def generate(context, builder, signature, arguments):
        _, where, i = arguments
        bits = builder.load(pointer(builder, where, i, integer))
        negative = builder.ashr(bits, integer(integer.width - 1))
        return builder.xor(bits, builder.lshr(negative, integer(1)))

    return result(dtype, types.int64, types.int64), generate


@intrinsic
def from_order(typing_context, dtype, order):
    """Return the number that `load_order` made an integer of."""
    (integer, given), (element, result) = ORDERS[dtype.dtype], LAYOUTS[dtype.dtype]

    def generate(context, builder, signature, arguments):
        order = arguments[1]
        negative = builder.ashr(order, integer(integer.width - 1))
        bits = builder.xor(order, builder.lshr(negative, integer(1)))
        if dtype.dtype == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(bits, INT32), INT32(16)), FLOAT)
        value = builder.bitcast(bits, element)
        return builder.fpext(value, FLOAT) if element is HALF else value

    return result(dtype, given), generate


def round_to_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Round a float32 to the nearest bfloat16, ties to even; a NaN stays one whatever its lowest bits are."""
    bits = builder.bitcast(value, INT32)
    odd = builder.and_(builder.lshr(bits, INT32(16)), INT32(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, INT32(0x7FFF))), INT32(16))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), INT32(0x7FC0), rounded)
    return builder.trunc(kept, INT16)


def writer(apart: bool) -> Any:
    """Return `store` or `store_apart`."""

    @intrinsic
    def write(typing_context, dtype, address, index, value):
        element, accepted = LAYOUTS[dtype.dtype]
        narrow = dtype.dtype in (types.float16, types.uint16)
        given = types.float64 if narrow and value == types.float64 else accepted

        def generate(context, builder, signature, arguments):
            _, where, i, number = arguments
            if given is not accepted:
                number = builder.fptrunc(number, FLOAT)
            if dtype.dtype == types.uint16:
                number = round_to_bfloat16(builder, number)
            elif element is HALF:
                number = builder.fptrunc(number, HALF)
            where = pointer(builder, where, i, element)
            if apart:
                builder.store_atomic(number, where, "unordered", context.get_abi_sizeof(element))
            else:
                builder.store(number, where)
            return context.get_dummy_value()

        return types.void(dtype, types.int64, types.int64, given), generate

    return write


store = writer(apart=False)
"""Write `value`, rounded to `dtype`, to element `index` of the numbers at `address`."""

store_apart = writer(apart=True)
"""The same in a loop over elements that do not lie side by side; see `load_apart`."""


@intrinsic
def next_ticket(typing_context, address):
    """Return the int64 at `address`, and add 1 to it: every thread gets another number."""

    def generate(context, builder, signature, arguments):
        counter = builder.inttoptr(arguments[0], INT64.as_pointer())
        return builder.atomic_rmw("add", counter, INT64(1), "monotonic")

    return types.int64(types.int64), generate


def field_reader(result: types.Type, element: ir.Type) -> Any:
    """Return a function that reads a field of a `Call`, given the call's address and the field's number."""

    @intrinsic
    def read(typing_context, call, field):
        def generate(context, builder, signature, arguments):
            return builder.load(pointer(builder, *arguments, element))

        return result(types.int64, types.int64), generate

    return read


get = field_reader(types.int64, INT64)
get_real = field_reader(types.float64, DOUBLE)
"""Fields that hold the bits of a float64."""
