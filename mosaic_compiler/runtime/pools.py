"""Arenas of a process: which kind a device gets, one pool per device and stream, taken in turns."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mosaic_compiler.runtime.arena import Arena, HostArena, PlainArena
from mosaic_compiler.runtime.cuda_arena import CudaArena
from mosaic_compiler.runtime.cuda_driver import virtual_memory_problem


def arena_problem(device: torch.device) -> str | None:
    """Why a device has no virtual-memory arena (then one plain allocation is used); ``None`` if it has one."""
    if device.type == "cuda" and torch.cuda.is_available():
        return virtual_memory_problem(device)
    return None if device.type in ("cpu", "cuda") else f"there is no virtual-memory arena for {device.type} devices"


@torch.inference_mode(False)  # calls outside of that mode write to it, too
def new_arena(device: torch.device) -> Arena:
    """Addresses of its own on a device, without memory yet."""
    if device.type == "cpu":
        return HostArena()
    if device.type == "cuda" and arena_problem(device) is None:
        return CudaArena(device)
    return PlainArena(device)


class ArenaPool:
    """The arenas of one device (of one of its streams): one for everybody, and one more per level of re-entrance.

    Threads take turns (a step uses all cores or the whole device anyway).  A compiled function that is
    called from within another one, in the same thread, gets the next arena, because the outer step's
    buffers are still live.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = torch.device("cpu") if device is None else device
        self._lock = threading.RLock()
        self._arenas: list[Arena] = []
        self._depth = 0
        self._users = 0
        self._gone: deque[None] = deque()

    @contextmanager
    def lease(self) -> Iterator[Arena]:
        with self._lock:
            if self._depth == len(self._arenas):
                self._arenas.append(new_arena(self._device))
            arena = self._arenas[self._depth]
            self._depth += 1
            try:
                yield arena
            finally:
                self._depth -= 1
        self._count_the_gone()

    def register(self, user: object) -> None:
        """Keep memory between calls as long as one registered user is alive."""
        with self._lock:
            self._users += 1
        weakref.finalize(user, self._forget)

    def _forget(self) -> None:
        """A user has died.  The garbage collector says so in whatever thread it runs: also in one that whoever holds
        the lock waits for, so nobody may wait for the lock here."""
        self._gone.append(None)
        self._count_the_gone()

    def _count_the_gone(self) -> None:
        """Take in who has died, or leave it to whoever holds the lock."""
        while self._gone and self._lock.acquire(blocking=False):
            try:
                while self._gone:
                    self._gone.popleft()
                    self._users -= 1
                if not self._users:
                    self.release()
            finally:
                self._lock.release()

    def release(self) -> int:
        """Give back the memory of every arena that is not in use; returns the bytes given back."""
        with self._lock:
            idle = self._arenas[self._depth :]
            given = sum(arena.reserved for arena in idle)
            for arena in idle:
                arena.release()
            return given

    def reserved(self) -> int:
        """Bytes of the plans that the arenas hold memory for."""
        return sum(arena.reserved for arena in self._arenas)


_pools: dict[tuple[torch.device, int], ArenaPool] = {}
_pools_lock = threading.Lock()


def pool_for(device: torch.device) -> ArenaPool:
    """The process-wide pool of a device; of a GPU, that of the current stream, because work of two streams overlaps.

    Every compiled graph of every model shares it.
    """
    stream = 0
    if device.type == "cuda" and torch.cuda.is_available():
        stream = int(torch.cuda.current_stream(device).cuda_stream)
    key = (device, stream)
    with _pools_lock:
        pool = _pools.get(key)
        if pool is None:
            pool = _pools[key] = ArenaPool(device)
        return pool


def release_memory() -> int:
    """Give the memory of all idle arenas back to the system; returns the bytes given back.

    Compiled functions stay valid: the next call takes memory again.
    """
    with _pools_lock:
        pools = list(_pools.values())
    return sum(pool.release() for pool in pools)
