"""Fused kernels: clusters compiled by Inductor, writing into given buffers.

The only module that touches Inductor's private API (``compile_fx_inner``, the decomposition table, the lowerings).

One kernel serves every size: it is compiled for symbolic sizes, once per structure, whatever the symbols are called in
the graph.  Sizes that follow from its operands are read off them at each call.

Inductor generates code here and leaves it to worker processes (of its own pool) to compile it: while they do, code is
generated for the next kernel.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch._ops import OpOverload

from mosaic_compiler.book import MOST_ADDED
from mosaic_compiler.compat.inductor import best_instructions, caches_in, with_instructions
from mosaic_compiler.compat.tracing import make_fx
from mosaic_compiler.disk.folder import the_folder
from mosaic_compiler.ir.clusters import Cluster
from mosaic_compiler.kernels import artifacts
from mosaic_compiler.kernels.cluster_form import ClusterForm, scratch_bytes, span, spans_of
from mosaic_compiler.kernels.layouts import Layouts
from mosaic_compiler.planning.facts import KernelFacts, KernelUse
from mosaic_compiler.waiting import doing, now, without_collections

_WIDE_HINT = 1 << 26
_WIDE = (1 << 31) - 1
"""Elements, or elements that a strided operand spans, above which 64-bit indices are used."""

_TUNING_BYTES = 48 << 20
"""What a kernel's operands and destinations may take while its launch parameters are chosen."""

_ALLOCATION = re.compile(r"= empty_strided(?:_cpu|_cuda)?\(\(([^)]*)\), \([^)]*\), torch\.(\w+)")

_SETTINGS: Mapping[str, Any] = {
    "unroll_reductions_threshold": MOST_ADDED + 1,
    "force_pointwise_cat": True,
    "realize_reads_threshold": 64,
    "realize_acc_reads_threshold": 64,
    "realize_opcount_threshold": 200,
    "size_asserts": False,
    "triton.cudagraphs": False,
}


