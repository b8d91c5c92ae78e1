"""The page, the picture and the traces of a plan; the page in a real browser where there is one."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import pytest
from chrome import Chrome

from mosaic_compiler.planning import Buffer, MemoryPlan, PlannedLoop, make_plan
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.plan import Fallback
from mosaic_compiler.report.layers import layers

pytest.importorskip("bokeh", reason="needs pip install 'mosaic-compiler[report]'")
pytest.importorskip("matplotlib", reason="needs pip install 'mosaic-compiler[report]'")
from mosaic_compiler.report.page import html
from mosaic_compiler.report.picture import picture
from mosaic_compiler.report.scene import headline, peak, rectangles
from mosaic_compiler.report.traces import chrome_trace, memory_snapshot

browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: apt-get install chromium")
MiB = 1 << 20


def plan_of(layers: int, *, name: str = "n") -> MemoryPlan:
    """A transformer-like plan: 25 buffers per layer, two loops, one of them chunked."""
    buffers, loops, at = [], [], 0
    for layer in range(layers):
        module = f"model.layers.{layer}"
        for i in range(20):
            part = ("self_attn", "mlp", "input_layernorm")[i % 3]
            size = (1 + i % 5) * MiB
            buffers.append(
                Buffer(f"{name}{layer}_{i}", "arena", size, at + i, at + i + 3, "bfloat16", (size // 2,),
                       "aten.mm.default", f"{module}.{part}", "modeling.py:7")
            )  # fmt: skip
        buffers.append(Buffer(f"x{layer}", "arena", 4 * MiB, at, at + 24, module=module))
        buffers.append(Buffer(f"sdpa{layer}", "heap", MiB, at + 8, at + 10, module=f"{module}.self_attn"))
        buffers.append(Buffer(f"mm{layer}.scratch", "heap", MiB // 2, at + 9, at + 10, term="op"))
        buffers += [
            Buffer(f"{kind}{layer}", "arena", 2 * MiB, at, at + 12, module=f"{module}.self_attn") for kind in "kv"
        ]
        loops.append(PlannedLoop(f"a{layer}", at, at + 10, 4096, 4096, MiB, MiB, "fits"))
        loops.append(PlannedLoop(f"b{layer}", at + 10, at + 24, 4096, 1024, MiB, 4 * MiB, "the budget", ("mm",)))
        at += 25
    buffers.append(Buffer("out", "heap", MiB, at - 1, at, module="sampling", term="call"))
    plan = make_plan(buffers, [f"node{i}" for i in range(at)], symbols=[("N", 4096)], loops=loops)
    reason = "no out= form </script><script>document.title = 'hacked'</script>"
    return replace(
        plan, budget=plan.workspace + 3 * MiB, fallbacks=(Fallback("opaque-op", "topk", "aten.topk", reason, ""),)
    )


COUNT = """(() => {
  const count = {}
  for (const model of Bokeh.documents[0].all_models)
    if (model.type == "GlyphRenderer") {
      const kind = model.glyph.type
      count[kind] = (count[kind] ?? 0) + model.data_source.get_length()
      if (kind == "Text") count.labels = model.data_source.data.text.filter(text => text).length
    }
  return count
})()"""


@browser
@pytest.mark.parametrize(("size", "dark"), [((1400, 900), False), ((800, 600), True)])
def test_the_page_in_a_browser(tmp_path, size, dark):
    plan, page = plan_of(4), tmp_path / "plan.html"
    page.write_text(html(plan))
    assert "http" not in page.read_text().split("</style>")[0]
    with Chrome(size, dark=dark) as chrome:
        chrome.open(page)
        shown = chrome.js(COUNT)
        assert shown["Quad"] == len(plan.buffers)
        assert shown["Step"] == len(plan.timeline) + 1
        assert shown["labels"] >= len(plan.loops) // 2, "loops say how they are chunked"
        text = chrome.js("document.body.innerText")
        for expected in (
            "attention",
            "transient",
            "lower bound of the arena",
            "budget",
            "Largest buffers",
            "opaque-op",
        ):
            assert expected in text
        assert chrome.js("document.title") == "Memory plan"
        assert chrome.js("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        boxes = "[...document.querySelectorAll('h1, h2, ul, #plot, table')].map(e => e.getBoundingClientRect())"
        overlaps = f"{boxes}.some((a, i, all) => i && a.top < all[i - 1].bottom - 1)"
        assert not chrome.js(overlaps)
        picture = tmp_path / "page.png"
        chrome.screenshot(picture)
        assert picture.stat().st_size > 10_000
        background = chrome.js("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") != dark
        assert chrome.problems == []


@browser
def test_a_page_of_5000_buffers_is_small_and_quick(tmp_path):
    plan, page = plan_of(200), tmp_path / "plan.html"
    assert len(plan.buffers) >= 5000
    page.write_text(html(plan))
    assert page.stat().st_size <= 6 * MiB
    with Chrome() as chrome:
        took = min(chrome.open(page) for _ in range(3))
        assert chrome.js(COUNT)["Quad"] == len(plan.buffers)
    assert took <= 4000, "2,000 on a machine with nothing else to do"


def test_names_cannot_break_the_page():
    text = html(plan_of(1, name="</script><img src=x onerror=alert(1)>"))
    assert "<img" not in text
    assert "</script><script>document.title" not in text


def test_every_buffer_is_a_rectangle_and_none_overlap():
    shapes = rectangles(plan_of(3))
    assert len(shapes) == len(plan_of(3).buffers)
    for i, a in enumerate(shapes):
        for b in shapes[i + 1 :]:
            apart = a.buffer.end <= b.buffer.start or b.buffer.end <= a.buffer.start
            assert apart or a.offset + a.buffer.size <= b.offset or b.offset + b.buffer.size <= a.offset


def test_the_title_says_model_sizes_budget_and_kernels():
    plan = replace(plan_of(2), title="LLaDA-8B, bfloat16", device="cuda", meanings=(("N", "tokens"),))
    title, figures = headline(plan)
    assert title == "LLaDA-8B, bfloat16: one step of 4,096 tokens"
    assert f"budget {format_bytes(plan.budget)}" in figures
    assert "CUDA kernels" in figures
    assert headline(plan_of(2))[0] == "Memory plan: one step of N=4096", "a symbol without a meaning keeps its name"


def test_the_peak_names_the_largest_buffer_there():
    buffers = [
        Buffer("x", "arena", 2 * MiB, 0, 3, module="h.0"),
        Buffer("mm_7", "arena", 3 * MiB, 1, 2, "bfloat16", (1024, 1536), "aten.mm.default", "lm_head"),
    ]
    found = peak(make_plan(buffers, ["a", "b", "c"]))
    assert (found.position, found.nbytes, found.largest.name) == (1, 5 * MiB, "mm_7")
    assert str(found) == "most live at once: 5.0 MiB; largest there: mm of lm_head (1,024 x 1,536 bfloat16, 3.0 MiB)"
    assert peak(MemoryPlan((), ())) is None


def test_layers_begin_with_their_first_buffer():
    modules = ["embed", "h.0.attn", "h.0.mlp.experts.0", "h.0.mlp.experts.1", "h.0.mlp.experts.2", "h.1.attn",
               "h.0.mlp", "h.1.mlp", "norm", "head"]  # fmt: skip
    buffers = [Buffer(f"b{i}", "arena", 512, i, i + 1, module=module) for i, module in enumerate(modules)]
    spans = layers(make_plan(buffers, [b.name for b in buffers]))
    assert [(s.label, s.start, s.end) for s in spans] == [("in", 0, 1), ("0", 1, 5), ("1", 5, 8), ("head", 8, 10)]
    assert layers(plan_of(1)) == (), "one number says nothing about the order"
    assert len(layers(plan_of(30))) == 31


def test_rotary_tables_belong_to_attention():
    buffers = [Buffer("cos", "arena", 512, 0, 1, module="model.rotary_emb"),
               Buffer("x", "arena", 512, 0, 1, module="model.embed_tokens")]  # fmt: skip
    groups = {shape.buffer.name: shape.group for shape in rectangles(make_plan(buffers, ["a"]))}
    assert groups == {"cos": "attention", "x": "embedding"}


@pytest.mark.parametrize("wide", [False, True])
def test_nothing_in_a_picture_overlaps_or_is_cut_off(tmp_path, monkeypatch, wide):
    from matplotlib.figure import Figure

    plan, drawn = plan_of(40), []
    if wide:
        sizes = tuple((f"symbol{i}", 1 << 17) for i in range(6))
        plan = replace(plan, title="LLaDA-MoE-7B-A1B, float32", symbols=sizes)
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda page, *a, **kw: (drawn.append(page), save(page, *a, **kw)))
    picture(plan, tmp_path / "plan.png")
    (page,) = drawn
    page.draw_without_rendering()  # at its own dpi again
    axes = page.axes[1]
    texts = [*page.texts, *page.legends, axes.xaxis.label]
    labels = [label for label in axes.get_xticklabels(minor=True) if label.get_text()]
    assert len(labels) <= 18
    boxes = [item.get_window_extent() for item in (*texts, *labels)]
    boxes += [a.get_window_extent() for a in page.axes]
    assert all(box.x0 >= 0 and box.x1 <= page.bbox.x1 and box.y0 >= 0 and box.y1 <= page.bbox.y1 for box in boxes)
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.padded(-1).overlaps(b.padded(-1))]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures(tmp_path, suffix):
    path = tmp_path / f"plan.{suffix}"
    picture(plan_of(3), path)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_an_empty_plan_can_be_shown(tmp_path):
    empty = MemoryPlan((), ())
    assert "Memory plan" in html(empty)
    picture(empty, tmp_path / "plan.png")
    assert json.loads(chrome_trace(empty))["traceEvents"]
    assert memory_snapshot(empty)["segments"]


def test_chrome_trace_has_live_bytes_loops_and_lives():
    plan = plan_of(2)
    events = json.loads(chrome_trace(plan))["traceEvents"]
    assert [e["args"]["bytes"] for e in events if e["ph"] == "C"] == list(plan.timeline)
    begins, ends = ({e["id"]: e["ts"] for e in events if e["ph"] == phase} for phase in "be")
    assert [(begins[i], ends[i]) for i in range(len(plan.buffers))] == [(b.start, b.end) for b in plan.buffers]
    assert sum(e.get("cat") == "loop" for e in events) == len(plan.loops)


def test_pytorchs_viewer_reads_the_snapshot():
    from torch.cuda import _memory_viz

    plan = plan_of(2)
    snapshot = pickle.loads(pickle.dumps(memory_snapshot(plan)))
    assert "alloc" in _memory_viz.trace(snapshot)
    assert _memory_viz.segsum(snapshot)
    assert "<script" in _memory_viz.trace_plot(snapshot)
    live, most = 0, 0
    for event in snapshot["device_traces"][0]:
        live += {"alloc": event["size"], "free_completed": -event["size"]}.get(event["action"], 0)
        most = max(most, live)
    assert most == max(plan.timeline)
    assert live == 0
