"""Random numbers by address: what a number is for, the step, the row and the column say what it is.

Drawing for some rows, or for a part of the vocabulary, gives the same numbers as drawing for all of them.  So noise
costs nothing for rows that nobody needs, fuses with what reads it, and no table of it is ever kept.

The generator is SplitMix64's finaliser over a counter (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
Generators", 2014), in int64 arithmetic that wraps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

TOKENS, CONFIDENCE, TRANSFER, CHOICE, CANVAS = range(5)
"""What a number is for."""


def row_keys(seed: int, purpose: int, step: int, rows: Tensor) -> Tensor:
    """One key per row for one purpose and step.

    Args:
        seed, purpose, step: whole numbers.
        rows: int64 [M], what tells the rows apart.

    Returns:
        int64 [M].
    """
    base = seed
    for part in (purpose, step):
        base = _mix_number(base + (part + 1) * _GOLDEN)
    return mix((rows + 1) * _signed(_GOLDEN) + _signed(base))


def uniform(keys: Tensor, count: int) -> Tensor:
    """float64 [M, count] in [0, 1): the numbers of columns 0 to count - 1 of each row.

    Args:
        keys: int64 [M], from :func:`row_keys`.
    """
    columns = torch.arange(1, count + 1, device=keys.device)
    bits = mix(keys.unsqueeze(1) + columns * _signed(_GOLDEN))
    return _shifted(bits, 11).double() * 2.0**-53


def exponential(keys: Tensor, count: int) -> Tensor:
    """float64 [M, count], exponentially distributed with mean 1."""
    return -torch.log1p(-uniform(keys, count))


def mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, int64 -> int64."""
    bits = (bits ^ _shifted(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shifted(bits, 27)) * _signed(_SECOND)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shifted right without the sign."""
    return torch.bitwise_right_shift(bits, by) & ((1 << (64 - by)) - 1)


def _mix_number(bits: int) -> int:
    bits %= 1 << 64
    bits = (bits ^ (bits >> 30)) * _FIRST % (1 << 64)
    bits = (bits ^ (bits >> 27)) * _SECOND % (1 << 64)
    return bits ^ (bits >> 31)


def _signed(bits: int) -> int:
    return (bits + (1 << 63)) % (1 << 64) - (1 << 63)
