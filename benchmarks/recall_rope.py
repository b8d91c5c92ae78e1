"""What a greater base of rotary positions buys beyond the length of training, in recall.

    python -m benchmarks.recall_rope PATH    # a folder with ``recall.py`` and the model ``full``

The model was trained on 4,096 tokens.  Four facts of two words each are masked at the end of a text and filled in at
once; the share of facts of which both words are right.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import mosaic_compiler
from benchmarks.common import recall_at, show, write
from mosaic_compiler.sampling.rotary import find_rotary, longllada_factor, ultrallada_factor

TRAINED = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokens", nargs="*", type=int, default=[4096, 8192])
    parser.add_argument("--count", type=int, default=64, help="sequences of each length")
    parser.add_argument("--factors", nargs="*", type=float, default=[1.5, 2.0, 4.0, 8.0, 14.0])
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    recall = recall_at(given.path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = recall.load("full").to(device)
    rotary, rows = find_rotary(model), []
    for tokens in given.tokens:
        ids, answers, _ = recall.sequences(tokens, given.count)
        seen = recall.masked(ids, answers)
        rules = {rule.__name__.partition("_")[0]: rule for rule in (longllada_factor, ultrallada_factor)}
        factors = {
            "none": 1.0,
            **{name: rule(rotary.base, rotary.depth, TRAINED, tokens) for name, rule in rules.items()},
            **{f"{factor:g}": factor for factor in given.factors},
        }
        for name, factor in factors.items():
            started, filled = time.perf_counter(), seen.clone()
            for index in range(len(ids)):
                filled[index] = mosaic_compiler.generate(
                    model, seen[index : index + 1].to(device), gen_length=0, steps=1, mask_token_id=recall.MASK,
                    cache="none", rope_factor=factor,
                ).sequences[0].cpu()  # fmt: skip
            rows.append(
                {
                    "tokens": tokens, "sequences": given.count, "rule": name, "factor": round(factor, 3),
                    "recall": recall.recall(filled, ids, answers),
                    "seconds": round((time.perf_counter() - started) / len(ids), 3),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    columns = ["tokens", "sequences", "rule", "factor", "recall", "seconds"]
    show("share of facts recalled", columns, [[row[c] for c in columns] for row in rows])
    write("recall_rope", {"rows": rows}, given.out)


if __name__ == "__main__":
    main()
