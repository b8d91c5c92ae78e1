"""Memory of GPUs by the names that people call them.

MiB are what ``nvidia-smi`` shows as total; ``mosaic fit --reserve`` is what CUDA takes of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

CARDS: Mapping[str, int] = MappingProxyType(
    {
        "T4": 15360, "V100-16GB": 16384, "V100-32GB": 32768, "A10": 23028, "A10G": 23028, "L4": 23034, "A30": 24576,
        "A40": 46068, "L20": 46068, "L40": 46068, "L40S": 46068, "A100-40GB": 40960, "A100-80GB": 81920,
        "H100": 81559, "H100-NVL": 95830, "H200": 143771, "B200": 183359, "RTX3090": 24576, "RTX4080": 16376,
        "RTX4090": 24564, "RTX5080": 16303, "RTX5090": 32607, "RTXA6000": 49140, "RTX6000Ada": 49140,
    }
)  # fmt: skip

SPEEDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "A10": (0.6e12, 125e12), "A10G": (0.6e12, 70e12), "L4": (0.3e12, 121e12), "A30": (0.933e12, 165e12),
        "A40": (0.696e12, 150e12), "L40": (0.864e12, 181e12), "L40S": (0.864e12, 362e12),
        "A100-40GB": (1.555e12, 312e12), "A100-80GB": (2.039e12, 312e12), "H100": (3.35e12, 989e12),
        "H100-NVL": (3.9e12, 835e12), "H200": (4.8e12, 989e12), "RTX3090": (0.936e12, 71e12),
        "RTX4090": (1.008e12, 165e12), "RTX5090": (1.792e12, 210e12), "RTXA6000": (0.768e12, 155e12),
        "RTX6000Ada": (0.96e12, 364e12),
    }
)  # fmt: skip
"""Published bytes of memory and dense bf16 floating-point operations per second."""

_SPELLINGS = MappingProxyType({"A100": "A100-40GB", "V100": "V100-16GB", "H100-80GB": "H100"})
"""Of a card that comes with less or more memory, the one with less: what fits there fits both."""

_FILLERS = re.compile(r"nvidia|geforce|tesla|sxm\d?|pcie|hbm\d?e?|[^a-z0-9]")


def card(name: str) -> tuple[str, int] | None:
    """``rtx 4090``, ``NVIDIA A100-SXM4-80GB``, ``H100`` -> the card and its bytes; ``None``: not known."""
    known = {_key(each): each for each in CARDS} | {_key(each): which for each, which in _SPELLINGS.items()}
    found = known.get(_key(name)) or known.get("rtx" + _key(name))
    return None if found is None else (found, CARDS[found] << 20)


def nearest_cards(name: str) -> str:
    """Known names like this one, or a few, for an error message."""
    keys = {_key(each): each for each in (*_SPELLINGS, *CARDS)}
    found = [keys[key] for key in difflib.get_close_matches(_key(name), keys, n=3, cutoff=0.5)]
    return ", ".join(found or ("RTX4090", "A100-80GB", "H100"))


def _key(name: str) -> str:
    return _FILLERS.sub("", name.lower())
