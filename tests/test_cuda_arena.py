"""``CudaArena`` over a driver that is played by host memory and checks every call; the real one on a GPU."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_compiler.errors import ArenaError, BudgetError
from mosaic_compiler.runtime.cuda_arena import CudaArena
from mosaic_compiler.runtime.cuda_driver import OutOfDeviceMemory

PAGE = 4096


class FakeDriver:
    """Keeps the books of a device with ``total`` bytes: others hold ``taken`` of them, PyTorch caches ``cached``."""

    granularity = PAGE

    def __init__(self, total=64 * PAGE, taken=0, cached=0, broken=()):
        self.total, self.taken, self.cached, self.broken = total, taken, cached, broken
        self.handles, self.maps, self.reserved, self.calls = {}, {}, {}, []
        self.unsynchronized = False

    def reserve(self, size):
        memory = mmap.mmap(-1, size)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.reserved[whole.data_ptr()] = size, memory, whole
        return whole.data_ptr()

    def free(self, address, size):
        assert self.reserved.pop(address)[0] == size
        assert not self.maps

    def create(self, size):
        self.calls.append("create")
        assert size > 0
        assert size % PAGE == 0
        if size > self.available():
            raise OutOfDeviceMemory
        handle = object()
        self.handles[handle] = size
        return handle

    def release(self, handle):
        del self.handles[handle]

    def map(self, address, size, handle):
        if "map" in self.broken:
            raise ArenaError("cuMemMap: broken")
        assert self.handles[handle] == size
        assert all(address >= a + s or a >= address + size for a, s in self.maps.items())
        ((base, (reserved, _, _)),) = self.reserved.items()
        assert base <= address <= address + size <= base + reserved
        self.maps[address] = size

    def allow(self, address, size):
        if "allow" in self.broken:
            raise ArenaError("cuMemSetAccess: broken")
        end = address + size
        while address < end:
            address += self.maps[address]
        assert address == end

    def unmap(self, address, size):
        assert not self.unsynchronized, "pages were unmapped while kernels may use them"
        end = address + size
        while address < end:
            address += self.maps.pop(address)
        assert address == end, "only whole mappings can be unmapped"

    def tensor(self, address, size, owner=None):
        assert address in self.maps, "the first page has to be mapped"
        return self.reserved[address][2][:size]

    def synchronize(self):
        self.unsynchronized = False

    def reclaim(self):
        self.calls.append("reclaim")
        self.cached = 0

    def available(self):
        return self.total - self.taken - self.cached - sum(self.handles.values())


def test_pages_follow_the_height_and_addresses_stay():
    driver = FakeDriver()
    arena = CudaArena(torch.device("cuda", 0), driver)
    arena.ensure(3 * PAGE + 1)
    assert (arena.mapped, arena.reserved) == (4 * PAGE, 3 * PAGE + 1)
    tensor = arena.tensor(PAGE, torch.float32, [8], [1], 2 * PAGE)
    tensor.fill_(3)
    address = tensor.data_ptr()
    for height in (10 * PAGE, 2 * PAGE, 9 * PAGE, 0):
        driver.unsynchronized = True
        arena.ensure(height)
        assert arena.mapped == max(height, PAGE) == sum(driver.maps.values()) == sum(driver.handles.values())
    assert arena.tensor(PAGE, torch.float32, [8], [1], 2 * PAGE).data_ptr() == address
    arena.close()
    assert not driver.reserved
    assert not driver.handles


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 40 * PAGE), st.integers(0, 60 * PAGE), st.booleans()), max_size=12))
def test_random_heights_beside_other_users_of_the_device(steps):
    """Whatever others hold: the plan's pages are mapped, or a BudgetError says what is free, and nothing leaks."""
    driver = FakeDriver()
    arena = CudaArena(torch.device("cuda", 0), driver)
    for height, others, cached in steps:
        held = sum(driver.handles.values())
        others = min(others, driver.total - held)
        driver.taken, driver.cached = (0, others) if cached else (others, 0)
        driver.unsynchronized = True
        wanted = max(-(-height // PAGE), 1) * PAGE
        if not cached and wanted > driver.total - others:
            with pytest.raises(BudgetError) as error:
                arena.ensure(height)
            assert (error.value.needed, error.value.budget) == (wanted, driver.total - others)
            assert arena.reserved <= arena.mapped
        else:
            arena.ensure(height)
            assert wanted - height < PAGE or height == 0
            assert arena.mapped == wanted
        assert sum(driver.handles.values()) == sum(driver.maps.values()) == arena.mapped
    arena.release()
    assert not driver.handles
    assert not driver.maps


def test_a_cache_that_is_in_the_way_is_emptied_once():
    driver = FakeDriver(cached=60 * PAGE)
    arena = CudaArena(torch.device("cuda", 0), driver)
    arena.ensure(20 * PAGE)
    assert driver.calls == ["create", "reclaim", "create"]


def test_a_driver_that_fails_leaves_no_memory_behind():
    driver = FakeDriver(broken=("map",))
    arena = CudaArena(torch.device("cuda", 0), driver)
    with pytest.raises(ArenaError, match="broken"):
        arena.ensure(PAGE)
    assert not driver.handles
    driver.broken = ()
    arena.ensure(PAGE)
    assert arena.mapped == PAGE


def test_more_than_the_device_has_is_refused_with_what_to_do():
    arena = CudaArena(torch.device("cuda", 0), FakeDriver())
    with pytest.raises(ArenaError, match="set a memory_budget"):
        arena.ensure(65 * PAGE)


def test_a_forgotten_arena_gives_everything_back():
    driver = FakeDriver()
    arena = CudaArena(torch.device("cuda", 0), driver)
    arena.ensure(8 * PAGE)
    del arena
    assert not driver.handles
    assert not driver.reserved
