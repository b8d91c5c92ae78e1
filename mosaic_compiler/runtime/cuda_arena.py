"""``CudaArena``: an address range on a GPU, backed by physical pages only up to the current plan's height.

CUDA's virtual memory management separates addresses from memory.  Addresses are reserved once, as many as the card
has bytes, so programs bound to them stay valid for good; pages are mapped when a plan is higher than the last one and
given back when it is lower (``runtime/cuda_driver.py``).
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from mosaic_compiler.errors import ArenaError, BudgetError
from mosaic_compiler.planning.buffers import align
from mosaic_compiler.runtime.arena import ArenaBytes, next_number
from mosaic_compiler.runtime.cuda_driver import CudaDriver, Driver, OutOfDeviceMemory, map_new, tried_twice


@dataclass(frozen=True)
class _Piece:
    offset: int
    size: int
    handle: Any


class CudaArena(ArenaBytes):
    """An arena on one GPU, for one stream (see :class:`~mosaic_compiler.runtime.arena.Arena`).

    Args:
        device: with an index.
        driver: the device's memory calls; tests give their own.

    Raises:
        ArenaError: if no addresses can be reserved.
    """

    def __init__(self, device: torch.device, driver: Driver | None = None) -> None:
        self.number = next_number()
        self.reserved = 0
        self._driver: Driver = CudaDriver(device) if driver is None else driver
        self._size = align(self._driver.total, self._driver.granularity)
        self._base = self._driver.reserve(self._size)
        self._pieces: list[_Piece] = []
        self._whole: torch.Tensor | None = None
        self._finalizer = weakref.finalize(self, _close, self._driver, self._base, self._size, self._pieces)
        self._finalizer.atexit = False  # the process's memory goes with the process

    @property
    def capacity(self) -> int:
        return self._size

    @property
    def mapped(self) -> int:
        """Bytes of physical memory that the arena holds: less than one granule above ``reserved``."""
        return sum(piece.size for piece in self._pieces)

    @property
    def _bytes(self) -> torch.Tensor:
        if self._whole is None:
            with torch.inference_mode(False):
                self._whole = self._driver.tensor(self._base, self._size)
        return self._whole

    def ensure(self, height: int) -> None:
        target = max(align(height, self._driver.granularity), self._driver.granularity)
        if target > self._size:
            raise ArenaError(
                f"the plan needs {height} bytes of arena, this device has {self._driver.total}: "
                "set a memory_budget, or use shorter sequences or a smaller batch"
            )
        if target < self.mapped:
            self._unmap_above(target)
        if target > self.mapped:
            self._grow(target - self.mapped)
        self.reserved = height

    def release(self) -> None:
        if self._pieces:
            self._unmap_above(0)
        self.reserved = 0

    def close(self) -> None:
        """Give back the memory and the addresses.  The arena is not usable any more."""
        self._whole = None
        self.reserved = 0
        self._finalizer()

    def _grow(self, size: int) -> None:
        """Map ``size`` more bytes.  If the device refuses, it is asked once more when PyTorch has emptied its cache."""
        try:
            tried_twice(self._driver, lambda: self._map(size))
        except OutOfDeviceMemory:
            self.reserved = min(self.reserved, self.mapped)
            needed, free = self.mapped + size, self._driver.available() + self.mapped
            raise BudgetError(
                f"the plan needs an arena of {needed} bytes, and the device has {free} bytes for it: other tensors "
                "or processes hold the rest. Free them, or set options={'memory_budget': ...} to what is left",
                needed,
                free,
                None,
            ) from None

    def _map(self, size: int) -> None:
        offset = self.mapped
        handle = map_new(self._driver, self._base + offset, size)
        try:
            self._driver.allow(self._base + offset, size)
        except BaseException:
            self._driver.unmap(self._base + offset, size)
            self._driver.release(handle)
            raise
        self._pieces.append(_Piece(offset, size, handle))

    def _unmap_above(self, target: int) -> None:
        """Give back all pieces that end above ``target``.  A piece can only be unmapped as a whole; what is below
        the target is mapped again by the caller (between two steps no byte of an arena is needed)."""
        self._driver.synchronize()
        while self._pieces and self._pieces[-1].offset + self._pieces[-1].size > target:
            piece = self._pieces.pop()
            self._driver.unmap(self._base + piece.offset, piece.size)
            self._driver.release(piece.handle)
        self.reserved = min(self.reserved, self.mapped)


def _close(driver: Driver, base: int, size: int, pieces: list[_Piece]) -> None:
    with contextlib.suppress(ArenaError):  # the context may be gone
        if pieces:
            driver.synchronize()
        while pieces:
            piece = pieces.pop()
            driver.unmap(base + piece.offset, piece.size)
            driver.release(piece.handle)
        driver.free(base, size)
