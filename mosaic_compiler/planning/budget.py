"""Memory budgets: what people write, and how bytes are said."""

from __future__ import annotations

import re
from typing import Any

from mosaic_compiler.errors import OptionsError

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


def format_bytes(nbytes: float) -> str:
    """1536 -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")
