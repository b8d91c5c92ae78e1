"""Tensors of zeros in which only some rows have memory of their own.

The caller of a compiled model gets logits [N, V] with all rows addressable, but only the needed ones were computed.
The others take no memory:

- on the CPU, pages of an anonymous mapping that nobody has written are the kernel's one page of zeros;
- on a GPU, page ranges without needed rows are all mapped to the same physical blocks of zeros.

Writing into rows that are not needed is harmless and undefined: on the CPU the pages get memory, on a GPU other such
rows change with them.
"""

from __future__ import annotations

import functools
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.errors import ArenaError, BudgetError
from mosaic_compiler.kernels.scatter_rows import BLOCK_PAGES, touched_runs
from mosaic_compiler.planning.buffers import align
from mosaic_compiler.runtime.cuda_driver import CudaDriver, Driver, OutOfDeviceMemory, index_of, map_new, tried_twice
from mosaic_compiler.runtime.pools import arena_problem


def page_bytes(device: torch.device) -> int | None:
    """The unit in which rows have memory or not; ``None`` where there is no virtual memory to do it with."""
    if device.type == "cpu":
        return mmap.PAGESIZE
    if device.type == "cuda" and torch.cuda.is_available() and arena_problem(device) is None:
        return _driver_for(index_of(device)).granularity
    return None


def sparse_zeros(
    index: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device, driver: Driver | None = None
) -> Tensor:
    """Zeros of ``shape`` [N, features...], with memory for the rows ``index`` (int64 [M]).

    Raises:
        ArenaError: if there are no addresses left.
        BudgetError: if the device has no memory for the rows.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.zeros(list(shape), dtype=dtype, device=device)
    if device.type == "cpu" and driver is None:
        flat = torch.frombuffer(_untouched(nbytes), dtype=dtype)
        return flat[: math.prod(shape)].view(list(shape))
    if driver is None:
        driver = _driver_for(index_of(device))
    size, runs = align(nbytes, driver.granularity), touched_runs(index, nbytes // shape[0], driver.granularity)
    if (sum(end - first for first, end in runs) + BLOCK_PAGES + 1) * driver.granularity >= size:
        return torch.zeros(list(shape), dtype=dtype, device=device)
    memory = SparseMemory(driver, size, runs)
    return memory.tensor()[:nbytes].view(dtype).view(list(shape))


def _untouched(nbytes: int) -> mmap.mmap:
    """Memory of the host that is zero, and resident only where it is written, page by page."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, align(nbytes, mmap.PAGESIZE), flags=flags)
    except (OSError, ValueError) as error:
        raise ArenaError(f"cannot reserve {nbytes} bytes of addresses for a result: {error}") from None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages does not know the advice
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class SparseMemory:
    """Addresses on a GPU: memory of their own for some runs of pages, shared zeros for all others.

    It lives as long as the tensor over it, and gives everything back then.

    Args:
        size: bytes, a multiple of the driver's granularity.
        runs: pages [first, end) that get memory, in order.
    """

    def __init__(self, driver: Driver, size: int, runs: Sequence[tuple[int, int]]) -> None:
        waiting = _postponed[:]
        del _postponed[: len(waiting)]
        for memory in waiting:
            _give_back(*memory)
        self._driver, self._size, self._runs = driver, size, [*runs]
        self._zeros = _zeros_of(driver)
        self._base = driver.reserve(size)
        self._maps: list[tuple[int, int, Any]] = []  # side by side: address, size, handle to release (None: shared)
        self._finalizer = weakref.finalize(self, _give_back, driver, self._base, size, self._maps, self._zeros)
        self._finalizer.atexit = False  # the process's memory goes with the process
        try:
            self._map_all()
            _or_budget(driver, size, lambda: driver.allow(self._base, size))
        except BaseException:
            self._finalizer()
            raise

    def tensor(self) -> Tensor:
        """uint8 [size], all zeros."""
        whole = self._driver.tensor(self._base, self._size, self)
        zeroed: set[int] = set()
        for address, size, handle in self._maps:
            if handle is not None or size not in zeroed:  # pages of its own, or the first view of a shared block
                whole[address - self._base : address - self._base + size].zero_()
                if handle is None:
                    zeroed.add(size)
        return whole

    def _map_all(self) -> None:
        page, end = self._driver.granularity, self._base
        for first, last in self._runs:
            self._map_zeros(end, self._base + first * page)
            end = self._base + last * page
            self._map_own(self._base + first * page, (last - first) * page)
        self._map_zeros(end, self._base + self._size)

    def _map_own(self, address: int, size: int) -> None:
        self._maps.append((address, size, _or_budget(self._driver, size, lambda: map_new(self._driver, address, size))))

    def _map_zeros(self, start: int, end: int) -> None:
        for handle, size in self._zeros.cover(end - start):
            _or_budget(self._driver, size, functools.partial(self._driver.map, start, size, handle))
            self._maps.append((start, size, None))
            start += size


