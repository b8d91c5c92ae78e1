"""What is kept on disk: data that comes back as it was, and a folder that survives whatever happens to it."""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from mosaic_compiler.compat.sympy_functions import FUNCTIONS
from mosaic_compiler.disk.codec import CodecError, pack, unpack
from mosaic_compiler.disk.folder import Folder, the_folder
from mosaic_compiler.errors import OptionsError
from mosaic_compiler.planning.lowered import Kind, LoweredOp, Named, Ref, TensorFacts
from mosaic_compiler.planning.reach import Reach

SYMBOLS = (
    sympy.Symbol("s0", integer=True, positive=True),
    sympy.Symbol("u1", integer=True, nonnegative=True),
    sympy.Symbol("query", integer=True),
)


def expressions() -> st.SearchStrategy:
    def combined(inner: st.SearchStrategy) -> st.SearchStrategy:
        return st.one_of(
            st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
            st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
            st.tuples(inner, st.integers(1, 9)).map(lambda pair: FUNCTIONS["torch.FloorDiv"](pair[0], pair[1])),
            st.tuples(inner, inner).map(lambda pair: sympy.Max(*pair)),
        )

    leaf = st.one_of(st.sampled_from(SYMBOLS), st.integers(-99, 99).map(sympy.Integer))
    numbers = st.recursive(leaf, combined, max_leaves=6)
    return numbers | st.tuples(numbers, numbers).map(lambda pair: sympy.Le(*pair))


def data() -> st.SearchStrategy:
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=9), expressions(),
        st.sampled_from(Kind), st.builds(Ref, st.text(max_size=3)), st.builds(Named, st.just("torch.float32")),
        st.builds(Reach, st.just(()), st.just((1,)), st.just(())),
    )  # fmt: skip
    hashable = st.one_of(st.integers(), st.text(max_size=3), st.sampled_from(SYMBOLS))
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(hashable, inner, max_size=4),
            st.frozensets(hashable, max_size=4),
            st.tuples(st.integers(), st.none(), st.just(2)).map(lambda ends: slice(*ends)),
        ),
        max_leaves=12,
    )


