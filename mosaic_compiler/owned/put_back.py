"""A model is as it was, whatever was done with it on tensors without memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mosaic_compiler.owned.objects import SEQUENCES


class NotDirectError(Exception):
    """Why a function is left to Dynamo."""


class ReadsTensorError(NotDirectError):
    """It makes something of Python's of what is in a tensor: nothing that Dynamo makes of it may be kept, either."""

    def __init__(self) -> None:
        super().__init__("it reads what is in a tensor")


@contextmanager
def left_alone(holders: Sequence[Any]) -> Iterator[None]:
    """Lists, dicts and objects hold afterwards what they did before: a model may remember tensors without memory.

    Raises:
        NotDirectError: if one held something else.
    """
    held = [(holder, _contents(holder)) for holder in holders]
    try:
        yield
    finally:
        changed = [(holder, before) for holder, before in held if not _is_same(_contents(holder), before)]
        for holder, before in changed:
            if isinstance(holder, (list, deque)):
                holder.clear()
                holder.extend(before)
            else:
                owner = holder if isinstance(holder, (dict, set)) else holder.__dict__
                owner.clear()
                owner.update(before)
    if changed:
        raise NotDirectError(f"it remembers something in a {type(changed[0][0]).__name__}")


def _contents(holder: Any) -> Any:
    """A copy of what it holds."""
    if isinstance(holder, SEQUENCES):
        return holder.copy()
    return dict(holder if isinstance(holder, dict) else holder.__dict__)


def _is_same(now: Any, before: Any) -> bool:
    if isinstance(now, (list, deque)):
        return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
    if isinstance(now, set):
        return len(now) == len(before) and now == before
    return now.keys() == before.keys() and all(now[key] is value for key, value in before.items())


@contextmanager
def replaced(modules: Sequence[nn.Module], weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Parameters and buffers without memory; afterwards modules have what they had.

    Raises:
        NotDirectError: if a module has got something else meanwhile.
    """
    held = [(module, dict(module.__dict__)) for module in modules]
    inner: list[tuple[Any, dict[str, Any]]] = [
        (owner, dict(owner)) for module in modules for owner in (module._parameters, module._buffers, module._modules)
    ]
    try:
        for owner, values in inner:
            for name, value in values.items():
                if isinstance(value, Tensor):
                    owner[name] = weights[id(value)]
        yield
        for owner, values in inner:
            if owner.keys() != values.keys() or any(
                owner[name] is not weights.get(id(value), value) for name, value in values.items()
            ):
                raise NotDirectError("it sets parameters, buffers or children")
        for module, values in held:
            now = module.__dict__
            if now.keys() != values.keys() or any(now[name] is not value for name, value in values.items()):
                raise NotDirectError("it sets attributes of modules")
    finally:
        for owner, values in inner:
            owner.clear()
            owner.update(values)
        for module, values in held:
            module.__dict__.clear()
            module.__dict__.update(values)
