"""What people write on the command line, read: lengths, bytes, cards, dtypes; options that several commands take."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from mosaic_compiler.errors import OptionsError
from mosaic_compiler.planning.budget import parse_budget
from mosaic_compiler.planning.selection import check_keep
from mosaic_compiler.report.known_cards import card, nearest_cards

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

MaskId = Annotated[int | None, typer.Option(help="the mask token, where config and tokenizer name none")]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto (a GPU where there is one)")]
Bidirectional = Annotated[
    bool, typer.Option("--bidirectional", help="every token attends to all others, although that is not proven")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that is in the model's folder")
]


def parse_dtype(given: str) -> str:
    """``bf16`` -> ``bfloat16``; what is no abbreviation stays."""
    return _DTYPES.get(given, given)


def parse_keep(given: str | None) -> float | int | None:
    """``0.05`` -> 0.05, ``2048`` -> 2048, ``all`` -> ``None``.

    Raises:
        OptionsError: for anything else.
    """
    text = "all" if given is None else given.strip()
    if text == "all":
        return None
    try:
        keep = int(text) if text.isdecimal() else float(text)
        check_keep(keep)
    except ValueError:
        raise OptionsError(
            f"--cache-keep {text}: write a share of the keys above 0 and up to 1.0 (0.05), a number (2048), or all"
        ) from None
    return keep


def parse_tokens(given: str) -> list[int]:
    """``4k,32k,128000`` -> [4096, 32768, 128000] (k is 1,024)."""
    found = []
    for part in given.split(","):
        match = re.fullmatch(r"\s*(\d+)([kKmM]?)\s*", part)
        if match is None or not int(match[1]):
            raise OptionsError(f"--tokens {given!r}: write whole numbers such as 4k,32k,131072 (k is 1,024)")
        found.append(int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()])
    return found


def parse_bytes(option: str, given: str) -> int:
    """``24GiB`` -> bytes; an error names the option."""
    try:
        found = parse_budget(int(given) if given.isdigit() else given)
    except OptionsError as error:
        raise OptionsError(f"{option} {given!r}: {str(error).partition(': ')[2] or error}") from None
    assert found is not None
    return found


def parse_factor(given: str) -> float | str:
    """``4`` -> 4.0; a name stays."""
    try:
        return float(given)
    except ValueError:
        return given


def parse_card(given: str) -> tuple[str, int]:
    """``24GiB``, ``A100`` -> what to call it, and its bytes."""
    known = card(given)
    if known is not None:
        return known
    try:
        return given, parse_bytes("--gpu", given)
    except OptionsError as error:
        raise OptionsError(f"{error}; or the name of a card, such as {nearest_cards(given)}") from None
