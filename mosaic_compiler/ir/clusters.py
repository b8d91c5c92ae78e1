"""``Cluster``: a region of pointwise ops, row reductions and views that runs as one kernel.

It is the submodule behind a ``call_module`` node, and plain PyTorch can run it op by op.  ``kernels/fused.py`` compiles
its body once per structure; the kernel writes its results straight into their planned buffers::

    h, y = fused_0(x, o, w)          body: y = x + o; h = w * (y * rsqrt(mean(y * y) + eps))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from mosaic_compiler.ir.loops import loop_of


class Cluster(nn.Module):
    """A fused region (see the module docstring).

    Args:
        body: a GraphModule over the operands (tensors and sizes) that returns a tuple of tensors.
        into: for each result the operand whose memory it takes over, or ``None``.
    """

    def __init__(self, body: nn.Module, into: Sequence[int | None]) -> None:
        super().__init__()
        self.body: Any = body
        self.into = tuple(into)

    def with_into(self, into: Sequence[int | None]) -> Cluster:
        """The same region with its results put elsewhere."""
        return Cluster(self.body, into)

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        results: tuple[Any, ...] = self.body(*operands)
        return tuple(
            result if into is None else operands[into].copy_(result)
            for result, into in zip(results, self.into, strict=True)
        )

    def extra_repr(self) -> str:
        return f"into={self.into}"


def set_cluster(module: nn.Module, node: fx.Node, name: str, cluster: Cluster) -> None:
    """Make ``node`` run ``cluster``, which the module then holds under ``name``."""
    module.add_module(name, cluster)
    node.target = name
    node.meta["cluster"] = cluster


def clusters_in(module: fx.GraphModule) -> list[tuple[fx.Node, Cluster]]:
    """All calls of clusters in a graph and in the bodies of its loops."""
    found = []
    for node in module.graph.nodes:
        cluster, loop = cluster_of(node), loop_of(node)
        if cluster is not None:
            found.append((node, cluster))
        if loop is not None:
            found += clusters_in(loop.body)
    return found


def own_clusters(module: fx.GraphModule) -> dict[str, Cluster]:
    """The clusters that a graph calls itself, by their names in it (bodies of loops have names of their own)."""
    found = ((str(node.target), cluster_of(node)) for node in module.graph.nodes)
    return {name: cluster for name, cluster in found if cluster is not None}


def cluster_of(node: fx.Node) -> Cluster | None:
    """The cluster that a node runs, or ``None`` if it is none."""
    cluster = node.meta.get("cluster") if node.op == "call_module" else None
    return cluster if isinstance(cluster, Cluster) else None
