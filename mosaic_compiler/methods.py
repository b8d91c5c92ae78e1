"""Methods of a compiled model run the model that is not compiled, and nobody is told: here they are.

``torch.compile(model)`` returns a module of its own.  ``compiled.diffusion_generate(...)`` is a method of the model
behind it, whose ``self`` is that model, so the forward passes in it are not compiled.  (``model.compile(...)`` compiles
the model itself, methods and all.)
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from typing import Any

from torch import nn

from mosaic_compiler.compat.dynamo import OptimizedModule, innermost_backend
from mosaic_compiler.runtime.step import running

logger = logging.getLogger("mosaic_compiler")


def watch_methods() -> None:
    """From now on, methods of models that were compiled with ``needed_rows`` say so if they run uncompiled forwards."""
    look_up = OptimizedModule.__getattr__
    if getattr(look_up, "_is_watching", False):
        return

    @functools.wraps(look_up)
    def watching(self: OptimizedModule, name: str) -> Any:
        found = look_up(self, name)
        model = self.__dict__.get("_modules", {}).get("_orig_mod")
        is_method = inspect.ismethod(found) and found.__self__ is model
        return _watched(found, model) if is_method and _needs_rows(self) else found

    watching._is_watching = True  # type: ignore[attr-defined]
    OptimizedModule.__getattr__ = watching  # type: ignore[method-assign]


def _needs_rows(compiled: OptimizedModule) -> bool:
    """It was compiled by this backend, with an option that its caller's loop is to profit from."""
    callback: Any = compiled.dynamo_ctx.callback
    backend: Any = innermost_backend(callback)
    given = getattr(backend, "kwargs", {}).get("options") or {}
    return getattr(backend, "compiler_name", None) == "mosaic" and given.get("needed_rows", "all") != "all"


def _watched(method: Any, model: nn.Module) -> Any:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        forwards: list[Any] = []
        ran: list[Any] = []
        hook = model.register_forward_pre_hook(lambda module, inputs: forwards.append(None))
        try:
            with running(ran.append):
                return method(*args, **kwargs)
        finally:
            hook.remove()
            if forwards and not ran:
                text = (
                    f"{method.__name__}() of a compiled model ran the model that is not compiled, with all rows: a "
                    "method's self is the model behind torch.compile. Compile the model itself: model.compile("
                    f"backend='mosaic', dynamic=True, options=...), then model.{method.__name__}(...)"
                )
                logger.warning("mosaic: eager: %s", text)
                warnings.warn(text, stacklevel=2)

    return call
