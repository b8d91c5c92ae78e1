"""Before AOTAutograd: what Dynamo's graph needs so that it is traced once.

Floats that are not operands of arithmetic, such as attention's scale, are constants.  With ``dynamic=True`` Dynamo
makes them inputs; AOTAutograd finds out, when it has traced everything, that they cannot be tensors, and both begin
again: with a graph that is the same but for those inputs.  Floats of a model's own modules, such as a norm's epsilon,
are constants as well, as whole numbers are: as inputs, each would be a tensor made and converted in every step.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import fx

from mosaic_compiler.compat.dynamo import TensorifyState, modules_in, owner_of
from mosaic_compiler.compat.symbols import expression_of, guard_scalar, hint_of, is_float, name_of, values_in
from mosaic_compiler.compat.tracing import fake_mode_among

_ARITHMETIC = frozenset(
    {
        "add",
        "iadd",
        "radd",
        "sub",
        "isub",
        "rsub",
        "mul",
        "imul",
        "rmul",
        "div",
        "truediv",
        "rtruediv",
        "itruediv",
        "pow",
        "neg",
    }
)

_settled: MutableMapping[object, dict[str, float]] = weakref.WeakKeyDictionary()
"""Floats that became constants, by the module that has them and their names."""


def specialize_floats(module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Make constants (in place), with a guard each, of floats that cannot be tensors, and of those of inner modules.

    One of an inner module that has another value than before is an input from then on.

    What Dynamo does when it is told to begin again, done at once: see its
    ``OutputGraph.remove_tensorify_specialized_graphargs``.
    The graph is Dynamo's own, so what is no placeholder any more is not passed.

    Args:
        inputs: the example inputs, in placeholder order.

    Returns:
        Those that are left.
    """
    operands = set()
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if (
            isinstance(value, torch.SymFloat)
            and any(map(_is_arithmetic, node.users))
            and not expression_of(value).is_number
        ):
            operands.add(name_of(value))
    constants = _floats() - (operands - _of_inner_modules(module))
    for name in constants:
        TensorifyState.specialize(name)
    kept = []
    for node, given in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        number = _float_in(node)
        reads = list(node.users)
        if (
            number is None
            or name_of(number) not in constants
            or any((read.op, read.target) != ("call_method", "item") for read in reads)
        ):
            kept.append(given)
            continue
        for read in reads:
            read.replace_all_uses_with(guard_scalar(number))
            module.graph.erase_node(read)
        module.graph.erase_node(node)
    if constants:
        module.recompile()
    return kept


def _of_inner_modules(module: fx.GraphModule) -> set[str]:
    """Names of floats that are attributes of modules inside of another one, unless that module had another value."""
    found = set()
    for node in module.graph.find_nodes(op="placeholder"):
        number, source = _float_in(node), getattr(node, "_dynamo_source", None)
        if number is None or source is None or modules_in(source) < 2:
            continue
        owner, value = owner_of(source), hint_of(number)
        if owner is not None and _settled.setdefault(owner, {}).setdefault(source.member, value) == value:
            found.add(name_of(number))
    return found


def _float_in(node: fx.Node) -> torch.SymFloat | None:
    """The float that Dynamo passes in a tensor."""
    number = getattr(node.meta.get("example_value"), "item_memo", None)
    return number if isinstance(number, torch.SymFloat) else None


def _floats() -> set[str]:
    """Names of all floats that are symbols now, also of those that only conditions have asked for."""
    mode = fake_mode_among()
    values = values_in(None if mode is None else mode.shape_env)
    return {str(s) for s in values if is_float(s) and not TensorifyState.should_specialize(str(s))}


def forget_floats() -> None:
    """Names of floats say nothing about the next function, but Dynamo keeps them."""
    TensorifyState.clear()


def _is_arithmetic(node: fx.Node) -> bool:
    """An op that takes a tensor in place of a number."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.strip("_") in _ARITHMETIC
