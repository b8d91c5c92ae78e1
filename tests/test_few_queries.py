"""Attention of few queries: the kernel in Triton's interpreter, memory, and where it is chosen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_compiler.kernels.few_queries import serves
from mosaic_compiler.planning.few import MOST_PIECES, partial_bytes, pieces, tile_for
from mosaic_compiler.planning.flash import SplitBytes

PROGRAM = """
import itertools, torch
from mosaic_compiler.kernels.few_queries import few_query_attention, few_query_reference
from mosaic_compiler.planning.few import pieces

torch.manual_seed(0)
seen = set()
for groups, share, queries, keys, depth, dtype in [
    (1, 7, 5, 130, 64, torch.float32), (2, 2, 33, 1000, 64, torch.float32), (2, 7, 32, 2049, 128, torch.float32),
    (1, 2, 3, 17, 16, torch.float32), (2, 4, 1, 1300, 64, torch.bfloat16), (1, 4, 32, 1, 32, torch.float32),
]:
    for batch, by_row in itertools.product((1, 2), (True, False)):
        query = torch.randn(batch, queries, groups * share, depth, dtype=dtype).transpose(1, 2)
        key, value = (
            torch.randn(batch, keys, groups, depth, dtype=dtype).transpose(1, 2) if by_row
            else torch.randn(batch, groups, keys, depth, dtype=dtype)
            for _ in range(2)
        )
        got = few_query_attention(query, key, value, 0.3, 132)
        expected = few_query_reference(query, key, value, 0.3)
        assert got.stride() == query.stride()
        torch.testing.assert_close(got, expected, atol=2e-6 if dtype == torch.float32 else 2e-2, rtol=1e-5)
        seen.add(pieces(batch * groups, share * queries, keys, 132))
assert len(seen) > 2, seen
print("pieces", sorted(seen))
"""


RUNS = """
import itertools, torch
from mosaic_compiler.kernels.few_queries import interval_attention_
from mosaic_compiler.kernels.interval_attention import reference
from mosaic_compiler.planning.few import pieces

torch.manual_seed(0)
seen = set()
for which, (groups, share, queries, keys, entries) in zip(range(8), itertools.cycle([
    (1, 2, 300, 300, 1), (2, 1, 5, 1100, 2), (2, 2, 90, 40, 1), (1, 4, 33, 1300, 1), (1, 1, 700, 130, 2),
])):
    query = torch.randn(entries, groups * share, queries, 16)
    key, value = torch.randn(2, entries, groups, keys, 16)
    first = torch.randint(-9, keys, (1, 1, queries, 1)) if which & 1 else None
    last = torch.randint(0, keys + 9, (entries, 1, queries, 1)) if which & 2 else None
    only = torch.rand(entries, 1, 1, keys) < 0.5 if which & 4 else None
    got = interval_attention_(torch.empty_like(query), query, key, value, first, last, only, 0.4, 132)
    torch.testing.assert_close(got, reference(query, key, value, first, last, only, 0.4), atol=3e-6, rtol=1e-5)
    seen.add(pieces(entries * groups, share * queries, keys, 132) if share * queries <= 512 else 1)
at = torch.arange(260).view(1, 1, -1, 1)  # windows: blocks of keys that all queries of a block see, and some
query, key, value = torch.randn(3, 1, 1, 260, 16)
got = interval_attention_(torch.empty_like(query), query, key, value, at - 150, at + 70, None, 0.4, 132)
torch.testing.assert_close(got, reference(query, key, value, at - 150, at + 70, None, 0.4), atol=3e-6, rtol=1e-5)
print("pieces", sorted(seen))
"""

BEHIND = """
import torch
from mosaic_compiler.kernels.attention_behind import attend_behind_
from mosaic_compiler.kernels.interval_attention import reference

torch.manual_seed(0)
for groups, share, queries, block in ((1, 2, 300, 32), (2, 1, 130, 7), (1, 4, 33, 64), (2, 2, 257, 128)):
    query = torch.randn(2, groups * share, queries, 16)
    key, value = torch.randn(2, 2, groups, queries, 16)
    at = torch.arange(queries)
    last = ((at // block + 1) * block)[None, None, :, None]
    scores = query @ key.repeat_interleave(share, 1).transpose(-1, -2) * 0.4
    scores = scores.masked_fill(at[:, None] < at, float("-inf"))
    sums = torch.logsumexp(scores, -1)
    done = torch.softmax(scores, -1) @ value.repeat_interleave(share, 1)
    got = attend_behind_(torch.empty_like(query), query, key, value, done, sums, last, 0.4)
    torch.testing.assert_close(got, reference(query, key, value, None, last, None, 0.4), atol=3e-6, rtol=1e-5)
print("pieces [1")
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [PROGRAM, RUNS, BEHIND])
def test_the_kernel_equals_its_reference(program):
    """Strided keys and values, groups, several pieces, a ragged end, one key; runs of keys, some of them empty; in a
    process of its own, because Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env={"TRITON_INTERPRET": "1", "PATH": "", "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pieces [1" in done.stdout


@given(st.integers(1, 64), st.integers(1, 512), st.integers(1, 1 << 20), st.integers(1, 200))
def test_pieces_have_keys(heads, rows, keys, processors):
    count, tile = pieces(heads, rows, keys, processors), tile_for(keys)
    blocks = -(-keys // tile.keys)
    assert 1 <= count <= min(MOST_PIECES, blocks)
    assert all((piece + 1) * blocks // count > piece * blocks // count for piece in range(count))


@given(st.integers(1, 4), st.integers(2, 8), st.integers(1, 64), st.integers(1024, 1 << 18))
def test_plans_have_its_memory(groups, share, queries, keys):
    """For so many queries, and for the fewer ones that the same program serves."""
    room = int(SplitBytes(groups * share, queries, keys, 64, 132, groups))
    for count in range(max(queries // 2 - 32, 1), queries + 1):
        if share * count <= 512:
            assert partial_bytes(groups, share * count, keys, 64, 132) <= room


def test_it_is_chosen_where_it_was_measured_to_be_faster():
    assert serves([1, 28, 32, 128], [1, 4, 61_440, 128], "torch.bfloat16")
    assert not serves([1, 32, 32, 128], [1, 32, 61_440, 128], "torch.bfloat16")  # FlashAttention is at the floor there
    assert not serves([1, 28, 32, 128], [1, 4, 512, 128], "torch.bfloat16")
    assert not serves([1, 28, 1024, 128], [1, 4, 61_440, 128], "torch.bfloat16")
    assert not serves([1, 28, 32, 128], [1, 4, 61_440, 128], "torch.float32")
    assert not serves([1, 28, 32, 96], [1, 4, 61_440, 96], "torch.bfloat16")
