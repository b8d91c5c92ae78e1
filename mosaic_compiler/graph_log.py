"""One line in the log for each compiled function: how many graphs it is, and what is not as one would want it.

Where Dynamo cuts a function, it compiles the first part, runs it, and compiles the rest when it gets there, under a
name that says what it is the rest of.  So the line is written when a graph of the function is compiled that ends
without a cut (or, where nothing is left to compile behind the last cut, when the process ends).
"""

from __future__ import annotations

import atexit
import logging
import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mosaic_compiler.compat.dynamo import RESUMED, code_of_frame, graph_breaks, wrapped_in_frame
from mosaic_compiler.planning.plan import Fallback

logger = logging.getLogger("mosaic_compiler")

NAMED = ("all-rows", "undeclared-alias", "undeclared-layout", "data-dependent-size")
"""Fallbacks that are worth a line."""


@dataclass
class _Function:
    """A function that is being compiled, graph by graph."""

    name: str
    graphs: int = 0
    breaks: list[str] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)

    def line(self) -> str:
        parts = [f"{self.graphs} graph" + "s" * (self.graphs != 1)]
        reasons = list(dict.fromkeys(self.breaks))
        for name in NAMED:
            found = [fallback for fallback in self.fallbacks if fallback.name == name]
            if found:
                parts.append(f"{len(found)} with {name.replace('-', ' ')}")
                reasons += dict.fromkeys(fallback.reason for fallback in found)
        text = f"mosaic: {self.name}: {', '.join(parts)}"
        return f"{text}, because {'; '.join(reasons)}" if reasons else text


class _Open(threading.local):
    """Functions that this thread has compiled parts of, and how many of Dynamo's graph breaks have been told."""

    def __init__(self) -> None:
        self.functions: list[_Function] = []
        self.told = 0
        _all.append(self.functions)


_all: list[list[_Function]] = []
_open = _Open()


def compiled(fallbacks: Sequence[Fallback], given: str = "") -> tuple[str, ...]:
    """Dynamo has just compiled a graph in this thread, with these fallbacks.

    Args:
        given: what the function is called, where Dynamo has no part in it: it is one graph then.

    Returns:
        Why it ends where it does, if Dynamo has cut the function there.
    """
    if given:
        _write(_Function(given, 1, [], list(fallbacks)))
        return ()
    code = code_of_frame()
    found, _open.told = _breaks_since(_open.told, code)
    name = _name_of(code, wrapped_in_frame())
    rest = code is not None and code.co_name.startswith(RESUMED)
    function = next((f for f in reversed(_open.functions) if rest and f.name == name), None)
    if function is None:
        function = _Function(name)
        _open.functions.append(function)
    function.graphs += 1
    function.breaks += found
    function.fallbacks += fallbacks
    if not found:
        _open.functions.remove(function)
        _write(function)
    return tuple(found)


def _write(function: _Function) -> None:
    is_plain = function.graphs == 1 and not any(fallback.name in NAMED for fallback in function.fallbacks)
    logger.log(logging.INFO if is_plain else logging.WARNING, "%s", function.line())


@atexit.register
def _write_what_is_open() -> None:
    for function in [function for functions in _all for function in functions]:
        _write(function)


def _breaks_since(told: int, code: types.CodeType | None) -> tuple[list[str], int]:
    """Reasons of the graph breaks of a function behind the first ``told`` (others may be of functions that other
    backends compiled), and how many there are now."""
    reasons = graph_breaks()
    if told > len(reasons):  # they were reset
        told = 0
    found = [
        _in_a_line(reason)
        for reason in reasons[told:]
        if code is not None and reason.user_stack and reason.user_stack[0].filename == code.co_filename
    ]
    return found, len(reasons)


def _in_a_line(found: object) -> str:
    """``a graph break at model.py:12: Attempted to call function marked as skipped``."""
    stack = getattr(found, "user_stack", None) or []
    where = f" at {'/'.join(stack[-1].filename.split('/')[-2:])}:{stack[-1].lineno}" if stack else ""
    first = str(getattr(found, "reason", "")).strip().splitlines() or [""]
    return f"a graph break{where}: {first[0][:160]}"


def _name_of(code: types.CodeType | None, wrapped: Any = None) -> str:
    """``forward (remote/model.py)``; the rest of a function that was cut is called like the function.

    Args:
        code: of the frame that is compiled.
        wrapped: what that frame calls, if it is none of the user's.
    """
    if wrapped is not None:
        method = getattr(wrapped, "forward", wrapped)
        code = getattr(method, "__code__", None)
        if code is None:
            return str(getattr(wrapped, "__name__", type(wrapped).__name__))
    if code is None:
        return "a function"
    name = code.co_name
    if name.startswith(RESUMED):  # ..._at_LINE, of a function that began in front of it
        name = name.removeprefix(RESUMED).rpartition("_at_")[0]
    return f"{name} ({'/'.join(code.co_filename.split('/')[-2:])})"
