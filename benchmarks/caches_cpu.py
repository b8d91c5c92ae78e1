"""Generating behind a long prompt with and without caches: tiny-llada, 64 tokens in 64 steps, blocks of 32, on the CPU.

Ids that differ from those without a cache are counted: the caches are approximations.  Somebody's own loop (LLaDA's
published one) is measured as well, around a compiled model whose rows the option ``cache`` finds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mosaic_compiler
from benchmarks.common import show, write

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llada"
MASK, NEW, BLOCK = 3, 64, 32
CACHES: tuple[tuple[str, str | int], ...] = (
    ("none", "block"), ("dual", "block"), ("dual", "never"), ("prefix", "block"), ("delayed", "block"), ("dual", 1),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1000, 2048])
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    text = (EXAMPLE.parent / "genesis.txt").read_text()
    tokens = AutoTokenizer.from_pretrained(EXAMPLE)(text, return_tensors="pt").input_ids
    rows = [row for length in given.tokens for row in _generate(model, tokens[:, :length])]
    rows += [row for length in given.tokens for row in _loops(model, tokens[:, :length])]
    show(
        "seconds for 64 tokens in 64 steps",
        ["loop", "prompt", "cache", "refresh", "seconds", "faster", "ids that differ", "state MiB"],
        [
            [r["loop"], r["prompt"], r["cache"], r["refresh"], r["seconds"], r["faster"], r["differ"], r["state"]]
            for r in rows
        ],
    )
    write("caches_cpu", {"rows": rows}, given.out)


def _generate(model: Any, prompt: Tensor) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    plain: Tensor | None = None
    for cache, refresh in CACHES:

        def run(cache: str = cache, refresh: str | int = refresh) -> mosaic_compiler.Generation:
            return mosaic_compiler.generate(
                model, prompt, gen_length=NEW, steps=NEW, block_length=BLOCK, cache=cache, cache_refresh=refresh
            )

        result, seconds = _twice(run)
        plain = result.sequences if plain is None else plain
        rows.append(
            _row("generate()", prompt, cache, refresh, seconds, result.sequences, plain, rows, result.state_bytes)
        )
        print(rows[-1], flush=True)
    return rows


def _loops(model: Any, prompt: Tensor) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    plain: Tensor | None = None
    for cache in ("none", "delayed"):
        options = {"needed_rows": "masked", "mask_token_id": MASK, "cache": cache, "cache_refresh": 8}
        compiled = torch.compile(model, backend="mosaic", dynamic=True, options=options)
        ids, seconds = _twice(lambda compiled=compiled: llada(compiled, prompt))
        plain = ids if plain is None else plain
        rows.append(_row("LLaDA's own", prompt, cache, 8, seconds, ids, plain, rows, None))
        print(rows[-1], flush=True)
    return rows


def _twice(run: Callable[[], Any]) -> tuple[Any, float]:
    """The second time, with what was compiled in the first."""
    run()
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def _row(
    loop: str, prompt: Tensor, cache: str, refresh: str | int, seconds: float, ids: Tensor, plain: Tensor,
    rows: list[dict[str, Any]], state: int | None,
) -> dict[str, Any]:  # fmt: skip
    first = rows[0]["seconds"] if rows else seconds
    return {
        "loop": loop, "prompt": prompt.shape[1], "cache": cache, "refresh": refresh, "seconds": round(seconds, 3),
        "faster": round(first / seconds, 2), "differ": int((ids != plain).sum()),
        "state": None if state is None else round(state / (1 << 20), 2),
    }  # fmt: skip


def llada(model: Any, prompt: Tensor) -> Tensor:
    """The loop of LLaDA's ``generate.py`` at temperature 0, with a softmax over all rows."""
    ids = torch.cat([prompt, prompt.new_full((1, NEW), MASK)], 1)
    with torch.no_grad():
        for begin in range(prompt.shape[1], ids.shape[1], BLOCK):
            for _ in range(BLOCK):
                masked = ids == MASK
                logits = model(ids).logits
                token = logits.argmax(-1)
                probability = torch.softmax(logits, -1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
                probability[:, begin + BLOCK :] = -torch.inf
                chosen = torch.where(masked, probability, -torch.inf).topk(1, -1).indices
                ids.scatter_(1, chosen, token.gather(1, chosen))
    return ids


if __name__ == "__main__":
    main()
