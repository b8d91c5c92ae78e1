"""Rotary positions for texts longer than a model was trained on: the base of its angles times a factor, for a while.

    base 500,000, 128 dims, trained on 4,096 tokens:  factor 3.4 for 8,192 tokens, 13.6 for 16,384, 54.4 for 32,768

Nothing is found by the name of a model.  Angles are known by their values: a buffer [m] that is ``base ** -(i / m)``.
Tables are, too: [n, d] with rows of ``cos`` or ``sin`` of position times angle, in a buffer or in a dict that a module
keeps.  Code that makes its tables when it is called (LLaDA's) has a number ``rope_theta``, besides.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.sampling.request import check_factor

_TRAINED = ("original_max_position_embeddings", "max_position_embeddings", "max_sequence_length")
_BASES = ("rope_theta", "rotary_base", "rope_base")
_LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda angles: torch.cat([angles, angles], -1),
    lambda angles: angles.repeat_interleave(2, -1),
    lambda angles: angles,
)


def longllada_factor(base: float, depth: int, trained: int, wanted: int) -> float:
    """What the base of rotary angles is multiplied by, so that ``wanted`` tokens can be told apart.

    Dims whose period was seen whole in training, ``critical = 2 ceil(depth / 2 log_base(trained / 2 pi))`` of them, go
    on as they are::

        factor = (wanted / 2 pi) ** (depth / critical) / base          1 where wanted <= trained

    Source: Liu et al., "LongLLaDA" (2025), arXiv 2506.14429.

    Args:
        base: the base that the model was trained with.
        depth: dims that are rotated.
        trained: tokens of the longest texts in training.
        wanted: tokens of the text.
    """
    if wanted <= trained:
        return 1.0
    turns = math.log(max(trained / math.tau, 1.0)) / math.log(base)
    critical = 2 * max(math.ceil(depth / 2 * turns), 1)
    return max(float((wanted / math.tau) ** (depth / critical)) / base, 1.0)


def ultrallada_factor(base: float, depth: int, trained: int, wanted: int) -> float:
    """The same for rows that see as far ahead as back: both lengths count twice.

    Source: He et al., "UltraLLaDA" (2025), arXiv 2510.10481, whose model was trained on with it.
    """
    return longllada_factor(base, depth, 2 * trained, 2 * wanted) if wanted > trained else 1.0


FACTORS: Mapping[str, Callable[[float, int, int, int], float]] = MappingProxyType(
    {"auto": longllada_factor, "longllada": longllada_factor, "ultrallada": ultrallada_factor}
)
"""By the names that ``request.ROPE_FACTORS`` lists."""

_lock = threading.Lock()
_running: weakref.WeakKeyDictionary[nn.Module, list[float | str | None]] = weakref.WeakKeyDictionary()
"""Factors of the calls that run a model now."""


@contextmanager
def scaled_rotary(model: nn.Module, factor: float | str | None, wanted: int) -> Iterator[float]:
    """A model whose rotary base is ``factor`` times what it is, until the block ends.

    Args:
        factor: a number, one of :data:`FACTORS`, or ``None``: as it is.
        wanted: tokens of the texts that it is to read.

    Yields:
        The factor.

    Raises:
        ValueError: for no such factor, or a model whose positions are not rotary, of several kinds, or scaled already.
    """
    check_factor(factor)
    with _alone(model, factor), _scaled(model, factor, wanted) as found:
        yield found


@contextmanager
def _alone(model: nn.Module, factor: float | str | None) -> Iterator[None]:
    """Others may run the model at the same time only if nobody changes it."""
    with _lock:
        running = _running.setdefault(model, [])
        if running and any(other not in (None, 1) for other in (*running, factor)):
            raise ValueError(
                f"rope_factor changes {type(model).__name__} while it runs, and another generate() runs it at the same "
                "time: one after the other, or a copy of the model for each"
            )
        running.append(factor)
    try:
        yield
    finally:
        with _lock:
            running.remove(factor)


@contextmanager
def _scaled(model: nn.Module, factor: float | str | None, wanted: int) -> Iterator[float]:
    if factor is None or factor == 1:
        yield 1.0
        return
    rotary = find_rotary(model)
    if isinstance(factor, str):
        factor = FACTORS[factor](rotary.base, rotary.depth, _trained_on(model), wanted)
    if factor == 1:
        yield 1.0
        return
    with rotary.times(float(factor)):
        yield float(factor)


@dataclass(frozen=True)
class _Table:
    """``of(position * angle)``, [.., n, d]."""

    values: Tensor
    of: Callable[[Tensor], Tensor]
    layout: Callable[[Tensor], Tensor]

    @property
    def depth(self) -> int:
        return self.values.shape[-1] * (2 if _is_plain(self.layout) else 1)

    def fill(self, base: float) -> None:
        """Make it anew."""
        angles = _angles(base, self.depth // 2, self.values.device)
        self.values.copy_(_table(angles, self.values.shape[-2], self.of, self.layout))


@dataclass(frozen=True)
class Rotary:
    """What a model's rotary positions are made of.

    Attributes:
        base: of all its angles.
        depth: dims that are rotated.
        angles: buffers [depth / 2].
        numbers: attributes of modules that are the base.
        tables: cosines and sines that stand ready.
        holders: the modules that have any of these: as they are before, they are afterwards.
    """

    base: float
    depth: int
    angles: tuple[Tensor, ...]
    numbers: tuple[tuple[nn.Module, str], ...]
    tables: tuple[_Table, ...]
    holders: tuple[nn.Module, ...]

    @contextmanager
    def times(self, factor: float) -> Iterator[None]:
        """The base times ``factor``, until the block ends."""
        tensors = [*self.angles, *(table.values for table in self.tables)]
        before = [tensor.clone() for tensor in tensors]
        held = [_held(part) for part in self.holders]
        try:
            with torch.no_grad():
                for values in self.angles:
                    place = torch.arange(len(values), device=values.device, dtype=torch.float64) / len(values)
                    values.copy_(values.double() * factor**-place)
                for table in self.tables:
                    table.fill(self.base * factor)
            for part, name in self.numbers:
                setattr(part, name, getattr(part, name) * factor)
            yield
        finally:
            for each in held:  # longer tables may have been made since, and numbers that say how long they are
                for owner, entries in each:
                    owner.clear()
                    owner.update(entries)
            with torch.no_grad():
                for tensor, values in zip(tensors, before, strict=True):
                    tensor.copy_(values)


def _held(part: nn.Module) -> list[tuple[MutableMapping[Any, Any], dict[Any, Any]]]:
    """What a module has, and what is in its dicts."""
    dicts = [vars(part), *(value for value in vars(part).values() if isinstance(value, MutableMapping))]
    return [(each, dict(each)) for each in dicts if each is not part._modules]


def find_rotary(model: nn.Module) -> Rotary:
    """What a model's rotary positions are made of.

    Raises:
        ValueError: if they are not rotary, of several kinds, or scaled already.
    """
    name = type(model).__name__
    if (kind := _scaling_of(getattr(model, "config", None))) is not None:
        raise ValueError(
            f"rope_factor is for rotary positions that are not scaled otherwise, and {name}'s config says {kind!r}: "
            "leave rope_factor out, or that scaling"
        )
    numbers = tuple((part, at) for part in model.modules() for at in _BASES if _is_base(getattr(part, at, None)))
    known = {float(getattr(*number)) for number in numbers}
    angles = {_place(b): (b, base) for b in model.buffers() if (base := _base_of(b)) is not None}
    bases = known | {base for _, base in angles.values()}
    alike = [base for base in bases if math.isclose(base, max(bases), rel_tol=1e-2)]
    depths = {2 * len(buffer) for buffer, _ in angles.values()}
    base = next(iter(known), max(bases, default=0.0))
    tables = tuple(_tables_of(model, base)) if bases else ()
    depths |= {table.depth for table in tables}
    if not bases or not depths:
        raise ValueError(
            f"rope_factor: {name} has no rotary positions that we know (a buffer of base ** -(i / m), or tables of "
            "cosines and sines and a rope_theta): leave it out"
        )
    if len(alike) != len(bases) or len(depths) > 1:
        raise ValueError(
            f"rope_factor: {name} has rotary positions of several kinds (bases {sorted(bases)}, dims {sorted(depths)}),"
            " and it is not known which of them a factor is for: leave it out"
        )
    found = tuple(buffer for buffer, _ in angles.values())
    places = {_place(tensor) for tensor in (*found, *(table.values for table in tables))}
    holders = [part for part, _ in numbers]
    holders += [part for part in model.modules() if any(_place(tensor) in places for tensor in _tensors_of(part))]
    return Rotary(base, depths.pop(), found, numbers, tables, tuple(dict.fromkeys(holders)))


def _is_base(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 1


def _base_of(buffer: Tensor) -> float | None:
    """The base of which a buffer has the angles, if it has any."""
    if buffer.dim() != 1 or len(buffer) < 2 or not buffer.is_floating_point() or buffer.device.type == "meta":
        return None
    values = buffer.detach().double().cpu()
    if not (values[0] == 1 and 0 < values[-1] < 1):
        return None
    count = len(values)
    base = float(values[-1]) ** (-count / (count - 1))
    exact = base ** -(torch.arange(count, dtype=torch.float64) / count)
    is_close = torch.allclose(values, exact, rtol=4 * torch.finfo(buffer.dtype).eps + 1e-5, atol=0)
    return float(f"{base:.6g}") if is_close else None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Two tensors that lie there are one."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device


def _tensors_of(part: nn.Module) -> Iterator[Tensor]:
    """Buffers, attributes, and what stands in dicts and tuples there; no weights."""
    todo: list[Any] = [value for value in vars(part).values() if value is not part._modules]
    todo = [value for value in todo if value is not part._parameters]
    for _ in range(3):
        inner: list[Any] = []
        for value in todo:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, MutableMapping):
                inner += value.values()
            elif isinstance(value, list | tuple) and len(value) <= 8:
                inner += value
        todo = inner


def _tables_of(model: nn.Module, base: float) -> Iterator[_Table]:
    seen: set[tuple[Any, ...]] = set()
    for part in model.modules():
        for tensor in _tensors_of(part):
            if tensor.dim() < 2 or _place(tensor) in seen:
                continue
            seen.add(_place(tensor))
            if (kind := _kind_of(tensor, base)) is not None:
                yield _Table(tensor, *kind)


def _kind_of(tensor: Any, base: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """What a table is of, and how its columns stand."""
    if not isinstance(tensor, Tensor) or tensor.dim() < 2 or tensor.device.type == "meta":
        return None
    *others, rows, columns = tensor.shape
    if math.prod(others) != 1 or rows < 2 or columns < 2 or columns % 2 or not tensor.is_floating_point():
        return None
    some = tensor.detach().reshape(rows, columns)[:8].float().cpu()
    if not bool((some[0] == some[0, 0]).all()) or float(some[0, 0]) not in (0.0, 1.0):
        return None
    for of in (torch.cos, torch.sin):
        for layout in _LAYOUTS:
            angles = _angles(base, columns // (1 if _is_plain(layout) else 2), some.device)
            exact = _table(angles, len(some), of, layout)
            if torch.allclose(some, exact, rtol=0, atol=4 * torch.finfo(tensor.dtype).eps + 1e-4):
                return of, layout
    return None


def _is_plain(layout: Callable[[Tensor], Tensor]) -> bool:
    return layout is _LAYOUTS[-1]


def _angles(base: float, count: int, device: torch.device) -> Tensor:
    return 1.0 / base ** (torch.arange(count, device=device, dtype=torch.float32) / count)


def _table(angles: Tensor, rows: int, of: Callable[[Tensor], Tensor], layout: Callable[[Tensor], Tensor]) -> Tensor:
    positions = torch.arange(rows, device=angles.device, dtype=torch.float32)
    return of(layout(positions.unsqueeze(1) * angles))


def _scaling_of(config: Any) -> str | None:
    """The kind of scaling that a config asks for."""
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(config, name, None)
        for entry in (given, *(given.values() if isinstance(given, Mapping) else ())):
            kind = entry.get("rope_type", entry.get("type")) if isinstance(entry, Mapping) else None
            if isinstance(kind, str) and kind != "default":
                return kind
    return None


def _trained_on(model: nn.Module) -> int:
    """Tokens of the longest texts that a model was trained on, as its config says."""
    config = getattr(model, "config", None)
    for name in _TRAINED:
        if isinstance(found := getattr(config, name, None), int):
            return found
    raise ValueError(
        f"rope_factor='auto': {type(model).__name__}'s config does not say how many tokens it was trained on "
        f"({', '.join(_TRAINED)}): give a number, such as mosaic_compiler.sampling.rotary.longllada_factor() returns"
    )
