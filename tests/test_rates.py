"""Predicted times: rates that are measured where one is, and what they predict against what an H100 took."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from mosaic_compiler.ahead import rates
from mosaic_compiler.ahead.cached import answer_cached
from mosaic_compiler.ahead.configs import load_config
from mosaic_compiler.ahead.fit import traced
from mosaic_compiler.ahead.rates import by_data_sheet, measured, rates_here
from mosaic_compiler.planning.selection import Selection
from mosaic_compiler.report.known_cards import SPEEDS

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_CACHE", str(tmp_path))
    asked = []

    def measure(device, name, size):
        asked.append(size)
        return measured(torch.device("cpu"), name, size)

    monkeypatch.setattr(rates, "measured", measure)
    first, second = rates_here(256), rates_here(256)
    assert asked == [256]
    assert first == second
    numbers = {field.name: getattr(first, field.name) for field in dataclasses.fields(first) if field.name != "source"}
    assert all(math.isfinite(number) and number > 0 for number in numbers.values()), numbers
    assert first.source.startswith("measured on ")
    assert numbers["products"] > numbers["weights"] > 1e6


def test_it_is_said_where_rates_are_from():
    assert by_data_sheet("H100", *SPEEDS["H100"]).source == "measured on an H100"
    assert "data sheet" in by_data_sheet("RTX4090", *SPEEDS["RTX4090"]).source
    assert by_data_sheet("H100", *SPEEDS["H100"]).coded(4) != by_data_sheet("H100", *SPEEDS["H100"]).coded(8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaDA-8B", "Dream-7B"])
def test_predictions_are_within_15_per_cent_of_an_h100(name):
    """Of steps as they were measured, with all keys and with chosen ones (``reuse.json``)."""
    speed = by_data_sheet("H100", *SPEEDS["H100"])
    rows = [row for row in json.loads((RESULTS / "reuse.json").read_text())["rows"] if row["model"] == name]
    compared = 0
    for keep in (None, 0.05):
        model = traced(load_config(name), with_state=True, selection=None if keep is None else Selection())
        assert model.stateful is not None
        for row in rows:
            if row.get("cache_keep") != keep:
                continue
            tokens = row["tokens"]
            found = answer_cached(
                model.stateful, model.weights, tokens, 1 << 40, row_share=32 / tokens, keep=keep, rates=speed
            ).seconds
            for kind, key in (("reuse", "device_ms"), ("full", "full_keeping_ms")):
                if row.get(key) and not (
                    keep and kind == "full"
                ):  # those were taken before keys were chosen by kernels
                    predicted = found[kind]
                    assert predicted is not None
                    assert 1e3 * predicted == pytest.approx(row[key], rel=0.15), (tokens, kind)
                    compared += 1
    assert compared >= 4
