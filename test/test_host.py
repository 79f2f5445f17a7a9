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

"""The figures that the host keeps: the peak bandwidth, and counts over activations."""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace
import json
import re
import shutil
from types import SimpleNamespace

from fake_engine import CharacterText
from fake_engine import FakeEngine
from physai_decode import checkpoint
from physai_decode import engines
from physai_decode import host as host_module
from physai_decode.config import ChatConfig
from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import ModelConfig
from physai_decode.config import RealtimeConfig
from physai_decode.config import RemoteConfig
from physai_decode.config import RooflineConfig
from physai_decode.config import SpeculationConfig
from physai_decode.engine import EngineError
from physai_decode.host import Host
from physai_decode.host import Loaded
from physai_decode.request import Request
from physai_decode.roofline import at_clock
from physai_decode.roofline import Peak
from physai_decode.text_process import TextProcess
from physai_decode.worker import Worker
import pytest
from worker_rig import Sink
from worker_rig import TIMEOUT_S

CONFIG = DecodeConfig(model=ModelConfig(path='folder/model'))
SHEET = Peak(200e9, 'NVIDIA Jetson AGX Orin datasheet')


def hosting(warn):
    """Return a host that loads a fake engine."""
    return Host(
        Sink(), lambda config, progress: Loaded(FakeEngine(), CharacterText(), SHEET), warn)


@pytest.fixture
def host():
    """Return an active host."""
    host = hosting(print)
    host.load(CONFIG, lambda text: None)
    host.start(CONFIG)
    yield host
    assert host.stop(TIMEOUT_S)
    host.unload()


def test_a_load_warns_once_that_a_jetson_lacks_jetson_stats(monkeypatch):
    told = []
    problem = SimpleNamespace(problem='jetson-stats is not used', close=lambda: None)
    monkeypatch.setattr(host_module, 'Telemetry', lambda footprint: problem)
    host = hosting(told.append)
    host.load(CONFIG, print)
    host.unload()
    assert told == ['jetson-stats is not used']


@pytest.mark.parametrize(('found', 'visible', 'device', 'warns'), [
    (True, None, 'auto', True), (False, None, 'auto', False), (True, '', 'auto', False),
    (True, None, 'cpu', False)])
def test_a_load_warns_of_a_gpu_that_pytorch_cannot_use(
        monkeypatch, tmp_path, found, visible, device, warns):
    """On a Jetson, the PyTorch of PyPI finds no GPU."""
    told = []
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    monkeypatch.setattr(host_module, 'GPU_FILES', (str(tmp_path if found else tmp_path / 'none'),))
    host = hosting(told.append)
    host.load(replace(CONFIG, engine=EngineConfig(device=device)), print)
    host.unload()
    assert len(told) == warns
    assert all('the model runs on the CPU, because' in text for text in told)


@pytest.mark.parametrize('remote', [
    {}, {'engine': EngineConfig('openai'),
         'remote': RemoteConfig('http://127.0.0.1:9/v1', 'a/model', fallback=ModelConfig.path)}],
    ids=['local', 'server'])
def test_a_load_that_ends_at_any_step_leaves_nothing_loaded(monkeypatch, remote):
    """A node that exits can end a load at any step."""
    config = DecodeConfig(roofline=RooflineConfig(100.0), **remote)
    opened, told = [], []

    def counted(thing):
        opened.append(thing)
        monkeypatch.setattr(thing, 'close', lambda: opened.remove(thing))
        return thing

    model = checkpoint.open(config.model.path)
    with closing(TextProcess(
            str(model.folder), config.chat, model.vocab_size, model.eos_token_ids)) as text:
        monkeypatch.setattr(engines, 'build', lambda *arguments: counted(FakeEngine()))
        monkeypatch.setattr(host_module, 'TextProcess', lambda *arguments: counted(text))
        monkeypatch.setattr(host_module, 'Telemetry', lambda footprint: SimpleNamespace(
            problem='', close=lambda: None))
        host = Host(Sink())
        host.load(config, told.append)
        assert len(opened) == 2
        host.unload()
        for number, step in enumerate(told):
            left = iter(range(number))
            with pytest.raises(StopIteration):
                host.load(config, lambda text, left=left: next(left))
            assert host.loaded is host.telemetry is None and not opened, step
        monkeypatch.undo()          # of text.close


REMOTE = DecodeConfig(engine=EngineConfig('openai'), remote=RemoteConfig(
    'http://127.0.0.1:9/v1', 'a/model', fallback=ModelConfig.path),
    roofline=RooflineConfig(100.0))
NO_DRAFT = SpeculationConfig('model', '/none')


def load(config, build, monkeypatch):
    """Load with engines of ``build``; return what was loaded, and the warnings."""
    warnings = []
    monkeypatch.setattr(engines, 'build', build)
    host = Host(Sink(), warn=warnings.append)
    try:
        return host.load(config, print), warnings
    finally:
        host.unload()


