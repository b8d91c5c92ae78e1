"""``mosaic fit``: does a model run at N tokens in B bytes?  Needs no weights and no GPU, and traces each model once.

What tracing finds out (:class:`planning.outline.StepOutline`) is kept on disk under a hash of everything that it
depends on, so that later questions need neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosaic_compiler.errors import BudgetError, CaptureError, ConfigError
from mosaic_compiler.planning.outline import StepOutline
from mosaic_compiler.planning.plan import MemoryPlan, lower_bound
from mosaic_compiler.report.known_models import KNOWN
from mosaic_compiler.settings import read_settings

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
RESERVE = 600 << 20
"""Bytes of a card that CUDA itself takes."""

IN_AND_OUT = 17
"""Bytes per token of a step's inputs (ids, window) and of what it returns."""


@dataclass(frozen=True)
class Traced:
    """What is known of a model's denoising step.

    Attributes:
        outline: the step as this compiler runs it.
        eager: the same for the graph as it was captured, whose bytes live are what eager PyTorch needs.
        weights: bytes of the parameters.
    """

    outline: StepOutline
    eager: StepOutline
    weights: int


@dataclass(frozen=True)
class Answer:
    """For one length: the plan (``None`` if the step does not fit), and what eager would need."""

    tokens: int
    plan: MemoryPlan | None
    problem: str
    eager_peak: int


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


def traced(
    config: Mapping[str, Any],
    dtype: str = "bfloat16",
    device: str = "auto",
    cache: Path | None = None,
    on_trace: Callable[[], None] = lambda: None,
) -> Traced:
    """Trace a model's step, or take it from the cache.

    Args:
        config: see :func:`load_config`.
        dtype: one of :data:`DTYPES`.
        device: whose kernels are planned for: ``cuda`` (where torch can use a GPU), ``cpu``, or ``auto``.
        on_trace: called if the model has to be traced.
        cache: folder; ``None``: ``$MOSAIC_CACHE``, or ``mosaic_compiler`` in the user's cache folder.

    Raises:
        ConfigError: if transformers cannot build such a model, or its forward fails.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device {device!r} is none of auto, cuda, cpu")
    path = (cache or _cache_folder()) / f"{_key(config, dtype, device)}.pickle"
    if path.is_file():
        try:
            known = pickle.loads(path.read_bytes())
            if isinstance(known, Traced):
                return known
        except Exception:  # whatever a truncated file raises: traced again, and written again
            path.unlink(missing_ok=True)
    found = _trace(config, dtype, device, on_trace)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(pickle.dumps(found))
    os.replace(file.name, path)
    return found


def answer(model: Traced, tokens: int, room: int, row_share: float = 0.5) -> Answer:
    """The plan for one length in ``room`` bytes besides weights."""
    budget = room - IN_AND_OUT * tokens
    eager_peak = _eager_peak(model, tokens)
    if budget <= 0:
        return Answer(tokens, None, "no room is left beside the weights", eager_peak)
    try:
        return Answer(tokens, model.outline.plan_for(tokens, row_share, budget).plan, "", eager_peak)
    except BudgetError as error:
        return Answer(tokens, None, str(error), eager_peak)


def longest(model: Traced, room: int, row_share: float = 0.5) -> tuple[int, int]:
    """The most tokens that run in ``room`` bytes besides weights: with this compiler, and in eager PyTorch."""
    if room <= 0:
        return 0, 0
    found = 0
    for _ in range(4):  # inputs and results take room as well
        found = model.outline.longest(max(room - IN_AND_OUT * found, 1), row_share)
    low, high = 0, 1
    while _eager_peak(model, high) <= room:
        low, high = high, 2 * high
    while high - low > max(low // 1000, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if _eager_peak(model, middle) <= room else (low, middle)
    return found, low


def _eager_peak(model: Traced, tokens: int) -> int:
    """Most bytes live at once where every op allocates its result and frees what nobody reads any more."""
    return lower_bound(model.eager.loops.at(model.eager.sizes_for(tokens))) + IN_AND_OUT * tokens


def _cache_folder() -> Path:
    if (given := read_settings().cache) is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosaic_compiler"


def _key(config: Mapping[str, Any], dtype: str, device: str) -> str:
    """A hash of everything that a trace depends on: config, versions, and this package's sources."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "sympy")}
    try:
        versions["transformers"] = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        versions["transformers"] = ""
    text = json.dumps([dict(config), dtype, device, versions], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _trace(config: Mapping[str, Any], dtype: str, device: str, on_trace: Callable[[], None]) -> Traced:
    import torch

    from mosaic_compiler.lowering.lifetimes import find_lives
    from mosaic_compiler.report.forecast import capture_step
    from mosaic_compiler.sampling import DenoisingStep

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("planning with a GPU's kernels needs a GPU: use device auto, which takes the CPU's here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, mask = build(config, getattr(torch, dtype))
    on_trace()
    step = DenoisingStep(model, mask)
    tokens = 64
    example = (
        torch.empty(1, tokens, dtype=torch.int64, device="meta"),
        torch.empty(1, tokens, dtype=torch.bool, device="meta"),
        torch.empty(1, dtype=torch.int64, device="meta"),
    )
    try:
        captured = capture_step(step, example, {}, device=device)
    except CaptureError as error:
        raise ConfigError(
            f"{config['model_type']}: {error}, or look for a value of the config that is missing or wrong"
        ) from error
    outline = captured.outline
    eager = find_lives(captured.captured).data()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Traced(outline.data(), StepOutline(eager, None, outline.hints, ()), weights)


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

    given = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "dtype")}
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
    if kind == "olmoe":
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

    return hf.AutoModelForMaskedLM if type(config) in hf.MODEL_FOR_MASKED_LM_MAPPING else hf.AutoModelForCausalLM


def first_line(error: Exception) -> str:
    """What an error says, shortened."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
