"""Graphs that Dynamo has traced, and another process has compiled: no AOTAutograd, no passes, no kernels.

A graph is known by what it does: its operators and arguments, the layouts of its inputs in symbols, and what was taken
for granted of those.  What its compilation became is learned from the first call, and kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import graph_log, ir
from mosaic_compiler.compat import trees
from mosaic_compiler.compat.symbols import conditions_in
from mosaic_compiler.compat.tensors import may_be_replaced
from mosaic_compiler.compat.tracing import fake_mode_among
from mosaic_compiler.disk.folder import Folder, sources_digest, the_folder
from mosaic_compiler.errors import CacheError
from mosaic_compiler.ir.keys import structural_key
from mosaic_compiler.kernels.artifacts import machine_of
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.runtime.bindings import Ran, learn, watching
from mosaic_compiler.runtime.served import MissingError, Served, keep

logger = logging.getLogger("mosaic_compiler")

_KNOWN = ("torch", "_operator", "operator", "math", "builtins", "")

_mode: ContextVar[str] = ContextVar("graphs_are_kept", default="")


@contextmanager
def _in_mode(mode: str) -> Iterator[None]:
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def not_kept() -> AbstractContextManager[None]:
    """Graphs that this thread compiles inside of the ``with`` block are compiled, and kept by whoever asks for it."""
    return _in_mode("off")


def made_anew() -> AbstractContextManager[None]:
    """Graphs that this thread compiles inside of the ``with`` block are compiled, whatever is kept, and kept."""
    return _in_mode("anew")


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
        return _First(folder, key, compiler(), _conditions(inputs))
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


def _conditions(inputs: Sequence[Any]) -> list[Any]:
    mode = fake_mode_among(inputs)
    return conditions_in(None if mode is None else mode.shape_env)


def _key(module: fx.GraphModule, inputs: Sequence[Any], options: MosaicOptions) -> str | None:
    """What a graph does, as a hash; ``None`` where that cannot be said."""
    modes = trees.modes()
    if modes is None:
        return None
    numbers = {node: number for number, node in enumerate(module.graph.nodes)}
    device = torch.device("cpu")
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr") or (node.op == "call_function" and not _is_known(node.target)):
            return None
    nodes = structural_key(module.graph.nodes, lambda _: numbers.__getitem__, lambda _: None, _name_of)
    parts: list[Any] = [trees.shared_memory(inputs)]
    for value in inputs:
        if isinstance(value, Tensor):
            device = value.device if device.type == "cpu" else device
            if value.layout is not torch.strided:
                return None
        parts.append(_described(value))
    conditions = sorted(map(str, _conditions(inputs)))
    more = (modes, options.for_passes, machine_of(device), sources_digest())
    return hashlib.sha256(repr((nodes, parts, conditions, more)).encode()).hexdigest()


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


def _is_known(target: Any) -> bool:
    is_of_a_known_module = (getattr(target, "__module__", "") or "").partition(".")[0] in _KNOWN
    return is_of_a_known_module and not may_be_replaced(target)


def _name_of(node: fx.Node) -> str:
    """What a node calls, without addresses."""
    target: Any = node.target
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}.{target}".partition(" at 0x")[0]
