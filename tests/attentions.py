"""Which attentions a step calls."""

from __future__ import annotations

import threading

from torch.utils._python_dispatch import TorchDispatchMode

from mosaic_compiler.runtime.program import Program
from mosaic_compiler.runtime.rehearsal import Rehearsal


class Attentions(TorchDispatchMode):
    """Sees each attention by one op that is rehearsed or runs in a step.

    Attributes:
        seen: the thread that called it, layouts of queries, keys and values, and all other arguments.
    """

    def __init__(self, op, monkeypatch):
        super().__init__()
        self.op, self.seen = op, []
        for owner, name in ((Program, "run"), (Rehearsal, "_run")):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, method):
        def run(*args):
            with self:  # Dynamo compiles nothing in such a mode: it is for what runs only
                return method(*args)

        return run

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.op:
            layouts = [(tuple(t.shape), t.stride(), t.dtype) for t in args[:3]]
            self.seen.append((threading.get_ident(), layouts, args[3:], kwargs))
        return function(*args, **(kwargs or {}))
