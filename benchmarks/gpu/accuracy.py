"""How far results are from exact ones: logits against float64, token ids against eager's, in bf16 and float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.benchmark import Benchmark, Row
from benchmarks.gpu.models import SYSTEMS, Session, arguments, forget

ROWS = 512


class Logits(nn.Module):
    """Logits of the first :data:`ROWS` rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids).logits
        return logits[:, :ROWS] * 1.0


def measure(session: Session, tokens: int = 4096) -> list[Row]:
    """One row per dtype and system: largest and root-mean-square error of logits, and differing ids."""
    rows = []
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            rows += _measure(Session(session.name, session.layers, dtype=dtype), tokens)
            forget()
    return rows


def _measure(session: Session, tokens: int) -> list[Row]:
    given = arguments(session.name, tokens)
    chosen = {system: session.function(system)(*given) for system in SYSTEMS}
    exact = Logits(copy.deepcopy(session.step.model).double())(given[0])
    rows = []
    for system in SYSTEMS:
        compiled: Any = Logits(session.step.model)
        if system != "eager":
            compiled = torch.compile(compiled, backend=system, dynamic=True)
        error = (compiled(given[0]).double() - exact).abs()
        rows.append(
            {
                "model": session.name, "dtype": str(session.dtype).partition(".")[2], "system": system,
                "tokens": tokens, "layers": session.layers, "largest": float(error.max()),
                "rms": float(error.pow(2).mean().sqrt()), "scale": float(exact.std()),
                "differing_ids": int((chosen[system] != chosen["eager"]).sum()),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


BENCHMARK = Benchmark(
    "accuracy",
    lambda session, given: measure(session),
    "error of logits against float64, and token ids that differ from eager's",
    ["model", "dtype", "system", "largest", "rms", "scale of logits", "differing ids"],
    lambda r: [r["model"], r["dtype"], r["system"], r["largest"], r["rms"], r["scale"], r["differing_ids"]],
    layers=2,
)


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
