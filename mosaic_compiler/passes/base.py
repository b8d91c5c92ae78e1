"""What a pass is, and how to get a toy graph to try one on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import fx

from mosaic_compiler.compat.symbols import ShapeEnv
from mosaic_compiler.compat.tracing import FakeTensorMode, enable_python_dispatcher, make_fx, symbolic_dims
from mosaic_compiler.options import MosaicOptions


class Pass(Protocol):
    """One rewrite: a frozen dataclass that maps a GraphModule to a new, equal GraphModule.

    The argument is never changed; a pass that finds nothing to do may return it.  ``name`` is the kebab-case of the
    file and class name: ``in-place`` is ``InPlacePass`` in ``passes/in_place.py``.  What only one
    pass uses stands beside it, in a folder of its name.
    """

    name: ClassVar[str]

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule: ...

    @classmethod
    def of(cls, options: MosaicOptions, machine: Machine) -> Pass:
        """The pass with the parameters that options and the machine set; most have none."""
        return cls()


@dataclass(frozen=True)
class Machine:
    """What passes have to know of where a step will run.

    Attributes:
        page_bytes: memory for results in zeros comes in pages of so many bytes; ``None``: all of them takes memory.
    """

    page_bytes: int | None = None


def trace(function: Callable[..., Any], *args: Any, dynamic: Sequence[tuple[int, ...]] | None = None) -> fx.GraphModule:
    """Trace ``function`` into a functional ATen graph with symbolic sizes, ready for any pass.

    Args:
        function: takes tensors, returns a tensor or a tuple of tensors; must not mutate its inputs.
        args: example tensors; every size above 1 becomes a symbol.
        dynamic: per argument the dims whose sizes become symbols (missing ones: none), for example ``[(1,)]``
            for token ids [1, N] and weights behind them.

    Example:
        >>> module = trace(lambda x: (x + 1).relu(), torch.randn(4, 8))
        >>> CanonicalizePass()(module)(torch.randn(6, 8)).shape
        torch.Size([6, 8])
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    if dynamic is None:
        fakes = [mode.from_tensor(arg) for arg in args]
    else:
        choices = [*dynamic, *[()] * (len(args) - len(dynamic))]
        fakes = [
            mode.from_tensor(arg, symbolic_context=symbolic_dims(arg, dims))
            for arg, dims in zip(args, choices, strict=True)
        ]
    with enable_python_dispatcher():  # as AOTAutograd does: some compositions in C++ want sizes as numbers
        return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*fakes)
