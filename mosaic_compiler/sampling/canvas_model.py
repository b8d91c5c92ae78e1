"""Models with a canvas (DiffusionGemma of transformers): an encoder that leaves keys and values, and a decoder that
denoises a canvas of tokens behind them.

Both are called as they are, with a cache of our own: what the encoder leaves stands in memory that is made once, is
read where it stands, and is never copied by a step.  What a canvas is conditioned on (its logits of the step before,
[B, C, V]) is kept as what the model makes of them, [B, C, D].
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mosaic_compiler.sampling import noise


def is_canvas_model(model: nn.Module) -> bool:
    """It denoises ``decoder_input_ids`` behind ``past_key_values``, and its config says how many."""
    wanted = {"decoder_input_ids", "past_key_values", "self_conditioning_logits"}
    has_length = isinstance(getattr(getattr(model, "config", None), "canvas_length", None), int)
    return has_length and wanted <= inspect.signature(model.forward).parameters.keys()


class _Layer:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class Prefix:
    """What the model asks of a cache, around keys and values that are given.

    Args:
        tokens: how many there are.
        windows: of each layer, how many keys a row sees; 0: all.
        kept: keys and values of each layer, [B, H, n, d]: of all tokens, or the last ones; empty: none are kept yet.
    """

    is_compileable = False

    def __init__(self, tokens: int, windows: Sequence[int], kept: Sequence[Tensor]) -> None:
        self.tokens, self.windows = tokens, windows
        self.layers = [_Layer(kept[at], kept[at + 1]) for at in range(0, len(kept), 2)]
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def seen(self, rows: int, layer: int, device: torch.device) -> Tensor:
        """Which keys new rows see in a layer, bool [1, 1, n, m]: those up to their own, or the last of them."""
        window = self.windows[layer]
        first = self.tokens - self.layers[layer].keys.shape[2] if self.layers else 0
        query = self.tokens + torch.arange(rows, device=device).unsqueeze(1)
        key = torch.arange(first, self.tokens + rows, device=device).unsqueeze(0)
        seen = key <= query
        return (seen & (key > query - window) if window else seen)[None, None]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """New keys and values behind what is kept; they are remembered."""
        self.made[layer_idx] = key, value
        if not self.layers:
            return key, value
        kept = self.layers[layer_idx]
        return torch.cat([kept.keys, key], 2), torch.cat([kept.values, value], 2)


class Conditioning:
    """While it is entered, the module that conditions a canvas gets ``signal`` instead of what the model makes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.signal: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> Conditioning:
        module = self._module()
        assert module is not None
        self._hook = module.register_forward_pre_hook(self._replace)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._hook is not None
        self._hook.remove()

    def _replace(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self.signal is not None
        return inputs[0], self.signal


class Parts:
    """The parts of a canvas model that are called by themselves.

    Attributes:
        windows: of each layer, how many keys a row of the encoder sees; 0: all.
        kinds: of each kind of layers, the first.
        canvas: tokens of a canvas.
        vocabulary: tokens that there are.

    Raises:
        ValueError: for a model that has them in other places.
    """

    def __init__(self, model: nn.Module) -> None:
        text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        self._model = weakref.ref(model)
        self.canvas = int(model.config.canvas_length)  # type: ignore[union-attr, arg-type]
        self.vocabulary = int(text.vocab_size)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        self.kinds = {kind: kinds.index(kind) for kind in kinds}
        self.windows = [int(text.sliding_window) if kind == "sliding_attention" else 0 for kind in kinds]
        if getattr(text, "use_bidirectional_attention", None) == "all":
            raise ValueError(
                f"the encoder of {type(model).__name__} attends to all tokens (use_bidirectional_attention='all'), so "
                "nothing of it holds for a longer text: generate() cannot run it"
            )
        self.encoder = _the(model, "encoder", {"input_ids", "past_key_values"}, inner="language_model")
        self.conditioning = _the(model, "self-conditioning", {"self_conditioning_signal"})
        self.embedding: Any = _owner(model, self.conditioning).get_input_embeddings()  # type: ignore[operator]

    @property
    def model(self) -> nn.Module:
        """The model; whoever calls holds it."""
        found = self._model()
        assert found is not None
        return found

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.embedding.weight.dtype
        return found

    def soft(self, logits: Tensor) -> Tensor:
        """Embeddings of tokens that are weighted by their probabilities, [B, C, V] -> [B, C, D]."""
        weight = self.embedding.weight
        mixed: Tensor = torch.softmax(logits.to(weight.dtype), -1, dtype=torch.float32).to(weight.dtype) @ weight
        scale = getattr(self.embedding, "embed_scale", None)
        return mixed if scale is None else mixed * torch.as_tensor(scale).to(mixed.device, mixed.dtype)

    def logits(self, canvas: Tensor, prefix: Prefix) -> Tensor:
        """[B, C] -> [B, C, V]"""
        positions = prefix.tokens + torch.arange(canvas.shape[1], device=canvas.device).unsqueeze(0)
        output: Any = self.model(
            decoder_input_ids=canvas, past_key_values=prefix, self_conditioning_logits=None,
            decoder_attention_mask=None, decoder_position_ids=positions,
        )  # fmt: skip
        found: Tensor = output.logits
        return found


def _the(model: nn.Module, what: str, parameters: set[str], inner: str = "") -> nn.Module:
    """The one part whose forward takes them (of its parts named ``inner``)."""
    found = [
        (name, part) for name, part in model.named_modules()
        if name and (not inner or name.rpartition(".")[2] == inner)
        and parameters <= inspect.signature(part.forward).parameters.keys()
    ]  # fmt: skip
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has a canvas, but not one {what} that takes {', '.join(sorted(parameters))} "
            f"(found: {', '.join(name for name, _ in found) or 'none'}): generate() cannot run it"
        )
    part: nn.Module = found[0][1]
    return part


