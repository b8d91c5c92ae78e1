"""Codes: kept values in fewer bits (``planning/precisions.py``), written and read in the graph's own ops.

Since they are ops like any others, loops that compute keys and values write codes as they go, row by row, kernels fuse
them, and plans count them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book import Layout, rows
from mosaic_compiler.ir.emitter import SizeEmitter
from mosaic_compiler.passes.state.cut import Cut, layers_of
from mosaic_compiler.planning.precisions import PRECISIONS, precision_at

aten = torch.ops.aten

_LEAST = 1e-30
"""Of a scale's numerator, so that rows of zeros have one."""


@dataclass(frozen=True)
class Coding:
    """How one value is written.

    Attributes:
        precision: its name; ``None``: as it is.
        dim: of the value, along which groups lie.
        group: numbers that share a scale.
    """

    precision: str | None
    dim: int = 0
    group: int = 0

    @property
    def is_exact(self) -> bool:
        """Nothing is lost."""
        return self.precision is None

    @property
    def has_scales(self) -> bool:
        """Numbers are codes times scales, not rounded only."""
        return self.precision is not None and PRECISIONS[self.precision].most is not None

    def nbytes(self, value: fx.Node) -> sympy.Expr:
        """Bytes of the parts of a value, which are kept without gaps."""
        tensor = ir.only_tensor(value)
        numbers = sympy.prod([ir.expr_of(size) for size in tensor.shape])
        if self.precision is None:
            return numbers * tensor.dtype.itemsize
        scales = 4 * numbers / self.group if self.has_scales else 0
        return numbers * PRECISIONS[self.precision].bits / 8 + scales


def codings_of(cut: Cut, precision: str | None) -> tuple[Mapping[fx.Node, Coding], str]:
    """For each kept value how it is written, and why that cannot be, if so.

    Args:
        precision: of all, or by layers; a value is written as the first layer that reads it says.
    """
    found: dict[fx.Node, Coding] = {}
    kept_as = dict(cut.kept_as)
    layers: dict[fx.Node, int] = {}
    for layer, node in layers_of(cut):
        for operand in node.all_input_nodes:
            if operand in kept_as:
                layers.setdefault(kept_as[operand], layer)
    for value in cut.values:
        wanted = precision_at(precision, layers.get(value, 0))
        dim = _features(value, cut.labels.layout(value))
        if dim is None:
            found[value], problem = coding_of(value, wanted, 0, 0)
            if not found[value].is_exact:
                problem = f"{value.name} has no features beside its rows, which could be kept in {wanted}"
            if problem:
                return {}, problem
            continue
        whole = int(ir.only_tensor(value).shape[dim])
        heads = [
            size
            for operand, kept in cut.kept_as
            if kept is value and (at := _features(operand, cut.labels.layout(operand))) is not None
            if whole % (size := int(ir.only_tensor(operand).shape[at])) == 0
        ]
        found[value], problem = coding_of(value, wanted, dim, min(heads, default=whole))
        if problem:
            return {}, problem
    return found, ""


def coding_of(value: fx.Node, precision: str | None, dim: int, group: int) -> tuple[Coding, str]:
    """How a value is written whose groups of so many numbers lie along a dim, and why that cannot be, if so."""
    dtype = ir.only_tensor(value).dtype
    if precision is None or (PRECISIONS[precision].most is None and dtype == torch.bfloat16):
        return Coding(None), ""
    if not dtype.is_floating_point:
        return Coding(None), f"{value.name} is {dtype}, which cannot be kept in {precision}"
    if PRECISIONS[precision].bits == 4 and group % 2:
        return Coding(None), f"its heads have {group} numbers, and {precision} puts two in a byte: take int8"
    return Coding(precision, dim, group), ""


def _features(value: fx.Node, layout: Layout) -> int | None:
    """The last dim that is a number and has no rows."""
    sizes = [ir.expr_of(size) for size in ir.only_tensor(value).shape]
    fixed = [dim for dim, label in enumerate(layout) if label is None and sizes[dim].is_Integer]
    return max(fixed, default=None)


