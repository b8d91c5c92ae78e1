"""Fused kernels: clusters compiled by Inductor, writing into given buffers.

The only module that touches Inductor's private API (``compile_fx_inner``, the decomposition table, the lowerings).

One kernel serves every size: it is compiled for symbolic sizes, once per structure, whatever the symbols are called in
the graph.  Sizes that follow from its operands are read off them at each call.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from mosaic_compiler import ir
from mosaic_compiler.clusters import Cluster
from mosaic_compiler.errors import ArenaError

_HINT = {"cuda": 4096, "cpu": 512}
"""Sizes that kernels are tuned for: rows of a chunk."""

_WIDE_HINT = 1 << 26
_WIDE = (1 << 31) - 1
"""Elements, or elements that a strided operand spans, above which 64-bit indices are used."""

_WIDE_ROW = 1 << 16
"""Elements per row (a vocabulary) from which a GPU's kernel has 64-bit indices from the start: one compilation for all
lengths, at the same speed (a softmax over 8,192 x 152,064 took 12.2 ms on an H100 either way)."""

MOST_ADDED = 8
"""Elements that a kernel adds one by one, wherever they lie."""

_SETTINGS: Mapping[str, Any] = {
    "unroll_reductions_threshold": MOST_ADDED + 1,
    "force_pointwise_cat": True,
    "realize_reads_threshold": 64,
    "realize_acc_reads_threshold": 64,
    "realize_opcount_threshold": 200,
    "size_asserts": False,
    "compile_threads": 1,
    "triton.cudagraphs": False,
}

_Read: TypeAlias = "Callable[[Sequence[Any]], int]"


@functools.cache
def supports(op: OpOverload) -> bool:
    """Inductor can compile this op as a part of a kernel."""
    from torch._inductor.lowering import fallbacks, lowerings

    return op in _decompositions() or (op in lowerings and op not in fallbacks)


def is_small_sum(node: fx.Node) -> bool:
    """A sum over a dim of few elements, other than the last one: kernels add them one by one, as a pointwise op."""
    if node.target is not _aten.sum.dim_IntList:
        return False
    source, dims = ir.only_tensor(node.all_input_nodes[0]), node.args[1]
    if not isinstance(dims, Sequence) or len(dims) != 1 or not isinstance(dims[0], int):
        return False
    dim = dims[0] % max(source.dim(), 1)
    size = ir.expr_of(source.shape[dim]) if source.dim() else sympy.Integer(0)
    return dim != source.dim() - 1 and bool(size.is_Integer) and 1 < int(size) <= MOST_ADDED


@functools.cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    import torch._inductor.lowering  # noqa: F401  (registers decompositions)
    from torch._inductor.decomposition import select_decomp_table

    table: Mapping[Any, Callable[..., Any]] = select_decomp_table()
    return table


@dataclass(frozen=True)
class Failure:
    """Why a cluster runs op by op."""

    name: str
    reason: str


class FusedKernel:
    """The kernel of one cluster structure.

    Call it with the cluster's operands, then one destination for each result that does not go into an operand.
    Operands and destinations must have the dtypes, devices and relative strides that the cluster's metadata says.

    Attributes:
        failure: set when the kernel cannot be compiled, or would need memory that the plan does not have; calls run
            op by op then.
    """

    def __init__(self, form: _Form) -> None:
        self._cluster = form.cluster
        self._form = form
        self._artifacts: dict[bool, Callable[[list[Any]], Any]] = {}
        self._lock = threading.Lock()
        self.failure: Failure | None = None

    def __call__(self, *arguments: Any) -> None:
        self.bind(*arguments)()

    def bind(self, *arguments: Any) -> Callable[[], Any]:
        """The call with these arguments, tensors that stay where they are or are moved by ``set_``."""
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        artifact = self.compile(any(_span(tensor) > _WIDE for tensor in tensors))
        if artifact is None:
            return functools.partial(self._run_op_by_op, arguments)
        return functools.partial(_call, artifact, [*self._form.sizes(arguments), *tensors])

    def compile(self, wide: bool = False) -> Callable[[list[Any]], Any] | None:
        """Compile, unless that was done already; ``None`` if it cannot be.  ``wide``: with 64-bit indices."""
        wide = wide or self._form.has_wide_rows
        with self._lock:
            if wide not in self._artifacts and self.failure is None:
                try:
                    self._artifacts[wide] = self._compiled(wide)
                except _TooMuchMemory as error:
                    self.failure = Failure("fused-scratch", str(error))
                except Exception as error:  # whatever Inductor or its compilers raise: the cluster still runs
                    text = str(error).strip().splitlines() or [""]
                    self.failure = Failure("unfused-cluster", f"{type(error).__name__}: {text[0][:200]}")
            return self._artifacts.get(wide)

    def _compiled(self, wide: bool) -> Callable[[list[Any]], Any]:
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.virtualized import V

        if self._form.problem:
            raise ValueError(self._form.problem)
        with torch.inference_mode(False), torch.no_grad(), config.patch(**_SETTINGS):
            mode, examples = self._form.examples(_WIDE_HINT if wide else None)
            with mode:
                graph = make_fx(self._form.function(), _decompositions(), tracing_mode="real")(*examples)
            with V.set_fake_mode(mode), tracing(TracingContext(mode)):
                compiled: Any = compile_fx_inner(graph, examples)
        self._form.check_allocations(compiled.source_code)
        call: Callable[[list[Any]], Any] = compiled.current_callable
        return call

    def _run_op_by_op(self, arguments: Sequence[Any]) -> None:
        count, into = self._form.operands, self._cluster.into
        results = [result for result, at in zip(self._cluster(*arguments[:count]), into, strict=True) if at is None]
        for out, result in zip(arguments[count:], results, strict=True):
            out.copy_(result)


def _call(artifact: Callable[[list[Any]], Any], arguments: list[Any]) -> None:
    artifact(arguments.copy())


class _TooMuchMemory(Exception):  # noqa: N818
    pass


class _Form:
    """A cluster's operands and destinations in terms of symbols of its own: s0, s1, ... in order of appearance."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        graph = cluster.body.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        results: Any = graph.output_node().args[0]
        self.operands = len(placeholders)
        self.values = [ir.value_of(node) for node in placeholders]
        self.outs = [ir.only_tensor(node) for node, into in zip(results, cluster.into, strict=True) if into is None]
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        for value in self.values:
            self._rename(value)
        for tensor in self.outs:
            self._rename(tensor)
        for node in graph.nodes:
            self._rename(ir.tensors_of(node))
        self.device = ir.only_tensor(results[0]).device
        found = self._readers()
        missing = self.symbols.keys() - found.keys()
        self.problem = f"no operand says what {', '.join(map(str, missing))} is" if missing else ""
        self.readers: list[_Read] = [found[symbol] for symbol in self.symbols if symbol in found]
        self._layouts = [
            (v.dtype, [ir.expr_of(s) for s in v.shape], [ir.expr_of(s) for s in strides])
            if isinstance(v, torch.Tensor)
            else None
            for v, strides in (
                *((v, _strides(v, v.stride()) if isinstance(v, torch.Tensor) else ()) for v in self.values),
                *((out, _strides(out, ir.own_strides(out))) for out in self.outs),
            )
        ]
        self._expected: dict[tuple[int, ...], list[Any]] = {}
        tensors = [value for value in (*self.values, *self.outs) if isinstance(value, torch.Tensor)]
        self.has_wide_rows = self.device.type == "cuda" and any(
            math.prod(size for size in tensor.shape if isinstance(size, int)) >= _WIDE_ROW for tensor in tensors
        )

    def _rename(self, value: Any) -> None:
        numbers = [n for item in (value if isinstance(value, tuple) else (value,)) for n in _numbers(item)]
        for number in numbers:
            for symbol in sorted(ir.expr_of(number).free_symbols if ir.is_symbolic_number(number) else (), key=str):
                self.symbols.setdefault(symbol, sympy.Symbol(f"s{len(self.symbols)}", integer=True, positive=True))

    def sizes(self, arguments: Sequence[Any]) -> list[int]:
        """The values of the symbols.

        Raises:
            ArenaError: if a tensor does not have the layout that the kernel is compiled for (it would write elsewhere).
        """
        values = [read(arguments) for read in self.readers]
        key = tuple(values)
        if key not in self._expected:
            known = dict(zip(self.symbols, map(sympy.Integer, values), strict=True))
            self._expected[key] = [
                None
                if layout is None
                else (layout[0], *([int(n.xreplace(known)) for n in part] for part in layout[1:]))
                for layout in self._layouts
            ]
        for argument, expected in zip(arguments, self._expected[key], strict=True):
            if expected is None:
                continue
            dtype, shape, strides = expected
            found = [step for step, size in zip(argument.stride(), shape, strict=True) if size > 1]
            wanted = [step for step, size in zip(strides, shape, strict=True) if size > 1]
            if argument.dtype != dtype or list(argument.shape) != shape or found != wanted:
                raise ArenaError(
                    f"a fused kernel for {dtype} {shape} with strides {strides} was given {argument.dtype} "
                    f"{list(argument.shape)} with strides {list(argument.stride())}"
                )
        return values

    def _readers(self) -> dict[sympy.Symbol, _Read]:
        """Where in the arguments the value of each symbol stands."""
        found: dict[sympy.Symbol, _Read] = {}
        for index, value in enumerate((*self.values, *self.outs)):
            if isinstance(value, torch.Tensor):
                for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
                    self._offer(found, ir.expr_of(size), functools.partial(_read_size, index, dim))
                    if ir.expr_of(size) != 1:
                        self._offer(found, ir.expr_of(stride), functools.partial(_read_stride, index, dim))
            else:
                self._offer(found, ir.expr_of(value), functools.partial(_read_number, index))
        return found

    def _offer(self, found: dict[sympy.Symbol, _Read], expr: sympy.Expr, read: _Read) -> None:
        """``expr`` is read; a multiple of one symbol says what the symbol is."""
        if len(expr.free_symbols) != 1:
            return
        (symbol,) = expr.free_symbols
        factor = expr / symbol
        if symbol not in found and factor.is_Integer:
            found[symbol] = read if factor == 1 else functools.partial(_divided, read, int(factor))

    def key(self) -> Any:
        """Equal for clusters that the same kernel can run."""
        index: dict[fx.Node, int] = {}
        parts: list[Any] = [self.cluster.into]
        for node in self.cluster.body.graph.nodes:
            index[node] = len(index)
            arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _Position(index[n]))  # type: ignore[arg-type, return-value]
            layout = ir.layout_of(ir.value_of(node))
            parts.append((node.op, str(node.target), repr(arguments), self._renamed(layout)))
        return tuple(parts)

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._renamed(item) for item in value)
        return value.xreplace(self.symbols) if isinstance(value, sympy.Basic) else value

    # ---------------------------------------------------------------------------------------- compiling
    def examples(self, hint: int | None) -> tuple[FakeTensorMode, list[Any]]:
        """Symbols, then tensors, as fakes of a mode of their own."""
        environment = ShapeEnv()
        mode = FakeTensorMode(shape_env=environment)
        hints: dict[sympy.Symbol, int] = {}
        names: dict[sympy.Symbol, sympy.Symbol] = {}
        numbers: list[Any] = []
        for old, new in self.symbols.items():
            source = ConstantSource(f"mosaic_{new}")
            size = self._hint(len(hints)) if hint is None else hint
            symbol = environment.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            names[old], hints[symbol] = symbol, size
            numbers.append(environment.create_symintnode(symbol, hint=size, source=source))

        def number(value: Any) -> Any:
            expr = sympy.sympify(ir.expr_of(value)).xreplace(names)
            if expr.is_Integer:
                return int(expr)
            return environment.create_symintnode(expr, hint=int(expr.xreplace(hints)))

        def tensor(value: torch.Tensor, strides: Sequence[Any]) -> torch.Tensor:
            shape, stride = [number(size) for size in value.shape], [number(step) for step in strides]
            made = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
            return made if _is_aligned(value, strides) else torch.as_strided(made, shape, stride, 1)

        self._number = number
        with mode:
            tensors = [
                tensor(value, _strides(value, value.stride()))
                for value in self.values
                if isinstance(value, torch.Tensor)
            ]
            tensors += [tensor(out, _strides(out, ir.own_strides(out))) for out in self.outs]
        self._hints = {old: hints[names[old]] for old in self.symbols}
        return mode, [*numbers, *tensors]

    def _hint(self, position: int) -> int:
        return _HINT.get(self.device.type, _HINT["cuda"]) + 8 * position

    def function(self) -> Callable[..., tuple[()]]:
        """The cluster as a function of symbols and tensors, that writes its results into the last ones.

        A result is written as soon as it is known, and read from there: written at the end, it would get memory of its
        own as well.
        """
        graph = self.cluster.body.graph
        results: Any = graph.output_node().args[0]

        def run(*arguments: Any) -> tuple[()]:
            tensors = iter(arguments[len(self.symbols) :])
            operands = [next(tensors) if isinstance(v, torch.Tensor) else self._number(v) for v in self.values]
            places = {
                result: next(tensors) if into is None else operands[into]
                for result, into in zip(results, self.cluster.into, strict=True)
            }
            given = iter(operands)
            values: dict[fx.Node, Any] = {}
            for node in graph.nodes:
                if node.op == "placeholder":
                    values[node] = next(given)
                elif node.op == "call_function":
                    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                    values[node] = node.target(*args, **kwargs)
                    if node in places:
                        values[node] = places[node].copy_(values[node])
            return ()

        return run

    def check_allocations(self, source: str) -> None:
        """Raise if the generated code allocates more than a few numbers per row.

        :func:`scratch_bytes` is what the plan has for it.
        """
        most = sympy.Integer(max(self._hints.values(), default=1))
        allowed = int(scratch_bytes(self.cluster).xreplace(dict.fromkeys(self.symbols, most)))
        total = 0
        for shape, dtype in _ALLOCATION.findall(source):
            elements = 1
            for factor in filter(None, map(str.strip, shape.split(","))):
                expr = sympy.sympify(factor)
                elements *= int(expr.xreplace(dict.fromkeys(expr.free_symbols, most)))
            total += elements * getattr(torch, dtype).itemsize
        if total > allowed + 4096:
            raise _TooMuchMemory(f"its kernel would allocate {total} bytes at {most} rows")


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one in memory, or elements in all if that is more (a broadcast operand)."""
    if tensor.is_contiguous():
        return tensor.numel()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return max(tensor.numel(), 1 + last)


_ALLOCATION = re.compile(r"= empty_strided(?:_cpu|_cuda)?\(\(([^)]*)\), \([^)]*\), torch\.(\w+)")


def _is_aligned(tensor: torch.Tensor, strides: Sequence[Any]) -> bool:
    """Every slice of rows of it begins at a multiple of 16 bytes (storages do)."""
    outer = [ir.expr_of(stride) for stride, size in zip(strides, tensor.shape, strict=True) if ir.expr_of(size) != 1]
    largest = max(outer, key=ir.magnitude, default=sympy.Integer(16))
    numbers = (largest * tensor.dtype.itemsize / 16, ir.expr_of(tensor.storage_offset()) * tensor.dtype.itemsize / 16)
    return all(sympy.sympify(number).is_integer is True for number in numbers)


def _numbers(value: Any) -> list[Any]:
    """What a cluster depends on: sizes, and the strides of more than one element."""
    if not isinstance(value, torch.Tensor):
        return [] if value is None else [value]
    strides = [step for size, step in zip(value.shape, value.stride(), strict=True) if ir.expr_of(size) != 1]
    return [*value.shape, *strides, value.storage_offset()]


def _strides(tensor: torch.Tensor, given: Sequence[Any]) -> list[Any]:
    """Strides with those of single elements (they may be a longer tensor's) as if they were dense."""
    strides, dense = list(given), 1
    for dim in reversed(range(tensor.dim())):
        if ir.expr_of(tensor.shape[dim]) == 1:
            strides[dim] = dense
        dense = strides[dim] * tensor.shape[dim]
    return strides


def scratch_bytes(cluster: Cluster) -> sympy.Expr:
    """What a cluster's kernel may allocate while it runs: some numbers per row for each of its reductions."""
    total: sympy.Expr = sympy.Integer(0)
    for node in cluster.body.graph.nodes:
        if is_small_sum(node):
            continue
        if isinstance(node.target, OpOverload) and (factor := _SCRATCH.get(node.target)) is not None:
            tensor = ir.only_tensor(node)
            elements = sympy.prod([ir.expr_of(size) for size in tensor.shape])
            if factor < 0:  # results as large as the operand: per row of it
                elements, factor = elements / ir.expr_of(tensor.shape[-1]), -factor
            total += factor * elements
    return sympy.expand(total)


_aten = torch.ops.aten

_SCRATCH: Mapping[OpOverload, int] = {
    _aten.mean.dim: 8, _aten.sum.dim_IntList: 8, _aten.amax.default: 8, _aten.amin.default: 8,
    _aten.argmax.default: 8, _aten.argmin.default: 8, _aten.any.dim: 1, _aten.all.dim: 1,
    _aten._softmax.default: -16, _aten._log_softmax.default: -16,
}  # fmt: skip
"""Bytes per row and reduction, of the results that Inductor keeps in memory."""


class _Position:
    """Prints as the position of a node (inside of ``repr`` of arguments)."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _read_size(index: int, dim: int, arguments: Sequence[Any]) -> int:
    return int(arguments[index].shape[dim])


def _read_stride(index: int, dim: int, arguments: Sequence[Any]) -> int:
    return int(arguments[index].stride(dim))


def _read_number(index: int, arguments: Sequence[Any]) -> int:
    return int(arguments[index])


def _divided(read: _Read, factor: int, arguments: Sequence[Any]) -> int:
    return read(arguments) // factor


_kernels: dict[Any, FusedKernel] = {}
_kernels_lock = threading.Lock()


@functools.lru_cache(maxsize=4096)
def kernel_for(cluster: Cluster) -> FusedKernel:
    """The kernel of a cluster; equal structures (layers, models, lengths) share one."""
    form = _Form(cluster)
    key = form.key()
    with _kernels_lock:
        if key not in _kernels:
            _kernels[key] = FusedKernel(form)
        return _kernels[key]
