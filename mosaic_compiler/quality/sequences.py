"""Sequences whose last block asks for something: facts from far back, or words of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.errors import ConfigError

BLOCK = 32
"""Tokens at the end that masks are in."""

_ASKED, _WIDTH, _NAME, _VALUE, _WORDS = 4, 8, 4, 5, 2
_SENTENCE = "\nThe portion of Moses gold oil."
_NAMES = (
    "Moses David Saul Samuel Joab Absalom Solomon Jonathan Abner Jacob Joseph Judah Benjamin Ephraim Manasseh Reuben "
    "Simeon Levi Aaron Joshua Caleb Eleazar Gideon Samson Jephthah Boaz Jesse Abraham Isaac Esau Laban Lot Noah Shem "
    "Ham Japheth Elijah Elisha Ahab Jehu Jeroboam Rehoboam Asa Jehoshaphat Hezekiah Josiah Isaiah Jeremiah Daniel Job "
    "Peter Paul John James Simon Philip Pilate Herod Silas Barnabas Timotheus Nathan Zadok Abiathar"
)
_GOODS = (
    "gold silver oil barley wheat corn wine honey salt wool linen brass iron cedar stone sheep oxen goats camels asses "
    "horses bread water fire wood blood flesh flour incense myrrh spices purple scarlet blue white black red green "
    "great small old new first second third seventh tenth hundred thousand fifty forty seven twelve three four five "
    "six eight nine ten twenty thirty sixty"
)


@dataclass(frozen=True)
class Asked:
    """Sequences and what is asked in their last block.

    Attributes:
        ids: int64 [S, N], as they are right.
        masked: bool [S, N], what is asked; so many in each sequence.
        together: how many neighbours among them are one answer (words of a fact).
    """

    ids: Tensor
    masked: Tensor
    together: int = 1

    def shown(self, mask: int) -> Tensor:
        """int64 [S, N]: what a model is given."""
        return torch.where(self.masked, mask, self.ids)

    def right(self, answers: Tensor) -> float:
        """Share of answers that are right, in [0, 1].

        Args:
            answers: int64 [S, M], for the masked tokens of each sequence, in order.
        """
        expected = self.ids[self.masked].view(answers.shape)
        return float((answers == expected).view(len(answers), -1, self.together).all(-1).float().mean())


def facts(tokenizer: Any, text: Tensor, tokens: int, count: int, seed: int = 0) -> Asked:
    """A text with facts ("The portion of Moses gold oil.") set into it at random depths; four of them are asked for at
    its end, both words of each at once.

    Args:
        text: int64 [any], ids of a text that the model has not seen.

    Raises:
        ConfigError: for a tokenizer that takes the words apart, or fewer tokens than facts need.
    """
    names, goods = (_single(tokenizer, words.split()) for words in (_NAMES, _GOODS))
    form = torch.tensor(_encoded(tokenizer, _SENTENCE))
    if len(form) != _WIDTH:
        raise ConfigError("this tokenizer takes the words of facts apart: measure on a text of your own (--text)")
    chance = torch.Generator().manual_seed(seed * 100003 + tokens)
    there, room = max(6, min(64, tokens // BLOCK)), tokens - _ASKED * _WIDTH
    step = room // there
    if step < _WIDTH:
        raise ConfigError(f"facts need at least {_ASKED * _WIDTH + 6 * _WIDTH} tokens, got {tokens}")
    ids = _cut(text, tokens, count, chance)
    who = torch.rand(count, len(names), generator=chance).argsort(1)[:, :there]
    told = form.expand(count, there, _WIDTH).clone()
    told[..., _NAME] = names[who]
    told[..., _VALUE : _VALUE + _WORDS] = goods[torch.randint(0, len(goods), (count, there, _WORDS), generator=chance)]
    at = torch.arange(there) * step + torch.randint(0, max(1, step - _WIDTH), (count, there), generator=chance)
    ids.scatter_(1, (at[..., None] + torch.arange(_WIDTH)).flatten(1), told.flatten(1))
    asked = torch.rand(count, there, generator=chance).argsort(1)[:, :_ASKED]
    ids[:, room:] = told.gather(1, asked[..., None].expand(count, _ASKED, _WIDTH)).flatten(1)
    one = torch.zeros(_WIDTH, dtype=torch.bool)
    one[_VALUE : _VALUE + _WORDS] = True
    masked = torch.zeros(count, tokens, dtype=torch.bool)
    masked[:, room:] = one.repeat(_ASKED)
    return Asked(ids, masked, _WORDS)


def words(text: Tensor, tokens: int, count: int, seed: int = 0) -> Asked:
    """Pieces of a text; half of the tokens of the last block are asked for.

    Raises:
        ConfigError: for a text that is shorter than a piece.
    """
    chance = torch.Generator().manual_seed(seed * 100003 + tokens + 1)
    if len(text) < tokens:
        raise ConfigError(f"the text has {len(text):,} tokens, a sequence {tokens:,}: give a longer text, or --tokens")
    ids = _cut(text, tokens, count, chance)
    masked = torch.zeros(count, tokens, dtype=torch.bool)
    block = min(BLOCK, tokens)
    chosen = torch.rand(count, block, generator=chance).argsort(1)[:, : max(block // 2, 1)]
    masked.scatter_(1, tokens - block + chosen, True)
    return Asked(ids, masked)


def _cut(text: Tensor, tokens: int, count: int, chance: torch.Generator) -> Tensor:
    text = text.repeat(1 + tokens // len(text))
    start = torch.randint(0, len(text) - tokens + 1, (count,), generator=chance)
    return text[start[:, None] + torch.arange(tokens)].clone()


def _single(tokenizer: Any, given: Sequence[str]) -> Tensor:
    return torch.tensor([_encoded(tokenizer, " " + word)[0] for word in given])


def _encoded(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found
