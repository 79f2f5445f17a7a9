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

"""`Telemetry` and `find_engine_peak`: figures of the device from NVML, jetson-stats or torch."""

from dataclasses import replace
from datetime import timedelta
import sys
from types import SimpleNamespace

from physai_decode.config import DecodeConfig
from physai_decode.config import RooflineConfig
from physai_decode.engine import Footprint
from physai_decode.jetson import Jetson
from physai_decode.jetson import STALE_S
from physai_decode.roofline import Peak
from physai_decode.telemetry import find_engine_peak
from physai_decode.telemetry import KEYS
from physai_decode.telemetry import spent_j
from physai_decode.telemetry import Telemetry
import pytest

CPU = Footprint(
    engine='native', model_type='qwen2', dtype='float32', quantization='none', device='cpu',
    device_name='a CPU', device_uuid='', cuda_graph='unavailable', max_context=64, vocab_size=64,
    eos_token_ids=(), read_weight_bytes=1, checkpoint_weight_bytes=1, layers=1, kv_heads=1,
    head_dim=64, kv_element_bytes=4)
GPU = replace(CPU, device='cuda:0', device_name='NVIDIA L4', device_uuid='GPU-1')


class NVMLError(Exception):
    """The exception of pynvml."""


@pytest.fixture
def nvml(monkeypatch):
    """Replace pynvml by a fake with one GPU that does not report its power; return its calls."""
    def by_uuid(uuid):
        if uuid != b'GPU-1':
            raise NVMLError
        return 'handle'

    def unsupported(handle):
        raise NVMLError

    calls = []
    module = SimpleNamespace(
        NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2,
        nvmlInit=lambda: calls.append('init'), nvmlShutdown=lambda: calls.append('shutdown'),
        nvmlDeviceGetHandleByUUID=by_uuid, nvmlDeviceGetPowerUsage=unsupported,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 123456,
        nvmlDeviceGetTemperature=lambda handle, sensor: 51,
        nvmlDeviceGetClockInfo=lambda handle, clock: {1: 2040, 2: 6251}[clock],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 4 | 32 | 1,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=6 * 10**9, free=18 * 10**9))
    monkeypatch.setitem(sys.modules, 'pynvml', module)
    return calls


def test_reads_a_gpu_through_nvml(nvml):
    """It is found by UUID; an unsupported figure is None, and `close` shuts NVML down once."""
    telemetry = Telemetry(GPU)
    figures = telemetry.read()
    assert figures == {
        'memory_used_gb': 6.0, 'memory_free_gb': 18.0, 'temperature_c': 51, 'power_w': None,
        'sm_clock_mhz': 2040, 'memory_clock_mhz': 6251,
        'throttle_reasons': 'sw_power_cap sw_thermal', 'power_mode': None}
    assert tuple(figures) == KEYS
    telemetry.close()
    telemetry.close()
    assert nvml == ['init', 'shutdown']


def test_an_old_pynvml_lacks_functions(nvml, monkeypatch):
    """Ubuntu 22.04 has one without the energy counter and the names of most throttle reasons."""
    for name in ('nvmlDeviceGetTotalEnergyConsumption', 'nvmlDeviceGetTemperature'):
        monkeypatch.delattr(sys.modules['pynvml'], name, raising=False)
    telemetry = Telemetry(GPU)
    assert telemetry.energy_j() is None
    figures = telemetry.read()
    assert (figures['temperature_c'], figures['sm_clock_mhz']) == (None, 2040)
    assert figures['throttle_reasons'] == 'sw_power_cap sw_thermal'


def test_close_ignores_errors_of_nvml(nvml, monkeypatch):
    def fail():
        raise NVMLError

    monkeypatch.setattr(sys.modules['pynvml'], 'nvmlShutdown', fail)
    telemetry = Telemetry(GPU)
    telemetry.close()
    telemetry.close()
    Telemetry(replace(GPU, device_uuid='GPU-2')).close()


def test_measures_the_peak_of_a_cpu_whose_name_contains_a_gpu(monkeypatch):
    """The data sheet of that GPU is not used."""
    monkeypatch.setattr('physai_decode.telemetry.measure_cpu_read_bandwidth', lambda: 2e10)
    footprint = replace(CPU, device_name='AMD A10-7850K Radeon R7, 12 Compute Cores 4C+8G')
    peak = find_engine_peak(footprint, DecodeConfig())
    assert (peak.bytes_per_s, peak.source) == (2e10, 'measured')


