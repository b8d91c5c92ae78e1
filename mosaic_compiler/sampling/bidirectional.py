"""Is a model bidirectional?  ``generate()`` refuses what it cannot prove, because logits of a block-causal model that
is called without its mask are wrong, and look right.

First what a model says of itself: in its config, its modules' ``is_causal``, the arguments of its methods, the masks
that its code makes.  Then a trial: two short sequences that differ in their last token must differ in their first row
if two that differ in their first token differ in their last row.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.sampling.calls import MASK_FORMS, ModelCall, call_for

_BLOCKS = ("block_size", "block_length", "bd_size", "canvas_length", "diffusion_block_size")
"""What configs and methods of block-causal models call the length of a block."""
_TELLING = frozenset({*_BLOCKS, "store_kv", "decoder_input_ids"})
_METHODS = ("forward", "generate", "diffusion_generate")
_TOKENS = 66
"""Of a trial, if the sequence is that long: more than two blocks of 32."""


class NotADiffusionModelError(ValueError):
    """The model attends causally, or may do so."""


_tried: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""Models that were found to be bidirectional, and the number of tokens of the trial."""
_forms: weakref.WeakKeyDictionary[nn.Module, dict[int, str]] = weakref.WeakKeyDictionary()
"""In which form models take the mask of blocks of so many tokens, as far as it was tried."""


def check_bidirectional(model: nn.Module, ids: Tensor, mask: int, total: int) -> None:
    """Raise :class:`NotADiffusionModelError` unless every row of a model attends to all others.

    Args:
        model: in eval mode.
        ids: int64 [B, P], a prompt.
        mask: id of the mask token.
        total: tokens of the sequences that it is to be called on.
    """
    tokens = min(total, _TOKENS)
    if _tried.get(model, 0) >= tokens:
        return
    if (causal := _causal_part(model)) is not None:
        raise NotADiffusionModelError(
            f"{type(model).__name__} is no diffusion language model: {causal} attends causally. If its weights are of "
            "one, load it with is_causal=False: AutoModelForCausalLM.from_pretrained(path, is_causal=False), "
            'or put "is_causal": false into its config.json'
        )
    problem = _block_causal_sign(model) or _trial(model, ids, mask, tokens)
    if problem is not None:
        raise NotADiffusionModelError(
            f"{type(model).__name__} is not proven to be bidirectional: {problem}. Block-causal models (LLaDA2.x, "
            "SDAR, Fast-dLLM v2) need the mask that they were trained with, or results are wrong: say block_causal=32 "
            "(--block-causal 32), or how long their blocks are. If each row of yours attends to all others when the "
            "model is called without a mask, pass bidirectional=True (--bidirectional)"
        )
    _tried[model] = tokens


def check_padding(model: nn.Module, mask: int, device: torch.device, block: int = 0, form: str = MASK_FORMS[0]) -> None:
    """Raise :class:`ValueError` if a model's rows see tokens that are marked as padding."""
    call = call_for(model, padded=True, block=block, form=form)
    ids = torch.full((1, 8), mask, device=device)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, :2] = False
    moved = _differ(model, call, ids, 0, 7, real)
    if moved > 1e-3:
        raise ValueError(
            f"{type(model).__name__} does not look at the mask of padding that it is given: tokens that are marked as "
            "padding change the rows of others. Generate for prompts of one length at a time"
        )


def declared_block(model: nn.Module) -> tuple[str, int] | None:
    """What a config calls the length of its blocks, and how long they are, if it says so.

    ``bd_size`` is Fast-dLLM v2's.  ``block_size`` means other things as well (pages, quantisation), so it counts beside
    a mask token only, and not where the config says that attention is bidirectional all the same.
    """
    config = getattr(model, "config", None)
    for name in ("bd_size", "block_size"):
        size = _entry(config, name)
        if type(size) is not int or size < 1:
            continue
        if name == "bd_size":
            return name, size
        is_for_masks = isinstance(_entry(config, "mask_token_id"), int)
        if is_for_masks and "bidirectional" not in (_entry(config, "dlm_paradigm"), _entry(config, "attention_type")):
            return name, size
    return None


def form_of(model: nn.Module, mask: int, block: int) -> str:
    """The form of a block-causal mask that a model does not refuse; also on the meta device, where nothing is compared.

    Raises:
        NotADiffusionModelError: if it refuses all.
    """
    parameter = next(model.parameters(), None)
    ids = torch.full((1, 2 * block + 2), mask, device=None if parameter is None else parameter.device)
    error: Exception | None = None
    for form in MASK_FORMS:
        try:
            with torch.no_grad():
                call_for(model, padded=False, block=block, form=form)(model, ids, None)
        except Exception as raised:  # whatever the model raises
            error = error or raised
            continue
        return form
    raise _refusal(model, block, error) from error


