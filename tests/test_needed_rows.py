"""Drop-in mode: a compiled model whose caller reads some rows of the logits only."""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import remote_models
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_models import DreamLike, LLaDALike
from test_cuda_arena import FakeDriver

from mosaic_compiler.backend import compile_aten, observing
from mosaic_compiler.errors import ArenaError, BudgetError, FallbackError, OptionsError
from mosaic_compiler.kernels.scatter_rows import BLOCK_PAGES, count_pages, touched_runs
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import run_passes, trace
from mosaic_compiler.passes.base import Machine
from mosaic_compiler.passes.pipeline import passes_of
from mosaic_compiler.recipes import LOOPS
from mosaic_compiler.runtime.sparse import SparseMemory, sparse_zeros

MASK, VOCABULARY, WIDTH = 3, 1200, 8
PAGE = mmap.PAGESIZE


def needed(ids, rows):
    """bool [B, N]: written from the options' documentation, position by position."""
    batch, length = ids.shape
    result = torch.zeros(batch, length, dtype=torch.bool)
    for b in range(batch):
        for n in range(length):
            if rows == "masked":
                result[b, n] = ids[b, n] == MASK
            else:
                following = n + 1 < length and ids[b, n + 1] == MASK
                result[b, n] = following or (n == 0 and ids[b, 0] == MASK)
    return result


# -------------------------------------------------------------------------------------- the passes
def toy(ids, table, mix, head):
    """Logits [B, N, V], and hidden states [B, N, D] of which every row is wanted."""
    x = torch.nn.functional.embedding(ids, table)
    x = x + torch.softmax(x @ x.transpose(1, 2), -1) @ x
    x = torch.relu(x @ mix) + x
    return x @ head, x


def toy_arguments(batch, length, share, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 50, (batch, length), generator=generator)
    ids[torch.rand(batch, length, generator=generator) < share] = MASK
    made = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((60, 8), (8, 8), (8, VOCABULARY))]
    return ids, *made


@settings(max_examples=examples(6, 40))
@given(
    batch=st.integers(1, 3), length=st.integers(2, 40), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    rows=st.sampled_from(["masked", "before_masked"]), chunk=st.sampled_from([None, 1, 7]), seed=st.integers(0, 9999),
)  # fmt: skip
def test_needed_rows_are_equal_and_the_others_zero(batch, length, share, rows, chunk, seed):
    graph = trace(toy, *toy_arguments(3, 11, 0.5, 0), dynamic=[(0, 1)])
    options = MosaicOptions(needed_rows=rows, mask_token_id=MASK, chunk_rows=chunk, poison=True)
    step = compile_aten(graph, options)
    arguments = toy_arguments(max(batch, 2), length, share, seed)
    expected, hidden = toy(*arguments)
    wanted = needed(arguments[0], rows)
    sizes = [*arguments[0].shape]
    symbols = [n for n in step.module.graph.find_nodes(op="placeholder") if not isinstance(n.meta["val"], torch.Tensor)]
    assert not symbols
    for _ in range(2):
        logits, states = step([*arguments])
        assert list(logits.shape[:2]) == sizes
        assert logits.stride() == expected.stride()
        assert torch.equal(states, hidden) or torch.allclose(states, hidden, rtol=0, atol=1e-11)
        assert torch.allclose(logits[wanted], expected[wanted], rtol=0, atol=1e-11)
        assert not logits[~wanted].any()
    assert len(step.planner.symbols) >= 4  # batch, length, rows, pages
    result = next(b for b in step.plan.buffers if b.kind == "output" and b.shape[-1] == VOCABULARY)
    assert result.nbytes >= count_pages(wanted.flatten().nonzero()[:, 0], VOCABULARY * 8, PAGE) * PAGE


