"""Tensors: storages over given bytes, lazy bits, what a CPU can do, which ops are compositions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch._refs
from torch._ops import OpOverload, OpOverloadPacket

scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention
"""The function that Dynamo has in its graph for ``torch.nn.functional.scaled_dot_product_attention``."""


def storage_over(address: int, nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """A storage over bytes that somebody else owns."""
    return torch._C._construct_storage_from_data_pointer(address, device, nbytes)  # type: ignore[return-value]


def with_lazy_bits(tensor: torch.Tensor, bits: str) -> torch.Tensor:
    """A view that is to be conjugated (``conj`` in ``bits``) or negated (``neg``) when it is read."""
    if "conj" in bits:
        tensor = torch._conj(tensor)
    return torch._neg_view(tensor) if "neg" in bits else tensor


def has_tiles() -> bool:
    """The CPU multiplies reduced types in tiles (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def is_composite(op: OpOverload) -> bool:
    """An op that is a composition of others; whether its result is a view is decided at run time."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op._name, "CompositeImplicitAutograd"))


_OWN_NAMESPACES = ("aten", "prims", "prim", "mosaic", "inductor", "torchvision", "_c10d_functional", "higher_order")


def may_be_replaced(op: Any) -> bool:
    """An operator (or a packet of its overloads) that is a composition of others, and no part of PyTorch: what it is
    made of is nobody's version."""
    if isinstance(op, OpOverloadPacket):
        return any(may_be_replaced(getattr(op, name)) for name in op.overloads())  # type: ignore[no-untyped-call]
    return isinstance(op, OpOverload) and op.namespace not in _OWN_NAMESPACES and is_composite(op)


def operators_named(namespace: str, names: Collection[str]) -> list[Any]:
    """Operators of somebody's own library with one of these names."""
    found = vars(torch.ops).get(namespace)
    if namespace in _OWN_NAMESPACES or found is None or not hasattr(found, "_dir"):
        return []
    packets = [getattr(found, name, None) for name in names if name in vars(found)]
    return [packet for packet in packets if isinstance(packet, OpOverloadPacket)]


def symbolic_kernel(op: Any) -> Callable[..., Any]:
    """What says the sizes of an op's results: the op itself, or, where that makes a number of every symbol that it sees
    (and so of that symbol everywhere), its reference."""
    return _REFERENCES.get(op, op)


_REFERENCES: Mapping[OpOverload, Callable[..., Any]] = {
    torch.ops.aten.constant_pad_nd.default: torch._refs.constant_pad_nd,
}
