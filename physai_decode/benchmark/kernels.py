# Copyright 2026 physai_decode developers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

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
from typing import Protocol
from typing import runtime_checkable

from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engine import Engine

WARMUP = 5
Read = tuple[str, str, int]         # start of a kernel's name, operation, bytes


@runtime_checkable
class Itemized(Engine, Protocol):
    """An engine that tells which operation each kernel is, and what it reads."""

    def reads(self, context: int) -> list[Read]:
        """
        Give what one step reads, in the order of its kernels.

        :param context: tokens that the step attends to.
        :returns: all kernels that read weights or the cache, but those that read next to nothing.
        """
        ...


def prepare() -> None:
    """Load the profiler; a CUDA graph that was captured before that does not show its kernels."""
    import torch
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]):
        pass


def profile(engine: Engine, prompt: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """
    Profile that many decode steps.

    :param engine: one on CUDA, built after ``prepare``.
    :return: as ``summarize``.
    """
    import torch
    from torch.profiler import ProfilerActivity
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        stream = DecodeLoop(engine).stream(
            prompt, SamplingConfig(max_new_tokens=WARMUP + steps + 1))
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
    context = len(prompt) + WARMUP + steps // 2
    return summarize(events, steps, engine.reads(context) if isinstance(engine, Itemized) else ())


def summarize(events: Iterable[dict[str, Any]], steps: int,
              reads: Sequence[Read] = ()) -> list[dict[str, Any]]:
    """
    Group a trace's kernels and copies by operation, or by name and launch.

    A kernel may start while the one before still runs; it is charged only with what it adds: from
    that one's end, or its own start, to its own end. So the rows add up to the time in which
    anything ran. An engine that runs ahead of its reader puts a step more or less into the trace,
    so the calls per step are rounded and the time per step is the median call's times their
    number.

    :param events: ``traceEvents`` of a Chrome trace, times in microseconds.
    :param reads: (start of a kernel's name, operation, bytes), in the order of one step; used
        only if the trace has the kernels in this order.
    :return: one row a kernel, longest first: name, operation, grid, calls and seconds per step,
        bytes a call (None where unknown), share.
    """
    ran = sorted((event for event in events if event.get('ph') == 'X' and event.get('cat') in (
        'kernel', 'gpu_memcpy', 'gpu_memset')), key=lambda event: event['ts'])
    told = _told([event['name'] for event in ran], reads)
    groups: dict[tuple[str, ...], list[float]] = {}
    read_bytes: dict[tuple[str, ...], list[int]] = {}
    end_us = float('-inf')
    for event, read in zip(ran, told, strict=True):
        last_us, end_us = end_us, max(end_us, event['ts'] + event['dur'])
        # Two instances of one kernel differ in what they take of a multiprocessor.
        grid, *launch = (str(event.get('args', {}).get(name, '')) for name in (
            'grid', 'block', 'registers per thread', 'shared memory'))
        grid = grid.strip('[]').replace(', ', 'x')
        operation = read[1] if read else ''
        key = (event['name'], operation, grid, *launch)
        groups.setdefault(key, []).append(
            1e-6 * (end_us - max(last_us, event['ts'])) if end_us > last_us else 0.0)
        read_bytes.setdefault(key, []).extend([read[2]] if read else [])
    rows: list[dict[str, Any]] = []
    for key, times in groups.items():
        calls = len(times) / steps
        calls = round(calls) if calls >= 0.9 else round(calls, 2)
        call_s = statistics.median(times)
        rows.append({
            'name': key[0], 'operation': key[1], 'grid': key[2], 'calls': calls,
            'call_s': call_s, 'step_s': call_s * calls,
            'bytes': statistics.fmean(read_bytes[key]) if read_bytes[key] else None})
    rows.sort(key=lambda row: -row['step_s'])
    whole = sum(row['step_s'] for row in rows)
    return [{**row, 'share': row['step_s'] / whole if whole else None} for row in rows]


def _told(names, reads):
    """Give each kernel's entry of ``reads``, None for one that reads nothing to speak of."""
    starts = tuple({read[0] for read in reads})
    places = [place for place, name in enumerate(names) if starts and name.startswith(starts)]
    found: list[Read | None] = [None] * len(names)

    def fits(offset):
        return all(names[place].startswith(reads[(offset + i) % len(reads)][0])
                   for i, place in enumerate(places))

    # The trace may begin within a step; the head's product, which comes once, tells where.
    offset = next((offset for offset in range(len(reads)) if fits(offset)), None)
    if offset is not None:
        for i, place in enumerate(places):
            found[place] = reads[(offset + i) % len(reads)]
    return found