def _owner(model: nn.Module, part: nn.Module) -> nn.Module:
    return next(each for each in model.modules() if any(child is part for child in each.children()))


class EncoderStep(nn.Module):
    """Tokens behind a prefix -> their keys and values in each layer."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts = weakref.ref(parts)

    def forward(self, ids: Tensor, begin: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            ids: int64 [B, n].
            begin: [N], of which only the length counts: the tokens in front.
            kept: keys and values of each layer; none for the first tokens.
        """
        parts = self._parts()
        assert parts is not None
        prefix = Prefix(begin.shape[0] if kept else 0, parts.windows, kept)
        positions = prefix.tokens + torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        seen = {kind: prefix.seen(ids.shape[1], layer, ids.device) for kind, layer in parts.kinds.items()}
        parts.encoder(input_ids=ids, past_key_values=prefix, position_ids=positions, attention_mask=seen)
        return tuple(tensor for layer in range(len(parts.windows)) for tensor in prefix.made[layer])


class CanvasStep(nn.Module):
    """One denoising step: for each row of the canvas a token that is drawn, the most likely one, how unsure the model
    is, and what the next step is conditioned on."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts = weakref.ref(parts)
        self.conditioning = Conditioning(parts.conditioning)

    def forward(
        self, canvas: Tensor, soft: Tensor, temperature: Tensor, keys: Tensor, begin: Tensor, *kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            canvas: int64 [B, C].
            soft: [B, C, D], of the step before; zeros in the first.
            temperature: float32, without dims.
            keys: int64 [B * C], of the noise.
            begin, kept: as of :class:`EncoderStep`.

        Returns:
            int64 [B, C] drawn, int64 [B, C] most likely, float32 [B, C] entropies in nats, and [B, C, D].
        """
        parts = self._parts()
        assert parts is not None
        self.conditioning.signal = soft
        logits = parts.logits(canvas, Prefix(begin.shape[0], parts.windows, kept)).float() / temperature
        self.conditioning.signal = None  # as it was: what is compiled asks for that
        likely = torch.log_softmax(logits, -1)
        shares = torch.exp(likely)
        race = noise.exponential(keys, logits.shape[-1]).float().view_as(logits)
        entropy = -(shares * likely.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
        return (shares / race).argmax(-1), logits.argmax(-1), entropy, parts.soft(logits)


@contextmanager
def conditioned(step: CanvasStep) -> Iterator[None]:
    """Where a canvas step may be called."""
    with step.conditioning:
        yield


_tried: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_conditioning(parts: Parts, ids: Tensor) -> None:
    """Raise :class:`ValueError` unless a model makes of its last logits what :meth:`Parts.soft` does; tried on a canvas
    behind some tokens."""
    model = parts.model
    if model in _tried:
        return
    some = ids[:1, :4]
    made = EncoderStep(parts)(some, some[0, :0])
    begin = some[0]
    canvas = torch.arange(parts.canvas, device=ids.device).unsqueeze(0) % parts.vocabulary
    step = CanvasStep(parts)
    zeros = torch.zeros(1, parts.canvas, parts.embedding.weight.shape[1], dtype=parts.dtype, device=ids.device)
    positions = len(begin) + torch.arange(parts.canvas, device=ids.device).unsqueeze(0)
    with conditioned(step):
        step.conditioning.signal = zeros
        first = parts.logits(canvas, Prefix(len(begin), parts.windows, made))
        step.conditioning.signal = parts.soft(first)
        ours = parts.logits(canvas, Prefix(len(begin), parts.windows, made))
    theirs: Any = model(
        decoder_input_ids=canvas, past_key_values=Prefix(len(begin), parts.windows, made),
        self_conditioning_logits=first.to(parts.dtype), decoder_attention_mask=None, decoder_position_ids=positions,
    )  # fmt: skip
    moved = float((ours - theirs.logits).abs().max()) / max(float(theirs.logits.abs().max()), 1e-30)
    if not moved <= 1e-3:
        raise ValueError(
            f"{type(model).__name__} makes something else of its last logits than the embeddings of its tokens, "
            f"weighted by their probabilities (logits differ by {moved:.1%}): generate() cannot run it"
        )
    _tried.add(model)