def bare(ids, table, mix, head):
    """Logits of ids [..., N]: the gather of needed rows lies in the loop of the head."""
    x = torch.nn.functional.embedding(ids, table)
    x = x + torch.softmax(x @ x.transpose(-1, -2), -1) @ x
    return torch.nn.functional.layer_norm(x, (8,)) @ head


@settings(max_examples=examples(8, 40))
@given(
    lead=st.sampled_from([(), (1,), (2,)]), chunk=st.sampled_from([None, 1, 4]),
    calls=st.lists(st.tuples(st.sampled_from([24, 40]), st.integers(0, 24), st.booleans()), min_size=3, max_size=6),
)  # fmt: skip
@pytest.mark.slow
def test_one_step_follows_the_number_of_rows_up_and_down(lead, chunk, calls):
    _, *weights = toy_arguments(1, 2, 0, 3)
    example = torch.full((*lead, 11), 5)
    example[..., :3] = MASK
    graph = trace(bare, example, *weights, dynamic=[tuple(range(len(lead) + 1)) if lead == (2,) else (len(lead),)])
    step = compile_aten(graph, MosaicOptions(needed_rows="masked", mask_token_id=MASK, chunk_rows=chunk, poison=True))
    for length, masked, scattered in calls:
        ids = torch.full((*lead, length), 5)
        rows = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(masked))[:masked]
        ids.view(-1)[rows if scattered else slice(0, masked)] = MASK
        expected = torch.where((ids == MASK)[..., None], bare(ids, *weights), 0.0)
        torch.testing.assert_close(step([ids, *weights])[0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rows", ["masked", "before_masked"])
def test_every_pass_keeps_the_needed_rows(rows):
    graph = trace(toy, *toy_arguments(3, 11, 0.5, 0), dynamic=[(0, 1)])
    arguments = toy_arguments(2, 9, 0.4, 1)
    expected, hidden = toy(*arguments)
    wanted = needed(arguments[0], rows)
    seen = []

    def observe(module, record):
        logits, states = module(*arguments)
        torch.testing.assert_close(states, hidden)
        torch.testing.assert_close(logits, torch.where(wanted[..., None], expected, 0.0))
        seen.append(record.name)

    options = MosaicOptions(needed_rows=rows, mask_token_id=MASK)
    run_passes(graph, passes=passes_of(LOOPS, options, Machine(PAGE)), observe=observe)
    assert seen[0] == "needed-rows"
    assert "scatter-results" in seen


def test_a_selection_from_zeros_is_what_was_scattered():
    """The rewrite follows from the graph: whoever writes ``where(mask, logits, 0)`` gets the same."""

    def selected(ids, table, mix, head):
        return torch.where((ids == MASK).unsqueeze(-1), toy(ids, table, mix, head)[0], 0.0)

    step = compile_aten(trace(selected, *toy_arguments(3, 11, 0.5, 0), dynamic=[(0, 1)]), MosaicOptions())
    arguments = toy_arguments(2, 30, 0.2, 2)
    torch.testing.assert_close(step([*arguments])[0], selected(*arguments))
    (output,) = [b for b in step.plan.buffers if b.kind == "output"]
    assert output.nbytes < 2 * 30 * VOCABULARY * 8
    assert not [b for b in step.plan.buffers if b.kind == "arena" and b.shape[-1:] == (VOCABULARY,) and 60 in b.shape]


def test_other_values_in_the_place_of_zeros_are_kept():
    def selected(ids, table, mix, head):
        logits = toy(ids, table, mix, head)[0]
        masked = (ids == MASK).unsqueeze(-1)
        return torch.where(masked, logits, 1.0), torch.where(~masked, 0.0, logits), torch.where(masked, 0.0, logits)

    step = compile_aten(trace(selected, *toy_arguments(3, 11, 0.5, 0), dynamic=[(0, 1)]), MosaicOptions())
    arguments = toy_arguments(2, 30, 0.2, 2)
    for got, expected in zip(step([*arguments]), selected(*arguments), strict=True):
        torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------------------ models and loops
def llada_loop(model, ids, steps):
    """LLaDA's own loop at temperature 0, one block: full logits, as its users have it."""
    ids = ids.clone()
    for step in range(steps):
        masked = ids == MASK
        logits = model(ids).logits
        token = logits.argmax(-1)
        confidence = torch.softmax(logits.double(), -1).gather(-1, token[..., None])[..., 0]
        confidence = torch.where(masked, confidence, -torch.inf)
        token = torch.where(masked, token, ids)
        for b in range(ids.shape[0]):
            count = int(masked[b].sum()) // (steps - step)
            chosen = confidence[b].topk(count)[1]
            ids[b, chosen] = token[b, chosen]
    return ids


def dream_loop(model, ids, steps):
    """Dream's: logits shifted by one, rows picked by the mask, the surest are taken."""
    ids = ids.clone()
    for step in range(steps):
        masked = ids == MASK
        logits = model(ids, "full").logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)[masked]
        confidence, token = torch.softmax(logits, -1).max(-1)
        chosen = confidence.topk(int(masked.sum()) // (steps - step))[1]
        where = masked.nonzero()[chosen]
        ids[where[:, 0], where[:, 1]] = token[chosen]
    return ids


def passage(batch=2, length=40, blank=24):
    ids = torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(7))
    ids[:, length - blank :] = MASK
    ids[0, 0] = MASK
    return ids


@pytest.mark.parametrize(
    ("make", "loop", "rows"), [(LLaDALike, llada_loop, "masked"), (DreamLike, dream_loop, "before_masked")]
)
def test_loops_of_their_own_give_the_same_tokens(make, loop, rows, monkeypatch):
    monkeypatch.setattr(remote_models, "print", lambda *words: None, raising=False)  # it would break the graph
    model, ids = make(seed=5), passage()
    compiled = torch.compile(
        model, backend="mosaic", dynamic=True, options={"needed_rows": rows, "mask_token_id": MASK}
    )
    quiet = {logging.Logger.info, logging.Logger.debug, logging.Logger.warning}
    steps = []
    unlogged = torch._dynamo.config.patch(ignore_logging_functions=quiet)
    with torch.no_grad(), observing(steps.append), unlogged:
        assert torch.equal(loop(compiled, ids, 6), loop(model, ids, 6))
    assert any(d.rows == "M" for s in steps for d in s.module.meta["row_decisions"])
    assert not [f for s in steps for f in s.fallbacks if f.name == "all-rows"]


@pytest.mark.slow
def test_resident_memory_of_the_logits(tiny_llada, genesis):
    """3,000 tokens, 32 of them masked, V = 8,192: 94 MiB of logits, of which 1 MiB is there."""
    ids = genesis[:, :3000].clone()
    ids[:, 100:132] = tiny_llada.config.mask_token_id
    options = {"needed_rows": "masked", "mask_token_id": tiny_llada.config.mask_token_id}
    compiled = torch.compile(tiny_llada, backend="mosaic", dynamic=True, options=options)
    steps = []
    with torch.no_grad(), observing(steps.append):
        logits = compiled(ids).logits
        expected = tiny_llada(ids).logits
    masked = ids == tiny_llada.config.mask_token_id
    assert logits.shape == expected.shape
    assert torch.equal(logits.argmax(-1)[masked], expected.argmax(-1)[masked])
    resident = resident_bytes(logits)
    planned = next(b.nbytes for b in steps[0].plan.buffers if b.kind == "output")
    assert 32 * 8192 * 4 <= resident <= planned <= 1.1 * resident + 32 * PAGE
    assert resident < expected.numel() * 4 / 80
    assert float(logits[~masked].abs().max()) == 0.0  # reading does not make it resident
    assert resident_bytes(logits) == resident


def resident_bytes(tensor):
    """Bytes of the tensor's mapping that have pages, as the kernel tells."""
    start = tensor.data_ptr()
    with open("/proc/self/smaps") as lines:
        inside = False
        for line in lines:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(part, 16) for part in head.split("-"))
                inside = low <= start < high
            elif inside and line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")


