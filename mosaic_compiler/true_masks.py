"""Attention masks that are provably all-true are dropped from Dynamo's graph.

AOTAutograd picks the attention kernel while it traces, and a mask rules out the fast ones.  Some versions of
transformers build ``(arange(N) >= 0).expand(B, 1, N, N)`` for bidirectional models when they are compiled: always
true, N x N large, and the reason for a fall back to an attention that materialises N x N scores.

Dynamo's graph is not functional: a mask of ones may be written later, through a view of it, or by the call that reads
it.  So a fact about a value holds only if whatever touches its memory is known: to read it, to be a view of it, or to
add a bounded number in place (``positions += offset``).  Everything else means: not provable, and the mask stays.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import fx

from mosaic_compiler.compat.symbols import bounds_of
from mosaic_compiler.compat.tensors import scaled_dot_product_attention

Bounds: TypeAlias = "tuple[int, int]"
"""No element is below the first or above the second."""
Known: TypeAlias = "dict[fx.Node, Bounds | None]"

_ATTENTION = scaled_dot_product_attention
_LONGEST = 1 << 48
"""No range has more elements: they would not fit into memory."""
_SAFE = 1 << 62
"""Sums of int64 below it do not wrap around."""

_PARAMETERS: Mapping[Any, tuple[str, ...]] = {
    _ATTENTION: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    torch.ones: (),
    torch.ones_like: ("input",),
    torch.full: ("size", "fill_value"),
    torch.full_like: ("input", "fill_value"),
    torch.logical_and: ("input", "other"),
    torch.bitwise_and: ("input", "other"),
    operator.and_: ("input", "other"),
    torch.ge: ("input", "other"),
    torch.greater_equal: ("input", "other"),
    operator.ge: ("input", "other"),
    torch.add: ("input", "other", "alpha"),
    operator.add: ("input", "other"),
    operator.iadd: ("input", "other"),
    operator.getitem: ("input", "index"),
    "new_ones": ("input",),
    "new_full": ("input", "size", "fill_value"),
    "logical_and": ("input", "other"),
    "bitwise_and": ("input", "other"),
    "__and__": ("input", "other"),
    "ge": ("input", "other"),
    "greater_equal": ("input", "other"),
    "add": ("input", "other", "alpha"),
    "size": ("input",),
    "dim": ("input",),
}
"""What positional arguments are called; methods by name.  None of these writes memory, but ``operator.iadd``."""

_ONES = frozenset({torch.ones, torch.ones_like, "new_ones"})
_FULL = frozenset({torch.full, torch.full_like, "new_full"})
_BOTH = frozenset({torch.logical_and, torch.bitwise_and, operator.and_, "logical_and", "bitwise_and", "__and__"})
_NOT_BELOW = frozenset({torch.ge, torch.greater_equal, operator.ge, "ge", "greater_equal"})
_SUMS = frozenset({torch.add, operator.add, "add"})
_SAME_ELEMENTS = frozenset(
    {"expand", "view", "reshape", "unsqueeze", "squeeze", "to", "contiguous", "expand_as", "clone"}
)


def drop_true_masks(module: fx.GraphModule) -> fx.GraphModule:
    """Remove masks that are True everywhere from the graph's attention calls (in place)."""
    dropped: list[fx.Node] = []
    known: Known = {}
    for node in module.graph.nodes:
        arguments = _arguments(node) if node.target is _ATTENTION else None
        mask = None if arguments is None else arguments.get("attn_mask")
        if not isinstance(mask, fx.Node) or (arguments or {}).get("is_causal") or not _has_own_shape(node):
            continue
        if is_always_true(mask, known):
            if len(node.args) > 3:
                node.update_arg(3, None)
            else:
                node.update_kwarg("attn_mask", None)
            dropped.append(mask)
    if dropped:
        _erase_unread(module.graph, dropped)
        module.recompile()
    return module


def _erase_unread(graph: fx.Graph, masks: list[fx.Node]) -> None:
    """Erase masks that nobody reads any more, and what only they were made from.  (What else nobody reads may be a
    write: fx's own elimination of dead code would erase it.)"""
    todo = list(masks)
    while todo:
        node = todo.pop()
        is_known = node.op in ("call_function", "call_method") and (_only_reads(node) or _viewed(node) is not None)
        if not node.users and is_known and _target(node) is not operator.iadd:
            todo += node.all_input_nodes
            graph.erase_node(node)
            todo = [other for other in todo if other is not node]


def _has_own_shape(attention: fx.Node) -> bool:
    """The result has the query's rows, in all of its batches: the mask does not repeat them."""
    query = _tensor(_arguments(attention).get("query"))
    result = _tensor(attention)
    if query is None or result is None or query.dim() != result.dim():
        return False
    return [str(size) for size in query.shape[:-1]] == [str(size) for size in result.shape[:-1]]


