"""Loading a model and its tokenizer for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mosaic_compiler.errors import ConfigError
from mosaic_compiler.report.fit import DTYPES, family_of, first_line

SHIPPED = Path(__file__).parent.parent.parent / "examples" / "tiny-llada"
"""Beside the package in a checkout."""


def load_model(path: Path | None, dtype: str) -> tuple[Any, Any]:
    """A model of transformers and its tokenizer, on the GPU if there is one.

    Raises:
        ConfigError: if there is none at ``path``, or it does not load.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if path is None and not SHIPPED.is_dir():
        raise ConfigError("which model? give --model PATH (the shipped tiny-llada is in the repository's examples)")
    path = SHIPPED if path is None else path
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: no model (a folder with config.json and weights)")
    try:
        import torch
        import transformers as hf
        from transformers.utils import logging
    except ImportError:
        raise ConfigError("loading a model needs transformers: pip install 'mosaic-compiler[hf]'") from None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        family = family_of(hf.AutoConfig.from_pretrained(path))
        model = family.from_pretrained(path, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        tokenizer = hf.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} does not load: {first_line(error)}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
