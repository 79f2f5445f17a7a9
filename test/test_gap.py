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

"""The gap: how it reads, what is refused, and that engines are afterwards as they were."""

from collections import deque
from contextlib import contextmanager
from dataclasses import replace
import gc
import sys

from engine_contract import decode
from engine_contract import first_step
from engine_contract import load
from engine_contract import prompt_of
from fake_engine import FakeEngine
from physai_decode import gap
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import ModelConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.decode_loop import Step
from physai_decode.engine import EngineError
from physai_decode.engines import device as devices
from physai_decode.engines.native import engine as native
from physai_decode.engines.transformers import TransformersEngine
from physai_decode.roofline import Peak
import pytest
import random_model
import torch

PEAK = Peak(1e9, 'parameter')
CONFIG = DecodeConfig(engine=EngineConfig(device='cpu', cpu_threads=1))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


class Fake(FakeEngine):
    """An engine with a cache, and a graph that it can do without."""

    def __init__(self, **changes):
        super().__init__(self._count, **{'cuda_graph': 'captured', 'max_context': 64, **changes})
        self.way = True
        self.ways = []

    @contextmanager
    def trial(self, captured=None):
        """Remember what was asked."""
        own, self.way = self.way, captured
        yield
        self.way = own

    def _count(self, prompt_ids):
        self.ways.append(self.way)
        for _ in range(gap.TOKENS):
            yield Step((7,))


def found(**changes):
    return replace(gap.Gap(
        gap.Way('captured', 3.651e-3), gap.Way('uncaptured', 8.378e-3), 2.97e-3, 2048,
        'native, bfloat16'), **changes)


def test_how_it_reads():
    assert str(found()) == (
        'captured 3.651 ms, uncaptured 8.378 ms a token: captured is 2.29 times as fast; '
        'floor 2.970 ms (r_floor 0.81 and 0.35); native, bfloat16, context 2048 tokens, medians '
        'of 30 steps after 5; what holds captured back: bytes: 2.97 of 3.65 ms (81 %); read '
        'fewer bytes: four-bit weights, a smaller model, a shorter context')
    assert 'floor n/a (r_floor n/a and n/a); ' in str(found(floor_s=None))
    assert 'captured is 0.50 times as fast' in str(found(second=gap.Way('uncaptured', 1.8255e-3)))


def test_advice_fits_the_engine():
    slow = found(first=gap.Way('captured', 3.651e-3, 3.6e-3), floor_s=0.95e-3, engine='native',
                 kernels='triton 3.6.0', quantization='bitsandbytes-nf4')
    assert str(slow).endswith('use weights in another format, such as GPTQ of four bits')
    bare = gap.measure(DecodeLoop(Fake(
        engine='native', quantization='awq', details={'kernels': 'torch'})), None, PEAK)
    assert (bare.engine, bare.kernels, bare.quantization) == ('native', 'torch', 'awq')


@pytest.mark.parametrize(('cached', 'kept'), [(0, 0), (5, 5), (27, 27), (28, 27), (63, 27)])
def test_both_ways_go_on_from_the_cache(cached, kept):
    """As far as there is room; the floor is that of the middle step."""
    engine = Fake()
    loop = DecodeLoop(engine)
    if cached:
        decode(loop, range(100, 100 + cached), SamplingConfig(max_new_tokens=1))
    engine.prompts.clear(), engine.ways.clear()
    steps = []
    result = gap.measure(loop, None, PEAK, lambda: steps.append(1))
    assert loop.cached_ids == list(range(100, 100 + kept))
    assert engine.prompts == [[*range(100, 100 + kept), 0]] * 2
    assert kept + 1 + gap.TOKENS <= engine.footprint.max_context
    assert engine.ways == [True, False] and engine.way
    assert result.context == kept + 1 + 20
    assert result.floor_s == pytest.approx((1000 + 32 * result.context) / 1e9)
    assert (result.first.name, result.second.name) == ('captured', 'uncaptured')
    assert len(steps) == 2 * gap.TOKENS


def test_a_measurement_can_be_ended():
    """What the caller raises ends the stream too."""
    class Enough(Exception):
        pass

    def heartbeat():
        raise Enough

    engine = Fake()
    loop = DecodeLoop(engine)
    with pytest.raises(Enough):
        gap.measure(loop, None, PEAK, heartbeat)
    assert engine.way is True and loop.cached_ids == []


@pytest.mark.parametrize(('engine', 'words'), [
    (FakeEngine(), '--model "?builtin:tiny_planner"? --engines fake fake:cuda_graph=false'),
    (Fake(max_context=36), 'of 36 tokens is too short: 37 are needed'),
    (Fake(cuda_graph='unavailable', checkpoint_weight_bytes=2 * 10**9, engine='native'),
     '2.00 GB .* --engines native transformers')])
def test_what_can_not_be_measured_is_refused(engine, words):
    with pytest.raises(EngineError, match=words):
        with gap.baseline(engine, CONFIG):
            pass


def test_on_a_gpu_the_step_is_compared_with_itself():
    with gap.baseline(Fake(), CONFIG) as other:
        assert other is None


def test_a_rival_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    for name in [name for name in sys.modules
                 if name.startswith('physai_decode.engines.transformers')]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(EngineError, match='pip install -U transformers'):
        with gap.baseline(Fake(cuda_graph='unavailable', engine='native'), CONFIG):
            pass


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return random_model.save(tmp_path_factory.mktemp('model'), 'qwen2', 0)


ENGINES = {'native': native.NativeEngine, 'transformers': TransformersEngine}


