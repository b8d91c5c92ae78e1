"""Plans for lengths that nobody runs: ``explain(..., tokens=N)`` and ``max_tokens``.

A step is captured once, from a small example, and its plan is evaluated for other sizes.  Nothing runs, so weights are
not needed either: parameters and inputs on the meta device are traced as tensors of ``device`` without memory.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from mosaic_compiler.ahead.causes import is_graph_break, what_and_where, without_tracebacks
from mosaic_compiler.ahead.configs import positions
from mosaic_compiler.backend import compile_aten, mosaic, observing
from mosaic_compiler.compat.dynamo import BackendCompilerFailed, TorchDynamoException
from mosaic_compiler.compat.tracing import FakeTensor, FakeTensorMode
from mosaic_compiler.errors import CaptureError, MosaicError, OptionsError
from mosaic_compiler.kept_graphs import not_kept
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.owned.direct import trace_directly
from mosaic_compiler.owned.fingerprint import Fingerprint
from mosaic_compiler.owned.put_back import NotDirectError
from mosaic_compiler.owned.values import kept_on_disk
from mosaic_compiler.planning.budget import parse_budget
from mosaic_compiler.runtime.step import CompiledStep
from mosaic_compiler.waiting import doing, without_collections

logger = logging.getLogger("mosaic_compiler")


def capture_step(
    fn: Callable[..., Any],
    args: Sequence[Any],
    options: dict[str, Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    device: str = "cpu",
    is_direct: bool = False,
) -> CompiledStep:
    """Compile ``fn`` for ``args`` (and ``kwargs``) without running it.

    Args:
        fn: a function or module; the modules that it is, is bound to or closes over may be on the meta device.
        args: an example; tensors may be on the meta device.
        options: of the backend; nothing runs, so the memory budget does not matter here.
        device: what meta tensors are planned for.
        is_direct: trace it by running it, where that can be: for models that nobody compiles by Dynamo.

    Raises:
        CaptureError: if the function is not one graph, or fails.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CaptureError("planning with a GPU's kernels needs a GPU that torch can use: leave device out")
    options = {key: value for key, value in options.items() if key != "memory_budget"}  # may be another machine's
    if is_direct and (step := _traced_directly(unwrap(fn), args, kwargs or {}, options, device)) is not None:
        return step
    steps: list[CompiledStep] = []

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        mosaic(module, example_inputs, options=options)
        return _stop

    compiled = torch.compile(fresh_caller(), backend=backend, dynamic=True, fullgraph=True)
    try:
        with (
            doing("tracing the model"),
            without_collections(),
            _without_memory(fn, args, kwargs or {}, torch.device(device)) as (traced, named),
            observing(steps.append),
            not_kept(),
            without_tracebacks(),
            torch.no_grad(),
        ):
            compiled(unwrap(fn), *traced, **named)
    except _Stopped:
        pass
    except BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, MosaicError):
            raise failure.inner_exception from None
        raise
    except TorchDynamoException as error:
        why = what_and_where(error)
        if is_graph_break(error):
            raise CaptureError(
                f"a plan ahead of running needs the function in one graph, and Dynamo says: {why}: change that line; "
                "TORCH_LOGS=graph_breaks says more"
            ) from error
        raise CaptureError(
            f"the function fails while it is traced: {why}: most likely it does without compiling, too: run it once"
        ) from error
    if not steps:
        raise CaptureError("nothing was compiled: the function runs no tensor operation")
    return steps[0]


def _traced_directly(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: dict[str, Any], device: str
) -> CompiledStep | None:
    """What running the function once says; ``None``: it is left to Dynamo."""
    with doing("tracing the model"), without_collections():
        try:
            found = trace_directly(fn, args, kwargs, Fingerprint(fn), torch.device(device))
        except NotDirectError as why:
            logger.debug("mosaic: traced by Dynamo: %s", why)
            return None
        name = getattr(fn, "__name__", type(fn).__name__)
        return compile_aten(found.module, MosaicOptions.parse(options), found.static, name=name)


class _Stopped(BaseException):
    """Raised instead of running a step."""


def _stop(*args: Any) -> Any:
    raise _Stopped


def max_tokens(
    fn: Callable[..., Any],
    example: Sequence[Any],
    budget: int | str,
    *,
    row_share: float = 1.0,
    device: str = "cpu",
    **options: Any,
) -> int:
    """The longest sequence whose step fits a memory budget, without running it.

    Args:
        fn: a step, for example :class:`~mosaic_compiler.sampling.DenoisingStep`; its weights may be on the meta device.
        example: its arguments at any length above 1.
        budget: bytes, or a string such as ``"8GiB"``, for everything besides weights, inputs and outputs.
        row_share: share of rows that masks select (1.0: every row's logits are computed).
        device: what meta tensors are planned for.
        options: of the backend, see :class:`MosaicOptions`.

    Returns:
        The number of tokens; 0 if not even one fits.  With a warning if it is more than the positions that the model's
        config gives it.

    Raises:
        OptionsError: for a malformed budget or option.
        CaptureError: if the function cannot be captured as one graph.
    """
    limit = parse_budget(budget)
    if limit is None:
        raise OptionsError("max_tokens needs a budget: bytes, or a string such as '8GiB'")
    MosaicOptions.parse(options)
    outline = kept_on_disk(
        "outline",
        fn,
        example,
        options,
        device,
        lambda: capture_step(fn, example, options, device=device).outline.data(),
    )
    found: int = outline.longest(limit, row_share)
    parts = (part for module in _modules_of(fn) for part in module.modules())
    trained = min(filter(None, (positions(getattr(part, "config", None)) for part in parts)), default=found)
    if trained < found:
        warnings.warn(
            f"{found:,} tokens fit the budget, but the model's config gives it {trained:,} positions: it was not "
            "trained for more",
            stacklevel=2,
        )
    return found


@contextmanager
def _without_memory(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments and the parameters of ``fn`` with meta tensors as tensors of ``device`` that have no memory."""
    modules = _modules_of(fn)
    tensors = [t for module in modules for t in itertools.chain(module.parameters(), module.buffers())]
    if not any(t.is_meta for t in (*tensors, *(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))):
        yield tuple(args), dict(kwargs)
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            made: Any = FakeTensor(mode, tensor.detach().to("meta"), device)
            fakes[id(tensor)] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
        return fakes[id(tensor)]

    replaced: list[tuple[Any, str, Any]] = []
    try:
        for part in {part for module in modules for part in module.modules()}:
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        replaced.append((held, name, tensor))
        for held, name, tensor in replaced:
            held[name] = fake(tensor)
        with mode:
            faked = tuple(fake(a) if isinstance(a, Tensor) else a for a in args)
            yield faked, {name: fake(a) if isinstance(a, Tensor) else a for name, a in kwargs.items()}
    finally:
        for held, name, tensor in replaced:
            held[name] = tensor


def _modules_of(fn: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a function is, is bound to, or closes over."""
    fn = unwrap(fn)
    candidates = [fn, getattr(fn, "__self__", None)]
    candidates += [cell.cell_contents for cell in getattr(fn, "__closure__", None) or ()]
    return [value for value in candidates if isinstance(value, nn.Module)]


def unwrap(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind ``torch.compile``."""
    fn = getattr(fn, "_orig_mod", fn)
    return getattr(fn, "_torchdynamo_orig_callable", fn)


def fresh_caller() -> Callable[..., Any]:
    """``call(fn, *args)`` with a code object of its own: Dynamo's recompile limit counts per code object,
    so any number of reports can be made of one function."""
    import types

    def call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "explained")
