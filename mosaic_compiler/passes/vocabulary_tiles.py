"""``vocabulary-tiles``: the head's logits are reduced tile by tile, and never held whole."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes.base import Machine, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class VocabularyTilesPass(Pass):
    """Replace a head whose logits are only reduced over the vocabulary by running statistics.

    Understood readers of the logits (or of their softmax): argmax, amax, max, softmax probability of the
    argmax, entropy, top-k.  Between the product and the readers: multiplication and division by numbers,
    tanh (soft-capping), casts, one view.  Any other reader, and the head stays as it is.

    Attributes:
        tile: columns of the vocabulary at a time; ``None`` leaves every head as it is.

    Requires: row-demand has run.  Guarantees: the same argmax and top-k, ties included (lowest index first);
    probabilities up to the rounding of another order of summation.

    Before::

        logits = mm(h, t(w))                                       # [M, V]
        token = argmax(logits, -1)
        p = gather(softmax(logits, -1), -1, unsqueeze(token))      # [M, 1]

    After::

        max, argmax, s, t, ... = head_statistics(h, t(w), tile)    # [M] each
        token = argmax
        p = unsqueeze(reciprocal(s))
    """

    tile: int | None = None
    name: ClassVar[str] = "vocabulary-tiles"

    @classmethod
    def of(cls, options: MosaicOptions, machine: Machine) -> VocabularyTilesPass:
        """With the tile that the options say."""
        return cls(options.vocabulary_tile)

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        if self.tile is None:
            return module
        module = ir.copy_graph(module)
        for node in list(module.graph.nodes):
            if node.target in (aten.mm.default, aten.addmm.default):
                head = _match(node)
                if head is not None:
                    _Rewriter(module, head, self.tile).rewrite()
        ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module


@dataclass
class _Head:
    """A product, the pointwise steps behind it, and who reads the result."""

    product: fx.Node
    steps: list[str] = field(default_factory=list)
    leading: list[Any] | None = None
    readers: list[tuple[str, fx.Node]] = field(default_factory=list)
    top: int = 0


def _match(product: fx.Node) -> _Head | None:
    head = _Head(product)
    value = product
    while True:
        users = list(value.users)
        step = _step(users[0], value) if len(users) == 1 else None
        if step is None:
            break
        if step == "view":
            if head.leading is not None:
                return None
            head.leading = list(users[0].args[1])[:-1]  # type: ignore[arg-type]
        else:
            head.steps.append(step)
        value = users[0]
    arg = _Readers(head, value)
    return head if value.users and all(arg.read(user) for user in value.users) and head.readers else None


def _step(node: fx.Node, value: fx.Node) -> str | None:
    """The pointwise step that ``node`` applies to ``value``, ``view``, or ``None``."""
    if node.target is aten.view.default:
        before, after = ir.tensor_of(value), ir.tensor_of(node)
        assert before is not None
        assert after is not None
        return "view" if ir.expr_of(before.shape[-1]) == ir.expr_of(after.shape[-1]) else None
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
        return f"{'mul' if node.target is aten.mul.Tensor else 'div'}:{float(node.args[1])!r}"
    if node.target is aten.tanh.default:
        return "tanh"
    tensor = ir.tensor_of(node)
    if node.target is aten._to_copy.default and tensor is not None and tensor.dtype.is_floating_point:
        return f"to:{str(tensor.dtype).removeprefix('torch.')}"
    return None


class _Readers:
    """Recognises the readers of one logits value."""

    def __init__(self, head: _Head, logits: fx.Node) -> None:
        self.head, self.logits = head, logits

    def read(self, node: fx.Node) -> bool:
        if node.target is aten.argmax.default and self._last(node):
            return self._add("argmax", node)
        if node.target is aten.amax.default and self._last(node):
            return self._add("max", node)
        if node.target is aten.max.dim and self._last(node):
            return self._outputs(node, ("max", "argmax"))
        if node.target is aten.topk.default and self._last(node):
            self.head.top = max(self.head.top, int(node.args[1]))  # type: ignore[arg-type]
            return self._outputs(node, ("top", "top_index"))
        if node.target is aten._softmax.default and self._last(node):
            return all(self._read_softmax(user, node) for user in node.users)
        if node.target is aten._log_softmax.default and self._last(node):
            return all(self._entropy(user) for user in node.users)
        return False

    def _read_softmax(self, node: fx.Node, softmax: fx.Node) -> bool:
        if node.target is aten.gather.default and self._last(node):
            return self._is_argmax(node.args[2]) and self._add("chosen", node)
        if node.target is aten.amax.default and self._last(node):
            return self._add("confidence", node)
        if node.target is aten.max.dim and self._last(node):
            return self._outputs(node, ("confidence", "argmax"))
        if node.target is aten.topk.default and self._last(node):
            self.head.top = max(self.head.top, int(node.args[1]))  # type: ignore[arg-type]
            return self._outputs(node, ("top_probability", "top_index"))
        return self._entropy(node)

    def _entropy(self, node: fx.Node) -> bool:
        """``sum(softmax(x) * log_softmax(x), -1)``."""
        if node.target is not aten.mul.Tensor or len(node.users) != 1:
            return False
        kinds = {arg.target for arg in node.args if isinstance(arg, fx.Node) and arg.args[0] is self.logits}
        if kinds != {aten._softmax.default, aten._log_softmax.default}:
            return False
        (total,) = node.users
        if total.target is not aten.sum.dim_IntList or not self._last(total):
            return False
        known = any(reader is total for _, reader in self.head.readers)
        return known or self._add("negentropy", total)

    def _is_argmax(self, node: object) -> bool:
        while isinstance(node, fx.Node) and node.target in (aten.unsqueeze.default, aten.view.default):
            node = node.args[0]
        if not isinstance(node, fx.Node):
            return False
        if node.target is operator.getitem and node.args[1] == 1:
            node = node.args[0]
            assert isinstance(node, fx.Node)
        same = node.target in (aten.argmax.default, aten.max.dim) and node.args[0] is self.logits
        return same and self._last(node)

    def _outputs(self, node: fx.Node, names: tuple[str, str]) -> bool:
        return all(
            user.target is operator.getitem and self._add(names[user.args[1]], user)  # type: ignore[index]
            for user in node.users
        )

    def _add(self, name: str, node: fx.Node) -> bool:
        self.head.readers.append((name, node))
        return True

    def _last(self, node: fx.Node) -> bool:
        dim = ir.argument(node, "dim")
        dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        source = ir.tensor_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        return isinstance(dim, int) and source is not None and dim in (-1, source.dim() - 1)


class _Rewriter(Emitter):
    def __init__(self, module: fx.GraphModule, head: _Head, tile: int) -> None:
        super().__init__(module)
        self.head, self.tile, self.origin = head, tile, head.product

    def rewrite(self) -> None:
        product = self.head.product
        bias, hidden, weight = (None, *product.args) if product.target is aten.mm.default else product.args
        with self.graph.inserting_before(product):
            tile = max(self.tile, self.head.top)
            stats = self.emit(ops.head_statistics, hidden, weight, bias, ",".join(self.head.steps), tile, self.head.top)
            parts = [self.emit_getitem(stats, index) for index in range(6)]
        for name, reader in self.head.readers:
            self.origin = reader
            with self.graph.inserting_before(reader):
                value = self._value(name, parts, reader)
            reader.replace_all_uses_with(value, propagate_meta=False)

    def _value(self, name: str, parts: list[fx.Node], reader: fx.Node) -> fx.Node:
        best, where, total, weighted, top, top_index = parts
        if name in ("top", "top_index", "top_probability"):
            return self._top_value(name, best, total, top, top_index, reader)
        if name == "argmax":
            value = where
        elif name == "max":
            value = best
        elif name in ("chosen", "confidence"):
            value = self.emit(aten.reciprocal.default, total)
        else:  # sum p log p = t / s - m - log s
            value = self.emit(aten.div.Tensor, weighted, total)
            value = self.emit(aten.sub.Tensor, value, self._cast(best, total))
            value = self.emit(aten.sub.Tensor, value, self.emit(aten.log.default, total))
        return self._shaped(self._cast(value, reader), reader)

    def _top_value(
        self, name: str, best: fx.Node, total: fx.Node, top: fx.Node, top_index: fx.Node, reader: fx.Node
    ) -> fx.Node:
        value = top_index if name == "top_index" else top
        wanted, tensor = ir.tensor_of(reader), ir.tensor_of(value)
        assert wanted is not None
        assert tensor is not None
        if wanted.shape[-1] != tensor.shape[-1]:
            value = self.emit(aten.slice.Tensor, value, 1, 0, int(wanted.shape[-1]))
        if name == "top_probability":
            value = self.emit(
                aten.sub.Tensor, self._cast(value, total), self.emit(aten.unsqueeze.default, self._cast(best, total), 1)
            )
            value = self.emit(aten.exp.default, value)
            value = self.emit(aten.div.Tensor, value, self.emit(aten.unsqueeze.default, total, 1))
        value = self._cast(value, reader)
        if self.head.leading is None:
            return value
        return self.emit(aten.reshape.default, value, [*self.head.leading, int(wanted.shape[-1])])

    def _cast(self, value: fx.Node, like: fx.Node) -> fx.Node:
        have, want = ir.tensor_of(value), ir.tensor_of(like)
        assert have is not None
        assert want is not None
        return value if have.dtype == want.dtype else self.emit(aten._to_copy.default, value, dtype=want.dtype)

    def _shaped(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        """[M] as the reader had it: leading dims, and a last one of size 1 for gather and keepdim."""
        tensor = ir.tensor_of(reader)
        assert tensor is not None
        leading = self.head.leading
        rank = 1 if leading is None else len(leading)
        if leading is not None:
            value = self.emit(aten.view.default, value, leading)
        return self.emit(aten.unsqueeze.default, value, rank) if tensor.dim() > rank else value
