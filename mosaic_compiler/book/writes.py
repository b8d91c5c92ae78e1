"""How results get into given buffers where an op's own ``out=`` does not do it: calls that write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book.entry import Call, Emit

aten = torch.ops.aten


def copied(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(torch.Tensor.copy_, (outs[0], args[0]))]


def nothing(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return []


def filled(value: float | str) -> Emit:
    """One number everywhere; ``"arg1"``: the one in that argument."""

    def emit(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
        filler = args[int(value[3:])] if isinstance(value, str) else value
        return [Call(torch.Tensor.fill_, (outs[0], filler))]

    return emit


def shares_no_place(node: fx.Node) -> bool:
    """No two elements of the result share a place (``empty_strided`` may ask for that)."""
    return all(stride != 0 for stride in ir.only_tensor(node).stride())


def numbered(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    start, end, step = {1: (0, *args, 1), 2: (*args, 1), 3: tuple(args)}[len(args)]
    return [Call(aten.arange.start_out, (start, end, step), (("out", outs[0]),))]


def _write_slice(out: torch.Tensor, source: torch.Tensor, dim: int, start: Any, end: Any, step: Any) -> None:
    aten.slice.Tensor(out, dim, start, end, step).copy_(source)


def slice_replaced(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    given = dict(zip(("dim", "start", "end", "step"), args[2:], strict=False)) | kwargs
    place = tuple(given.get(key, default) for key, default in (("dim", 0), ("start", None), ("end", None), ("step", 1)))
    return [Call(torch.Tensor.copy_, (outs[0], args[0])), Call(_write_slice, (outs[0], args[1], *place))]


def _write_select(out: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> None:
    aten.select.int(out, dim, index).copy_(source)


def part_replaced(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(torch.Tensor.copy_, (outs[0], args[0])), Call(_write_select, (outs[0], *args[1:4]))]


def adds_only(node: fx.Node) -> bool:
    """A pad that cuts nothing off."""
    pads: Any = node.args[1]
    return all(isinstance(pad, int) and pad >= 0 for pad in pads)


def _write_inside(out: torch.Tensor, source: torch.Tensor, pads: Sequence[int]) -> None:
    for place in range(len(pads) // 2):
        dim = out.dim() - 1 - place
        out = out.narrow(dim, pads[2 * place], source.shape[dim])
    out.copy_(source)


def padded(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    source, pads = args[:2]
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    return [Call(torch.Tensor.fill_, (outs[0], value)), Call(_write_inside, (outs[0], source, pads))]
