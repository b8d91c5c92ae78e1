"""Row demand on a GPU: the fused gather+projection kernel against index_select + mm, and one LLaDA-8B step
with and without the ``row-demand`` pass, in one run.

make bench-gpu
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import benchmarks.common as common
from mosaic_compiler.backend import mosaic, observing
from mosaic_compiler.kernels.gather_logits import _fastest, gather_logits_reference, gather_logits_triton
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.runtime.arena import pool_for
from mosaic_compiler.sampling import DenoisingStep, block_window

console = Console(width=120)
DIMS = {"depth": 4096, "vocabulary": 126464, "rows": 32768}


def kernel_rows() -> list[dict[str, Any]]:
    """Time, rate, bandwidth and error of both implementations at LLaDA-8B's head."""
    from triton.testing import do_bench

    depth, vocabulary = DIMS["depth"], DIMS["vocabulary"]
    hidden = torch.randn(DIMS["rows"], depth, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, depth, device="cuda", dtype=torch.bfloat16) / depth**0.5
    results = []
    for count in (32, 1024, 4096):
        index = torch.randperm(DIMS["rows"], device="cuda")[:count].sort()[0]
        out = torch.full((count, vocabulary), float("nan"), device="cuda", dtype=torch.bfloat16)
        gather_logits_triton(hidden, index, weight, out)
        error = relative_error(out, hidden, index, weight)
        fused = do_bench(lambda: gather_logits_triton(hidden, index, weight, out), return_mode="median")  # noqa: B023
        plain_out = torch.empty_like(out)

        def plain() -> None:
            torch.mm(hidden.index_select(0, index), weight.t(), out=plain_out)  # noqa: B023

        plain()
        unfused = do_bench(plain, return_mode="median")
        moved = 2 * (count * depth + vocabulary * depth + count * vocabulary)
        times = {"gather_logits": fused, "index_select + mm": unfused}
        errors = {"gather_logits": error, "index_select + mm": relative_error(plain_out, hidden, index, weight)}
        results.append(
            {
                "rows": count,
                "tile": str(_fastest(hidden, index, weight, out)),
                "milliseconds": times,
                "tflops": {name: 2e-9 * count * depth * vocabulary / t for name, t in times.items()},
                "gb_per_second": {name: moved * 1e-6 / t for name, t in times.items()},
                "relative_error": errors,
            }
        )
    return results


def relative_error(out: torch.Tensor, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> float:
    """Against float64, a slab of the vocabulary at a time."""
    difference = norm = 0.0
    for start in range(0, weight.shape[0], 16384):
        part = slice(start, start + 16384)
        exact = gather_logits_reference(hidden.double(), index, weight[part].double())
        difference += float((out[:, part].double() - exact).square().sum())
        norm += float(exact.square().sum())
    return (difference / norm) ** 0.5


def step_rows(layers: int, tokens: int, share: float) -> dict[str, Any]:
    """One denoising step of LLaDA-8B's dims: eager, and mosaic with and without row-demand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=126464, hidden_size=4096, intermediate_size=12288, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=262144, rope_theta=5e5, is_causal=False, use_cache=False,
        dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    step = DenoisingStep(model, 126336)
    ids = torch.randint(0, 126000, (1, tokens), device="cuda")
    ids[torch.rand(1, tokens, device="cuda") < share] = 126336
    masked = int((ids == 126336).sum())
    arguments = ids, block_window(tokens, 0, tokens, "cuda"), torch.tensor([masked // 4], device="cuda")
    systems: dict[str, Any] = {"eager": functools.partial(step, *arguments)}
    plans: dict[str, Any] = {}
    compile_seconds = {}
    for name, options in (("row-demand", {}), ("without", {"disable": ["row-demand"]})):
        steps: list[Any] = []
        torch._dynamo.reset()

        def backend(module: Any, inputs: Any, options: Any = options) -> Any:
            return mosaic(module, inputs, options=options)

        compiled = torch.compile(DenoisingStep(model, 126336), backend=backend, dynamic=True)
        started = time.perf_counter()
        with observing(steps.append):
            compiled(*arguments)
        compile_seconds[name] = time.perf_counter() - started
        systems[name] = functools.partial(compiled, *arguments)
        plans[name] = steps
    times: dict[str, list[float]] = {name: [] for name in systems}
    peaks, equal = {}, {}
    reference = systems["eager"]()
    for name, call in systems.items():
        pool_for(torch.device("cuda", 0)).release()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        equal[name] = float((call() == reference).float().mean())
        peaks[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(5):
        for name, call in systems.items():
            call()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    decisions = [
        {"operation": d.node, "module": d.module, "rows": d.rows, "of": d.total, "because": d.consumer}
        for d in plans["row-demand"][0].module.meta["row_decisions"]
    ]
    return {
        "layers": layers,
        "tokens": tokens,
        "masked": masked,
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "peak_bytes": peaks,
        "planned_peak_bytes": {name: plans[name][0].plan.peak for name in plans},
        "height_over_bound": {name: plans[name][0].plan.height / plans[name][0].plan.lower_bound for name in plans},
        "share_of_ids_equal_to_eager": equal,
        "compile_seconds": compile_seconds,
        "graphs": {name: len(steps) for name, steps in plans.items()},
        "fallbacks": sorted({f.name for f in plans["row-demand"][0].fallbacks}),
        "decisions": decisions,
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the results")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--share", type=float, default=0.1, help="share of masked tokens")
    given = parser.parse_args()
    common.RESULTS = given.out
    rows = kernel_rows()
    table = Table("rows", "fused ms", "plain ms", "fused TFLOP/s", "plain TFLOP/s", "fused error", "plain error")
    for row in rows:
        pairs = [row[key] for key in ("milliseconds", "tflops", "relative_error")]
        table.add_row(str(row["rows"]), *(f"{value:.3g}" for pair in pairs for value in pair.values()))
    console.print(table)
    console.print(f"wrote {common.write('gather_logits_gpu', {'dims': DIMS, 'rows': rows})}")
    torch.cuda.empty_cache()
    with torch.no_grad():
        body = step_rows(given.layers, given.tokens, given.share)
    table = Table("system", "ms", "peak", "planned", "ids equal to eager")
    for name, ms in body["milliseconds"].items():
        planned = body["planned_peak_bytes"].get(name)
        table.add_row(
            name, f"{ms:.1f}", format_bytes(body["peak_bytes"][name]), format_bytes(planned) if planned else "",
            f"{body['share_of_ids_equal_to_eager'][name]:.4f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"wrote {common.write('row_demand_gpu', body)}")


if __name__ == "__main__":
    main()