def check_block_causal(model: nn.Module, ids: Tensor, mask: int, block: int) -> str:
    """How a model takes a block-causal mask, one of :data:`~mosaic_compiler.sampling.calls.MASK_FORMS`.

    Raises:
        NotADiffusionModelError: if it takes none, or its rows see more than that lets them see.
    """
    forms = _forms.setdefault(model, {})
    if block in forms:
        return forms[block]
    length = 2 * block + 2
    tokens = torch.full((1, length), mask, device=ids.device)
    some = ids.flatten()[:length]
    tokens[0, : len(some)] = some
    error: Exception | None = None
    sees_later = False
    for form in MASK_FORMS:
        try:
            call = call_for(model, padded=False, block=block, form=form)
            moved = max(_differ(model, call, tokens, length - 1, block), _differ(model, call, tokens, block, block - 1))
            if block > 1 and _differ(model, call, tokens, block - 1, 0) <= 1e-6:
                moved = max(moved, 1.0)  # rows do not see their own block
        except Exception as raised:  # whatever the model raises
            error = error or raised
            continue
        if moved <= 1e-6:
            forms[block] = form
            return form
        sees_later = True
    if sees_later or error is None:
        raise NotADiffusionModelError(
            f"{_named(model)} does not look at the block-causal mask that it is given: its rows see later "
            f"blocks, or not all of their own (of {block}). Leave block_causal out; if each row attends to all others, "
            "pass bidirectional=True"
        )
    raise _refusal(model, block, error) from error


def _refusal(model: nn.Module, block: int, error: Exception | None) -> NotADiffusionModelError:
    text = str(error).strip().splitlines() or [""]
    return NotADiffusionModelError(
        f"{_named(model)} takes no mask [B, 1, N, N] as attention_mask (or attention_bias), which "
        f"block_causal={block} needs: it raises {type(error).__name__}: {text[0][:200]}"
    )


def _named(model: nn.Module) -> str:
    """A model, and how long its config says that blocks are."""
    declared = declared_block(model)
    return type(model).__name__ + ("" if declared is None else f" (its config has {declared[0]}={declared[1]})")


def _causal_part(model: nn.Module) -> str | None:
    """What says that it attends causally; a config that says the contrary is believed where transformers reads it."""
    declared = getattr(getattr(model, "config", None), "is_causal", None)
    if declared:
        return "its config"
    if declared is False:
        return None
    named = (name for name, part in model.named_modules() if getattr(part, "is_causal", False) is True)
    return next((f"its {name}" if name else "it" for name in named), None)


def _block_causal_sign(model: nn.Module) -> str | None:
    for config in _configs(getattr(model, "config", None)):
        for name in _BLOCKS:
            if type(value := _entry(config, name)) is int and value > 0:
                return f"its config has {name}={value}"
        if _entry(config, "is_decoder") is True or _entry(config, "is_encoder_decoder") is True:
            return "its config says that it is a decoder"
    for part in model.modules():
        for method in _METHODS:
            telling = _TELLING & _parameters(getattr(type(part), method, None)).keys()
            if telling:
                return f"{type(part).__name__}.{method}() takes {', '.join(sorted(telling))}"
        if not type(part).__module__.startswith(("transformers.", "torch.")):
            code = getattr(inspect.unwrap(type(part).forward), "__code__", None)
            made = [name for name in getattr(code, "co_names", ()) if _makes_causal_mask(name)]
            if made:
                return f"{type(part).__name__}.forward() calls {made[0]}()"
    return None


def _makes_causal_mask(name: str) -> bool:
    return "causal" in name and ("prepare_4d" in name or name.startswith("create_"))


def _trial(model: nn.Module, ids: Tensor, mask: int, length: int) -> str | None:
    call = call_for(model, padded=False)
    tokens = torch.full((1, length), mask, device=ids.device)
    some = ids.flatten()[:length]
    tokens[0, : len(some)] = some
    try:
        forward = _differ(model, call, tokens, length - 1, 0)
        backward = _differ(model, call, tokens, 0, length - 1)
    except Exception as error:  # whatever the model raises where it is not called as it wants to be
        text = str(error).strip().splitlines() or [""]
        return f"called on {length} tokens without a mask, it raises {type(error).__name__}: {text[0][:200]}"
    if forward <= 1e-6 < backward:
        return (
            f"of {length} tokens, the last one does not change the first row, while the first one changes the last row"
        )
    return None


def _differ(
    model: nn.Module, call: ModelCall, ids: Tensor, changed: int, row: int, real: Tensor | None = None
) -> float:
    """How much a row's logits change, as a share of the median one (some may be -inf, or as good as), when one token is
    another."""
    other = ids.clone()
    other[0, changed] = ids[0, changed] - 1 if ids[0, changed] > 0 else 1
    with torch.no_grad():
        first, second = (call(model, given, real)[0, row].float() for given in (ids, other))
    scale = float(first.abs().median())
    return float((first - second).abs().nan_to_num().max()) / scale if scale else 0.0


def _configs(config: Any) -> Iterator[Any]:
    """A config, and those inside of it."""
    if config is not None:
        yield config
        for value in list(vars(config).values()) if hasattr(config, "__dict__") else []:
            if hasattr(value, "to_dict"):
                yield from _configs(value)


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _parameters(method: Any) -> Mapping[str, inspect.Parameter]:
    if method is None:
        return {}
    try:
        return inspect.signature(inspect.unwrap(method)).parameters
    except (TypeError, ValueError):  # written in C
        return {}
