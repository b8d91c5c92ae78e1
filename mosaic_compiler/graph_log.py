"""One line in the log for each compiled function: how many graphs it is, and what is not as one would want it.

Where Dynamo cuts a function, it compiles the first part, runs it, and compiles the rest when it gets there.  So the
graph behind a cut belongs to the same function, and the line is written when a graph is compiled that ends without
one (or, where nothing is left to compile behind the last cut, when the process ends).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import re
import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """What this thread is compiling, and how many of Dynamo's graph breaks have been told."""

    def __init__(self) -> None:
        self.function: _Function | None = None
        self.told = 0


_open = _Open()


def compiled(fallbacks: Sequence[Fallback]) -> None:
    """Dynamo has just compiled a graph in this thread, with these fallbacks."""
    code = _code_of_frame()
    found, _open.told = _breaks_since(_open.told, code)
    function = _open.function
    if function is None:
        function = _Function(_name_of(code))
    function.graphs += 1
    function.breaks += found
    function.fallbacks += fallbacks
    _open.function = function if found else None
    if not found:
        _write(function)


def _write(function: _Function) -> None:
    is_plain = function.graphs == 1 and not any(fallback.name in NAMED for fallback in function.fallbacks)
    logger.log(logging.INFO if is_plain else logging.WARNING, "%s", function.line())


@atexit.register
def _write_what_is_open() -> None:
    if _open.function is not None:
        _write(_open.function)


def _breaks_since(told: int, code: types.CodeType | None) -> tuple[list[str], int]:
    """Reasons of the graph breaks of a function behind the first ``told`` (others may be of functions that other
    backends compiled), and how many there are now."""
    from torch._dynamo.utils import graph_break_reasons

    if told > len(graph_break_reasons):  # they were reset
        told = 0
    found = [
        _in_a_line(reason)
        for reason in graph_break_reasons[told:]
        if code is not None and reason.user_stack and reason.user_stack[0].filename == code.co_filename
    ]
    return found, len(graph_break_reasons)


def _in_a_line(found: object) -> str:
    """``a graph break at model.py:12: Attempted to call function marked as skipped``."""
    stack = getattr(found, "user_stack", None) or []
    where = f" at {'/'.join(stack[-1].filename.split('/')[-2:])}:{stack[-1].lineno}" if stack else ""
    first = str(getattr(found, "reason", "")).strip().splitlines() or [""]
    return f"a graph break{where}: {first[0][:160]}"


def _code_of_frame() -> types.CodeType | None:
    """The function that Dynamo traces."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    with contextlib.suppress(AttributeError, LookupError):  # not called by Dynamo
        code: types.CodeType = InstructionTranslator.current_tx().f_code
        return code
    return None


def _name_of(code: types.CodeType | None) -> str:
    """``forward (model.py:12)``; the rest of a function that was cut is called like the function."""
    if code is None:
        return "a function"
    name = re.sub(r"^torch_dynamo_resume_in_(.*)_at_\d+$", r"\1", code.co_name)
    return f"{name} ({'/'.join(code.co_filename.split('/')[-2:])}:{code.co_firstlineno})"
