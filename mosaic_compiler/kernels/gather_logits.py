"""Gather rows and project them onto the vocabulary, in one Triton kernel.

``gather_logits(hidden, index, weight)`` is ``hidden[index] @ weight.T`` without the gathered copy: the row
gather happens while tiles are loaded.  Accumulation is in float32; every offset is computed in int64, so
``rows x vocabulary`` may exceed 2**31.

:func:`choose` says whether this kernel or ``index_select`` + ``mm`` runs, by measuring both on the device at
hand.  cuBLAS usually wins: the gathered copy is small beside the product.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.compat.tracing import without_modes


def gather_logits_reference(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``hidden[index] @ weight.T``.  hidden [N, D], index int64 [M], weight [V, D] -> [M, V]."""
    return torch.mm(hidden.index_select(0, index), weight.t())


@functools.cache
def _kernel() -> Any:
    """Import Triton and define the kernel, on first use."""
    import triton
    import triton.language as tl

    def kernel(  # type: ignore[no-untyped-def]
        hidden, index, weight, out, rows, vocabulary,
        hidden_row, hidden_col, weight_row, weight_col, out_row, out_col,
        DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
        PRECISE: tl.constexpr,
    ):  # fmt: skip
        # Programs walk the output in groups of GROUP row blocks, so that a weight tile is reused from L2.
        pid = tl.program_id(0)
        blocks_m = tl.cdiv(rows, BLOCK_M)
        blocks_v = tl.cdiv(vocabulary, BLOCK_V)
        per_group = GROUP * blocks_v
        first = (pid // per_group) * GROUP
        size = tl.minimum(blocks_m - first, GROUP)
        block_m = first + (pid % per_group) % size
        block_v = (pid % per_group) // size

        row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        col = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
        source = tl.load(index + row, mask=row < rows, other=0).to(tl.int64)  # [BLOCK_M]
        wide_col = col.to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
        for start in range(0, DEPTH, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            a = tl.load(
                hidden + source[:, None] * hidden_row + d[None, :] * hidden_col,
                mask=(row[:, None] < rows) & (d[None, :] < DEPTH),
                other=0.0,
            )
            b = tl.load(
                weight + wide_col[None, :] * weight_row + d[:, None] * weight_col,
                mask=(col[None, :] < vocabulary) & (d[:, None] < DEPTH),
                other=0.0,
            )
            if PRECISE:  # float32, and what the interpreter (which has no bfloat16 dot) computes
                total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(a, b, total)
        wide_row = row.to(tl.int64)
        tl.store(
            out + wide_row[:, None] * out_row + wide_col[None, :] * out_col,
            total.to(out.dtype.element_ty),
            mask=(row[:, None] < rows) & (col[None, :] < vocabulary),
        )

    kernel.__globals__.update(tl=tl)  # Triton resolves names of the kernel's body in its globals
    return triton.jit(kernel)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tile:
    """A launch configuration."""

    block_m: int
    block_v: int
    block_d: int
    warps: int
    stages: int
    group: int = 8


TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(64, 256, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(16, 256, 128, 8, 4, 1),
    Tile(32, 128, 128, 4, 4, 1),
    Tile(32, 64, 32, 4, 2),  # fits everywhere, in float32 too
)
_SMALL = Tile(16, 32, 32, 4, 1, 1)  # what the interpreter runs


def gather_logits_triton(
    hidden: Tensor, index: Tensor, weight: Tensor, out: Tensor, tile: Tile | None = None
) -> Tensor:
    """Run the kernel into ``out``.

    Args:
        hidden: [N, D], any strides.
        index: int64 [M], contiguous, each in [0, N) (not checked on the device).
        weight: [V, D], any strides.
        out: [M, V], any strides.
        tile: the launch configuration; by default the fastest one, found once per device and problem size.

    Raises:
        ValueError: for operands that do not fit together.
    """
    _check(hidden, index, weight, out)
    rows, vocabulary, depth = out.shape[0], out.shape[1], hidden.shape[1]
    if rows == 0 or vocabulary == 0:
        return out
    if tile is None:
        tile = _SMALL if hidden.device.type == "cpu" else _fastest(hidden, index, weight, out)
    blocks = -(-rows // tile.block_m) * -(-vocabulary // tile.block_v)
    _kernel()[(blocks,)](
        hidden, index, weight, out, rows, vocabulary,
        *hidden.stride(), *weight.stride(), *out.stride(),
        DEPTH=depth, BLOCK_M=tile.block_m, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d, GROUP=tile.group,
        PRECISE=hidden.dtype == torch.float32 or hidden.device.type == "cpu",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _check(hidden: Tensor, index: Tensor, weight: Tensor, out: Tensor) -> None:
    shapes = (
        f"hidden {list(hidden.shape)}, index {list(index.shape)}, weight {list(weight.shape)}, out {list(out.shape)}"
    )
    if hidden.dim() != 2 or weight.dim() != 2 or index.dim() != 1:
        raise ValueError(f"need hidden [N, D], index [M], weight [V, D], out [M, V]; got {shapes}")
    if hidden.shape[1] != weight.shape[1] or out.shape != (index.shape[0], weight.shape[0]):
        raise ValueError(f"sizes do not fit: {shapes}")
    if index.dtype != torch.int64 or not index.is_contiguous():
        raise ValueError("index must be contiguous int64")
    if not hidden.dtype == weight.dtype == out.dtype or hidden.dtype not in DTYPES:
        raise ValueError(f"dtypes must be equal, and one of {DTYPES}; got {hidden.dtype}, {weight.dtype}, {out.dtype}")
    if len({t.device for t in (hidden, index, weight, out)}) != 1:
        raise ValueError("all tensors must be on one device")


_best: dict[Any, Tile] = {}


def _fastest(hidden: Tensor, index: Tensor, weight: Tensor, out: Tensor) -> Tile:
    """Time every tile once per device, dtype and size class (rows rounded to a power of two)."""
    rows = 1 << max(out.shape[0] - 1, 0).bit_length()
    from triton.runtime.errors import OutOfResources

    key = (torch.cuda.get_device_name(hidden.device), hidden.dtype, rows, out.shape[1], hidden.shape[1])
    if key not in _best:
        timed = []
        for tile in TILES:
            try:
                timed.append((_time(functools.partial(gather_logits_triton, hidden, index, weight, out, tile)), tile))
            except OutOfResources:  # this tile does not fit into the device's shared memory
                continue
        _best[key] = min(timed, key=lambda pair: pair[0])[1]
    return _best[key]


def _time(function: Any) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=5, rep=20, return_mode="median"))


@dataclass(frozen=True)
class Choice:
    """Which implementation projects gathered rows on a device, and why."""

    kernel: str
    reason: str


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, depth: int, vocabulary: int) -> Choice:
    """Measure both on random data (1,024 of 4,096 rows), once per device, dtype and head size."""
    if device.type != "cuda":
        return Choice("index_select + mm", f"the fused kernel is for CUDA, this graph runs on {device.type}")
    if dtype not in DTYPES:
        return Choice("index_select + mm", f"the fused kernel has no {dtype}")
    try:
        import triton  # noqa: F401
    except ImportError:
        return Choice("index_select + mm", "Triton is not installed: pip install triton")
    with without_modes():  # compilation happens under fake tensors; this is about real time
        return _measure(device, dtype, depth, vocabulary)


def _measure(device: torch.device, dtype: torch.dtype, depth: int, vocabulary: int) -> Choice:
    hidden = torch.randn(4096, depth, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, depth, device=device, dtype=dtype)
    index = torch.randperm(4096, device=device)[:1024].sort()[0]
    out = torch.empty(1024, vocabulary, device=device, dtype=dtype)
    fused = _time(functools.partial(gather_logits_triton, hidden, index, weight, out))
    plain = _time(lambda: torch.mm(hidden.index_select(0, index), weight.t(), out=out))
    name = torch.cuda.get_device_name(device)
    figures = f"{fused:.2f} ms fused, {plain:.2f} ms index_select + mm for 1024 x {vocabulary} on {name}"
    return Choice("gather_logits" if fused < plain else "index_select + mm", figures)
