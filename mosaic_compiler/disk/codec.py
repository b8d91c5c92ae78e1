"""Data as bytes and back: plans, lowered steps and size expressions, in a format that can say nothing else.

A file is a table of values, each of which refers to ones before it; equal values stand there once, so the 32 equal
layers of a model share what they have in common.  Reading it builds registered dataclasses, expressions of a fixed set
of functions, and Python's containers: no code is run that the file names.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import sympy

from mosaic_compiler.errors import CacheError
from mosaic_compiler.waiting import without_collections

_PLANNING = "mosaic_compiler.planning."
_CLASSES: Mapping[str, Sequence[str]] = {
    _PLANNING + "lowered": (
        "Attention", "Input", "Kind", "LoopOutput", "LoweredCluster", "LoweredGraph", "LoweredLoop", "LoweredOp",
        "LoweredStep", "Named", "Reading", "Ref", "Scatter", "TensorFacts",
    ),
    _PLANNING + "kept": ("KeptStep",),
    _PLANNING + "outline": ("Selected", "StepOutline"),
    _PLANNING + "lives": ("LoopLives", "StepLives", "SymbolicBuffer"),
    _PLANNING + "reach": ("Reach",),
    _PLANNING + "plan": ("Fallback",),
    _PLANNING + "facts": (
        "Bindings", "Constant", "GraphFacts", "KeptKinds", "KernelFacts", "KernelUse", "Layout", "Note", "Place",
        "Shown", "Source", "StateShown",
    ),
    "mosaic_compiler.passes.pipeline": ("PassRecord",),
    "mosaic_compiler.passes.row_demand": ("RowDecision",),
    "mosaic_compiler.passes.reorder": ("OrderDecision",),
    "mosaic_compiler.kernels.gather_logits": ("Choice",),
    "mosaic_compiler.ir.graphs": ("Provenance",),
    "mosaic_compiler.ahead.cached": ("Stateful", "Work"),
    "mosaic_compiler.ahead.fit": ("Traced",),
    "mosaic_compiler.ahead.rates": ("Rates",),
}  # fmt: skip
"""What may stand in a file, by module."""

_SYMPY = (
    "Add", "Mul", "Pow", "Mod", "Max", "Min", "floor", "ceiling", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or",
    "Not", "Abs", "Piecewise", "ExprCondPair",
)  # fmt: skip
_OWN_FUNCTIONS: Mapping[str, Sequence[str]] = {_PLANNING + "flash": ("SplitBytes", "FewBytes")}
"""Functions of our own that an expression may have, by module."""

_ASSUMPTIONS = ("integer", "positive", "nonnegative", "real")


class CodecError(CacheError):
    """Bytes that are no such data, or a value that cannot be written."""


@cache
def _class_of(name: str) -> type[Any]:
    module, _, attribute = name.rpartition(":")
    if attribute not in _CLASSES.get(module, ()):
        raise CodecError(f"{name} is nothing that a file may hold")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


@cache
def _name_of(kind: Any) -> str | None:
    is_known = kind.__name__ in _CLASSES.get(kind.__module__, ())
    return f"{kind.__module__}:{kind.__name__}" if is_known else None


@cache
def _fields_of(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


@cache
def _function_of(name: str) -> Any:
    """A function of expressions.  PyTorch is imported for its own ones only."""
    if name.startswith("torch."):
        from mosaic_compiler.compat.sympy_functions import FUNCTIONS

        return FUNCTIONS[name]
    module, _, attribute = name.rpartition(":")
    if attribute in _OWN_FUNCTIONS.get(module, ()):
        return getattr(importlib.import_module(module), attribute)
    if name not in _SYMPY:
        raise CodecError(f"{name} is no function that an expression may have")
    if name == "ExprCondPair":
        from sympy.functions.elementary.piecewise import ExprCondPair

        return ExprCondPair
    return getattr(sympy, name)


@cache
def _function_names() -> dict[Any, str]:
    from mosaic_compiler.compat.sympy_functions import FUNCTIONS

    own = [f"{module}:{name}" for module, names in _OWN_FUNCTIONS.items() for name in names]
    return {
        **{_function_of(name): name for name in (*_SYMPY, *own)},
        **{kind: name for name, kind in FUNCTIONS.items()},
    }


def pack(value: Any) -> bytes:
    """Write a value down.

    Raises:
        CodecError: for a value that is no such data.
    """
    writer = _Writer()
    root = writer.add(value)
    return json.dumps([writer.classes, writer.rows, root], separators=(",", ":"), ensure_ascii=False).encode()


def unpack(data: bytes) -> Any:
    """What :func:`pack` wrote.

    Raises:
        CodecError: for anything else.
    """
    try:
        with without_collections():
            classes, rows, root = json.loads(data)
            return _Reader([_class_of(name) for name in classes]).read(rows, root)
    except CodecError:
        raise
    except Exception as error:  # whatever damaged data leads to
        raise CodecError(f"no data of this version: {type(error).__name__}: {error}") from error


class _Writer:
    """Rows of the table, and where each value stands in it."""

    def __init__(self) -> None:
        self.classes: list[str] = []
        self.rows: list[list[Any]] = []
        self._equal: dict[Any, int] = {}
        self._same: dict[int, int] = {}
        self._alive: list[Any] = []

    def add(self, value: Any) -> Any:
        """What stands for a value: itself, or a list with the number of its row."""
        kind: Any = type(value)
        if value is None or kind is bool or kind is str or kind is int:
            return value
        if kind is float and math.isfinite(value):
            return value
        known = self._same.get(id(value))
        if known is not None:
            return [known]
        row, is_shared = self._row(kind, value)
        number = None
        if is_shared:
            key = json.dumps(row)
            number = self._equal.get(key)
            if number is None:
                number = self._equal[key] = len(self.rows)
                self.rows.append(row)
        else:
            number = len(self.rows)
            self.rows.append(row)
        self._same[id(value)] = number
        self._alive.append(value)  # so that no other value gets its id
        return [number]

    def _row(self, kind: Any, value: Any) -> tuple[list[Any], bool]:
        """How a value is written, and whether an equal one may stand for it."""
        add = self.add
        if isinstance(value, sympy.Basic):
            return self._expression(value), True
        if kind is tuple:
            return ["t", *map(add, value)], True
        if kind is list:
            return ["l", *map(add, value)], False
        if kind is frozenset or kind is set:
            items = sorted(value, key=lambda item: (type(item).__name__, str(item)))  # in any order, but one
            return ["s" if kind is frozenset else "S", *map(add, items)], kind is frozenset
        if isinstance(value, Mapping):
            return ["d", *(add(part) for item in value.items() for part in item)], False
        if kind is slice:
            return ["i", *map(add, (value.start, value.stop, value.step))], True
        if kind is bytes:
            return ["b", base64.b64encode(value).decode()], True
        if kind is float:
            return ["f", repr(value)], True
        if kind is complex:
            return ["z", repr(value.real), repr(value.imag)], True
        if (name := _name_of(kind)) is not None:
            if name not in self.classes:
                self.classes.append(name)
            at = self.classes.index(name)
            if isinstance(value, enum.Enum):
                return ["e", at, value.name], True
            fields = [add(getattr(value, field)) for field in _fields_of(kind)]
            return ["c", at, *fields], "__eq__" in vars(kind)
        raise CodecError(f"a {kind.__module__}.{kind.__qualname__} cannot be kept on disk")

    def _expression(self, value: Any) -> list[Any]:
        if value is sympy.true or value is sympy.false:
            return ["o", bool(value)]
        if value.is_Integer:
            return ["n", int(value)]
        if value.is_Rational:
            return ["r", int(value.p), int(value.q)]
        if value is sympy.oo or value is -sympy.oo:
            return ["O", 1 if value is sympy.oo else -1]
        if type(value) is sympy.Symbol:
            given = value._assumptions_orig
            if unknown := given.keys() - set(_ASSUMPTIONS):
                raise CodecError(f"symbol {value} is assumed to be {', '.join(sorted(unknown))}")
            return ["y", value.name, *(f"{name}={int(bool(given[name]))}" for name in sorted(given))]
        name = _function_names().get(value.func)
        if name is None:
            raise CodecError(f"{value.func} in an expression cannot be kept on disk")
        return ["x", name, *map(self.add, value.args)]


class _Reader:
    """Values of the rows, in order."""

    def __init__(self, classes: Sequence[type[Any]]) -> None:
        self._classes = classes
        self._values: list[Any] = []
        self._made: dict[str, Callable[[Sequence[Any]], Any]] = {
            "t": lambda row: tuple([self._of(part) for part in row[1:]]),
            "l": lambda row: [self._of(part) for part in row[1:]],
            "s": lambda row: frozenset(self._of(part) for part in row[1:]),
            "S": lambda row: {self._of(part) for part in row[1:]},
            "d": lambda row: {self._of(row[i]): self._of(row[i + 1]) for i in range(1, len(row), 2)},
            "i": lambda row: slice(*(self._of(part) for part in row[1:])),
            "b": lambda row: base64.b64decode(row[1], validate=True),
            "f": lambda row: float(row[1]),
            "z": lambda row: complex(float(row[1]), float(row[2])),
            "e": lambda row: self._classes[row[1]][row[2]],
            "c": self._dataclass,
            "o": lambda row: sympy.true if row[1] else sympy.false,
            "n": lambda row: sympy.Integer(row[1]),
            "r": lambda row: sympy.Rational(row[1], row[2]),
            "O": lambda row: sympy.oo * row[1],
            "y": _symbol,
            "x": lambda row: _function_of(row[1])(*[self._of(part) for part in row[2:]]),
        }

    def read(self, rows: Sequence[Any], root: Any) -> Any:
        """The value that ``root`` stands for."""
        for row in rows:
            self._values.append(self._made[row[0]](row))
        return self._of(root)

    def _of(self, part: Any) -> Any:
        return self._values[part[0]] if type(part) is list else part

    def _dataclass(self, row: Sequence[Any]) -> Any:
        kind = self._classes[row[1]]
        names, values = _fields_of(kind), [self._of(part) for part in row[2:]]
        if len(names) != len(values):
            raise CodecError(f"{kind.__name__} has other fields in this version")
        return kind(**dict(zip(names, values, strict=True)))


def _symbol(row: Sequence[Any]) -> sympy.Symbol:
    given = dict(part.split("=") for part in row[2:])
    return sympy.Symbol(row[1], **{name: bool(int(value)) for name, value in given.items()})
