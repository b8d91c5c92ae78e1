"""A memory plan as one HTML file: address space over time, live bytes, and tables.  Needs ``bokeh``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from bokeh.colors import RGB
from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.layouts import gridplot
from bokeh.models import ColumnDataSource, CustomJS, FixedTicker, HoverTool, NoOverlap, Range1d
from bokeh.models.annotations import Span
from bokeh.plotting import figure
from bokeh.resources import INLINE
from jinja2 import Environment

from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.plan import MemoryPlan, PlannedLoop
from mosaic_compiler.report.layers import layers
from mosaic_compiler.report.scene import (
    COLOURS,
    HATCHES,
    LINES,
    MARK,
    Rectangle,
    chunks,
    headline,
    levels,
    peak,
    rectangles,
    top,
    unit_of,
)
from mosaic_compiler.report.tables import alike

_TEXT = "rgb(26, 26, 26)"  # as the browser writes it: a light page is not painted twice


def html(plan: MemoryPlan) -> str:
    """The page: self-contained, light or dark as the reader's system is."""
    shapes = rectangles(plan)
    unit, scale = unit_of(plan.peak)
    end = max(len(plan.schedule), 1)
    shared = Range1d(start=0, end=end, bounds=(0, end))
    address = _figure(
        shared, f"address ({unit})", (0, max((s.offset + s.buffer.size for s in shapes), default=1) / scale)
    )
    strip = _figure(shared, "", (0, 1))
    live = _figure(shared, f"live ({unit})", (0, top(plan) / scale))
    live.xaxis.visible = True
    _label_layers(plan, address, live)

    bands = _bands(plan.loops)
    for plot in (address, strip, live):
        plot.vstrip("start", "end", source=bands, fill_color="#808080", fill_alpha="shade", line_color=None)
    strip.add_tools(_hover(("loop", "rows", "bytes", "why", "ops", "reads", "module", "source"), strip.renderers))
    labels = ColumnDataSource({"middle": [(loop.start + loop.end) / 2 for loop in plan.loops],
                               "text": [""] * len(plan.loops)})  # fmt: skip
    text = strip.text("middle", 0.5, source=labels, text_align="center", text_baseline="middle", text_color=_TEXT,
                      text_font_size="11px")  # fmt: skip

    for group in COLOURS:
        members = [shape for shape in shapes if shape.group == group]
        hatch: dict[str, Any] = (
            {"hatch_pattern": HATCHES[group], "hatch_scale": 6, "hatch_color": "black"} if group in HATCHES else {}
        )
        address.quad("start", "end", "top", "bottom", source=_columns(members, scale), name=group,
                     fill_color=COLOURS[group], line_width=0.5,
                     line_color=RGB.from_hex_string(COLOURS[group]).darken(0.15).to_css(), **hatch)  # fmt: skip
    drawn = [r for r in address.renderers if r.name in COLOURS]
    address.add_tools(_hover(("buffer", "space", "term", "tensor", "bytes", "life", "module", "source"), drawn))
    address.add_layout(Span(location=plan.height / scale, dimension="width", line_color="#808080", line_width=1.5))

    curve = ColumnDataSource({"position": np.arange(len(plan.timeline) + 1), "node": [*plan.schedule, ""],
                              "live": np.array([*plan.timeline, 0]) / scale,
                              "bytes": [*map(format_bytes, plan.timeline), ""]})  # fmt: skip
    live.varea_step("position", 0, "live", source=curve, step_mode="after", fill_color="#888888", fill_alpha=0.35)
    live.step("position", "live", source=curve, mode="after", line_color="#888888", line_width=1.5)
    felt = live.line("position", "live", source=curve, line_alpha=0)  # a step line has no hover
    live.add_tools(_hover(("position", "node", "bytes"), [felt], "vline"))
    highest = peak(plan)
    if highest is not None:
        live.scatter(
            [highest.position + 0.5], [highest.nbytes / scale], marker="inverted_triangle", size=10, fill_color=MARK,
            line_color=None,
        )  # fmt: skip
    marks = levels(plan)
    for name, value in marks.items():
        colour, dash = LINES[name]
        live.add_layout(
            Span(location=value / scale, dimension="width", line_color=colour, line_dash=dash, line_width=2)
        )

    plots = [address, strip, live]
    themed = {"axes": [address.yaxis[0], live.yaxis[0], live.xaxis[0]], "label": text.glyph}
    page = Document()
    grid = gridplot([[plot] for plot in plots], toolbar_location="right", sizing_mode="stretch_both")
    grid.update(rows=["1fr", "26px", "190px"])
    grid.toolbar.logo = None
    page.add_root(grid)
    fit = CustomJS(args={"bands": bands, "labels": labels, "strip": strip, "x": shared}, code=_FIT)
    shared.js_on_change("start", fit)
    shared.js_on_change("end", fit)
    strip.js_on_change("inner_width", fit)
    page.js_on_event("document_ready", CustomJS(args=themed, code=_THEME))

    return file_html(
        page,
        INLINE,
        "Memory plan",
        template=Environment(autoescape=True).from_string(_PAGE),
        template_variables={
            "plan": plan,
            "bytes": format_bytes,
            "headline": headline(plan)[0],
            "peak": highest,
            "mark": MARK,
            "groups": [(group, COLOURS[group]) for group in COLOURS if any(shape.group == group for shape in shapes)],
            "hatches": HATCHES,
            "marks": [(name, value, *LINES[name], value > top(plan)) for name, value in marks.items()],
            "largest": sorted(plan.own, key=lambda b: (-b.size, b.start, b.name))[:20],
            "loops": alike(plan.loops),
            "chunks": chunks,
            "fallbacks": plan.fallbacks,
        },
    )


