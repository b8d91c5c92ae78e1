"""Models by their Hugging Face configs: read, and built without weights."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosaic_compiler.ahead.known_models import KNOWN
from mosaic_compiler.errors import ConfigError

if TYPE_CHECKING:
    import torch

_NOT_OF_THE_MODEL = ("model_type", "architectures", "dtype", "block_causal")
DTYPES = ("bfloat16", "float16", "float32")


def load_config(name: str) -> dict[str, Any]:
    """The Hugging Face config behind a known name (in any case), a ``config.json``, or a folder that holds one.

    Raises:
        ConfigError: if there is none, or it is none.
    """
    known = {each.lower(): each for each in KNOWN}
    if name.lower() in known:
        return dict(KNOWN[known[name.lower()]])
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        near = [known[each] for each in difflib.get_close_matches(name.lower(), known, n=1)]
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{name}: no such config{meant}; give a config.json, or one of {', '.join(KNOWN)}")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ConfigError(f"{path} is no Hugging Face config: it has no 'model_type'")
    return found


def name_of(config: str) -> str:
    """What to call the model behind a config: ``LLaDA-8B``, or the folder of a ``config.json``."""
    path = Path(config)
    return config if config in KNOWN else (path.resolve().parent if path.name == "config.json" else path).stem


def positions(config: Any) -> int | None:
    """The longest sequence that a config (of JSON, or of transformers) is for; ``None`` if it says nothing."""
    values = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name in ("max_position_embeddings", "max_sequence_length", "n_positions"):  # the second: LLaDA's remote code
        if isinstance(values.get(name), int):
            return int(values[name])
    inner = values.get("text_config")
    return None if inner is None else positions(inner)


def build(config: Mapping[str, Any], dtype: torch.dtype) -> tuple[torch.nn.Module, int]:
    """A bidirectional model of such a config on the meta device, and its mask token.

    Raises:
        ConfigError: if transformers is missing, or does not know such a model.
    """
    try:
        import transformers as hf
    except ImportError:
        raise ConfigError("building a model needs transformers: pip install 'mosaic-compiler[hf]'") from None
    import torch

    given = {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
    mask = given.pop("mask_token_id", None)
    kind = str(config["model_type"])
    if "auto_map" in config:
        raise ConfigError(
            f"a config of remote code ({kind}): transformers cannot build it from the config alone; use the known name "
            f"({', '.join(KNOWN)}), or the config of the architecture that it is (such as llama with is_causal=false)"
        )
    try:
        made = hf.AutoConfig.for_model(kind, **{**given, "use_cache": False})
    except (ValueError, TypeError, KeyError) as error:
        why = "" if "model_type" in str(error) or kind in str(error) else f": {first_line(error)}"
        raise ConfigError(f"transformers {hf.__version__} does not know model_type {kind!r}{why}") from None
    made.is_causal = False
    if any(hasattr(made, name) for name in ("num_experts", "n_routed_experts", "num_local_experts")):
        made._experts_implementation = "grouped_mm"
    made.max_position_embeddings = max(int(getattr(made, "max_position_embeddings", 0) or 0), 1 << 21)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = family_of(made).from_config(made)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"transformers cannot build a language model of this {kind} config: {first_line(error)}"
        ) from None
    finally:
        torch.set_default_dtype(before)
    if mask is None:
        mask = getattr(made, "mask_token_id", None) or 0  # which id it is makes no difference to a plan
    return model.eval().requires_grad_(False), int(mask)


def family_of(config: Any) -> Any:
    """The class of transformers' automatic models that loads a language model of a config."""
    import transformers as hf

    if isinstance(getattr(config, "canvas_length", None), int):  # these read images, too
        return hf.AutoModelForImageTextToText
    return hf.AutoModelForMaskedLM if type(config) in hf.MODEL_FOR_MASKED_LM_MAPPING else hf.AutoModelForCausalLM


def first_line(error: Exception) -> str:
    """What an error says, shortened."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
