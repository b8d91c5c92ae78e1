"""The book of ops: one entry teaches the compiler an operator that it has never seen, whatever its kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mosaic_compiler import book, ir
from mosaic_compiler.backend import compile_aten
from mosaic_compiler.book import STANDARD, Operand, families, rows, using
from mosaic_compiler.ir.loops import loop_of
from mosaic_compiler.lowering.forms import Kind
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import trace
from mosaic_compiler.passes.constants import constant_of
from mosaic_compiler.passes.row_demand import ROW_DECISIONS

library = torch.library.Library("taught", "FRAGMENT")


def define(schema, real, fake):
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"taught::{name}", fake, lib=library)


def attend(q, k, v, is_causal=False):
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


define("swish(Tensor x) -> Tensor", lambda x: x * torch.sigmoid(x), torch.empty_like)
define("swish.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)", lambda x, out: out.copy_(x * torch.sigmoid(x)), None)
define("widest(Tensor x, int dim) -> Tensor", lambda x, dim: x.amax(dim), lambda x, dim: x.new_empty(x.shape[:1]))
define("sevens(SymInt[] size) -> Tensor", lambda size: torch.full(size, 7.0), torch.empty)
define("turned(Tensor(a) x) -> Tensor(a)", lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1))
define(
    "attend(Tensor q, Tensor k, Tensor v, bool is_causal=False) -> Tensor", attend, lambda q, k, v, c=False: q.clone()
)

ops = torch.ops.taught


def turned_rows(node, output, layout, space):
    return [Operand(node.args[0], layout[::-1])]


LESSONS = {
    ops.swish.default: families.pointwise(trusted=True),
    ops.widest.default: families.reduction(),
    ops.sevens.default: families.fill(7.0, rows.source_rows, shape_at=0),
    ops.turned.default: families.view(turned_rows),
    ops.attend.default: families.attention(),
}


def step(x: Tensor, w: Tensor, head: Tensor, mask: Tensor) -> Tensor:
    """x [N, D]; the head's rows are read where the mask holds."""
    q, k, v = (ops.turned(ops.turned(ops.swish(x @ w)))[None, None] for _ in range(3))
    y = ops.attend(q, k + 1, v * 2)[0, 0] + ops.sevens(x.shape)
    best = ops.widest(ops.swish(ops.swish(y @ w) @ head), 1)
    return torch.where(mask, best, 0.0)


def arguments(n: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    x, w, head = (torch.randn(shape, generator=generator) for shape in ((n, 6), (6, 6), (6, 40)))
    return x, w, head, torch.arange(n) % 3 == 0


def compiled(**options):
    module = trace(step, *arguments(9), dynamic=[(0,), (), (), (0,)])
    return compile_aten(module, MosaicOptions(disable=("fuse",), **options))


@pytest.mark.parametrize("options", [{}, {"poison": True}, {"poison": True, "chunk_rows": 2}])
@pytest.mark.parametrize("is_taught", [False, True])
def test_right_with_and_without_entries(is_taught, options):
    lessons = STANDARD.copy()
    lessons.teach(LESSONS if is_taught else {})
    with using(lessons):
        run = compiled(**options)
        for n in (9, 14, 2):
            expected = step(*arguments(n))
            (got,) = run(list(arguments(n)))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_all_passes_know_what_the_entries_say():
    lessons = STANDARD.copy()
    lessons.teach(LESSONS)
    with using(lessons):
        run = compiled()
        loops = [node for node in run.module.graph.nodes if loop_of(node)]
        inside = {node.target for loop in loops for node in loop_of(loop).body.graph.nodes}
        forms = {node.target: form for node, form in run.lives.forms.items()}
        fill = next(node for node in run.captured.graph.nodes if node.target is ops.sevens.default)
        assert constant_of(fill) == 7.0
    assert ops.attend.default in inside  # chunks of queries
    assert forms[ops.turned.default].kind is Kind.VIEW
    assert {ops.swish.default, ops.swish.out} & inside
    assert {decision.rows for decision in ROW_DECISIONS.of(run.module)} == {
        "M"
    }  # through the reduction and the pointwise op, the head has the masked rows only
    assert not [f for f in run.fallbacks if f.op.startswith("taught.attend")]


def test_an_operator_without_an_entry_is_opaque_and_needs_all_rows():
    run = compiled()
    assert any(f.op.startswith("taught.attend") and f.name == "opaque-op" for f in run.fallbacks)
    inside = {n.target for node in run.module.graph.nodes if loop_of(node) for n in loop_of(node).body.graph.nodes}
    assert ops.attend.default not in inside


def test_another_book_is_closed_again():
    with using(STANDARD.copy()) as lessons:
        lessons.teach(LESSONS)
        assert book.open_book().of(ops.swish.default).family == "pointwise"
    assert book.open_book().of(ops.swish.default).family == ""


def test_entries_say_nothing_against_schemas():
    """Views share memory, others do not; who writes is in the schema."""
    for op, known in STANDARD:
        aliases = any(result.alias_info is not None for result in op._schema.returns)
        assert aliases == (known.family == "view"), op
        assert not (known.family == "view" and known.write), op
        if known.family != "pointwise" and ir.is_pointwise(op):
            assert known.family in ("copy", "fill", "lookup", "rearrangement", "reduction"), op
