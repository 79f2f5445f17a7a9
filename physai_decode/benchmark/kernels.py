"""
Where a step's device time goes, kernel by kernel, as CUPTI sees it through torch's profiler.

It sees kernels of any engine, also those inside a replayed CUDA graph. A CPU has no such table.
The profiler slows the host down: the times of the kernels are true, those between them are not.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import json
from pathlib import Path
import re
import statistics
import tempfile
from typing import Any

from physai_decode.config import SamplingConfig
from physai_decode.engine import Engine

WARMUP = 5


def profile(engine: Engine, prompt: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """
    Profile that many decode steps.

    :return: as ``summarize``; empty where the engine does not run on CUDA.
    """
    if not engine.footprint.device.startswith('cuda'):
        return []
    import torch
    from torch.profiler import ProfilerActivity
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        stream = engine.stream(prompt, SamplingConfig(max_new_tokens=WARMUP + steps + 1))
        profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
        tokens = 0
        for step in stream:
            tokens += len(step.token_ids)
            if tokens == WARMUP:
                profiler.start()
        torch.cuda.synchronize()
        profiler.stop()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    return summarize(events, steps)


def summarize(events: Iterable[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """
    Group a trace's kernels and copies by name and launch.

    A kernel may start while the one before still runs; it is charged only with what it adds: from
    that one's end, or its own start, to its own end. So the rows add up to the time in which
    anything ran. An engine that runs ahead of its reader puts a step more or less into the trace,
    so the calls per step are rounded and the time per step is the median call's times their
    number.

    :param events: ``traceEvents`` of a Chrome trace, times in microseconds.
    :return: one row a kernel, longest first: name, grid, calls and seconds per step, share.
    """
    ran = sorted((event for event in events if event.get('ph') == 'X' and event.get('cat') in (
        'kernel', 'gpu_memcpy', 'gpu_memset')), key=lambda event: event['ts'])
    groups: dict[tuple[str, ...], list[float]] = {}
    end_us = float('-inf')
    for event in ran:
        last_us, end_us = end_us, max(end_us, event['ts'] + event['dur'])
        # Two instances of one kernel differ in what they take of a multiprocessor.
        launch = (str(event.get('args', {}).get(name, '')) for name in (
            'grid', 'block', 'registers per thread', 'shared memory'))
        groups.setdefault((event['name'], *launch), []).append(
            1e-6 * (end_us - max(last_us, event['ts'])) if end_us > last_us else 0.0)
    rows = []
    for (name, grid, *_), times in groups.items():
        calls = len(times) / steps
        calls = round(calls) if calls >= 0.9 else round(calls, 2)
        call_s = statistics.median(times)
        rows.append({'name': name, 'grid': re.sub(r', ', 'x', grid.strip('[]')), 'calls': calls,
                     'call_s': call_s, 'step_s': call_s * calls})
    rows.sort(key=lambda row: -row['step_s'])
    whole = sum(row['step_s'] for row in rows)
    return [{**row, 'share': row['step_s'] / whole if whole else None} for row in rows]
