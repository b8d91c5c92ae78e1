"""An independent implementation of what is kept: whole sequences in eager PyTorch, with keys and values replaced.

Every call of ``scaled_dot_product_attention`` is one place where keys and values are needed whole.  In a step for some
rows all rows are computed, but attention sees the new keys and values of those rows only; what is computed of the
others is looked at by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

_sdpa = F.scaled_dot_product_attention


def rounded(x: Tensor, precision: str | None) -> Tensor:
    """Keys or values [.., d] as they are read back."""
    if precision is None:
        return x.clone()
    if precision == "bf16":
        return x.bfloat16().to(x.dtype)
    most = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[precision]
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30) * (1 / most)
    codes = wide / scale
    codes = codes.clamp(-most, most).to(torch.float8_e4m3fn).float() if precision == "fp8" else codes.round()
    return (codes.clamp(-most, most) * scale).to(x.dtype)


def closeness(precision: str | None) -> dict[str, float]:
    """How close results are: where scales come behind products, a number is not rounded to float32 first."""
    return {} if precision is None or precision == "bf16" else {"atol": 1e-5, "rtol": 1e-5}


class Kept:
    """Keys and values of each attention of a function, in the order of its calls; ``precision``: of all, or of each;
    ``residual``: so many rows at the end are as they are."""

    def __init__(
        self, function: Callable[..., Any], precision: str | list[str | None] | None = None, residual: int = 0
    ) -> None:
        self.function, self.precision, self.residual = function, precision, residual
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def _at(self, number: int) -> str | None:
        return self.precision[number] if isinstance(self.precision, list) else self.precision

    def _rounded(self, x: Tensor, precision: str | None) -> Tensor:
        found = rounded(x, precision)
        begin = max(x.shape[2] - self.residual, 1)
        if self.residual:
            found[:, :, begin:] = x[:, :, begin:]
        return found

    def full(self, *args: Any, **named: Any) -> Any:
        """Call the function; remember keys and values."""
        self.keys, self.values = [], []

        def attend(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
            precision = self._at(len(self.keys))
            self.keys.append(self._rounded(key, precision))
            self.values.append(self._rounded(value, precision))
            return _sdpa(query, key, value, *more, **options)

        with _attention(attend):
            return self.function(*args, **named)

    def reuse(self, rows: Tensor, *args: Any, **named: Any) -> Any:
        """The same, where only rows [B, R] get new keys and values (of more entries than B: those again)."""
        numbers = iter(range(len(self.keys)))

        def attend(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
            number = next(numbers)
            entries = rows.repeat(key.shape[0] // rows.shape[0], 1)
            is_new = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device).scatter(
                1, entries, True
            )
            chosen = is_new[:, None, :, None]
            seen = [torch.where(chosen, key, self.keys[number]), torch.where(chosen, value, self.values[number])]
            self.keys[number], self.values[number] = (
                torch.where(chosen, self._rounded(new, self._at(number)), old)
                for new, old in zip((key, value), seen, strict=True)
            )
            return _sdpa(query, *seen, *more, **options)

        with _attention(attend):
            return self.function(*args, **named)


@contextmanager
def _attention(attend: Callable[..., Tensor]) -> Iterator[None]:
    with mock.patch.object(F, "scaled_dot_product_attention", attend), torch.no_grad():
        yield
