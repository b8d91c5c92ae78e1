"""Random toy programs: a list of small steps over a pool of matrices [n, d], as hypothesis strategies.

A program is data (:class:`Program`), so a failing one prints, shrinks and can be pasted into a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "exp": lambda x: torch.exp(-x.abs()),
    "silu": torch.nn.functional.silu,
    "neg": torch.neg,
    "scale": lambda x: x * 0.5,
    "shift": lambda x: x + 1,
    "softmax": lambda x: torch.softmax(x, -1),
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "center": lambda x: x - x.mean(0, keepdim=True),
    "amax": lambda x: x.amax(-1, keepdim=True).expand_as(x),
    "sort": lambda x: torch.sort(x, dim=-1)[0],
    "rank": lambda x: torch.sort(x, dim=-1, stable=True)[1].to(x.dtype),
    "rotate": lambda x: torch.cat((-x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]), -1),
    "transpose": lambda x: (x.t() + 1).t(),
    "reshape": lambda x: (x.reshape(-1) * 2).view_as(x),
    "slice": lambda x: torch.cat((x[:1] * 2, x[1:])),
    "double": lambda x: x.double().sin().to(x.dtype),
    "halves": lambda x: torch.stack([part * 2 for part in x.view(x.shape[0], 2, -1).unbind(1)], 1).view_as(x),
    "mask": lambda x: x.masked_fill(x > 0.5, 0.25),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (x.shape[-1],)),
    "cumsum": lambda x: x.cumsum(0) * 0.1,
    "one_hot": lambda x: torch.zeros_like(x).scatter(1, x.argmax(-1, keepdim=True), 1.0),
    "by_rows": lambda x: (x * (0.5 / x.shape[0])).clamp(max=1 / x.shape[0]) + x.shape[0] ** -0.5,
    "by_width": lambda x: torch.add(x, torch.full_like(x, 0.3 * x.shape[1]), alpha=1.5 / x.shape[1]),
    "write_rows": lambda x: torch.slice_scatter(x, x[:1] * 3, 0, 0, 1),
}
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "mul": lambda x, y: x * y * 0.5,
    "sub": torch.sub,
    "where": lambda x, y: torch.where(x > y, x, y * 0.5),
    "attend": lambda x, y: torch.softmax(x @ y.t() * 0.1, -1) @ y,
    "sdpa": lambda x, y: _attention(x, y, is_causal=False),
    "causal": lambda x, y: _attention(x, y, is_causal=True),
    "pairs": lambda x, y: torch.stack((x, y)).amax(0),
    "pick": lambda x, y: x.gather(1, y.argmax(-1, keepdim=True)).expand_as(x),
}


def _attention(x: torch.Tensor, y: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    """Two heads, of queries x and keys and values y."""
    query, key = (t.view(t.shape[0], 2, -1).transpose(0, 1).unsqueeze(0) for t in (x, y))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=is_causal)
    return out.squeeze(0).transpose(0, 1).reshape(x.shape)


@dataclass(frozen=True)
class Program:
    """``steps`` are (op, left, right); operands index the pool, where 0 and 1 are the inputs."""

    steps: tuple[tuple[str, int, int], ...]
    outputs: tuple[tuple[int, str], ...]

    def __call__(self, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pool = [a, b]
        for op, left, right in self.steps:
            x = pool[left % len(pool)]
            if op == "matmul":
                pool.append(x @ w)
            elif op in UNARY:
                pool.append(UNARY[op](x))
            else:
                pool.append(BINARY[op](x, pool[right % len(pool)]))
        return tuple(VIEWS[view](pool[index % len(pool)]) for index, view in self.outputs)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x,
    "first_row": lambda x: x[:1],
    "last_row": lambda x: x[-1:],
    "transposed": lambda x: x.t(),
    "flat": lambda x: x.reshape(-1),
    "sum": lambda x: x.sum(),
}

steps = st.tuples(st.sampled_from(["matmul", *UNARY, *BINARY]), st.integers(0, 30), st.integers(0, 30))
programs = st.builds(
    Program,
    st.lists(steps, min_size=1, max_size=14).map(tuple),
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(sorted(VIEWS))), min_size=1, max_size=3).map(tuple),
)
"""Dead code comes by itself (results nobody returns), and so do outputs that alias each other or an input."""


def inputs(rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two [rows, width] matrices and a [width, width] weight."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, width, generator=generator),
        torch.randn(rows, width, generator=generator),
        torch.randn(width, width, generator=generator) / width**0.5,
    )
