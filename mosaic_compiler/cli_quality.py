"""``mosaic quality``: what an approximation costs, measured on a model and a text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mosaic_compiler.cli_values import Device, Dtype, MaskId, TrustRemoteCode, parse_dtype, parse_keep
from mosaic_compiler.errors import ConfigError, MosaicError
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.precisions import PRECISIONS, precision_of
from mosaic_compiler.planning.selection import SCORES, selection_of

if TYPE_CHECKING:
    from mosaic_compiler.quality.measure import Figures

SHIPPED = Path(__file__).parent.parent / "examples" / "recall"
"""Beside the package in a checkout: two models that recall facts from far back, and a text that they have not seen."""

BLOCKS_OF_SHIPPED = {"full": 0, "blocks": 32}


def quality(
    model: Annotated[
        Path | None, typer.Argument(help="a folder of transformers; the two shipped models if left out")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="a text that the model has not seen; the shipped one")] = None,
    tokens: Annotated[int, typer.Option(help="of a sequence", min=40)] = 1024,
    sequences: Annotated[int, typer.Option(help="of each kind", min=1)] = 8,
    precisions: Annotated[
        str, typer.Option("--cache-dtype", help="comma-separated: as-computed, bf16, fp8, int8, int4, by layers")
    ] = "as-computed,bf16,fp8,int8,int4",
    keeps: Annotated[
        str, typer.Option("--cache-keep", help="comma-separated: all, shares (0.05) or numbers (512) of other keys")
    ] = "all",
    scores: Annotated[
        str, typer.Option("--cache-score", help=f"how keys are chosen, comma-separated: {', '.join(SCORES)}")
    ] = "probability",
    sets: Annotated[str | None, typer.Option("--cache-sets", help="sets of keys per head, or per layer")] = None,
    evict: Annotated[
        bool, typer.Option("--cache-evict/--no-cache-evict", help="other keys are not kept; else they are not read")
    ] = True,
    residual: Annotated[
        int, typer.Option("--cache-residual", help="so many last rows are kept as computed, beside codes", min=0)
    ] = 0,
    generated: Annotated[int, typer.Option(help="of so many sequences count the steps to finish", min=0)] = 0,
    block_causal: Annotated[int | None, typer.Option(help="tokens of a block, of block-causal models")] = None,
    mask_id: MaskId = None,
    dtype: Dtype = "fp32",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """What a cache in fewer bits, or with fewer keys, costs: recall of facts and accuracy on a text, against no cache.

    The last 32 tokens are computed against what a step for all rows has kept.  Facts are asked for where the tokenizer
    has their words (the shipped models').
    """
    names = [part.strip() for part in precisions.split(",") if part.strip()]
    if not names:
        raise ConfigError("--cache-dtype: at least one of as-computed, " + ", ".join(PRECISIONS))
    for name in names:
        try:
            precision_of(None if name == "as-computed" else name)
        except ValueError:
            raise ConfigError(
                f"--cache-dtype {name!r} is none of as-computed, {', '.join(PRECISIONS)}, nor a choice by layers "
                "(2*exact+int4)"
            ) from None
    methods = _methods(names, [parse_keep(part) for part in keeps.split(",")], scores.split(","), sets, evict, residual)
    if model is None and not SHIPPED.is_dir():
        raise ConfigError("which model? give a folder (the shipped ones are in the repository's examples)")
    folders = [model] if model is not None else [SHIPPED / name for name in BLOCKS_OF_SHIPPED]
    told = {}
    for folder in folders:
        block = BLOCKS_OF_SHIPPED[folder.name] if model is None else block_causal or 0
        figures = _measured(
            folder, text, tokens, sequences, methods, generated, block, mask_id, parse_dtype(dtype), device,
            trust_remote_code,
        )  # fmt: skip
        told[str(folder)] = [dataclasses.asdict(row) for row in figures]
        if not as_json:
            Console().print(table_of(f"{folder.name}, {tokens:,} tokens, {sequences} sequences of each kind", figures))
    if as_json:
        print(json.dumps({"tokens": tokens, "sequences": sequences, "models": told}, indent=1))


def _measured(
    folder: Path, text: Path | None, tokens: int, count: int, told: list[dict[str, Any]], generated: int, block: int,
    mask_id: int | None, dtype: str, device: str, trust_remote_code: bool,
) -> list[Figures]:  # fmt: skip
    from mosaic_compiler.report.load import load_model
    from mosaic_compiler.waiting import doing, now

    with doing("loading the model"):
        loaded, tokenizer = load_model(folder, dtype, device=device, trust_remote_code=trust_remote_code)
    import torch

    from mosaic_compiler.quality.measure import Method, measure
    from mosaic_compiler.quality.sequences import Asked, facts, words
    from mosaic_compiler.sampling.generation import mask_of

    methods = [Method(**each) for each in told]
    try:
        mask = mask_of(loaded, mask_id, tokenizer.mask_token_id)
        unseen = _text_of(text, tokenizer)
        asked: dict[str, Asked] = {"words": words(unseen, tokens, count)}
        if text is None:
            asked = {"facts": facts(tokenizer, unseen, tokens, count), **asked}
        with doing("measuring"), torch.no_grad():
            return measure(
                loaded, mask, asked, methods, block_causal=block, generated=generated,
                on_sequence=lambda done, of: now("sequence", done, of),
            )  # fmt: skip
    except ValueError as error:
        raise error if isinstance(error, MosaicError) else ConfigError(str(error)) from None


def _methods(
    names: list[str],
    keeps: list[float | int | None],
    scores: list[str],
    sets: str | None,
    evict: bool,
    residual: int,
) -> list[dict[str, Any]]:
    """What is measured: each precision with each number of keys, chosen in each way."""
    found = []
    for keep in keeps:
        for score in map(str.strip, scores if keep is not None else scores[:1]):
            try:
                selection_of(score, sets)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            for name in names:
                more: dict[str, Any] = {}
                if keep is not None:
                    more = {"cache_keep": keep, "cache_score": score, "cache_sets": sets, "cache_evict": evict}
                elif residual and name != "as-computed":
                    more = {"cache_residual": residual}
                found.append({"cache_dtype": None if name == "as-computed" else name, **more})
    return found


def _text_of(path: Path | None, tokenizer: Any) -> Any:
    """Ids of a text."""
    import numpy as np
    import torch

    if path is None:
        shipped = SHIPPED / "heldout.bin"
        if not shipped.is_file():
            raise ConfigError("which text? give --text FILE")
        return torch.from_numpy(np.fromfile(shipped, dtype=np.uint16).astype(np.int64))
    try:
        return torch.tensor(tokenizer(path.read_text()).input_ids, dtype=torch.int64)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'no text'}") from None


def table_of(title: str, figures: list[Figures]) -> Table:
    """Figures as people read them."""
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), title_justify="left")
    kinds = list(figures[0].right)
    columns = ["kept", "bytes a token", *(f"{kind} right" for kind in kinds), "same token", "KL (nats)"]
    has_steps = figures[0].steps is not None
    for column in [*columns, *(["steps"] if has_steps else [])]:
        table.add_column(column, justify="left" if column == "kept" else "right")
    for row in figures:
        right = [f"{row.right[kind]:.3f}" for kind in kinds]
        steps = [f"{row.steps:.1f}"] if row.steps is not None else []
        kept = format_bytes(round(row.bytes_per_token)) if row.bytes_per_token else "-"
        table.add_row(row.method, kept, *right, f"{row.agreement:.3f}", f"{row.divergence:.2g}", *steps)
    return table
