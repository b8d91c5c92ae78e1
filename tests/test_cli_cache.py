"""``mosaic cache`` and ``mosaic compile``."""

from __future__ import annotations

import json


def test_cache_and_compile(run, tmp_path):
    code, out, _ = run("cache")
    assert code == 0
    assert "nothing" in out
    code, out, err = run("compile", "--cache", "exact", "--temperature", "0")
    assert code == 0
    assert "new entries" in out
    assert "temperature 0, cache exact" in err
    code, out, _ = run("cache", "size")
    assert "1 steps" in out
    code, out, _ = run("cache", "list")
    assert "LlamaForCausalLM" in out
    entries = json.loads(run("cache", "list", "--json")[1])
    assert {entry["kind"] for entry in entries} >= {"step"}
    assert all(entry["path"].startswith(str(tmp_path)) for entry in entries)
    code, out, _ = run("compile", "--cache", "exact", "--temperature", "0")
    assert "0 new entries" in out
    code, out, _ = run("cache", "clear")
    assert f"{len(entries)} files deleted" in out
    assert not json.loads(run("cache", "list", "--json")[1])


def test_bad_input(run, monkeypatch):
    assert run("compile", "--cache", "everything")[0] == 2
    assert run("compile", "--temperature", "hot")[0] == 2
    assert run("compile", "nowhere")[0] == 2
    assert run("cache", "foo")[0] != 0


def test_without_a_folder(run, monkeypatch):
    monkeypatch.setenv("MOSAIC_CACHE", "off")
    code, _, err = run("cache")
    assert code == 2
    assert "MOSAIC_CACHE" in err
