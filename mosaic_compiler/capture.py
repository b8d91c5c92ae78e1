"""Before AOTAutograd: what Dynamo's graph needs so that it is traced once, with the attention kernels that eager takes.

Attention masks that are provably all-true are dropped from the graph.
AOTAutograd picks the attention kernel while it traces, and a mask rules out the fast ones.  Some versions of
transformers build ``(arange(N) >= 0).expand(B, 1, N, N)`` for bidirectional models when they are compiled: always
true, N x N large, and the reason for a fall back to an attention that materialises N x N scores.

Floats that are not operands of arithmetic, such as attention's scale, are constants.  With ``dynamic=True`` Dynamo
makes them inputs; AOTAutograd finds out, when it has traced everything, that they cannot be tensors, and both begin
again: with a graph that is the same but for those inputs.  Floats of a model's own modules, such as a norm's epsilon,
are constants as well, as whole numbers are: as inputs, each would be a tensor made and converted in every step.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import UnspecializedNNModuleSource
from torch._dynamo.symbolic_convert import TensorifyState
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.utils._sympy.symbol import SymT, symbol_is_type

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

_SAME_ELEMENTS = frozenset(
    {"expand", "view", "reshape", "unsqueeze", "squeeze", "to", "contiguous", "expand_as", "clone"}
)


_settled: dict[str, float] = {}
"""Floats of modules that became constants, by where Dynamo finds them."""


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
        if isinstance(value, torch.SymFloat) and any(map(_is_arithmetic, node.users)) and not value.node.expr.is_number:
            operands.add(str(value.node._expr))
    constants = _floats() - (operands - _of_inner_modules(module))
    for name in constants:
        TensorifyState.specialize(name)
    kept = []
    for node, given in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        number = _float_in(node)
        reads = list(node.users)
        if (
            number is None
            or str(number.node._expr) not in constants
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
    """Names of floats that are attributes of modules inside of another one, unless their value has changed."""
    found = set()
    for node in module.graph.find_nodes(op="placeholder"):
        number, source = _float_in(node), getattr(node, "_dynamo_source", None)
        if number is None or source is None or _modules_in(source) < 2:
            continue
        value = number.node.hint
        if _settled.setdefault(source.name, value) == value:
            found.add(str(number.node._expr))
    return found


def _modules_in(source: Any) -> int:
    """How many modules one has to go through to where something stands: 2 for ``self.norm.eps``."""
    count = 0
    while source is not None:
        count += isinstance(source, UnspecializedNNModuleSource)
        source = getattr(source, "base", None)
    return count


def _float_in(node: fx.Node) -> torch.SymFloat | None:
    """The float that Dynamo passes in a tensor."""
    number = getattr(node.meta.get("example_value"), "item_memo", None)
    return number if isinstance(number, torch.SymFloat) else None


def _floats() -> set[str]:
    """Names of all floats that are symbols now, also of those that only conditions have asked for."""
    mode = torch._guards.detect_fake_mode()
    values = {} if mode is None or mode.shape_env is None else mode.shape_env.backed_var_to_val
    return {str(s) for s in values if symbol_is_type(s, SymT.FLOAT) and not TensorifyState.should_specialize(str(s))}


def forget_floats() -> None:
    """Names of floats say nothing about the next function, but Dynamo keeps them."""
    TensorifyState.clear()


def _is_arithmetic(node: fx.Node) -> bool:
    """An op that takes a tensor in place of a number."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.strip("_") in _ARITHMETIC


def drop_true_masks(module: fx.GraphModule) -> fx.GraphModule:
    """Remove masks that are True everywhere from the graph's attention calls (in place)."""
    changed = False
    for node in module.graph.nodes:
        if node.target is not torch._C._nn.scaled_dot_product_attention:
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node) and is_always_true(mask):
            if len(node.args) > 3:
                node.update_arg(3, None)
            else:
                node.update_kwarg("attn_mask", None)
            changed = True
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return module


def is_always_true(node: fx.Node) -> bool:
    """Whether every element of a boolean tensor is provably True, for every size."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        return False
    source = _same_elements(node)
    if source is not None:
        return is_always_true(source)
    if node.target in (torch.ones, torch.ones_like):
        return True
    if node.target in (torch.full, torch.full_like):
        return node.args[1] is True
    if node.target in (operator.and_, torch.logical_and) or (node.op, node.target) == ("call_method", "logical_and"):
        return all(isinstance(operand, fx.Node) and is_always_true(operand) for operand in node.args)
    if node.target in (operator.ge, torch.ge) or (node.op, node.target) == ("call_method", "ge"):
        left, right = node.args
        bound = lower_bound(left)
        return bound is not None and isinstance(right, int) and bound >= right
    return False


def lower_bound(node: Any) -> int | None:
    """A number that no element of an integer tensor is below, or ``None``."""
    if isinstance(node, int):
        return node
    if not isinstance(node, fx.Node):
        return None
    source = _same_elements(node)
    if source is not None:
        return lower_bound(source)
    if node.target is torch.arange:
        counts = [argument for argument in node.args if not isinstance(argument, torch.dtype)]
        if len(counts) == 1:
            return 0
        step = counts[2] if len(counts) > 2 else 1
        start = counts[0]
        return start if isinstance(start, int) and isinstance(step, int) and step > 0 else None
    if node.target in (operator.add, operator.iadd, torch.add) and not node.kwargs:
        bounds = [lower_bound(operand) for operand in node.args]
        return sum(bounds) if all(bound is not None for bound in bounds) else None  # type: ignore[arg-type]
    return None


def _same_elements(node: fx.Node) -> fx.Node | None:
    """The tensor whose elements (some of them, maybe repeated) the node has, in another shape."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.op == "call_method" and node.target in _SAME_ELEMENTS:
        target = node.meta.get("example_value")
        before = source.meta.get("example_value")
        same = isinstance(target, torch.Tensor) and isinstance(before, torch.Tensor) and target.dtype == before.dtype
        return source if same else None
    return source if node.target is operator.getitem and not isinstance(node.args[1], fx.Node) else None
