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
What holds a decode step back, by how much, and which setting answers it: one line from figures.

A step's time is taken apart into what the bytes need, what the kernels take beyond that and what
the host adds; where there is no floor, the bytes are in the kernels' part. Beside these stand what
other programs add to the slowest steps, and the pace. The largest part is the verdict. Pure
functions; they know nothing of who measured.
"""

from dataclasses import dataclass

TAIL_COUNT = 100            # tokens from which the slowest of a hundred says something
TAIL = 1.5                  # times the median, above which it is another program's doing
WORSE = 0.8                 # of the best share of the floor so far, below which it is likewise


@dataclass(frozen=True)
class Figures:
    """What is known of the steps; times are in milliseconds, None where not known."""

    itl_ms: float | None                # median from token to token, less waits for the pace
    device_ms: float | None = None      # of it, between two events on the device
    floor_ms: float | None = None
    itl_p99_ms: float | None = None
    count: int = 0                      # tokens that these are of
    wait_ms: float | None = None        # for the pace; None: not paced
    cuda_graph: str = 'unavailable'     # captured, off; unavailable on a CPU
    throttle_reasons: str | None = None     # why the clocks are held down; none, or not known
    best_r_floor: float | None = None   # the best share of the floor so far


@dataclass(frozen=True)
class Verdict:
    """What holds a step back most."""

    cause: str                  # bytes, kernels, host, clocks, a neighbour, pacing
    part_ms: float              # what it adds
    whole_ms: float             # to so much
    answer: str                 # which setting answers it

    def __str__(self) -> str:
        """Give it in one line."""
        return (f'{self.cause}: {self.part_ms:.3g} of {self.whole_ms:.3g} ms '
                f'({100 * self.part_ms / self.whole_ms:.0f} %); {self.answer}')


_ANSWERS = {
    'bytes': 'fewer bytes answer it: four-bit weights, a smaller model, a shorter context',
    'clocks': 'power or cooling answers it, on a Jetson nvpmodel and jetson_clocks',
    'host, captured': 'realtime.priority, realtime.cpu_affinity and engine.steps_ahead answer it',
    'host, off': 'engine.cuda_graph: true answers it',
    'host, unavailable': 'realtime.priority and realtime.cpu_affinity answer it',
    'kernels, captured': 'another engine answers it, such as engine.name: native with Triton',
    'kernels, unavailable': 'engine.name: native answers it, engine.cpu_threads, or a GPU',
    'a neighbour, unavailable': 'realtime.priority and realtime.cpu_affinity answer it',
    'a neighbour': 'engine.stream_priority answers one in this process, a share by MPS one in '
                   'another, realtime.priority one on the CPU'}


def judge(seen: Figures) -> Verdict | None:
    """Say what holds these steps back most; None where too little is known."""
    step_ms = seen.itl_ms
    if not step_ms or step_ms <= 0:
        return None
    if seen.wait_ms is not None and seen.wait_ms > step_ms:
        return Verdict('pacing', seen.wait_ms, seen.wait_ms + step_ms,
                       'pace.tokens_per_s sets it: without, some '
                       f'{1e3 / step_ms:.3g} tokens per s would come')
    parts = _parts(seen, step_ms)
    if not parts:
        return None
    cause = max(parts, key=lambda each: parts[each][0])
    part_ms, whole_ms = parts[cause]
    for name in (f'{cause}, {seen.cuda_graph}', cause):
        if name in _ANSWERS:
            return Verdict(cause, part_ms, whole_ms, _ANSWERS[name])
    raise AssertionError(f'no answer to {cause}')       # of the causes of _parts each has one


def _parts(seen: Figures, step_ms: float) -> dict[str, tuple[float, float]]:
    """Give each cause's part of a time, and that time."""
    parts: dict[str, tuple[float, float]] = {}
    floor_ms, device_ms = seen.floor_ms, seen.device_ms
    throttled = seen.throttle_reasons not in (None, 'none', 'n/a')
    worse_ms = 0.0 if throttled else _worse_ms(seen, step_ms)
    if floor_ms is not None:
        parts['bytes'] = min(floor_ms, step_ms), step_ms
    if seen.cuda_graph == 'off':
        # The host launches each kernel, and what it takes for that lies between the two events.
        if floor_ms is not None:
            parts['host'] = max(step_ms - floor_ms, 0.0), step_ms
    elif device_ms is not None:
        parts['host'] = max(step_ms - device_ms, 0.0), step_ms
        beyond_ms = min(device_ms, step_ms) - (floor_ms or 0.0) - worse_ms
        parts['clocks' if throttled else 'kernels'] = max(beyond_ms, 0.0), step_ms
    tail_ms = (seen.itl_p99_ms or 0.0) - step_ms
    if seen.count >= TAIL_COUNT and tail_ms > (TAIL - 1) * step_ms and tail_ms > worse_ms:
        parts['a neighbour'] = tail_ms, tail_ms + step_ms
    elif worse_ms:
        parts['a neighbour'] = worse_ms, step_ms
    return parts


def _worse_ms(seen: Figures, step_ms: float) -> float:
    """Give how much longer the same bytes take than at best; 0 where that is the usual spread."""
    if seen.floor_ms is None or not seen.best_r_floor:
        return 0.0
    best_ms = seen.floor_ms / seen.best_r_floor
    return step_ms - best_ms if best_ms < WORSE * step_ms else 0.0
