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
Names what limits a decode step most, by how much, and which setting to change.

The time of a step has four parts: the floor of its bytes, the draft model, the excess of its
kernels over the floor, and the gap of the host. Without a floor, the kernels' part includes the
bytes. Other candidates are a neighbour, which is another program that delays the slowest steps,
and pacing. The verdict is the largest part.
"""

from dataclasses import dataclass

TAIL_COUNT = 100            # tokens needed for a meaningful 99th percentile
TAIL = 1.5                  # a 99th percentile above this many medians points to a neighbour
WORSE = 0.8                 # an r_floor below this share of the best one points to a neighbour


@dataclass(frozen=True)
class Figures:
    """The figures of the steps; times are in milliseconds, None means unknown."""

    itl_ms: float | None                # median inter-token latency, without pacing
    device_ms: float | None = None      # time of a step between two events on the device
    floor_ms: float | None = None
    itl_p99_ms: float | None = None
    count: int = 0                      # number of tokens
    wait_ms: float | None = None        # delay by pacing; None: not paced
    cuda_graph: str = 'unavailable'     # captured, off; unavailable on a CPU
    throttle_reasons: str | None = None     # why the device throttles its clocks, or none
    best_r_floor: float | None = None   # the best r_floor so far
    engine: str = ''                    # native, transformers, ...; empty if unknown
    kernels: str = ''                   # of native: triton and its version, or torch
    slow_format: bool = False           # of the weights, as in `Footprint`
    draft_ms: float = 0.0               # the part of device_ms in which a draft model ran


@dataclass(frozen=True)
class Verdict:
    """What limits a step most."""

    cause: str                  # bytes, drafts, kernels, host, clocks, a neighbour, pacing
    part_ms: float              # its part
    whole_ms: float             # of this time
    advice: str                 # which setting to change

    def __str__(self) -> str:
        """Format the verdict as one line."""
        return (f'{self.cause}: {short(self.part_ms)} of {short(self.whole_ms)} ms '
                f'({100 * self.part_ms / self.whole_ms:.0f} %); {self.advice}')


def short(value: float) -> str:
    """Format a positive number with three digits, or all digits of an integer above 999."""
    return f'{value:.3g}' if value < 999.5 else f'{value:.0f}'


_ADVICE = {
    'bytes': 'read fewer bytes: four-bit weights, a smaller model, a shorter context',
    'drafts': 'use a smaller draft model, or set speculation.name: lookup',
    'clocks': 'improve power or cooling; on a Jetson, nvpmodel and jetson_clocks',
    'host, captured': 'set realtime.priority and engine.steps_ahead: 0, or try '
                      'engine.blocking_wait: true',
    'host, off': 'set engine.cuda_graph: true',
    'host, unavailable': 'set realtime.priority and realtime.cpu_affinity',
    'kernels, captured': 'use another engine, such as engine.name: native with Triton',
    'kernels, unavailable': 'try engine.name: native, another value of engine.cpu_threads, or a '
                            'GPU',
    'kernels, native on a CPU': 'try another value of engine.cpu_threads, a smaller model, or a '
                                'GPU',
    'kernels, native without Triton': 'install a Triton that supports this GPU; the log says why '
                                      'none is used',
    'kernels, native': 'use a smaller model; decode_bench --kernels times each kernel',
    'kernels, native, slow format': 'use weights in another format, such as GPTQ of four bits',
    'a neighbour, unavailable': 'set realtime.priority and realtime.cpu_affinity',
    'a neighbour': 'set engine.stream_priority if it is in this process, a share by MPS if it is '
                   'in another, realtime.priority or engine.blocking_wait: true if it is on the '
                   'CPU'}


def judge(figures: Figures) -> Verdict | None:
    """Return what limits these steps most, None if too little is known."""
    step_ms = figures.itl_ms
    if not step_ms or step_ms <= 0:
        return None
    if figures.wait_ms is not None and figures.wait_ms > step_ms:
        return Verdict('pacing', figures.wait_ms, figures.wait_ms + step_ms,
                       'pace.tokens_per_s sets it: without it, about '
                       f'{short(1e3 / step_ms)} tokens per s are possible')
    parts = _parts(figures, step_ms)
    if not parts:
        return None
    cause = max(parts, key=lambda each: parts[each][0])
    part_ms, whole_ms = parts[cause]
    case = _native_case(figures) if figures.engine == 'native' else figures.cuda_graph
    for name in (f'{cause}, {case}', f'{cause}, {figures.cuda_graph}', cause):
        if name in _ADVICE:
            return Verdict(cause, part_ms, whole_ms, _ADVICE[name])
    raise AssertionError(f'there is no advice for {cause}')     # each cause of _parts has one


def _native_case(figures: Figures) -> str:
    if figures.cuda_graph == 'unavailable':
        return 'native on a CPU'
    if not figures.kernels.startswith('triton'):
        return 'native without Triton'
    return 'native, slow format' if figures.slow_format else 'native'


def _parts(figures: Figures, step_ms: float) -> dict[str, tuple[float, float]]:
    """Return the part of each cause, with the time that it is a part of."""
    parts: dict[str, tuple[float, float]] = {}
    floor_ms, device_ms = figures.floor_ms, figures.device_ms
    draft_ms = min(figures.draft_ms, step_ms)
    throttled = figures.throttle_reasons not in (None, 'none', 'n/a')
    slowdown_ms = 0.0 if throttled else _slowdown_ms(figures, step_ms)
    if floor_ms is not None:
        parts['bytes'] = min(floor_ms, step_ms), step_ms
    if figures.cuda_graph == 'off':
        # The host launches each kernel, so its time is included between the two events.
        if floor_ms is not None:
            parts['host'] = max(step_ms - floor_ms - draft_ms, 0.0), step_ms
    elif device_ms is not None:
        parts['host'] = max(step_ms - device_ms, 0.0), step_ms
        excess_ms = min(device_ms, step_ms) - (floor_ms or 0.0) - draft_ms - slowdown_ms
        parts['clocks' if throttled else 'kernels'] = max(excess_ms, 0.0), step_ms
    if draft_ms and 'host' in parts:
        parts['drafts'] = draft_ms, step_ms
    tail_ms = (figures.itl_p99_ms or 0.0) - step_ms
    if figures.count >= TAIL_COUNT and tail_ms > (TAIL - 1) * step_ms and tail_ms > slowdown_ms:
        parts['a neighbour'] = tail_ms, tail_ms + step_ms
    elif slowdown_ms:
        parts['a neighbour'] = slowdown_ms, step_ms
    return parts


def _slowdown_ms(figures: Figures, step_ms: float) -> float:
    """Return how much longer a step takes than the best one; 0 within the usual spread."""
    if figures.floor_ms is None or not figures.best_r_floor:
        return 0.0
    best_ms = figures.floor_ms / figures.best_r_floor
    return step_ms - best_ms if best_ms < WORSE * step_ms else 0.0
