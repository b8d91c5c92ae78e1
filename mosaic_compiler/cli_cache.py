"""``mosaic cache`` and ``mosaic compile``: what is kept on disk, and how it gets there ahead of time."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mosaic_compiler.cli_values import Bidirectional, Device, Dtype, MaskId, TrustRemoteCode, parse_dtype
from mosaic_compiler.disk.folder import Entry, Folder, the_folder
from mosaic_compiler.errors import ConfigError, MosaicError
from mosaic_compiler.planning.budget import format_bytes

app = typer.Typer(help="What is kept on disk: list, size, clear.", invoke_without_command=True, add_completion=False)

KINDS = {
    "step": "steps", "kinds": "kinds of steps", "reach": "proofs", "kernel": "kernels", "outline": "plans ahead",
    "fit": "traces of fit", "shown": "reports",
}  # fmt: skip


@app.callback()
def cache(context: typer.Context) -> None:
    """What is kept on disk; without a command, how much of it."""
    if context.invoked_subcommand is None:
        size()


@app.command()
def size() -> None:
    """How many entries there are, and how much they take."""
    folder = _folder()
    entries = folder.entries()
    counts: dict[str, int] = defaultdict(int)
    for entry in entries:
        counts[entry.kind] += 1
    said = ", ".join(f"{counts[kind]} {name}" for kind, name in KINDS.items() if counts[kind])
    print(f"{folder.root}: {format_bytes(folder.nbytes)} of at most {format_bytes(folder.most)}; {said or 'nothing'}")


@app.command("list")
def list_entries(as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """Each model's entries; of what has no model (kernels serve all), the kind."""
    entries = _folder().entries()
    if as_json:
        print(json.dumps([
            {"kind": e.kind, "label": e.label, "bytes": e.nbytes, "used": e.used, "path": str(e.path)} for e in entries
        ]))  # fmt: skip
        return
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.label, entry.kind].append(entry)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("of", "what", "entries", "bytes", "last used"):
        table.add_column(column, justify="right" if column in ("entries", "bytes") else "left")
    for (label, kind), found in groups.items():
        used = datetime.fromtimestamp(max(entry.used for entry in found)).strftime("%Y-%m-%d %H:%M")
        nbytes = format_bytes(sum(entry.nbytes for entry in found))
        table.add_row(label or "-", KINDS.get(kind, kind), str(len(found)), nbytes, used)
    Console().print(table)


@app.command()
def clear() -> None:
    """Delete everything."""
    folder = _folder()
    nbytes = folder.nbytes
    print(f"{folder.root}: {folder.clear()} files deleted, {format_bytes(nbytes)}")


def compile_ahead(
    model: Annotated[
        Path | None, typer.Argument(help="a folder of transformers; the shipped tiny-llada if left out")
    ] = None,
    batch: Annotated[int, typer.Option(help="prompts at a time", min=1)] = 1,
    caches: Annotated[
        str, typer.Option("--cache", help="policies, comma-separated: none, exact, prefix, dual, delayed")
    ] = "exact,dual",
    temperatures: Annotated[str, typer.Option("--temperature", help="comma-separated")] = "0,1",
    block_causal: Annotated[int | None, typer.Option(help="tokens of a block, of block-causal models")] = None,
    sampler: Annotated[str, typer.Option(help="llada, dream, fast_dllm_v2, or auto")] = "auto",
    mask_id: MaskId = None,
    bidirectional: Bidirectional = False,
    dtype: Dtype = "fp32",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compile a model ahead of time, for all lengths and budgets: ``mosaic generate`` then starts at once."""
    from mosaic_compiler.planning.caches import policy_of

    folder = _folder()
    policies = _parts(caches)
    try:
        for policy in policies:
            policy_of(policy)
        numbers = [float(part) for part in _parts(temperatures)]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    from mosaic_compiler.report.load import load_model
    from mosaic_compiler.waiting import doing

    with doing("loading the model"):
        loaded, tokenizer = load_model(model, parse_dtype(dtype), device=device, trust_remote_code=trust_remote_code)
    import torch

    from mosaic_compiler.sampling.generation import generate, mask_of

    mask = mask_of(loaded, mask_id, tokenizer.mask_token_id)
    vocabulary = loaded.get_input_embeddings().num_embeddings
    prompt = torch.arange(48).remainder(vocabulary).repeat(batch, 1).to(next(loaded.parameters()).device)
    prompt[prompt == mask] = 0 if mask else 1
    before, known = time.perf_counter(), {entry.path for entry in folder.entries()}
    block = block_causal or 16
    for number in numbers:
        for policy in policies:
            started = time.perf_counter()
            try:
                generate(
                    loaded, prompt, gen_length=2 * block, steps=4, block_length=block, temperature=number, cache=policy,
                    block_causal=block_causal, bidirectional=bidirectional, mask_token_id=mask, sampler=sampler,
                )  # fmt: skip
            except ValueError as error:
                raise error if isinstance(error, MosaicError) else ConfigError(str(error)) from None
            said = f"temperature {number:g}, cache {policy}: {time.perf_counter() - started:.1f} s"
            print(said, file=sys.stderr, flush=True)
    made = [entry for entry in folder.entries() if entry.path not in known]
    print(
        f"{folder.root}: {len(made)} new entries, {format_bytes(sum(entry.nbytes for entry in made))}, in "
        f"{time.perf_counter() - before:.1f} s; the folder can be copied to another machine of the same kind"
    )


def _parts(text: str) -> Sequence[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _folder() -> Folder:
    folder = the_folder()
    if folder is None:
        raise ConfigError("MOSAIC_CACHE=off: nothing is kept on disk; set it to a folder, or leave it out")
    return folder
