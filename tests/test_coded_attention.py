"""Attention of codes: against float64, in tiles and in Triton's interpreter; what it allocates; where it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from allocations import most_allocated
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import rounded
from test_state import traced
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_models import Toy

from mosaic_compiler.backend import _kinds_of
from mosaic_compiler.ir import ops
from mosaic_compiler.kernels import coded_attention
from mosaic_compiler.kernels.coded_attention import attend_codes_, scratch_bytes
from mosaic_compiler.kernels.interval_attention import reference
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import trace
from mosaic_compiler.planning.flash import FewBytes

CODED = ("fp8", "int8", "int4")
MOST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}


def encoded(value, precision):
    """Codes and scales of [.., d], written independently of the passes."""
    scale = value.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) * (1 / MOST[precision])
    numbers = value.float() / scale
    if precision == "fp8":
        return numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scale
    if precision == "int8":
        return numbers.round().to(torch.int8), scale
    half = value.shape[-1] // 2
    first, second = (part.round().to(torch.int64) + 8 for part in (numbers[..., :half], numbers[..., half:]))
    return (second * 16 + first).to(torch.uint8), scale


@settings(max_examples=examples(60, 400))
@given(
    precision=st.sampled_from(CODED), batch=st.integers(1, 2), groups=st.integers(1, 3), share=st.integers(1, 3),
    queries=st.integers(1, 9), keys=st.integers(1, 40), depth=st.sampled_from([2, 6, 16]), by_head=st.booleans(),
    bounds=st.tuples(st.booleans(), st.booleans(), st.booleans()), tile=st.sampled_from([1, 7, 1024]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=st.integers(0, 999),
)  # fmt: skip
def test_tiles_equal_float64(
    precision, batch, groups, share, queries, keys, depth, by_head, bounds, tile, dtype, seed
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query = random(batch, groups * share, queries, depth)
    key, value = random(batch, groups, keys, depth), random(batch, groups, keys, depth + 2)
    own = [random(batch, groups, queries, size) for size in (depth, depth + 2)]
    count = groups if by_head else 1
    rows = torch.randint(0, keys, (batch, count, queries), generator=generator).sort(-1).values
    again = rows[..., 1:] == rows[..., :-1]
    for at in range(1, queries):  # of a row that comes twice, numbers are the same
        for part in own:
            part[:, :, at] = torch.where(again[..., at - 1].unsqueeze(-1), part[:, :, at - 1], part[:, :, at])
    first = torch.randint(-2, keys, (1, 1, queries, 1), generator=generator) if bounds[0] else None
    last = torch.randint(0, keys + 3, (batch, 1, queries, 1), generator=generator) if bounds[1] else None
    only = torch.rand(1, 1, 1, keys, generator=generator) < 0.6 if bounds[2] else None
    exact = []
    for part, new in zip((key, value), own, strict=True):
        index = rows.expand(-1, groups, -1).unsqueeze(-1).expand_as(new)
        exact.append(rounded(part.float(), precision).double().scatter(2, index, new.double()))
    codes = [piece for part in (key, value) for piece in encoded(part, precision)]
    out = torch.empty(batch, groups * share, queries, depth + 2, dtype=dtype)
    with mock.patch.object(coded_attention, "TILE", tile):
        got = attend_codes_(out, query, *codes, *own, rows, first, last, only, 0.4, precision)
    expected = reference(query.double(), *exact, first, last, only, 0.4)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("queries", [8, 300])
@pytest.mark.parametrize("precision", CODED)
def test_scratch_covers_what_is_allocated(precision, queries):
    depth = 16
    codes = [piece for _ in range(2) for piece in encoded(torch.randn(1, 2, 3000, depth), precision)]
    own = [torch.randn(1, 2, queries, depth) for _ in range(2)]
    rows, first = torch.arange(queries)[None, None], torch.full((1, 1, queries, 1), 9)
    operands = (torch.randn(1, 8, queries, depth), *codes, *own, rows, first)

    def attend(*operands):
        *given, first = operands
        return ops.coded_attention(*given, first, None, None, None, precision, [0, 1, 2, 3])

    node = next(
        node
        for node in trace(attend, *operands, dynamic=[()] * len(operands)).graph.nodes
        if node.target is ops.coded_attention
    )
    most = most_allocated(lambda: attend(*operands))
    bound = int(scratch_bytes(node)) + 8 * queries * depth * 4
    assert most <= bound < 4 * most


@pytest.mark.parametrize(
    ("kv_heads", "window", "keep"),
    [
        (2, None, None),
        pytest.param(2, None, 0.5, marks=pytest.mark.slow),
        *(
            pytest.param(*case, keep, marks=pytest.mark.slow)
            for case in ((1, None), (4, None), (1, 3), (2, 3), (4, 3))
            for keep in (None, 0.5)
        ),
    ],
)
def test_steps_read_codes_and_nothing_of_all_keys_in_full_width(kv_heads, window, keep):
    toy = Toy(layers=2, kv_heads=kv_heads, window=window)
    weights = toy.weights(0)
    kinds = _kinds_of(traced(toy, 2, weights), MosaicOptions(cache_dtype="int4", cache_keep=keep, disable=("fuse",)))
    targets = [node.target for node in next(iter(kinds.reuse.graphs.values())).graph.nodes]
    assert targets.count(ops.coded_attention) == 2
    assert not any("bitwise_right_shift" in str(target) for target in targets)  # nothing is decoded


def test_fewer_rows_take_no_more_than_is_planned():
    """A program serves fewer rows as well, for which keys are cut into more pieces."""
    from mosaic_compiler.planning.few import partial_bytes
    from mosaic_compiler.planning.room import least_served

    for rows, keys, share, bits in ((32, 61_440, 1, 4), (40, 3000, 7, 8), (600, 700, 1, 4)):
        room = int(FewBytes(8, rows, keys, 128, 132, share, bits))
        for count in range(least_served(rows), rows + 1):
            assert partial_bytes(8, share * count, keys, 128, 132, bits) <= room


CODES = """
import itertools, torch
from test_coded_attention import encoded, rounded
from mosaic_compiler.kernels.coded_attention import attend_codes_
from mosaic_compiler.kernels.interval_attention import reference
from mosaic_compiler.planning.few import pieces

