"""What is written behind a result: nobody waits for it but who reads, and the end of the process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

logger = logging.getLogger("mosaic_compiler")

_lock = threading.Lock()
_writer: ThreadPoolExecutor | None = None
_pending: list[Future[None]] = []
_of_writer = threading.local()


def behind(work: Callable[[], None]) -> None:
    """Do something soon, in another thread, one after the other."""
    global _writer
    with _lock:
        _pending[:] = [future for future in _pending if not future.done()]
        try:
            if _writer is None:
                _writer = ThreadPoolExecutor(1, "mosaic-writer")
            _pending.append(_writer.submit(_done, work))
            return
        except RuntimeError:  # the interpreter ends: no thread begins any more
            pass
    _done(work)


def settle() -> None:
    """Wait until all of it is done."""
    if getattr(_of_writer, "writes", False):
        return
    with _lock:
        pending = list(_pending)
    for future in pending:
        future.result()


def _done(work: Callable[[], None]) -> None:
    _of_writer.writes = True
    try:
        work()
    except Exception:  # nobody asked for it: what had a result has it
        logger.warning("mosaic: something could not be kept", exc_info=True)
    finally:
        _of_writer.writes = False


def _forget() -> None:
    """A process that was forked has no threads of its parent's, which does what is pending."""
    global _writer, _lock
    _writer, _lock = None, threading.Lock()
    _pending.clear()


os.register_at_fork(after_in_child=_forget)
