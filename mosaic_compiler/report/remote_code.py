"""Published models' own code, written for transformers 4, loaded by transformers 5.

What LLaDA's (4.38), LLaDA-MoE's and Dream's (4.46) code needs, found by what is missing, never by name:

- ``ROPE_INIT_FUNCTIONS["default"]``, which transformers 5 does not have any more;
- overridden methods that do not know the keywords that transformers 5 passes (``tie_weights``, ``validate``);
- ``all_tied_weights_keys``, which ``post_init()`` makes and some code does not call;
- buffers that are not in the checkpoint.  Transformers 5 builds models without memory, and what a constructor computed
  is gone: rotary frequencies hold whatever was in memory, without an error.  They are computed again.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("mosaic_compiler")


def load(family: str, folder: str, **options: Any) -> Any:
    """The model of a folder with code of its own.

    Args:
        family: which entry of the config's ``auto_map``.
        options: of ``from_pretrained``.
    """
    import transformers as hf
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS.setdefault("default", _frequencies)
    config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    code: Any = get_class_from_dynamic_module(config.auto_map[family], folder)
    if not hasattr(code, "all_tied_weights_keys"):
        code.all_tied_weights_keys = {}
    _forgive(code, "tie_weights")
    for value in list(vars(sys.modules[code.__module__]).values()):
        if isinstance(value, type) and issubclass(value, hf.GenerationConfig) and value is not hf.GenerationConfig:
            _forgive(value, "validate")
    model = code.from_pretrained(folder, config=config, trust_remote_code=True, **options)
    lost = list(_refilled(model))
    if lost:
        logger.warning(
            "mosaic: %s are in no checkpoint, and this version of transformers does not keep what the model's code "
            "made of them: make them again before you trust what it says",
            ", ".join(lost),
        )
    return model


def _frequencies(config: Any, device: Any = None, seq_len: int | None = None, **_: Any) -> tuple[Any, float]:
    """Rotary frequencies of Su et al., "RoFormer" (2021), float32 [head_dim / 2]; attention is not scaled."""
    import torch

    parameters = getattr(config, "rope_parameters", None) or {}
    base: Any = parameters.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(width * getattr(config, "partial_rotary_factor", 1.0))
    steps = torch.arange(0, width, 2, dtype=torch.int64).to(device, torch.float32)
    return 1.0 / base ** (steps / width), 1.0


def _forgive(code: type, name: str) -> None:
    """Keywords that a method does not know are dropped."""
    method = code.__dict__.get(name)
    if method is None:
        return
    known = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return

    @functools.wraps(method)
    def forgiving(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {key: value for key, value in kwargs.items() if key in known}
        return method(self, *args[: len(known) - 1], **given)

    setattr(code, name, forgiving)


def _refilled(model: Any) -> Iterator[str]:
    """Compute rotary frequencies again; names of other buffers of the folder's code that no checkpoint has."""
    for path, module in model.named_modules():
        lost = module._non_persistent_buffers_set
        if "inv_freq" in lost and hasattr(module, "rope_init_fn"):
            more = getattr(module, "rope_kwargs", {})
            module.inv_freq, module.attention_scaling = module.rope_init_fn(
                module.config, module.inv_freq.device, **more
            )
            module.original_inv_freq = module.inv_freq
            lost = lost - {"inv_freq", "original_inv_freq"}
        if type(module).__module__.startswith("transformers_modules"):
            yield from (f"{path}.{name}" if path else name for name in sorted(lost))
