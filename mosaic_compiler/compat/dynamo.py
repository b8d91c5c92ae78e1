"""Dynamo: what it compiles, what it says of it, and where it gives up."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo import config
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from torch._dynamo.exc import BackendCompilerFailed, ObservedException, TorchDynamoException
from torch._dynamo.source import UnspecializedNNModuleSource
from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState
from torch._dynamo.utils import graph_break_reasons

__all__ = [
    "RESUMED",
    "BackendCompilerFailed",
    "ObservedException",
    "OptimizedModule",
    "TensorifyState",
    "TorchDynamoException",
    "aot_autograd",
    "code_of_frame",
    "configured",
    "graph_breaks",
    "has_given_up",
    "innermost_backend",
    "lookup_backend",
    "modules_in",
]

RESUMED = "torch_dynamo_resume_in_"
"""What Dynamo calls the rest of a function that it has cut."""


def graph_breaks() -> list[Any]:
    """All graph breaks since Dynamo was reset, each with a reason and the user's stack."""
    return list(graph_break_reasons)


def code_of_frame() -> types.CodeType | None:
    """The function that Dynamo traces now."""
    with contextlib.suppress(AttributeError, LookupError):  # not called by Dynamo
        code: types.CodeType = InstructionTranslator.current_tx().f_code
        return code
    return None


def has_given_up() -> bool:
    """Dynamo runs the caller's frame in eager PyTorch although it was compiled: it has reached its limit."""
    ask: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)
    return ask() is False


def modules_in(source: Any) -> int:
    """How many modules one has to go through to where something stands: 2 for ``self.norm.eps``."""
    count = 0
    while source is not None:
        count += isinstance(source, UnspecializedNNModuleSource)
        source = getattr(source, "base", None)
    return count


def configured(values: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Other settings inside of the ``with`` block, as far as this version has them."""
    patch: AbstractContextManager[Any] = config.patch(
        {name: value for name, value in values.items() if hasattr(config, name)}
    )
    return patch
