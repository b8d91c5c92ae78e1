"""Why a function could not be traced, in one line: the error behind Dynamo's, and where in the model's code it is.

Dynamo's own message begins with what it was doing (``TypeError when making fake tensor call``); what went wrong is in
the errors that it came from, and where is in the stack that it was tracing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mosaic_compiler.compat.dynamo import ObservedException, TorchDynamoException, raised_by_the_model


def is_graph_break(error: Exception) -> bool:
    """Dynamo cannot trace it; in eager it may well run."""
    return _origin(error) is None


def what_and_where(error: Exception) -> str:
    """The innermost error, and the file and line that raised it."""
    found = _origin(error)
    text = _first_line(error) if found is None else found
    place = _place(error)
    return text if place is None else f"{text} ({place})"


def _origin(error: BaseException | None) -> str | None:
    """The innermost error that is not Dynamo's; ``None`` if all are."""
    found, outermost = None, error
    while error is not None:
        if isinstance(error, ObservedException):  # one that the model raises: it is only in the text
            found = raised_by_the_model(outermost, error)
        elif not isinstance(error, TorchDynamoException):
            found = f"{type(error).__name__}: {_first_line(error)}"
        error = error.__cause__ or error.__context__
    return found


def _place(error: BaseException | None) -> str | None:
    """``file:line in function`` of the innermost frame that is not PyTorch's."""
    stack = None
    while error is not None and not stack:
        stack, error = getattr(error, "real_stack", None), error.__cause__ or error.__context__
    own = os.path.dirname(torch.__file__) + os.sep
    frames = [frame for frame in stack or () if not frame.filename.startswith(own)]
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def without_tracebacks() -> Iterator[None]:
    """PyTorch logs a traceback of 20 lines for each operator that refuses its operands: the error says it in one."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(_is_no_failure)
    try:
        yield
    finally:
        log.removeFilter(_is_no_failure)


def _is_no_failure(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("failed while attempting to run meta")
