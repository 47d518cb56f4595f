"""Times that can be compared: the contestants take turns in random order, so that a busy machine disturbs all alike.

The least time is that of the code; whatever else the machine does only lengthens it. The median says how busy it was.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# One timing lasts at least this long: a faster call is repeated.
SHORTEST = 2e-3
MOST_REPEATS = 50


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the least and the median of so many timings."""

    least: float
    median: float
    timings: int


def seconds_of(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds of one of so many calls in a row; on CUDA by events, which the device itself sets."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


def take_turns(
    calls: Mapping[str, Call], device: torch.device, *, seconds: float, rounds: tuple[int, int] = (3, 40)
) -> dict[str, Time]:
    """The time of every call, from rounds in which each is timed once, in an order drawn anew.

    Args:
        calls: what to time; each has been called before (compiled, cached, its memory paged in).
        device: where they run.
        seconds: go on with rounds until this much time is used up.
        rounds: but at least and at most so many.
    """
    order = random.Random(0)
    repeats = {}
    for name, call in calls.items():
        once = seconds_of(call, device)
        repeats[name] = max(1, min(MOST_REPEATS, math.ceil(SHORTEST / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() >= until:
            break
        for name in order.sample(list(calls), len(calls)):
            times[name].append(seconds_of(calls[name], device, repeats[name]))
    return {name: Time(min(t), statistics.median(t), len(t)) for name, t in times.items()}