def _figure(x: Range1d, label: str, y: tuple[float, float]) -> figure:
    plot = figure(
        x_range=x, y_range=Range1d(start=y[0], end=y[1]), y_axis_label=label, tools="pan,box_zoom,xwheel_zoom,reset",
        active_drag="box_zoom", lod_threshold=None, background_fill_color=None, border_fill_color=None,
        outline_line_color=None, sizing_mode="stretch_both",
        min_border_left=76, min_border_right=12, min_border_top=8, min_border_bottom=6,
    )  # fmt: skip
    plot.xaxis.visible = False
    plot.yaxis.visible = plot.ygrid.visible = bool(label)
    plot.xgrid.visible = False
    plot.ygrid.grid_line_color = "#808080"
    plot.ygrid.grid_line_alpha = 0.25
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.axis_label_text_color = plot.axis.major_label_text_color = _TEXT
    plot.axis.axis_line_color = plot.axis.major_tick_line_color = _TEXT
    plot.axis.minor_tick_line_color = None
    return plot


def _label_layers(plan: MemoryPlan, address: figure, live: figure) -> None:
    """Layers on the x axis, as many as there is room for; schedule positions if there are none."""
    spans = layers(plan)
    live.xaxis.axis_label = "layer" if spans else "schedule position"
    if not spans:
        return
    live.xaxis.ticker = FixedTicker(ticks=[int(span.middle) for span in spans])
    live.xaxis.major_label_overrides = {int(span.middle): span.label for span in spans}
    live.xaxis.major_label_policy = NoOverlap(min_distance=4)
    live.xaxis.major_tick_line_color = None
    for plot in (address, live):
        plot.xgrid.ticker = FixedTicker(ticks=[span.start for span in spans])
        plot.xgrid.visible = True
        plot.xgrid.grid_line_color = "#808080"
        plot.xgrid.grid_line_alpha = 0.25


def _hover(fields: Sequence[str], renderers: Sequence[Any], mode: Literal["mouse", "vline"] = "mouse") -> HoverTool:
    rows = "".join(f"<div><b>{field}</b> @{field}</div>" for field in fields)  # Bokeh escapes what it fills in
    box = f'<div style="max-width: 320px; overflow-wrap: anywhere">{rows}</div>'
    return HoverTool(
        tooltips=box, renderers=list(renderers), mode=mode, point_policy="follow_mouse", line_policy="prev"
    )


def _columns(shapes: Sequence[Rectangle], scale: int) -> ColumnDataSource:
    buffers = [shape.buffer for shape in shapes]
    bottom = np.array([shape.offset for shape in shapes])
    return ColumnDataSource({
        "start": np.array([b.start for b in buffers], dtype=np.int32),
        "end": np.array([b.end for b in buffers], dtype=np.int32),
        "bottom": bottom / scale,
        "top": (bottom + [b.size for b in buffers]) / scale,
        "buffer": [b.name for b in buffers],
        "space": [b.space for b in buffers],
        "term": [b.term for b in buffers],
        "tensor": [f"{b.dtype} {'x'.join(map(str, b.shape))}" for b in buffers],
        "bytes": [f"{format_bytes(b.nbytes)} ({b.nbytes:,})" for b in buffers],
        "life": [f"{b.start} to {b.end}" for b in buffers],
        "module": [b.module for b in buffers],
        "source": [b.source for b in buffers],
    })  # fmt: skip


def _bands(loops: Sequence[PlannedLoop]) -> ColumnDataSource:
    return ColumnDataSource({
        "start": [loop.start for loop in loops],
        "end": [loop.end for loop in loops],
        "shade": [0.22 if loop.chunk < loop.rows else 0.1 for loop in loops],
        "label": [f"{chunks(loop.rows, loop.chunk)} x {loop.chunk}" for loop in loops],
        "loop": [loop.name for loop in loops],
        "rows": [f"{loop.rows:,} in {chunks(loop.rows, loop.chunk)} of {loop.chunk:,}" for loop in loops],
        "bytes": [f"{format_bytes(loop.nbytes)}, {format_bytes(loop.unchunked)} unchunked" for loop in loops],
        "why": [loop.reason for loop in loops],
        "ops": [loop.computes for loop in loops],
        "reads": [", ".join(loop.operands) for loop in loops],
        "module": [loop.module for loop in loops],
        "source": [loop.source for loop in loops],
    })  # fmt: skip


