"""Row numbers of sequences, as steps that compute some rows take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.errors import StateError


def rows_of(rows: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """Row numbers int64 [B, R] of each sequence, on a device.

    Args:
        rows: int64 [R] (for each sequence) or [B, R], numbers (a ``range``), or bool [B, N].  Those that are on the
            host are looked at without waiting for the device.

    Raises:
        StateError: for none, or some that the sequences have not.
    """
    given = rows if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=torch.int64)
    if given.dtype == torch.bool:
        if given.shape not in ((length,), (1, length), (batch, length)):
            raise StateError(f"a mask of rows must be [{batch}, {length}], as the ids are; got {list(given.shape)}")
        given = given.expand(batch, length)
        most = int(given.sum(1).max()) if batch else 0
        if not most or not bool(given.any(1).all()):
            raise StateError("a mask of rows must have at least one in each sequence")
        given = numbers_in(given, most)
    elif given.is_floating_point() or given.is_complex():
        raise StateError(f"rows must be whole numbers or a mask, got {given.dtype}")
    if given.dim() not in (1, 2) or not given.numel():
        raise StateError(f"rows must be [R] or [B, R] with at least one row, got {list(given.shape)}")
    given = given.to(torch.int64)
    given = given.expand(batch, -1) if given.dim() == 1 or given.shape[0] == 1 else given
    if given.shape[0] != batch:
        raise StateError(f"rows are given for {given.shape[0]} sequences, ids have {batch}")
    least, most = (int(value) for value in torch.aminmax(given))
    if least < 0 or most >= length:
        raise StateError(f"rows {least} to {most} are not within the sequence: it has rows 0 to {length - 1}")
    if device.type == "cuda" and given.device.type == "cpu":
        return given.contiguous().pin_memory().to(device, non_blocking=True)
    return given.to(device)


def numbers_in(mask: Tensor, most: int) -> Tensor:
    """Where a mask [B, N] holds, in each row of it: int64 [B, most], the last one again where others have more (and 0
    where it holds nowhere).

    Args:
        most: the largest number of places in a row, at least 1.
    """
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    last = mask.sum(1, keepdim=True).sub(1).clamp(min=0)
    places = torch.minimum(torch.arange(most, device=mask.device).expand_as(order), last)
    return order.gather(1, places)


def with_rows_before(mask: Tensor) -> Tensor:
    """Rows [B, N], and those right before them: where what is in a row is read from the one before."""
    wider = mask.clone()
    wider[:, :-1] |= mask[:, 1:]
    return wider
