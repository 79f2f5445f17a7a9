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
The gap, measured in the running node: one model's decode step, timed in two ways of running it.

On a GPU the step with and without its CUDA graph; on a CPU the native step beside that of the
transformers library. It sees steps as a reader of ``DecodeLoop.stream`` does, and knows nothing of
ROS, of torch, or of who else wants the engine.
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
TOKENS = 1 + WARM_UP_STEPS + STEPS      # the first one comes from the prompt
RIVAL_LIMIT_BYTES = 10**9               # of weights that are loaded a second time on a CPU
_RIVALS = {'native': 'transformers', 'transformers': 'native'}


@runtime_checkable
class Measurable(Engine, Protocol):
    """An engine whose step can be timed in the running node."""

    def trial(self, captured: bool | None = None) -> AbstractContextManager[None]:
        """
        Run the step in another way inside ``with``, greedily, behind what the cache holds.

        :param captured: whether the step runs in a CUDA graph, on a CUDA device; None as it does.
        :raises EngineError: it can't run that way.
        """
        ...


@dataclass(frozen=True)
class Way:
    """One way of running the step, and the median of its time per token as the host sees it."""

    name: str                       # captured and uncaptured, or native and transformers
    step_s: float
    device_s: float | None = None   # of it, between two events on the device


@dataclass(frozen=True)
class Gap:
    """Two ways of running the same step, at the same context on the same device."""

    first: Way
    second: Way
    floor_s: float | None           # None where the memory's peak is not known
    context: int                    # tokens that the middle one of the steps read
    model: str                      # its number format, and the engine or the device

    def __str__(self) -> str:
        """Give the result in one line."""
        ways = self.first, self.second
        times = ', '.join(f'{way.name} {1e3 * way.step_s:.3f} ms' for way in ways)
        ratio = self.second.step_s / self.first.step_s
        floor = 'n/a' if self.floor_s is None else f'{1e3 * self.floor_s:.3f} ms'
        parts = [r_floor(self.floor_s, way.step_s) for way in ways]
        graph = {'captured': 'captured', 'uncaptured': 'off'}.get(self.first.name, 'unavailable')
        device_s, floor_s = self.first.device_s, self.floor_s
        verdict = judge(Figures(
            1e3 * self.first.step_s, None if device_s is None else 1e3 * device_s,
            None if floor_s is None else 1e3 * floor_s, cuda_graph=graph))
        told = ' and '.join('n/a' if part is None else f'{part:.2f}' for part in parts)
        return (f'{times} a token: {self.first.name} is {ratio:.2f} times as fast; floor {floor} '
                f'(r_floor {told}); {self.model}, context {self.context} tokens, medians of '
                f'{STEPS} steps after {WARM_UP_STEPS}'
                + (f'; what holds {self.first.name} back: {verdict}' if verdict else ''))


@contextmanager
def rival(engine: Engine, config: DecodeConfig,
          progress: Callable[[str], None] = lambda text: None) -> Iterator[Engine | None]:
    """
    Give what a loaded engine's step is to be compared with; it is closed at the end of ``with``.

    The loaded engine is only looked at, so that it can go on answering while a rival loads.

    :param config: what the engine was loaded from.
    :returns: an engine on a CPU; None where the step is compared with itself, on a GPU.
    :raises EngineError: there is no such comparison; the message says why and what to do.
    """
    shape = engine.footprint
    if not isinstance(engine, Measurable):
        raise EngineError(
            f'the engine {shape.engine} can not be timed in the running node; without the node, '
            + _command(config, shape.engine, f'{shape.engine}:cuda_graph=false'))
    if shape.max_context <= TOKENS:
        raise EngineError(
            f'the context holds {shape.max_context} tokens: {TOKENS + 1} are needed; raise '
            "engine.max_context if the model's own limit is higher")
    if shape.cuda_graph != 'unavailable':
        yield None
        return
    if shape.checkpoint_weight_bytes > RIVAL_LIMIT_BYTES:
        raise EngineError(
            f'the model has {shape.checkpoint_weight_bytes / 1e9:.2f} GB of weights, too much to '
            'load beside itself; without the node, ' + _command(config, *_RIVALS))
    name = _RIVALS[shape.engine]
    try:
        other = engines.build(checkpoint.open(config.model.path, config.model.revision),
                              replace(config.engine, name=name), progress)
    except EngineError as error:
        raise EngineError(f'there is no {name} step to compare with: {error}') from None
    try:
        yield other
    finally:
        other.close()


def measure(loop: DecodeLoop, other: Engine | None, peak: Peak,
            go_on: Callable[[], None] = lambda: None) -> Gap:
    """
    Time the step in both ways, after what the engine's cache holds.

    The steps' own keys and values come after those in the cache, which stay as they are; only of a
    context so full that the steps have no room, the last ones are lost.

    :param loop: of the loaded engine, which is `Measurable`.
    :param other: as `rival` gives it.
    :param peak: the memory bus that the floor is for.
    :param go_on: called after each step; what it raises ends the measurement.
    :raises EngineError: the engine can't run its step in the other way.
    """
    engine = cast(Measurable, loop.engine)
    shape = engine.footprint
    loop.forget(shape.max_context - TOKENS - 1)
    before = loop.cached_ids
    # With one id more than is cached nothing of the cache is computed again; any id will do.
    prompt = [*before, 0]
    try:
        if other is None:
            with engine.trial(captured=True):
                first = Way('captured', *_step_s(loop, prompt, go_on))
            with engine.trial(captured=False):
                second = Way('uncaptured', *_step_s(loop, prompt, go_on))
        else:
            both = {loop.engine.footprint.engine: loop,
                    other.footprint.engine: DecodeLoop(other)}
            first, second = (Way(name, *_step_s(both[name], prompt, go_on)) for name in _RIVALS)
    finally:
        loop.forget(len(before))
    context = len(prompt) + WARM_UP_STEPS + (STEPS + 1) // 2
    form = shape.dtype if shape.quantization == 'none' else f'{shape.dtype} {shape.quantization}'
    return Gap(first, second, Roofline(shape, peak).floor_s(context), context,
               f'{form} on {shape.device}' if other else f'{shape.engine}, {form}')


def _step_s(loop: DecodeLoop, prompt: list[int],
            go_on: Callable[[], None]) -> tuple[float, float | None]:
    """Give the median time from one token to the next and that on the device, in seconds."""
    stamps, device_s = [], []
    with closing(cast('Generator[Step, None, None]', loop.stream(
            prompt, SamplingConfig(max_new_tokens=TOKENS)))) as steps:
        for step in steps:
            if step.token_ids:
                stamps.append(time.perf_counter())
                device_s.append(step.device_s)
            go_on()
    times = [after - before for before, after in pairwise(stamps)]
    known = [each for each in device_s[1 + WARM_UP_STEPS:] if each is not None]
    return (statistics.median(times[WARM_UP_STEPS:]),
            statistics.median(known) if known else None)


def _command(config: DecodeConfig, *names: str) -> str:
    """Give the command that compares two engines in processes of their own."""
    return (f'"decode_bench --model {shlex.quote(config.model.path)} --engines '
            f'{" ".join(names)}" compares them')
