"""Every sample that PyTorch has of its operators (its ``OpInfo`` database), through the compiler and against eager.

Compiling a function takes too long for thousands of samples, so there are three ways to run one:

- ``traced``: AOTAutograd and :func:`compile_aten`, without Dynamo in front.  Operands are computed in the graph, and
  results are read by it, so that both lie in the arena; memory that nobody owns is poisoned.
- ``inplace``: the same for the operator's in-place variant.
- ``fuse``: the same with compiled kernels, between pointwise operations that they may take in.
- ``front``: ``torch.compile`` of the bare call, Python numbers included.

What ``aot_eager`` (the same capture, its graph run as it is) gets wrong as well is not the compiler's.  Nor are strides
that eager's results have against the operator's own fake kernel: others read results by what that says, and so do we
(fallback ``undeclared-layout``).

``python tests/opinfo.py part ...`` runs parts of the sweep (see :data:`PARTS`) in a process of their own, which is
started again where an operator ends it, and goes on where an earlier call stopped.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mosaic_compiler.backend import _decompositions, compile_aten
from mosaic_compiler.errors import CanaryError, InvariantError, MosaicError, PlanError, StaleGraphError
from mosaic_compiler.options import MosaicOptions

NOT_OURS = {
    "empty": "its values are whatever was there",
    "empty_like": "its values are whatever was there",
    "empty_permuted": "its values are whatever was there",
    "empty_strided": "its values are whatever was there",
    "new_empty": "its values are whatever was there",
    "new_empty_strided": "its values are whatever was there",
}
"""Operators (by ``formatted_name``) of which values are not compared, and why."""

ROUNDED = {
    "logit": "eager PyTorch divides in bfloat16 before it takes the logarithm, and is up to 0.006 off between 0.45 and "
    "0.55; a fused kernel is 0.0005 off"
}
"""Operators that eager rounds more coarsely than reduced precision is allowed (twice as much here), and how."""

OTHER_DTYPES = ("float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "complex64")

TOLERANCES = {
    torch.float64: (1e-7, 1e-8),
    torch.complex128: (1e-7, 1e-8),
    torch.float32: (1e-4, 1e-5),
    torch.complex64: (1e-4, 1e-5),
    torch.float16: (4e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1e-2),
}
"""Relative and absolute; all others are compared exactly.  BLAS rounds differently where operands lie elsewhere."""

BROKEN = (InvariantError, PlanError, CanaryError, StaleGraphError)
"""Errors of ours that no sample should see."""

SEED = 42
"""The one that PyTorch's samples set themselves before they draw, which no graph has in it."""

_NUMBERS = frozenset(
    {*TOLERANCES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
)  # what can be multiplied


@dataclass(frozen=True)
class Part:
    """A part of the sweep: samples ``[start, stop)`` of every operator, in these dtypes, in one way.

    ``fuse`` takes one of them, the first with more than one number: there is nothing to fuse around a single one.
    """

    way: str
    dtypes: Sequence[str] = ("float32",)
    start: int = 0
    stop: int | None = None


PARTS = {
    "front": Part("front", stop=1),
    "float32": Part("traced", stop=8),
    "float32-more": Part("traced", start=8, stop=64),
    "float32-rest": Part("traced", start=64),
    "inplace": Part("inplace", stop=2),
    "dtypes": Part("traced", OTHER_DTYPES, stop=2),
    "fuse": Part("fuse", ("float32", "bfloat16"), stop=16),
}


@dataclass(frozen=True)
class Sample:
    """One call of an operator."""

    op: str
    variant: str
    dtype: str
    index: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.op}-{self.variant}-{self.dtype}-{self.index}"


@dataclass(frozen=True)
class Verdict:
    """``ok``, ``not ours``, ``wrong``, ``crash``, ``refused`` (a :class:`MosaicError` that says what cannot be) or
    ``broken`` (one that says that a pass or a plan was wrong)."""

    kind: str
    reason: str = ""
    trace: str = ""

    @property
    def is_failure(self) -> bool:
        return self.kind in ("wrong", "crash", "broken")


class DiffersError(Exception):
    """Results are not those of eager."""


class StridesDifferError(DiffersError):
    """Nothing else differs."""


class TookTooLongError(BaseException):
    """A sample did not end in time; no handler of ``Exception`` swallows it."""