def is_always_true(node: Any, known: Known | None = None) -> bool:
    """Whether every element of a boolean tensor is provably True, for every size, whenever it is read.

    Args:
        known: what was found out of the graph's nodes already.
    """
    known = {} if known is None else known
    tensor = _tensor(node)
    if tensor is None or tensor.dtype != torch.bool:
        return False
    source = _viewed(node)
    if source is not None:
        return is_always_true(source, known)
    if _writes(node) != []:
        return False
    target, arguments = _target(node), _arguments(node)
    if target in _ONES:
        return True
    if target in _FULL:
        value = arguments.get("fill_value")
        return isinstance(value, (bool, int, float)) and bool(value)
    if target in _BOTH:
        return all(is_always_true(arguments.get(name), known) for name in ("input", "other"))
    if target in _NOT_BELOW:
        left, right = (bounds(arguments.get(name), known) for name in ("input", "other"))
        return left is not None and right is not None and left[0] >= right[1]
    return False


def bounds(value: Any, known: Known) -> Bounds | None:
    """Bounds of a number, or of the elements of an int64 tensor at any time; ``None`` if they are not provable."""
    if not isinstance(value, fx.Node):
        return _bounds(value, known)
    if value not in known:
        known[value] = None  # while they are looked for: a tensor that is added to itself in place has none
        known[value] = _bounds(value, known)
    return known[value]


def _bounds(value: Any, known: Known) -> Bounds | None:
    if isinstance(value, fx.Node) and isinstance(value.meta.get("example_value"), torch.SymInt):
        value = value.meta["example_value"]
    if isinstance(value, torch.SymInt):
        return _bounds_of_symbol(value)
    if isinstance(value, int):
        return int(value), int(value)
    tensor = _tensor(value)
    if tensor is None or tensor.dtype != torch.int64:
        return None
    source = _viewed(value)
    if source is not None:
        return bounds(source, known)
    target, arguments = _target(value), _arguments(value)
    if target is torch.arange:
        found = _bounds_of_range(value, known)
    elif target in _SUMS and arguments.get("alpha", 1) == 1:
        found = _sum(bounds(arguments.get("input"), known), bounds(arguments.get("other"), known))
    else:
        return None
    writes = _writes(value)
    if writes is None:
        return None
    for write in writes:  # each may be seen or not
        added = bounds(write, known)
        found = _sum(found, None if added is None else (min(added[0], 0), max(added[1], 0)))
    return found


def _bounds_of_symbol(number: torch.SymInt) -> Bounds | None:
    """What Dynamo knows of a size or an argument, whose guards hold whenever the graph runs."""
    low, high = (int(end) if end.is_Integer else None for end in bounds_of(number))
    return None if low is None else (low, _LONGEST if high is None or high > _LONGEST else high)


def _bounds_of_range(node: fx.Node, known: Known) -> Bounds | None:
    """Of ``arange([start], end, [step])`` with a step of 1."""
    count = len(node.args)
    names = ("end",) if count == 1 else ("start", "end", "step")
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if count > 3 or "out" in arguments or arguments.get("step", 1) != 1 or arguments.get("end") is None:
        return None
    start = bounds(arguments.get("start", 0), known)
    return None if start is None else _sum(start, (0, _LONGEST))


def _sum(left: Bounds | None, right: Bounds | None) -> Bounds | None:
    if left is None or right is None:
        return None
    low, high = left[0] + right[0], left[1] + right[1]
    return (low, high) if low > -_SAFE and high < _SAFE else None


def _writes(creator: fx.Node) -> list[Any] | None:
    """What is added in place to a new tensor or a view of it; ``None`` if anything else might be written."""
    added: list[Any] = []
    todo, seen = [creator], {creator}
    while todo:
        node = todo.pop()
        if "out" in node.kwargs:
            return None
        for user in node.users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            if _target(user) is operator.iadd and _arguments(user).get("input") is node:
                added.append(_arguments(user).get("other"))
                todo.append(user)
            elif _viewed(user) is node:
                todo.append(user)
            elif not _only_reads(user):
                return None
    return added


def _only_reads(node: fx.Node) -> bool:
    target = _target(node)
    return (target in _PARAMETERS or target is torch.arange) and "out" not in node.kwargs


def _viewed(node: Any) -> fx.Node | None:
    """The tensor whose elements (some of them, maybe repeated) a node has, in another shape and maybe in its memory."""
    target = _target(node)
    source = node.args[0] if node.args else None
    after, before = _tensor(node), _tensor(source)
    if after is None or before is None or after.dtype != before.dtype or "out" in node.kwargs:
        return None
    known = target in _SAME_ELEMENTS or target is operator.getitem or target is operator.iadd
    return source if known else None


def _target(node: fx.Node) -> Any:
    """A function, or the name of a method."""
    return node.target if node.op in ("call_function", "call_method") else None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name; of a call that is not known those that were given by name."""
    return {**dict(zip(_PARAMETERS.get(_target(node), ()), node.args, strict=False)), **node.kwargs}


def _tensor(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None
