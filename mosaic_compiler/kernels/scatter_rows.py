"""Rows put into zeros: which pages of memory the rows lie in, and the plain form of the operator.

A row of a tensor [N, features] takes ``row_bytes`` bytes, wherever pages begin; neighbouring rows share the page that
one ends and the next begins in::

    rows 1, 2, 5 of 3,000 bytes each, pages of 4,096      row 1: pages 0, 1    row 2: 1, 2    row 5: 3, 4
    touched: 0, 1, 2, 3, 4                                        count_pages -> 5
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

BLOCK_PAGES = 16
"""A GPU's gaps between rows share two blocks of zeros, of so many pages (fewer calls for long gaps) and of one page."""


def scatter_rows_reference(rows: Tensor, index: Tensor, total: int) -> Tensor:
    """Zeros [total, features...] with ``rows`` [M, features...] at ``index`` int64 [M]."""
    return rows.new_zeros((total, *rows.shape[1:])).index_copy_(0, index, rows)


_on_host = WeakTensorKeyDictionary()
"""Copies of row numbers on the host, made when the step starts: later it would have to wait for the device."""


def pages_per_row(row_bytes: int, page: int) -> int:
    """The most pages that one row can touch."""
    return (row_bytes - 2 + page) // page + 1


def shared_pages(device: torch.device) -> int:
    """Pages of zeros that all gaps share, at most; the CPU's kernel has a page of its own for that."""
    return BLOCK_PAGES + 1 if device.type == "cuda" else 0


def count_pages(index: Tensor, row_bytes: int, page: int) -> int:
    """How many pages of ``page`` bytes hold a byte of a row of ``index`` (int64 [M], in any order)."""
    first, last = _page_ranges(_host_copy(index).sort()[0], row_bytes, page)
    new = torch.maximum(first[1:], last[:-1] + 1)  # the first page that no row before has touched
    return int((last[:1] - first[:1] + 1).sum() + (last[1:] - new + 1).clamp_min(0).sum())


def touched_runs(index: Tensor, row_bytes: int, page: int) -> list[tuple[int, int]]:
    """Runs [first, end) of consecutive pages that hold a byte of a row of ``index``, in order."""
    firsts, lasts = _page_ranges(_host_copy(index).sort()[0], row_bytes, page)
    runs: list[tuple[int, int]] = []
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        if runs and first <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(runs[-1][1], last + 1)
        else:
            runs.append((first, last + 1))
    return runs


def _host_copy(index: Tensor) -> Tensor:
    if index.device.type == "cpu":
        return index
    if index not in _on_host:
        _on_host[index] = index.cpu()
    copy: Tensor = _on_host[index]
    return copy


def _page_ranges(index: Tensor, row_bytes: int, page: int) -> tuple[Tensor, Tensor]:
    """The first and the last page of each row."""
    start = index * row_bytes
    return start // page, (start + row_bytes - 1) // page
