"""The host arena: reserved, touched on demand, given back."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest
import torch

from mosaic_compiler.errors import ArenaError, CanaryError
from mosaic_compiler.runtime.arena import HostArena, PlainArena
from mosaic_compiler.runtime.devices import host_memory
from mosaic_compiler.runtime.pools import ArenaPool

MiB = 1 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_reserving_costs_nothing_and_pages_come_and_go():
    before = resident_bytes()
    arena = HostArena()
    assert arena.capacity >= host_memory()
    assert resident_bytes() - before < 2 * MiB
    arena.ensure(200 * MiB)
    tensor = arena.tensor(0, torch.float32, [50 * MiB], [1], 200 * MiB)
    assert resident_bytes() - before < 4 * MiB
    tensor.fill_(1)
    assert resident_bytes() - before > 190 * MiB
    arena.ensure(50 * MiB)  # a smaller plan: the rest goes back
    assert 40 * MiB < resident_bytes() - before < 70 * MiB
    assert float(tensor[0]) == 1.0
    arena.release()
    assert resident_bytes() - before < 8 * MiB
    assert float(tensor[0]) == 0.0  # fresh pages


@pytest.mark.parametrize(("offset", "shape", "limit"), [(0, [11], 40), (8, [9], 40), (-4, [2], 40), (2, [1], 40)])
def test_a_tensor_outside_of_its_buffer_is_refused(offset, shape, limit):
    with pytest.raises(ArenaError, match="outside of the plan"):
        HostArena(1 << 16).tensor(offset, torch.float32, shape, [1], limit)


def test_strides_count():
    arena = HostArena(1 << 16)
    arena.tensor(0, torch.float32, [2, 3], [4, 1], 28)
    with pytest.raises(ArenaError):
        arena.tensor(0, torch.float32, [2, 3], [4, 1], 24)
    assert arena.tensor(0, torch.float32, [0, 3], [3, 1], 0).shape == (0, 3)


@pytest.mark.parametrize("kind", [HostArena, lambda: PlainArena(torch.device("cpu"))])
def test_a_tensor_has_a_storage_of_its_own_bytes(kind):
    arena = kind()
    arena.ensure(4096)
    tensor = arena.tensor(1024, torch.float32, [3, 5], [5, 1], 4096)
    assert (tensor.storage_offset(), tensor.untyped_storage().nbytes()) == (0, 60)
    tensor.fill_(2)
    assert torch.as_strided(tensor, (2,), (5,), 0).tolist() == [2, 2]
    assert arena.find_other(0, 1024, 0) is None or kind is not HostArena
    assert arena.tensor(1024, torch.float32, [15], [1], 4096).tolist() == [2] * 15


def test_a_plan_larger_than_the_machine_says_so():
    arena = HostArena(1 << 20)
    with pytest.raises(ArenaError, match="shorter sequences"):
        arena.ensure((1 << 20) + 4097)


def test_an_address_space_limit_halves_the_reservation():
    import resource
    import subprocess
    import sys

    code = (
        "import resource, torch\n"
        "from mosaic_compiler.runtime.arena import HostArena\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))\n"
        "arena = HostArena(64 << 30)\n"
        "assert (256 << 20) <= arena.capacity <= (1 << 30), arena.capacity\n"
        "arena.tensor(0, torch.float32, [1000], [1], 4000).fill_(1)\n"
    )
    assert resource.RLIM_INFINITY
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nested_leases_get_different_arenas_and_release_spares_those_in_use():
    pool = ArenaPool()
    with pool.lease() as outer:
        outer.ensure(8192)
        outer.fill(0, 8192, 7)
        with pool.lease() as inner:
            assert inner is not outer
        assert pool.release() == 0
        assert outer.find_other(0, 8192, 7) is None
    assert pool.release() == 8192
    with pool.lease() as again:
        assert again is outer


@pytest.mark.parametrize("kind", ["reserved", "plain"])
def test_an_arena_made_under_inference_mode_serves_calls_outside_of_it(kind):
    with torch.inference_mode():
        pool = ArenaPool()
        if kind == "plain":
            pool._arenas.append(PlainArena(torch.device("cpu")))
        with pool.lease() as arena:
            arena.ensure(8192)
    with torch.no_grad():
        arena.fill(0, 8192, 1)
        view = arena.tensor(512, torch.uint8, (16,), (1,), 8192)
        view.add_(1)
    assert view.tolist() == [2] * 16
    assert arena.find_other(0, 512, 1) is None
    pool.release()


def test_poison_mode_finds_a_write_behind_a_buffer():
    """An op that writes one element too many is caught, and the buffer is named."""
    from mosaic_compiler.backend import compile_aten
    from mosaic_compiler.options import MosaicOptions
    from mosaic_compiler.passes import trace

    module = trace(lambda x: (x * 2).exp().sum(-1) * 3, torch.randn(4, 8))
    step = compile_aten(module, MosaicOptions(poison=True, disable=("fuse", "in-place")))
    x = torch.randn(16, 8)
    step([x])
    program = next(iter(step._programs.values())).program
    position, call = next(
        (i, call)
        for i, call in enumerate(program.instructions)
        if getattr(call, "func", None) is torch.ops.aten.exp.out
    )
    victim = call.keywords["out"]

    def overrun() -> None:
        ctypes.memset(victim.data_ptr() + victim.nbytes, 1, 4)

    program.instructions.insert(position + 1, overrun)
    with pytest.raises(CanaryError, match="exp"):
        step([x])


def test_a_user_that_dies_in_another_thread_waits_for_nobody():
    """The garbage collector runs finalizers in whatever thread it is in: one that the holder of the lease waits for."""

    class User:
        pass

    pool, user = ArenaPool(), User()
    pool.register(user)
    with pool.lease() as arena:
        arena.ensure(4096)
    with pool.lease():
        users = [user]
        del user
        worker = threading.Thread(target=users.clear)
        worker.start()
        worker.join(10)
        assert not worker.is_alive()
    assert pool.reserved() == 0  # given back when the lease had ended
