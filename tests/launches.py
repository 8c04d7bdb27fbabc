"""Launches of compiled kernels without a GPU, on a driver that only remembers them.

Run by test_plan.py in a process of its own, with pytest but without conftest.py, where Triton's interpreter is off.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from softmax_fused.backends.triton import launch, plan
from softmax_fused.backends.triton.plan import Launch


class Pair(NamedTuple):
    """Tensors as a kernel knows them."""

    source: Any
    out: Any


@triton.jit
def scale(pair, terms, factor, SIZE: tl.constexpr):  # noqa: N803 - as Triton's constants are written
    """Write factor * source to out."""
    i = tl.arange(0, SIZE)
    tl.store(pair.out + i, tl.load(pair.source + i) * factor + terms[0])


LOADED = ("module", "function", 32, 0, 1024)[: 5 if plan.VERSION >= (3, 4) else 4]  # since 3.4 also the most threads


class Driver:
    """A driver that remembers what it was to launch, and computes nothing."""

    class Utils:
        def get_device_properties(self, _device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

        def load_binary(self, *_: Any) -> tuple[Any, ...]:
            return LOADED

        def unload_module(self, _module: Any) -> None: ...

    def __init__(self) -> None:
        self.utils = self.Utils()
        self.launches: list[tuple[Any, ...]] = []
        self.device, self.stream = 0, 7

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *arguments: self.launches.append(arguments)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _device: int) -> int:
        return self.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The active driver; every test compiles its own kernel."""
    lazy = hasattr(driver, "_active")  # since Triton 3.4
    before = driver._active if lazy else driver.active
    found = Driver()
    driver.set_active(found)
    monkeypatch.setattr(plan, "DIRECT", True)
    scale.device_caches.clear()
    yield found
    scale.device_caches.clear()
    setattr(driver, "_active" if lazy else "active", before)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that went through Triton's own dispatch."""
    kernels = []
    real = launch.launch
    monkeypatch.setattr(launch, "launch", lambda kernel, *rest: (kernels.append(kernel), real(kernel, *rest))[1])
    return kernels


def identities(value: Any) -> Any:
    """Nested tuples with a tensor's identity in its place."""
    if isinstance(value, tuple):
        return tuple(identities(it) for it in value)
    return id(value) if isinstance(value, torch.Tensor) else value


def make_launch() -> tuple[Launch, tuple[Any, ...]]:
    x = torch.zeros(32)
    return Launch(scale, 5, 1, x.device, ((Pair,), None), 3, 32), ((x, torch.empty_like(x)), (x.numel(), None))


def test_later_launches_pass_the_launcher_what_triton_passes(fake: Driver, dispatched: list[Any]) -> None:
    scaled, tensors = make_launch()
    for _ in range(3):
        scaled(*tensors)
    assert dispatched == [scale]
    by_triton, *others = fake.launches
    grid, rest = by_triton[:4], by_triton[9:]
    assert grid == (5, 1, 1, 7)
    for other in others:
        assert other[:6] == by_triton[:6]
        assert other[6:9] == (None, None, None)  # no launch hooks
        assert identities(other[9:]) == identities(rest)


def test_other_streams_are_used_at_once(fake: Driver, dispatched: list[Any]) -> None:
    scaled, tensors = make_launch()
    scaled(*tensors)
    fake.stream = 9
    scaled(*tensors)
    assert [arguments[3] for arguments in fake.launches] == [7, 9]
    assert len(dispatched) == 1


def test_another_device_or_driver_is_left_to_triton(fake: Driver, dispatched: list[Any]) -> None:
    scaled, tensors = make_launch()
    scaled(*tensors)
    fake.device = 1
    scaled(*tensors)
    scaled(*tensors)
    assert len(dispatched) == 2
    other = Driver()
    driver.set_active(other)
    scale.device_caches.clear()
    scaled(*tensors)
    assert len(dispatched) == 3
    assert len(other.launches) == 1


@pytest.mark.skipif(plan.VERSION < (3, 4), reason="Triton before 3.4 has no knobs")
@pytest.mark.parametrize("knob", ["launch_enter_hook", "launch_exit_hook", "debug"])
def test_whoever_watches_launches_sees_them_all(
    fake: Driver, dispatched: list[Any], knob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled, tensors = make_launch()
    scaled(*tensors)
    scaled(*tensors)
    assert len(dispatched) == 1
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, knob, True if knob == "debug" else lambda _: None)
        scaled(*tensors)
        scaled(*tensors)
        assert len(dispatched) == 3
    scaled(*tensors)
    assert len(dispatched) == 3
    assert len(fake.launches) == 5


def test_a_hook_of_the_kernel_runs_every_time(fake: Driver, dispatched: list[Any]) -> None:
    scaled, tensors = make_launch()
    scaled(*tensors)
    scale.pre_run_hooks.append(lambda *_, **__: None)
    try:
        scaled(*tensors)
    finally:
        scale.pre_run_hooks.clear()
    assert len(dispatched) == len(fake.launches) == 2


def test_releases_of_triton_that_are_not_known_are_left_to_it(
    fake: Driver, dispatched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "VERSION", (99, 0))
    direct, reason = plan.direct_launches()
    assert not direct
    assert "is not known" in reason
    monkeypatch.setattr(plan, "DIRECT", direct)
    scaled, tensors = make_launch()
    scaled(*tensors)
    scaled(*tensors)
    assert len(dispatched) == len(fake.launches) == 2


def test_threads_share_a_launch(fake: Driver) -> None:
    scaled, tensors = make_launch()
    threads = [threading.Thread(target=lambda: [scaled(*tensors) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.launches) == 400
    assert {arguments[:4] for arguments in fake.launches} == {(5, 1, 1, 7)}


def test_a_stream_keeps_its_ticket(fake: Driver) -> None:
    scaled, _ = make_launch()
    first = scaled.ticket()
    assert first.item() == 0
    assert scaled.ticket() is first
    fake.stream = 8
    assert scaled.ticket() is not first
    plan.TICKETS.clear()
