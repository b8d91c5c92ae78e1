"""``CudaArena``: an address range on a GPU, backed by physical pages only up to the current plan's height.

CUDA's virtual memory management separates addresses from memory.  Addresses are reserved once, as many as the card
has bytes, so programs bound to them stay valid for good; pages are mapped when a plan is higher than the last one and
given back when it is lower.  The calls are ``cuMemAddressReserve``, ``cuMemCreate``, ``cuMemMap``, ``cuMemSetAccess``,
``cuMemUnmap``, ``cuMemRelease`` (CUDA driver API, "Virtual Memory Management"), through ``cuda-bindings``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mosaic_compiler.errors import ArenaError, BudgetError
from mosaic_compiler.planning.plan import align
from mosaic_compiler.runtime.arena import ArenaBytes, next_number


class OutOfDeviceMemory(Exception):  # noqa: N818  (it is an answer of the driver, handled here)
    """The device has no memory left for a piece."""


class Driver(Protocol):
    """What an arena needs of the device.  Addresses and sizes in bytes, multiples of ``granularity``."""

    granularity: int
    total: int
    """Memory of the device."""

    def reserve(self, size: int) -> int:
        """Reserve addresses; returns the first."""

    def free(self, address: int, size: int) -> None: ...

    def create(self, size: int) -> Any:
        """A handle to physical memory.  Raises :class:`OutOfDeviceMemory`."""

    def release(self, handle: Any) -> None: ...

    def map(self, address: int, size: int, handle: Any) -> None:
        """Back addresses with memory, readable and writable by the device.  Raises :class:`OutOfDeviceMemory`."""

    def unmap(self, address: int, size: int) -> None: ...

    def tensor(self, address: int, size: int) -> torch.Tensor:
        """uint8 [size] over addresses of which the first are mapped, without a copy."""

    def synchronize(self) -> None:
        """Wait for all work that may still use mapped pages."""

    def reclaim(self) -> None:
        """Ask PyTorch's caching allocator to give back what it holds and does not use."""

    def available(self) -> int:
        """Bytes of memory that are free now."""


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
        self._typed: dict[torch.dtype, torch.Tensor] = {}
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
        self._typed.clear()
        self._whole = None
        self.reserved = 0
        self._finalizer()

    def _grow(self, size: int) -> None:
        """Map ``size`` more bytes.  If the device refuses, it is asked once more when PyTorch has emptied its cache."""
        try:
            self._map(size)
        except OutOfDeviceMemory:
            self._driver.reclaim()
            try:
                self._map(size)
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
        handle = self._driver.create(size)
        try:
            self._driver.map(self._base + offset, size, handle)
        except BaseException:
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


class CudaDriver:
    """The driver API for one device (see :class:`Driver`)."""

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import driver

        self._api: Any = driver
        self._device = device
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        with torch.cuda.device(self._index):
            torch.cuda.synchronize()  # creates the context
        self.total = int(torch.cuda.get_device_properties(self._index).total_memory)
        kind = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = kind
        self._properties.location.id = self._index
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = kind
        self._access.location.id = self._index
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self._call("cuMemGetAllocationGranularity", self._properties, minimum))

    def _call(self, name: str, *args: Any) -> Any:
        with torch.cuda.device(self._index):
            error, *results = getattr(self._api, name)(*args)
        if error == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfDeviceMemory
        if error != self._api.CUresult.CUDA_SUCCESS:
            raise ArenaError(f"{name} on {self._device}: {error.name}")
        return results[0] if results else None

    def reserve(self, size: int) -> int:
        try:
            return int(self._call("cuMemAddressReserve", size, 0, 0, 0))
        except OutOfDeviceMemory:
            raise ArenaError(f"cannot reserve {size} bytes of addresses on {self._device}") from None

    def free(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", address, size)

    def create(self, size: int) -> Any:
        return self._call("cuMemCreate", size, self._properties, 0)

    def release(self, handle: Any) -> None:
        self._call("cuMemRelease", handle)

    def map(self, address: int, size: int, handle: Any) -> None:
        self._call("cuMemMap", address, size, 0, handle, 0)
        try:
            self._call("cuMemSetAccess", address, size, [self._access], 1)
        except BaseException:
            self._call("cuMemUnmap", address, size)
            raise

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", address, size)

    def tensor(self, address: int, size: int) -> torch.Tensor:
        return torch.as_tensor(_Addresses(address, (size,)), device=self._device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def reclaim(self) -> None:
        torch.cuda.synchronize(self._index)
        torch.cuda.empty_cache()

    def available(self) -> int:
        return int(torch.cuda.mem_get_info(self._index)[0])


class _Addresses:
    """Device memory for ``torch.as_tensor`` (the CUDA array interface, version 3)."""

    def __init__(self, address: int, shape: Sequence[int]) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(shape), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


def virtual_memory_problem(device: torch.device) -> str | None:
    """Why a GPU cannot have a :class:`CudaArena`, and what to do; ``None`` if it can."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return "cuda-bindings is not installed: pip install 'mosaic-compiler[cuda]'"
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    index = device.index if device.index is not None else torch.cuda.current_device()
    driver.cuInit(0)
    error, supported = driver.cuDeviceGetAttribute(attribute, index)
    if error != driver.CUresult.CUDA_SUCCESS:
        return f"the driver does not say whether it supports virtual memory management ({error.name})"
    return None if supported else "the device has no virtual memory management"