@functools.cache
def operators() -> dict[str, Any]:
    """All operators by name, those first that stand first in PyTorch's list."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {op.formatted_name: op for op in op_db}


def samples(name: str, dtype: str, start: int = 0, stop: int | None = None, variant: str = "function") -> list[Sample]:
    """Samples ``[start, stop)`` of an operator: none if it has no such dtype or variant on the CPU."""
    op, kind = operators()[name], getattr(torch, dtype)
    function = op.op if variant == "function" else op.inplace_variant
    if function is None or kind not in op.supported_dtypes("cpu"):
        return []
    torch.manual_seed(0)
    found = []
    for index, given in enumerate(op.sample_inputs("cpu", kind, requires_grad=False)):
        if stop is not None and index >= stop:
            break
        if index < start or (variant == "inplace" and given.broadcasts_input):
            continue
        found.append(Sample(name, variant, dtype, index, function, (given.input, *given.args), given.kwargs))
    return found


def samples_of(part: Part, name: str) -> Iterator[Sample]:
    """An operator's samples in a part of the sweep."""
    for dtype in part.dtypes:
        variant = "inplace" if part.way == "inplace" else "function"
        try:
            found = samples(name, dtype, part.start, part.stop, variant)
        except Exception:
            continue  # PyTorch cannot make its own samples
        if part.way == "fuse":
            found = [sample for sample in found if _largest(sample) > 1][:1] or found[:1]
        for sample in found:
            yield sample if part.way in ("traced", "inplace") else replace(sample, variant=part.way)


def _largest(sample: Sample) -> int:
    """How many numbers its largest tensor has."""
    leaves = tree_leaves((sample.args, sample.kwargs))
    return max((leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)), default=0)


