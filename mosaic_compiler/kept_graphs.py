"""Graphs that Dynamo has traced, and another process has compiled: no AOTAutograd, no passes, no kernels.

A graph is known by what it does: its operators and arguments, the layouts of its inputs in symbols, and what was taken
for granted of those.  What its compilation became is learned from the first call, and kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import graph_log, ir
from mosaic_compiler.compat import trees
from mosaic_compiler.compat.symbols import conditions_in
from mosaic_compiler.disk.folder import Folder, sources_digest, the_folder
from mosaic_compiler.errors import CacheError
from mosaic_compiler.kernels.artifacts import machine_of
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.runtime.bindings import Ran, learn, watching
from mosaic_compiler.runtime.served import MissingError, Served, keep

logger = logging.getLogger("mosaic_compiler")

_KNOWN = ("torch", "_operator", "operator", "math", "builtins", "")

_mode: ContextVar[str] = ContextVar("graphs_are_kept", default="")


@contextmanager
def not_kept() -> Iterator[None]:
    """Graphs that this thread compiles inside of the ``with`` block are compiled, and kept by whoever asks for it."""
    token = _mode.set("off")
    try:
        yield
    finally:
        _mode.reset(token)


@contextmanager
def made_anew() -> Iterator[None]:
    """Graphs that this thread compiles inside of the ``with`` block are compiled, whatever is kept, and kept."""
    token = _mode.set("anew")
    try:
        yield
    finally:
        _mode.reset(token)


def kept_or(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    options: MosaicOptions,
    compiler: Callable[[], Callable[..., Any]],
    tell: Callable[[Any], None],
) -> Callable[..., Any]:
    """What another process has compiled of a graph; else what ``compiler()`` returns, which is kept when it runs first.

    Args:
        module, inputs: Dynamo's graph, and its fake inputs.
        tell: called with a step that is served.
    """
    folder = None if options.dump is not None or _mode.get() == "off" else the_folder()
    key = None if folder is None else _key(module, inputs, options)
    if folder is None or key is None:
        return compiler()
    served = None if _mode.get() == "anew" else Served.read(folder, key, options, [])
    if served is None or not served.can_serve():
        return _First(folder, key, compiler(), _conditions(module))
    served.step.end_at(graph_log.compiled(served.step.fallbacks))
    tell(served.step)
    return _Hit(served)


class _First:
    """A compiled graph whose first call is watched."""

    def __init__(self, folder: Folder, key: str, compiled: Callable[..., Any], conditions: Sequence[Any]) -> None:
        self._compiled, self._is_first = compiled, True
        self._keep = folder, key, conditions

    def __call__(self, *args: Any) -> Any:
        if not self._is_first:
            return self._compiled(*args)
        self._is_first = False
        ran: list[Ran] = []
        with watching(ran.append):
            result = self._compiled(*args)
        folder, key, conditions = self._keep
        try:
            if len(ran) != 1:
                raise CacheError("its compiled graph runs several times in a call")
            keep(folder, key, ran[0][0], learn(ran[0], args, [], result, conditions), "a graph")
        except CacheError as error:
            logger.info("mosaic: a graph is compiled again in every process: %s", error)
        return result


class _Hit:
    """A graph that another process has compiled.  Its kinds of steps are kept if somebody had asked for them; a session
    that finds none has it compiled again."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def __call__(self, *args: Any) -> Any:
        if not self._served.can_serve():
            raise MissingError
        return self._served(args)


def _conditions(module: fx.GraphModule) -> list[Any]:
    mode = ir.fake_mode_of(module) or _mode_of(module)
    return conditions_in(None if mode is None else mode.shape_env)


def _mode_of(module: fx.GraphModule) -> Any:
    for node in module.graph.find_nodes(op="placeholder"):
        if (mode := getattr(node.meta.get("example_value"), "fake_mode", None)) is not None:
            return mode
    return None


def _key(module: fx.GraphModule, inputs: Sequence[Any], options: MosaicOptions) -> str | None:
    """What a graph does, as a hash; ``None`` where that cannot be said."""
    modes = trees.modes()
    if modes is None:
        return None
    numbers = {node: number for number, node in enumerate(module.graph.nodes)}
    device = torch.device("cpu")
    parts: list[Any] = []
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr") or (node.op == "call_function" and not _is_known(node.target)):
            return None
        target = node.target if isinstance(node.target, str) else _name_of(node.target)
        given = fx.node.map_arg((node.args, dict(node.kwargs)), lambda operand: _named(numbers[operand]))
        parts.append((node.op, target, repr(given)))
    for value in inputs:
        if isinstance(value, Tensor):
            device = value.device if device.type == "cpu" else device
            if value.layout is not torch.strided:
                return None
        parts.append(_described(value))
    conditions = sorted(map(str, _conditions(module)))
    more = (modes, options.for_passes, machine_of(device), sources_digest())
    return hashlib.sha256(repr((parts, conditions, more)).encode()).hexdigest()


def _described(value: Any) -> Any:
    """The layout of an input, in symbols."""
    if isinstance(value, Tensor):
        numbers = [str(ir.expr_of(n)) for n in (*value.shape, *value.stride(), value.storage_offset())]
        flags = value.requires_grad, value.is_conj(), value.is_neg()
        return type(value).__name__, str(value.dtype), str(value.device), numbers, flags
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expr = ir.expr_of(value)
        return type(value).__name__, str(expr) if isinstance(expr, sympy.Basic) else repr(expr)
    return type(value).__name__, repr(value)


class _Operand:
    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _named(number: int) -> Any:
    return _Operand(number)


def _is_known(target: Any) -> bool:
    return (getattr(target, "__module__", "") or "").partition(".")[0] in _KNOWN


def _name_of(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}.{target}".partition(" at 0x")[0]