@pytest.mark.parametrize('name', ENGINES)
def test_on_a_cpu_two_engines_are_compared(folder, name):
    """Of the loaded one nothing is lost but what has no room."""
    config = replace(CONFIG, model=ModelConfig(path=str(folder)))
    loop = load(ENGINES[name], folder, config.engine)
    engine = loop.engine
    limit = engine.footprint.max_context
    prompt = prompt_of(loop, 60)
    expected = decode(loop, prompt + [5])
    decode(loop, prompt)
    cached = loop.cached_ids
    assert cached[:60] == prompt
    with gap.baseline(engine, config) as other:
        assert {engine.footprint.engine, other.footprint.engine} == set(ENGINES)
        result = gap.measure(loop, other, PEAK)
        assert (result.first.name, result.second.name) == tuple(ENGINES)
        assert result.engine == result.first.name
        assert result.first.step_s > 0 and result.second.step_s > 0
        assert loop.cached_ids == cached
        step = first_step(loop, prompt + [5])
        assert (step.cached_tokens, step.token_ids) == (60, (expected[0],))
        assert decode(loop, prompt + [5]) == expected
        full = prompt_of(loop, limit - 1)
        answer = decode(loop, full)
        result = gap.measure(loop, other, PEAK)
        assert result.context == limit - gap.TOKENS + 20
        assert decode(loop, full) == answer
    engine.close()


class Steps:
    """Stands for the pipeline of a GPU: its steps run at once, on a CPU."""

    made: list[bool] = []

    def __init__(self, forward, draw, history, capture, ahead, priority):
        self.made.append(capture)
        self._forward, self._draw, self._history, self._capture = forward, draw, history, capture
        self._flying = deque()

    def prepare(self, plan, begin):
        """Run the step a few times, as a capture does."""
        begin()
        for _ in range(devices.WARM_UP_STEPS if self._capture else 0):
            self._step(plan)

    def _step(self, plan):
        self._forward(1)
        self._draw(plan, 1)

    @property
    def flying(self):
        """Steps in flight."""
        return len(self._flying)

    @property
    def full(self):
        """Whether as many steps are in flight as may be."""
        return len(self._flying) == 2

    def launch(self, plan, place, restrict):
        """Run a step."""
        self._step(plan)
        self._flying.append(([int(self._history[place])], 1e-3))

    def collect(self):
        """Return the oldest step's token."""
        return self._flying.popleft()

    def drain(self):
        """Forget them."""
        self._flying.clear()


@pytest.mark.parametrize('graph', ['captured', 'off'])
def test_the_other_way_leaves_the_native_cache_alone(folder, monkeypatch, graph):
    """Also where capturing runs steps of its own, and where the context is full."""
    monkeypatch.setattr(native, 'Pipeline', Steps)
    monkeypatch.setattr(Steps, 'made', [])
    loop = load(native.NativeEngine, folder, CONFIG.engine)
    engine = loop.engine
    engine.pipeline = own = engine.piped(False)
    engine.footprint = replace(engine.footprint, cuda_graph=graph)
    limit = engine.footprint.max_context
    for length in (1, 60, limit - gap.TOKENS, limit - 2, limit - 1):
        prompt = prompt_of(loop, length, start=4)     # without a 0
        expected = decode(loop, prompt, SamplingConfig(max_new_tokens=limit))
        keys = engine.transformer.keys.clone()
        kept = min(len(loop.cached_ids), limit - gap.TOKENS - 1)
        gap.measure(loop, None, PEAK)
        assert engine.pipeline is own
        assert torch.equal(engine.transformer.keys[:, :, :kept], keys[:, :, :kept])
        assert loop.cached_ids == (prompt + expected)[:kept]
        assert decode(loop, prompt, SamplingConfig(max_new_tokens=limit)) == expected
    assert Steps.made == [False] + 5 * [graph == 'off']
    engine.close()


def test_a_transformers_step_that_was_not_captured(folder):
    loop = load(TransformersEngine, folder, CONFIG.engine)
    engine = loop.engine
    with pytest.raises(EngineError, match='engine.cuda_graph to true'):
        gap.measure(loop, None, PEAK)
    engine.close()


@on_gpu
@pytest.mark.parametrize(('name', 'graph'), [
    ('native', True), ('native', False), ('transformers', True)])
def test_on_a_gpu(folder, name, graph):
    """Both ways are timed, and the next answer, the cache and the memory are as before."""
    loop = load(ENGINES[name], folder, EngineConfig(device='cuda', cuda_graph=graph))
    engine = loop.engine
    prompt = prompt_of(loop, 60)
    sampled = SamplingConfig(temperature=0.8, seed=3, max_new_tokens=20)

    def answers():
        return decode(loop, prompt, sampled), decode(loop, prompt)

    answers()
    expected = answers()            # with all of the prompt but its last token in the cache
    cached = loop.cached_ids
    gap.measure(loop, None, PEAK)
    assert loop.cached_ids == cached
    assert answers() == expected
    full = prompt_of(loop, engine.footprint.max_context - 1, start=5)
    assert len(decode(loop, full)) == 1
    gap.measure(loop, None, PEAK)
    assert len(decode(loop, full)) == 1
    answers()
    assert answers() == expected
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    result = gap.measure(loop, None, PEAK)
    assert (result.first.name, result.second.name) == ('captured', 'uncaptured')
    assert result.first.step_s > 0 and result.second.step_s > 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    assert first_step(loop, [*prompt, 5]).cached_tokens == 60
    engine.close()
