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

"""``decode_bench``: measurements, comparisons, reports, and runs that are resumed."""

import contextlib
from dataclasses import replace
import hashlib
from html.parser import HTMLParser
import json
import math
import os
from pathlib import Path
import random
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

from json_file import editing
from physai_decode import bench
from physai_decode import checkpoint
from physai_decode import realtime
from physai_decode.benchmark import compare
from physai_decode.benchmark import machine
from physai_decode.benchmark import neighbour
from physai_decode.benchmark import plots
from physai_decode.benchmark import profiler
from physai_decode.benchmark import provenance
from physai_decode.benchmark import report
from physai_decode.benchmark import runner as runner_module
from physai_decode.benchmark import session
from physai_decode.benchmark import suites
from physai_decode.benchmark import synthetic
from physai_decode.benchmark.case import Case
from physai_decode.benchmark.case import ModelSource
from physai_decode.benchmark.case import parse_engine
from physai_decode.benchmark.case import parse_sampling
from physai_decode.benchmark.runner import Runner
from physai_decode.benchmark.table import Table
from physai_decode.config import ConfigError
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.constraint import ConstraintError
from physai_decode.decode_loop import DecodeLoop
from physai_decode.decode_loop import Step
from physai_decode.engine import Choice
from physai_decode.engine import EngineError
from physai_decode.engine import Footprint
from physai_decode.roofline import Peak
from physai_decode.roofline import Roofline
import pytest
from worker_rig import wait_for

PEAK = Peak(1e9, 'parameter')


class FakeEngine:
    """Reports the number of a token as its device time in ms; takes prompts in small chunks."""

    chunk_tokens = (1, 10)

    def __init__(self, max_context=4096):
        self.footprint = Footprint(
            engine='fake', model_type='qwen2', dtype='bfloat16', quantization='none', device='cpu',
            device_name='Fake 1', device_uuid='', cuda_graph='off', max_context=max_context,
            vocab_size=50, eos_token_ids=(1,), read_weight_bytes=2_000_000,
            checkpoint_weight_bytes=3_000_000, layers=2, kv_heads=1, head_dim=64,
            kv_element_bytes=2, details={'load_s': '1.5', 'tune_s': '2.5', 'kernels': 'fake'})
        self.prompts = []
        self.samplings = []
        self.closed = False

    def rewind(self, length):
        return length

    def feed(self, token_ids):
        return lambda: 0.25

    def first(self, sampling, prompt_ids, constraint=None):
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        self.tokens = 1
        return Choice(1, 0.5)

    def step(self, remaining):
        self.tokens += 1
        return Choice(2, self.tokens * 1e-3)

    def close(self):
        self.closed = True


def case(label='fake', contexts=(64, 128), **more):
    defaults = {'engine': EngineConfig(name='native', cpu_threads=1), 'steps': 5, 'warmup': 2,
                'source': ModelSource(synthetic='tiny')}
    return Case(label, contexts=contexts, **{**defaults, **more})


def done(of, medians, contexts=(2048,)):
    """Return the result of a finished session of a case, with these medians in seconds."""
    engine = FakeEngine()
    return {
        'case': of.to_dict(), 'status': 'done', 'date': '', 'peak': vars(PEAK),
        'footprint': {**vars(engine.footprint), 'details': {}, 'cuda_graph': 'captured'},
        'machine': {'cpu': 'Fake'},
        'memory': {'resident_peak_gb': 1.0},
        'startup': {'import_s': 1.0, 'build_s': 2.0, 'parts': {'load_s': 1.5},
                    'first_tokens_s': 4.0, 'progress': []},
        'contexts': [{
            'context': context, 'itl_s': [median] * 9, 'device_s': [median * 0.9] * 9,
            'itl_p50_s': median, 'itl_p95_s': median, 'itl_p99_s': median * 1.02,
            'itl_max_s': median, 'device_p50_s': median * 0.9, 'host_gap_p50_s': median * 0.1,
            'prefill_s': 0.1, 'kv_bytes': 1000, 'floor_read_s': median / 2,
            'floor_checkpoint_s': median * 0.75, 'r_read': 0.5, 'r_checkpoint': 0.75}
            for context, median in zip(contexts, medians, strict=True)]}


# --- one measurement ----------------------------------------------------------------------------

def test_measure_excludes_warm_up_and_prompt_chunks():
    engine = FakeEngine()
    cell = session.measure(engine, 64, warmup=5, steps=30, peak=PEAK)
    assert len(cell['itl_s']) == 30
    # The token of the prefill is the first: 5 warm-up steps are tokens 2 to 6.
    assert cell['device_s'] == [number * 1e-3 for number in range(7, 37)]
    assert cell['cached_tokens'] == 0
    assert cell['prompt_tokens'] == 64 - 5 - 30 - 1
    assert cell['device_p50_s'] == pytest.approx(0.0215)


def test_measure_uses_a_new_prompt_each_time():
    engine = FakeEngine()
    session.measure(engine, 64, 2, 5, PEAK)
    session.measure(engine, 128, 2, 5, PEAK)
    starts = {tuple(prompt[:8]) for prompt in engine.prompts}
    assert len(starts) == len(engine.prompts) == 4
    assert all(0 <= token < 50 for prompt in engine.prompts for token in prompt)


def test_floors_are_those_of_the_middle_step():
    cell = session.measure(FakeEngine(), 1000, warmup=5, steps=30, peak=PEAK)
    kv = 2 * 2 * 1 * 64 * 985 * 2
    assert cell['kv_bytes'] == kv
    assert cell['floor_read_s'] == pytest.approx((2_000_000 + kv) / 1e9)
    assert cell['floor_checkpoint_s'] == pytest.approx((3_000_000 + kv) / 1e9)
    assert cell['r_read'] == pytest.approx(cell['floor_read_s'] / cell['itl_p50_s'])


def test_no_floor_without_a_peak():
    cell = session.measure(FakeEngine(), 64, 2, 5, Peak(None, 'unknown'))
    assert cell['floor_read_s'] is None and cell['r_checkpoint'] is None


