"""Rules of rows: what they ask for of the operands is enough to compute a run of rows, and just that is computed."""

from __future__ import annotations

import itertools
import math

import sympy
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.book import FLAT, rows
from mosaic_compiler.book.rows import ChunkSpace
from mosaic_compiler.passes import trace


def tensors_of(*shapes):
    return [torch.randn(shape) for shape in shapes]


RULED = {
    "mm": (lambda a, b, c, d, e: tensors_of((a, b), (b, c)), torch.mm),
    "addmm": (lambda a, b, c, d, e: tensors_of((a, c), (a, b), (b, c)), torch.addmm),
    "bmm": (lambda a, b, c, d, e: tensors_of((a, b, c), (a, c, d)), torch.bmm),
    "attention": (
        lambda a, b, c, d, e: tensors_of((a, b, c, d), (a, b, e, d), (a, b, e, d)),
        F.scaled_dot_product_attention,
    ),
    "attention with a mask": (
        lambda a, b, c, d, e: tensors_of((a, b, c, d), (a, b, e, d), (a, b, e, d), (a, 1, c, e)),
        F.scaled_dot_product_attention,
    ),
    "add": (lambda a, b, c, d, e: tensors_of((a, b, c), (b, c)), torch.add),
    "softmax": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: torch.softmax(x, -1)),
    "sum": (lambda a, b, c, d, e: tensors_of((a, b, c, d)), lambda x: x.sum(1)),
    "sum of rows": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.sum((0, 2), keepdim=True)),
    "layer_norm": (lambda a, b, c, d, e: tensors_of((a, b, c), (c,)), lambda x, w: F.layer_norm(x, w.shape, w)),
    "permute": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.permute(1, 2, 0)),
    "cat": (lambda a, b, c, d, e: tensors_of((a, b, c), (a, b, d)), lambda x, y: torch.cat((x, y), -1)),
    "embedding": (lambda a, b, c, d, e: [torch.randn(a, b), torch.randint(0, a, (c, d))], torch.embedding),
    "gather": (lambda a, b, c, d, e: [torch.randn(a, b), torch.randint(0, b, (a, c))], lambda x, i: x.gather(1, i)),
    "index_select": (lambda a, b, c, d, e: [torch.randn(a, b), torch.randint(0, a, (c,))], lambda x, i: x[i]),
    "select": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.select(1, 0)),
    "argmax": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.argmax(-1)),
    "addmm of one bias": (lambda a, b, c, d, e: tensors_of((c,), (a, b), (b, c)), torch.addmm),
    "cumsum": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.cumsum(1)),
    "sort": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.sort(0)),
    "topk": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.topk(2, 1)),
    "max": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.max(1)),
    "var": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.var(-1)),
    "unsqueeze": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x.unsqueeze(1)),
    "squeeze": (lambda a, b, c, d, e: tensors_of((a, 1, b, c)), lambda x: x.squeeze(1)),
    "stack": (lambda a, b, c, d, e: tensors_of((a, b), (a, b)), lambda x, y: torch.stack((x, y), 1)),
    "cat in front": (lambda a, b, c, d, e: tensors_of((a, b, c), (d, b, c)), lambda x, y: torch.cat((x, y))),
    "slice": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: x[:, :1]),
    "pad": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: F.pad(x, (1, 2), value=0.5)),
    "pad in the middle": (lambda a, b, c, d, e: tensors_of((a, b, c)), lambda x: F.pad(x, (0, 0, 1, 0))),
    "where": (lambda a, b, c, d, e: tensors_of((a, 1, c), (b, c), (a, b, 1)), lambda m, x, y: torch.where(m > 0, x, y)),
}


def rows_in(value, layout, space, run):
    """A value's rows in a run of positions: of every entry of the space's dims before the last."""
    if layout is None:
        return value
    for dim, label in enumerate(layout):
        if label == FLAT:
            at = torch.arange(value.shape[dim]).view(-1, int(space[-1]))[:, run.start : run.stop].flatten()
            value = value.index_select(dim, at)
        elif label == len(space) - 1:
            value = value.narrow(dim, run.start, len(run))
    return value


def layouts_of(shape, space):
    """All layouts that have the space's last dim, and sizes that fit."""
    lengths = {None: None, FLAT: math.prod(space), **dict(enumerate(space))}
    if len(space) == 1:
        del lengths[FLAT]
    for layout in itertools.product(lengths, repeat=len(shape)):
        used = [label for label in layout if label is not None]
        is_one = used in ([FLAT], [len(space) - 1]) or sorted(used) == list(range(len(space)))
        if is_one and all(label is None or size == lengths[label] for size, label in zip(shape, layout, strict=True)):
            yield layout


@settings(max_examples=200)
@given(
    st.sampled_from(list(RULED)),
    st.lists(st.integers(2, 3), min_size=5, max_size=5),
    st.lists(st.integers(2, 3), min_size=1, max_size=2),
    st.data(),
)
def test_what_rules_ask_for_is_enough_for_a_run_of_rows(name, dims, space, data):
    """Also where rows stand before batch entries, and where other dims are as long."""
    make, function = RULED[name]
    operands = make(*dims)
    module = trace(function, *operands, dynamic=[()] * len(operands))
    node = next(n for n in reversed(module.graph.nodes) if isinstance(n.target, OpOverload))
    shapes = [tuple(tensor.shape) for tensor in ir.tensors_of(node)]
    index = data.draw(st.integers(0, min(len(shapes), 2) - 1))
    space = ChunkSpace(map(sympy.Integer, space))
    ruled = {
        layout: answer
        for layout in layouts_of(shapes[index], space)
        if (answer := rows.operand_layouts(node, index, layout, space)) is not None
    }
    assume(ruled)
    layout, answer = data.draw(st.sampled_from(list(ruled.items())))
    start = data.draw(st.integers(0, int(space[-1]) - 1))
    run = range(start, data.draw(st.integers(start + 1, int(space[-1]))))
    interpreter = torch.fx.Interpreter(module, garbage_collect_values=False)
    interpreter.run(*operands)
    values, asked = interpreter.env, iter(answer)
    args, kwargs = torch.fx.node.map_arg(
        (node.args, dict(node.kwargs)), lambda n: rows_in(values[n], next(asked).layout, space, run)
    )
    whole, part = values[node], node.target(*args, **kwargs)
    if isinstance(whole, tuple):
        whole, part = whole[index], part[index]
    torch.testing.assert_close(part, rows_in(whole, layout, space, run))
