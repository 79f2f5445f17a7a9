"""
Where a step's device time goes, kernel by kernel, as CUPTI sees it through torch's profiler.

It sees kernels of any engine, also those inside a replayed CUDA graph. A CPU has no such table.
The profiler slows the host down: the times of the kernels are true, those between them are not.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import json
from pathlib import Path
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
    Group a trace's kernels and copies by name and grid.

    An engine that runs ahead of its reader puts a step more or less into the trace, so the calls
    per step are rounded and the time per step is the median call's times their number.

    :param events: ``traceEvents`` of a Chrome trace, times in microseconds.
    :return: one row a kernel, longest first: name, grid, calls and seconds per step, share.
    """
    groups: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get('cat') in ('kernel', 'gpu_memcpy', 'gpu_memset') and 'dur' in event:
            grid = 'x'.join(str(n) for n in event.get('args', {}).get('grid', ()))
            groups.setdefault((event['name'], grid), []).append(event['dur'] * 1e-6)
    rows = []
    for (name, grid), times in groups.items():
        calls = len(times) / steps
        calls = round(calls) if calls >= 0.9 else round(calls, 2)
        rows.append({'name': name, 'grid': grid, 'calls': calls,
                     'call_s': statistics.median(times),
                     'step_s': statistics.median(times) * calls})
    rows.sort(key=lambda row: -row['step_s'])
    whole = sum(row['step_s'] for row in rows)
    return [{**row, 'share': row['step_s'] / whole} for row in rows]
