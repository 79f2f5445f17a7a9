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

"""A gap measurement reports both times, and leaves the engine as it was."""

from collections import deque
from contextlib import contextmanager
from dataclasses import replace
import gc

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


class GraphEngine(FakeEngine):
    """A fake engine that records for each answer whether its steps were to be captured."""

    def __init__(self, **changes):
        super().__init__(self._count, **{'cuda_graph': 'captured', 'max_context': 64, **changes})
        self.captured: bool | None = True
        self.captured_by_answer: list[bool | None] = []

    @contextmanager
    def trial(self, captured):
        """Set the mode inside ``with``."""
        before, self.captured = self.captured, captured
        yield
        self.captured = before

    def _count(self, prompt_ids):
        self.captured_by_answer.append(self.captured)
        for _ in range(gap.TOKENS):
            yield Step((7,))


def measured_gap(**changes):
    return replace(gap.Gap(
        gap.Way('captured', 3.651e-3), gap.Way('uncaptured', 8.378e-3), 2.97e-3, 2048,
        'native, bfloat16'), **changes)


def test_gap_as_text():
    assert str(measured_gap()) == (
        'captured 3.651 ms, uncaptured 8.378 ms a token: captured is 2.29 times as fast; '
        'floor 2.970 ms (r_floor 0.81 and 0.35); native, bfloat16, context 2048 tokens, medians '
        'of 30 steps after 5; what holds captured back: bytes: 2.97 of 3.65 ms (81 %); read '
        'fewer bytes: four-bit weights, a smaller model, a shorter context')
    assert 'floor n/a (r_floor n/a and n/a); ' in str(measured_gap(floor_s=None))
    slower = measured_gap(second=gap.Way('uncaptured', 1.8255e-3))
    assert 'captured is 0.50 times as fast' in str(slower)


def test_advice_fits_the_engine():
    slow = measured_gap(first=gap.Way('captured', 3.651e-3, 3.6e-3), floor_s=0.95e-3,
                        engine='native', kernels='triton 3.6.0',
                        slow_format=True)
    assert str(slow).endswith('use weights in another format, such as GPTQ of four bits')
    bare = gap.measure(DecodeLoop(GraphEngine(
        engine='native', slow_format=True, details={'kernels': 'torch'})), None, PEAK)
    assert (bare.engine, bare.kernels, bare.slow_format) == ('native', 'torch', True)


@pytest.mark.parametrize(('cached', 'reused'), [(0, 0), (5, 5), (27, 27), (28, 27), (63, 27)])
def test_times_both_modes_after_the_cached_tokens(cached, reused):
    """Cached tokens that leave no room for the steps are dropped."""
    engine = GraphEngine()
    loop = DecodeLoop(engine)
    if cached:
        decode(loop, range(100, 100 + cached), SamplingConfig(max_new_tokens=1))
    engine.prompts.clear(), engine.captured_by_answer.clear()
    steps = []
    result = gap.measure(loop, None, PEAK, lambda: steps.append(1))
    assert loop.cached_ids == list(range(100, 100 + reused))
    assert engine.prompts == [[*range(100, 100 + reused), 0]] * 2
    assert reused + 1 + gap.TOKENS <= engine.footprint.max_context
    assert engine.captured_by_answer == [True, False] and engine.captured
    assert result.context == reused + 1 + 20        # of the median step
    assert result.floor_s == pytest.approx((1000 + 32 * result.context) / 1e9)
    assert (result.first.name, result.second.name) == ('captured', 'uncaptured')
    assert len(steps) == 2 * gap.TOKENS


def test_exception_in_the_heartbeat_ends_the_measurement():
    class Cancelled(Exception):
        pass

    def heartbeat():
        raise Cancelled

    engine = GraphEngine()
    loop = DecodeLoop(engine)
    with pytest.raises(Cancelled):
        gap.measure(loop, None, PEAK, heartbeat)
    assert engine.captured is True and loop.cached_ids == []


@pytest.mark.parametrize(('engine', 'words'), [
    (FakeEngine(), '--model "?builtin:tiny_planner"? --engines fake fake:cuda_graph=false'),
    (GraphEngine(max_context=36), 'of 36 tokens is too short: 37 are needed'),
    (GraphEngine(cuda_graph='unavailable', checkpoint_weight_bytes=2 * 10**9, engine='native'),
     '2.00 GB .* --engines native transformers')])