def test_counts_each_token_of_a_step():
    class Loop:
        engine = FakeEngine()

        def stream(self, prompt_ids, sampling, constraint=None, ahead=True):
            yield Step(())
            yield Step((1,), 0.5, cached_tokens=3)
            for _ in range(sampling.max_new_tokens // 2):
                yield Step((1, 2), 0.004)
    _, itl_s, device_s, cached = session._stream(Loop(), [5], 6)
    assert len(itl_s) == 6 and device_s == [0.002] * 6 and cached == 3


@pytest.fixture
def processes(monkeypatch):
    """Return a list of the processes that were started."""
    started, popen = [], subprocess.Popen

    def start(*arguments, **more):
        started.append(popen(*arguments, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, 'Popen', start)
    return started


@pytest.mark.skipif(not realtime._slice_ns(0), reason='this system has no time slices')
@pytest.mark.parametrize('sleeps', [False, True])
def test_steps_have_the_time_slice_of_a_decode_thread(monkeypatch, processes, sleeps):
    """Busy loops beside them have the default, and the result tells what is in force."""
    engine, before_ns, own, others = FakeEngine(), realtime._slice_ns(0), set(), set()
    engine.footprint = replace(engine.footprint, sleeps=sleeps)

    def step(remaining, inner=engine.step):
        own.add(realtime._slice_ns(0))
        others.update(realtime._slice_ns(process.pid) for process in processes)
        return inner(remaining)

    monkeypatch.setattr(engine, 'step', step)
    monkeypatch.setattr(session, 'BESIDE_ROUNDS', 1)
    monkeypatch.setattr(session, 'BESIDE_STEPS', 10)
    monkeypatch.setattr(session, 'BESIDE_S', 0.05)
    session.beside(engine, 64, 2, 'cpu')
    assert own == {realtime.SLICE_NS if sleeps else before_ns}
    assert others == {before_ns} and realtime._slice_ns(0) == before_ns
    told = machine.describe(engine.footprint).get('time_slice')
    assert told == ('0.5 ms' if sleeps else None)


def test_sampling_settings_alternate_after_one_prompt():
    engine = FakeEngine()
    rows = session.compare_samplings(engine, 64, 2, 5, ('temperature=0.8', 'greedy', 'top_k=3'))
    assert [row['sampling'] for row in rows] == ['greedy', 'temperature=0.8', 'top_k=3']
    assert all(len(row['itl_s']) == 5 * session.SAMPLING_ROUNDS for row in rows)
    assert len(set(map(tuple, engine.prompts))) == 1
    used = [(each.temperature, each.top_k, each.max_new_tokens) for each in engine.samplings]
    assert used == [(0.0, 0, 8), (0.8, 0, 8), (0.0, 3, 8)] * session.SAMPLING_ROUNDS


class CountingConstraint:
    """A constraint whose answer is complete after a number of tokens."""

    mask_s = 0.25

    def __init__(self, tokens):
        self.left = tokens

    @property
    def ended(self):
        return self.left <= 0

    def accept(self, token_id):
        self.left -= 1


def test_masked_and_free_steps_alternate_at_the_same_length():
    engine, lengths = FakeEngine(), iter([4, *[6, 9] * 50])
    made = []

    def new_constraint():
        made.append(CountingConstraint(next(lengths)))
        return made[-1]
    times = session.masked(engine, 64, 2, 5, session.Compiled(new_constraint, 0.5, 0.75))
    # The first answer is not counted. The others have 3 or 6 steps after 2 of warm-up; at most 5
    # are counted.
    assert len(made) == 1 + 13
    assert len(times['masked_s']) == len(times['free_s']) == len(times['mask_s']) == 7 * 3 + 6 * 5
    assert times['mask_p99_s'] == 0.25 and times['ratio'] > 0
    assert (times['vocabulary_s'], times['compile_s']) == (0.5, 0.75)
    assert len(set(map(tuple, engine.prompts))) == 1
    assert [each.max_new_tokens for each in engine.samplings][:6] == [8, 4, 8, 6, 8, 8]


def test_rejects_answers_too_short_to_be_timed():
    compiled = session.Compiled(lambda: CountingConstraint(2), 0.0, 0.0)
    with pytest.raises(EngineError, match='0 steps after 2 of warm-up, but 50 are needed'):
        session.masked(FakeEngine(), 64, 2, 5, compiled)


def test_rejects_an_engine_that_ends_early():
    with pytest.raises(EngineError, match='ended after 3 of 7'):
        session.measure(FakeEngine(max_context=60), 64, 2, 5, PEAK)


def test_rejects_a_context_too_short_for_the_steps():
    with pytest.raises(ValueError, match='too short for 5 [+] 30'):
        session.measure(FakeEngine(), 36, 5, 30, PEAK)


def test_energy_of_decode_steps():
    """It is not measured if the device does not report it; the table omits such contexts."""
    now_s, used_j = [0.0], [100.0]

    def energy_j():
        return used_j[0]

    def clock():
        now_s[0], used_j[0] = now_s[0] + 0.5, used_j[0] + 50.0
        return now_s[0]

    assert session.energy(FakeEngine(), 64, 8, lambda: None) == {}
    for after_j in (None, 90.0, 100.0):         # the counter ended, was reset, or stood still
        readings_j = iter((100.0, 100.0, after_j))
        assert session.energy(FakeEngine(), 64, 8, readings_j.__next__, clock) == {}
    now_s[0], used_j[0] = 0.0, 100.0
    figures = session.energy(FakeEngine(), 64, 8, energy_j, clock)
    assert figures['power_w'] == pytest.approx(100.0)
    steps = 7 * 3                               # three answers fit into 2 s of this clock
    assert figures['j_per_token'] == pytest.approx(200.0 / steps)
    results = [{'case': {'label': 'a'}, 'contexts': [
        {'context': 64, **figures}, {'context': 128}]}]
    row, = report.energy(results).rows
    assert row[:2] == ['a', '64'] and row[4] == '100.0'


@pytest.mark.parametrize(('text', 'kind'), [
    ('cpu', neighbour.NeighbourKind('cpu')), ('gpu', neighbour.NeighbourKind('gpu', 30.0, 1)),
    ('gpu:60', neighbour.NeighbourKind('gpu', 60.0, 1)),
    ('gpu:10,4', neighbour.NeighbourKind('gpu', 10.0, 4))])
def test_parses_a_neighbour(text, kind):
    assert neighbour.parse(text) == kind


@pytest.mark.parametrize('text', [
    '', 'tpu', 'cpu:3', 'gpu:x', 'gpu:0', 'gpu:-1', 'gpu:nan', 'gpu:1,0', 'gpu:1,inf',
    'gpu:1,2,3'])
def test_rejects_a_wrong_neighbour(text):
    with pytest.raises(ConfigError, match=f'--beside {text}: expected cpu, or gpu'):
        neighbour.parse(text)


def test_neighbour_processes_end_with_the_context_manager(processes):
    with neighbour.running(neighbour.NeighbourKind('cpu')) as other:
        assert len(processes) == len(neighbour.os.sched_getaffinity(0))
        assert all(process.poll() is None for process in processes)
        assert other.collect(0.0) == []
    assert all(process.poll() is not None for process in processes)


def test_reports_a_neighbour_that_can_not_run(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    with pytest.raises(RuntimeError, match='the neighbour on the GPU does not run'):
        with neighbour.running(neighbour.NeighbourKind('gpu')):
            pass


def run_beside(monkeypatch, collect):
    """Replace the neighbour by one whose times ``collect`` returns."""
    monkeypatch.setattr(neighbour, 'running', lambda kind: contextlib.nullcontext(
        SimpleNamespace(collect=collect)))


def test_times_the_step_beside_a_neighbour(monkeypatch, tmp_path):
    """Rounds alternate with the step alone; the table also has the times of the neighbour."""
    run_beside(monkeypatch, lambda seconds: [0.002 if seconds else 0.004])
    monkeypatch.setattr(session, 'BESIDE_STEPS', 10)
    monkeypatch.setattr(session, 'BESIDE_S', 0.05)
    times = session.beside(FakeEngine(), 64, 2, 'gpu:30,1')
    assert 'paced' not in times and not times['pace']
    assert len(times['alone']) >= 40 and len(times['beside']) >= 40
    times.update(alone=[0.001] * 999 + [0.002], beside=[0.002] * 1000)
    results = [{'case': {'label': 'a'}, 'contexts': [{'context': 64, 'beside': [times]}]}]
    alone, beside = report.beside(results).rows
    assert alone == ['a', '64', 'gpu:30,1', 'alone', '1.000', '1.000', '1.001', '2.000', '999.0',
                     '2.000', '2.000']
    assert beside[3:5] == ['beside', '2.000'] and beside[-1] == '4.000'
    pyplot = pytest.importorskip('matplotlib.pyplot')
    figure = plots._beside(pyplot, results, {'a': 'black'})
    assert [line.get_label() for line in figure.axes[0].lines] == [
        'a, 64, alone', 'a, 64, beside gpu:30,1']
    pyplot.close(figure)
    empty = [{'case': {'label': 'a'}, 'contexts': []}]
    assert plots._beside(pyplot, empty, {'a': 'black'}) is None


def test_times_a_paced_step_beside_a_neighbour(monkeypatch):
    """The third row has the neighbour's times beside the paced steps, without their waits."""
    phases = []

    def collect(seconds):
        phases.append(seconds)
        return [0.001 * len(phases)]

    run_beside(monkeypatch, collect)
    monkeypatch.setattr(session, 'BESIDE_ROUNDS', 1)
    monkeypatch.setattr(session, 'BESIDE_STEPS', 10)
    monkeypatch.setattr(session, 'BESIDE_S', 0.3)
    begin_s = time.monotonic()
    times = session.beside(FakeEngine(), 64, 1, 'gpu:30,1', 20.0)
    assert time.monotonic() - begin_s > 0.6 and phases == [0.3, 0.0, 0.0]
    assert 1 <= len(times['paced']) <= 14 and min(times['paced']) < 0.05
    results = [{'case': {'label': 'a'}, 'contexts': [{'context': 64, 'beside': [times]}]}]
    rows = report.beside(results).rows
    assert [row[3] for row in rows] == ['alone', 'beside', 'beside, 20 tokens/s']
    assert [row[-1] for row in rows] == ['1.000', '2.000', '3.000']
    assert 0 < float(rows[2][8]) <= 20.0 < float(rows[1][8])


@pytest.mark.parametrize(('times', 'rate'), [
    ([0.001] * 100, '10.0'), ([0.2] * 100, '5.0'), ([0.15, 0.05] * 500, '10.0')])
def test_rate_of_paced_steps(times, rate):
    """A step that is late is caught up, as far as the pace permits it."""
    cell = {'context': 64, 'beside': [{
        'neighbour': 'cpu', 'pace': 10.0, 'alone': [1.0], 'beside': [1.0], 'paced': times,
        'neighbour_alone': [1.0], 'neighbour_beside': [1.0], 'neighbour_paced': [1.0]}]}
    rows = report.beside([{'case': {'label': 'a'}, 'contexts': [cell]}]).rows
    assert rows[2][8] == rate


@pytest.mark.parametrize(('arguments', 'words'), [
    (['--pace', '8'], '--pace needs --beside'),
    (['--pace', '0.01', '--beside', 'cpu'], 'pace.tokens_per_s'),
    (['--pace', '-1', '--beside', 'cpu'], 'pace.tokens_per_s'),
    (['--pace', 'nan', '--beside', 'cpu'], 'pace.tokens_per_s')])
def test_rejects_a_wrong_pace(arguments, words, capsys):
    assert bench.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_prompts_have_floors_of_bytes_and_of_operations(monkeypatch):
    """An engine that does not report its parameters takes the operations of another engine."""
    rates = []
    monkeypatch.setattr(session, 'matrix_rate', lambda *device: rates.append(device) or 4e9)
    engine, peak = FakeEngine(), Peak(2e9, 'parameter')
    engine.footprint = replace(engine.footprint, layer_parameters=10**6)
    found = session.time_prompts(engine, (16, 64), peak)
    assert [each['tokens'] for each in found] == [16, 64] and rates == [('cpu', 'bfloat16')]
    assert all(len(each['ttft_s']) == session.PROMPT_ROUNDS for each in found)
    assert [len(prompt) for prompt in engine.prompts] == 6 * [16] + 6 * [64]
    # 2 MB at 2 GB/s; 2 operations a weight and token at 4e9 a second.
    assert [each['floor_bytes_s'] for each in found] == [pytest.approx(0.001)] * 2
    assert [each['floor_operations_s'] for each in found] == pytest.approx([0.008, 0.032])
    with pytest.raises(ValueError, match='--prefill 0: a prompt has at least 1 token'):
        bench._cases(bench._parser().parse_args(['--prefill', '0']))
    other = session.time_prompts(FakeEngine(), (16, 64), peak)
    assert other[0]['floor_operations_s'] is None
    for number, each in enumerate((*found, *other)):
        each['ttft_p50_s'] = 0.01 * (1 + number)
    source = {'path': 'a', 'synthetic': ''}
    results = [
        {'case': {'label': name, 'source': source}, 'contexts': [], 'prompts': prompts,
         'footprint': {'quantization': 'none', 'dtype': 'float32', 'device_name': 'CPU'}}
        for name, prompts in (('a', found), ('b', other))]
    report.same_operations(results[::-1])
    assert report.prompts(results).rows == [
        ['a', '16', '10.000', '1.000', '8.000', '1.25'],
        ['a', '64', '20.000', '1.000', '32.000', '0.62'],
        ['b', '16', '30.000', '1.000', '8.000', '3.75'],
        ['b', '64', '40.000', '1.000', '32.000', '1.25']]
    pyplot = pytest.importorskip('matplotlib.pyplot')
    monkeypatch.setattr(plots, '_device', lambda results: 'CPU')
    figure = plots._prompts(pyplot, results, {'a': 'black', 'b': 'blue'})
    assert [line.get_label().partition(',')[0] for line in figure.axes[0].lines] == [
        'a', 'floor (bytes', 'floor (operations)', 'b']
    pyplot.close(figure)
    assert plots._prompts(pyplot, [{'contexts': []}], {}) is None


def test_measures_the_rate_of_a_matrix_product(monkeypatch):
    pytest.importorskip('torch')
    monkeypatch.setattr(session, 'MATRIX_CPU', 64)
    assert session.matrix_rate('cpu', 'float32') > 0


# --- a session ----------------------------------------------------------------------------------

def run_session(monkeypatch, build, of, save=lambda result: None):
    monkeypatch.setattr('physai_decode.engines.build', build)
    monkeypatch.setattr(checkpoint, 'open', lambda path, parameter: None)
    monkeypatch.setattr('physai_decode.telemetry.measure_cpu_read_bandwidth', lambda: 2e9)
    return session.run(of, 0.0, lambda message: None, save)


def test_session_writes_all_that_the_report_needs(monkeypatch):
    engine = FakeEngine()
    result = run_session(monkeypatch, lambda model, config, progress: engine, case())
    assert [cell['context'] for cell in result['contexts']] == [64, 128]
    assert result['startup']['parts'] == {'load_s': 1.5, 'tune_s': 2.5}
    assert (result['peak']['bytes_per_s'], result['peak']['source']) == (2e9, 'measured')
    assert result['machine']['cpu_cores'] >= 1
    assert engine.closed
    json.dumps(result)


def test_load_average_is_that_before_the_engine_loads(monkeypatch):
    loads = [(0.5, 0.25, 0.125)]

    def build(model, config, progress):
        loads[0] = (9.0, 9.0, 9.0)
        return FakeEngine()
    monkeypatch.setattr(machine.os, 'getloadavg', lambda: loads[0])
    rows = report.machine([run_session(monkeypatch, build, case())]).rows
    assert ['load_average_before', '1 min: 0.5, 5 min: 0.25, 15 min: 0.12'] in rows


def test_machine_with_a_gpu_has_the_name_of_its_cpu(monkeypatch):
    pytest.importorskip('torch')
    monkeypatch.setattr('physai_decode.engines.device.cpu_name', lambda: 'Cortex')
    monkeypatch.setattr(machine, '_gpu', lambda torch, footprint: {'name': 'Orin'})
    found = machine.describe(replace(FakeEngine().footprint, device='cuda:0'))
    assert found['cpu'] == 'Cortex' and found['gpu'] == {'name': 'Orin'}


def test_context_that_does_not_fit_has_the_reason_in_its_cell(monkeypatch):
    def build(model, config, progress):
        if config.max_context > 100:
            raise EngineError('not enough memory on cuda:0: 20 GB are needed')
        return FakeEngine(config.max_context)
    result = run_session(monkeypatch, build, case(contexts=(64, 128, 256)))
    assert [cell['context'] for cell in result['contexts']] == [64, 128, 256]
    assert [('error' in cell) for cell in result['contexts']] == [False, True, True]
    assert '20 GB are needed' in result['contexts'][2]['error']


def test_profile_uses_a_separate_engine(monkeypatch):
    built = []

    def build(model, config, progress):
        built.append(FakeEngine())
        built[-1].footprint = replace(built[-1].footprint, device='cuda:0')
        return built[-1]
    row = {'name': 'k'}
    monkeypatch.setattr(session, 'find_engine_peak', lambda footprint, config: PEAK)
    monkeypatch.setattr(machine, 'describe', lambda footprint: {})
    monkeypatch.setattr(machine, 'memory', lambda footprint: {})
    monkeypatch.setattr(profiler, 'prepare', lambda: built.append('profiler'))
    monkeypatch.setattr(profiler, 'profile', lambda engine, prompt, steps: [row])
    saved = []
    result = run_session(monkeypatch, build, case(kernels=True),
                         lambda result: saved.append(json.dumps(result)))
    assert [cell['kernels'] for cell in result['contexts']] == [[row], [row]]
    assert [cell['itl_p50_s'] > 0 for cell in json.loads(saved[0])['contexts']] == [True, True]
    assert 'kernels' not in json.loads(saved[0])['contexts'][0]
    assert [type(each) for each in built] == [FakeEngine, str, FakeEngine]
    assert built[0].closed and built[2].closed

    def denied():
        raise RuntimeError('CUPTI_ERROR_INSUFFICIENT_PRIVILEGES')
    monkeypatch.setattr(profiler, 'prepare', denied)
    result = run_session(monkeypatch, build, case(kernels=True))
    assert result['contexts'][0]['itl_p50_s'] > 0
    assert 'no kernel table: RuntimeError: CUPTI_ERROR' in report.steps([result]).text()


def test_context_beyond_the_model_has_the_reason_in_its_cell(monkeypatch):
    result = run_session(monkeypatch, lambda model, config, progress: FakeEngine(100), case())
    assert result['contexts'][1]['error'] == (
        'the model takes at most 100 tokens: set --contexts to 100 or less')


def test_says_why_nothing_was_measured(monkeypatch, tmp_path, capsys):
    result = run_session(monkeypatch, lambda *_: FakeEngine(60), case(contexts=(64, 128)))
    monkeypatch.setattr(Runner, 'run', lambda self, cases: [result])
    assert bench.main(['--out', str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith(
        'decode_bench: nothing was measured: the model takes at most 60 tokens: set --contexts to '
        '60 or less\n')


def test_reports_an_eager_step_as_not_captured(monkeypatch):
    engine = FakeEngine()                           # as on a CPU
    result = run_session(monkeypatch, lambda model, config, progress: engine, case(captured=True))
    assert (result['status'], result['error']) == ('unavailable', 'Fake 1 has no CUDA graphs')
    assert engine.closed


def test_missing_engine_is_unavailable(monkeypatch):
    def build(model, config, progress):
        raise EngineError('no CUDA device')
    result = run_session(monkeypatch, build, case())
    assert (result['status'], result['error']) == ('unavailable', 'no CUDA device')


def test_reports_sampling_settings_beside_greedy(monkeypatch):
    of = case(samplings=('temperature=0.8,top_p=0.9',))
    result = run_session(monkeypatch, lambda model, config, progress: FakeEngine(), of)
    cell = result['contexts'][0]
    for row, median in zip(cell['samplings'], (0.002, 0.0021), strict=True):
        row['itl_p50_s'] = median
    table = report.samplings([result])
    assert table.rows[:2] == [
        ['fake', '64', 'greedy', '2.000', '0.0', '1.000'],
        ['fake', '64', 'temperature=0.8,top_p=0.9', '2.100', '100.0', '1.050']]
    assert report.samplings([done(case(), [0.001, 0.002], (64, 128))]).rows == []


def test_reports_a_schema_that_can_not_be_compiled(monkeypatch):
    monkeypatch.setattr(session, 'compile_schema', _fail_to_compile)
    engine = FakeEngine()
    result = run_session(monkeypatch, lambda *_: engine, case(schema='{}'))
    assert (result['status'], result['error']) == ('unavailable', 'no such token')
    assert engine.closed


def _fail_to_compile(case, footprint):
    raise ConstraintError('no such token')


# --- cases --------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, sampling', [
    ('greedy', SamplingConfig()), ('top_k=40', SamplingConfig(top_k=40)),
    ('temperature=0.8,top_p=0.9,seed=3', SamplingConfig(temperature=0.8, top_p=0.9, seed=3))])
def test_parses_sampling_settings(text, sampling):
    assert parse_sampling(text) == sampling


@pytest.mark.parametrize('text, message', [
    ('cold', "no sampling setting 'cold': expected one of min_p, repetition_penalty, seed"),
    ('max_new_tokens=9', "no sampling setting 'max_new_tokens'"),
    ('temperature', "temperature is '': expected a float"),
    ('top_p=2', 'sampling.top_p is 2.0: expected 0.0 to 1.0')])
def test_rejects_wrong_sampling_settings(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_sampling(text)


def test_parses_engine_settings():
    config = parse_engine('native:cuda_graph=false,dtype=float16', EngineConfig(max_context=77))
    assert config == EngineConfig(name='native', cuda_graph=False, dtype='float16', max_context=77)


@pytest.mark.parametrize(('text', 'message'), [
    ('nativ', 'engine.name'), ('native:graph=true', "no engine setting 'graph'"),
    ('native:cuda_graph=perhaps', 'expected true or false'),
    ('native:cpu_threads=two', 'expected a int'), ('native:name=x', "no engine setting 'name'"),
    ('native:cpu_threads=-1', 'engine.cpu_threads'),
    ('native:max_context=64', 'set --contexts')])
def test_rejects_wrong_engine_settings(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_engine(text, EngineConfig())


def test_case_can_be_read_from_json_and_has_a_unique_key():
    one = case(session='03 A', requires=('bitsandbytes',))
    assert Case.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.key() != case(session='04 A', requires=('bitsandbytes',)).key()


# --- A/B ----------------------------------------------------------------------------------------

def test_sessions_alternate():
    assert ''.join(compare.order(4)) == 'ABBAABBA'


def test_clear_difference_has_a_winner():
    found = compare.compare([14.8, 14.9, 14.7, 14.8, 15.0], [11.8, 11.7, 11.9, 11.75, 11.8])
    assert found.ratio == pytest.approx(14.84 / 11.79)
    assert 1.24 < found.low < found.ratio < found.high < 1.28
    assert found.verdict('eager', 'graph') == f'graph is {found.ratio:.3f} times as fast as eager'
    assert found == compare.compare(
        [14.8, 14.9, 14.7, 14.8, 15.0], [11.8, 11.7, 11.9, 11.75, 11.8])


def test_interval_with_1_has_no_winner():
    found = compare.compare([1.0, 1.2, 0.9, 1.1], [1.05, 0.95, 1.15, 1.0])
    assert found.low < 1 < found.high
    assert 'no winner called' in found.verdict('A', 'B')


def test_slower_side_can_be_b():
    assert 'old is 2.000 times as fast as new' in \
        compare.compare([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]).verdict('old', 'new')


def test_two_sessions_are_too_few():
    found = compare.compare([2.0, 2.0], [1.0, 1.0])
    assert found.low is None
    assert 'at least 3 of each' in found.verdict('A', 'B')


def test_interval_covers_the_true_ratio_in_95_percent(monkeypatch):
    monkeypatch.setattr(compare, 'RESAMPLES', 1000)
    draw = random.Random(1)
    hits = 0
    for seed in range(60):
        a, b = ([draw.gauss(mean, 0.2) for _ in range(10)] for mean in (12.0, 10.0))
        found = compare.compare(a, b, seed)
        hits += found.low <= 1.2 <= found.high
    assert 48 <= hits <= 60


def test_a_b_table_has_lost_sessions():
    results = [done(case('A1', (2048,), session='01 A'), [0.012])] * 3
    results += [done(case('B1', (2048,), session='02 B'), [0.010])] * 3
    results.append({'case': case('B1', (2048,), session='07 B').to_dict(), 'status': 'died',
                    'error': 'the session ended with code -9', 'contexts': []})
    shown = report.comparisons(results, 'A1', 'B1').text()
    assert '1.200' in shown and 'B1 is 1.200 times as fast as A1' in shown
    assert 'lost: 07 B: the session ended with code -9' in shown


# --- kernels ------------------------------------------------------------------------------------

def event(name, ts, dur, grid=(8, 1, 1), category='kernel'):
    return {'ph': 'X', 'cat': category, 'name': name, 'ts': ts, 'dur': dur,
            'args': {'grid': list(grid)}}


def test_sums_kernels_by_name_and_grid():
    events = [{'ph': 'X', 'cat': 'cuda_runtime', 'name': 'launch', 'ts': 0, 'dur': 500}]
    for step in range(10):
        at = 1000 * step
        events += [event('matvec', at, 40), event('matvec', at + 50, 40),
                   event('matvec', at + 100, 300, grid=(99, 1, 1)), event('norm', at + 400, 20)]
    events.append(event('norm', 10000, 20))       # belongs to a step in flight
    rows = profiler.summarize(events, 10)
    assert [(row['name'], row['grid'], row['calls']) for row in rows] == [
        ('matvec', '99x1x1', 1), ('matvec', '8x1x1', 2), ('norm', '8x1x1', 1)]
    assert [row['step_s'] for row in rows] == pytest.approx([300e-6, 80e-6, 20e-6])
    assert sum(row['share'] for row in rows) == pytest.approx(1)


def test_overlapping_kernels_count_only_their_added_time():
    rows = profiler.summarize([event('first', 0, 100), event('second', 60, 100),
                              event('inside', 70, 10)], 1)
    assert {row['name']: row['step_s'] for row in rows} == pytest.approx(
        {'first': 100e-6, 'second': 60e-6, 'inside': 0.0})


def test_identifies_kernels_by_their_order_in_a_step():
    reads = [('mul', 'qkv', 10), ('attend', 'attention', 5), ('mul', 'down', 20)] * 2
    reads.append(('mul', 'head', 70))
    events = []
    for step in range(4):
        for place, (name, _, size) in enumerate(reads):
            at = 1000 * step + 100 * place
            events += [event(name, at, size), event('small', at + 80, 1)]
    rows = profiler.summarize(events[6:], 4, reads)          # begins within the first step
    assert {row['operation']: (row['bytes'], round(row['call_s'] * 1e6)) for row in rows} == {
        'qkv': (10, 10), 'attention': (5, 5), 'down': (20, 20), 'head': (70, 70), '': (None, 1)}
    others = profiler.summarize(events, 4, [('mul', 'only', 10), ('attend', 'attention', 5)])
    assert {row['operation'] for row in others} == {''}


def test_native_engine_reports_the_bytes_of_its_kernels(tmp_path):
    pytest.importorskip('torch')
    from physai_decode import engines
    synthetic.describe(tmp_path, 'tiny')
    engine = engines.build(checkpoint.open(str(tmp_path)), EngineConfig(
        name='native', device='cpu', max_context=64, cpu_threads=1))
    try:
        reads, foot = engine.reads(40), engine.footprint
        cache = sum(size for _, operation, size in reads if operation == 'attention')
        assert cache == Roofline(foot, PEAK).kv_bytes(40)
        left = foot.read_weight_bytes - (sum(size for *_, size in reads) - cache)
        hidden = synthetic.SHAPES['tiny']['hidden_size']
        assert left == 4 * hidden * (1 + 2 * foot.layers + 1)       # a row, the norms' gains
    finally:
        engine.close()


def test_kernel_table_has_rates():
    result = done(case(contexts=(2048,)), [0.010])
    cell = result['contexts'][0]
    cell['kernels'] = profiler.summarize(
        [event('mul', 1000 * step, 100) for step in range(3)], 3, [('mul', 'head', 60_000)])
    assert report.kernels(result, cell).rows == [
        ['head', 'mul', '8x1x1', '1', '0.06', '100.0', '100.0', '100.0', '1', '0.600']]


# --- random weights -----------------------------------------------------------------------------

def test_qwen_shape_has_the_bytes_of_the_paper():
    made = synthetic.config('qwen2.5-7b')
    total = sum(spec.bytes for spec in synthetic.specs(made))
    assert total / 1e9 == pytest.approx(15.23, abs=0.005)
    head_dim = made['hidden_size'] // made['num_attention_heads']
    per_token = 2 * made['num_hidden_layers'] * made['num_key_value_heads'] * head_dim * 2
    assert per_token == 56 * 1024


def test_shape_with_experts_has_the_parameters_of_its_name():
    """Of 30.5 billion, a step reads 3.3: all but the embedding, and 8 of 128 experts."""
    made = synthetic.config('qwen3-30b-a3b')
    sizes = {spec.name: spec.bytes // 2 for spec in synthetic.specs(made)}
    assert sum(sizes.values()) / 1e9 == pytest.approx(30.5, abs=0.05)
    experts = sum(size for name, size in sizes.items() if '.experts.' in name)
    assert (sum(sizes.values()) - experts * 120 / 128) / 1e9 == pytest.approx(3.3, abs=0.1)


@pytest.mark.parametrize('shape', synthetic.SHAPES)
@pytest.mark.parametrize('quantization', synthetic.DESCRIBED)
def test_described_folder_is_complete_and_takes_no_space(tmp_path, monkeypatch, shape,
                                                         quantization):
    """With two layers, as all are alike; some shapes have experts with many names."""
    monkeypatch.setitem(
        synthetic.SHAPES, shape, {**synthetic.SHAPES[shape], 'num_hidden_layers': 2})
    synthetic.describe(tmp_path, shape, quantization)
    found = checkpoint.inspect(tmp_path)
    group = 64 if shape == 'smollm2-135m' else 128          # its 576 columns are 9 times 64
    assert found.quantization == {
        'none': 'none', 'gptq': f'gptq-int4-g{group}', 'awq': f'awq-int4-g{group}', 'fp8': 'fp8',
        'w4a16': f'compressed-tensors-int4-g{group}',
        'w8a16': 'compressed-tensors-int8',
        'nvfp4': 'compressed-tensors-float4-g16'}[quantization]
    assert found.weight_bytes == sum(
        spec.bytes for spec in synthetic.specs(synthetic.config(shape, quantization)))
    used_bytes = (tmp_path / 'model.safetensors').stat().st_blocks * 512
    assert used_bytes < 1_000_000


def test_tokenizer_has_the_vocabulary_size_of_the_shape(tmp_path):
    """It encodes text as the embedded model does, and its ids are contiguous."""
    tokenizers = pytest.importorskip('tokenizers')
    synthetic.describe(tmp_path, 'qwen2.5-0.5b')
    wide, small = (tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json')) for folder in (
        tmp_path, Path(synthetic.__file__).parents[1] / 'models' / 'tiny_planner'))
    ids = wide.get_vocab()
    assert sorted(ids.values()) == [*range(151936)]
    assert small.get_vocab().items() <= ids.items()
    assert wide.encode('Bring the cup.').ids == small.encode('Bring the cup.').ids


def test_rejects_unknown_shapes_and_formats(tmp_path):
    with pytest.raises(ValueError, match="unknown shape 'gpt-5'.*qwen2.5-7b"):
        synthetic.config('gpt-5')
    with pytest.raises(ValueError, match="unknown quantisation 'int3'"):
        synthetic.config('tiny', 'int3')
    with pytest.raises(ValueError, match='nf4 needs stored weights'):
        synthetic.describe(tmp_path, 'tiny', 'nf4')


def test_written_weights_have_the_same_deviation_in_every_format(tmp_path):
    torch = pytest.importorskip('torch')
    from safetensors.torch import load_file
    name = 'model.layers.1.mlp.down_proj'
    spread = {}
    for quantization in synthetic.QUANTIZATIONS:
        folder = tmp_path / quantization
        synthetic.write(folder, 'tiny', quantization, seed=3)
        tensors = load_file(folder / 'model-00001.safetensors')
        assert checkpoint.inspect(folder).weight_bytes == sum(
            tensor.nbytes for tensor in tensors.values())
        spread[quantization] = _float_weight(torch, tensors, name, quantization).std().item()
    assert spread == pytest.approx(dict.fromkeys(spread, synthetic.STD), rel=0.05)


def _float_weight(torch, tensors, name, quantization):
    """Dequantise one matrix by the definition of its format, [in, out] or [out, in]."""
    if quantization == 'none':
        return tensors[f'{name}.weight'].float()
    if quantization == 'nf4':
        packed = tensors[f'{name}.weight'].flatten()
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
        values = tensors[f'{name}.weight.quant_map'][codes]
        return values * tensors[f'{name}.weight.absmax'].repeat_interleave(64)
    shifts = torch.arange(0, 32, 4)
    if quantization == 'w4a16':
        codes = (tensors[f'{name}.weight_packed'][:, :, None] >> shifts & 15).flatten(1, 2) - 8
        return codes * tensors[f'{name}.weight_scale'].float().repeat_interleave(128, 1)
    if quantization == 'w8a16':
        return tensors[f'{name}.weight'] * tensors[f'{name}.weight_scale'].float()
    if quantization == 'nvfp4':
        packed = tensors[f'{name}.weight_packed']
        codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1).long()
        table = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])
        scales = tensors[f'{name}.weight_scale'].float() / tensors[f'{name}.weight_global_scale']
        return torch.cat((table, -table))[codes] * scales.repeat_interleave(16, 1)
    if quantization == 'fp8':
        scales = tensors[f'{name}.weight_scale_inv'].repeat_interleave(128, 0)
        return tensors[f'{name}.weight'].float() * scales.repeat_interleave(128, 1)
    words, zeros = tensors[f'{name}.qweight'], tensors[f'{name}.qzeros']
    if quantization == 'gptq':        # eight rows per word; the stored zero point is 1 too small
        codes = (words[:, None, :] >> shifts[:, None] & 15).flatten(0, 1)
    else:                             # eight columns per word
        codes = (words[:, :, None] >> shifts & 15).flatten(1, 2)
    points = (zeros[:, :, None] >> shifts & 15).flatten(1, 2) + (quantization == 'gptq')
    scales = tensors[f'{name}.scales'].float()
    group = torch.arange(codes.shape[0]) // 128
    return (codes - points[group]) * scales[group]


def test_written_weights_are_sharded_and_reproducible(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, 'SHARD_BYTES', 1_000_000)
    for folder in ('one', 'two'):
        synthetic.write(tmp_path / folder, 'tiny', seed=5)
    files = sorted(path.name for path in (tmp_path / 'one').glob('*.safetensors'))
    assert len(files) > 5
    for name in files:
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()
    index = json.loads((tmp_path / 'one' / 'model.safetensors.index.json').read_text())
    assert set(index['weight_map']) == set(checkpoint.inspect(tmp_path / 'one').tensors)


@pytest.mark.parametrize(('first', 'then'), [
    (synthetic.describe, synthetic.write), (synthetic.write, synthetic.describe)])
def test_rewrites_a_folder_of_random_weights(tmp_path, monkeypatch, first, then):
    monkeypatch.setattr(synthetic, 'SHARD_BYTES', 1_000_000)
    first(tmp_path / 'twice', 'tiny', seed=1)
    then(tmp_path / 'twice', 'tiny', seed=2)
    then(tmp_path / 'once', 'tiny', seed=2)
    twice, once = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                   for name in ('twice', 'once'))
    assert twice == once


def test_rewritten_folder_has_no_config_until_it_is_complete(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError('no space left')
    synthetic.describe(tmp_path, 'tiny')
    monkeypatch.setattr(synthetic, '_make', fail)
    with pytest.raises(OSError, match='no space left'):
        synthetic.write(tmp_path, 'tiny')
    assert not (tmp_path / 'config.json').exists()


@pytest.mark.parametrize('name', ['config.json', 'model-00001-of-00002.safetensors'])
@pytest.mark.parametrize('mode', [[], ['--shapes-only']])
def test_keeps_a_folder_with_another_model(tmp_path, capsys, name, mode):
    (tmp_path / name).write_text('{}')
    arguments = ['--synthetic', 'tiny', '--write-checkpoint', str(tmp_path), *mode]
    assert bench.main(arguments) == 2
    assert 'has a model that was not created here' in capsys.readouterr().err
    synthetic.forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_reports_too_little_space_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic.shutil, 'disk_usage', lambda folder: type('U', (), {'free': 1}))
    with pytest.raises(OSError, match='needs 15.2 GB for the random weights, but 0.0 GB are free'):
        synthetic.write(tmp_path, 'qwen2.5-7b')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('engine', 'quantization', 'written'), [
    ('native', 'none', False), ('native', 'gptq', False), ('transformers', 'none', False),
    ('native', 'gptq', True),
    *(('native', kind, written) for kind in ('awq', 'w4a16', 'w8a16', 'fp8')
      for written in (False, True))])
