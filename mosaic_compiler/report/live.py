"""A draft as it settles, in the terminal."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

HIDDEN = "░"


class LiveText:
    """A streamer (see ``sampling/generation.py``) that shows the new tokens, masked ones as a grey block.

    Args:
        tokenizer: of transformers.
        mask: the mask token.
        prompt: how many tokens are not shown.
    """

    def __init__(self, tokenizer: Any, mask: int, prompt: int, console: Console | None = None) -> None:
        self.tokenizer, self.mask, self.prompt = tokenizer, mask, prompt
        self._live = Live(console=console or Console(), refresh_per_second=12, vertical_overflow="ellipsis")

    def put(self, value: torch.Tensor) -> None:
        if not self._live.is_started:
            self._live.start()
        self._live.update(self.render(value[0, self.prompt :]))

    def end(self) -> None:
        self._live.stop()

    def render(self, ids: torch.Tensor) -> Text:
        """Runs of settled tokens as text; a block for each masked one."""
        text, run = Text(), list[int]()
        for token in [*ids.tolist(), None]:
            if token is None or token == self.mask:
                text.append(self.tokenizer.decode(run, skip_special_tokens=True))
                run = []
            if token == self.mask:
                text.append(HIDDEN, style="dim")
            elif token is not None:
                run.append(token)
        return text
