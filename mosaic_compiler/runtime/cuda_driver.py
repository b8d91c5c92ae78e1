"""CUDA's virtual memory management: addresses are reserved, physical memory is created, and mapped to them.

The calls are ``cuMemAddressReserve``, ``cuMemCreate``, ``cuMemMap``, ``cuMemSetAccess``, ``cuMemUnmap``,
``cuMemRelease`` (CUDA driver API, "Virtual Memory Management"), through ``cuda-bindings``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from mosaic_compiler.errors import ArenaError


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
        """Back addresses with memory.  Raises :class:`OutOfDeviceMemory`."""

    def allow(self, address: int, size: int) -> None:
        """Let the device read and write addresses, all of which are mapped.  Raises :class:`OutOfDeviceMemory`."""

    def unmap(self, address: int, size: int) -> None:
        """Undo one mapping, or several that lie side by side."""

    def tensor(self, address: int, size: int, owner: object = None) -> torch.Tensor:
        """uint8 [size] over addresses of which the first are mapped, without a copy.  ``owner`` lives as long."""

    def synchronize(self) -> None:
        """Wait for all work that may still use mapped pages.  Raises :class:`ArenaError` if that is impossible now."""

    def reclaim(self) -> None:
        """Ask PyTorch's caching allocator to give back what it holds and does not use."""

    def available(self) -> int:
        """Bytes of memory that are free now."""


def index_of(device: torch.device) -> int:
    """Its number; of ``cuda`` without one that of the current device."""
    return device.index if device.index is not None else torch.cuda.current_device()


def map_new(driver: Driver, address: int, size: int) -> Any:
    """A handle to new memory, mapped to addresses.  Raises :class:`OutOfDeviceMemory`, and keeps nothing then."""
    handle = driver.create(size)
    try:
        driver.map(address, size, handle)
    except BaseException:
        driver.release(handle)
        raise
    return handle


def tried_twice(driver: Driver, attempt: Callable[[], Any]) -> Any:
    """``attempt()``; if the device has no memory, once more when PyTorch has emptied its cache."""
    try:
        return attempt()
    except OutOfDeviceMemory:
        driver.reclaim()
        return attempt()


class CudaDriver:
    """The driver API for one device (see :class:`Driver`)."""

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import driver

        self._api: Any = driver
        self._device = device
        self._index = index_of(device)
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
        if torch.cuda.current_device() == self._index:  # thousands of calls map one sparse result
            error, *results = getattr(self._api, name)(*args)
        else:
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

    def allow(self, address: int, size: int) -> None:
        self._call("cuMemSetAccess", address, size, [self._access], 1)

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", address, size)

    def tensor(self, address: int, size: int, owner: object = None) -> torch.Tensor:
        return torch.as_tensor(_Addresses(address, (size,), owner), device=self._device)

    def synchronize(self) -> None:
        try:
            torch.cuda.synchronize(self._index)
        except RuntimeError as error:  # a graph is being captured, or the device is lost
            raise ArenaError(f"cannot wait for {self._device}: {error}") from error

    def reclaim(self) -> None:
        torch.cuda.synchronize(self._index)
        torch.cuda.empty_cache()

    def available(self) -> int:
        return int(torch.cuda.mem_get_info(self._index)[0])


class _Addresses:
    """Device memory for ``torch.as_tensor`` (the CUDA array interface, version 3)."""

    def __init__(self, address: int, shape: Sequence[int], owner: object) -> None:
        self._owner = owner
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
    index = index_of(device)
    driver.cuInit(0)
    error, supported = driver.cuDeviceGetAttribute(attribute, index)
    if error != driver.CUresult.CUDA_SUCCESS:
        return f"the driver does not say whether it supports virtual memory management ({error.name})"
    return None if supported else "the device has no virtual memory management"
