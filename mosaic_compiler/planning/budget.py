"""Memory budgets: what people write, what is free, and what to say when it is not enough."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from mosaic_compiler.errors import OptionsError

if TYPE_CHECKING:
    import torch

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)")


def parse_budget(given: Any) -> int | None:
    """``"8GiB"``, ``"500 MB"``, ``8_000_000_000`` -> bytes; ``None`` stays ``None``.

    Raises:
        OptionsError: for anything else, with the accepted forms.
    """
    if given is None:
        return None
    nbytes = 0
    if isinstance(given, int) and not isinstance(given, bool):
        nbytes = given
    elif isinstance(given, str):
        match = _SIZE.fullmatch(given)
        if match is None:
            raise OptionsError(
                f"memory_budget={given!r} is no size: write bytes as a number, or a string such as '8GiB' or '500MB' "
                f"(units: {', '.join(_UNITS)})"
            )
        nbytes = int(float(match[1]) * _UNITS[match[2]])
    else:
        raise OptionsError(f"memory_budget must be bytes, a string such as '8GiB', or None, got {given!r}")
    if nbytes <= 0:
        raise OptionsError(f"memory_budget must be more than 0 bytes, got {given!r}")
    return nbytes


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
        import torch

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
        import torch

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


def format_bytes(nbytes: float) -> str:
    """1536 -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")
