"""Operators of our own, so that graphs which use them still run under plain PyTorch.

``mosaic::gather_logits``     hidden[index] @ weight.T in one kernel
``mosaic::head_statistics``   max, argmax, sums of exponentials of a head's logits, tile by tile
``mosaic::scatter_rows``      zeros with some rows put in
``mosaic::touched_pages``     how many pages of memory these rows lie in
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.kernels import gather_logits as _kernel
from mosaic_compiler.kernels.head_statistics import head_statistics_
from mosaic_compiler.kernels.scatter_rows import count_pages, scatter_rows_reference


@torch.library.custom_op("mosaic::gather_logits", mutates_args=())
def _gather_logits(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    out = hidden.new_empty(index.shape[0], weight.shape[0])
    return _kernel.gather_logits_triton(hidden, index, weight, out)


@_gather_logits.register_fake
def _(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_empty(index.shape[0], weight.shape[0])


@torch.library.custom_op("mosaic::head_statistics", mutates_args=())
def _head_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, steps: str, tile: int, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = _empty_results(hidden, steps, top)
    head_statistics_(results, hidden, weight, bias, steps, tile)
    return results


@_head_statistics.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, steps: str, tile: int, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(hidden, steps, top)


def _empty_results(hidden: Tensor, steps: str, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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


@torch.library.custom_op("mosaic::scatter_rows", mutates_args=())
def _scatter_rows(rows: Tensor, index: Tensor, total: int, pages: int, page: int) -> Tensor:
    return scatter_rows_reference(rows, index, total)


@_scatter_rows.register_fake
def _(rows: Tensor, index: Tensor, total: int, pages: int, page: int) -> Tensor:
    return rows.new_empty((total, *rows.shape[1:]))


@torch.library.custom_op("mosaic::touched_pages", mutates_args=())
def _touched_pages(index: Tensor, total: int, row_bytes: int, page: int) -> int:
    return count_pages(index, row_bytes, page)


@_touched_pages.register_fake
def _(index: Tensor, total: int, row_bytes: int, page: int) -> int:
    size: Any = torch.library.get_ctx().new_dynamic_size()
    return size  # type: ignore[no-any-return]


gather_logits = torch.ops.mosaic.gather_logits.default
head_statistics = torch.ops.mosaic.head_statistics.default
scatter_rows = torch.ops.mosaic.scatter_rows.default
touched_pages = torch.ops.mosaic.touched_pages.default