def test_no_floor_if_the_weights_fit_into_the_cache(monkeypatch):
    """A peak from the parameter gives a floor nevertheless."""
    monkeypatch.setattr('physai_decode.telemetry.measure_cpu_read_bandwidth', lambda: 2e10)
    monkeypatch.setattr('physai_decode.telemetry.last_cache_bytes', lambda: 32 << 20)
    assert 'fit the last-level cache' in find_engine_peak(CPU, DecodeConfig()).no_floor
    large = replace(CPU, read_weight_bytes=10**9)
    assert find_engine_peak(large, DecodeConfig()) == Peak(2e10, 'measured')
    config = DecodeConfig(roofline=RooflineConfig(peak_bandwidth_gb_s=5.0))
    assert find_engine_peak(CPU, config) == Peak(5e9, 'parameter')


def test_reads_memory_from_torch_if_nvml_lacks_the_gpu(nvml, monkeypatch):
    torch = SimpleNamespace(cuda=SimpleNamespace(
        mem_get_info=lambda device: (10**9, 4 * 10**9) if device == 'cuda:0' else None))
    monkeypatch.setitem(sys.modules, 'torch', torch)
    figures = Telemetry(replace(GPU, device_uuid='GPU-2')).read()
    assert nvml == ['init', 'shutdown']
    assert (figures.pop('memory_used_gb'), figures.pop('memory_free_gb')) == (3.0, 1.0)
    assert set(figures.values()) == {None}


def test_free_memory_of_a_jetson_includes_the_page_cache(nvml, monkeypatch):
    torch = SimpleNamespace(cuda=SimpleNamespace(
        mem_get_info=lambda device: (10**9, 16 * 10**9)))
    monkeypatch.setitem(sys.modules, 'torch', torch)
    monkeypatch.setattr('physai_decode.telemetry._size_bytes', lambda path, name: {
        ('/proc/meminfo', 'MemAvailable'): 9 * 10**9}[path, name])
    figures = Telemetry(replace(GPU, device_uuid='', device_name='Orin')).read()
    assert (figures['memory_used_gb'], figures['memory_free_gb']) == (7.0, 9.0)


def test_all_figures_are_none_without_nvml_and_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    monkeypatch.delitem(sys.modules, 'torch', raising=False)
    assert set(Telemetry(GPU).read().values()) == {None}


def test_reads_the_memory_of_the_host_on_a_cpu():
    """The figures are the memory of the process, and the available memory of the system."""
    figures = Telemetry(CPU).read()
    assert 0.001 < figures['memory_used_gb'] < 1000
    assert figures['memory_free_gb'] > 0
    assert figures['temperature_c'] is None


def test_peak_from_the_parameter():
    """It is used instead of a measurement."""
    config = replace(DecodeConfig(), roofline=RooflineConfig(peak_bandwidth_gb_s=123.0))
    for footprint in (CPU, GPU):
        peak = find_engine_peak(footprint, config)
        assert (peak.bytes_per_s, peak.source) == (123e9, 'parameter')


def test_peak_from_the_driver(monkeypatch):
    """The driver reports the memory clock and the bus width through torch."""
    properties = SimpleNamespace(memory_clock_rate=6251000, memory_bus_width=192)
    torch = SimpleNamespace(cuda=SimpleNamespace(get_device_properties=lambda device: properties))
    monkeypatch.setitem(sys.modules, 'torch', torch)
    peak = find_engine_peak(GPU, DecodeConfig())
    assert (peak.bytes_per_s, peak.source) == (2 * 6251e6 * 24, 'driver')


def test_reads_the_energy_of_a_gpu(nvml, monkeypatch):
    """NVML reports millijoules; the energy is None without support, and on a CPU."""
    telemetry = Telemetry(GPU)
    assert telemetry.energy_j() == pytest.approx(123.456)
    monkeypatch.setattr(sys.modules['pynvml'], 'nvmlDeviceGetTotalEnergyConsumption',
                        sys.modules['pynvml'].nvmlDeviceGetPowerUsage)
    assert telemetry.energy_j() is None
    telemetry.close()
    assert telemetry.energy_j() is None
    assert Telemetry(CPU).energy_j() is None