@pytest.mark.parametrize('ends', [(2,), ()])
def test_warns_if_no_token_ends_an_answer(monkeypatch, ends):
    def build(model, config, progress, passes, draft):
        return FakeEngine(eos_token_ids=ends)

    warnings = load(DecodeConfig(model=ModelConfig(ModelConfig.path), engine=EngineConfig(
        device='cpu'), roofline=RooflineConfig(100.0)), build, monkeypatch)[1]
    assert [each.partition(',')[0] for each in warnings] == [
        'no token ends an answer'] * (not ends)


@pytest.mark.parametrize(('template', 'lacks'), [('auto', True), ('off', True), ('auto', False)])
def test_warns_of_a_folder_without_a_chat_template(monkeypatch, tmp_path, template, lacks):
    folder = tmp_path / 'model'
    shutil.copytree(checkpoint.locate(ModelConfig.path), folder)
    if lacks:
        (folder / 'tokenizer_config.json').unlink()
    _, warnings = load(DecodeConfig(
        model=ModelConfig(str(folder)), engine=EngineConfig(device='cpu'),
        chat=ChatConfig(template), roofline=RooflineConfig(100.0)),
        lambda *arguments: FakeEngine(), monkeypatch)
    warned = [each for each in warnings if each.startswith('the model has no chat template, so ')]
    assert len(warned) == (lacks and template == 'auto')


@pytest.mark.parametrize('settings', [{}, {'suppress_tokens': [7], 'num_beams': 4}])
def test_warns_of_settings_that_are_not_applied(monkeypatch, tmp_path, settings):
    folder = tmp_path / 'model'
    shutil.copytree(checkpoint.locate(ModelConfig.path), folder)
    (folder / 'generation_config.json').write_text(json.dumps(settings))
    _, warnings = load(DecodeConfig(
        model=ModelConfig(str(folder)), engine=EngineConfig(device='cpu'),
        roofline=RooflineConfig(100.0)), lambda *arguments: FakeEngine(), monkeypatch)
    warned = [each for each in warnings if 'sets num_beams, suppress_tokens, which no' in each]
    assert len(warned) == bool(settings)


@pytest.mark.parametrize('drafts', [True, False])
def test_facts_tell_the_speculation_of_a_fallback(monkeypatch, drafts):
    def build(model, config, progress, passes, draft):
        assert passes and draft is not None
        details = {'speculation': 'on: a pass', 'draft_model': 'small'} if drafts else {
            'speculation': 'off: experts'}
        return FakeEngine(details=details)

    loaded, warnings = load(replace(REMOTE, speculation=SpeculationConfig(
        'model', ModelConfig.path)), build, monkeypatch)
    expected = {'speculation': 'of the fallback: on: a pass',
                'draft_model': 'of the fallback: small'} if drafts else {
                    'speculation': 'of the fallback: off: experts'}
    assert {key: loaded.facts.get(key) for key in expected} == expected
    assert drafts == ('draft_model' in loaded.facts)
    warning, = warnings
    assert warning.startswith('the server is not ready: http://127.0.0.1:9/v1 cannot be reached')
    alone, _ = load(replace(REMOTE, remote=replace(REMOTE.remote, fallback=''),
                            speculation=NO_DRAFT), build, monkeypatch)
    assert alone.facts['speculation'] == 'off: a server decides that itself'


@pytest.mark.parametrize('place', ['at once', 'while it loads', 'beside the model'])
def test_a_server_does_not_need_the_draft_model_of_its_fallback(monkeypatch, place):
    """A warning says why the fallback has none; without a server, the load fails."""
    def build(model, config, progress, passes, draft):
        if draft is not None:
            raise engines.DraftError('beside a draft model')
        assert passes
        return FakeEngine(details={'speculation': 'on: a pass'})

    def broken(model, config, progress, passes=False):
        if not passes:
            raise RuntimeError('device lost')
        return FakeEngine(details={'speculation': 'on: a pass'})

    broken.verify = None
    if place == 'while it loads':
        monkeypatch.setattr(engines, '_load', lambda name: SimpleNamespace(NativeEngine=broken))
        monkeypatch.setattr(engines, 'choose', lambda *_: engines.Chosen('native', 'a test'))
        build = engines.build
    draft, reason = {
        'at once': ('/none', "speculation.draft_model '/none': no such folder"),
        'while it loads': (ModelConfig.path, 'cannot be used: RuntimeError: device lost'),
        'beside the model': (ModelConfig.path, 'beside a draft model')}[place]
    speculation = SpeculationConfig('model', draft)
    loaded, (_, warning) = load(replace(REMOTE, speculation=speculation), build, monkeypatch)
    assert warning.startswith('the fallback uses prompt lookup alone: ') and reason in warning
    assert loaded.facts['draft_model'] == warning
    assert loaded.facts['speculation'] == 'of the fallback: on: a pass'
    with pytest.raises(engines.DraftError, match=re.escape(reason)):
        load(DecodeConfig(roofline=RooflineConfig(100.0), speculation=speculation), build,
             monkeypatch)


