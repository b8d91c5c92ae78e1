"""Graphs and fake tensors: how they are made, and in which mode they were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "enable_python_dispatcher",
    "fake_argument",
    "fake_mode_among",
    "fake_weight",
    "get_decompositions",
    "lazy_graph_module",
    "make_fx",
    "static_inputs",
    "symbolic_dims",
    "tree_flatten",
    "tree_map_only",
    "without_modes",
]


def lazy_graph_module(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule whose Python code is generated when somebody runs it or looks at it."""
    return _LazyGraphModule(root, graph)


def fake_mode_among(values: Sequence[Any] = ()) -> Any:
    """The FakeTensorMode that is active, or of one of these values; ``None`` if there is none."""
    return torch._guards.detect_fake_mode(values or None)


def symbolic_dims(tensor: torch.Tensor, dims: Sequence[int]) -> StatelessSymbolicContext[Any, Any]:
    """Sizes of these dims become symbols, all others stay numbers."""
    kinds = [DimDynamic.DYNAMIC if dim in dims else DimDynamic.STATIC for dim in range(tensor.dim())]
    return StatelessSymbolicContext(dynamic_sizes=kinds)


def static_inputs() -> tuple[int, ...]:
    """Positions of parameters and buffers among the placeholders of the graph that AOTAutograd compiles now."""
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return tuple(metadata.static_input_indices) if metadata is not None else ()


def fake_argument(mode: FakeTensorMode, tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor without memory, whose sizes are symbols (0 and 1 are numbers), as Dynamo has it for an argument."""
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim())
    found: torch.Tensor = mode.from_tensor(tensor, symbolic_context=context, source=LocalSource(name))
    return found


def fake_weight(mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """A tensor without memory, whose sizes are numbers.

    Args:
        device: where one of the meta device is taken to be.
    """
    if tensor.is_meta and device is not None:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    found: torch.Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
    return found
