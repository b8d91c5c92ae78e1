"""What caches cost in recall: facts that are told far back are filled in with each of them, and without.

    python -m benchmarks.recall_caches PATH    # a folder with ``recall.py`` and the model ``full``

Eight masked words (four facts of two) at the end of a text, one committed in each step; the share of facts of which
every word is right.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import mosaic_compiler
from benchmarks.common import recall_at, show, write

CACHES = ("none", "prefix", "dual", "delayed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1024, 2048])
    parser.add_argument("--count", type=int, default=16, help="sequences of each length")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    recall = recall_at(given.path)
    torch.set_num_threads(2)
    model = recall.load("full")
    rows = []
    for tokens in given.tokens:
        ids, answers, _ = recall.sequences(tokens, given.count)
        seen = recall.masked(ids, answers)
        for cache in CACHES:
            started, filled = time.perf_counter(), seen.clone()
            for index in range(len(ids)):
                filled[index] = mosaic_compiler.generate(
                    model, seen[index : index + 1], gen_length=0, block_length=32, steps=8, mask_token_id=recall.MASK,
                    cache=cache, cache_refresh="never",
                ).sequences[0]  # fmt: skip
            rows.append(
                {
                    "tokens": tokens, "sequences": given.count, "cache": cache,
                    "recall": recall.recall(filled, ids, answers),
                    "seconds": round((time.perf_counter() - started) / len(ids), 3),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    columns = ["tokens", "sequences", "cache", "recall", "seconds"]
    show("share of facts recalled, one full step each", columns, [[row[c] for c in columns] for row in rows])
    write("recall_caches", {"rows": rows}, given.out)


if __name__ == "__main__":
    main()
