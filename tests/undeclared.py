"""Custom ops that do other things than their schema or their fake kernel says: return an argument, another layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import config

# PyTorch warns of such an op, but refuses to run it where the variable CI is set.
if hasattr(config, "error_on_custom_op_aliasing"):
    config.error_on_custom_op_aliasing = False


def define(library: torch.library.Library, schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op in ``library`` by what it does (``real``) and what is said of it (``schema``, ``fake``)."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
