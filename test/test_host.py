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
from types import SimpleNamespace

from fake_engine import CharacterText
from fake_engine import FakeEngine
from physai_decode import checkpoint
from physai_decode import engines
from physai_decode import host as host_module
from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import ModelConfig
from physai_decode.config import RemoteConfig
from physai_decode.config import RooflineConfig
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


@pytest.fixture
def host():
    """Return an active host."""
    host = Host(Sink(), lambda config, progress: Loaded(FakeEngine(), CharacterText(), SHEET))
    host.load(CONFIG, lambda text: None)
    host.start(CONFIG)
    yield host
    assert host.stop(TIMEOUT_S)
    host.unload()


def test_load_reports_once_that_jetson_stats_is_missing(monkeypatch):
    told = []
    problem = SimpleNamespace(problem='jetson-stats is not used', close=lambda: None)
    monkeypatch.setattr(host_module, 'Telemetry', lambda footprint: problem)
    host = Host(Sink(), lambda config, progress: Loaded(FakeEngine(), CharacterText(), SHEET))
    host.load(CONFIG, told.append)
    host.unload()
    assert told == ['jetson-stats is not used']


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
            problem='jetson-stats is not used', close=lambda: None))
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