@functools.cache
def supports(op: OpOverload) -> bool:
    """Inductor can compile this op as a part of a kernel."""
    from torch._inductor.lowering import fallbacks, lowerings

    return op in _decompositions() or (op in lowerings and op not in fallbacks)


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

    Args:
        facts: what calls have to know of it.
        key: of what is kept of it on disk.
        make: the cluster's form, which is needed where there is nothing on disk.

    Attributes:
        failure: set when the kernel cannot be compiled, or would need memory that the plan does not have; calls run
            op by op then.
    """

    def __init__(self, facts: KernelFacts, key: str, make: Callable[[], ClusterForm]) -> None:
        self.facts, self.key, self._make = facts, key, make
        self._layouts = Layouts(facts)
        self._artifacts: dict[bool, Callable[[list[Any]], Any]] = {}
        self._begun: dict[bool, tuple[Any, list[Callable[[], None]]]] = {}
        self.failure: Failure | None = None

    @functools.cached_property
    def _form(self) -> ClusterForm:
        return self._make()

    @property
    def _cluster(self) -> Cluster:
        return self._form.cluster

    def __call__(self, *arguments: Any) -> None:
        self.bind(*arguments)()

    def bind(self, *arguments: Any) -> Callable[[], Any]:
        """The call with these arguments, tensors that stay where they are or are moved by ``set_``."""
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        artifact = self.compile(any(_span(tensor) > _WIDE for tensor in tensors))
        if artifact is None:
            return functools.partial(self._run_op_by_op, arguments)
        return functools.partial(_call, artifact, [*self._layouts.sizes(arguments), *tensors])

    def begin(self, wide: bool = False) -> None:
        """Generate code and let it be compiled, unless that was done already.  ``wide``: with 64-bit indices."""
        wide = wide or self.facts.has_wide_rows
        with _compiling:
            if wide in self._artifacts or wide in self._begun or self.failure is not None:
                return
            if (kept := artifacts.load(self._name(wide))) is not None:
                self._artifacts[wide] = kept
                return
            with self._may_fail(), caches_in(self._folder(wide)), _not_waiting() as waits:
                self._begun[wide] = self._generated(wide), waits

    def compile(self, wide: bool = False) -> Callable[[list[Any]], Any] | None:
        """Compile, unless that was done already; ``None`` if it cannot be.  ``wide``: with 64-bit indices."""
        wide = wide or self.facts.has_wide_rows
        if wide in self._artifacts:
            return self._artifacts[wide]
        with _compiling:
            self.begin(wide)
            if wide in self._begun:
                compiled, waits = self._begun.pop(wide)
                with self._may_fail(), caches_in(self._folder(wide)):
                    for wait in waits:
                        wait()
                    self._tune(compiled.current_callable)
                    self._artifacts[wide] = compiled.current_callable
                    artifacts.keep(
                        self._name(wide), compiled.source_code, compiled.current_callable, self._folder(wide)
                    )
            return self._artifacts.get(wide)

    def _name(self, wide: bool) -> str:
        return f"{self.key}{'w' if wide else ''}"

    def _folder(self, wide: bool) -> Path | None:
        """Where Triton puts what it compiles, so that it can be kept."""
        is_kept = self.facts.device.startswith("cuda") and the_folder() is not None
        return artifacts.compile_folder(self._name(wide)) if is_kept else None

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except _TooMuchMemory as error:
            self.failure = Failure("fused-scratch", str(error))
        except Exception as error:  # whatever Inductor or its compilers raise: the cluster still runs
            text = str(error).strip().splitlines() or [""]
            self.failure = Failure("unfused-cluster", f"{type(error).__name__}: {text[0][:200]}")

    def _generated(self, wide: bool) -> Any:
        """What Inductor makes of the cluster: its source, and the callable once it is compiled."""
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.virtualized import V

        if self.facts.problem:
            raise ValueError(self.facts.problem)
        found = None if self.facts.device.startswith("cuda") else _instructions().found()
        with torch.inference_mode(False), torch.no_grad(), config.patch(**_SETTINGS), with_instructions(found):
            mode, examples = self._form.examples(_WIDE_HINT if wide else None)
            with mode:
                graph = make_fx(self._form.function(), _decompositions(), tracing_mode="real")(*examples)
            with V.set_fake_mode(mode), tracing(TracingContext(mode)):
                compiled: Any = compile_fx_inner(graph, examples)
        self._check_allocations(compiled.source_code)
        return compiled

    def _tune(self, call: Callable[[list[Any]], Any]) -> None:
        """Let a GPU's kernel choose its launch parameters: in a step, it would copy every destination for that."""
        if self._form.device.type != "cuda" or (sample := self._form.sample(_TUNING_BYTES)) is None:
            return
        with contextlib.suppress(torch.OutOfMemoryError):  # then it chooses in the step, if there is room
            call(sample)

    def _check_allocations(self, source: str) -> None:
        """Raise if the generated code allocates more than a few numbers per row.

        :func:`scratch_bytes` is what the plan has for it.
        """
        most = sympy.Integer(max(self._form.hints.values(), default=1))
        allowed = int(self._form.own(scratch_bytes(self._cluster)).xreplace(dict.fromkeys(self._form.symbols, most)))
        total = 0
        for shape, dtype in _ALLOCATION.findall(source):
            elements = 1
            for factor in filter(None, map(str.strip, shape.split(","))):
                expr = sympy.sympify(factor)
                elements *= int(expr.xreplace(dict.fromkeys(expr.free_symbols, most)))
            total += elements * getattr(torch, dtype).itemsize
        if total > allowed + 4096:
            raise _TooMuchMemory(f"its kernel would allocate {total} bytes at {most} rows")

    def _run_op_by_op(self, arguments: Sequence[Any]) -> None:
        count, into = self.facts.operands, self._cluster.into
        results = [result for result, at in zip(self._cluster(*arguments[:count]), into, strict=True) if at is None]
        for out, result in zip(arguments[count:], results, strict=True):
            out.copy_(result)


def _call(artifact: Callable[[list[Any]], Any], arguments: list[Any]) -> None:
    artifact(arguments.copy())


