"""How far results are from exact ones: logits against float64, token ids against eager's, in bf16 and float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from benchmarks.common import show, write
from benchmarks.gpu.models import SYSTEMS, Session, arguments, clean, forget, parser

ROWS = 512


class Logits(nn.Module):
    """Logits of the first :data:`ROWS` rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids).logits
        return logits[:, :ROWS] * 1.0


def measure(name: str, layers: int = 2, tokens: int = 4096) -> list[dict[str, Any]]:
    """One row per dtype and system: largest and root-mean-square error of logits, and differing ids."""
    rows = []
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            session = Session(name, layers, dtype=dtype)
            given = arguments(name, tokens)
            chosen = {system: session.function(system)(*given) for system in SYSTEMS}
            exact = Logits(copy.deepcopy(session.step.model).double())(given[0])
            for system in SYSTEMS:
                compiled: Any = Logits(session.step.model)
                if system != "eager":
                    compiled = torch.compile(compiled, backend=system, dynamic=True)
                error = (compiled(given[0]).double() - exact).abs()
                rows.append(
                    {
                        "model": name, "dtype": str(dtype).partition(".")[2], "system": system, "tokens": tokens,
                        "layers": layers, "largest": float(error.max()), "rms": float(error.pow(2).mean().sqrt()),
                        "scale": float(exact.std()),
                        "differing_ids": int((chosen[system] != chosen["eager"]).sum()),
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
                del error
            del exact, session, compiled
            forget()
            clean()
    return rows


def main() -> None:
    given = parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models:
        rows += measure(name, given.layers or 2)
        write("accuracy", {"rows": rows}, given.out)
    show(
        "error of logits against float64, and token ids that differ from eager's",
        ["model", "dtype", "system", "largest", "rms", "scale of logits", "differing ids"],
        [[r["model"], r["dtype"], r["system"], r["largest"], r["rms"], r["scale"], r["differing_ids"]] for r in rows],
    )


if __name__ == "__main__":
    main()