def test_engines_run_random_weights(tmp_path, engine, quantization, written):
    pytest.importorskip('torch')
    from physai_decode import engines
    make = synthetic.write if written else synthetic.describe
    make(tmp_path, 'tiny', quantization)
    built = engines.build(checkpoint.open(str(tmp_path)), EngineConfig(
        name=engine, device='cpu', max_context=64, cpu_threads=1))
    try:
        steps = list(DecodeLoop(built).stream([5, 6, 7], SamplingConfig(max_new_tokens=4)))
        assert sum(len(step.token_ids) for step in steps) == 4
        assert built.footprint.checkpoint_weight_bytes == sum(
            spec.bytes for spec in synthetic.specs(synthetic.config('tiny', quantization)))
    finally:
        built.close()


# --- running cases ------------------------------------------------------------------------------

@pytest.fixture
def lines():
    """Return the list that receives the lines of progress."""
    return []


@pytest.fixture
def runner(tmp_path, lines):
    return Runner(tmp_path / 'out', tmp_path / 'models', progress=lines.append)


def test_blocking_wait_is_another_case():
    """A run that is resumed with or without it does not take the results of the other."""
    polls, sleeps = (bench._cases(bench._parser().parse_args(options))[0]
                     for options in ([], ['--blocking-wait']))
    assert not polls.engine.blocking_wait and sleeps.engine.blocking_wait
    assert polls.key() != sleeps.key()
    assert Case.from_dict(sleeps.to_dict()) == sleeps


