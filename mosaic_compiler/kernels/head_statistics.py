"""What samplers read of logits, without the logits: running statistics over tiles of the vocabulary.

For each row of ``x = steps(hidden @ weight + bias)`` ([M, V], never held whole):

    maximum m and the lowest index that has it; s = sum exp(x - m); t = sum x exp(x - m); top-k

from which softmax confidence is 1 / s, logsumexp m + log s, and the entropy log s + m - t / s.  The running
update is that of online softmax (Milakov and Gimelshein, 2018): when the maximum grows from m to m', the sums
are scaled by exp(m - m').
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def apply_steps(x: Tensor, steps: str) -> Tensor:
    """Pointwise steps between the product and the sampler, such as ``div:30.0,tanh,mul:30.0,to:float32``."""
    for step in filter(None, steps.split(",")):
        name, _, value = step.partition(":")
        if name == "mul":
            x = x * float(value)
        elif name == "div":
            x = x / float(value)
        elif name == "tanh":
            x = torch.tanh(x)
        elif name == "to":
            x = x.to(getattr(torch, value))
        else:
            raise ValueError(f"unknown step {step!r}: use mul, div, tanh or to")
    return x


def head_statistics_(
    results: Sequence[Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None, steps: str, tile: int
) -> None:
    """Write (max, argmax, s, t, top values, top indices) into ``results``.

    Args:
        results: [M] of the logits' dtype, int64 [M], two [M] of float32 (float64 for float64), [M, k], int64 [M, k].
        hidden: [M, D].
        weight: [D, V], any strides (the transposed view of a head's weight).
        bias: [V] or ``None``.
        steps: see :func:`apply_steps`.
        tile: columns of the vocabulary at a time.

    NaN counts as the largest value, as for ``torch.argmax``; of equal maxima the lowest index wins.
    """
    best, where, total, weighted, top_values, top_indices = results
    vocabulary, top = weight.shape[1], top_values.shape[1]
    if hidden.shape[0] == 0:
        return
    work = hidden.new_empty(hidden.shape[0], min(tile, vocabulary))
    for start in range(0, vocabulary, tile):
        end = min(start + tile, vocabulary)
        product = work[:, : end - start]
        if bias is None:
            torch.mm(hidden, weight[:, start:end], out=product)
        else:
            torch.addmm(bias[start:end], hidden, weight[:, start:end], out=product)
        x = apply_steps(product, steps)  # [M, tile]
        high, at = x.max(dim=-1)
        exponent = x.to(total.dtype) - high.to(total.dtype).unsqueeze(-1)
        exponent.exp_()
        part = exponent.sum(-1)
        part_weighted = exponent.mul_(x).sum(-1)
        if start == 0:
            best.copy_(high)
            where.copy_(at)
            total.copy_(part)
            weighted.copy_(part_weighted)
            if top:
                _merge_top(x, 0, None, top_values, top_indices)
            continue
        # A later tile wins only if it is really higher (or the first NaN).
        better = (high > best) | (high.isnan() & ~best.isnan())
        new = torch.where(better, high, best)
        old_scale = (best.to(total.dtype) - new.to(total.dtype)).exp_()
        new_scale = (high.to(total.dtype) - new.to(total.dtype)).exp_()
        total.mul_(old_scale).addcmul_(part, new_scale)
        weighted.mul_(old_scale).addcmul_(part_weighted, new_scale)
        where.copy_(torch.where(better, at + start, where))
        best.copy_(new)
        if top:
            _merge_top(x, start, (top_values.clone(), top_indices.clone()), top_values, top_indices)


def _merge_top(
    x: Tensor, start: int, known: tuple[Tensor, Tensor] | None, top_values: Tensor, top_indices: Tensor
) -> None:
    """The k largest of those known and a tile's, sorted; known ones (lower indices) first among equals."""
    top = top_values.shape[1]
    values, indices = x.topk(min(top, x.shape[1]), dim=-1)
    indices = indices + start
    if known is not None:
        values, indices = torch.cat((known[0], values), -1), torch.cat((known[1], indices), -1)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        indices = indices.gather(-1, order)
    if values.shape[1] < top:  # the first tile is narrower than k: the rest follows with the next ones
        raise ValueError(f"the tile must hold at least the top {top} columns")
    top_values.copy_(values[:, :top])
    top_indices.copy_(indices[:, :top])
