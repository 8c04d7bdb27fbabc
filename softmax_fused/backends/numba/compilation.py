"""Kernels as functions of C: from the cache or, where that has none, compiled by Numba.

Numba compiles a kernel to LLVM's representation, LLVM to an object file. The object refers to nothing but memset and
memcpy, so a process that finds it in the cache does not import Numba at all.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from softmax_fused.backends.numba import cache
from softmax_fused.backends.numba.call import LOSS, OF_SOFTMAX

if TYPE_CHECKING:
    from collections.abc import Callable

LOGGER = logging.getLogger("softmax_fused")
SYMBOL = "softmax_fused_kernel"
FAILED: set[Key] = set()
"""Kernels that Numba could not compile."""

PATIENCE = 1.0
"""Seconds of compilation after which a line says what is going on."""

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "uint16"}
"""What Numba calls the types of logits and class probabilities; kernels/memory.py says how it takes uint16."""


class Key(NamedTuple):
    """What a kernel is compiled for."""

    logits: torch.dtype
    target: torch.dtype | None  # None: class indices; of the upstream gradient, or None, where it is a softmax's
    real: torch.dtype  # of the arithmetic
    tiled: bool
    operation: str = LOSS

    def __str__(self) -> str:
        what = f"the {self.operation} of {str(self.logits)[6:]} logits"
        if self.operation in OF_SOFTMAX:
            return what
        target = "class indices" if self.target is None else f"{str(self.target)[6:]} class probabilities"
        return f"{what} and {target}"


class Kernel(NamedTuple):
    """A compiled kernel: its address, and the same as a function, which releases the interpreter's lock."""

    address: int
    run: Callable[[int], None]
    library: Any  # keeps the code in memory


@functools.cache
def llvm() -> Any:
    """Return LLVM, imported when a kernel is first asked for: what is wrong with it is said there."""
    from llvmlite import binding

    return binding


@functools.cache
def jit() -> Any:
    """Return the compiler that objects are linked by."""
    llvm().initialize_native_target()
    llvm().initialize_native_asmprinter()
    return llvm().create_lljit_compiler()


@functools.cache
def environment() -> bytes:
    """Return all that machine code depends on beside the kernel: sources, versions, CPU."""
    folder = Path(__file__).parent
    sources = [
        path.read_bytes() for path in (folder / "call.py", *sorted((folder / "kernels").glob("*.py")), Path(__file__))
    ]
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    machine = [llvm().get_default_triple(), llvm().get_host_cpu_name(), llvm().get_host_cpu_features().flatten()]
    return hashlib.sha256(b"\0".join(sources) + "\0".join(versions + machine).encode()).digest()


def compile_object(key: Key) -> bytes:
    """Compile a kernel to an object file."""
    import numba

    from softmax_fused.backends.numba.kernels.memory import types_called
    from softmax_fused.backends.numba.kernels.operations import make_kernel

    types = types_called(*(NAMES[it] if it else None for it in (key.logits, key.target, key.real)))
    kernel = make_kernel(key.operation, types, key.tiled)
    callback = numba.cfunc(numba.void(numba.int64), error_model="numpy")(kernel)
    module = llvm().parse_assembly(callback.inspect_llvm())
    for function in module.functions:
        if function.name == callback.native_name:
            function.name = SYMBOL
        elif not function.is_declaration:
            function.linkage = llvm().Linkage.internal
    machine = (
        llvm()
        .Target.from_triple(module.triple)
        .create_target_machine(
            cpu=llvm().get_host_cpu_name(),
            features=llvm().get_host_cpu_features().flatten(),
            opt=3,
            codemodel="jitdefault",
        )
    )
    drop_exceptions(module, machine)
    code: bytes = machine.emit_object(module)
    return code


def drop_exceptions(module: Any, machine: Any) -> None:
    """Remove what would raise Python's exceptions: no kernel does, and LLVM sees that once it knows all callers."""
    passes = llvm().create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm().create_pass_builder(machine, llvm().create_pipeline_tuning_options()))


def object_code(key: Key) -> bytes:
    """Return a kernel as an object file, from the cache or compiled."""
    name = f"{hashlib.sha256(environment() + repr(key).encode()).hexdigest()}.o"
    code = cache.read(name)
    if code is None:
        message = f"compiling for {key}: some seconds once, then it is in {cache.folder()}"
        notice = threading.Timer(PATIENCE, LOGGER.warning, [message])
        notice.daemon = True
        notice.start()
        try:
            code = compile_object(key)
        finally:
            notice.cancel()
        cache.write(name, code)
    return code


@functools.cache
def link(key: Key) -> Kernel | None:
    """Return a kernel; None, after a line that says why, where it cannot be compiled."""
    try:
        builder = llvm().JITLibraryBuilder().add_object_img(object_code(key)).add_current_process()
        library = builder.export_symbol(SYMBOL).link(jit(), repr(key))
    except Exception as error:  # a Numba that does not fit its own dependencies raises anything
        LOGGER.warning("backend 'torch' computes, as Numba cannot compile for %s: %r", key, error)
        FAILED.add(key)
        return None
    address = library[SYMBOL]
    return Kernel(address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), library)


LOCK = threading.Lock()


def renew_lock() -> None:
    """Let a forked process compile, whose parent may have held the lock."""
    global LOCK
    LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_lock)


def load_kernel(key: Key) -> Kernel | None:
    """Return a kernel, None where it cannot be compiled; one thread compiles, and the others wait for it."""
    with LOCK:
        return link(key)