def finish(case_path, result_path):
    """Write the result of a case, as its session does."""
    of = Case.from_dict(json.loads(case_path.read_text()))
    result_path.write_text(json.dumps(done(of, [0.001, 0.002], of.contexts)))


@pytest.fixture
def started(monkeypatch):
    """Let each session end at once; return a list of the cases of those that started."""
    def process(self, case_path, result_path, log_path, timeout_s):
        started.append(case_path)
        log_path.write_text('')
        finish(case_path, result_path)
    started = []
    monkeypatch.setattr(Runner, '_process', process)
    return started


def test_does_not_repeat_a_measured_case(runner, lines, started):
    first = runner.run([case('one'), case('two')])
    again = runner.run([case('one'), case('two'), case('three')])
    assert len(started) == 3
    assert again[:2] == [{**result, 'kept': True} for result in first]
    assert any('already measured' in line for line in lines)
    assert first[0]['case'] == json.loads(json.dumps(case('one').to_dict()))
    runner.again = True
    assert runner.run([case('one')]) == first[:1]
    assert len(started) == 4
    kept, = runner.sessions.glob('*.old')
    assert json.loads(kept.read_text()) == first[0]


def test_measures_again_after_a_change(runner, lines, monkeypatch, tmp_path, started):
    folder = tmp_path / 'model'
    folder.mkdir()
    (folder / 'config.json').write_text('{}')
    of = case('one', source=ModelSource(path=str(folder)))

    def run():
        lines.clear()
        assert runner.run([of])[0]['status'] == 'done'
        return len(started), [line for line in lines if 'measured' in line]

    assert run() == (1, [])
    assert run()[0] == 1
    (folder / 'config.json').write_text('{"rebuilt": true}')
    assert run() == (2, ['  measured again, as these have changed: model'])
    kept = run()
    assert kept[0] == 2 and 'already measured' in kept[1][0]
    own = machine.packages
    monkeypatch.setattr(machine, 'packages', lambda: {**own(), 'torch': '0.1'})
    assert run() == (3, ['  measured again, as these have changed: packages'])
    monkeypatch.setattr(provenance, '_PACKAGE', folder)
    assert run() == (4, ['  measured again, as these have changed: code'])
    result, = runner.sessions.glob('*.json')
    assert json.loads(result.with_suffix('.old').read_text())['status'] == 'done'
    with editing(result) as older:
        del older['provenance']         # as an earlier version wrote it
    assert run() == (5, ['  measured again, as these have changed: model, code, packages, '
                         'machine'])