def test_rejects_an_engine_that_can_not_be_measured(engine, words):
    with pytest.raises(EngineError, match=words):
        with gap.baseline(engine, CONFIG):
            pass


def test_needs_no_second_engine_with_a_cuda_graph():
    with gap.baseline(GraphEngine(), CONFIG) as other:
        assert other is None


def test_reports_that_transformers_is_not_installed(no_transformers):
    with pytest.raises(EngineError, match='pip install -U transformers'):
        with gap.baseline(GraphEngine(cuda_graph='unavailable', engine='native'), CONFIG):
            pass


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return random_model.save(tmp_path_factory.mktemp('model'), 'qwen2', 0)


ENGINES = {'native': native.NativeEngine, 'transformers': TransformersEngine}


@pytest.mark.parametrize('name', ENGINES)
def test_compares_two_engines_on_a_cpu(folder, name):
    """The loaded engine keeps its cache and its answers."""
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


class FakePipeline:
    """A fake `Pipeline` on the CPU: `launch` computes the step before it returns."""

    captures: list[bool] = []       # for each pipeline, whether it captures

    def __init__(self, forward, draw, history, capture, *options):
        self.captures.append(capture)
        self._forward, self._draw, self._history, self._capture = forward, draw, history, capture
        self._flying = deque()

    def prepare(self, plan, begin):
        """Run the warm-up steps of a capture."""
        begin()
        for _ in range(devices.WARM_UP_STEPS if self._capture else 0):
            self._step(plan)

    def _step(self, plan):
        self._forward(1)
        self._draw(plan, 1)

    @property
    def flying(self):
        """The number of steps in flight."""
        return len(self._flying)

    @property
    def full(self):
        """Whether two steps are in flight."""
        return len(self._flying) == 2

    def launch(self, plan, place, restrict):
        """Run a step."""
        self._step(plan)
        self._flying.append(([int(self._history[place])], 1e-3))

    def collect(self):
        """Return the token of the oldest step and its device time."""
        return self._flying.popleft()

    def drain(self):
        """Discard the steps in flight."""
        self._flying.clear()


@pytest.mark.parametrize('graph', ['captured', 'off'])
def test_measurement_leaves_the_native_cache_unchanged(folder, monkeypatch, graph):
    """The warm-up steps of a capture and a full context do not change it either."""
    monkeypatch.setattr(native, 'Pipeline', FakePipeline)
    monkeypatch.setattr(FakePipeline, 'captures', [])
    loop = load(native.NativeEngine, folder, CONFIG.engine)
    engine = loop.engine
    engine.pipeline = own = engine.piped(False)
    engine.footprint = replace(engine.footprint, cuda_graph=graph)
    limit = engine.footprint.max_context
    for length in (1, 60, limit - gap.TOKENS, limit - 2, limit - 1):
        # No id is 0, which is the id that a measurement appends.
        prompt = prompt_of(loop, length, start=4)
        expected = decode(loop, prompt, SamplingConfig(max_new_tokens=limit))
        keys = engine.transformer.keys.clone()
        count = min(len(loop.cached_ids), limit - gap.TOKENS - 1)
        gap.measure(loop, None, PEAK)
        assert engine.pipeline is own
        assert torch.equal(engine.transformer.keys[:, :, :count], keys[:, :, :count])
        assert loop.cached_ids == (prompt + expected)[:count]
        assert decode(loop, prompt, SamplingConfig(max_new_tokens=limit)) == expected
    assert FakePipeline.captures == [False] + 5 * [graph == 'off']
    engine.close()


def test_transformers_without_a_captured_step_is_an_error(folder):
    loop = load(TransformersEngine, folder, CONFIG.engine)
    engine = loop.engine
    with pytest.raises(EngineError, match='engine.cuda_graph to true'):
        gap.measure(loop, None, PEAK)
    engine.close()


@on_gpu
@pytest.mark.parametrize(('name', 'graph'), [
    ('native', True), ('native', False), ('transformers', True)])
def test_measurement_on_a_gpu_restores_the_engine(folder, name, graph):
    """Answers, the KV cache and the reserved memory are the same as before."""
    loop = load(ENGINES[name], folder, EngineConfig(device='cuda', cuda_graph=graph))
    engine = loop.engine
    prompt = prompt_of(loop, 60)
    sampled = SamplingConfig(temperature=0.8, seed=3, max_new_tokens=20)

    def answers():
        return decode(loop, prompt, sampled), decode(loop, prompt)

    answers()
    expected = answers()            # now the cache has all of the prompt but its last token
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
