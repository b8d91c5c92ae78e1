"""What a codec by frequencies would cost: keys and values of far rows, of which some dims keep low frequencies only.

The idea is FourierAttention's (arXiv 2506.11886), from its abstract: dims that matter least over distance are projected
on Fourier bases along the sequence, and a fixed number of coefficients is kept.  Here the basis is the cosines
(DCT-II), the dims are those of each head whose loss weighs least (its energy, times that of the queries for keys): the
best choice there is, made of the sequence itself.  Rows of the last block are exact.

    python -m benchmarks.fourier
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import show, write
from mosaic_compiler.quality.sequences import BLOCK, facts, words
from mosaic_compiler.report.load import load_model
from mosaic_compiler.sampling.calls import call_for
from mosaic_compiler.sampling.generation import mask_of

SHIPPED = Path("examples/recall")
WAYS = ((0.0, 1.0), (0.25, 0.125), (0.5, 0.5), (0.5, 0.125), (0.75, 0.25), (0.75, 0.125))
"""Shares of the dims that are compressed, and of their coefficients that are kept."""


@functools.cache
def basis(rows: int, count: int) -> Tensor:
    """[count, rows]: the lowest frequencies, orthonormal."""
    places, waves = torch.arange(rows) + 0.5, torch.arange(count)[:, None]
    made = torch.cos(torch.pi * waves * places / rows) * (2 / rows) ** 0.5
    made[0] /= 2**0.5
    return made


def compressed(part: Tensor, weight: Tensor, dims: float, kept: float) -> Tensor:
    """Far rows of keys or values [B, H, N, d] as they would be read back; ``weight`` [B, H, 1, d]: what a dim's error
    counts."""
    rows = part.shape[2] - BLOCK
    far = part[:, :, :rows]
    low = basis(rows, int(rows * kept))
    found = torch.einsum("kn,bhkd->bhnd", low, torch.einsum("kn,bhnd->bhkd", low, far))
    loss = (far - found).square().sum(2, keepdim=True) * weight
    chosen = loss.argsort(-1).argsort(-1) < int(dims * part.shape[3])
    return torch.cat([torch.where(chosen, found, far), part[:, :, rows:]], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    plain, rows = functional.scaled_dot_product_attention, []
    for name, block in (("full", 0), ("blocks", 32)):
        model, tokenizer = load_model(SHIPPED / name, "float32", device="cpu")
        mask, call = mask_of(model, None, tokenizer.mask_token_id), call_for(model, False, block, "bool")
        text = torch.from_numpy(np.fromfile(SHIPPED / "heldout.bin", dtype=np.uint16).astype(np.int64))
        asked = {
            "facts": facts(tokenizer, text, given.tokens, given.sequences),
            "words": words(text, given.tokens, given.sequences),
        }
        for dims, kept in WAYS:

            def attend(
                query: Tensor,
                key: Tensor,
                value: Tensor,
                *args: Any,
                dims: float = dims,
                kept: float = kept,
                **more: Any,
            ) -> Tensor:
                if dims:
                    share = query.shape[1] // key.shape[1]
                    asks = query[:, :, -BLOCK:].square().mean(2, keepdim=True)
                    asks = asks.view(*key.shape[:2], share, 1, -1).mean(2)
                    key = torch.cat([compressed(key, asks, dims, kept)], 0)
                    value = compressed(value, torch.ones_like(asks), dims, kept)
                return plain(query, key, value, *args, **more)

            row: dict[str, Any] = {"model": name, "dims": dims, "coefficients": kept, "bytes": 1 - dims + dims * kept}
            for kind, sequences in asked.items():
                answers = []
                with torch.no_grad(), mock.patch.object(functional, "scaled_dot_product_attention", attend):
                    for shown, masked in zip(sequences.shown(mask), sequences.masked, strict=True):
                        answers.append(call(model, shown[None], None)[0, masked].argmax(-1))
                row[kind] = sequences.right(torch.stack(answers))
            print(row, flush=True)
            rows.append(row)
            write("fourier", {"tokens": given.tokens, "sequences": given.sequences, "rows": rows}, given.out)
    columns = ["model", "dims", "coefficients", "bytes", "facts", "words"]
    show("right answers, by what is kept of far keys and values", columns, [[row[c] for c in columns] for row in rows])


if __name__ == "__main__":
    main()