def test_provenance_of_odd_files_and_of_a_hub_model(tmp_path, monkeypatch):
    (tmp_path / os.fsdecode(b'na\xffme')).touch()
    before = provenance.provenance(str(tmp_path))
    assert provenance.changes(before, provenance.provenance(str(tmp_path))) == []
    monkeypatch.setattr('physai_decode.checkpoint._download',
                        lambda *given: pytest.fail('a download'))
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    assert provenance.provenance('nobody/nothing')['model'] == provenance.provenance('')['model']
    monkeypatch.setattr(machine, 'gpus', lambda: ['GPU-2'])
    assert provenance.changes(before, provenance.provenance(str(tmp_path))) == ['machine']


def test_repeats_only_a_session_that_died(runner, monkeypatch):
    fails = [True]

    def process(self, case_path, result_path, log_path, timeout_s):
        log_path.write_text('first line\nSegmentation fault\n\n')
        if 'two' in case_path.name and fails:
            return f'ended with code {-11}'
        finish(case_path, result_path)
        return None
    monkeypatch.setattr(Runner, '_process', process)
    cases = [case('one'), case('two'), case('three')]
    results = runner.run(cases)
    assert [result['status'] for result in results] == ['done', 'died', 'done']
    assert 'ended with code -11' in results[1]['error']
    assert 'Segmentation fault' in results[1]['error']
    shown = report.steps(results).text()
    assert 'died' in shown and 'Segmentation fault' in shown
    assert 'missing; the same command runs it again' in report.sessions(results).rows[0]
    fails.clear()
    results = runner.run(cases)
    assert [result['status'] for result in results] == ['done'] * 3
    one, two, three = report.sessions(results).rows
    assert two[0] == 'two' and 'Segmentation fault' in two[1] and 'done' in two[2]
    assert (one[0], one[2]) == ('one', 'reused') and (three[0], three[2]) == ('three', 'reused')
    # A third run measures nothing, and still reports the session that died.
    assert report.sessions(runner.run(cases)).rows[1] == two