class _TooMuchMemory(Exception):  # noqa: N818
    pass


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one in memory, or elements in all if that is more (a broadcast operand)."""
    if tensor.is_contiguous():
        return tensor.numel()
    return max(tensor.numel(), int(span(tensor.shape, tensor.stride())))


def compile_all(kernels: Iterable[tuple[FusedKernel, int]]) -> None:
    """Compile what calls need whose operands span at most so many elements, and choose its launch parameters."""
    wanted = [(kernel, most > _WIDE) for kernel, most in kernels]
    with _compiling, doing("compiling kernels"), without_collections():
        for number, (kernel, wide) in enumerate(wanted):
            now("generating code", number, len(wanted))
            kernel.begin(wide)
        for number, (kernel, wide) in enumerate(wanted):
            now("kernel", number, len(wanted))
            kernel.compile(wide)


def start_workers(device: torch.device) -> None:
    """Start what kernels will need, and takes seconds: for a GPU the processes that compile them; for a CPU, find out
    which instructions it has (Inductor compiles small programs for that)."""
    if device.type == "cuda":
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()
    else:
        _instructions()


class _Instructions(threading.Thread):
    """Finds out what a CPU's kernels may use; a compiler does it, so whoever has started it goes on meanwhile."""

    def __init__(self) -> None:
        super().__init__(name="mosaic-instructions", daemon=True)
        self._found: Any = None
        self.start()

    def run(self) -> None:
        with contextlib.suppress(Exception):  # whoever compiles a kernel is told
            self._found = best_instructions()

    def found(self) -> Any:
        """What there is, see ``compat.inductor.best_instructions``."""
        self.join()
        return self._found


@functools.cache
def _instructions() -> _Instructions:
    return _Instructions()


_compiling = threading.RLock()
_held = threading.local()


@contextlib.contextmanager
def _not_waiting() -> Iterator[list[Callable[[], None]]]:
    """Code that this thread generates is not waited for; what is yielded are the calls that do."""
    _allow_not_waiting()
    waits: list[Callable[[], None]] = []
    _held.waits = waits
    try:
        yield waits
    finally:
        del _held.waits


@functools.cache
def _allow_not_waiting() -> None:
    """A generated module waits for its kernels when it is loaded: not where :func:`_not_waiting` holds."""
    from torch._inductor.async_compile import AsyncCompile

    wait = AsyncCompile.wait

    @functools.wraps(wait)
    def wait_unless_held(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
        waits: list[Callable[[], None]] | None = getattr(_held, "waits", None)
        later = functools.partial(wait, compiler, scope)
        if waits is None:
            later()
        else:
            waits.append(later)

    AsyncCompile.wait = wait_unless_held  # type: ignore[method-assign, assignment]


_kernels: dict[str, FusedKernel] = {}
_kernels_lock = threading.Lock()


@functools.lru_cache(maxsize=4096)
def kernel_for(cluster: Cluster) -> FusedKernel:
    """The kernel of a cluster; equal structures (layers, models, lengths) share one."""
    form = ClusterForm(cluster)
    structure = form.key()
    key = artifacts.kernel_key((structure, form.facts.layouts), form.device, _SETTINGS)
    return kernel_from(form.facts, key, lambda: form)


def kernel_from(facts: KernelFacts, key: str, make: Callable[[], ClusterForm]) -> FusedKernel:
    """The kernel with this key; see :class:`FusedKernel`."""
    with _kernels_lock:
        if key not in _kernels:
            _kernels[key] = FusedKernel(facts, key, make)
        return _kernels[key]


class FusedUse:
    """A fused region in a graph.

    Attributes:
        into: for each result the operand whose memory it takes over, or ``None``.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.into = cluster.into

    @functools.cached_property
    def kernel(self) -> FusedKernel:
        """What computes it."""
        return kernel_for(self._cluster)

    @property
    def is_made(self) -> bool:
        """Somebody has asked for the kernel."""
        return "kernel" in self.__dict__

    @functools.cached_property
    def spans(self) -> frozenset[sympy.Expr]:
        """What decides about the width of the kernel's indices, in the graph's symbols."""
        return spans_of(self._cluster)


class KeptUse(FusedUse):
    """A fused region of which its kernel is known by key.

    Args:
        use: which kernel.
        make: the cluster, which is needed where the kernel is not on disk.
    """

    def __init__(self, use: KernelUse, into: tuple[int | None, ...], make: Callable[[], Cluster]) -> None:
        self.into = into
        self.kernel = kernel_from(use.facts, use.key, lambda: ClusterForm(make()))
        self.spans = frozenset(use.spans)
