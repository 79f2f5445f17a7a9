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
Measure the device time of each kernel in a decode step, with CUPTI through torch's profiler.

This covers the kernels of any engine, including those in a replayed CUDA graph, but not a CPU. The
profiler slows the host down: kernel times are accurate, the gaps between them are not.
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
Read = tuple[str, str, int]         # prefix of a kernel's name, operation, bytes


@runtime_checkable
class Itemized(Engine, Protocol):
    """An engine that reports the operation of each kernel and the bytes that it reads."""

    def reads(self, context: int) -> list[Read]:
        """
        List what one step reads, in the order of its kernels.

        :param context: tokens that the step attends to.
        :returns: the kernels that read weights or the KV cache, except for small reads.
        """
        ...


def prepare() -> None:
    """Load the profiler; it cannot see kernels of a CUDA graph that was captured earlier."""
    import torch
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]):
        pass


def profile(engine: Engine, prompt: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """
    Profile ``steps`` decode steps.

    :param engine: an engine on CUDA that was built after ``prepare``.
    :return: see ``summarize``.
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
    Group the kernels and copies of a trace by operation, name and launch configuration.

    A kernel can start while the previous one still runs. It then counts only from the end of the
    previous one, so that the rows add up to the time in which the device was busy. An engine that
    runs ahead of its reader adds or omits a step in the trace. The calls per step are therefore
    rounded, and the time per step is the median time of a call times the number of calls.

    :param events: ``traceEvents`` of a Chrome trace, with times in microseconds.
    :param reads: the reads of one step in order; ignored if the trace has another order.
    :return: one row per kernel, longest first: name, operation, grid, calls and seconds per step,
        bytes per call (None if unknown), share.
    """
    ran = sorted((event for event in events if event.get('ph') == 'X' and event.get('cat') in (
        'kernel', 'gpu_memcpy', 'gpu_memset')), key=lambda event: event['ts'])
    matched = _match([event['name'] for event in ran], reads)
    groups: dict[tuple[str, ...], list[float]] = {}
    read_bytes: dict[tuple[str, ...], list[int]] = {}
    end_us = float('-inf')
    for event, read in zip(ran, matched, strict=True):
        last_us, end_us = end_us, max(end_us, event['ts'] + event['dur'])
        # Specialisations of one kernel differ in their use of registers and shared memory.
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
    total = sum(row['step_s'] for row in rows)
    return [{**row, 'share': row['step_s'] / total if total else None} for row in rows]


def _match(names: Sequence[str], reads: Sequence[Read]) -> list[Read | None]:
    """Return the entry of ``reads`` for each kernel; None if it has none."""
    prefixes = tuple({read[0] for read in reads})
    places = [place for place, name in enumerate(names) if prefixes and name.startswith(prefixes)]
    found: list[Read | None] = [None] * len(names)

    def fits(offset: int) -> bool:
        return all(names[place].startswith(reads[(offset + i) % len(reads)][0])
                   for i, place in enumerate(places))

    # The trace can begin in mid-step. The lm_head, which runs once per step, fixes the offset.
    offset = next((offset for offset in range(len(reads)) if fits(offset)), None)
    if offset is not None:
        for i, place in enumerate(places):
            found[place] = reads[(offset + i) % len(reads)]
    return found
