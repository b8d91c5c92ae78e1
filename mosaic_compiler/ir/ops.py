"""Operators of our own, so that graphs which use them still run under plain PyTorch.

``mosaic::gather_logits``     hidden[index] @ weight.T in one kernel
``mosaic::head_statistics``   max, argmax, sums of exponentials of a head's logits, tile by tile
``mosaic::scatter_rows``      zeros with some rows put in
``mosaic::touched_pages``     how many pages of memory these rows lie in
``mosaic::put_rows``          a value of which only some rows are computed: who reads others reads nothing in particular
``mosaic::mixture``           a mixture of experts: its ops, as data
``mosaic::interval_attention``  attention whose queries each see a run of keys, instead of a mask
``mosaic::attention_behind``    the rest of one whose keys up to the query's own are done
``mosaic::coded_attention``   attention of keys and values in fewer bits, and of some rows' own as they are
``mosaic::select_keys``       positions of the keys that some queries attend to most

Here are their schemas and what they return; ``kernels/ops.py`` has what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Statistics: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]"

LIBRARY: Any = torch.library.Library("mosaic", "DEF")  # type: ignore[no-untyped-call]

for _schema in (
    "gather_logits(Tensor hidden, Tensor index, Tensor weight) -> Tensor",
    "head_statistics(Tensor hidden, Tensor weight, Tensor? bias, str steps, SymInt tile, SymInt top)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "scatter_rows(Tensor rows, Tensor index, SymInt total, SymInt pages, SymInt page) -> Tensor",
    "touched_pages(Tensor index, SymInt total, SymInt row_bytes, SymInt page) -> SymInt",
    "put_rows(Tensor rows, Tensor index, SymInt total) -> Tensor",
    "mixture(Tensor[] rows, Tensor[] whole, str program) -> Tensor",
    "interval_attention(Tensor query, Tensor key, Tensor value, Tensor? first, Tensor? last, Tensor? only,"
    " float? scale, int[] order) -> Tensor",
    "attention_behind(Tensor query, Tensor key, Tensor value, Tensor done, Tensor sums, Tensor last, float? scale,"
    " int[] order) -> Tensor",
    "coded_attention(Tensor query, Tensor key, Tensor key_scale, Tensor value, Tensor value_scale, Tensor own_key,"
    " Tensor own_value, Tensor rows, Tensor? first, Tensor? last, Tensor? only, float? scale, str precision,"
    " int[] order) -> Tensor",
    "select_keys(Tensor query, Tensor key, Tensor rows, Tensor? first, Tensor? last, Tensor? only, float? scale,"
    " SymInt count, str score, str sets) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def empty_logits(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What ``gather_logits`` returns: [M, V] for M row numbers and a weight [V, D]."""
    return hidden.new_empty(index.shape[0], weight.shape[0])


def empty_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, steps: str, tile: int, top: int
) -> Statistics:
    """What ``head_statistics`` returns: four numbers per row, the ``top`` logits and their positions."""
    rows = hidden.shape[0]
    dtype = hidden.dtype
    for step in filter(None, steps.split(",")):
        name, _, value = step.partition(":")
        dtype = getattr(torch, value) if name == "to" else dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows, dtype=wide),
        hidden.new_empty(rows, dtype=wide),
        hidden.new_empty((rows, top), dtype=dtype),
        hidden.new_empty((rows, top), dtype=torch.int64),
    )


def _empty_rows(rows: Tensor, index: Tensor, total: int, pages: int, page: int) -> Tensor:
    return rows.new_empty((total, *rows.shape[1:]))


def _unknown_pages(index: Tensor, total: int, row_bytes: int, page: int) -> Any:
    return torch.library.get_ctx().new_dynamic_size()


def _empty_value(rows: Tensor, index: Tensor, total: int) -> Tensor:
    return rows.new_empty((total, *rows.shape[index.dim() :]))


def empty_attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    only: Tensor | None,
    scale: float | None,
    order: Sequence[int],
) -> Tensor:
    """What ``interval_attention`` returns: [B, H, M, d], with its dims in memory in an order."""
    sizes = (*query.shape[:3], value.shape[3])
    back = [list(order).index(dim) for dim in range(4)]
    return query.new_empty([sizes[dim] for dim in order]).permute(back)


def _empty_behind(
    query: Tensor, key: Tensor, value: Tensor, done: Tensor, sums: Tensor, last: Tensor, scale: float | None,
    order: Sequence[int],
) -> Tensor:  # fmt: skip
    return empty_attended(query, key, value, None, last, None, scale, order)


def empty_coded(query: Tensor, *more: Any) -> Tensor:
    """What ``coded_attention`` returns, as ``interval_attention``; the result's depth is that of ``own_value``."""
    return empty_attended(query, query, more[5], None, None, None, None, more[-1])


def empty_positions(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    only: Tensor | None,
    scale: float | None,
    count: int,
    score: str,
    sets: str,
) -> Tensor:
    """What ``select_keys`` returns: int64 [B, G, count], G heads of keys, or one."""
    return key.new_empty((key.shape[0], key.shape[1] if sets == "head" else 1, count), dtype=torch.int64)


_FAKES: dict[str, Callable[..., Any]] = {
    "gather_logits": empty_logits,
    "head_statistics": empty_statistics,
    "scatter_rows": _empty_rows,
    "touched_pages": _unknown_pages,
    "put_rows": _empty_value,
    "interval_attention": empty_attended,
    "attention_behind": _empty_behind,
    "coded_attention": empty_coded,
    "select_keys": empty_positions,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"mosaic::{_name}", _fake, lib=LIBRARY)

gather_logits = torch.ops.mosaic.gather_logits.default
head_statistics = torch.ops.mosaic.head_statistics.default
scatter_rows = torch.ops.mosaic.scatter_rows.default
touched_pages = torch.ops.mosaic.touched_pages.default
put_rows = torch.ops.mosaic.put_rows.default
mixture = torch.ops.mosaic.mixture.default
interval_attention = torch.ops.mosaic.interval_attention.default
attention_behind = torch.ops.mosaic.attention_behind.default
coded_attention = torch.ops.mosaic.coded_attention.default
select_keys = torch.ops.mosaic.select_keys.default