def end_sessions(monkeypatch, ends, measured=False):
    """Let each session end as the next of ``ends`` says."""
    def process(self, case_path, result_path, log_path, timeout_s):
        log_path.write_text('Segmentation fault')
        end = ends.pop(0)
        if measured or end == 'done':       # a session saves its result before it times kernels
            finish(case_path, result_path)
        if end == 'interrupted':
            raise KeyboardInterrupt
    monkeypatch.setattr(Runner, '_process', process)


@pytest.mark.parametrize('measured', [False, True])
def test_reports_a_session_interrupted_with_its_run(runner, monkeypatch, measured):
    ends = ['interrupted', 'interrupted', 'done']
    end_sessions(monkeypatch, ends, measured)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            runner.run([case('one')])
    rows = report.sessions(runner.run([case('one')])).rows
    assert [row[:2] for row in rows] == [['one', 'the session was interrupted with its run']] * 2
    assert ends == []
    assert [path.suffix for path in runner.sessions.iterdir()] == ['.json']


def test_reports_a_session_that_died_and_was_then_interrupted(runner, monkeypatch):
    end_sessions(monkeypatch, ['died', 'interrupted', 'done'])
    runner.run([case('one')])
    with pytest.raises(KeyboardInterrupt):
        runner.run([case('one')])
    died, interrupted = report.sessions(runner.run([case('one')])).rows
    assert 'Segmentation fault' in died[1] and 'interrupted' in interrupted[1]


_PARENT = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(2000)'])
Path(sys.argv[2]).with_suffix('.child').write_text(str(child.pid))
print('started', flush=True)
time.sleep(float(sys.argv[-1]))
"""


@pytest.mark.parametrize(('end', 'parent_s'), [
    ('time-out', 2000), ('Ctrl-C', 2000), ('normal', 0)])
def test_processes_of_a_session_end_with_it(runner, monkeypatch, end, parent_s):
    popen, started = subprocess.Popen, threading.Event()

    def start(command, **more):
        process = popen([sys.executable, '-c', _PARENT, *command[-2:], str(parent_s)], **more)
        wait = process.wait         # its time begins when the child has started
        process.wait = lambda timeout=None: started.wait(60) and wait(timeout)
        return process

    def progress(line):
        if 'started' in line:
            started.set()
            if end == 'Ctrl-C':
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner_module.subprocess, 'Popen', start)
    runner.progress = progress
    if end == 'Ctrl-C':
        with pytest.raises(KeyboardInterrupt):
            runner.run([case()])
    else:
        if end == 'time-out':
            runner.session_timeout_s = 0.05
        result, = runner.run([case()])      # does not wait for the child, which sleeps for 2000 s
        assert ('was killed after' in result['error']) == (end == 'time-out')
    pid, = runner.sessions.glob('*.child')
    wait_for(lambda: _ended(int(pid.read_text())))


def _ended(pid):
    """Return whether a process has ended, or is a zombie."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] in 'ZX'
    except OSError:
        return True


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGHUP])
def test_terminated_run_ends_its_session(tmp_path, signum):
    command = [sys.executable, '-m', 'physai_decode.bench', '--synthetic', 'tiny', '--engines',
               'native', '--contexts', '64', '--device', 'cpu', '--out', str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as run:
        line = next(line for line in run.stdout if 'looking for' in line)   # from the session
        run.send_signal(signum)
        assert run.wait(120) == 130, line
        assert 'to resume, run' in run.stderr.read()
    path, = (tmp_path / 'sessions').glob('*.json')
    assert 'interrupted with its run' in json.loads(path.read_text())['error']


def test_each_context_of_a_case_that_can_not_run_has_a_cell():
    of = case('big', (64, 128, 256))
    result = {'case': of.to_dict(), 'status': 'unavailable', 'error': 'not enough memory',
              'contexts': [{'context': 256, 'error': '20 GB are needed'}]}
    table = report.steps([result])
    assert [(row[2], row[3]) for row in table.rows] == [
        ('256', 'n/a'), ('64', 'unavailable'), ('128', 'unavailable')]
    assert table.notes[1:3] == ['big at 256: 20 GB are needed', 'big: not enough memory']


def test_growth_covers_all_results_of_an_engine():
    static = case('static', (64, 128), engine=EngineConfig(name='transformers'))
    results = [done(replace(each, session=session), [median], each.contexts)
               for session, medians in (('01 A', (0.010, 0.012)), ('02 A', (0.020, 0.022)))
               for each, median in zip(suites.split_static(static), medians, strict=True)]
    table = report.steps(results)
    column = table.columns.index('growth')
    assert [row[column] for row in table.rows] == ['1.00', '1.20', '1.00', '1.10']


def test_notes_define_the_columns_of_the_step_table():
    table = report.steps([done(case(contexts=(2048,)), [0.010])])
    assert 'prefill ms' in table.columns
    assert re.search(r' prefill: .+ first token', table.notes[-1])


def test_separates_the_import_of_an_engine_from_its_process():
    result = done(case(contexts=(2048,)), [0.010])
    result['startup']['parts'] = {'import_s': 0.4, 'load_s': 1.5}
    table = report.startup([result])
    assert len(set(table.columns)) == len(table.columns)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row['modules s'], row['import s']) == ('1.0', '0.4')


def test_advice_of_the_verdict_fits_the_engine():
    result = done(case(contexts=(2048,)), [0.010])
    result['contexts'][0]['floor_read_s'] = 0.001
    result['footprint'].update(engine='native', details={'kernels': 'triton 3.6.0'},
                               slow_format=True)
    (_, _, verdict), = report.verdicts([result]).rows
    assert verdict.startswith('kernels: 8 of 10 ms')
    assert verdict.endswith('such as GPTQ of four bits')


def test_host_gap_is_the_time_without_a_kernel():
    results = [done(case(contexts=(2048,)), [0.010])]
    on_cpu = report.parts(results)
    assert on_cpu.columns[-2:] == ['host gap', '%'] and 'captured' not in on_cpu.text()
    results[0]['footprint']['device'] = 'cuda:0'
    assert report.split(results[0]['contexts']) == pytest.approx([0.005, 0.004, 0.001])
    results[0]['contexts'][0]['kernels'] = [{'step_s': 0.004}, {'step_s': 0.002}]
    assert report.split(results[0]['contexts']) == pytest.approx([0.005, 0.001, 0.004])
    results.append(done(case(contexts=(2048,), session='02 B'), [0.020]))     # not profiled
    row, = report.parts(results).rows
    assert row[2:4] == ['15.000', '7.500'] and row[-1] == 'as a whole'


@pytest.mark.parametrize('device', ['cpu', 'cuda:0'])
@pytest.mark.parametrize('name', ['--kernels', '--blocking-wait'])
def test_tells_that_an_option_has_no_effect_on_a_cpu(name, device):
    result = done(case('native'), [0.010])
    result['footprint']['device'] = device
    options = bench._parser().parse_args([name, '--contexts', '2048'])
    notes = bench._tables(options, [result])[0].notes
    assert any(f'{name} has no effect on a CPU' in note for note in notes) == (device == 'cpu')


def test_counts_the_wait_for_a_core():
    """Threads that share one core wait for it half of the time."""
    if machine.waited_s() is None:
        pytest.skip('this kernel does not count it')
    core = min(os.sched_getaffinity(0))
    end_s, before_s = time.monotonic() + 0.5, machine.waited_s()

    def loop():
        os.sched_setaffinity(0, {core})
        while time.monotonic() < end_s:
            hashlib.sha256(bytes(2**20))        # without the interpreter's lock

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.45)
    assert machine.waited_s() - before_s > 0.1
    for thread in threads:
        thread.join()