_FIT = """// labels of bands that are wide enough for them
const width = strip.inner_width / (x.end - x.start), {start, end, label} = bands.data
labels.data.text = label.map((text, i) => (end[i] - start[i]) * width > 6 * text.length ? text : "")
labels.change.emit()
"""

_THEME = """
const dark = matchMedia("(prefers-color-scheme: dark)")
function paint() {
  const {color} = getComputedStyle(document.body)
  label.text_color = color
  for (const axis of axes)
    axis.setv({axis_label_text_color: color, major_label_text_color: color, axis_line_color: color,
               major_tick_line_color: color})
}
dark.addEventListener("change", paint)
paint()
requestAnimationFrame(() => setTimeout(() => document.body.dataset.ready = Math.round(performance.now())))
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Memory plan</title>
<style>
:root { color-scheme: light dark }
body { margin: 12px 16px; font: 14px/1.4 system-ui, sans-serif; color: rgb(26, 26, 26); background: #ffffff }
h1 { font-size: 18px; margin: 0 0 4px } h2 { font-size: 15px; margin: 20px 0 4px }
.row { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 2px 0; padding: 0; list-style: none }
.swatch { display: inline-block; width: 16px; margin-right: 5px; font: bold 11px/12px monospace; height: 12px;
  vertical-align: middle; color: black; text-align: center }
.mark { display: inline-block; width: 24px; margin-right: 5px; vertical-align: middle; border-top: 2px }
#plot { height: max(440px, 100vh - 150px) } #plot > div { height: 100% }
.wide { overflow-x: auto } table { border-collapse: collapse; width: max-content }
th, td { padding: 2px 14px 2px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #80808040 }
td { max-width: 300px; overflow-wrap: break-word } .number { text-align: right; white-space: nowrap }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #16181c } }
</style>
{{ bokeh_css | safe }}
</head>
<body>
<h1>{{ headline }}</h1>
<ul class="row">
<li>peak <b>{{ bytes(plan.peak) }}</b></li>
<li>arena <b>{{ bytes(plan.height) }}</b>, placed by {{ plan.algorithm }}</li>
<li>{{ plan.own | length }} buffers</li>
{% if plan.device %}<li>{{ plan.device | upper }} kernels</li>{% endif %}
</ul>
<ul class="row">
{% for group, colour in groups %}
<li><span class="swatch" style="background: {{ colour }}">{{ hatches.get(group, "") }}</span>{{ group }}</li>
{% endfor %}
</ul>
<ul class="row">
{% for name, value, colour, dash, above in marks %}
<li><span class="mark" style="border-top-color: {{ colour }}; border-top-style: {{ dash }}"></span>{{ name }}
{{ bytes(value) }}{{ ' (above the axis)' if above }}</li>
{% endfor %}
{% if peak %}<li><span style="color: {{ mark }}">&#9660;</span> {{ peak }}</li>{% endif %}
</ul>
<div id="plot">{{ plot_div | safe }}</div>
<h2>Largest buffers</h2>
<div class="wide"><table id="largest">
<tr><th>buffer<th>space<th>term<th>shape<th>dtype<th class="number">bytes<th class="number">life
<th>module<th>source</tr>
{% for b in largest %}
<tr><td>{{ b.name }}<td>{{ b.space }}<td>{{ b.term }}<td>{{ b.shape | join("x") }}<td>{{ b.dtype }}
<td class="number">{{ bytes(b.size) }}
<td class="number">{{ b.start }}-{{ b.end }}<td>{{ b.module }}<td>{{ b.source }}</tr>
{% endfor %}
</table></div>
<h2>Chunk loops</h2>
{% if loops %}
<div class="wide"><table id="loops">
<tr><th>loop<th>computes<th class="number">rows<th class="number">chunks<th class="number">bytes
<th class="number">unchunked<th>why<th>reads<th>module<th>source</tr>
{% for l, count in loops %}
<tr><td>{{ l.name }}{{ " and %d like it" % (count - 1) if count > 1 }}<td>{{ l.computes }}
<td class="number">{{ l.rows }}<td class="number">{{ chunks(l.rows, l.chunk) }} x {{ l.chunk }}
<td class="number">{{ bytes(l.nbytes) }}<td class="number">{{ bytes(l.unchunked) }}<td>{{ l.reason }}
<td>{{ l.operands | join(", ") }}<td>{{ l.module }}<td>{{ l.source }}</tr>
{% endfor %}
</table></div>
{% else %}<p>None.</p>{% endif %}
<h2>Fallbacks</h2>
{% if fallbacks %}
<div class="wide"><table id="fallbacks">
<tr><th>name<th>node<th>op<th>reason<th>source</tr>
{% for f in fallbacks %}
<tr><td>{{ f.name }}<td>{{ f.node }}<td>{{ f.op }}<td>{{ f.reason }}<td>{{ f.source }}</tr>
{% endfor %}
</table></div>
{% else %}<p>None.</p>{% endif %}
{{ bokeh_js | safe }}
{{ plot_script | safe }}
</body>
</html>
"""