class Fields:
    """A part of jetson-stats' report, which has some methods of a dict, but is none."""

    def __init__(self, **fields):
        self._fields = fields

    def get(self, key, default=None):
        return self._fields.get(key, default)

    def values(self):
        return self._fields.values()

    def __len__(self):
        return len(self._fields)


class FakeBoard:
    """The `jtop` class of jetson-stats 4 and newer with the figures of an AGX Orin."""

    def __init__(self, interval):
        self.observers = []
        self.closed = False
        self.power = {'rail': {'VDD_GPU_SOC': {'power': 9000}}, 'tot': {'power': 20000}}
        self.temperature = {'cpu': {'temp': 48.0}, 'gpu': {'temp': 51.5, 'online': True}}
        self.memory = Fields(EMC={'cur': 3199000, 'max': 3199000})
        self.gpu = Fields(
            ga10b={'freq': {'cur': 1300500, 'max': 1300500}, 'status': {'load': 99.0}})
        self.nvpmodel = SimpleNamespace(name='MAXN')

    def attach(self, observer):
        self.observers.append(observer)

    def detach(self, observer):
        self.observers.remove(observer)

    def start(self):
        """Connect."""

    def close(self):
        self.closed = True

    def report(self):
        observer, = self.observers
        observer(self)


def on_board(now):
    """Return a `Jetson` by a clock, its board, and a function that reports after some seconds."""
    jetson = Jetson(FakeBoard, clock=lambda: now[0])

    def report(after_s):
        now[0] += after_s
        jetson._board.report()

    return jetson, jetson._board, report


def telemetry_of(name):
    """Return the telemetry of a Jetson, and its board."""
    telemetry = Telemetry(replace(GPU, device_name=name))
    return telemetry, telemetry._board._board


def test_reads_a_jetson_through_jetson_stats(monkeypatch):
    """A figure that the board does not report is None."""
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    monkeypatch.setitem(sys.modules, 'jtop', SimpleNamespace(jtop=FakeBoard))
    monkeypatch.delitem(sys.modules, 'torch', raising=False)
    telemetry, board = telemetry_of('Orin')
    assert telemetry.energy_j() is None
    board.report()
    assert telemetry.energy_j() >= 0
    figures = telemetry.read()
    assert tuple(figures) == KEYS
    assert {key: value for key, value in figures.items() if value is not None} == {
        'temperature_c': 51.5, 'power_w': 20.0, 'sm_clock_mhz': 1300.5,
        'memory_clock_mhz': 3199.0, 'throttle_reasons': 'none', 'power_mode': 'MAXN'}
    board.memory, board.temperature, board.gpu, board.nvpmodel = Fields(), None, Fields(), None
    assert {key for key, value in telemetry.read().items() if value is not None} == {'power_w'}
    assert telemetry.memory_clocks_mhz == (3199.0, 3199.0)
    telemetry.close()
    assert telemetry.memory_clocks_mhz is None
    assert board.closed and not board.observers


@pytest.mark.parametrize(('gpu_khz', 'memory_khz', 'load', 'reasons'), [
    (1300500, 3199000, 99.0, 'none'), (800000, 3199000, 99.0, 'low_gpu_clock'),
    (800000, 2133000, 99.0, 'low_gpu_clock low_memory_clock'), (306000, 665600, 3.0, 'none'),
    (306000, 665600, None, None), (800000, 1, 99.0, 'low_gpu_clock')])
def test_low_clocks_of_a_busy_board(gpu_khz, memory_khz, load, reasons):
    """A Jetson does not report why; an idle one lowers its clocks."""
    jetson, board, report = on_board([100.0])
    gpu = {'freq': {'cur': gpu_khz, 'max': 1300500}, 'status': {'load': load}}
    board.gpu = Fields(ga10b=gpu)
    board.memory = Fields(EMC={'cur': memory_khz, 'max': 3199000})
    report(0.0)
    assert jetson.read()['throttle_reasons'] == reasons
    jetson.close()


