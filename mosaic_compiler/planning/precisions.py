"""Precisions of state: in how many bits kept values are written down.

A value is ``code * scale``: one scale for each token and head, which the largest number of them decides (``K`` behind
its rotary embedding, as it is kept)::

    scale = max_i |x_i| / most          code_i = round(x_i / scale) within [-most, most]

Scales are float32 (a kernel may leave out the rounding to a shorter type in between).  4-bit codes stand two in a byte.
A step attends to what it computes as it is, and to what it does not compute as it was kept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Precision:
    """How kept values are written.

    Attributes:
        bits: of a code.
        most: the largest code; ``None``: no scale, numbers are only rounded.
        says: what it is, for people.
    """

    bits: int
    most: float | None
    says: str


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "bf16": Precision(16, None, "bfloat16"),
        "fp8": Precision(8, 448.0, "8-bit floats (e4m3), a scale per token and head"),
        "int8": Precision(8, 127.0, "8-bit integers, a scale per token and head"),
        "int4": Precision(4, 7.0, "4-bit integers, a scale per token and head"),
    }
)
"""By the names that ``cache_dtype=`` and ``--cache-dtype`` take; no name at all: as they are computed, exactly."""

LADDER: tuple[str | None, ...] = (None, "int8", "int4")
"""What ``auto`` tries, in this order, until state and steps fit the memory budget."""


EXACT = "exact"
"""In a choice by layers: as they are computed."""


def precision_of(name: str | None) -> None:
    """Raises :class:`ValueError` for what is neither a precision nor a choice by layers (:func:`precision_at`)."""
    if name is None:
        return
    try:
        _layers(name)
    except (ValueError, AttributeError, TypeError):
        valid = ", ".join((*PRECISIONS, "auto"))
        raise ValueError(
            f"cache_dtype={name!r} is not one of {valid} (None keeps values as they are computed), nor a choice by "
            f"layers, such as 2*{EXACT}+int4 (the first two layers as computed, all others in 4 bits)"
        ) from None


def check_residual(rows: int, precision: str | None, keep: float | int | None) -> None:
    """Raises :class:`ValueError` for a number of rows at a sequence's end that cannot be kept as they are computed."""
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
        raise ValueError(f"cache_residual must be a number of rows from 0, got {rows!r}")
    if rows and (precision is None or keep is not None):
        raise ValueError(
            f"cache_residual={rows} keeps the last rows as they are computed beside all rows in fewer bits: give "
            "cache_dtype ('int4', for example), and no cache_keep"
        )


def precision_at(name: str | None, layer: int) -> str | None:
    """The precision of one layer (attentions count, from 0 on).

    ``2*exact+int8+int4``: the first two as they are computed, the third in 8 bits, all others in 4.
    """
    if name is None or name in PRECISIONS:
        return name
    layers = _layers(name)
    return layers[min(layer, len(layers) - 1)]


@functools.cache
def _layers(name: str) -> tuple[str | None, ...]:
    found: list[str | None] = []
    for part in name.split("+"):
        count, star, precision = part.rpartition("*")
        is_count = count.isascii() and count.isdigit() and len(count) < 5 and int(count) > 0
        if is_count != bool(star) or (precision != EXACT and precision not in PRECISIONS):
            raise ValueError(part)
        number = int(count) if star else 1
        found += [None if precision == EXACT else precision] * number
    return tuple(found)