def test_warns_if_the_steps_were_disturbed():
    """A p95 of 1.5 times p50, or a step that is 5 % shorter in a longer context, is noise."""
    results = [done(case('one', contexts=(64, 128)), [0.010, 0.0095], (64, 128)),
               done(case('two', contexts=(64, 128), session='01 A'), [0.010, 0.010], (64, 128))]
    results[1]['contexts'][1]['itl_p95_s'] = 0.015
    assert report.unsteady(results) == []
    results[0]['contexts'][1].update(itl_p50_s=0.008)
    results[1]['contexts'][1]['itl_p95_s'] = 0.031
    warning, = report.unsteady(results)
    assert warning.startswith('Unsteady: one at 128 (growth is 0.80), '
                              '01 A two at 128 (p95 is 3.1 times p50). The machine was busy')
    results = results[:1]
    results[0]['contexts'][1].update(itl_p50_s=0.010, waited=0.1)
    assert report.unsteady(results) == []
    results[0]['contexts'][1]['waited'] = 1.234         # two threads
    warning, = report.unsteady(results)
    assert warning.startswith('Unsteady: one at 128 (waited for a core 123 % of the time). The')
    many = [done(case(f'case {number}', contexts=(64,)), [0.010], (64,)) for number in range(9)]
    for result in many:
        result['contexts'][0]['itl_p95_s'] = 0.020
    assert 'case 5 at 64 (p95 is 2.0 times p50), 3 more. The' in report.unsteady(many)[0]


def test_says_why_there_is_no_floor_and_why_more_is_read_than_stored():
    result = done(case(contexts=(2048,)), [0.010])
    assert report.floors([result]).notes == [report.FLOORS]
    result['peak'] = {'bytes_per_s': 1e9, 'source': 'measured', 'no_floor': 'the cache is faster'}
    result['footprint'].update(read_weight_bytes=2, checkpoint_weight_bytes=1)
    tables = [table([result]) for table in (report.steps, report.floors, report.parts)]
    assert all('No floor: the cache is faster.' in table.notes for table in tables)
    assert 'wider number format' in tables[1].notes[-1]
    result['peak'] = vars(Peak(None, 'unknown'))
    assert 'No floor: the peak bandwidth is unknown; set --peak-gb-s.' in report.steps(
        [result]).notes


def test_step_table_describes_the_device_that_ran():
    result = done(case(contexts=(2048,)), [0.010])
    assert 'the computation of the step' in report.steps([result]).notes[-1]
    result['footprint']['device'] = 'cuda:0'
    assert 'between two events' in report.steps([result]).notes[-1]


def test_command_reports_disturbed_and_reused_results(monkeypatch, tmp_path, capsys):
    results = [{**done(case(name, contexts=(64,)), [0.010], (64,)), 'date': date, 'kept': kept}
               for name, date, kept in (('one', '2026-11-01T10:00:00Z', True),
                                        ('two', '2026-11-02T10:00:00Z', False))]
    results[1]['contexts'][0]['itl_p95_s'] = 0.020
    seen = []
    monkeypatch.setattr(Runner, 'run', lambda self, cases: seen.append(self.again) or results)
    assert bench.main(['--again', '--out', str(tmp_path)]) == 0
    assert seen == [True]
    shown, markdown = capsys.readouterr(), (tmp_path / 'report.md').read_text()
    assert shown.err.startswith('decode_bench: Unsteady: two at 64 (p95 is 2.0 times p50)')
    for note in ('Unsteady: two at 64', '1 of 2 results are reused from an earlier run, of '
                 '2026-11-01T10:00:00Z; --again measures', '| one | measured by an earlier run, '
                 '2026-11-01T10:00:00Z | reused |'):
        assert note in markdown


@pytest.mark.parametrize('again', [False, True])
def test_says_how_to_resume(again, monkeypatch, tmp_path, capsys):
    def interrupt(self, cases):
        raise KeyboardInterrupt
    monkeypatch.setattr(Runner, 'run', interrupt)
    assert bench.main(['--out', str(tmp_path), *['--again'] * again]) == 130
    assert ('and without --again' in capsys.readouterr().err) == again


@pytest.mark.parametrize(('tokens', 'line'), [(30, 'maximum'), (200, 'p99')])
def test_plots_name_the_maximum_of_few_tokens_and_disturbed_steps(tokens, line, monkeypatch,
                                                                  tmp_path):
    pyplot = pytest.importorskip('matplotlib.pyplot')
    result = done(case(contexts=(64,)), [0.010], (64,))
    result['contexts'][0].update(itl_s=[0.010] * tokens, itl_p95_s=0.001 * tokens)
    drawn = []
    monkeypatch.setattr(pyplot, 'close', drawn.append)
    plots.draw([result], tmp_path)
    step_time, latencies = drawn[0].axes[0], drawn[2].axes[0]
    assert [text.get_text() for text in latencies.texts] == ['p50', line]
    assert 'unsteady' in step_time.texts[0].get_text()


def test_session_that_dies_in_the_profiler_keeps_its_measurements(runner, monkeypatch):
    def process(self, case_path, result_path, log_path, timeout_s):
        log_path.write_text('')
        finish(case_path, result_path)
        return 'was killed after 600 s'
    monkeypatch.setattr(Runner, '_process', process)
    result, = runner.run([case('one')])
    assert result['status'] == 'done'
    assert 'one: no kernel table: the session was killed after 600 s' in report.steps(
        [result]).text()


def test_ends_a_real_session_at_its_time_limit(tmp_path, lines):
    runner = Runner(tmp_path / 'out', tmp_path / 'models', session_timeout_s=0.05,
                    progress=lines.append)
    result, = runner.run([case()])
    assert result['status'] == 'died' and 'was killed after' in result['error']


def test_reports_the_signal_of_a_killed_session(runner, processes):
    def kill():
        process, = processes
        process.kill()
    runner.progress = lambda line: kill() if 'looking for' in line else None
    result, = runner.run([case()])
    assert result['status'] == 'died' and 'was killed by SIGKILL' in result['error']


@pytest.mark.parametrize('words', ['', 'writing model-00001.safetensors'])
def test_reports_the_signal_of_a_killed_checkpoint_writer(runner, monkeypatch, words):
    run = subprocess.run
    monkeypatch.setattr(runner_module.subprocess, 'run', lambda command, **more: run(
        ['sh', '-c', f'echo "{words}"; kill -9 $$'], **more))
    result, = runner.run([case(source=ModelSource(synthetic='tiny', written=True))])
    assert result['status'] == 'unavailable'
    assert result['error'] == ('no checkpoint: its writer was killed by SIGKILL; its last line: '
                               + (words or '(empty)'))


def test_reports_missing_packages_without_a_process(runner, monkeypatch):
    monkeypatch.setattr(runner_module.subprocess, 'Popen', None)
    result, = runner.run([case(requires=('no_such_module',))])
    assert result['status'] == 'unavailable'
    assert result['error'] == (
        f'not installed: no_such_module ({sys.executable} -m pip install no_such_module)')


