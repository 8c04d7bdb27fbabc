"""A case measured: providers take turns within each round, A B C, C B A, so that a drifting machine drifts for all."""

import functools
from collections.abc import Callable, Iterable
from statistics import median
from time import monotonic
from typing import Any, NamedTuple

from bench.cases import JOBS, Case, Inputs, Job, Loss
from bench.clocks import Clock
from bench.formulas import BASE, gb_per_s, minimal_bytes, ratios, spread
from bench.providers import COMPILED, PROVIDERS, Unavailable

LEAST_ROUNDS, MOST_ROUNDS = 5, 100
COMPILE_SECONDS = 8
"""With less time for a case torch.compile sits it out: compiling would take what the others need."""
SMALL = 2**23
"""Below this many logits the time on the host counts, and a call is too short to be timed once a round."""


class Result(NamedTuple):
    """What was measured, and what was not and why."""

    points: list[dict[str, Any]]
    skipped: list[dict[str, str]]


def attempt(result: Result, case: Case, provider: str, act: Callable[[], Any]) -> Any:
    """Do it; what cannot be done becomes a reason, and the other providers go on."""
    try:
        return act()
    except Exception as error:  # out of memory, a compiler that fails: rivals raise anything
        reason = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
        result.skipped.append({"provider": provider, "case": str(case), "reason": reason[:200]})
        return None


def warm_up(job: Job) -> Job:
    """Compile, fill caches, start threads."""
    for _ in range(3):
        job.prepare()
        job.call()
    return job


def time_once(job: Job, clock: Clock, calls: int) -> float:
    times = []
    for _ in range(calls):
        job.prepare()
        clock.flush()
        times.append(clock.microseconds(job.call))
    return median(times)


def time_in_turns(jobs: dict[str, Job], clock: Clock, calls: int, until: float) -> dict[str, list[float]]:
    """Microseconds by provider and round, for as many rounds as fit in the time, within limits."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and monotonic() > until:
            break
        for name in list(jobs)[:: -1 if number % 2 else 1]:
            times[name].append(time_once(jobs[name], clock, calls))
    return times


def short_calls(logits: int, clock: Clock) -> int:
    """How often a call is timed a round."""
    return min(clock.calls, max(1, 200_000 // logits))


def timing(times: list[float], base: list[float] | None) -> dict[str, Any]:
    """Percentiles in microseconds and, where torch eager was measured in the same rounds, its time over this one's."""
    names = ("p20", "p50", "p80")
    figures: dict[str, Any] = {"rounds": len(times)}
    figures |= {f"{name}_us": round(value, 2) for name, value in zip(names, spread(times), strict=True)}
    if base:
        figures |= {
            f"ratio_{name}": round(value, 4) for name, value in zip(names, spread(ratios(base, times)), strict=True)
        }
    return figures


def rates(case: Case, mode: str, p50_us: float, copy_gb_per_s: float | None) -> dict[str, Any]:
    count = minimal_bytes(mode, case.shape, case.dtype.itemsize, case.operation)
    if count is None:
        return {"bytes": None, "gb_per_s": None, "percent_of_copy": None}
    rate = gb_per_s(count, p50_us)
    percent = round(100 * rate / copy_gb_per_s, 1) if copy_gb_per_s else None
    return {"bytes": count, "gb_per_s": round(rate, 1), "percent_of_copy": percent}


def counts(job: Job, case: Case, mode: str, clock: Clock) -> dict[str, Callable[[], Any]]:
    """How to get at memory, host time and launches, for the modes and shapes where they say something."""
    found: dict[str, Callable[[], Any]] = dict.fromkeys(("peak_bytes", "host_us", "loop_us", "launches"), lambda: None)
    if mode in ("forward", "both"):
        found["peak_bytes"] = lambda: clock.peak_bytes(job)
    if case.logits < SMALL:
        found["host_us"] = lambda: clock.host_microseconds(job)
    if mode == "step":  # prepares nothing, so a loop of calls is a training loop
        found["loop_us"] = lambda: clock.loop_microseconds(job)
    if mode in ("both", "step"):
        found["launches"] = lambda: clock.launches(job)
    return found


def build(case: Case, clock: Clock, result: Result, providers: Iterable[str], seconds: float) -> dict[str, Loss]:
    """The losses of those who can do the case."""

    def build_one(name: str) -> Loss:
        if name == COMPILED and seconds < COMPILE_SECONDS:
            raise Unavailable(f"{seconds:.0f} s are too little time to compile")
        return PROVIDERS[name].build(case, clock.device)

    losses = {name: attempt(result, case, name, functools.partial(build_one, name)) for name in providers}
    return {name: loss for name, loss in losses.items() if loss is not None}


def measure_mode(
    mode: str, losses: dict[str, Loss], inputs: Inputs, clock: Clock, until: float, copy_gb_per_s: float | None
) -> Result:
    """Every provider's point of one mode."""
    case, result, jobs = inputs.case, Result([], []), {}
    for name, loss in losses.items():
        if mode in PROVIDERS[name].modes:
            jobs[name] = attempt(
                result,
                case,
                name,
                lambda name=name, loss=loss: warm_up(JOBS[mode](loss, inputs, PROVIDERS[name].overwrites)),
            )
    jobs = {name: job for name, job in jobs.items() if job}
    times = time_in_turns(jobs, clock, short_calls(case.logits, clock), until)
    for name, job in jobs.items():
        point = {"provider": name, "mode": mode, "dtype": str(case.dtype)[6:], "shape": list(case.shape)}
        point |= {"operation": case.operation, "device": clock.device} | timing(times[name], times.get(BASE))
        point |= rates(case, mode, point["p50_us"], copy_gb_per_s)
        point |= {key: attempt(result, case, name, act) for key, act in counts(job, case, mode, clock).items()}
        result.points.append(point)
    return result


def measure_case(
    case: Case,
    clock: Clock,
    seconds: float,
    copy_gb_per_s: float | None = None,
    providers: Iterable[str] = tuple(PROVIDERS),
    result: Result | None = None,
) -> Result:
    """Every mode and provider of a case in about the time given; its tensors are freed on return.

    `result` is added to mode by mode, for who is interrupted.
    """
    result = result or Result([], [])
    end, inputs = monotonic() + seconds, Inputs(case, clock.device)
    losses = build(case, clock, result, providers, seconds)
    for number, mode in enumerate(case.modes):
        until = monotonic() + (end - monotonic()) / (len(case.modes) - number)
        act = functools.partial(measure_mode, mode, losses, inputs, clock, until, copy_gb_per_s)
        measured = attempt(result, case, f"every provider, {mode}", act)
        if measured:
            result.points.extend(measured.points)
            result.skipped.extend(measured.skipped)
    return result