torch.manual_seed(0)
seen = set()
shapes = [(1, 1, 2, 5, 1300, 16), (2, 2, 1, 7, 300, 32), (1, 2, 3, 33, 64, 16)]
for (entries, groups, share, queries, keys, depth), (precision, bits) in itertools.product(
    shapes, (("int4", 4), ("int8", 8), ("fp8", 8))
):
    query = torch.randn(entries, queries, groups * share, depth).transpose(1, 2)
    key, value = torch.randn(2, entries, groups, keys, depth)
    value[:, :, 3] = 0.0
    own = torch.randn(2, entries, groups, queries, depth)
    own[:, :, :, -1] = own[:, :, :, -2]
    rows = torch.randperm(keys)[:queries].sort().values
    rows[-1] = rows[-2]
    rows = rows.expand(entries, 1, -1).contiguous()
    codes = [piece for part in (key, value) for piece in encoded(part, precision)]
    index = rows.expand(-1, groups, -1).unsqueeze(-1).expand_as(own[0])
    exact = [rounded(part, precision).double().scatter(2, index, new.double()) for part, new in zip((key, value), own)]
    for bounded in (False, True):
        first = torch.randint(-9, keys // 2, (1, 1, queries, 1)) if bounded else None
        last = torch.randint(keys // 3, keys + 5, (entries, 1, queries, 1)) if bounded else None
        only = torch.rand(entries, 1, 1, keys) < 0.5 if bounded else None
        got = attend_codes_(torch.empty_like(query), query, *codes, *own, rows, first, last, only, 0.3, precision)
        expected = reference(query.double(), *exact, first, last, only, 0.3)
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)
    seen.add(pieces(entries * groups, share * queries, keys, 132, bits))
assert len(seen) > 1, seen
"""

CHOSEN = """
import itertools, torch
from mosaic_compiler.kernels.key_selection import _probabilities, _Seen, _with_kernels

torch.manual_seed(0)
for (entries, groups, share, queries, keys, depth), bounded in itertools.product(
    [(1, 1, 2, 5, 1300, 16), (2, 2, 1, 7, 130, 16), (1, 2, 3, 33, 500, 32)], (False, True)
):
    query = torch.randn(entries, queries, groups * share, depth).transpose(1, 2)
    key = torch.randn(entries, keys, groups, depth).transpose(1, 2)
    first = torch.randint(-9, keys // 2, (1, 1, queries, 1)) if bounded else None
    last = torch.randint(keys // 3, keys + 5, (entries, 1, queries, 1)) if bounded else None
    only = torch.rand(entries, 1, 1, keys) < 0.5 if bounded else None
    got = _with_kernels(query, key, first, last, only, 0.3) * 0.6931471805599453
    packed = (query * 0.3).reshape(entries, groups, share, queries, depth)
    expected = _probabilities(packed, key, _Seen(first, last, only, share), groups)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [CODES, CHOSEN])
def test_kernels_equal_float64(program):
    """In a process of its own, because Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root,
        env={"TRITON_INTERPRET": "1", "PATH": "", "PYTHONPATH": f"{root}:{root / 'tests'}"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("dtype", "depth", "precision", "says"),
    [
        (torch.bfloat16, 64, "int4", None),
        (torch.float32, 64, "int8", "not float32 and 64"),
        (torch.bfloat16, 48, "fp8", "not bfloat16 and 48"),
        (torch.bfloat16, 16, "int4", "int4 from 32 on"),
    ],
)
def test_what_the_kernel_does_not_take_on_a_gpu_is_named(dtype, depth, precision, says, monkeypatch):
    monkeypatch.setattr("mosaic_compiler.kernels.few_queries.has_triton", lambda: True)
    with FakeTensorMode():
        query, own = (torch.empty(1, heads, 8, depth, dtype=dtype, device="cuda") for heads in (4, 2))
        codes = torch.empty(1, 2, 3000, depth // (2 if precision == "int4" else 1), dtype=torch.uint8, device="cuda")
        scale = torch.empty(1, 2, 3000, 1, device="cuda")
        rows = torch.empty(1, 1, 8, dtype=torch.int64, device="cuda")
        graph = torch.fx.Graph()
        operands = [query, codes, scale, codes, scale, own, own, rows]
        nodes = [graph.placeholder(f"x{number}") for number in range(len(operands))]
        for node, value in zip(nodes, operands, strict=True):
            node.meta["val"] = value
        more = (None, None, None, None, precision, [0, 1, 2, 3])
        node = graph.call_function(ops.coded_attention, (*nodes, *more))
        node.meta["val"] = ops.coded_attention(*operands, *more)
    why = coded_attention.why_tiled(node)
    assert (why is None) == (says is None)
    assert says is None or says in why
