"""Precisions of state: in how many bits kept values are written down.

A value is ``code * scale``: one scale for each token and head, which the largest number of them decides (``K`` behind
its rotary embedding, as it is kept)::

    scale = max_i |x_i| / most          code_i = round(x_i / scale) within [-most, most]

Scales are float32 (a kernel may leave out the rounding to a shorter type in between).  4-bit codes stand two in a byte.
A step attends to what it computes as it is, and to what it does not compute as it was kept.
"""

from __future__ import annotations

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


def precision_of(name: str | None) -> Precision | None:
    """The precision with this name.

    Raises:
        ValueError: if there is none.
    """
    if name is not None and (not isinstance(name, str) or name not in PRECISIONS):
        valid = ", ".join((*PRECISIONS, "auto"))
        raise ValueError(f"cache_dtype={name!r} is not one of {valid} (None keeps values as they are computed)")
    return None if name is None else PRECISIONS[name]
