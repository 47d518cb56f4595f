"""Time, memory and floating-point operations of a call.

Contestants are timed in turns and in random order, so that load on the machine affects all of them equally. The
minimum estimates the time of the code itself, as interference only adds to it; the median shows how busy the machine
was.

Memory saved for backward is counted with autograd's saved-tensor hooks, as the distinct storages other than the input's
and the parameters'. Peak memory is reported by the allocator on CUDA; on the CPU it is computed from the profiler's
allocation events, including LAPACK workspaces. The profiler follows a single thread, so this call runs with one.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from wellcond.experiments.run.processes import threads

Call = Callable[[], object]
Function = Callable[[Tensor], Tensor]

# Calls faster than this many seconds are repeated within one timing.
MIN_SECONDS = 2e-3
MAX_REPEATS = 50
# What PyTorch warns of in torch.cuda.set_sync_debug_mode("warn").
SYNCHRONISED = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Time:
    """Seconds per call: minimum and median of the timings."""

    minimum: float
    median: float
    timings: int


def seconds_of(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds per call over ``repeats`` consecutive calls: on CUDA between two events, else by the clock."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def host_waits(call: Call, device: torch.device) -> int | None:
    """How often one call makes the host wait for the device, as CUDA's debug mode for that sees it; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(SYNCHRONISED in str(warning.message) for warning in seen)


def take_turns(
    calls: Mapping[str, Call], device: torch.device, *, seconds: float, rounds: tuple[int, int] = (3, 40)
) -> dict[str, Time]:
    """Time all calls in rounds, each call once per round in a new random order.

    Args:
        calls: what to time, already warmed up.
        seconds: start new rounds until this time has passed.
        rounds: the minimum and maximum number of rounds.
    """
    generator = random.Random(0)
    repeats = {}
    for name, call in calls.items():
        once = seconds_of(call, device)
        repeats[name] = max(1, min(MAX_REPEATS, math.ceil(MIN_SECONDS / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() >= deadline:
            break
        for name in generator.sample(list(calls), len(calls)):
            times[name].append(seconds_of(calls[name], device, repeats[name]))
    return {name: Time(min(t), statistics.median(t), len(t)) for name, t in times.items()}


def saved_bytes(f: Function, X: Tensor) -> int:
    """Bytes that the graph of f(X) saves for backward, excluding X and the parameters."""
    X = X.detach().requires_grad_()
    known = {X.untyped_storage().data_ptr()}
    if isinstance(f, nn.Module):
        known |= {p.untyped_storage().data_ptr() for p in f.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is reused

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
    """Peak bytes allocated during one call, above the level before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Silences the profiler; read at its first use.
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
    """Sums PyTorch's registered FLOP formulas; unlike ``FlopCounterMode`` it sees ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
