"""A plan in formats that other tools open: Chrome's trace (Perfetto) and PyTorch's memory snapshot.

There is no clock in a plan: one schedule position counts as one microsecond.
"""

from __future__ import annotations

import json
from typing import Any

from mosaic_compiler.planning.buffers import Buffer
from mosaic_compiler.planning.plan import MemoryPlan

_BASE = 0x7F0000000000  # where the snapshot says that the arena begins


def chrome_trace(plan: MemoryPlan) -> str:
    """JSON for https://ui.perfetto.dev or ``chrome://tracing``: live bytes, loops, the life of each buffer.

    Buffers are asynchronous slices, so that those that live together lie above each other.
    """
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "memory plan"}},
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "schedule"}},
    ]
    events += [
        {"name": "live bytes", "ph": "C", "pid": 1, "ts": position, "args": {"bytes": live}}
        for position, live in enumerate(plan.timeline)
    ]
    events += [
        {"name": name, "ph": "X", "pid": 1, "tid": 1, "ts": position, "dur": 1, "cat": "op"}
        for position, name in enumerate(plan.schedule)
    ]
    events += [
        {
            "name": f"{loop.name}: {loop.rows} rows by {loop.chunk}", "ph": "X", "pid": 1, "tid": 2, "cat": "loop",
            "ts": loop.start, "dur": loop.end - loop.start, "args": {"reason": loop.reason, "bytes": loop.nbytes},
        }
        for loop in plan.loops
    ]  # fmt: skip
    for number, buffer in enumerate(plan.own):
        common = {"name": buffer.name, "cat": buffer.kind, "id": number, "pid": 1, "tid": 3}
        events.append({**common, "ph": "b", "ts": buffer.start, "args": _facts(buffer)})
        events.append({**common, "ph": "e", "ts": buffer.end})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})


def _facts(buffer: Buffer) -> dict[str, Any]:
    return {
        "bytes": buffer.nbytes, "space": buffer.space, "term": buffer.term,
        "offset": buffer.offset, "dtype": buffer.dtype, "shape": list(buffer.shape),
        "op": buffer.op, "module": buffer.module, "source": buffer.source,
    }  # fmt: skip


def memory_snapshot(plan: MemoryPlan) -> dict[str, Any]:
    """What ``torch.cuda.memory._dump_snapshot`` pickles, for https://pytorch.org/memory_viz and ``_memory_viz.py``.

    The arena is one segment; buffers without an address in it get one behind it.
    """
    births: list[list[dict[str, Any]]] = [[] for _ in range(len(plan.schedule) + 1)]
    deaths: list[list[dict[str, Any]]] = [[] for _ in range(len(plan.schedule) + 1)]
    behind = plan.height
    for buffer in plan.own:
        if buffer.offset is None:
            address, behind = _BASE + behind, behind + buffer.size
        else:
            address = _BASE + buffer.offset
        common = {"addr": address, "size": buffer.size, "stream": 0, "frames": [_frame(buffer)]}
        births[buffer.start].append({**common, "action": "alloc", "time_us": buffer.start})
        deaths[buffer.end] += [
            {**common, "action": action, "time_us": buffer.end} for action in ("free_requested", "free_completed")
        ]
    segment = {
        "address": _BASE, "total_size": behind, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0),
        "allocated_size": 0, "active_size": 0, "requested_size": 0, "device": 0, "is_expandable": False, "frames": [],
        "blocks": [{"address": _BASE, "size": behind, "requested_size": behind, "state": "inactive", "frames": []}],
    }  # fmt: skip
    reserve = {
        "action": "segment_alloc",
        "addr": _BASE,
        "size": behind,
        "stream": 0,
        "time_us": 0,
        "frames": [],
    }
    events = [event for dead, born in zip(deaths, births, strict=True) for event in (*dead, *born)]
    return {"segments": [segment], "device_traces": [[reserve, *events]], "allocator_settings": {}}


def _frame(buffer: Buffer) -> dict[str, Any]:
    """One frame that says what the buffer is, as the viewers show them."""
    file, _, line = buffer.source.partition(":")
    name = f"{buffer.name} {buffer.dtype}{list(buffer.shape)} {buffer.module}".strip()
    return {"filename": file, "line": int(line) if line.isdigit() else 0, "name": name}
