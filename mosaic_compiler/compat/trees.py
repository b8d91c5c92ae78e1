"""Arguments and results as flat lists of leaves, and what a call depends on besides its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.modules import module as modules
from torch.utils import _pytree


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested containers, and how they are put together."""
    return _pytree.tree_flatten(tree)


def unflatten(leaves: list[Any], spec: Any) -> Any:
    """The containers again."""
    return _pytree.tree_unflatten(leaves, spec)


def written(spec: Any) -> str:
    """How leaves are put together, as text.

    Raises:
        NotImplementedError: for containers that PyTorch was not told a name of.
    """
    return _pytree.treespec_dumps(spec)


def read(text: str) -> Any:
    """What :func:`written` wrote."""
    return _pytree.treespec_loads(text)


def shared_memory(values: Sequence[Any]) -> list[int]:
    """For each tensor the first one that lies in the same memory; nothing if each has its own."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.layout is torch.strided]
    places = [tensor.untyped_storage()._cdata for tensor in tensors]
    return [] if len(set(places)) == len(places) else [places.index(place) for place in places]


def modes() -> tuple[Any, ...] | None:
    """What PyTorch's operators depend on besides their arguments; ``None`` where a mode sees every call."""
    c = torch._C
    if c._len_torch_function_stack() or c._len_torch_dispatch_stack() or modules._has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    cuda: Any = torch.backends.cuda
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        str(torch.get_autocast_dtype("cpu")),
        str(torch.get_autocast_dtype("cuda")),
        str(torch.get_default_dtype()),
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.get_float32_matmul_precision(),
    )
