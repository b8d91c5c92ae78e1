"""Environment switches: one family, ``MOSAIC_*``, read once per compilation.

They exist for hunting bugs, so they win over ``options={...}``.  :data:`SWITCHES` is the complete
list; ``docs/environment.md`` documents each one and a test holds the two together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mosaic_compiler.errors import OptionsError

SWITCHES: Mapping[str, str] = MappingProxyType(
    {
        "MOSAIC_CACHE": "folder of compiled steps and kernels (default: ~/.cache/mosaic_compiler), or off",
        "MOSAIC_CACHE_SIZE": "how much that folder may take, e.g. 2GiB (default: 4GiB)",
        "MOSAIC_DEBUG": "0-3: 1 prints one line per compiled graph, 2 also one per pass, 3 also every fallback",
        "MOSAIC_DISABLE": "comma-separated pass names to leave out, e.g. canonicalize,in-place",
        "MOSAIC_DUMP": "folder for numbered runnable graphs per pass and plan.json",
        "MOSAIC_POISON": "1: fill dead buffers with NaN and check canaries between buffers",
        "MOSAIC_STRICT": "1: any named fallback raises FallbackError",
    }
)

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True)
class Settings:
    """The environment switches, parsed.  ``None`` means "not set: the option decides"."""

    cache: str | None = None
    cache_size: str | None = None
    debug: int = 0
    disable: tuple[str, ...] = ()
    dump: str | None = None
    poison: bool | None = None
    strict: bool | None = None


def _flag(environ: Mapping[str, str], name: str) -> bool | None:
    text = environ.get(name)
    if text is None:
        return None
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise OptionsError(f"{name}={text!r} is not a switch: use 1 or 0")


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Parse ``MOSAIC_*`` from ``environ`` (default: the process environment).

    Raises :class:`OptionsError` for a malformed value or an unknown ``MOSAIC_`` name, because a
    misspelt switch that silently does nothing costs hours.
    """
    environ = os.environ if environ is None else environ
    for name in environ:
        if name.startswith("MOSAIC_") and name not in SWITCHES:
            raise OptionsError(f"unknown environment switch {name}; there are {', '.join(SWITCHES)}")
    level = environ.get("MOSAIC_DEBUG", "0") or "0"
    if level not in {"0", "1", "2", "3"}:
        raise OptionsError(f"MOSAIC_DEBUG={level!r} is not a level: use 0, 1, 2 or 3")
    names = (part.strip() for part in environ.get("MOSAIC_DISABLE", "").split(","))
    return Settings(
        cache=environ.get("MOSAIC_CACHE") or None,
        cache_size=environ.get("MOSAIC_CACHE_SIZE") or None,
        debug=int(level),
        disable=tuple(name for name in names if name),
        dump=environ.get("MOSAIC_DUMP") or None,
        poison=_flag(environ, "MOSAIC_POISON"),
        strict=_flag(environ, "MOSAIC_STRICT"),
    )
