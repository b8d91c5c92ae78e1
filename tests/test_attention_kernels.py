"""Which kernel computes attention over needed rows, and what it may allocate.

No GPU is needed: tensors are fake, and the choice looks at shapes only.
"""

from __future__ import annotations

import math
import operator
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mosaic_compiler import ir
from mosaic_compiler.book.scratch import flash_scratch, multiprocessors
from mosaic_compiler.ir import ops
from mosaic_compiler.kernels import attention
from mosaic_compiler.lowering.lifetimes import find_lives
from mosaic_compiler.planning.few import partial_bytes
from mosaic_compiler.planning.flash import split_bytes
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.room import capacity
from mosaic_compiler.runtime.fallbacks import find_fallbacks

aten = torch.ops.aten
CUDNN = aten._scaled_dot_product_cudnn_attention.default
FLASH = aten._scaled_dot_product_flash_attention.default


def attend(*args, heads=8, kv_heads=2, depth=64, depth_of_values=64, keys=500, batch=1, target=CUDNN, **kwargs):
    """A node that attends M queries to ``keys`` keys, and M."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = fx.Graph()
    with mode:
        rows = mode.shape_env.create_unbacked_symint()
        torch._check(rows >= 2)
        shapes = [(batch, rows, heads, depth), (batch, keys, kv_heads, depth), (batch, keys, kv_heads, depth_of_values)]
        nodes = [graph.placeholder(name) for name in "qkv"]
        for node, shape in zip(nodes, shapes, strict=True):
            node.meta["val"] = torch.empty(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        node = graph.call_function(target, (*nodes, *args), kwargs)
    graph.output(graph.call_function(operator.getitem, (node, 0)))
    return node, ir.expr_of(rows)


def chosen(node, rows, count, varying=None, scratch=1 << 40):
    facts = attention.facts_of(node, {rows} if varying is None else varying)
    return attention.kernel_of(facts, node.target, Sizes({rows: count}), scratch)


def test_rows_that_vary_need_no_plan_until_they_are_worth_it():
    node, rows = attend(None, False, keys=1 << 20)
    seen = {count: chosen(node, rows, count) is not CUDNN for count in (1, 7, 64, 255, 256, 1 << 16)}
    assert seen == {1: True, 7: True, 64: True, 255: True, 256: False, 1 << 16: False}  # 4 x 8 x 64 x 2^20 x 256 = 2^39
    assert chosen(node, rows, 7, varying=set()) is CUDNN


def test_what_split_keys_need_must_be_planned():
    node, rows = attend(None, False, keys=4096, kv_heads=8)
    needed = split_bytes(8, 7, 4096, 64, multiprocessors())
    assert needed > 0
    assert chosen(node, rows, 7, scratch=needed - 1) is CUDNN
    assert chosen(node, rows, 7, scratch=needed) is not CUDNN
    assert chosen(node, rows, 4000, scratch=0) is not CUDNN  # enough queries for every multiprocessor


def test_few_queries_of_groups_have_a_kernel_where_its_memory_is_planned():
    node, rows = attend(None, False, keys=4096)
    needed = partial_bytes(2, 4 * 7, 4096, 64, multiprocessors())
    assert needed > 0
    assert chosen(node, rows, 7, scratch=needed).__name__ == "attend"
    assert chosen(node, rows, 7, scratch=needed - 1) is CUDNN
    assert chosen(node, rows, 200, scratch=1 << 40).__name__ == "_flash_like_cudnn"
    node.args[0].meta[ir.BINDS] = rows
    assert Sizes({rows: 32})(flash_scratch(node)) >= needed


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 40_000), st.sampled_from([4, 8, 32]), st.sampled_from([64, 128]))
def test_a_plan_has_what_its_programs_need(count, keys, heads, depth):
    """Whatever the number of rows for which a step picks the program of this plan."""
    node, rows = attend(None, False, keys=keys, heads=heads, kv_heads=heads, depth=depth, depth_of_values=depth)
    node.args[0].meta[ir.BINDS] = rows
    room = capacity(count)
    planned = Sizes({rows: room})(flash_scratch(node))
    assert planned == Sizes({rows: room})(pickle.loads(pickle.dumps(flash_scratch(node))))
    served = [n for n in range(max(room // 2 - 40, 1), room + 1) if capacity(n) <= room <= 2 * capacity(n)]
    assert count in served
    for number in (*served[:: max(len(served) // 25, 1)], served[-1]):
        small = 4 * heads * number * depth * keys < 1 << 39
        assert (chosen(node, rows, number, scratch=planned) is not CUDNN) == small


def test_other_attentions_have_no_such_scratch():
    node, rows = attend(None, False)
    assert flash_scratch(node) == 0  # nothing says that only the data knows how many rows there are
    node, rows = attend(None, False, 0.5)
    node.args[0].meta[ir.BINDS] = rows
    assert flash_scratch(node) == 0


@pytest.mark.parametrize(
    ("args", "kwargs", "sizes"),
    [
        ((None, False, 0.5), {}, {}),
        ((None, False, 0.0, True), {}, {}),
        ((None, False), {}, {"depth": 60}),
        ((None, False), {}, {"depth": 264, "depth_of_values": 264}),
        ((None, False), {}, {"depth_of_values": 32}),
    ],
)
def test_what_flash_attention_cannot_compute_stays(args, kwargs, sizes):
    node, rows = attend(*args, **kwargs, **sizes)
    assert chosen(node, rows, 7) is CUDNN


def test_a_mask_and_a_wanted_sum_stay():
    node, rows = attend(None, True)
    assert chosen(node, rows, 7) is not CUDNN
    with node.graph.inserting_after(node):
        node.graph.call_function(operator.getitem, (node, 1))
    assert chosen(node, rows, 7) is CUDNN
    node, rows = attend(None, False)
    node.update_arg(3, node.args[0])
    assert chosen(node, rows, 7) is CUDNN


def test_other_nodes_keep_their_op():
    graph = fx.Graph()
    node = graph.call_function(aten.neg.default, (graph.placeholder("x"),))
    assert attention.kernel_of(attention.facts_of(node, ()), node.target, Sizes({}), 0) is aten.neg.default


@settings(max_examples=300, deadline=None)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 64),
    rows=st.integers(1, 2000),
    keys=st.integers(1, 100_000),
    depth=st.sampled_from([8, 40, 64, 96, 128, 192, 256]),
)
def test_scratch_of_split_keys(batch, heads, rows, keys, depth):
    """It holds results and sums of the fewest parts that are within 15 % of the best use of the multiprocessors."""
    block = 256 if depth <= 64 else 128 if depth <= 128 else 64
    found = split_bytes(batch * heads, rows, keys, depth, multiprocessors())
    bytes_of_part = 4 * batch * heads * rows * (32 * math.ceil(depth / 32) + 1)
    assert found % bytes_of_part == 0
    parts = found // bytes_of_part
    assert parts <= math.ceil(keys / block)
    groups, processors = batch * heads * math.ceil(rows / 64), 2 * multiprocessors()
    if groups >= processors:
        assert parts == 0
    if groups <= processors // 20 and keys >= 128 * block * 20:
        assert parts * groups >= 0.8 * processors or parts >= 64  # few queries keep the device busy


@pytest.mark.parametrize(("dtype", "depth"), [(torch.bfloat16, 128), (torch.float32, 128), (torch.bfloat16, 80)])
def test_runs_of_keys_that_our_kernel_does_not_take_have_a_name(dtype, depth):
    graph = fx.Graph()
    with FakeTensorMode():
        nodes = [graph.placeholder(name) for name in ("query", "key", "value", "last")]
        for node in nodes[:3]:
            node.meta["val"] = torch.empty((1, 4, 512, depth), device="cuda", dtype=dtype)
        nodes[3].meta["val"] = torch.empty((1, 1, 512, 1), device="cuda", dtype=torch.int64)
        attended = graph.call_function(ops.interval_attention, (*nodes[:3], None, nodes[3], None, None, [0, 1, 2, 3]))
        attended.meta["val"] = torch.empty((1, 4, 512, depth), device="cuda", dtype=dtype)
    graph.output((attended,))
    found = find_fallbacks(find_lives(fx.GraphModule({}, graph)))
    expected = [] if depth == 128 and dtype.itemsize == 2 else ["tiled-attention"]
    assert [fallback.name for fallback in found if fallback.node] == expected