# ------------------------------------------------------------------------------------------ functions to compile
def function_of(sample: Sample) -> tuple[Callable[..., list[torch.Tensor]], list[torch.Tensor]]:
    """The sample as a function of its tensors; whatever else it has are constants.

    Every tensor argument is computed in the function and every tensor result is read by it.  Of samples with odd
    numbers the results are returned as well.
    """
    leaves, spec = tree_flatten((sample.args, sample.kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    before, after = (touch, touch) if sample.variant != "fuse" else (_shift_twice, _shift)

    def function(*tensors: torch.Tensor) -> list[torch.Tensor]:
        values = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = before(tensor)
        args, kwargs = tree_unflatten(values, spec)
        results = [leaf for leaf in tree_leaves(sample.function(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        return [*(results if sample.index % 2 else ()), *map(after, results)]

    return function, [leaves[place] for place in places]


def touch(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is computed."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor
    if tensor.dtype in _NUMBERS:
        return tensor * 1
    return tensor & True if tensor.dtype == torch.bool else tensor.clone()


def _shift_twice(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers after two operations, both exact."""
    return touch(tensor).neg().neg() if _is_float(tensor) else touch(tensor)


def _shift(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2 + 1 if _is_float(tensor) else touch(tensor)


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.dtype in TOLERANCES and not tensor.is_quantized


# ------------------------------------------------------------------------------------------------------- running
def judge(sample: Sample, seconds: float = 20) -> Verdict:
    """Run a sample, and again with ``aot_eager`` if something is wrong."""
    runs = _run_front if sample.variant == "front" else _run_traced
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with time_limit(seconds):
                expected = runs(sample, None)
        except (Exception, TookTooLongError) as error:
            return Verdict("not ours", f"eager: {_line(error)}")
        got: list[Any] = []
        try:
            with time_limit(seconds):
                got = runs(sample, "mosaic")
                compare(sample, got, expected)
            return Verdict("ok")
        except (Exception, TookTooLongError) as error:
            problem = error
        trace = "".join(traceback.format_exception(problem)[-6:])[-3000:]
        try:
            with time_limit(seconds):
                compare(sample, runs(sample, "aot_eager"), expected)
        except (Exception, TookTooLongError) as error:
            return Verdict("not ours", f"aot_eager: {_line(error)}; ours: {_line(problem)}")
        if isinstance(problem, StridesDifferError) and as_fake_kernels_say(sample, got, expected):
            return Verdict("not ours", f"eager's are not those of its fake kernel: {_line(problem)}")
    if isinstance(problem, DiffersError):
        return Verdict("wrong", _line(problem), trace)
    ours = _ours(problem)
    kind = "crash" if ours is None else "broken" if isinstance(ours, BROKEN) else "refused"
    return Verdict(kind, _line(problem), trace)


def _run_traced(sample: Sample, backend: str | None) -> list[Any]:
    """Results of two calls, and the inputs afterwards."""
    function, tensors = function_of(sample)
    if backend is not None:
        inner = _mosaic(sample.variant == "fuse") if backend == "mosaic" else _as_it_is
        function = _aot(function, inner)
    return _called(function, tensors, {})


def _run_front(sample: Sample, backend: str | None) -> list[Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return sample.function(*args, **kwargs)

    if backend is not None:
        torch._dynamo.reset()
        options = {"poison": True, "disable": ("fuse",)} if backend == "mosaic" else None
        function = torch.compile(function, backend=backend, dynamic=True, options=options)
    return _called(function, sample.args, sample.kwargs)


def as_fake_kernels_say(sample: Sample, got: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether results that have other strides than eager's have those that fake kernels say."""
    function, tensors = function_of(sample)
    if sample.variant == "front":
        function, tensors = (lambda *_: tree_leaves(sample.function(*sample.args, **sample.kwargs))), []
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            said = function(*map(mode.from_tensor, tensors))
    except Exception:
        return False  # it has none for such operands
    each = len(got) // 2  # the results of a call, and its inputs afterwards
    return all(
        place % each < len(said) and _strides(said[place % each]) == _strides(got[place])
        for place in other_strides(got, expected)
    )


def _called(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The second call finds the program that the first one has made."""
    found: list[Any] = []
    for _ in range(2):
        leaves, spec = tree_flatten((args, kwargs))
        copies = [_copied(leaf) for leaf in leaves]
        mine, named = tree_unflatten(copies, spec)
        torch.manual_seed(SEED)
        found += tree_leaves(function(*mine, **named))
        found += [leaf for leaf in copies if isinstance(leaf, torch.Tensor)]
    return found


def _copied(leaf: Any) -> Any:
    """A tensor of the same layout in a storage of its own, so that inputs may be written."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided or leaf.is_quantized:
        return leaf
    if leaf.is_conj() or leaf.is_neg() or type(leaf) is not torch.Tensor or leaf.device.type == "meta":
        return leaf.clone()
    storage = leaf.untyped_storage().clone()
    return torch.empty(0, dtype=leaf.dtype).set_(storage, leaf.storage_offset(), leaf.shape, leaf.stride())


def _aot(function: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """What ``mosaic`` does behind Dynamo."""
    from functorch.compile import aot_function

    def refuse(*_: Any) -> Any:
        raise AssertionError("nothing needs gradients")

    return aot_function(
        function,
        fw_compiler=refuse,
        inference_compiler=inner,
        decompositions=_decompositions(),
        keep_inference_input_mutations=True,
        dynamic=True,
    )


def _mosaic(fuse: bool) -> Callable[..., Any]:
    options = MosaicOptions(poison=True, disable=() if fuse else ("fuse",))

    def compile_graph(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return _boxed(compile_aten(module, options))

    return compile_graph


def _as_it_is(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return _boxed(lambda values: module(*values))


def _boxed(call: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    """AOTAutograd looks for the mark on a function's own attributes, and passes one list."""

    def boxed(values: list[Any]) -> Any:
        torch.manual_seed(SEED)
        return call(values)

    boxed._boxed_call = True
    return boxed


def compare(sample: Sample, got: Sequence[Any], expected: Sequence[Any]) -> None:
    """Raise :class:`DiffersError` unless values, dtypes, sizes and strides are the same."""
    if len(got) != len(expected):
        raise DiffersError(f"{len(got)} results, not {len(expected)}")
    for place, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        _compare(sample, f"result {place}", mine, theirs)
    for place in other_strides(got, expected):
        mine, theirs = got[place], expected[place]
        raise StridesDifferError(f"result {place}: strides {mine.stride()}, not {theirs.stride()}, of {mine.shape}")


def other_strides(got: Sequence[Any], expected: Sequence[Any]) -> list[int]:
    """Which results lie in memory in another order."""
    return [
        place
        for place, (mine, theirs) in enumerate(zip(got, expected, strict=True))
        if isinstance(theirs, torch.Tensor) and theirs.layout is torch.strided and _strides(mine) != _strides(theirs)
    ]


def _compare(sample: Sample, name: str, mine: Any, theirs: Any) -> None:
    if not isinstance(theirs, torch.Tensor):
        same = type(mine) is type(theirs) and (mine == theirs or mine != mine or sample.op in NOT_OURS)
        if not (same or _is_close(mine, theirs)):
            raise DiffersError(f"{name}: {mine!r}, not {theirs!r}")
        return
    if not isinstance(mine, torch.Tensor):
        raise DiffersError(f"{name}: {type(mine).__name__}, not a tensor")
    for what in ("dtype", "shape", "device", "layout"):
        if getattr(mine, what) != getattr(theirs, what):
            raise DiffersError(f"{name}: {what} {getattr(mine, what)}, not {getattr(theirs, what)}")
    if sample.op not in NOT_OURS:
        rtol, atol = TOLERANCES.get(theirs.dtype, (0.0, 0.0))
        if sample.op in ROUNDED and theirs.dtype in (torch.bfloat16, torch.float16):
            atol *= 2
        try:
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            raise DiffersError(f"{name}: {' '.join(str(error).split())}") from None


def _is_close(mine: Any, theirs: Any) -> bool:
    return isinstance(mine, (float, complex)) and abs(mine - theirs) <= 1e-4 * max(1.0, abs(theirs))


def _strides(tensor: torch.Tensor) -> list[int] | None:
    """Those that say where elements are."""
    if tensor.numel() == 0:
        return None
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLongError` in the block after so long; a timer that was set before goes on afterwards."""

    def stop(*_: Any) -> None:
        raise TookTooLongError(f"took longer than {seconds} s")

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, left - (time.monotonic() - began)), interval)


def _ours(error: BaseException | None) -> MosaicError | None:
    """The :class:`MosaicError` that this is, or that caused it."""
    if error is None or isinstance(error, MosaicError):
        return error
    return _ours(getattr(error, "inner_exception", None)) or _ours(error.__cause__)


def _line(error: BaseException) -> str:
    inner = getattr(error, "inner_exception", None)
    if inner is not None:
        return _line(inner)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


# ------------------------------------------------------------------------------------------------- command line
def main() -> None:
    parser = argparse.ArgumentParser(description="run parts of the sweep")
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--log", type=Path, default=Path("build/opinfo"), help="one file per part, a line per sample")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--only", default="", help="operators that have this in their names")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help="run what failed before once more")
    given = parser.parse_args()
    given.log.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + given.seconds
    for part in given.parts:
        path = given.log / f"{part}.jsonl"
        if given.child:
            _sweep(part, path, until, given.only)
            continue
        if given.again and path.exists():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["kind"] in ("ok", "not ours")]
            path.write_text("".join(f"{line}\n" for line in lines))
        while (left := until - time.monotonic()) > 0:
            command = [sys.executable, __file__, part, "--child", "--log", given.log, "--only", given.only]
            done = subprocess.run([*map(str, command), "--seconds", str(left)])
            if done.returncode == 0:
                break
            _died(path, done.returncode)
        _summarize(part, path)


def _sweep(part: str, path: Path, until: float, only: str) -> None:
    torch.set_num_threads(1)
    seen = {json.loads(line)["name"] for line in path.read_text().splitlines()} if path.exists() else set()
    names = [name for name in operators() if only in name]
    gc.freeze()
    gc.disable()
    with path.open("a", buffering=1) as log:
        for name in names:
            for sample in samples_of(PARTS[part], name):
                if sample.name in seen:
                    continue
                if time.monotonic() > until:
                    return
                path.with_suffix(".now").write_text(sample.name)
                verdict = judge(sample, 90 if sample.variant == "fuse" else 20)
                line = {"name": sample.name, "kind": verdict.kind, "reason": verdict.reason, "trace": verdict.trace}
                log.write(json.dumps(line) + "\n")
            gc.collect()


def _died(path: Path, code: int) -> None:
    now = path.with_suffix(".now")
    name = now.read_text() if now.exists() else "start"
    with path.open("a") as log:
        log.write(
            json.dumps({"name": name, "kind": "crash", "reason": f"the process ended: {code}", "trace": ""}) + "\n"
        )
    if name == "start":
        raise SystemExit(f"the sweep does not start: {code}")


def _summarize(part: str, path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    counts = collections.Counter(line["kind"] for line in lines)
    print(part, len(lines), dict(counts), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
