"""What a user waits for: a line on the terminal that says what is done and how far it is, once it takes a second.

>>> with doing("compiling the model"):
...     for number, name in enumerate(names):
...         now(f"pass {name}", number, len(names))

Nothing is shown where stderr is no terminal.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

AFTER = 1.0
"""Seconds before anything is said."""

_PERIOD = 0.2
_ERASE = "\r\033[K"


class _Line(threading.Thread):
    """Writes a line while something takes long."""

    def __init__(self, stream: TextIO, what: str) -> None:
        super().__init__(name="mosaic-waiting", daemon=True)
        self._stream, self._since = stream, time.monotonic()
        self._what, self._step = what, ""
        self._ended = threading.Event()
        self._is_shown = False

    def says(self, what: str | None = None, step: str = "") -> None:
        """What is done now."""
        self._what, self._step = what or self._what, step

    def run(self) -> None:
        while not self._ended.wait(_PERIOD):
            seconds = time.monotonic() - self._since
            if seconds >= AFTER:
                self._is_shown = True
                step = f": {self._step}" if self._step else ""
                self._write(f"{_ERASE}mosaic: {self._what}{step} ({seconds:.0f} s)")

    def end(self) -> None:
        """The line disappears."""
        self._ended.set()
        self.join()
        if self._is_shown:
            self._write(_ERASE)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone
            self._ended.set()


_lock = threading.Lock()
_line: _Line | None = None


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Inside of the ``with`` block, this is done; inside of another one, it is a part of that."""
    global _line
    with _lock:
        is_first = _line is None and sys.stderr is not None and sys.stderr.isatty()
        if is_first:
            _line = _Line(sys.stderr, what)
            _line.start()
    line = _line
    if line is not None and not is_first:
        line.says(what)
    try:
        yield
    finally:
        if is_first:
            assert line is not None
            with _lock:
                _line = None
            line.end()


def now(step: str, done: int | None = None, of: int | None = None) -> None:
    """A part of what is done begins, for example number ``done`` (from 0) ``of`` so many."""
    line = _line
    if line is not None:
        line.says(step=step if of is None else f"{step}, {(done or 0) + 1} of {of}")


@contextmanager
def without_collections() -> Iterator[None]:
    """Graphs are many objects that stay: the garbage collector would look at all of them again and again (a tenth of
    the time of a compilation), and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _setting_aside:
            gc.freeze()  # what was compiled stays
        if enabled:
            gc.enable()


_setting_aside: list[None] = []
"""One for each :func:`old_objects_set_aside` that is entered."""


@contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Inside, the garbage collector looks at new objects only.  A process with compiled models has a million others,
    and to look at all of them takes it most of a second, in the middle of some step.  Whoever has set objects aside
    himself (``gc.freeze``) has it his way."""
    if not _setting_aside and gc.get_freeze_count():
        yield
        return
    _setting_aside.append(None)
    gc.freeze()
    try:
        yield
    finally:
        _setting_aside.pop()
        if not _setting_aside:
            gc.unfreeze()