class _SharedZeros:
    """Two blocks of physical memory that all gaps of all tensors of a device share."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._handles: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _release, driver, self._handles)
        self._finalizer.atexit = False

    def cover(self, size: int) -> Iterator[tuple[Any, int]]:
        """Handles whose sizes add up to ``size``, a multiple of the granularity."""
        page = self._driver.granularity
        block = BLOCK_PAGES * page
        with self._lock:
            if size >= block and block not in self._handles:
                with suppress(OutOfDeviceMemory):  # then single pages have to do
                    self._handles[block] = self._driver.create(block)
            if size >= page and page not in self._handles:
                self._handles[page] = _or_budget(self._driver, page, lambda: self._driver.create(page))
        for unit in (block, page):
            while unit in self._handles and size >= unit:
                yield self._handles[unit], unit
                size -= unit


def _or_budget(driver: Driver, size: int, attempt: Callable[[], Any]) -> Any:
    try:
        return tried_twice(driver, attempt)
    except OutOfDeviceMemory:
        free = driver.available()
        raise BudgetError(
            f"needed rows of a result want {size} bytes more, and the device has {free}: free other tensors, set "
            "a smaller options={'memory_budget': ...}, or use a shorter sequence",
            size,
            free,
            None,
        ) from None


def _give_back(driver: Driver, base: int, size: int, maps: list[tuple[int, int, Any]], zeros: _SharedZeros) -> None:
    """Unmap, release and free, each as far as the driver lets; later, if it cannot be waited for the device now."""
    try:
        if maps:
            driver.synchronize()
    except ArenaError:  # for example while a CUDA graph is captured
        _postponed.append((driver, base, size, maps, zeros))
        return
    if maps:
        with suppress(ArenaError):  # the context may be gone
            driver.unmap(base, sum(nbytes for _, nbytes, _ in maps))
    while maps:
        handle = maps.pop()[2]
        if handle is not None:
            with suppress(ArenaError):
                driver.release(handle)
    with suppress(ArenaError):
        driver.free(base, size)
    del zeros  # the last one to go gives the shared blocks back


def _release(driver: Driver, handles: dict[int, Any]) -> None:
    while handles:
        with suppress(ArenaError):
            driver.release(handles.popitem()[1])


_postponed: list[tuple[Driver, int, int, list[tuple[int, int, Any]], _SharedZeros]] = []
"""Memory of tensors that died while nobody could wait for the device."""

_shared: weakref.WeakKeyDictionary[Driver, weakref.ref[_SharedZeros]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _zeros_of(driver: Driver) -> _SharedZeros:
    with _lock:
        reference = _shared.get(driver)
        zeros = reference() if reference is not None else None
        if zeros is None:
            zeros = _SharedZeros(driver)
            _shared[driver] = weakref.ref(zeros)
        return zeros


@functools.cache
def _driver_for(index: int) -> CudaDriver:
    return CudaDriver(torch.device("cuda", index))