class Coder:
    """Adds the ops to a graph, where its emitter stands."""

    def __init__(self, emitter: SizeEmitter) -> None:
        self._emitter = emitter

    def encode(self, value: fx.Node, coding: Coding) -> list[fx.Node]:
        """Codes and scales of a value (of some of its rows as well), each with its rank."""
        if coding.precision is None:
            return [value]
        emit, precision = self._emitter.emit, PRECISIONS[coding.precision]
        if precision.most is None:
            return [emit(aten._to_copy.default, value, dtype=torch.bfloat16)]
        dim = coding.dim + 1
        groups = self._wide(self._split(value, coding.dim, coding.group))
        largest = emit(
            aten.clamp_min.default, emit(aten.amax.default, emit(aten.abs.default, groups), [dim], True), _LEAST
        )
        scale = emit(aten.mul.Tensor, largest, 1 / precision.most)
        numbers = emit(aten.div.Tensor, groups, scale)
        if coding.precision != "fp8":
            numbers = emit(aten.round.default, numbers)
        numbers = emit(aten.clamp.default, numbers, -precision.most, precision.most)
        return [self._merged(self._codes(numbers, coding), coding.dim), self._merged(scale, coding.dim)]

    def _codes(self, numbers: fx.Node, coding: Coding) -> fx.Node:
        emit, dim, half = self._emitter.emit, coding.dim + 1, coding.group // 2
        if coding.precision == "fp8":
            return emit(aten.view.dtype, emit(aten._to_copy.default, numbers, dtype=torch.float8_e4m3fn), torch.uint8)
        if coding.precision == "int8":
            return emit(aten._to_copy.default, numbers, dtype=torch.int8)
        front, back = (
            emit(aten.slice.Tensor, numbers, dim, begin, begin + half) for begin in (0, half)
        )  # neighbours in a byte are half a head apart
        both = emit(aten.add.Tensor, emit(aten.mul.Tensor, back, 16), emit(aten.add.Tensor, front, 8 + 16 * 8))
        return emit(aten._to_copy.default, both, dtype=torch.uint8)

    def decode(self, parts: Sequence[fx.Node], coding: Coding, dtype: torch.dtype, order: Sequence[int]) -> fx.Node:
        """What was encoded (not exactly), as far as the codes tell it, with its dims in memory in an order."""
        emit = self._emitter.emit
        if len(parts) == 1:
            return self._emitter.laid_out(emit(aten._to_copy.default, parts[0], dtype=dtype), order)
        halves = 2 if coding.precision == "int4" else 1
        codes = self._split(parts[0], coding.dim, coding.group // halves)
        scale = self._split(parts[1], coding.dim, 1)
        if halves > 1:
            scale = emit(aten.unsqueeze.default, scale, coding.dim + 1)
        numbers = emit(aten._to_copy.default, emit(aten.mul.Tensor, self._numbers(codes, coding), scale), dtype=dtype)
        if halves > 1:  # last, so that all of it is one kernel
            sizes = self._sizes(numbers)
            before, behind = sizes[: coding.dim + 1], sizes[coding.dim + 3 :]
            numbers = self._viewed(numbers, [*before, coding.group, *behind])
        return self._emitter.laid_out(self._merged(numbers, coding.dim), order)

    def _numbers(self, codes: fx.Node, coding: Coding) -> fx.Node:
        emit = self._emitter.emit
        if coding.precision == "fp8":
            return self._wide(emit(aten.view.dtype, codes, torch.float8_e4m3fn))
        if coding.precision == "int8":
            return self._wide(codes)
        # both halves by one broadcast, which kernels fuse with what follows (a ``cat`` would be memory of its own)
        dim, sizes = coding.dim + 1, self._sizes(codes)
        device = ir.only_tensor(codes).device
        shifts = emit(aten.arange.start_step, 0, 8, 4, dtype=torch.uint8, device=device, pin_memory=False)
        shifts = self._viewed(shifts, [2, *[1] * (len(sizes) - dim)])
        halves = emit(aten.bitwise_right_shift.Tensor, emit(aten.unsqueeze.default, codes, dim), shifts)
        return emit(aten.sub.Tensor, self._wide(emit(aten.bitwise_and.Scalar, halves, 15)), 8)

    def _wide(self, value: fx.Node) -> fx.Node:
        if ir.only_tensor(value).dtype == torch.float32:
            return value
        return self._emitter.emit(aten._to_copy.default, value, dtype=torch.float32)

    # Groups as a dim of their own, and back.  (Views of memory that lies in another order would be copies.)
    def _split(self, value: fx.Node, dim: int, group: int) -> fx.Node:
        sizes = self._sizes(value)
        return self._viewed(value, [*sizes[:dim], int(sizes[dim]) // group, group, *sizes[dim + 1 :]])

    def _merged(self, value: fx.Node, dim: int) -> fx.Node:
        sizes = self._sizes(value)
        return self._viewed(value, [*sizes[:dim], int(sizes[dim]) * int(sizes[dim + 1]), *sizes[dim + 2 :]])

    def _sizes(self, value: fx.Node) -> list[Any]:
        return [self._emitter.size(ir.expr_of(size)) for size in rows.shape_of(value)]

    def _viewed(self, value: fx.Node, sizes: list[Any]) -> fx.Node:
        return self._emitter.emit(aten.view.default, value, sizes)