def test_memory_clock_of_a_board_is_that_of_its_busy_gpu():
    """Answers may be shorter than the time between two messages on /diagnostics."""
    jetson, board, report = on_board([100.0])
    assert jetson.memory_clocks_mhz is None
    for memory_khz, load, expected in (
            (665600, 2.0, None), (2133000, 98.0, (2133.0, 3199.0)),
            (665600, 0.0, (2133.0, 3199.0)), (3199000, 90.0, (3199.0, 3199.0))):
        board.memory = Fields(EMC={'cur': memory_khz, 'max': 3199000})
        board.gpu.get('ga10b')['status']['load'] = load
        report(0.0)
        assert jetson.memory_clocks_mhz == expected


def test_energy_of_a_board_is_its_power_over_time():
    """The power is taken as constant until the next update."""
    now = [100.0]
    jetson, board, report = on_board(now)
    report(1.0)                 # 20 W until the next update
    now[0] += 2.0
    assert jetson.energy_j == pytest.approx(40.0)
    board.power['tot']['power'] = 5000
    report(0.0)
    assert jetson.energy_j == pytest.approx(40.0)
    now[0] += 1.0
    assert jetson.energy_j == pytest.approx(45.0)


def test_energy_while_a_report_lacks_the_power():
    """The last known power counts for that time, not 0."""
    jetson, board, report = on_board([100.0])
    for seconds, power in ((0.0, {'tot': {'power': 20000}}), (1.0, None),
                           (1.0, {'tot': {'power': 10000}}), (1.0, {'tot': {'power': 10000}})):
        board.power = power
        report(seconds)
    assert jetson.energy_j == pytest.approx(2 * 20.0 + 10.0)


def test_figures_of_a_board_become_unknown_when_the_reports_end():
    """The thread of jetson-stats ends if its service does."""
    now = [100.0]
    jetson, board, report = on_board(now)
    assert jetson.read() == {}              # there is no report yet
    report(0.0)
    now[0] += STALE_S - 0.1
    assert jetson.read()['power_w'] == 20.0 and jetson.energy_j == pytest.approx(98.0)
    board.power = None
    report(0.0)
    now[0] += 1.0
    assert jetson.read()['power_w'] is None and jetson.read()['temperature_c'] == 51.5
    assert jetson.energy_j is None
    now[0] += STALE_S
    assert jetson.read() == {}


@pytest.mark.parametrize('silent_s', [STALE_S + 0.1, 100.0])
def test_energy_across_a_gap_in_the_reports_is_unknown(silent_s):
    """Also if the answer then continues for longer than the board was known before."""
    jetson, _, report = on_board([100.0])
    report(0.0)
    report(1.0)
    before_j = jetson.energy_j
    report(silent_s)
    resumed_j = jetson.energy_j
    for _ in range(50):
        report(1.0)
    assert spent_j(before_j, resumed_j) is spent_j(before_j, jetson.energy_j) is None
    assert spent_j(resumed_j, jetson.energy_j) == pytest.approx(50 * 20.0)


def test_a_repeated_report_is_none():
    """jetson-stats gives the last report again if its service reads no new one."""
    jetson, board, report = on_board([100.0])
    for uptime_s in (7.0, 7.2):
        board.uptime = timedelta(seconds=uptime_s)
        report(0.2)
    assert jetson.read()['power_w'] == 20.0
    for _ in range(10):
        report(0.6)
    assert jetson.read() == {} and jetson.energy_j is None
    board.uptime = timedelta(seconds=14.0)
    report(0.2)
    assert jetson.read()['power_w'] == 20.0


def test_a_board_that_cannot_start_is_closed(monkeypatch):
    boards = []

    class Unstartable(FakeBoard):
        def start(self):
            boards.append(self)
            raise OSError('the service ends')

    with pytest.raises(OSError, match='the service ends'):
        Jetson(Unstartable)
    assert boards[0].closed and not boards[0].observers


def test_a_sensor_and_a_clock_that_are_off_have_no_value():
    """jetson-stats reports -256 °C for a GPU without power, and 0 for an unknown clock."""
    jetson, board, report = on_board([100.0])
    board.temperature = {'gpu': {'temp': -256, 'online': False}}
    board.memory = Fields(EMC={'cur': 0, 'max': 3199000})
    report(0.0)
    figures = jetson.read()
    assert figures['temperature_c'] is figures['memory_clock_mhz'] is None
    assert jetson.memory_clocks_mhz is None


