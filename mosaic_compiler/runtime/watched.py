"""What opaque ops return, held against what their schemas and fake kernels say.

A plan gives the bytes of what has died to somebody else.  Who died is read from schemas, and a schema can be wrong: a
custom op that returns its argument where there is nothing to do, say.  Kernels that read raw memory take strides from
fake tensors, and a fake kernel can be wrong: ``empty_like`` of a transposed tensor where the real one is dense.  So
what an opaque op returns is looked at: of PyTorch's own ops until it was once in order, of others in every call,
because they may decide by their data.  A result that lies in other memory than its own, or in another layout, is
copied, and the op is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from mosaic_compiler import ir
from mosaic_compiler.compat.tensors import with_lazy_bits
from mosaic_compiler.errors import CaptureError
from mosaic_compiler.planning.lowered import LoweredOp
from mosaic_compiler.runtime.instructions import Instruction, Slot
from mosaic_compiler.runtime.link import Linked

_OURS = frozenset({"aten", "prims", "mosaic"})


Layout: TypeAlias = "tuple[tuple[int, ...], str] | None"
"""Strides and lazy bits."""
Found: TypeAlias = "Callable[[LoweredOp, str], None]"


def watched(
    linked: Linked,
    run: Instruction,
    arguments: Any,
    layouts: Sequence[Layout],
    taken: tuple[int, int],
    slots: list[Any],
    found: Found,
) -> Instruction:
    """``run``, and copies of those of its results that are not what a plan takes them for.

    Args:
        linked: the op, whose schema says that its results are memory of their own.
        arguments: nested, of tensors, slots and what else it is called with.
        layouts: of the results, where they are known when the op is bound.
        taken: addresses of the arena.
        found: called with the op and ``undeclared-alias`` or ``undeclared-layout`` where that is not so.

    The call raises :class:`CaptureError` where a fake kernel is wrong about the number of dims.
    """
    operands = [leaf for leaf in _leaves(arguments) if isinstance(leaf, (torch.Tensor, Slot))]
    once = linked.op.target.partition(".")[0] in _OURS
    trusted = False

    def instruction() -> Any:
        nonlocal trusted
        results = run()
        if trusted:
            return results
        given = [slots[operand.index] if isinstance(operand, Slot) else operand for operand in operands]
        occupied = [taken, *(_bytes_of(tensor) for tensor in given if isinstance(tensor, torch.Tensor))]
        is_single = not isinstance(results, (tuple, list))
        own, is_clean = [], True
        for result, layout in zip((results,) if is_single else results, layouts, strict=True):
            if isinstance(result, torch.Tensor) and result.layout == torch.strided and result.numel():
                if layout is not None and len(layout[0]) != result.dim():
                    raise CaptureError(
                        f"{linked.op.target} returns {list(result.shape)}, where its fake kernel says {len(layout[0])} "
                        "dims: mend the fake kernel (torch.library.register_fake)"
                    )
                problem = _problem(result, layout, occupied)
                if problem is not None:
                    found(linked.op, problem)
                    result, is_clean = _copy(result, layout), False
                occupied.append(_bytes_of(result))
            own.append(result)
        trusted = once and is_clean
        if is_clean:
            return results
        return own[0] if is_single else own

    return instruction


def _problem(result: torch.Tensor, layout: Layout, occupied: Sequence[tuple[int, int]]) -> str | None:
    start = result.data_ptr()
    if any(low <= start < high for low, high in occupied):
        return "undeclared-alias"
    if layout is None:
        return None
    sizes = zip(result.shape, result.stride(), layout[0], strict=True)
    is_other = any(size > 1 and step != expected for size, step, expected in sizes)
    return "undeclared-layout" if is_other or ir.lazy_bits(result) != layout[1] else None


def _copy(result: torch.Tensor, layout: Layout) -> torch.Tensor:
    """In memory of its own, laid out as a plan takes it for (``copy_`` resolves lazy bits).

    A part of another tensor's memory takes all of that along: ``as_strided`` of it counts from where that begins.
    """
    strides, bits = (result.stride(), ir.lazy_bits(result)) if layout is None else layout
    if tuple(strides) == result.stride() and bits == ir.lazy_bits(result):
        whole = result.untyped_storage().clone()  # type: ignore[no-untyped-call]
        copy = torch.empty(0, dtype=result.dtype, device=result.device)
        return with_lazy_bits(copy.set_(whole, result.storage_offset(), result.shape, strides), bits)
    copy = torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device)
    return with_lazy_bits(copy, bits).copy_(result)


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
