"""The operators of ``ir/ops.py``: what runs where a graph is called as it is, and their entries in the book."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import ir
from mosaic_compiler.book import STANDARD, Call, Op, whole_operands
from mosaic_compiler.book.families import attention
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.ops import (
    LIBRARY,
    Statistics,
    empty_attended,
    empty_coded,
    empty_logits,
    empty_positions,
    empty_statistics,
)
from mosaic_compiler.kernels import attention_behind, coded_attention, interval_attention, key_selection
from mosaic_compiler.kernels import mixture as mixtures
from mosaic_compiler.kernels.attention_behind import attend_behind_
from mosaic_compiler.kernels.coded_attention import attend_codes_
from mosaic_compiler.kernels.gather_logits import gather_logits_triton
from mosaic_compiler.kernels.head_statistics import head_statistics_
from mosaic_compiler.kernels.interval_attention import attend_intervals_
from mosaic_compiler.kernels.key_selection import select_keys_
from mosaic_compiler.kernels.mixture import mixture
from mosaic_compiler.kernels.scatter_rows import count_pages, scatter_rows_reference


def _gather_logits(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return gather_logits_triton(hidden, index, weight, empty_logits(hidden, index, weight))


def _head_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, steps: str, tile: int, top: int
) -> Statistics:
    results: Statistics = empty_statistics(hidden, weight, bias, steps, tile, top)
    head_statistics_(results, hidden, weight, bias, steps, tile)
    return results


def _scatter_rows(rows: Tensor, index: Tensor, total: int, pages: int, page: int) -> Tensor:
    return scatter_rows_reference(rows, index, total)


def _touched_pages(index: Tensor, total: int, row_bytes: int, page: int) -> int:
    return count_pages(index, row_bytes, page)


def _put_rows(rows: Tensor, index: Tensor, total: int) -> Tensor:
    return put_rows_(rows.new_empty((total, *rows.shape[index.dim() :])), rows, index)


def put_rows_(out: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Zeros, with rows [*shape of index, ...] where int64 ``index`` says."""
    flat = rows.reshape(index.numel(), *rows.shape[index.dim() :])
    return out.zero_().index_copy_(0, index.flatten(), flat)


def _interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    only: Tensor | None,
    scale: float | None,
    order: Sequence[int],
) -> Tensor:
    out = empty_attended(query, key, value, first, last, only, scale, order)
    return attend_intervals_(out, query, key, value, first, last, only, scale)


def _attention_behind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    done: Tensor,
    sums: Tensor,
    last: Tensor,
    scale: float | None,
    order: Sequence[int],
) -> Tensor:
    out = empty_attended(query, key, value, None, last, None, scale, order)
    return attend_behind_(out, query, key, value, done, sums, last, scale)


def _coded_attention(query: Tensor, *more: Any) -> Tensor:
    return attend_codes_(empty_coded(query, *more), query, *more[:-1])


def _select_keys(
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
    out = empty_positions(query, key, rows, first, last, only, scale, count, score, sets)
    return select_keys_(out, query, key, rows, first, last, only, scale, score)


for _name, _kernel in {
    "gather_logits": _gather_logits,
    "head_statistics": _head_statistics,
    "scatter_rows": _scatter_rows,
    "touched_pages": _touched_pages,
    "put_rows": _put_rows,
    "interval_attention": _interval_attention,
    "attention_behind": _attention_behind,
    "mixture": mixture,
    "coded_attention": _coded_attention,
    "select_keys": _select_keys,
}.items():
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


def _write_gather_logits(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(gather_logits_triton, (*args, outs[0]))]


def _write_head_statistics(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(head_statistics_, (list(outs), *args[:5]))]


def _write_scatter_rows(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(Tensor.index_copy_, (outs[0], 0, args[1], args[0]))]


def _write_put_rows(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(put_rows_, (outs[0], args[0], args[1]))]


def _write_interval_attention(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(attend_intervals_, (outs[0], *args[:7]))]


def _write_attention_behind(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(attend_behind_, (outs[0], *args[:7]))]


def _write_coded_attention(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(attend_codes_, (outs[0], *args[:13]))]


def _write_select_keys(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(select_keys_, (outs[0], *args[:7], args[8]))]


torch.library.register_fake("mosaic::mixture", mixture, lib=LIBRARY)


def _scratch_of_mixture(node: fx.Node) -> sympy.Expr:
    """kernels/mixture.py: what is live at once inside, and what its ops take."""
    operands, program = node.args[0], node.args[2]
    assert isinstance(program, str)
    count = ir.expr_of(ir.only_tensor(operands[0]).shape[0])  # type: ignore[index, arg-type]
    found = [per_row * count + fixed for per_row, fixed in mixtures.parse(program).peak]
    return sympy.Max(*found)


def _scratch_of_head_statistics(node: fx.Node) -> sympy.Expr:
    """kernels/head_statistics.py: a tile of the product, of each step behind it, of the exponentials and of
    one temporary, and vectors."""
    hidden, total = node.args[0], ir.tensors_of(node)[2]
    assert isinstance(hidden, fx.Node)
    assert total is not None
    tensor, tile, top = ir.tensor_of(hidden), node.args[4], node.args[5]
    assert tensor is not None
    assert isinstance(tile, int)
    assert isinstance(top, int)
    steps = node.args[3]
    assert isinstance(steps, str)
    wide = 8 if "to:float64" in steps else total.dtype.itemsize
    tiles = tensor.dtype.itemsize + (2 + len(steps.split(","))) * wide
    return ir.expr_of(tensor.shape[0]) * (tiles * tile + 16 * wide + 80 * (top + 1))


STANDARD.teach(
    {
        ops.gather_logits: Op("head", write=_write_gather_logits, is_heavy=True),
        ops.head_statistics: Op(
            "head", write=_write_head_statistics, scratch=_scratch_of_head_statistics, is_heavy=True
        ),
        ops.scatter_rows: Op("write", write=_write_scatter_rows),
        ops.put_rows: Op("write", write=_write_put_rows, moves_rows=True),
        ops.mixture: Op(
            "mixture",
            rows=whole_operands.mixture_rows,
            is_accounted=True,
            scratch=_scratch_of_mixture,
            is_heavy=True,
            is_dear=True,
        ),
        ops.interval_attention: attention(
            rows=whole_operands.interval_attention_rows,
            write=_write_interval_attention,
            scratch=interval_attention.scratch_bytes,
            groups_heads=True,
        ),
        ops.coded_attention: Op(
            "coded attention",
            rows=whole_operands.coded_attention_rows,
            write=_write_coded_attention,
            scratch=coded_attention.scratch_bytes,
            is_heavy=True,
            is_dear=True,
        ),
        ops.select_keys: Op("selection", write=_write_select_keys, scratch=key_selection.scratch_bytes, is_dear=True),
        ops.attention_behind: Op(
            "attention behind", write=_write_attention_behind, scratch=attention_behind.scratch_bytes, is_heavy=True
        ),
    }
)
