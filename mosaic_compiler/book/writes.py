"""How results get into given buffers where an op's own ``out=`` does not do it: calls that write them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book.entry import Call, Emit, entry

aten = torch.ops.aten


def copied(node: fx.Node) -> Emit:
    """A copy of the first operand, in the result's dtype."""
    return _emit_copy


def nothing(node: fx.Node) -> Emit | None:
    """Memory as it is; ``None`` where elements share a place, as asked for."""
    return None if any(stride == 0 for stride in ir.only_tensor(node).stride()) else _emit_nothing


def filled(node: fx.Node) -> Emit:
    """The entry's ``fill`` everywhere."""
    fill = entry(node).fill
    assert fill is not None
    return functools.partial(_emit_fill, fill)


def numbered(node: fx.Node) -> Emit:
    """``arange``."""
    return _emit_arange


def slice_replaced(node: fx.Node) -> Emit:
    """``slice_scatter``."""
    return _emit_slice_scatter


def part_replaced(node: fx.Node) -> Emit:
    """``select_scatter``."""
    return _emit_select_scatter


def _emit_copy(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(torch.Tensor.copy_, (outs[0], args[0]))]


def _emit_nothing(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return []


def _emit_fill(value: float | str, outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    filler = args[int(value[3:])] if isinstance(value, str) else value
    return [Call(torch.Tensor.fill_, (outs[0], filler))]


def _emit_arange(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    start, end, step = {1: (0, *args, 1), 2: (*args, 1), 3: tuple(args)}[len(args)]
    return [Call(aten.arange.start_out, (start, end, step), (("out", outs[0]),))]


def _write_slice(out: torch.Tensor, source: torch.Tensor, dim: int, start: Any, end: Any, step: Any) -> None:
    aten.slice.Tensor(out, dim, start, end, step).copy_(source)


def _emit_slice_scatter(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    given = dict(zip(("dim", "start", "end", "step"), args[2:], strict=False)) | kwargs
    place = tuple(given.get(key, default) for key, default in (("dim", 0), ("start", None), ("end", None), ("step", 1)))
    return [Call(torch.Tensor.copy_, (outs[0], args[0])), Call(_write_slice, (outs[0], args[1], *place))]


def _write_select(out: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> None:
    aten.select.int(out, dim, index).copy_(source)


def _emit_select_scatter(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(torch.Tensor.copy_, (outs[0], args[0])), Call(_write_select, (outs[0], *args[1:4]))]