def test_starts_nothing_after_the_time_limit(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(runner_module.subprocess, 'Popen', None)
    runner = Runner(tmp_path / 'out', tmp_path / 'models', budget_s=1e-9, progress=lines.append)
    result, = runner.run([case()])
    assert 'not started' in result['error']


# --- tables -------------------------------------------------------------------------------------

def test_tables_align_and_escape():
    table = Table('T', ['name', 'ms'], [['a|b', '1.5'], ['<c>', 'n/a']], ['a note'])
    assert table.text().splitlines()[4] == 'a|b   1.5'
    assert '| a\\|b | 1.5 |' in table.markdown()
    assert '<td>&lt;c&gt;</td>' in table.html() and '<td class="n">n/a</td>' in table.html()


def test_measured_peak_is_the_best_of_all_sessions():
    results = [done(case(), [0.01]), done(case(), [0.01])]
    for result, rate in zip(results, (10e9, 20e9), strict=True):
        result['peak'] = {'bytes_per_s': rate, 'source': 'measured'}
    report.same_peak(results)
    assert [result['peak']['bytes_per_s'] for result in results] == [20e9, 20e9]
    assert [result['contexts'][0]['r_read'] for result in results] == [0.25, 0.5]


def test_target_table_has_values_and_verdicts():
    cases = suites.targets('qwen2.5-7b', [2048, 16384], EngineConfig())
    times = {suites.NATIVE: 0.004, suites.EAGER: 0.017, suites.GPTQ: 0.0021}
    results = [done(each, [times.get(each.label, 0.005)] * len(each.contexts), each.contexts)
               for each in cases]
    rows = {row[0]: row[2:] for row in suites.target_table(results, [2048, 16384]).rows}
    assert rows['native at 2048: checkpoint floor / step'] == ['0.750', 'yes']
    assert rows['native at 2048: times as fast as transformers eager'] == ['4.250', 'yes']
    assert rows['GPTQ native at 2048: times as fast as native'] == ['1.905', 'no']
    assert rows['native, long run: p99 / p50 over 9 tokens'] == ['1.020', 'yes']
    missing = suites.target_table(results[1:2], [2048, 16384]).rows
    assert all(row[3] in ('not measured', '') for row in missing)


@pytest.mark.parametrize(('context', 'warmup', 'steps'), [
    (2048, 5, 1000), (1024, 30, 992), (1024, 5, 1000), (64, 40, 22)])
def test_long_runs_of_targets_fit_their_context(context, warmup, steps):
    for each in suites.targets('tiny', [context], EngineConfig(), steps=5, warmup=warmup):
        if each.label in (suites.LONG, suites.GPTQ_LONG):
            assert each.steps == steps
        assert each.warmup == warmup
        session.measure(FakeEngine(), each.contexts[0], each.warmup, each.steps, PEAK)


def test_paper_protocol_has_all_paths_and_figures():
    cases = suites.paper('qwen2.5-7b', [2048, 4096], EngineConfig(), steps=30)
    assert [(each.contexts, each.kernels) for each in cases if each.label == suites.CAPTURED] == [
        ((2048,), True), ((4096,), False)]
    results = [done(each, [0.010] * len(each.contexts), each.contexts) for each in cases[:-2]]
    results[0]['contexts'][0]['itl_p50_s'] = 0.015
    results += [{'case': each.to_dict(), 'status': 'unavailable', 'contexts': [],
                 'error': 'not installed: gptqmodel'} for each in cases[-2:]]
    beside = {row[0]: row[1:] for row in suites.paper_table(results, 2048).rows}
    assert beside['transformers eager: ms'] == ['16.97', '62.32', '15.000']
    assert beside['transformers captured: times as fast as eager'] == ['1.259', '1.028', '1.500']
    assert beside['AWQ (GPTQModel): times as fast as transformers eager'] == ['', '1.38', 'n/a']
    quantized = suites.quantized_table(results, 2048)
    assert [row[0] for row in quantized.rows] == [
        'transformers eager', 'transformers captured', 'native', 'nf4 (bitsandbytes)',
        'GPTQ native', 'GPTQ (ExLlamaV2)', 'GPTQ (GPTQModel)', 'AWQ (GPTQModel)']
    assert 'AWQ (GPTQModel): not installed: gptqmodel' in quantized.notes


def test_paper_plots_distinguish_all_paths(tmp_path, monkeypatch):
    plots = pytest.importorskip('physai_decode.benchmark.plots')
    pyplot = pytest.importorskip('matplotlib.pyplot')
    cases = suites.paper('qwen2.5-7b', [2048, 4096], EngineConfig(), steps=30)
    results = [done(each, [0.002 * 1.5**number] * len(each.contexts), each.contexts)
               for number, each in enumerate(cases)]
    for result in results:
        result['footprint']['device'] = 'cuda:0'
    results[0]['contexts'][0]['kernels'] = [{'step_s': 0.001}]
    assert len({plots._COLOURS[i] for i in range(len({each.label for each in cases}))}) == 8
    drawn = []
    monkeypatch.setattr(pyplot, 'close', drawn.append)
    assert len(plots.draw(results, tmp_path)) == 4
    assert drawn[0].axes[0].get_yscale() == 'log'
    rows = [label.get_text() for label in drawn[3].axes[0].get_yticklabels()]
    assert rows[-2:] == ['transformers eager, 4,096 *', 'transformers eager, 2,048']


def test_realised_saving_is_time_over_traffic():
    dense, gptq = (ModelSource(synthetic='tiny', quantization=name) for name in ('none', 'gptq'))
    bf16 = done(Case(suites.NATIVE, EngineConfig(), dense, (2048,)), [0.010])
    int4 = done(Case(suites.GPTQ, EngineConfig(), gptq, (2048,)), [0.007])
    bf16['footprint']['read_weight_bytes'] = 4_000_000
    int4['footprint']['read_weight_bytes'] = 1_000_000
    first, row = suites.quantized_table([bf16, int4], 2048).rows
    assert first[3:] == ['0.004', '', '', '', '']
    assert row[4:] == ['native', '75.0', '30.0', '40.0']


# --- the command --------------------------------------------------------------------------------

@pytest.mark.parametrize(('arguments', 'wrong'), [
    (['--contexts', '20'], '--contexts 20'), (['--engines', 'nativ'], 'engine.name'),
    (['--quantization', 'gptq'], 'needs --synthetic'),
    (['--paper', '--synthetic', 'tiny', '--quantization', 'gptq'], 'choose the quantisation'),
    (['--targets', '--quantization', 'nf4', 'gptq'], 'choose the quantisation'),
    (['--paper', '--model', 'x'], 'need --synthetic SHAPE instead of --model'),
    (['--model', 'x', '--synthetic', 'tiny'], 'exclude each other'),
    (['--ab', 'native', 'native'], 'two different engines'),
    *((['--peak-gb-s', value], f'--peak-gb-s {value}: expected 0 to')
      for value in ('-5', 'nan', 'inf')),
    *((['--session-timeout-s', value], f'--session-timeout-s {value}: expected 1 to')
      for value in ('0', '-1', 'nan', 'inf')),
    (['--budget-s', '-1'], '--budget-s -1: expected 0 to'),
    (['--paper', '--cpu-threads', '-1'], 'engine.cpu_threads is -1'),
    (['--constraint', 'no/such/file'], '--constraint no/such/file: '),
    (['--constraint', __file__], 'is not valid JSON'),
    (['--write-checkpoint', 'x'], 'needs --synthetic'), (['--steps', '0'], '--steps')])
def test_rejects_wrong_arguments(arguments, wrong, capsys, tmp_path):
    assert bench.main([*arguments, '--out', str(tmp_path)]) == 2
    assert wrong in capsys.readouterr().err


def test_expands_the_home_folder_in_a_path(monkeypatch, tmp_path):
    """A shell does not expand the ~ in --out=~/results."""
    monkeypatch.setenv('HOME', str(tmp_path))
    options = bench._parser().parse_args(
        ['--out=~/results', '--models=~/models', '--write-checkpoint=~/one'])
    assert options.out == tmp_path / 'results'
    assert options.models == tmp_path / 'models'
    assert options.write_checkpoint == tmp_path / 'one'


@pytest.mark.parametrize('out', ['file', 'file/below'])
def test_reports_a_result_folder_that_can_not_be_created(out, capsys, tmp_path):
    (tmp_path / 'file').write_text('content')
    assert bench.main(['--out', str(tmp_path / out)]) == 2
    assert f'--out {tmp_path / out}: cannot create the folder' in capsys.readouterr().err
    assert (tmp_path / 'file').read_text() == 'content'


@pytest.mark.parametrize('suite', ['--paper', '--targets'])
def test_seed_applies_to_all_random_weights(suite, monkeypatch, tmp_path):
    run_cases = []
    monkeypatch.setattr(Runner, 'run', lambda self, cases: run_cases.extend(cases) or [
        done(each, [0.01] * len(each.contexts), each.contexts) for each in cases])
    arguments = [suite, '--synthetic', 'tiny', '--seed', '7', '--out', str(tmp_path)]
    assert bench.main(arguments) == 0
    assert {each.source.seed for each in run_cases} == {7}


class _TagChecker(HTMLParser):
    """Checks that every tag is closed, and collects the images."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.images = []

    def handle_starttag(self, tag, attrs):
        if tag == 'img':
            self.images.append(dict(attrs)['src'])
        elif tag != 'meta':
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_run_on_the_cpu_writes_the_complete_report(tmp_path, capsys):
    pytest.importorskip('torch')
    arguments = ['--synthetic', 'tiny', '--engines', 'native', 'transformers', 'exllamav2',
                 '--contexts', '64', '128', '--steps', '4', '--warmup', '1', '--device', 'cpu',
                 '--cpu-threads', '1', '--peak-gb-s', '10', '--constraint', 'plan',
                 '--prefill', '4', '8', '--out', str(tmp_path)]
    assert bench.main(arguments) == 0
    shown = capsys.readouterr().out
    assert '[2/3] transformers: tiny, random weights, bf16' in shown
    assert 'mask: on the host; a GPU computes meanwhile' in ' '.join(shown.split())
    written = json.loads((tmp_path / 'results.json').read_text())
    assert written['command'].startswith('decode_bench --synthetic tiny')
    native, eager, missing = written['results']
    assert missing['status'] == 'unavailable'
    for result in (native, eager):
        assert [len(cell['itl_s']) for cell in result['contexts']] == [4, 4]
        assert all(cell['itl_p50_s'] > 0 and math.isfinite(cell['r_read'])
                   for cell in result['contexts'])
        assert result['machine']['packages']['torch']
        assert result['startup']['first_tokens_s'] >= result['startup']['build_s']
        assert [each['tokens'] for each in result['prompts']] == [4, 8]
        # The tokenizer of random weights has the vocabulary size of the shape.
        masked = result['contexts'][0]['masked']
        for name in ('free', 'masked', 'mask'):
            assert len(masked[f'{name}_s']) >= 40
            assert 0 < masked[f'{name}_p50_s'] <= masked[f'{name}_p99_s']
        assert masked['ratio'] == masked['masked_p50_s'] / masked['free_p50_s']
    assert all(each['floor_operations_s'] > 0 for each in native['prompts'])
    table, = [table for table in written['tables'] if table['title'] == 'Constraint']
    assert len(table['rows']) == 4
    markdown = (tmp_path / 'report.md').read_text()
    assert 'random' in markdown and '| native | unavailable | 64 |' in markdown
    page = _TagChecker()
    page.feed((tmp_path / 'report.html').read_text())
    assert page.open == []
    if '![' in markdown:                            # matplotlib is installed
        assert len(page.images) == 5
        assert all(image.startswith('data:image/png;base64,') for image in page.images)
    assert not list((tmp_path / 'models').glob('*-weights'))
    assert bench.main(arguments) == 0
    assert capsys.readouterr().out.count('already measured') == 2


def test_command_imports_neither_torch_nor_rclpy():
    done = subprocess.run(
        [sys.executable, '-c', 'import sys, physai_decode.bench, physai_decode.benchmark.session\n'
         'print([name for name in ("torch", "rclpy", "matplotlib") if name in sys.modules])'],
        capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == '[]', done.stderr