def test_errors_of_a_fallback_name_its_parameter(monkeypatch):
    remote = replace(REMOTE.remote, fallback='/none')
    with pytest.raises(EngineError, match="^remote.fallback '/none': no such folder"):
        load(replace(REMOTE, remote=remote), None, monkeypatch)


def test_revision_applies_to_a_fallback_too(monkeypatch):
    def find(path, revision, parameter):
        raise EngineError(f'{parameter} {path} {revision}')

    monkeypatch.setattr(checkpoint, 'open', find)
    remote = replace(REMOTE.remote, fallback='org/name')
    with pytest.raises(EngineError, match='^remote.fallback org/name abc$'):
        load(replace(REMOTE, remote=remote, model=ModelConfig('', 'abc')), None, monkeypatch)


def window(host, gb_s, peak):
    """Return the window of 100 steps that read at this rate, recorded with this peak."""
    return replace(host.worker.window(), count=100, floor_count=100, bandwidth_gb_s=gb_s,
                   r_floor=gb_s * 1e9 / peak.bytes_per_s)


def test_steps_above_the_peak_correct_it(host):
    assert host.follow_peak(window(host, 205.0, SHEET)) == ''
    assert '210 GB/s, more than the peak of 200' in host.follow_peak(window(host, 210.0, SHEET))
    assert host.peak == host.worker.peak == Peak(210e9, 'observed in steps')
    assert host.follow_peak(window(host, 210.0, SHEET)) == ''
    assert host.stop(TIMEOUT_S)
    host.start(CONFIG)
    assert host.worker.peak == Peak(210e9, 'observed in steps')


def test_few_steps_among_the_pieces_of_a_server_do_not_correct_the_peak(host):
    assert host.follow_peak(replace(window(host, 400.0, SHEET), floor_count=2)) == ''
    assert host.peak == SHEET


@pytest.mark.parametrize('gb_s', [107.0, 180.0])
@pytest.mark.parametrize(('recorded', 'now'), [(1.0, 0.5), (0.5, 1.0), (0.5, 0.5)])
def test_a_lower_memory_clock_does_not_refute_the_peak(host, monkeypatch, gb_s, recorded, now):
    """The steps ran at a higher clock, before it fell, or after a rise that is not known yet."""
    board = SimpleNamespace(memory_clocks_mhz=(now * 3200, 3200.0), close=lambda: None)
    monkeypatch.setattr(host, 'telemetry', board)
    steps = window(host, gb_s, at_clock(SHEET, (recorded * 3200, 3200.0)))
    assert host.follow_peak(steps) == ''
    assert host.peak == SHEET
    assert host.worker.peak == at_clock(SHEET, board.memory_clocks_mhz)


def test_unload_closes_everything_if_the_engine_fails_to_close(monkeypatch):
    """Such as the process of the tokenizer."""
    closed = []

    def lost():
        closed.append('engine')
        raise RuntimeError('device lost')

    monkeypatch.setattr(host_module, 'Telemetry', lambda footprint: SimpleNamespace(
        problem='', close=lambda: closed.append('telemetry')))
    engine, text = FakeEngine(), CharacterText()
    engine.close, text.close = lost, lambda: closed.append('text')
    host = Host(Sink(), lambda config, progress: Loaded(engine, text, SHEET))
    host.load(CONFIG, print)
    with pytest.raises(RuntimeError, match='device lost'):
        host.unload()
    assert sorted(closed) == ['engine', 'telemetry', 'text'] and host.loaded is None


def test_the_gap_is_measured_with_the_threads_of_the_node(host, monkeypatch):
    """Their number applies to the whole process."""
    def baseline(engine, config, progress):
        raise EngineError(f'{config.engine.cpu_threads} threads')

    monkeypatch.setattr(host_module.gap, 'baseline', baseline)
    for cores, threads, expected in (((0, 1, 2), 0, 3), ((0, 1, 2), 2, 2), ((), 0, 0)):
        host.config = replace(CONFIG, realtime=RealtimeConfig(cpu_affinity=cores),
                              engine=EngineConfig(cpu_threads=threads))
        with pytest.raises(EngineError, match=f'^{expected} threads'):
            host.measure_gap(print)


def test_counts_never_go_back_while_the_host_stops(host, monkeypatch):
    host.submit(Request(''))
    with ThreadPoolExecutor() as readers:
        read = []

        def requests(worker):
            """Return the count of the worker, which `stop` reads; another thread reads too."""
            read.append(readers.submit(lambda: host.counts['requests']))
            wait(read, 0.2)
            return 1

        monkeypatch.setattr(Worker, 'requests', property(requests))
        assert host.stop(TIMEOUT_S)
        assert [each.result(TIMEOUT_S) for each in read] == [1]


def test_a_refusal_names_a_wrong_params_file_before_its_consequence():
    host = Host(Sink(), lambda config, progress: None)
    host.params_problems = ['a.yaml has no section']
    with pytest.raises(ConfigError):
        host.load(DecodeConfig(model=ModelConfig(path='')), print)
    assert host.inactive_reason().startswith(
        'no model is loaded: a.yaml has no section; model.path is empty')
