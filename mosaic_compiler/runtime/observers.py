"""Who wants to know of the steps that a thread compiles or runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Observers(threading.local, Generic[T]):
    """Those of the thread that asks; each is told while its ``with`` block lasts.

    Example:
        >>> with observers.told(found.append):
        ...     ...
    """

    def __init__(self) -> None:
        self._observers: list[Callable[[T], None]] = []

    @contextmanager
    def told(self, observe: Callable[[T], None]) -> Iterator[None]:
        """Call ``observe`` with whatever is told inside of the ``with`` block."""
        self._observers.append(observe)
        try:
            yield
        finally:
            self._observers.remove(observe)

    def tell(self, what: T) -> None:
        for observe in self._observers:
            observe(what)
