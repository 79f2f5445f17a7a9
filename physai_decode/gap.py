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
Measure the gap in the running node: time the decode step of one model in two ways.

On a GPU, the step runs with and without its CUDA graph. On a CPU, the native step is compared with
that of transformers. Times are those that a reader of ``DecodeLoop.stream`` observes. This module
depends on neither ROS nor torch.
"""

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import closing
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace
from itertools import pairwise
import shlex
import statistics
import time
from typing import cast
from typing import Protocol
from typing import runtime_checkable

from physai_decode import checkpoint
from physai_decode import engines
from physai_decode.config import DecodeConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.decode_loop import Step
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.roofline import Peak
from physai_decode.roofline import r_floor
from physai_decode.roofline import Roofline
from physai_decode.verdict import Figures
from physai_decode.verdict import judge

WARM_UP_STEPS = 5
STEPS = 30
TOKENS = 1 + WARM_UP_STEPS + STEPS      # prefill yields the first one
BASELINE_LIMIT_BYTES = 10**9            # limit on weights that a CPU loads a second time
_BASELINES = {'native': 'transformers', 'transformers': 'native'}


@runtime_checkable
class Measurable(Engine, Protocol):
    """An engine whose step can be timed in the running node."""

    def trial(self, captured: bool) -> AbstractContextManager[None]:
        """
        Prepare to time greedy steps after the cached tokens, inside ``with``.

        :param captured: whether steps replay a CUDA graph.
        :raises EngineError: the engine cannot run steps in this mode.
        """
        ...


@dataclass(frozen=True)
class Way:
    """One way to run the step, and its median time per token as observed on the host."""

    name: str                       # captured and uncaptured, or native and transformers
    step_s: float
    device_s: float | None = None   # between two events on the device


@dataclass(frozen=True)
class Gap:
    """Two ways to run the same step at the same context on the same device."""

    first: Way
    second: Way
    floor_s: float | None           # None if the peak bandwidth is unknown
    context: int                    # tokens that the median step reads
    model: str                      # its dtype, and the engine or the device
    engine: str = ''                # of the first way; see `Figures` for this and the next two
    kernels: str = ''
    slow_format: bool = False

    def __str__(self) -> str:
        """Format the result as one line."""
        ways = self.first, self.second
        times = ', '.join(f'{way.name} {1e3 * way.step_s:.3f} ms' for way in ways)
        ratio = self.second.step_s / self.first.step_s
        floor = 'n/a' if self.floor_s is None else f'{1e3 * self.floor_s:.3f} ms'
        fractions = [r_floor(self.floor_s, way.step_s) for way in ways]
        graph = {'captured': 'captured', 'uncaptured': 'off'}.get(self.first.name, 'unavailable')
        device_s, floor_s = self.first.device_s, self.floor_s
        verdict = judge(Figures(
            1e3 * self.first.step_s, None if device_s is None else 1e3 * device_s,
            None if floor_s is None else 1e3 * floor_s, cuda_graph=graph, engine=self.engine,
            kernels=self.kernels, slow_format=self.slow_format))
        r_floors = ' and '.join('n/a' if each is None else f'{each:.2f}' for each in fractions)
        return (f'{times} a token: {self.first.name} is {ratio:.2f} times as fast; floor {floor} '
                f'(r_floor {r_floors}); {self.model}, context {self.context} tokens, medians of '
                f'{STEPS} steps after {WARM_UP_STEPS}'
                + (f'; what holds {self.first.name} back: {verdict}' if verdict else ''))


@contextmanager
def baseline(engine: Engine, config: DecodeConfig,
             progress: Callable[[str], None] = lambda text: None) -> Iterator[Engine | None]:
    """
    Load the engine to compare with, and close it at the end of ``with``.

    The loaded engine is not used meanwhile, so it can continue to answer.

    :param config: the settings that ``engine`` was loaded with.
    :returns: on a CPU, the other engine. On a GPU, None: the step is compared with itself.
    :raises EngineError: no comparison is possible; the message says why and what to do.
    """
    shape = engine.footprint
    if not isinstance(engine, Measurable):
        raise EngineError(
            f'the engine {shape.engine} cannot be timed in the running node; without the node, '
            + _command(config, shape.engine, f'{shape.engine}:cuda_graph=false'))
    if shape.max_context <= TOKENS:
        raise EngineError(
            f'the context of {shape.max_context} tokens is too short: {TOKENS + 1} are needed; '
            "raise engine.max_context if the model's own limit is higher")
    if shape.cuda_graph != 'unavailable':
        yield None
        return
    if shape.checkpoint_weight_bytes > BASELINE_LIMIT_BYTES:
        raise EngineError(
            f'the model has {shape.checkpoint_weight_bytes / 1e9:.2f} GB of weights, too many to '
            'load twice; without the node, ' + _command(config, *_BASELINES))
    name = _BASELINES[shape.engine]
    try:
        loaded = engines.build(checkpoint.open(config.model.path, config.model.revision),
                               replace(config.engine, name=name), progress)
    except EngineError as error:
        raise EngineError(f'there is no {name} step to compare with: {error}') from None
    try:
        yield loaded
    finally:
        loaded.close()


def measure(loop: DecodeLoop, other: Engine | None, peak: Peak,
            heartbeat: Callable[[], None] = lambda: None) -> Gap:
    """
    Time the step in both ways, after the cached tokens.

    The steps append to the KV cache and leave the cached tokens unchanged. If the context has no
    room for the steps, the last cached tokens are dropped.

    :param loop: of the loaded engine, which is `Measurable`.
    :param other: the engine from `baseline`, or None.
    :param peak: peak memory bandwidth, for the floor.
    :param heartbeat: called after each step; its exceptions end the measurement.
    :raises EngineError: the engine cannot run its step in the other way.
    """
    engine = cast(Measurable, loop.engine)
    shape = engine.footprint
    loop.forget(shape.max_context - TOKENS - 1)
    before = loop.cached_ids
    # One id more than is cached, so that no cached token is computed again; any id will do.
    prompt = [*before, 0]
    try:
        if other is None:
            with engine.trial(captured=True):
                first = Way('captured', *_step_s(loop, prompt, heartbeat))
            with engine.trial(captured=False):
                second = Way('uncaptured', *_step_s(loop, prompt, heartbeat))
        else:
            both = {loop.engine.footprint.engine: loop,
                    other.footprint.engine: DecodeLoop(other)}
            first, second = (
                Way(name, *_step_s(both[name], prompt, heartbeat)) for name in _BASELINES)
    finally:
        loop.forget(len(before))
    context = len(prompt) + WARM_UP_STEPS + (STEPS + 1) // 2
    form = shape.dtype if shape.quantization == 'none' else f'{shape.dtype} {shape.quantization}'
    return Gap(first, second, Roofline(shape, peak).floor_s(context), context,
               f'{form} on {shape.device}' if other else f'{shape.engine}, {form}',
               'native' if other else shape.engine, shape.details.get('kernels', ''),
               shape.slow_format)


def _step_s(loop: DecodeLoop, prompt: list[int],
            heartbeat: Callable[[], None]) -> tuple[float, float | None]:
    """Return the median inter-token latency and the median device time, in seconds."""
    stamps, device_s = [], []
    with closing(cast('Generator[Step, None, None]', loop.stream(
            prompt, SamplingConfig(max_new_tokens=TOKENS), drafts=False))) as steps:
        for step in steps:
            if step.token_ids:
                stamps.append(time.perf_counter())
                device_s.append(step.device_s)
            heartbeat()
    times = [after - before for before, after in pairwise(stamps)]
    known = [each for each in device_s[1 + WARM_UP_STEPS:] if each is not None]
    return (statistics.median(times[WARM_UP_STEPS:]),
            statistics.median(known) if known else None)


def _command(config: DecodeConfig, *names: str) -> str:
    """Return the command that compares two engines in separate processes."""
    return (f'"decode_bench --model {shlex.quote(config.model.path)} --engines '
            f'{" ".join(names)}" compares them')
