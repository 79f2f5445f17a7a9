"""What a device says of itself, with NVML and without."""

from dataclasses import replace
import sys
from types import SimpleNamespace

from physai_decode.config import DecodeConfig
from physai_decode.config import RooflineConfig
from physai_decode.engine import Footprint
from physai_decode.roofline import Peak
from physai_decode.telemetry import find_engine_peak
from physai_decode.telemetry import KEYS
from physai_decode.telemetry import Telemetry
import pytest

CPU = Footprint(
    engine='native', model_type='qwen2', dtype='float32', quantization='none', device='cpu',
    device_name='a CPU', device_uuid='', cuda_graph='unavailable', max_context=64, vocab_size=64,
    eos_token_ids=(), read_weight_bytes=1, checkpoint_weight_bytes=1, layers=1, kv_heads=1,
    head_dim=64, kv_element_bytes=4)
GPU = replace(CPU, device='cuda:0', device_name='NVIDIA L4', device_uuid='GPU-1')


class NVMLError(Exception):
    """What pynvml raises."""


@pytest.fixture
def nvml(monkeypatch):
    """Put an NVML of one device in place that does not tell its power."""
    def by_uuid(uuid):
        if uuid != b'GPU-1':
            raise NVMLError
        return 'handle'

    def refuse(handle):
        raise NVMLError

    calls = []
    module = SimpleNamespace(
        NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2,
        nvmlClocksThrottleReasonSwPowerCap=4, nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonSyncBoost=16, nvmlClocksThrottleReasonSwThermalSlowdown=32,
        nvmlClocksThrottleReasonHwThermalSlowdown=64,
        nvmlClocksThrottleReasonHwPowerBrakeSlowdown=128,
        nvmlInit=lambda: calls.append('init'), nvmlShutdown=lambda: calls.append('shutdown'),
        nvmlDeviceGetHandleByUUID=by_uuid, nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetTemperature=lambda handle, sensor: 51,
        nvmlDeviceGetClockInfo=lambda handle, clock: {1: 2040, 2: 6251}[clock],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 4 | 32 | 1,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=6 * 10**9, free=18 * 10**9))
    monkeypatch.setitem(sys.modules, 'pynvml', module)
    return calls


def test_a_gpu_is_asked_by_its_uuid(nvml):
    """What it does not tell is None, and NVML is let go."""
    telemetry = Telemetry(GPU)
    told = telemetry.read()
    assert told == {
        'memory_used_gb': 6.0, 'memory_free_gb': 18.0, 'temperature_c': 51, 'power_w': None,
        'sm_clock_mhz': 2040, 'memory_clock_mhz': 6251,
        'throttle_reasons': 'sw_power_cap sw_thermal'}
    assert tuple(told) == KEYS
    telemetry.close()
    telemetry.close()
    assert nvml == ['init', 'shutdown']


def test_nvml_that_fails_at_the_end(nvml, monkeypatch):
    """It keeps nothing from being freed."""
    def fail():
        raise NVMLError

    monkeypatch.setattr(sys.modules['pynvml'], 'nvmlShutdown', fail)
    telemetry = Telemetry(GPU)
    telemetry.close()
    telemetry.close()
    Telemetry(replace(GPU, device_uuid='GPU-2')).close()


def test_a_processor_with_a_gpu_s_name(monkeypatch):
    """It does not get that GPU's bandwidth."""
    monkeypatch.setattr('physai_decode.telemetry.measure_cpu_read_bandwidth', lambda threads: 2e10)
    footprint = replace(CPU, device_name='AMD A10-7850K Radeon R7, 12 Compute Cores 4C+8G')
    assert find_engine_peak(footprint, DecodeConfig()) == Peak(2e10, 'measured')


def test_a_gpu_that_nvml_does_not_know(nvml, monkeypatch):
    """Torch knows of its memory."""
    torch = SimpleNamespace(cuda=SimpleNamespace(
        mem_get_info=lambda device: (10**9, 4 * 10**9) if device == 'cuda:0' else None))
    monkeypatch.setitem(sys.modules, 'torch', torch)
    told = Telemetry(replace(GPU, device_uuid='GPU-2')).read()
    assert nvml == ['init', 'shutdown']
    assert (told.pop('memory_used_gb'), told.pop('memory_free_gb')) == (3.0, 1.0)
    assert set(told.values()) == {None}


def test_without_nvml(monkeypatch):
    """Nothing is known then, and nothing fails."""
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    monkeypatch.delitem(sys.modules, 'torch', raising=False)
    assert set(Telemetry(GPU).read().values()) == {None}


def test_a_cpu_tells_of_the_host_s_memory():
    """The process's own, and what the system has left."""
    told = Telemetry(CPU).read()
    assert 0.001 < told['memory_used_gb'] < 1000
    assert told['memory_free_gb'] > 0
    assert told['temperature_c'] is None


def test_the_parameter_is_the_peak():
    """Before anything is measured."""
    config = replace(DecodeConfig(), roofline=RooflineConfig(peak_bandwidth_gb_s=123.0))
    for footprint in (CPU, GPU):
        peak = find_engine_peak(footprint, config)
        assert (peak.bytes_per_s, peak.source) == (123e9, 'parameter')


def test_the_driver_tells_a_gpu_s_peak(monkeypatch):
    """Memory clock and bus width, as torch has them from the driver."""
    properties = SimpleNamespace(memory_clock_rate=6251000, memory_bus_width=192)
    torch = SimpleNamespace(cuda=SimpleNamespace(get_device_properties=lambda device: properties))
    monkeypatch.setitem(sys.modules, 'torch', torch)
    peak = find_engine_peak(GPU, DecodeConfig())
    assert (peak.bytes_per_s, peak.source) == (2 * 6251e6 * 24, 'driver')
