"""An independent implementation of chosen keys: whole sequences in eager PyTorch, sets of keys in Python loops.

In a step for all rows every attention scores its keys for some rows; those that are not chosen are hidden in the steps
for rows that follow, by a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kept import _attention, _sdpa, rounded
from torch import Tensor


def scores_of(query: Tensor, key: Tensor, seen: Tensor, rows: list[int], score: str, sets: str, most: int) -> Tensor:
    """Scores of one sequence's keys, [G or 1, N].

    Args:
        query: [H, R, d], of the rows.
        key: [G, N, d].
        seen: bool [R, N], of the rows.
        rows: each once.
        most: keys that each query votes for.
    """
    heads, depth = query.shape[0], query.shape[2]
    share, length = heads // key.shape[0], key.shape[1]
    found = []
    for head in range(heads):
        dots = query[head] @ key[head // share].T
        if score == "sparse-dllm":
            mean = query[head].mean(0) @ key[head // share].T
            found.append(mean.masked_fill(~seen.any(0), -torch.inf))
            continue
        likely = torch.softmax((dots / depth**0.5).masked_fill(~seen, -torch.inf), -1)
        likely = likely.nan_to_num(0.0)  # a query that sees nothing
        if score == "probability":
            found.append(likely.amax(0))
            continue
        votes = torch.zeros(length, dtype=query.dtype)
        for row in range(len(rows)):
            for place in torch.sort(likely[row], stable=True, descending=True).indices[:most]:
                votes[place] += bool(seen[row, place])
        found.append(votes)
    by_head = torch.stack(found).view(-1, share, length)
    if score == "sparse-dllm":
        line = by_head.mean((0, 1))
        others = [place for place in range(length) if place not in rows]
        pooled = F.max_pool1d(line[others][None], 3, 1, 1)[0] if others else line[:0]
        line = torch.full_like(line, -torch.inf)
        line[others] = pooled
        return line[None]
    by_group = by_head.sum(1) if score == "mage" else by_head.amax(1)
    if sets == "head":
        return by_group
    return by_group.sum(0, keepdim=True) if score == "mage" else by_group.amax(0, keepdim=True)


def chosen_of(scores: Tensor, rows: list[int], count: int) -> Tensor:
    """bool [G or 1, N]: the rows' own keys and those that score best, the first ones among equals."""
    found = torch.zeros_like(scores, dtype=torch.bool)
    for head, line in enumerate(scores.tolist()):
        order = sorted(range(len(line)), key=lambda place: (place not in rows, -line[place], place))
        found[head, order[:count]] = True
    return found


class Chosen:
    """Chosen keys and values of each attention of a function, in the order of its calls.

    Args:
        groups: heads of keys, where they come repeated.
        count: keys that stay.
    """

    def __init__(self, function: Callable[..., Any], groups: int, count: int, score: str, sets: str,
                 precision: str | None = None) -> None:  # fmt: skip
        self.function, self.groups, self.count, self.score, self.sets = function, groups, count, score, sets
        self.precision = precision
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def full(self, rows: Tensor, *args: Any) -> Any:
        """Call the function; remember what is chosen for rows [B, R]."""
        self.kept = []

        def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
            rounded_pair = (rounded(each, self.precision) for each in (key, value))
            self.kept.append((*rounded_pair, self._places(query, key, attn_mask, rows)))
            return _sdpa(query, key, value, attn_mask=attn_mask, **options)

        with _attention(attend):
            return self.function(*args)

    def _places(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, rows: Tensor) -> Tensor:
        """bool [B, H, N]: what is chosen."""
        share, places = key.shape[1] // self.groups, []
        for entry, own in enumerate(rows.tolist()):
            own = sorted(set(own))
            seen = torch.ones(len(own), key.shape[2], dtype=torch.bool)
            if attn_mask is not None:
                seen = attn_mask.expand(key.shape[0], 1, -1, -1)[entry, 0][own]
            most = self.count - rows.shape[1]
            scores = scores_of(query[entry][:, own], key[entry, ::share], seen, own, self.score, self.sets, most)
            places.append(chosen_of(scores, own, self.count).expand(self.groups, -1).repeat_interleave(share, 0))
        return torch.stack(places)

    def reuse(self, rows: Tensor, *args: Any, chooses: bool = False) -> Any:
        """The same, where only rows [B, R] get new keys and values, and only chosen ones are seen; ``chooses``: all are
        seen, and some are chosen of them."""
        numbers = iter(range(len(self.kept)))

        def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
            number = next(numbers)
            keys, values, places = self.kept[number]
            new = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool).scatter(1, rows, True)[:, None, :, None]
            seen = torch.where(new, key, keys), torch.where(new, value, values)
            kept = (
                torch.where(new, rounded(now, self.precision), old) for now, old in zip((key, value), seen, strict=True)
            )
            if chooses:
                self.kept[number] = (*kept, self._places(query, seen[0], attn_mask, rows))
                return _sdpa(query, *seen, attn_mask=attn_mask, **options)
            self.kept[number] = (*kept, places)
            mask = places.unsqueeze(2) if attn_mask is None else places.unsqueeze(2) & attn_mask
            return _sdpa(query, *seen, attn_mask=mask, **options)

        with _attention(attend):
            return self.function(*args)
