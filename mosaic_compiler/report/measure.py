"""Measuring what a call really allocates, so that a plan can be compared with reality.

CPU: the profiler's allocation events of PyTorch's CPU allocator, plus the arenas' memory (which that
allocator never sees).  CUDA: the caching allocator's own high-water mark, plus the arenas.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mosaic_compiler.runtime.pools import pool_for


@dataclass(frozen=True)
class Measurement:
    """One measured call.

    Attributes:
        result: what the function returned.
        seconds: wall time of an undisturbed call (without the allocation profiler).
        allocator_peak: most bytes that PyTorch's allocator held at once, above the level at the start.
        arena: bytes of the arena that the call's plan used (0 for eager).
    """

    result: Any
    seconds: float
    allocator_peak: int
    arena: int

    @property
    def peak(self) -> int:
        """Peak activation bytes: allocator and arena together."""
        return self.allocator_peak + self.arena


def measure(function: Callable[[], Any], *, repeats: int = 3, device: str = "cpu") -> Measurement:
    """Call ``function`` ``repeats`` times for the (median) time and once more for its peak.

    The arena is emptied first, so its bytes are this call's own.
    """
    target = torch.device(device)
    pool = pool_for(target)
    pool.release()
    function()  # warm up: compile, bind, touch pages
    times = []
    for _ in range(repeats):
        _synchronise(target)
        started = time.perf_counter()
        function()
        _synchronise(target)
        times.append(time.perf_counter() - started)
    result, allocator_peak = _cuda_peak(function) if target.type == "cuda" else _cpu_peak(function)
    return Measurement(result, sorted(times)[len(times) // 2], allocator_peak, pool.reserved())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cuda_peak(function: Callable[[], Any]) -> tuple[Any, int]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def _cpu_peak(function: Callable[[], Any]) -> tuple[Any, int]:
    """Replay the profiler's allocation events: +bytes and -bytes in order of time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = function()
    kineto = profiler.profiler.kineto_results
    events = [e for e in kineto.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return result, peak
