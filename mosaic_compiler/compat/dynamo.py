"""Dynamo: what it compiles, what it says of it, and where it gives up."""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo import config, external_utils
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from torch._dynamo.exc import BackendCompilerFailed, ObservedException, TorchDynamoException
from torch._dynamo.source import AttrSource, UnspecializedNNModuleSource
from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState
from torch._dynamo.utils import graph_break_reasons

__all__ = [
    "ANYTHING_MAY_CHANGE",
    "RESUMED",
    "BackendCompilerFailed",
    "ObservedException",
    "OptimizedModule",
    "TensorifyState",
    "TorchDynamoException",
    "code_of_frame",
    "configured",
    "forget_compiled",
    "graph_breaks",
    "has_given_up",
    "innermost_backend",
    "lookup_backend",
    "mark_sizes_fixed",
    "modules_in",
    "owner_of",
    "raised_by_the_model",
    "wrapped_in_frame",
]

_UNLIMITED = 1 << 30
ANYTHING_MAY_CHANGE: Mapping[str, Any] = {
    "skip_nnmodule_hook_guards": False,
    "recompile_limit": _UNLIMITED,
    "accumulated_recompile_limit": _UNLIMITED,
}
"""Configuration with which hooks are looked at, and no number of models or settings is too many: Dynamo counts
compilations per function, and runs the ninth in eager PyTorch."""

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


def wrapped_in_frame() -> Any:
    """What is called in the frame that Dynamo traces now, if it made that frame itself (``None`` otherwise).

    It does for what has no frame of its own that it would look at: modules of PyTorch's, functions without a source.
    """
    code = code_of_frame()
    if code is None or code.co_filename != external_utils.__file__:
        return None
    cells = dict(zip(code.co_freevars, InstructionTranslator.current_tx().closure or (), strict=False))
    return cells["fn"].cell_contents if "fn" in cells else None


def raised_by_the_model(told: BaseException | None, observed: ObservedException) -> str:
    """The error that the traced code itself raises, as Python writes it: ``ValueError('no such thing')``.

    The text of Dynamo's own error in torch 2.13.  In 2.11 that names the type only, and the error that a caller gets
    (``told``) says ``raised exception ValueError([ConstantVariable(str: 'no such thing')])``; of classes that are not
    Python's own it says ``UserDefinedExceptionObjectVariable(MyError)``.
    """
    texts = [str(error).partition("raised exception ")[2].partition("\n")[0] for error in (observed, told)]
    text = next((text for text in texts if text and not text.startswith("ExceptionVariable(")), texts[0])
    text = re.sub(r"ConstantVariable\(\w+: (.*?)\)(?=[\],)])", r"\1", text)
    return re.sub(r"\w+Variable\((\w+)\)", r"\1", re.sub(r"\(\[(.*)\]\)$", r"(\1)", text)).rstrip(".")


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


def owner_of(source: Any) -> nn.Module | None:
    """The module that Dynamo reads an attribute of, while it compiles; ``None`` if it is another kind of source."""
    if not isinstance(source, AttrSource):
        return None
    with contextlib.suppress(AttributeError, LookupError, NameError):  # not called by Dynamo, or found by its helpers
        output = InstructionTranslator.current_tx().output
        owner = source.base.get_value({"L": output.local_scope, "G": output.global_scope}, {}, {})
        return owner if isinstance(owner, nn.Module) else None
    return None


def configured(values: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Other settings inside of the ``with`` block, as far as this version has them."""
    patch: AbstractContextManager[Any] = config.patch(
        {name: value for name, value in values.items() if hasattr(config, name)}
    )
    return patch


def mark_sizes_fixed(tensor: torch.Tensor, dims: Sequence[int]) -> None:
    """Sizes of these dims are numbers, not symbols, where a function that gets the tensor is compiled."""
    for dim in dims:
        torch._dynamo.mark_static(tensor, dim)


def forget_compiled() -> None:
    """Everything is traced again when it is called next."""
    torch._dynamo.reset()