def told(value: object) -> str:
    """A value as text that tells 1, 1.0 and True apart, and NaN from nothing."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{told(k)}: {told(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(told, value))})"
    if isinstance(value, frozenset):
        return f"frozenset({sorted(map(told, value))})"
    if isinstance(value, sympy.Basic):
        symbols = sorted(value.free_symbols, key=str)
        given = [(str(symbol), sorted(symbol.assumptions0.items())) for symbol in symbols]
        return f"{sympy.srepr(value.xreplace({s: sympy.Symbol(str(s)) for s in symbols}))} {given}"
    return f"{type(value).__name__} {value!r}"


@given(data())
def test_data_comes_back_as_it_was(value):
    written = pack(value)
    assert told(unpack(written)) == told(value)
    assert pack(unpack(written)) == written


def test_every_function_of_our_own_can_stand_in_an_expression():
    importlib.import_module("mosaic_compiler.planning.flash")
    own = [kind for kind in sympy.Function.__subclasses__() if kind.__module__.startswith("mosaic_compiler.")]
    assert {"SplitBytes", "FewBytes"} <= {kind.__name__ for kind in own}
    for kind in own:
        expression = 2 * kind(*sympy.symbols("s0:6", integer=True, positive=True)) + 1
        assert unpack(pack(expression)) == expression


def test_what_is_one_object_stays_one():
    body = LoweredOp(
        "a", Kind.VIEW, "aten.view.default", (Ref("x"),), {}, outputs=(TensorFacts("torch.int8", "cpu", (), ()),)
    )
    other = LoweredOp("a", Kind.VIEW, "aten.view.default", (Ref("x"),), {})
    first, second, third = unpack(pack((body, body, other)))
    assert first is second
    assert first is not third


@pytest.mark.parametrize(
    "value", [object(), lambda: 0, open, range(3), sympy.Symbol("a", prime=True), sympy.sin(SYMBOLS[0])]
)
def test_nothing_else_is_written(value):
    with pytest.raises(CodecError):
        pack([value])


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_noise_is_refused(noise):
    with pytest.raises(CodecError):
        unpack(noise)


@pytest.mark.parametrize(
    "text",
    [
        b'[["os:system"],[["c",0,"ls"]],[0]]',
        b'[["builtins:eval"],[["c",0,"1"]],[0]]',
        b'[["mosaic_compiler.planning.lowered:Any"],[],1]',
        b'[[],[["x","__import__","os"]],[0]]',
        b'[["mosaic_compiler.planning.lowered:Ref"],[["c",0,"a","b"]],[0]]',
        b'[["mosaic_compiler.planning.lowered:Ref"],[["c",0,[1]]],[0]]',
    ],
)
def test_files_that_name_code_or_fit_nothing_are_refused(text):
    with pytest.raises(CodecError):
        unpack(text)


@given(data(), st.data())
def test_changed_bytes_are_noticed(tmp_path_factory, value, drawn):
    folder = Folder(tmp_path_factory.mktemp("entries"))
    folder.write("step", "ab12", pack(value), "a model")
    (entry,) = folder.entries()
    raw = bytearray(entry.path.read_bytes())
    at = drawn.draw(st.integers(0, len(raw) - 1), "at")
    changed = drawn.draw(st.integers(0, 255).filter(lambda byte: byte != raw[at]), "to")
    raw[at] = changed
    entry.path.write_bytes(bytes(raw))
    found = folder.read("step", "ab12")
    assert found is None or found == pack(value), "a label may change, and nothing else"
    if found is None:
        assert not folder.entries(), "it is thrown away"


@given(st.integers(0, 200))
def test_an_entry_that_was_cut_off_is_thrown_away(tmp_path_factory, kept):
    folder = Folder(tmp_path_factory.mktemp("entries"))
    folder.write("step", "ab12", os.urandom(300))
    path = folder.entries()[0].path
    path.write_bytes(path.read_bytes()[:kept])
    assert folder.read("step", "ab12") is None
    assert not path.exists()


def test_an_entry_under_another_name_is_not_believed(tmp_path):
    folder = Folder(tmp_path)
    folder.write("step", "ab12", b"one")
    folder.entries()[0].path.rename(tmp_path / "step" / "ab" / "ab99")
    assert folder.read("step", "ab99") is None


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    folder = Folder(tmp_path, most=10_000)
    for number in range(8):
        folder.write("step", f"ab{number}", os.urandom(1000))
        os.utime(tmp_path / "step" / "ab" / f"ab{number}", (number, number))
    assert folder.read("step", "ab0") is not None, "used now"
    folder.write("step", "ab8", os.urandom(4000))
    assert folder.nbytes <= 9_000
    kept = {entry.path.name for entry in folder.entries()}
    assert {"ab0", "ab8", "ab7"} <= kept
    assert not {"ab1", "ab2"} & kept


def test_files_that_nobody_finished_are_deleted_after_a_while(tmp_path):
    folder = Folder(tmp_path)
    folder.write("step", "ab1", b"1")
    begun = tmp_path / "step" / "ab" / ".ab2.17.aaaa"
    begun.write_bytes(b"half")
    folder.write("step", "ab3", b"3")
    assert begun.exists(), "somebody may be writing it"
    os.utime(begun, (time.time() - 7200,) * 2)
    folder.write("step", "ab4", b"4")
    assert not begun.exists()


def test_a_folder_that_cannot_be_written_to_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    folder = Folder(tmp_path / "file")
    for _ in range(2):
        folder.write("step", "ab1", b"1")
    assert folder.read("step", "ab1") is None
    assert [record.message for record in caplog.records if "MOSAIC_CACHE" in record.message].__len__() == 1


def test_switches(monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_CACHE", "off")
    assert the_folder() is None
    monkeypatch.setenv("MOSAIC_CACHE", str(tmp_path))
    monkeypatch.setenv("MOSAIC_CACHE_SIZE", "2GiB")
    assert the_folder().most == 2 << 30
    monkeypatch.setenv("MOSAIC_CACHE_SIZE", "much")
    with pytest.raises(OptionsError, match="MOSAIC_CACHE_SIZE"):
        the_folder()


WRITER = """
import random, sys
from pathlib import Path
from mosaic_compiler.disk.folder import Folder
folder, seed = Folder(Path(sys.argv[1]), most=200_000), int(sys.argv[2])
draw = random.Random(seed)
print("ready", flush=True)
while True:
    key = f"ab{draw.randrange(40)}"
    data = folder.read("step", key)
    if data is not None:
        assert data == key.encode() * (len(data) // len(key)), "another entry's bytes"
        if draw.random() < 0.7:
            continue
    folder.write("step", key, key.encode() * draw.randrange(1, 3000))
"""


def killed_at_random(folder, processes, seconds):
    """So many processes read and write one folder, each killed at a random moment; their exit codes."""
    draw = random.Random(7)
    codes = []
    for start in range(0, processes, 10):
        running = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(seed)], stdout=subprocess.PIPE)
            for seed in range(start, min(start + 10, processes))
        ]
        for process in running:
            assert process.stdout.readline() == b"ready\n"
        draw.shuffle(running)
        for process in running:
            time.sleep(draw.random() * seconds)
            process.send_signal(signal.SIGKILL)
        codes += [process.wait() for process in running]
    return codes


@pytest.mark.parametrize("processes", [pytest.param(100, marks=pytest.mark.slow), 10])
def test_processes_that_are_killed_leave_a_folder_that_can_be_read(tmp_path, processes):
    codes = killed_at_random(tmp_path, processes, seconds=0.2)
    assert codes == [-signal.SIGKILL] * processes, "none had read what another key's entry holds"
    folder = Folder(tmp_path, most=200_000)
    entries = folder.entries()
    assert entries
    for entry in entries:
        data = folder.read("step", entry.path.name)
        assert data is not None, "no entry is damaged"
        assert data == entry.path.name.encode() * (len(data) // len(entry.path.name))
    folder.prune()
    assert folder.nbytes <= 200_000 + 20_000
