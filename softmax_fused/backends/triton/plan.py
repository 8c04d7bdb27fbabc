"""Launch plans: what depends on a call's signature alone is decided once, and later calls pass their tensors only.

A signature is what the host knows without looking at numbers: operation, dtypes, shapes, strides, device, options, and
which pointers are multiples of 16, for which Triton compiles other code. `planned` keeps what a function decides for a
signature; `Launch` is a kernel's launch with everything decided but its tensors.

The first call of a `Launch` goes through Triton's own dispatch, which compiles. Later ones call the compiled kernel's
launcher with the same arguments, in the way of `JITFunction.run`, without looking at each of them again. Triton's own
dispatch stays the path for whatever else may want to see a launch or to compile anew: the interpreter, launch hooks
(profilers), debugging, and releases of Triton that this file does not know.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from softmax_fused.backends.triton import launch, tiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

KNOWN_VERSIONS = ((3, 3), (3, 9))
"""The oldest and the newest release of Triton whose launchers are called as below."""

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

PLANS = 1024
"""How many signatures an operation keeps: beyond, the one unused for longest is forgotten."""


def direct_launches() -> tuple[bool, str]:
    """Return whether later launches go to the compiled kernel's launcher, and why."""
    oldest, newest = (".".join(map(str, version)) for version in KNOWN_VERSIONS)
    if torch.version.hip:
        return False, "on ROCm Triton also looks at the size of a tensor's memory"
    if not KNOWN_VERSIONS[0] <= VERSION <= KNOWN_VERSIONS[1]:
        return False, f"how Triton {triton.__version__} launches is not known, as it is of {oldest} to {newest}"
    return True, f"Triton {triton.__version__} is one of {oldest} to {newest}"


DIRECT = direct_launches()[0]

if VERSION >= (3, 4):
    RUNTIME, COMPILATION = triton.knobs.runtime, triton.knobs.compilation

    def watched() -> bool:
        """Whether launch hooks are set, or options that Triton compiles other code for."""
        enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
        return bool(
            (enter is not None and getattr(enter, "calls", True))
            or (leave is not None and getattr(leave, "calls", True))
            or RUNTIME.debug
            or getattr(COMPILATION, "instrumentation_mode", "")
            or getattr(RUNTIME, "add_stages_inspection_hook", None)
        )

else:

    def watched() -> bool:
        """Whether launch hooks are set, or options that Triton compiles other code for."""
        kernel = triton.compiler.CompiledKernel
        return bool(kernel.launch_enter_hook or kernel.launch_exit_hook or os.environ.get("TRITON_DEBUG", "0") == "1")


def planned(decide: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what `decide` returns for a signature, until other tile sizes are used."""
    kept = functools.lru_cache(PLANS)(decide)
    tiles.CACHES.append(kept)
    return kept


def named(types: Any, value: Any) -> Any:
    """Return nested tuples as the NamedTuples of `types`: (type, types of its first fields...) each, or None."""
    if types is None or value is None:
        return value
    fields = [named(*pair) for pair in zip(types[1:], value, strict=False)]
    return types[0](*fields, *value[len(fields) :])


class Ready(NamedTuple):
    """A compiled kernel, ready to be launched on a device."""

    driver: Any
    device: int
    launcher: Callable[..., None]
    fixed: tuple[Any, ...]  # what the launcher wants between the stream and the kernel's arguments
    packs: bool  # whether it wants those as one tuple
    compiled: Any  # kept, as Triton unloads kernels that nobody keeps

    @classmethod
    def of(cls, compiled: Any) -> Ready:
        """Return what `JITFunction.run` would call, or what that calls in its turn where it does nothing else."""
        active, run = driver.active, compiled.run
        device = active.get_current_device()
        hooks = (None, None, None)  # the launch's metadata, for two hooks
        scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
        if hasattr(run, "kernel_signature") and not scratch and not getattr(run, "gsan_enabled", False):
            fixed = (
                compiled.function, run.launch_cooperative_grid, run.launch_pdl, compiled.packed_metadata, *hooks,
                None, None, run.arg_annotations, run.kernel_signature,
            )  # fmt: skip
            return cls(active, device, run.launch, fixed, True, compiled)
        return cls(active, device, run, (compiled.function, compiled.packed_metadata, *hooks), False, compiled)


class Launch:
    """A kernel's launch on `device` with everything decided but its tensors, which come first among its arguments.

    The tensors come in plain tuples; `types` are the NamedTuples that the kernel knows them as, see `named`.
    """

    __slots__ = ("arguments", "device", "kernel", "programs", "ready", "types", "warps")

    def __init__(
        self, kernel: Any, programs: int, warps: int, device: torch.device, types: tuple[Any, ...], *arguments: Any
    ) -> None:
        self.kernel, self.programs, self.warps, self.device = kernel, programs, warps, device
        self.types, self.arguments = types, arguments
        self.ready: Ready | None = None

    def __call__(self, *tensors: Any) -> None:
        """Launch the kernel on the current stream."""
        if self.ready is not None and not watched():
            of_driver, device, launcher, fixed, packs, _ = self.ready
            active = driver.active
            if active is of_driver and active.get_current_device() == device and not self.kernel.pre_run_hooks:
                stream = active.get_current_stream(device)
                if packs:
                    launcher(self.programs, 1, 1, stream, *fixed, (*tensors, *self.arguments))
                else:
                    launcher(self.programs, 1, 1, stream, *fixed, *tensors, *self.arguments)
                return
        self.dispatch(tensors)

    def dispatch(self, tensors: tuple[Any, ...]) -> None:
        """Launch the kernel through Triton, on the device of its tensors, and keep what it compiled."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self(*tensors)
            return
        arguments = (named(types, value) for types, value in zip(self.types, tensors, strict=True))
        compiled = launch.launch(self.kernel, self.programs, self.warps, *arguments, *self.arguments)
        if DIRECT and isinstance(self.kernel, triton.JITFunction) and compiled is not None and not watched():
            self.ready = Ready.of(compiled)

    def ticket(self) -> Tensor:
        """Return the 0 from which the launch's programs take tickets; the last program makes it 0 again.

        Launches of one stream run one after another and share theirs. A launch that a CUDA graph captures has its own,
        which the graph sets to 0: it may be replayed beside launches of the stream that captured it.
        """
        device = self.device
        on_gpu = device.type == "cuda"
        if (on_gpu and torch._C._cuda_isCurrentStreamCapturing()) or not isinstance(self.kernel, triton.JITFunction):
            return torch.zeros(1, dtype=torch.int32, device=device)  # interpreted: threads run side by side
        active = driver.active
        index = device.index if on_gpu else active.get_current_device()
        place = index, active.get_current_stream(index)
        found = TICKETS.get(place)
        if found is None:
            found = TICKETS[place] = torch.zeros(1, dtype=torch.int32, device=device)
        return found


TICKETS: dict[tuple[int, int], Tensor] = {}
"""By device and stream."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=TICKETS.clear)
