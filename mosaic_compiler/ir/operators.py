"""What operators do, read from their schemas: draw, write, alias."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler.compat.tensors import is_composite
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.clusters import cluster_of
from mosaic_compiler.ir.loops import loop_of


def is_random(node: fx.Node) -> bool:
    """Draws from a random generator: may be neither merged, dropped nor reordered.

    Attention is tagged as random because it can drop out; with a dropout of 0 it draws nothing.
    """
    if not isinstance(node.target, OpOverload) or not _may_draw(node.target):
        return False
    return not any(a.name == "dropout_p" for a in node.target._schema.arguments) or argument(node, "dropout_p") != 0


@functools.cache
def _may_draw(op: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


def argument(node: fx.Node, name: str) -> Any:
    """A call's argument by its name in the operator's schema; its default if it is not given."""
    assert isinstance(node.target, OpOverload)
    for index, formal in enumerate(node.target._schema.arguments):
        if formal.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, formal.default_value if formal.has_default_value() else None)
    return None


@functools.cache
def is_pointwise(op: OpOverload) -> bool:
    """By its tag: output element i depends on element i of each (broadcast) operand only.

    Only some overloads of an op carry the tag: ``mul.Tensor`` does, ``mul.out`` does not.  Those with the same
    arguments count too; ``max.dim`` is not ``max.other``.
    """
    names = [argument.name for argument in op._schema.arguments if not argument.is_out]
    return any(
        torch.Tag.pointwise in overload.tags
        and [argument.name for argument in overload._schema.arguments if not argument.is_out] == names
        for overload in overloads_of(op)
    )


def overloads_of(op: OpOverload) -> list[OpOverload]:
    """All overloads of the op's packet."""
    packet: Any = op._overloadpacket
    return [getattr(packet, name) for name in packet.overloads()]


def taken_over(node: fx.Node) -> tuple[int | None, ...] | None:
    """For each result of a loop or cluster the operand whose memory it takes over; ``None`` for other nodes."""
    loop, cluster = loop_of(node), cluster_of(node)
    if loop is not None:
        return tuple(spec.into for spec in loop.outputs)
    return cluster.into if cluster is not None else None


def scatter_of(node: fx.Node, output: int = 0) -> tuple[fx.Node, Any, int] | None:
    """For a result whose rows are scattered into zeros: the row numbers, the number of memory pages that the rows lie
    in (int or node), and the bytes of a page."""
    loop = loop_of(node)
    if loop is not None:
        spec = loop.outputs[output].scatter
        return None if spec is None else (node.args[spec.index], node.args[spec.pages], spec.page)  # type: ignore[return-value]
    if node.target is ops.scatter_rows:
        _, index, _, pages, page = node.args
        return index, pages, page  # type: ignore[return-value]
    return None


def mutated_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes whose storage this node writes, by its operator schema; of a loop or cluster what it takes over."""
    positions = taken_over(node)
    if positions is not None:
        return tuple(node.args[position] for position in positions if position is not None)  # type: ignore[misc]
    if not isinstance(node.target, OpOverload):
        return ()
    written: list[fx.Node] = []
    for index, name in _written_positions(node.target):
        value = node.kwargs.get(name, node.args[index] if index < len(node.args) else None)
        values = value if isinstance(value, (tuple, list)) else (value,)
        written.extend(v for v in values if isinstance(v, fx.Node))
    return tuple(written)


@functools.cache
def _written_positions(op: OpOverload) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an op writes."""
    arguments = enumerate(op._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def has_effect(node: fx.Node) -> bool:
    """Must run even if nobody reads its result."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    return is_random(node) or bool(mutated_arguments(node)) or node.is_impure(impure_random=False)


# Views whose schema does not say so, because autograd must not treat them as views.
_UNANNOTATED_VIEWS = frozenset(
    {
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.unsafe_split.Tensor,
        torch.ops.aten.unsafe_split_with_sizes.default,
    }
)

_READ_STORAGE = frozenset(
    {
        torch.ops.aten.as_strided.default,
        torch.ops.aten.as_strided_copy.default,
        torch.ops.aten.as_strided_scatter.default,
    }
)


def reads_storage(op: OpOverload) -> bool:
    """An op that counts elements from where its operand's storage begins, whatever the operand is a view of."""
    return op in _READ_STORAGE


def alias_base(node: fx.Node) -> fx.Node | None:
    """The operand whose storage the node's outputs share (view or in-place), or ``None``.

    ``getitem`` is not handled here: it forwards one output of its operand (see :class:`StorageMap`).
    """
    if not isinstance(node.target, OpOverload):
        return None
    for index, name in _aliased_positions(node.target):
        value = node.kwargs.get(name, node.args[index] if index < len(node.args) else None)
        if isinstance(value, fx.Node):
            return value
    return None


@functools.cache
def _aliased_positions(op: OpOverload) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments whose storage an op's results share."""
    schema = op._schema
    if op in _UNANNOTATED_VIEWS:
        return ((0, schema.arguments[0].name),)
    names: set[str] = set()
    for result in schema.returns:
        if result.alias_info is not None:
            names |= result.alias_info.before_set
    if not names and any(result.alias_info is not None for result in schema.returns):
        names = {"*"}  # a list of views (unbind, split): the operand's alias set ends up in the wildcard
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if (alias := argument.alias_info) is not None and names & (alias.before_set | alias.after_set)
    )


def is_view(node: fx.Node) -> bool:
    """A view that allocates nothing and writes nothing."""
    if not isinstance(node.target, OpOverload) or mutated_arguments(node):
        return False
    return alias_base(node) is not None and not is_composite(node.target)
