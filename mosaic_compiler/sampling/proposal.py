"""``Proposal``: a model's forward and a sampler's rule on the rows that are needed, as one compilable module."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mosaic_compiler.sampling.calls import ModelCall
from mosaic_compiler.sampling.rules import Numbers


class HeadRows:
    """While it is entered, a model's head sees the hidden states of some rows only, and so do the logits.

    For models whose forward breaks into several graphs: what picks rows behind the logits would be in another graph
    than the head.

    Args:
        head: the module that makes logits [.., N, V] from hidden states [.., N, D].
    """

    def __init__(self, head: nn.Module) -> None:
        self._head = weakref.ref(head)
        self.rows: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> HeadRows:
        head = self._head()
        assert head is not None
        self._hook = head.register_forward_pre_hook(self._pick)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._hook is not None
        self._hook.remove()

    def _pick(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self.rows is not None
        return (inputs[0].flatten(0, -2).index_select(0, self.rows).unsqueeze(0), *inputs[1:])


class Proposal(nn.Module):
    """Tokens and confidences for some rows of a batch.

    The graph picks the rows behind the logits; so nothing else is computed for other rows than the model needs.

    Args:
        model: see ``call``.  It is not kept alive.
        call: how to call it.
        rule: a module of ``rules.py``.
        picked: picks the rows in front of the head instead; entered by whoever calls.
    """

    def __init__(
        self,
        model: nn.Module,
        call: ModelCall,
        rule: nn.Module,
        picked: HeadRows | None = None,
    ) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self.call, self.rule, self.picked = call, rule, picked

    @property
    def model(self) -> nn.Module:
        """The model; whoever calls holds it."""
        found = self._model()
        assert found is not None
        return found

    def forward(
        self,
        ids: Tensor,
        rows: Tensor,
        keys: Tensor,
        numbers: Numbers,
        unguided: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Propose.

        Args:
            ids: int64 [B, N].
            rows: int64 [M], needed rows among the B * N.
            keys: int64 [M], of the noise.
            numbers: what the rule is told, and the scale of classifier-free guidance.
            unguided: int64 [B, N], the ids with the prompt masked; only with guidance.
            real: bool [B, N], False for padding; ``None``: there is none.

        Returns:
            int64 [M] tokens, and [M] confidences.
        """
        if unguided is None:
            logits = self._logits(ids, real, rows)
        else:
            twice = None if real is None else torch.cat([real, real])
            chosen = self._logits(torch.cat([ids, unguided]), twice, torch.cat([rows, rows + ids.numel()]))
            guided, free = chosen.chunk(2)
            logits = free + (numbers["guidance"] + 1) * (guided - free)
        token, confidence = self.rule(logits, keys, numbers)
        return token, confidence

    def _logits(self, ids: Tensor, real: Tensor | None, rows: Tensor) -> Tensor:
        """[M, V]"""
        if self.picked is None:
            return self.call(self.model, ids, real).flatten(0, 1).index_select(0, rows)
        self.picked.rows = rows
        return self.call(self.model, ids, real).flatten(0, 1)
