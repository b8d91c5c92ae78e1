"""The sizes of a plan as people say them: ``65,536 masked rows`` instead of ``s38=65536``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def in_words(symbols: Iterable[tuple[str, int]], meanings: Mapping[str, str]) -> list[str]:
    """One phrase per symbol: its number and its meaning, or its name and its number where nobody knows the meaning.

    in_words([("s0", 7), ("s1", 4096)], {"s1": "tokens"}) == ["4,096 tokens", "s0=7"]: in the order of the meanings.
    """
    order = {name: position for position, name in enumerate(meanings)}
    symbols = sorted(symbols, key=lambda symbol: order.get(symbol[0], len(order)))
    return [f"{value:,} {meanings[name]}" if name in meanings else f"{name}={value}" for name, value in symbols]
