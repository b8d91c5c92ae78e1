"""Where the inputs of a graph come from when its function is called, learned from one call of it, by identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor

from mosaic_compiler.compat import trees
from mosaic_compiler.errors import CacheError
from mosaic_compiler.planning.facts import Bindings
from mosaic_compiler.planning.lowered import Input, Reading, TensorFacts

Ran: TypeAlias = "tuple[Any, list[Any], list[Any]]"
"""A step that ran, its inputs, and what it returned."""

_watching: ContextVar[Callable[[Ran], None] | None] = ContextVar("watching", default=None)


@contextmanager
def watching(observe: Callable[[Ran], None]) -> Iterator[None]:
    """Call ``observe`` with every step that this thread runs inside of the ``with`` block, and what went in and out."""
    token = _watching.set(observe)
    try:
        yield
    finally:
        _watching.reset(token)


def told(step: Any, inputs: Sequence[Any], run: Callable[[], list[Any]]) -> list[Any]:
    """Run a step, and tell who watches."""
    observe = _watching.get()
    if observe is None:
        return run()
    given = list(inputs)
    results = run()
    observe((step, given, list(results)))
    return results


def learn(
    ran: Ran, arguments: Sequence[Any], tensors: Sequence[Tensor | None], result: Any, conditions: Sequence[Any]
) -> Bindings:
    """How one call of a function became one run of a step.

    Args:
        arguments: the leaves of the function's arguments.
        tensors: what the function refers to.
        result: what it returned.
        conditions: what was taken for granted of sizes.

    Raises:
        CacheError: if an input or result is neither an argument nor anything that the function refers to.
    """
    step, inputs, results = ran
    known = step.kept.inputs
    places = {id(tensor): ("tensor", number) for number, tensor in enumerate(tensors) if tensor is not None}
    places |= {id(leaf): ("argument", number) for number, leaf in enumerate(arguments) if isinstance(leaf, Tensor)}
    found: list[tuple[str, Any]] = []
    is_same_order = len(arguments) == len(inputs)
    for index, (given, value) in enumerate(zip(known, inputs, strict=True)):
        if not isinstance(value, Tensor) and is_same_order and type(arguments[index]) is int:
            found.append(("argument", index))
        elif isinstance(value, Tensor):
            found.append(places.get(id(value)) or _float(value))
        else:
            found.append(_number(given, known))
        if not found[-1][0]:
            raise CacheError(f"its input {given.name} is made in front of the graph")
    symbols = {reading.symbol for reading in step.kept.readings}
    bound = {number for what, number in found if what == "argument"}
    return Bindings(
        inputs=tuple(found),
        outputs=tuple(outputs_of(result, arguments, results)),
        spec=spec_of(result),
        conditions=conditions_on(symbols, conditions),
        arguments=len(arguments),
        unread=tuple(
            (number, tuple(leaf.shape), leaf.is_contiguous())
            for number, leaf in enumerate(arguments)
            if isinstance(leaf, Tensor) and number not in bound
        ),
        exact=tuple((number, leaf) for number, leaf in enumerate(arguments) if is_symbolic(leaf)),
    )


def is_symbolic(leaf: Any) -> bool:
    """A whole number among the arguments that a graph has as a symbol: 0 and 1 are numbers, as sizes are."""
    return type(leaf) is int and leaf >= 2


def conditions_on(symbols: Set[sympy.Symbol], conditions: Sequence[Any]) -> tuple[Any, ...]:
    """What is to be looked at, of what was taken for granted of sizes.

    Raises:
        CacheError: for a condition on something else than these symbols, but for what one of those others is at least
            or at most: what no input says can be any size.
    """
    wanted = [condition for condition in conditions if condition not in (True, sympy.true)]
    for condition in wanted:
        if not condition.free_symbols <= symbols and not _is_range(condition):
            raise CacheError(f"it was compiled for {condition}, which no input says")
    return tuple(condition for condition in wanted if condition.free_symbols <= symbols)


def _is_range(condition: Any) -> bool:
    """It says what one symbol is at least, or at most."""
    return isinstance(condition, (sympy.Ge, sympy.Le)) and condition.lhs.is_Symbol and condition.rhs.is_Integer


def _float(value: Tensor) -> tuple[str, Any]:
    """A Python float, which Dynamo passes in a tensor: it is one of the arguments, or of what the function refers to,
    so it is the same one wherever this graph is used."""
    is_float = value.dim() == 0 and value.dtype == torch.float64 and value.device.type == "cpu"
    return ("float", float(value)) if is_float else ("", None)


def _number(given: Input, known: Sequence[Input]) -> tuple[str, Any]:
    """A number among the inputs: itself, or where a tensor says it."""
    if given.number is None:
        return "", None
    if given.number.is_Integer:
        return "value", int(given.number)
    for index, other in enumerate(known):
        if other.tensor is not None and given.number in other.tensor.shape:
            return "size", Reading(given.number, "size", index, other.tensor.shape.index(given.number))
    return "", None


def spec_of(result: Any) -> str:
    """How the leaves of a result are put together, as text.

    Raises:
        CacheError: if that cannot be written down.
    """
    try:
        return trees.written(trees.flatten(result)[1])
    except Exception as error:  # whatever a container raises that cannot be named
        raise CacheError(f"what it returns cannot be put together again: {error}") from None


def outputs_of(result: Any, arguments: Sequence[Any], results: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """What the leaves of a result are, see :class:`~mosaic_compiler.planning.facts.Bindings`.

    Raises:
        CacheError: for one that is neither an argument nor a result of the graph, or is no tensor and may vary.
    """
    places = {id(leaf): ("argument", number) for number, leaf in enumerate(arguments) if isinstance(leaf, Tensor)}
    places |= {id(value): ("result", number) for number, value in enumerate(results) if isinstance(value, Tensor)}
    for leaf in trees.flatten(result)[0]:
        if isinstance(leaf, Tensor):
            if id(leaf) not in places:
                raise CacheError("it returns a tensor that is made behind the graph")
            yield places[id(leaf)]
        elif leaf is None or isinstance(leaf, (bool, str)):
            yield "value", leaf
        else:
            raise CacheError(f"it returns a {type(leaf).__name__}, which may depend on sizes")


class Caller:
    """Calls a step as the function would be called.

    Args:
        run: the step.
        inputs: its inputs, as data.
        readings: where its symbols have their values.
        tensors: what the function refers to.
    """

    def __init__(
        self,
        bindings: Bindings,
        run: Callable[[Sequence[Any]], list[Any]],
        inputs: Sequence[Input],
        readings: Sequence[Reading],
        tensors: Sequence[Tensor | None],
    ) -> None:
        self._bindings, self._run = bindings, run
        self._spec = trees.read(bindings.spec)
        if any(tensors[what] is None for kind, what in bindings.inputs if kind == "tensor"):
            raise CacheError("a tensor that it refers to is gone")
        self._given = [
            tensors[what] if kind == "tensor" else torch.tensor(what, dtype=torch.float64) if kind == "float" else None
            for kind, what in bindings.inputs
        ]
        self._arguments = [(at, what) for at, (kind, what) in enumerate(bindings.inputs) if kind == "argument"]
        self._numbers = [(at, what) for at, (kind, what) in enumerate(bindings.inputs) if kind in ("size", "value")]
        self._facts = [(number, inputs[at].tensor, inputs[at].number) for at, number in self._arguments]
        self._readings = list(readings)
        self._known: dict[Any, bool] = {}

    def accepts(self, arguments: Sequence[Any]) -> bool:
        """It was compiled for arguments of such sizes."""
        if len(arguments) != self._bindings.arguments:
            return False
        key = tuple(
            (leaf.shape, leaf.stride()) if isinstance(leaf, Tensor) else leaf
            for leaf in arguments
            if isinstance(leaf, (Tensor, int))
        )
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._fits(arguments)
        return known

    def _fits(self, arguments: Sequence[Any]) -> bool:
        try:
            values = self._values(arguments)
        except (IndexError, AttributeError):
            return False
        for number, sizes, is_contiguous in self._bindings.unread:
            leaf = arguments[number]
            if leaf.is_contiguous() != is_contiguous or not is_contiguous or leaf.dim() != len(sizes):
                return False
            for size, known in zip(leaf.shape, sizes, strict=True):
                if size < 2 if known is None else size != (known if isinstance(known, int) else values[known]):
                    return False
        if any(arguments[number] != value for number, value in self._bindings.exact):
            return False
        for number, facts, counted in self._facts:
            leaf = arguments[number]
            if isinstance(leaf, Tensor) and facts is not None:
                if not _is_laid_out(leaf, facts, values):
                    return False
            elif counted is None or counted.xreplace(values) != leaf:
                return False
        return all(bool(condition.xreplace(values)) for condition in self._bindings.conditions)

    def _values(self, arguments: Sequence[Any]) -> Mapping[sympy.Symbol, sympy.Integer]:
        found: dict[sympy.Symbol, sympy.Integer] = {}
        inputs = self.inputs(arguments)
        for reading in self._readings:
            value = inputs[reading.index]
            if reading.what == "size":
                value = value.shape[reading.dim]
            elif reading.what == "stride":
                value = value.stride()[reading.dim]
            elif reading.what == "offset":
                value = value.storage_offset()
            found[reading.symbol] = sympy.Integer(int(value))
        return found

    def inputs(self, arguments: Sequence[Any]) -> list[Any]:
        """The step's inputs."""
        values = list(self._given)
        for at, number in self._arguments:
            values[at] = arguments[number]
        for at, what in self._numbers:
            values[at] = _size(values[what.index], what.dim) if isinstance(what, Reading) else what
        return values

    def __call__(self, arguments: Sequence[Any]) -> Any:
        """Run the step; what the function returns."""
        results = self._run(self.inputs(arguments))
        leaves = [
            results[what] if kind == "result" else arguments[what] if kind == "argument" else what
            for kind, what in self._bindings.outputs
        ]
        return trees.unflatten(leaves, self._spec)


def _is_laid_out(leaf: Tensor, facts: TensorFacts, values: Mapping[sympy.Symbol, sympy.Integer]) -> bool:
    """Sizes and strides are what was compiled for; the stride of a size of 0 or 1 does not count."""
    if leaf.layout is not torch.strided or leaf.dim() != len(facts.shape):
        return False
    if leaf.storage_offset() != facts.offset.xreplace(values):
        return False
    for size, step, wanted, stride in zip(leaf.shape, leaf.stride(), facts.shape, facts.strides, strict=True):
        if wanted.xreplace(values) != size or (size > 1 and stride.xreplace(values) != step):
            return False
    return True


def _size(tensor: Any, dim: int) -> int:
    found: int = tensor.shape[dim]
    return found