def test_clocks_of_a_thor_can_be_in_mhz():
    """jetson-stats mixes those of NVML in MHz and its own in kHz; 1 stands for an unknown one."""
    jetson, board, report = on_board([100.0])
    board.memory = Fields(EMC={'cur': 1, 'max': 4266000})
    board.gpu = Fields(Thor={'freq': {'cur': 1575, 'max': 1575000}, 'status': {'load': 99.0}})
    report(0.0)
    figures = jetson.read()
    assert figures['sm_clock_mhz'] == 1575.0 and figures['memory_clock_mhz'] is None
    assert figures['throttle_reasons'] == 'none' and jetson.memory_clocks_mhz is None


def test_energy_comes_from_one_source_throughout(nvml, monkeypatch):
    """The counter of NVML began earlier than that of the board."""
    monkeypatch.setitem(sys.modules, 'jtop', SimpleNamespace(jtop=FakeBoard))
    telemetry, board = telemetry_of('NVIDIA Thor')
    board.report()
    assert telemetry.energy_j() == pytest.approx(123.456)

    def fail(handle):
        raise NVMLError

    monkeypatch.setattr(sys.modules['pynvml'], 'nvmlDeviceGetTotalEnergyConsumption', fail)
    assert telemetry.energy_j() is None
    telemetry, board = telemetry_of('NVIDIA Thor')
    board.report()
    monkeypatch.setattr(
        sys.modules['pynvml'], 'nvmlDeviceGetTotalEnergyConsumption', lambda handle: 123456)
    assert telemetry.energy_j() < 100


@pytest.mark.parametrize(('bits', 'memory_khz', 'reasons'), [
    (4, 3199000, 'sw_power_cap'), (4, 2133000, 'sw_power_cap low_memory_clock'),
    (0, 3199000, 'none'), (0, 2133000, 'low_memory_clock')])
def test_throttle_reasons_of_both_sources(nvml, monkeypatch, bits, memory_khz, reasons):
    monkeypatch.setitem(sys.modules, 'jtop', SimpleNamespace(jtop=FakeBoard))
    monkeypatch.setattr(sys.modules['pynvml'], 'nvmlDeviceGetCurrentClocksThrottleReasons',
                        lambda handle: bits)
    telemetry, board = telemetry_of('NVIDIA Thor')
    board.memory = Fields(EMC={'cur': memory_khz, 'max': 3199000})
    board.report()
    assert telemetry.read()['throttle_reasons'] == reasons


class OldBoard:
    """The `jtop` class of jetson-stats before version 4."""

    def __init__(self, interval):
        self.ram = {}


def refuse(interval):
    """Raise an error like that of jetson-stats."""
    raise OSError("I can't access jtop.service.\nPlease logout or reboot this board.")


@pytest.mark.parametrize(('module', 'words'), [
    (None, ('import of jtop halted', f'{sys.executable} -m pip install jetson-stats')),
    (SimpleNamespace(), ('ImportError', 'pip install jetson-stats')),
    (SimpleNamespace(jtop=refuse), (
        "(OSError: I can't access jtop.service. Please logout", 'group jtop',
        'sudo systemctl restart jtop', 'the same version', '/run/jtop.sock')),
    (SimpleNamespace(jtop=OldBoard), ('it is older than version 4', 'the same version'))])
def test_a_jetson_without_jetson_stats_says_why(monkeypatch, module, words):
    """All figures are None then; only a Jetson needs jetson-stats."""
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    monkeypatch.setitem(sys.modules, 'jtop', module)
    monkeypatch.delitem(sys.modules, 'torch', raising=False)
    for name in ('Orin', 'NVIDIA Thor'):
        telemetry = Telemetry(replace(GPU, device_name=name))
        assert set(telemetry.read().values()) == {None}
        assert telemetry.energy_j() is None
        assert telemetry.problem.startswith('jetson-stats is not used (')
        assert all(each in telemetry.problem for each in words)
    for footprint in (CPU, GPU, replace(GPU, device_name='NVIDIA GB10')):
        assert Telemetry(footprint).problem == ''


def test_a_jetson_with_jetson_stats_has_no_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, 'jtop', SimpleNamespace(jtop=FakeBoard))
    assert Telemetry(replace(GPU, device_name='Orin')).problem == ''
