"""Loading a model and its tokenizer for the command line."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from mosaic_compiler.ahead.configs import DTYPES, family_of, first_line, load_config
from mosaic_compiler.errors import ConfigError
from mosaic_compiler.report import remote_code
from mosaic_compiler.sampling.request import MASKS

SHIPPED = Path(__file__).parent.parent.parent / "examples" / "tiny-llada"
"""Beside the package in a checkout."""

_REMOTE = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel")
"""Under which of these a folder's own code has its language model: LLaDA's under the first, Dream's under the last."""


def load_model(
    path: Path | None, dtype: str, *, device: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """A model of transformers, or of its folder's own code, and its tokenizer.

    Args:
        path: the folder; ``None``: the shipped model.
        dtype: one of :data:`~mosaic_compiler.ahead.configs.DTYPES`.
        device: ``cpu``, ``cuda``, or ``auto``: the GPU if there is one.
        trust_remote_code: run code of the folder.

    Raises:
        ConfigError: if there is none at ``path``, or it does not load.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device {device!r} is none of auto, cuda, cpu")
    if path is None and not SHIPPED.is_dir():
        raise ConfigError("which model? give --model PATH (the shipped tiny-llada is in the repository's examples)")
    path = SHIPPED if path is None else path
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: no model (a folder with config.json and weights)")
    config = load_config(str(path / "config.json"))
    try:
        import torch
        import transformers as hf
        from transformers.utils import logging
    except ImportError:
        raise ConfigError("loading a model needs transformers: pip install 'mosaic-compiler[hf]'") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda needs a GPU that torch can use (mosaic doctor says what it finds): --device cpu")
    own_code = "auto_map" in config and config["model_type"] not in hf.CONFIG_MAPPING
    if own_code and not trust_remote_code:
        raise ConfigError(
            f"{path}: the model is Python code of its own ({_own_files(config)} in its folder), which transformers "
            "does not have: read it, and pass --trust-remote-code to run it"
        )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    trust = {"trust_remote_code": trust_remote_code}
    kept = {"dtype": getattr(torch, dtype)}
    failures = (Exception,) if trust_remote_code else (OSError, ValueError, KeyError)  # code of others raises anything
    try:
        family = _family(config, trust_remote_code)
        if trust_remote_code and "auto_map" in config:
            model = remote_code.load(family, str(path), **kept)
        else:
            model = getattr(hf, family).from_pretrained(path, **kept, **trust)
        model = model.eval().requires_grad_(False)
        tokenizer = hf.AutoTokenizer.from_pretrained(path, **trust)
    except failures as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({last.filename}:{last.lineno})" if trust_remote_code else ""
        raise ConfigError(f"{path} does not load: {type(error).__name__}: {first_line(error)}{where}") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), tokenizer


def _family(given: dict[str, Any], trusted: bool) -> str:
    """The automatic class that loads the language model of a folder."""
    import transformers as hf

    if trusted and "auto_map" in given:
        found = next((name for name in _REMOTE if name in given["auto_map"]), None)
        if found is None:
            raise ValueError(f"its auto_map names no language model (one of {', '.join(_REMOTE)})")
        return found
    named = str((given.get("architectures") or [""])[0])
    for ending in ("ForCausalLM", "ForMaskedLM"):
        if named.endswith(ending):
            return f"AutoModel{ending}"
    config = hf.AutoConfig.for_model(given["model_type"])
    if isinstance(given.get("canvas_length", getattr(config, "canvas_length", None)), int):
        return str(family_of(config).__name__)
    if type(config) not in (*hf.MODEL_FOR_MASKED_LM_MAPPING, *hf.MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ValueError(
            f"{named or type(config).__name__} is neither a masked nor a causal language model of transformers, so no "
            "masked diffusion language model, and those are what this runs"
        )
    return str(family_of(config).__name__)


def _own_files(config: dict[str, Any]) -> str:
    """``modeling_x.py`` and so on, of what an ``auto_map`` names."""
    named = (str(name[0] if isinstance(name, list) else name) for name in config["auto_map"].values())
    return ", ".join(sorted({f"{name.partition('.')[0]}.py" for name in named})) or "auto_map"


def ids_with_masks(tokenizer: Any, text: str, mask: int) -> list[int]:
    """The ids of a text in which each ``<mask>`` or ``___``, with the space in front of it, is one mask token."""
    pieces = MASKS.split(text)
    if tokenizer.mask_token is not None and tokenizer.mask_token_id == mask:
        ids: list[int] = tokenizer(tokenizer.mask_token.join(pieces)).input_ids
        if ids.count(mask) == len(pieces) - 1:
            return ids
    first, *others = (tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces)
    probe = next((piece for piece in pieces if piece.strip()), "a")  # tokens that begin or end a text stand around it
    plain, whole = tokenizer(probe, add_special_tokens=False).input_ids, tokenizer(probe).input_ids
    at = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), len(whole))
    return [*whole[:at], *first, *(token for other in others for token in (mask, *other)), *whole[at + len(plain) :]]
