"""Which keys some queries attend to most: scores in tiles of keys, and the positions of the best.

``probability`` takes the softmax first: a key's score is the largest probability that any of the queries (of all heads
that share it) gives it.  No matrix of queries and keys exists: the first walk over the keys finds each query's sum of
exponentials, the second one the scores::

    score[n] = max_r exp(q_r . k_n - lse_r)        lse_r = log sum_n exp(q_r . k_n)

Keys of the queries' own rows are always chosen.  Of keys with equal scores the first ones are.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import ir
from mosaic_compiler.book import scratch
from mosaic_compiler.kernels import few_queries
from mosaic_compiler.kernels.interval_attention import depth_of
from mosaic_compiler.planning.few import MOST_PIECES, pieces

_TILES = {"cpu": 512, "cuda": 4096}
"""Keys that are taken at a time."""

_BLOCK = 32
"""Rows that the kernels take at a time."""


def select_keys_(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    only: Tensor | None,
    scale: float | None,
    score: str,
) -> Tensor:
    """Positions of the keys that score best, in ascending order.

    Args:
        out: int64 [B, G, S]; G heads of keys, or 1: one set for all of them.
        query: [B, H, R, d], of some rows.
        key: [B, H / g, N, d].
        rows: int64 [B, R]: where in the sequence the queries stand, in ascending order; the last one may come again.
        first, last: int64 [1 or B, 1, R, 1]: a query sees keys [first, last).
        only: bool [1 or B, 1, 1, N], of those keys the ones that count.
        scale: ``None``: 1 / sqrt(d).
        score: see ``planning/selection.py``.
    """
    sets, count = out.shape[1:]
    scale = few_queries.scale_of(scale, query.shape[3])
    if score == "probability" and has_kernel(query):
        scores = _with_kernels(query, key, first, last, only, scale)
        scores = scores if sets == key.shape[1] else scores.amax(1, keepdim=True)
    else:
        seen = _Seen(first, last, only, query.shape[1] // key.shape[1])
        scores = _with_tiles(query, key, rows, seen, scale, score, sets, count)
    scores.nan_to_num_(nan=torch.finfo(scores.dtype).max, neginf=-float("inf"))
    scores.scatter_(-1, rows.unsqueeze(1).expand(-1, scores.shape[1], -1), float("inf"))
    chosen = _are_best(scores, count)
    del scores
    places = torch.where(chosen, chosen.cumsum(-1) - 1, count)
    del chosen
    found = out.new_empty(*out.shape[:2], count + 1)
    found.scatter_(-1, places, torch.arange(key.shape[2], device=out.device).expand_as(places))
    return out.copy_(found[..., :count])


def _are_best(scores: Tensor, count: int) -> Tensor:
    """Which ``count`` scores [.., N] are the highest; of equal ones the first."""
    if not 0 < count < scores.shape[-1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = torch.topk(scores, count, sorted=False).values.amin(-1, keepdim=True)
    above = scores > least
    equal = scores == least
    room = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def _with_tiles(
    query: Tensor, key: Tensor, rows: Tensor, seen: _Seen, scale: float, score: str, sets: int, count: int
) -> Tensor:
    """Scores [B, G or 1, N] with PyTorch's kernels."""
    batch, heads, queries, depth = query.shape
    groups = key.shape[1]
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    packed = query.to(wide).reshape(batch, groups, heads // groups, queries, depth)
    if score == "probability":
        return _probabilities(packed * scale, key, seen, sets)
    is_new = torch.ones_like(rows, dtype=torch.bool)
    is_new[:, 1:] = rows[:, 1:] != rows[:, :-1]
    if score == "mage":
        return _votes(packed * scale, key, seen, is_new, sets, count - queries)
    mean = (packed * is_new[:, None, None, :, None]).sum(3) / is_new.sum(1)[:, None, None, None]
    return _pooled(_means(mean, key, seen), rows)


def has_kernel(query: Tensor) -> bool:
    """The kernels take such queries."""
    return few_queries.is_interpreted() or (query.is_cuda and _takes(query.dtype, query.shape[3]))


def _takes(dtype: torch.dtype, depth: int) -> bool:
    return dtype in few_queries.DTYPES and depth in few_queries.DEPTHS and few_queries.has_triton()


def _with_kernels(
    query: Tensor, key: Tensor, first: Tensor | None, last: Tensor | None, only: Tensor | None, scale: float
) -> Tensor:
    """Logs of the largest probabilities, [B, G, N]; base 2."""
    from mosaic_compiler.kernels import key_selection_kernels as kernels

    batch, heads, queries, depth = query.shape
    groups, keys = key.shape[1:3]
    rows = heads // groups * queries
    interpreted = few_queries.is_interpreted()
    count = pieces(batch * groups, rows, keys, scratch.multiprocessors())
    sums = query.new_empty(batch * groups, count, rows, dtype=torch.float32)
    best = query.new_empty(batch, groups, keys, dtype=torch.float32)
    steps, bound_steps = few_queries.steps_of, few_queries.bound_steps
    blocks = -(-rows // _BLOCK)
    given = (
        first, last, only, scale * few_queries.LOG2E, *steps(query), *steps(key),
        *bound_steps(first, 2), *bound_steps(last, 2), *bound_steps(only, 3),
        groups, queries, keys, rows, blocks, batch * groups, count,
    )  # fmt: skip
    named = {
        "DEPTH": depth, "BLOCK_M": _BLOCK, "BLOCK_N": 128, "UPCAST": interpreted, "num_warps": 4, "num_stages": 3,
        "BOUNDS": not (first is None and last is None and only is None),
    }  # fmt: skip
    kernels.sums_kernel[(blocks * batch * groups * count,)](query, key, sums, *given, **named)
    programs = batch * groups * -(-keys // 128)
    kernels.best_kernel[(programs,)](query, key, sums, best, *given, **named, MOST=MOST_PIECES)
    return best


class _Seen:
    """Which keys of a tile the queries see."""

    def __init__(self, first: Tensor | None, last: Tensor | None, only: Tensor | None, share: int) -> None:
        self._first, self._last, self._only, self._share = first, last, only, share

    def __call__(self, tile: slice, device: torch.device) -> Tensor | None:
        """bool [1 or B, 1, 1, 1 or R, keys]; ``None``: all."""
        places = torch.arange(tile.start, tile.stop, device=device)
        parts = [] if self._first is None else [places >= self._first]
        parts += [] if self._last is None else [places < self._last]
        parts += [] if self._only is None else [self._only[..., tile]]
        found = None
        for part in parts:
            found = part if found is None else found & part
        return None if found is None else found.unsqueeze(1)


def _tiles(keys: int, device: torch.device) -> Iterator[slice]:
    size = _TILES["cpu" if device.type == "cpu" else "cuda"]
    return (slice(begin, min(begin + size, keys)) for begin in range(0, keys, size))


def _scores(packed: Tensor, key: Tensor, seen: _Seen, tile: slice) -> Tensor:
    """[B, G, g * R, keys] of queries [B, G, g, R, d]; -inf where a query does not see a key."""
    batch, groups, share, queries, depth = packed.shape
    part = key[:, :, tile].to(packed.dtype)
    found = packed.reshape(batch, groups, share * queries, depth) @ part.transpose(-1, -2)
    mask = seen(tile, key.device)
    if mask is not None:
        found.view(batch, groups, share, queries, -1).masked_fill_(~mask, float("-inf"))
    return found


def _probabilities(packed: Tensor, key: Tensor, seen: _Seen, sets: int) -> Tensor:
    """Logs of the largest probabilities, [B, G or 1, N]."""
    batch, groups, share, queries, _ = packed.shape
    sums = packed.new_full((batch, groups, share * queries, 1), float("-inf"))
    for tile in _tiles(key.shape[2], key.device):
        sums = torch.logaddexp(sums, torch.logsumexp(_scores(packed, key, seen, tile), -1, keepdim=True))
    found = packed.new_empty(batch, sets, key.shape[2])
    for tile in _tiles(key.shape[2], key.device):
        logs = _scores(packed, key, seen, tile)
        hidden = logs == float("-inf")
        best = logs.sub_(sums).masked_fill_(hidden, float("-inf")).amax(2)
        found[..., tile] = best if sets == groups else best.amax(1, keepdim=True)
    return found


def _votes(packed: Tensor, key: Tensor, seen: _Seen, is_new: Tensor, sets: int, most: int) -> Tensor:
    """How many queries have a key among their ``most`` likeliest, [B, G or 1, N]; one head at a time."""
    batch, groups, share, _, _ = packed.shape
    keys = key.shape[2]
    found = packed.new_zeros(batch, groups, keys)
    for group in range(groups):
        heads = slice(group, group + 1)
        logs = torch.cat([_scores(packed[:, heads], key[:, heads], seen, t) for t in _tiles(keys, key.device)], -1)[
            :, 0
        ]
        counts = _are_best(logs, most) & (logs > float("-inf")) & is_new.repeat(1, share).unsqueeze(-1)
        found[:, group] = counts.sum(1)
        del logs, counts
    return found if sets == groups else found.sum(1, keepdim=True)


def _means(mean: Tensor, key: Tensor, seen: _Seen) -> Tensor:
    """Mean over heads of mean query [B, G, g, d] times key, [B, 1, N]; -inf where no query sees a key."""
    found = mean.new_empty(mean.shape[0], 1, key.shape[2])
    for tile in _tiles(key.shape[2], key.device):
        part = (mean @ key[:, :, tile].to(mean.dtype).transpose(-1, -2)).mean((1, 2))
        mask = seen(tile, key.device)
        if mask is not None:
            part = part.masked_fill(~mask.any(-2)[:, 0, 0], float("-inf"))
        found[:, 0, tile] = part
    return found


def _pooled(scores: Tensor, rows: Tensor) -> Tensor:
    """The largest of each key's score and those of its neighbours, where the queries' own rows are not there."""
    own = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, rows.unsqueeze(1), True)
    order = torch.sort(own.to(torch.uint8), stable=True, dim=-1).indices
    line = scores.masked_fill(own, float("-inf")).gather(-1, order)
    pooled = line.clone()
    torch.maximum(pooled[..., 1:], line[..., :-1], out=pooled[..., 1:])
    torch.maximum(pooled[..., :-1], line[..., 1:], out=pooled[..., :-1])
    return torch.empty_like(scores).scatter_(-1, order, pooled)


def scratch_bytes(node: fx.Node) -> sympy.Expr:
    """What :func:`select_keys_` allocates: queries, a tile of keys and of scores, all keys' scores, and their sort."""
    query, key, score = node.args[0], node.args[1], node.args[8]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    out = ir.only_tensor(node)
    batch, heads, queries, depth = (ir.expr_of(size) for size in ir.only_tensor(query).shape)
    groups, keys = (ir.expr_of(size) for size in ir.only_tensor(key).shape[1:3])
    sets, kept = (ir.expr_of(size) for size in out.shape[1:])
    dtype = ir.only_tensor(key).dtype
    if out.device.type == "cuda" and score == "probability" and _takes(dtype, depth_of(ir.only_tensor(query))):
        sums = batch * groups * MOST_PIECES * (heads / groups) * queries * 4
        return sums + batch * groups * keys * 4 + batch * sets * (keys * 24 + kept * 28) + 8 * keys + (1 << 20)
    size = 8 if dtype == torch.float64 else 4
    most = _TILES["cpu" if out.device.type == "cpu" else "cuda"]
    tile = sympy.Min(keys, most) if not keys.is_Integer else min(keys, sympy.Integer(most))
    inside = 3 * batch * heads * queries * depth * size + batch * groups * tile * depth * size
    inside += batch * heads * queries * (tile * (3 * size + 2) + 4 * size) + 24 * tile
    if score == "mage":
        inside += batch * heads / groups * queries * (keys * (2 * size + 16) + kept * (size + 18))
    held = batch * sets * keys * (4 * size + 10) if score != "mage" else batch * groups * keys * (size + 2)
    ends = batch * sets * (keys * (2 * size + 24) + 32 * kept)
    return inside + held + ends + 64 * batch * queries + 4096
