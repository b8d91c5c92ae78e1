"""Results that share memory with an operand, or with each other, although the operator's schema does not say so.

A plan gives the bytes of what has died to somebody else.  Who died is read from schemas, and a schema can be wrong: a
custom op that returns its argument where there is nothing to do, say.  So what an opaque op returns is looked at: of
PyTorch's own ops until it was once in order, of others in every call, because they may decide by their data.  A
result that lies in other memory than its own is copied, and the op is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler.runtime.instructions import Instruction, Slot

_OURS = frozenset({"aten", "prims", "mosaic"})


def watched(
    node: fx.Node, run: Instruction, arguments: Any, slots: list[Any], found: Callable[[fx.Node], None]
) -> Instruction:
    """``run``, and copies of those of its results that lie in memory of an operand or of a result before them.

    Args:
        node: the op, whose schema says that its results are memory of their own.
        arguments: nested, of tensors, slots and what else it is called with.
        found: called with the node where that is not so.
    """
    operands = [leaf for leaf in _leaves(arguments) if isinstance(leaf, (torch.Tensor, Slot))]
    once = isinstance(node.target, OpOverload) and node.target.namespace in _OURS
    if not operands and once:
        return run
    trusted = False

    def instruction() -> Any:
        nonlocal trusted
        results = run()
        if trusted:
            return results
        given = [slots[operand.index] if isinstance(operand, Slot) else operand for operand in operands]
        taken = [_bytes_of(tensor) for tensor in given if isinstance(tensor, torch.Tensor)]
        is_single = not isinstance(results, (tuple, list))
        own = [_own(result, taken) for result in ((results,) if is_single else results)]
        if any(kept is not result for kept, result in zip(own, (results,) if is_single else results, strict=True)):
            found(node)
            return own[0] if is_single else own
        trusted = once
        return results

    return instruction


def _own(result: Any, taken: list[tuple[int, int]]) -> Any:
    """The result, or a copy of it if it begins in bytes that are taken.  Its bytes are taken then."""
    if not isinstance(result, torch.Tensor) or result.layout != torch.strided or not result.numel():
        return result
    start = result.data_ptr()
    if any(low <= start < high for low, high in taken):
        copy = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device)
        result = copy.copy_(result)
    taken.append(_bytes_of(result))
    return result


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's storage."""
    if tensor.layout != torch.strided:
        return 0, 0
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
