"""What a call allocates on the CPU, as PyTorch's profiler saw it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def most_allocated(call: Callable[[], Any]) -> int:
    """The most bytes that are live at once inside of a call, its result among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    live = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most
