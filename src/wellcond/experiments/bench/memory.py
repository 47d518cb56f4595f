"""Memory of one forward and backward: what the graph keeps in between, and the most that was allocated at once.

What is kept is counted by autograd's own hooks: every distinct storage that is saved, without the input's and the
parameters'. The peak is the allocator's: on CUDA as it reports it, on the CPU from the profiler's record of each
allocation, workspaces of LAPACK among them. The profiler sees one thread, so the peak is that of a run in one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


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
        _one_thread(),
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


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