class Odd(torch.nn.Module):
    """A model with something that makes it hard to tell its ids or its logits."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.table, self.mix = torch.nn.Embedding(60, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 64 if kind == "positions" else 60, bias=False)
        self.positions = torch.nn.Embedding(64, 8)
        self.register_buffer("numbers", torch.arange(64)[None])
        self.eval().requires_grad_(False)

    def forward(self, ids, other):
        x = self.table(ids)
        if self.kind == "positions":
            x = self.positions(self.numbers[:, : ids.shape[1]].expand(ids.shape)) + x
        x = x + torch.softmax(x @ x.transpose(1, 2), -1) @ x
        if self.kind == "two inputs":
            x = x + self.table(other).mean(1, keepdim=True)
        more = {
            "every second": lambda: self.mix(x[:, ::2]),
            "shorter": lambda: self.head(x[:, 4:-3]),
            "selected": lambda: self.mix(x)[ids == MASK],
            "joined": lambda: self.head(torch.cat([x[:, :4], x[:, 1:]], 1)),
        }
        return self.head(x), more[self.kind]() if self.kind in more else None


@pytest.mark.parametrize("kind", ["plain", "positions", "two inputs", "every second", "shorter", "selected", "joined"])
def test_odd_models_compile_and_are_right(kind):
    model, ids = Odd(kind), passage(2, 24, 10) % 60
    options = {"needed_rows": "masked", "mask_token_id": MASK}
    steps = []
    compiled = torch.compile(model, backend="mosaic", dynamic=True, options=options)
    with torch.no_grad(), observing(steps.append):
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            logits, more = compiled(ids, ids.flip(1))
        expected, more_expected = model(ids, ids.flip(1))
    masked = ids == MASK
    torch.testing.assert_close(logits[masked], expected[masked], rtol=1e-4, atol=1e-4)
    if more is not None:
        torch.testing.assert_close(more, more_expected, rtol=1e-4, atol=1e-4)
    named = any(f.name == "all-rows" for step in steps for f in step.fallbacks)
    assert named == (kind == "two inputs")
    assert named or not logits[~masked].any()


@pytest.mark.parametrize("dynamic", [None, False])
def test_static_sizes(dynamic):
    model, ids = Odd("plain"), passage(2, 24, 10) % 60
    compiled = torch.compile(
        model, backend="mosaic", dynamic=dynamic, options={"needed_rows": "masked", "mask_token_id": MASK}
    )
    with torch.no_grad():
        for length in (24, 20, 24):
            part = ids[:, -length:]
            expected = torch.where((part == MASK)[..., None], model(part, part)[0], 0.0)
            torch.testing.assert_close(compiled(part, part)[0], expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- pages
@settings(max_examples=20)
@given(st.integers(1, 400), st.floats(0, 1), st.integers(4096, 20_000))
def test_plans_ahead_are_not_below_scattered_rows(total, share, row_bytes):
    def scattered(v, m):
        return torch.where(m[:, None], v @ v.new_ones(8, row_bytes // 8), 0.0)

    given = torch.randn(9, 8, dtype=torch.float64), torch.arange(9) % 2 == 0
    step = compile_aten(trace(scattered, *given, dynamic=[(0,), (0,)]), MosaicOptions())
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(total))[: round(total * share)]
    planned = step.outline.plan_for(total, share).plan
    touched = count_pages(rows, row_bytes // 8 * 8, PAGE) * PAGE
    assert next(b.nbytes for b in planned.buffers if b.kind == "output") >= touched


@given(
    st.lists(st.integers(0, 200), max_size=40), st.integers(1, 20_000), st.sampled_from([64, 4096, 2 << 20])
)  # fmt: skip
def test_pages_of_rows_byte_by_byte(index, row_bytes, page):
    touched = {p for row in index for p in range(row * row_bytes // page, ((row + 1) * row_bytes - 1) // page + 1)}
    rows = torch.tensor(index, dtype=torch.int64)
    assert count_pages(rows, row_bytes, page) == len(touched)
    runs = touched_runs(rows, row_bytes, page)
    assert [p for first, end in runs for p in range(first, end)] == sorted(touched)
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(runs))


class AliasingDriver(FakeDriver):
    """Physical memory is a file in memory, so that one piece of it can stand at many addresses, as on a GPU."""

    granularity = PAGE

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.spans = {}

    def create(self, size):
        super().create(size)
        handle = os.memfd_create("physical")
        os.ftruncate(handle, size)
        os.pwrite(handle, os.urandom(size), 0)  # fresh memory holds anything
        self.handles[handle] = self.handles.pop(next(h for h in self.handles if not isinstance(h, int)))
        return handle

    def release(self, handle):
        super().release(handle)
        os.close(handle)

    def reserve(self, size):
        self.spans[address := super().reserve(size)] = size
        return address

    def free(self, address, size):
        assert not [a for a in self.maps if address <= a < address + size]
        del self.spans[address]
        self.reserved.pop(address)

    def map(self, address, size, handle):
        if "map" in self.broken:
            raise BudgetError("broken", 0, 0, None)
        assert self.handles[handle] == size
        assert any(base <= address and address + size <= base + span for base, span in self.spans.items())
        assert all(address >= a + s or a >= address + size for a, s in self.maps.items())
        shared_fixed = mmap.MAP_SHARED | 0x10
        assert self.libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, shared_fixed, handle, 0) == address
        self.maps[address] = size

    def unmap(self, address, size):
        super().unmap(address, size)
        private_fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        assert self.libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, private_fixed, -1, 0) == address

    def tensor(self, address, size, owner=None):
        class Memory:
            def __init__(self):
                self.owner = owner
                self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}

        return torch.from_numpy(np.asarray(Memory()))


@settings(max_examples=8)
@given(
    total=st.integers(1, 90), features=st.integers(1, 3000), data=st.data(),
)  # fmt: skip
def test_shared_pages_hold_zeros_and_needed_rows_their_own(total, features, data):
    chosen = data.draw(st.lists(st.integers(0, total - 1), unique=True, max_size=8))
    index = torch.tensor(sorted(chosen), dtype=torch.int64)
    driver = AliasingDriver(total=1 << 30)
    rows = torch.randn(len(chosen), features)
    expected = torch.zeros(total, features).index_copy_(0, index, rows)
    cuda = torch.device("cpu")  # the driver says where
    results = [sparse_zeros(index, [total, features], torch.float32, cuda, driver) for _ in range(2)]
    for result in results:
        result.index_copy_(0, index, rows)
    for result in results:
        assert torch.equal(result, expected)
    own = count_pages(index, features * 4, PAGE) * PAGE
    held = sum(driver.handles.values())
    assert held <= 2 * own + (BLOCK_PAGES + 1) * PAGE
    results[0][:] = 7.0  # an unneeded row is anybody's
    assert torch.equal(results[1][index], rows)
    fresh = sparse_zeros(index, [total, features], torch.float32, cuda, driver)
    assert not fresh.any()
    del results, result, fresh
    gc.collect()
    assert not driver.maps
    assert not driver.spans
    assert not driver.handles


@pytest.mark.slow
def test_a_full_device_says_so_and_keeps_nothing():
    driver = AliasingDriver(total=40 * PAGE, taken=10 * PAGE, cached=20 * PAGE)
    runs = [(0, 10), (20, 30)]
    memory = SparseMemory(driver, 64 * PAGE, runs)  # 20 pages and 1 of zeros: PyTorch's cache has to go
    assert driver.calls.count("reclaim") >= 1
    tensor = memory.tensor()
    del memory
    with pytest.raises(BudgetError, match="free other tensors"):
        SparseMemory(driver, 64 * PAGE, runs)
    gc.collect()
    assert len(driver.spans) == 1
    assert not tensor.any()
    del tensor
    gc.collect()
    assert not driver.handles
    assert not driver.maps
    assert not driver.spans
    driver.broken = ("map",)
    with pytest.raises(BudgetError, match="broken"):
        SparseMemory(driver, 64 * PAGE, runs)
    gc.collect()
    assert not driver.handles
    assert not driver.spans


def test_memory_that_cannot_be_waited_for_is_given_back_later():
    """A tensor dies while a CUDA graph is captured: its memory goes with the next result."""
    driver = AliasingDriver(total=1 << 30)
    tensor = SparseMemory(driver, 64 * PAGE, [(0, 2)]).tensor()
    synchronize, driver.synchronize = driver.synchronize, lambda: (_ for _ in ()).throw(ArenaError("capturing"))
    del tensor
    gc.collect()
    assert len(driver.spans) == 1
    driver.synchronize = synchronize
    tensor = SparseMemory(driver, 64 * PAGE, [(0, 2)]).tensor()
    assert len(driver.spans) == 1
    del tensor
    gc.collect()
    assert not driver.spans
    assert not driver.handles


def test_threads_share_one_set_of_zeros():
    driver = AliasingDriver(total=1 << 30)
    create = driver.create
    driver.create = lambda size: time.sleep(0.02) or create(size)
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(lambda _: SparseMemory(driver, 64 * PAGE, []).tensor(), range(3)))
    assert sorted(driver.handles.values()) == [PAGE, BLOCK_PAGES * PAGE]
    del made
    gc.collect()
    assert not driver.handles


# ------------------------------------------------------------------------------------- bad input
def test_options_are_checked():
    for options, message in (
        ({"needed_rows": "mask"}, "did you mean 'masked'"),
        ({"needed_rows": "masked"}, "mask_token_id"),
        ({"needed_rows": "masked", "mask_token_id": -1}, "a token id"),
        ({"needed_rows": "masked", "mask_token_id": True}, "a token id"),
    ):
        with pytest.raises(OptionsError, match=message):
            MosaicOptions.parse(options)


def test_a_graph_without_logits_is_named():
    def hidden(ids, table, mix, head):
        return toy(ids, table, mix, head)[1]

    graph = trace(hidden, *toy_arguments(3, 11, 0.5, 0), dynamic=[(0, 1)])
    step = compile_aten(graph, MosaicOptions(needed_rows="masked", mask_token_id=MASK))
    assert [f.name for f in step.fallbacks] == ["all-rows"]
    arguments = toy_arguments(2, 9, 0.4, 1)
    torch.testing.assert_close(step([*arguments])[0], hidden(*arguments))
    with pytest.raises(FallbackError, match="all-rows"):
        compile_aten(graph, MosaicOptions(needed_rows="masked", mask_token_id=MASK, strict=True))


def test_without_virtual_memory_zeros_take_memory_and_it_is_said(monkeypatch):
    for place in ("backend", "runtime.fallbacks"):
        monkeypatch.setattr(f"mosaic_compiler.{place}.page_bytes", lambda device: None)
    graph = trace(toy, *toy_arguments(3, 11, 0.5, 0), dynamic=[(0, 1)])
    step = compile_aten(graph, MosaicOptions(needed_rows="masked", mask_token_id=MASK))
    arguments = toy_arguments(2, 9, 0.4, 1)
    logits, _ = step([*arguments])
    wanted = needed(arguments[0], "masked")
    torch.testing.assert_close(logits, torch.where(wanted[..., None], toy(*arguments)[0], 0.0))
    assert [f.name for f in step.fallbacks] == ["dense-logits"]
    assert max(b.nbytes for b in step.plan.buffers if b.kind == "output") == logits.numel() * 8
