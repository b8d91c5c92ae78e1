"""Questions about nodes that passes ask most, answered from the book."""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.book.entry import entry, open_book
from mosaic_compiler.book.overloads import without_out
from mosaic_compiler.ir.clusters import Cluster, cluster_of


def is_matmul(node: fx.Node) -> bool:
    """A product with a matrix, as PyTorch's own op."""
    return entry(node).family == "matmul"


def is_attention(node: fx.Node) -> bool:
    """Scaled dot-product attention."""
    return entry(node).family == "attention"


def is_mixture(node: fx.Node) -> bool:
    """A mixture of experts, as one op."""
    return entry(node).family == "mixture"


def is_copy(node: fx.Node) -> bool:
    """The operand's elements in memory of their own, perhaps in another dtype."""
    return entry(node).family == "copy"


def is_pointwise(node: fx.Node) -> bool:
    """Element i of the result depends on element i of each (broadcast) operand only."""
    if not isinstance(node.target, OpOverload):
        return False
    functional = open_book().of(without_out(node.target))
    return "pointwise" in (entry(node).family, functional.family) or ir.is_pointwise(node.target)


def is_elementwise(node: fx.Node) -> bool:
    """A pointwise op, or a cluster of such: element i of a result depends on element i of each operand of its sizes."""
    cluster = cluster_of(node)
    return is_pointwise(node) if cluster is None else is_elementwise_cluster(cluster)


def is_elementwise_cluster(cluster: Cluster) -> bool:
    """All of its ops are pointwise."""
    return all(is_pointwise(node) for node in cluster.body.graph.nodes if node.op == "call_function")
