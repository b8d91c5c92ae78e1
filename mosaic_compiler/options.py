"""``MosaicOptions``: the one validated object behind ``torch.compile(..., options={...})``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mosaic_compiler.errors import OptionsError
from mosaic_compiler.planning.budget import parse_budget
from mosaic_compiler.planning.caches import POLICIES, Refresh, refresh_of
from mosaic_compiler.planning.placement import DEADLINE
from mosaic_compiler.planning.precisions import check_residual, precision_of
from mosaic_compiler.planning.selection import Selection, check_keep, selection_of
from mosaic_compiler.recipes import PASS_NAMES
from mosaic_compiler.settings import Settings, read_settings

ROW_CHOICES = ("all", "masked", "before_masked")
CACHES = ("none", "exact", "delayed")
PLACEMENTS = ("auto", "naive", "size", "live-total", "area", "lifetime")


_FOR_PASSES = ("disable", "vocabulary_tile", "needed_rows", "mask_token_id", "cache", "cache_refresh", "cache_dtype")


def nearest(name: str, valid: tuple[str, ...]) -> str:
    """`` (did you mean 'x'?)`` for the valid name closest to ``name``, with the full list behind."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
    return f" (did you mean {close[0]!r}? valid: {', '.join(valid)})" if close else ""


@dataclass(frozen=True)
class MosaicOptions:
    """Options of the ``mosaic`` backend.

    Attributes:
        dump: folder that receives numbered runnable graphs per pass and ``plan.json``.
        poison: fill dead buffers with NaN bytes and keep canaries between buffers (slow; for tests).
        strict: raise :class:`~mosaic_compiler.errors.FallbackError` where a fallback would be named.
        disable: names of passes to leave out.
        placement: ``auto`` (best of the portfolio) or one algorithm by name; ``naive`` never reuses.
        placement_deadline: seconds that the search for offsets may take where first-fit does not reach the lower bound.
        vocabulary_tile: compute heads whose logits are only reduced (argmax, confidence, entropy, top-k) in
            tiles of so many vocabulary columns, so that no logits tensor exists; ``None`` computes them whole.
        memory_budget: bytes (``8_000_000_000`` or ``"8GiB"``) for everything that a step allocates besides weights,
            inputs and outputs; loops are chunked as far as that needs.  ``None``: what is free when a new length
            is planned.
        needed_rows: which rows of a model's logits its caller reads, where the model itself is compiled and the
            caller's own loop picks rows: ``all``, ``masked`` (positions that hold ``mask_token_id``: LLaDA) or
            ``before_masked`` (rows in front of such positions: Dream).  The other rows are zeros that take no memory.
        mask_token_id: the id that ``needed_rows`` looks for.
        cache: what a compiled model keeps from call to call, where the caller's own loop commits tokens: ``none``;
            ``exact`` (with ``needed_rows``: what is proven to stay as it is; nothing, for models whose rows attend to
            all others); ``delayed``: a call computes rows of masked tokens, and of those that have changed since the
            last call.  The last one is an approximation, and needs ``needed_rows`` and ``mask_token_id``.
        cache_refresh: all rows are computed again every so many calls (or ``never``); also for another text.
        cache_dtype: the precision in which values are kept from step to step: ``bf16``, ``fp8``, ``int8``, ``int4``
            (``planning/precisions.py``), or a choice by layers (``2*exact+int4``: the first two as they are computed),
            an approximation; ``None``: as they are computed.
        cache_keep: how many keys of other rows than those that a session's steps compute are kept: a share (``0.05``),
            or a number (``2048``) for each head, chosen in each step for all rows; an approximation.  ``None``: all.
        cache_score, cache_sets: how keys are scored for that (``planning/selection.py``), and whether each head of
            keys has a set of its own (``head``), or each ``layer``.
        cache_residual: with ``cache_dtype``, so many rows at the end of the sequence are kept as they are computed,
            beside codes of all.
        cache_evict: ``False``: all keys are kept, and so many are read; they are chosen by ``Session.choose``.
        chunk_rows: force every loop to this many rows per chunk, whatever the budget (for experiments).
        program_cache: how many bound programs (one per length and set of weights) a graph keeps.
    """

    dump: str | None = None
    poison: bool = False
    strict: bool = False
    disable: tuple[str, ...] = ()
    placement: str = "auto"
    placement_deadline: float = DEADLINE
    vocabulary_tile: int | None = None
    memory_budget: int | str | None = None
    needed_rows: str = "all"
    mask_token_id: int | None = None
    cache: str = "none"
    cache_refresh: int | str = 8
    cache_dtype: str | None = None
    cache_keep: float | int | None = None
    cache_score: str = "probability"
    cache_sets: str | None = None
    cache_evict: bool = True
    cache_residual: int = 0
    chunk_rows: int | None = None
    program_cache: int = 64

    def __post_init__(self) -> None:
        _expect(self.dump is None or isinstance(self.dump, str), "dump", "a folder path", self.dump)
        _expect(isinstance(self.poison, bool), "poison", "True or False", self.poison)
        _expect(isinstance(self.strict, bool), "strict", "True or False", self.strict)
        _expect(isinstance(self.disable, tuple), "disable", "a list of pass names", self.disable)
        for name in self.disable:
            if name not in PASS_NAMES:
                raise OptionsError(f"disable: no pass is called {name!r}{nearest(str(name), PASS_NAMES)}")
        if self.placement not in PLACEMENTS:
            raise OptionsError(f"placement={self.placement!r}{nearest(str(self.placement), PLACEMENTS)}")
        seconds = self.placement_deadline
        valid_seconds = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < 3600
        _expect(valid_seconds, "placement_deadline", "a number of seconds from 0", seconds)
        tile = self.vocabulary_tile
        valid_tile = tile is None or (isinstance(tile, int) and not isinstance(tile, bool) and tile >= 1)
        _expect(valid_tile, "vocabulary_tile", "a whole number of columns from 1, or None", tile)
        self._check_needed_rows()
        self._check_cache()
        object.__setattr__(self, "memory_budget", parse_budget(self.memory_budget))
        chunk = self.chunk_rows
        valid_chunk = chunk is None or (isinstance(chunk, int) and not isinstance(chunk, bool) and chunk >= 1)
        _expect(valid_chunk, "chunk_rows", "a whole number of rows from 1, or None", chunk)
        count = self.program_cache
        valid_count = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        _expect(valid_count, "program_cache", "a whole number from 1", count)

    def _check_needed_rows(self) -> None:
        if self.needed_rows not in ROW_CHOICES:
            raise OptionsError(f"needed_rows={self.needed_rows!r}{nearest(str(self.needed_rows), ROW_CHOICES)}")
        token = self.mask_token_id
        valid = token is None or (isinstance(token, int) and not isinstance(token, bool) and token >= 0)
        _expect(valid, "mask_token_id", "a token id", token)
        if self.needed_rows != "all" and token is None:
            raise OptionsError(
                f"needed_rows={self.needed_rows!r} needs mask_token_id: the id of the mask token, for example "
                "model.config.mask_token_id or tokenizer.mask_token_id"
            )

    def _check_cache(self) -> None:
        if self.cache not in CACHES:
            more = "; prefix and dual need to know the blocks: they are for generate(cache=...)"
            raise OptionsError(f"cache={self.cache!r}{nearest(str(self.cache), CACHES)}{more}")
        try:
            refresh = refresh_of(self.cache_refresh)
        except ValueError:
            refresh = Refresh()
        _expect(not refresh.at_blocks, "cache_refresh", "a number of calls from 1, or 'never'", self.cache_refresh)
        try:
            precision_of(self.cache_dtype)
            check_keep(self.cache_keep)
            selection_of(self.cache_score, self.cache_sets, self.cache_evict)
        except (ValueError, TypeError) as error:
            raise OptionsError(str(error)) from None
        _expect(isinstance(self.cache_evict, bool), "cache_evict", "True or False", self.cache_evict)
        try:
            check_residual(self.cache_residual, self.cache_dtype, self.cache_keep)
        except ValueError as error:
            raise OptionsError(str(error)) from None
        if not self.cache_evict and self.cache_keep is None:
            raise OptionsError("cache_evict=False keeps all keys and reads chosen ones: say how many with cache_keep")
        if self.cache_keep is not None and self.cache != "none":
            raise OptionsError(
                f"cache_keep={self.cache_keep!r} needs to know the rows of the steps to come: it is for "
                "generate(cache='select') and Session.full(ids, rows=...), and not for cache="
                f"{self.cache!r}"
            )
        if POLICIES[self.cache].is_kept and self.needed_rows == "all":
            raise OptionsError(
                f"cache={self.cache!r} computes rows of masked tokens: say that no others are read, with "
                "needed_rows='masked' (or 'before_masked') and mask_token_id"
            )

    @property
    def budget(self) -> int | None:
        """``memory_budget`` in bytes."""
        return self.memory_budget if isinstance(self.memory_budget, int) else None

    @property
    def selection(self) -> Selection | None:
        """How keys are chosen; ``None``: all are kept."""
        if self.cache_keep is None:
            return None
        return selection_of(self.cache_score, self.cache_sets, self.cache_evict)

    @property
    def for_passes(self) -> tuple[Any, ...]:
        """Those that decide what is compiled; the others are for running it."""
        more = [] if self.selection is None else [str(self.selection)]
        more += ["residual"] if self.cache_residual else []
        return (*(getattr(self, name) for name in _FOR_PASSES), *more)

    @classmethod
    def parse(
        cls, given: Mapping[str, Any] | None, mode: str | None = None, settings: Settings | None = None
    ) -> MosaicOptions:
        """Build options from ``torch.compile``'s ``options`` dict and the environment switches.

        Raises :class:`OptionsError` naming the nearest valid option for an unknown key, and for a
        ``mode`` (the backend has none).
        """
        if mode not in (None, "default"):
            raise OptionsError(f"backend 'mosaic' has no modes (got mode={mode!r}): use options={{...}}")
        if given is not None and not isinstance(given, Mapping):
            raise OptionsError(f"options must be a dict, got {type(given).__name__}")
        valid = tuple(field.name for field in fields(cls))
        values = dict(given or {})
        for key in values:
            if key not in valid:
                raise OptionsError(f"unknown option {key!r}{nearest(str(key), valid)}")
        if isinstance(values.get("disable"), str):
            values["disable"] = tuple(filter(None, map(str.strip, values["disable"].split(","))))
        elif isinstance(values.get("disable"), list):
            values["disable"] = tuple(values["disable"])
        if isinstance(values.get("dump"), os.PathLike):
            values["dump"] = os.fspath(values["dump"])
        return cls(**values).under(read_settings() if settings is None else settings)

    def under(self, settings: Settings) -> MosaicOptions:
        """These options with the environment switches applied on top."""
        return replace(
            self,
            dump=settings.dump or self.dump,
            poison=self.poison if settings.poison is None else settings.poison,
            strict=self.strict if settings.strict is None else settings.strict,
            disable=tuple(dict.fromkeys(self.disable + settings.disable)),
        )


def _expect(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise OptionsError(f"option {name!r} must be {wanted}, got {got!r}")
