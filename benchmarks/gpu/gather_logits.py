"""The fused gather+projection kernel against ``index_select`` + ``mm``, at a model's head in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.gpu.benchmark import Benchmark, Row
from benchmarks.gpu.models import MODELS, Dims, device
from mosaic_compiler.kernels.gather_logits import _fastest, gather_logits_reference, gather_logits_triton


def measure(dims: Dims, tokens: int = 32768, counts: Sequence[int] = (32, 1024, 4096)) -> list[Row]:
    """Time, rate, bandwidth and error of both, for so many selected rows each."""
    from triton.testing import do_bench

    depth, vocabulary = dims.width, dims.vocabulary
    hidden = torch.randn(tokens, depth, device=device(), dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, depth, device=device(), dtype=torch.bfloat16) / depth**0.5
    rows = []
    for count in counts:
        index = torch.randperm(tokens, device=device())[:count].sort()[0]
        out = torch.full((count, vocabulary), float("nan"), device=device(), dtype=torch.bfloat16)

        def fused() -> None:
            gather_logits_triton(hidden, index, weight, out)  # noqa: B023

        def plain() -> None:
            torch.mm(hidden.index_select(0, index), weight.t(), out=out)  # noqa: B023

        moved = 2 * (count * depth + vocabulary * depth + count * vocabulary)
        for name, function in (("gather_logits", fused), ("index_select + mm", plain)):
            function()
            error = relative_error(out, hidden, index, weight)
            took = do_bench(function, return_mode="median")
            rows.append(
                {
                    "depth": depth, "vocabulary": vocabulary, "tokens": tokens, "rows": count, "system": name,
                    "ms": took, "tflops": 2e-9 * count * depth * vocabulary / took,
                    "gb_per_second": moved * 1e-6 / took, "relative_error": error,
                    **({"tile": str(_fastest(hidden, index, weight, out))} if function is fused else {}),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def relative_error(out: torch.Tensor, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> float:
    """Against float64, a slab of the vocabulary at a time."""
    difference = norm = 0.0
    for start in range(0, weight.shape[0], 16384):
        part = slice(start, start + 16384)
        exact = gather_logits_reference(hidden.double(), index, weight[part].double())
        difference += float((out[:, part].double() - exact).square().sum())
        norm += float(exact.square().sum())
    return (difference / norm) ** 0.5


BENCHMARK = Benchmark(
    "gather_logits",
    lambda session, given: measure(MODELS[session.name]),
    "logits of selected rows",
    ["rows", "system", "ms", "TFLOP/s", "GB/s", "error against float64"],
    lambda r: [r["rows"], r["system"], r["ms"], r["tflops"], r["gb_per_second"], r["relative_error"]],
    layers=2,
    models=1,
)


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
