"""AOTAutograd as a backend (to import it takes a while, so it stands by itself)."""

from __future__ import annotations

from torch._dynamo.backends.common import aot_autograd

__all__ = ["aot_autograd"]
