"""The arena: one reserved address range per device, backed by memory only where a plan needs it.

``HostArena`` reserves addresses with an anonymous no-reserve ``mmap``; pages come when they are first
written and go back with ``madvise``.  ``CudaArena`` (``runtime/cuda_arena.py``) does the same on a GPU.  Because the
base address never moves, programs bound to it stay valid while the arena grows and shrinks.
"""

from __future__ import annotations

import itertools
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from mosaic_compiler.compat.tensors import storage_over
from mosaic_compiler.errors import ArenaError
from mosaic_compiler.planning.buffers import align
from mosaic_compiler.runtime.devices import host_memory

_numbers = itertools.count()


def next_number() -> int:
    """Tells arenas apart: programs are bound to one of them."""
    return next(_numbers)


class Arena(Protocol):
    """What a program needs of an arena.  All offsets and sizes are in bytes."""

    number: int
    moves: bool
    """It gets other addresses when it grows, so a program can be bound to it only behind :meth:`ensure`."""
    reserved: int
    """Bytes that the current plan may touch: its height."""

    @property
    def capacity(self) -> int:
        """The most bytes that :meth:`tensor` can address."""

    @property
    def addresses(self) -> tuple[int, int]:
        """Of its first byte, and behind its last one."""

    def ensure(self, height: int) -> None:
        """Make [0, height) usable and give back what lies above.  Raises :class:`ArenaError`."""

    def tensor(
        self, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], limit: int
    ) -> torch.Tensor:
        """A zero-copy tensor over the arena, with a storage of just its own bytes, in which it begins at 0.

        Raises :class:`ArenaError` if it ends above ``limit``.
        """

    def fill(self, start: int, end: int, byte: int) -> None: ...

    def find_other(self, start: int, end: int, byte: int) -> int | None:
        """Offset of the first byte in [start, end) that is not ``byte``."""

    def release(self) -> None:
        """Give all memory back; the address range stays reserved."""


class ArenaBytes(ABC):
    """What every arena does with the bytes it has: tensors over them, and poison."""

    moves = False

    @property
    @abstractmethod
    def _bytes(self) -> torch.Tensor:
        """uint8 [capacity]."""

    @property
    def capacity(self) -> int:
        return self._bytes.numel()

    @property
    def addresses(self) -> tuple[int, int]:
        start = self._bytes.data_ptr()
        return start, start + self.capacity

    def tensor(
        self, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], limit: int
    ) -> torch.Tensor:
        nbytes = check_bounds(offset, dtype, shape, stride, min(limit, self.capacity))
        if not nbytes:
            return torch.empty_strided(list(shape), list(stride), dtype=dtype, device=self._bytes.device)
        made = torch.empty(0, dtype=dtype, device=self._bytes.device)
        return made.set_(self._storage(offset, nbytes), 0, list(shape), list(stride))

    def _storage(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """A storage over these bytes only: an op that copies, saves or indexes the storage of a value sees that value
        and not the arena.  It does not keep the arena alive; programs do."""
        address = self._bytes.data_ptr() + offset
        return storage_over(address, nbytes, self._bytes.device)

    def fill(self, start: int, end: int, byte: int) -> None:
        self._bytes[start:end] = byte

    def find_other(self, start: int, end: int, byte: int) -> int | None:
        wrong = (self._bytes[start:end] != byte).nonzero()
        return start + int(wrong[0]) if len(wrong) else None


class HostArena(ArenaBytes):
    """An arena in host memory (see :class:`Arena`).

    Args:
        capacity: address range in bytes; the default is the machine's memory, which is also the most
            a plan can ever get.

    Raises:
        ArenaError: if not even a small address range can be reserved.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.number = next_number()
        _, self._memory = _reserve(capacity or host_memory())
        self.reserved = 0
        self._touched = 0
        self._whole = torch.frombuffer(self._memory, dtype=torch.uint8)

    @property
    def _bytes(self) -> torch.Tensor:
        return self._whole

    def _storage(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        part = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=offset)  # keeps the mapping alive
        return part.untyped_storage()

    def ensure(self, height: int) -> None:
        if height > self.capacity:
            raise ArenaError(
                f"the plan needs {height} bytes of arena, this machine has {self.capacity}: "
                "use shorter sequences or a smaller batch"
            )
        if height < self._touched:
            self._give_back(height)
        self.reserved = height
        self._touched = max(self._touched, height)

    def fill(self, start: int, end: int, byte: int) -> None:
        super().fill(start, end, byte)
        self._touched = max(self._touched, end)

    def release(self) -> None:
        self._give_back(0)
        self.reserved = 0

    def _give_back(self, height: int) -> None:
        start = -(-height // mmap.PAGESIZE) * mmap.PAGESIZE
        length = min(-(-self._touched // mmap.PAGESIZE) * mmap.PAGESIZE, self.capacity) - start
        if length > 0:
            self._memory.madvise(mmap.MADV_DONTNEED, start, length)
        self._touched = min(self._touched, height)


def _reserve(capacity: int) -> tuple[int, mmap.mmap]:
    """Reserve addresses; an address-space limit (``ulimit -v``) is met by halving the request."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    size = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
    while size >= mmap.PAGESIZE:
        try:
            return size, mmap.mmap(-1, size, flags=flags)
        except (OSError, ValueError):
            size = size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    raise ArenaError(f"cannot reserve {capacity} bytes of address space: raise the limit (ulimit -v)")


class PlainArena(ArenaBytes):
    """An arena that is one ordinary allocation on a device (see :class:`Arena`).

    For devices without virtual memory management.  It moves when it has to grow, and gets another number then,
    so that programs bound to the old memory are not found any more.  ``explain()`` names it as the fallback
    ``plain-arena``.
    """

    moves = True

    def __init__(self, device: torch.device) -> None:
        self.number = next_number()
        self.device = device
        self.reserved = 0
        self._whole = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def _bytes(self) -> torch.Tensor:
        return self._whole

    @torch.inference_mode(False)
    def ensure(self, height: int) -> None:
        if height > self.capacity:
            self._whole = torch.empty(0, dtype=torch.uint8, device=self.device)  # first give back, then take
            self.number = next_number()
            self.reserved = 0
            try:
                self._whole = torch.empty(align(height), dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError as error:
                raise ArenaError(f"the plan needs {height} bytes on {self.device}: {error}") from None
        self.reserved = height

    @torch.inference_mode(False)
    def release(self) -> None:
        """Give all memory back.  The next plan gets a fresh allocation under another number."""
        self._whole = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.number = next_number()
        self.reserved = 0


def check_bounds(offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], limit: int) -> int:
    """The bytes from a tensor's first to its last element.

    Raises:
        ArenaError: if it would start misaligned or end above ``limit`` bytes.
    """
    elements = 1 + sum((s - 1) * t for s, t in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    nbytes = elements * dtype.itemsize
    end = offset + nbytes
    if offset < 0 or end > limit or offset % dtype.itemsize:
        raise ArenaError(f"a tensor of {list(shape)} {dtype} at {offset} ends at {end}, outside of the plan's {limit}")
    return nbytes
