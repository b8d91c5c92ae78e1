"""Memory of devices: what there is, and what is free."""

from __future__ import annotations

import os

import torch

from mosaic_compiler.errors import OptionsError


def check_machine(budget: int | None, device: torch.device) -> None:
    """Raise :class:`OptionsError` if a device can never have that much memory."""
    total = total_memory(device)
    if budget is not None and total is not None and budget > total:
        raise OptionsError(f"memory_budget of {budget} bytes is more than the {total} bytes that {device} has")


def host_memory() -> int:
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def total_memory(device: torch.device) -> int | None:
    """Bytes that a device has; ``None`` for devices without memory (meta)."""
    if device.type == "cpu":
        return host_memory()
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None


def free_memory(device: torch.device, held: int) -> int | None:
    """Bytes that a step could use now: what is free, and the ``held`` bytes that its arenas have already.

    ``None``: no limit is known.
    """
    if device.type == "cpu":
        available = _available_on_host()
        return None if available is None else available + held
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        share = int(torch.cuda.get_per_process_memory_fraction(device) * total) - allocated
        return max(min(int(free) + torch.cuda.memory_reserved(device) - allocated + held, share), 0)
    return None


def _available_on_host() -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
