"""Time, memory and operations of a call.

Times can be compared because the contestants take turns in random order: a busy machine then disturbs all alike. The
minimum is the time of the code; whatever else the machine does only lengthens it. The median says how busy it was.

What the graph keeps is counted by autograd's own hooks: every distinct storage that is saved, without the input's and
the parameters'. The peak is the allocator's: on CUDA as it reports it, on the CPU from the profiler's record of each
allocation, workspaces of LAPACK among them. The profiler sees one thread, so the peak is that of a run in one.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from wellcond.experiments.run.processes import threads

Call = Callable[[], object]
Function = Callable[[Tensor], Tensor]

# One timing lasts at least this long: a faster call is repeated.
SHORTEST = 2e-3
MOST_REPEATS = 50


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the minimum and the median of that many timings."""

    minimum: float
    median: float
    timings: int


def seconds_of(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds of one of several calls in a row, the device idle before and after."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - begun) / repeats


def take_turns(
    calls: Mapping[str, Call], device: torch.device, *, seconds: float, rounds: tuple[int, int] = (3, 40)
) -> dict[str, Time]:
    """The time of every call, from rounds in which each is timed once, in a new random order.

    Args:
        calls: what to time; each has been called before (compiled, cached, its memory paged in).
        seconds: go on with rounds until this much time is used up.
        rounds: but at least and at most this many.
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


def saved_bytes(f: Function, X: Tensor) -> int:
    """Bytes that the graph of f(X) keeps for its backward pass, besides X and the parameters."""
    X = X.detach().requires_grad_()
    known = {X.untyped_storage().data_ptr()}
    if isinstance(f, nn.Module):
        known |= {p.untyped_storage().data_ptr() for p in f.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is given twice

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = f(X)
    del out
    return sum(kept.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that one call has allocated at once, above what there was before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's own messages; read when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with (
        threads(1),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, now)
    return peak


def count_operations(call: Call) -> int:
    """Floating-point operations of the matrix products in one call."""
    with _Operations() as counter:
        call()
    return counter.total


class _Operations(TorchDispatchMode):
    """Adds up what torch's own registry says of each operation; its counter cannot see ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
