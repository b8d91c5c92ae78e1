"""Every invariant of the IR has a pass that breaks it, and is named when it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.errors import InvariantError
from mosaic_compiler.ir.loops import ChunkLoop, loop_of
from mosaic_compiler.passes import run_passes, trace
from mosaic_compiler.passes.base import Machine
from mosaic_compiler.passes.pipeline import passes_of
from mosaic_compiler.passes.verifier import INVARIANTS
from mosaic_compiler.recipes import LOOPS

aten = torch.ops.aten


def toy(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = x @ w
    b = a * 2
    c = torch.relu(b)
    return c + a, torch.rand_like(x)


@dataclass(frozen=True)
class BrokenPass:
    edit: Callable[[fx.GraphModule], None]
    name: ClassVar[str] = "broken"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        self.edit(module)
        return module


def find(module: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in module.graph.nodes if node.target is target)


def move_use_before_definition(module: fx.GraphModule) -> None:
    find(module, aten.mm.default).prepend(find(module, aten.relu.default))


def lie_about_dtype(module: fx.GraphModule) -> None:
    node = find(module, aten.mul.Tensor)
    node.meta["val"] = node.meta["val"].double()


def lie_about_shape(module: fx.GraphModule) -> None:
    node = find(module, aten.mm.default)
    node.meta["val"] = node.meta["val"].t()


def drop_metadata(module: fx.GraphModule) -> None:
    del find(module, aten.relu.default).meta["val"]


def drop_an_output(module: fx.GraphModule) -> None:
    output = module.graph.output_node()
    output.args = (output.args[0][:1],)


def return_an_input(module: fx.GraphModule) -> None:
    output = module.graph.output_node()
    first = next(iter(module.graph.nodes))
    output.args = ((output.args[0][0], first),)


def drop_a_random_draw(module: fx.GraphModule) -> None:
    draw = next(node for node in module.graph.nodes if ir.is_random(node))
    x = next(iter(module.graph.nodes))
    with module.graph.inserting_before(draw):
        other = module.graph.call_function(aten.mul.Tensor, (x, 0))
    other.meta = dict(draw.meta)
    draw.replace_all_uses_with(other)
    module.graph.erase_node(draw)


def write_an_input(module: fx.GraphModule) -> None:
    x = next(iter(module.graph.nodes))
    node = find(module, aten.relu.default)
    with module.graph.inserting_after(node):
        write = module.graph.call_function(aten.mul_.Tensor, (x, 1))
    write.meta["val"] = x.meta["val"]


def overwrite_what_is_read_later(module: fx.GraphModule) -> None:
    node, a = find(module, aten.mul.Tensor), find(module, aten.mm.default)
    node.target, node.kwargs = aten.mul.out, {"out": a}  # a is added at the end


def overwrite_through_another_view(module: fx.GraphModule) -> None:
    b = find(module, aten.mul.Tensor)
    c = find(module, aten.relu.default)
    with module.graph.inserting_before(c):
        flat = module.graph.call_function(aten.alias.default, (b,))
        flat.meta["val"] = b.meta["val"]
        both = module.graph.call_function(aten.add.out, (b, flat), {"out": b})
        both.meta["val"] = b.meta["val"]
    c.args = (both,)


def matmul_into_its_operand(module: fx.GraphModule) -> None:
    x = find(module, aten.mul.Tensor)
    c = find(module, aten.relu.default)
    with module.graph.inserting_before(c):
        square = module.graph.call_function(aten.bmm.out, (x, x), {"out": x})
        square.meta["val"] = x.meta["val"]
    c.args = (square,)


def grow_quadratically(module: fx.GraphModule) -> None:
    a = find(module, aten.mm.default)
    relu = find(module, aten.relu.default)
    mode = ir.fake_mode_of(module)
    fake = a.meta["val"]
    with module.graph.inserting_before(relu), mode:
        rows = module.graph.call_function(aten.unsqueeze.default, (a, 0))
        rows.meta["val"] = fake.unsqueeze(0)
        columns = module.graph.call_function(aten.unsqueeze.default, (a, 1))
        columns.meta["val"] = fake.unsqueeze(1)
        square = module.graph.call_function(aten.add.Tensor, (rows, columns))
        square.meta["val"] = rows.meta["val"] + columns.meta["val"]


BREAKS = [
    (move_use_before_definition, "topology"),
    (lie_about_dtype, "metadata"),
    (lie_about_shape, "metadata"),
    (drop_metadata, "metadata"),
    (drop_an_output, "signature"),
    (return_an_input, "signature"),
    (drop_a_random_draw, "effects"),
    (write_an_input, "effects"),
    (overwrite_what_is_read_later, "in-place"),
    (overwrite_through_another_view, "in-place"),
    (grow_quadratically, "quadratic"),
]


@pytest.mark.parametrize(("edit", "invariant"), BREAKS, ids=[edit.__name__ for edit, _ in BREAKS])
def test_a_broken_pass_is_caught_by_name(edit, invariant):
    module = trace(toy, torch.randn(4, 6), torch.randn(6, 6))
    with pytest.raises(InvariantError) as error:
        run_passes(module, passes=[BrokenPass(edit)])
    assert (error.value.pass_name, error.value.invariant) == ("broken", invariant)
    assert "broken" in str(error.value)
    assert invariant in str(error.value)


@pytest.mark.parametrize(("edit", "invariant"), BREAKS, ids=[edit.__name__ for edit, _ in BREAKS])
def test_a_pass_that_changes_its_argument_is_caught_too(edit, invariant):
    @dataclass(frozen=True)
    class InPlace:
        edit: Callable[[fx.GraphModule], None]
        name: ClassVar[str] = "in place"

        def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
            self.edit(module)
            return module

    module = trace(toy, torch.randn(4, 8), torch.randn(8, 8))
    nothing = InPlace(lambda module: None)
    run_passes(module, passes=[nothing, nothing])
    with pytest.raises(InvariantError, match=invariant):
        run_passes(module, passes=[nothing, InPlace(edit)])


def test_non_pointwise_write_into_an_operand_is_refused():
    module = trace(lambda x: torch.relu((x * 2) @ (x * 3)), torch.randn(2, 4, 4))
    with pytest.raises(InvariantError, match="in-place"):
        run_passes(module, passes=[BrokenPass(matmul_into_its_operand)])


def test_every_invariant_has_a_pass_that_breaks_it():
    assert {invariant for _, invariant in BREAKS} | {"loops", "clusters", "repeats"} == set(
        INVARIANTS
    )  # these: see below


def looped():
    def f(x, w):
        h = torch.cumsum(x @ w, 0)
        return torch.cumsum(h + torch.relu(h @ w) @ w, 0)

    return run_passes(trace(f, torch.randn(9, 6), torch.randn(6, 6), dynamic=[(0,)]), disable=("fuse",))[0]


def swap_operands(module: fx.GraphModule) -> None:
    loop = next(node for node in module.graph.nodes if node.op == "call_module")
    loop.args = tuple(reversed(loop.args))


def lie_about_a_result(module: fx.GraphModule) -> None:
    loop = next(node for node in module.graph.nodes if node.op == "call_module")
    with ir.fake_mode_of(module):
        loop.meta["val"] = tuple(value[:, :3].contiguous() for value in loop.meta["val"])
        for user in loop.users:
            user.meta["val"] = loop.meta["val"][user.args[1]]


def slice_another_dim(module: fx.GraphModule) -> None:
    node = next(node for node in module.graph.nodes if node.op == "call_module")
    loop = node.meta["loop"]
    node.meta["loop"] = ChunkLoop(loop.body, [1 if d == 0 else d for d in loop.operands], loop.outputs, loop.chunk)


@pytest.mark.parametrize("edit", [swap_operands, lie_about_a_result, slice_another_dim])
def test_a_loop_that_disagrees_with_its_body_is_refused(edit):
    with pytest.raises(InvariantError, match=r"'loops'|'metadata'|'signature'"):
        run_passes(looped(), passes=[BrokenPass(edit)])


def scattering():
    def f(x, w, chosen):
        return torch.where(chosen[:, None], torch.relu(x @ w), 0.0)

    given = torch.randn(9, 6), torch.randn(6, 1500), torch.arange(9) % 2 == 0
    module = trace(f, *given, dynamic=[(0,), (), (0,)])
    result = run_passes(module, passes=passes_of(LOOPS, machine=Machine(page_bytes=4096)), disable=("fuse",))[0]
    assert any(spec.scatter for node in result.graph.nodes if loop_of(node) for spec in loop_of(node).outputs)
    return result


def _change_scatter(module: fx.GraphModule, **changes: object) -> None:
    node = next(node for node in module.graph.nodes if node.op == "call_module")
    loop = node.meta["loop"]
    (spec,) = loop.outputs
    scatter = replace(spec.scatter, **{k: v for k, v in changes.items() if k != "into"})
    node.meta["loop"] = loop.with_outputs([replace(spec, scatter=scatter, into=changes.get("into"))])


@pytest.mark.parametrize(
    "changes",
    [
        lambda scatter: {"index": 0},  # the rows themselves say where they go
        lambda scatter: {"total": scatter.pages},  # another size
        lambda scatter: {"into": 0},  # an operand's memory
    ],
)
def test_rows_that_are_scattered_wrongly_are_refused(changes):
    module = scattering()
    (spec,) = next(node for node in module.graph.nodes if node.op == "call_module").meta["loop"].outputs
    with pytest.raises(InvariantError, match=r"'loops'|'signature'"):
        run_passes(module, passes=[BrokenPass(lambda m: _change_scatter(m, **changes(spec.scatter)))])


def fused():
    def f(x, y):
        return torch.relu(x * 2) + y

    module = run_passes(trace(f, torch.randn(9, 6), torch.randn(9, 6)))[0]
    assert any(node.op == "call_module" for node in module.graph.nodes)
    return module


def call_with_another_operand(module: fx.GraphModule) -> None:
    cluster = next(node for node in module.graph.nodes if node.op == "call_module")
    first = cluster.args[0]
    with module.graph.inserting_before(cluster), ir.fake_mode_of(module):
        turned = module.graph.call_function(aten.t.default, (first,))
        turned.meta["val"] = first.meta["val"].t()
    cluster.args = (turned, *cluster.args[1:])


def overwrite_an_input(module: fx.GraphModule) -> None:
    node = next(node for node in module.graph.nodes if node.op == "call_module")
    node.meta["cluster"] = node.meta["cluster"].with_into([0])


@pytest.mark.parametrize(
    ("edit", "invariant"), [(call_with_another_operand, "clusters"), (overwrite_an_input, "signature|effects")]
)
def test_a_cluster_that_disagrees_with_its_body_is_refused(edit, invariant):
    with pytest.raises(InvariantError, match=invariant):
        run_passes(fused(), passes=[BrokenPass(edit)])


def chosen(shows_number=False):
    """Of which rows are computed for a mask: given back where they stand, or as they are."""

    def f(x, w, mask):
        h = torch.relu(x @ w)
        return h[mask] if shows_number else torch.where(mask[:, None], h, 0.0)

    given = torch.randn(9, 6), torch.randn(6, 6), torch.arange(9) % 2 == 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        module = trace(f, *given, dynamic=[(0,), (), (0,)])
    return run_passes(module, disable=("fuse", "chunk-loops"))[0]


def number_of_rows(module: fx.GraphModule) -> fx.Node:
    return next(node for node in module.graph.nodes if ir.BINDS in node.meta)


def sum_over_rows(module: fx.GraphModule) -> None:
    rows = find(module, aten.index_copy.default).args[3]
    with module.graph.inserting_after(rows), ir.fake_mode_of(module):
        total = module.graph.call_function(aten.sum.dim_IntList, (rows, [0]))
        total.meta["val"] = aten.sum.dim_IntList(rows.meta["val"], [0])


def test_rows_that_may_be_repeated_must_not_be_counted():
    module = chosen()
    assert number_of_rows(module).meta[ir.MAY_REPEAT]
    with pytest.raises(InvariantError, match="repeats"):
        run_passes(module, passes=[BrokenPass(sum_over_rows)])
    seen = chosen(shows_number=True)
    assert not any(ir.MAY_REPEAT in node.meta for node in seen.graph.nodes)


def test_an_untouched_graph_is_accepted():
    module = trace(toy, torch.randn(4, 6), torch.randn(6, 6))
    run_passes(module, passes=[BrokenPass(lambda module: None)])


def test_layouts_are_compared_for_all_values_of_symbols():
    from torch.utils._sympy.functions import FloorDiv, Min

    n, m = sympy.symbols("n m", integer=True, positive=True)
    assert ir.equal_layouts(("float32", (FloorDiv(n**2, n), m)), ("float32", (n, m)))
    assert not ir.equal_layouts((n,), (m,))
    assert not ir.equal_layouts((Min(n, 256),), (n,))
    assert not ir.equal_layouts((FloorDiv(n, 2) * 2,), (n,))
    assert not ir.equal_layouts((n, m), (n,))
    assert not ir.equal_layouts((n, None), (n, m))
