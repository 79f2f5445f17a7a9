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
What a device says of itself while the node runs: memory, temperature, power, clocks, throttling.

A GPU is asked through NVML where that is installed, by UUID, and a Jetson through jetson-stats;
else only torch's view of its memory is known. On a CPU it is the process's own memory and what the
system has left. What can't be found out is None. It knows nothing of ROS.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
import re
import sys
from typing import Any

from physai_decode.config import DecodeConfig
from physai_decode.engine import Footprint
from physai_decode.jetson import Jetson
from physai_decode.roofline import find_peak
from physai_decode.roofline import fits_cache
from physai_decode.roofline import is_integrated
from physai_decode.roofline import last_cache_bytes
from physai_decode.roofline import measure_cpu_read_bandwidth
from physai_decode.roofline import Peak

KEYS = ('memory_used_gb', 'memory_free_gb', 'temperature_c', 'power_w', 'sm_clock_mhz',
        'memory_clock_mhz', 'throttle_reasons', 'power_mode')


class Telemetry:
    """One device, from the moment an engine is on it until `close`."""

    def __init__(self, footprint: Footprint) -> None:
        self._cuda = footprint.device.startswith('cuda')
        self._device = footprint.device
        self._nvml: Any = None
        self._handle: Any = None
        self._board: Jetson | None = None
        if self._cuda and footprint.device_uuid:
            self._open(footprint.device_uuid)
        if self._cuda and is_integrated(footprint.device_name):
            self._open_board()

    def read(self) -> dict[str, float | str | None]:
        """Ask the device now; takes about a millisecond. The keys are always all of `KEYS`."""
        told: dict[str, float | str | None] = dict.fromkeys(KEYS)
        nvml, handle = self._nvml, self._handle     # close may be called from another thread
        told['memory_used_gb'], told['memory_free_gb'] = self._memory(nvml, handle)
        if self._board is not None:
            told.update(self._board.read())
        if nvml is None:
            return told
        for key, question in (
                ('temperature_c',
                 lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                ('power_w', lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
                ('sm_clock_mhz',
                 lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                ('memory_clock_mhz',
                 lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                ('throttle_reasons', lambda: _throttle_reasons(nvml, handle))):
            if (answer := _ask(nvml, question)) is not None:
                told[key] = answer
        return told

    def energy_j(self) -> float | None:
        """
        Give the energy that the device has taken up to now, from a beginning of its own.

        It is that of all programs on it, of a Jetson the whole board's. None: it does not tell.
        """
        nvml, handle, board = self._nvml, self._handle, self._board
        taken_mj = None if nvml is None else _ask(
            nvml, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        if taken_mj is not None:
            return float(taken_mj) / 1e3
        return None if board is None else board.energy_j

    @property
    def memory_clock_part(self) -> float | None:
        """Give the memory clock in force over the highest, of a Jetson; None where not known."""
        board = self._board
        return None if board is None else board.memory_clock_part

    def close(self) -> None:
        """Let go of NVML, and of the board."""
        board, self._board = self._board, None
        if board is not None:
            board.close()
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            _ask(nvml, nvml.nvmlShutdown)

    def _open(self, uuid):
        try:
            import pynvml
            pynvml.nvmlInit()
        except Exception:               # not installed, or a driver without it (Jetson)
            return
        try:
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            self._nvml = pynvml
        except pynvml.NVMLError:
            _ask(pynvml, pynvml.nvmlShutdown)

    def _open_board(self):
        try:
            from jtop import jtop
            self._board = Jetson(jtop)
        except Exception:               # not installed, or its service does not run
            return

    def _memory(self, nvml, handle):
        """Give GB used and free."""
        used = free = None
        if not self._cuda:
            used = _kilobytes('/proc/self/status', 'VmRSS')
            free = _kilobytes('/proc/meminfo', 'MemAvailable')
        elif nvml and (memory := _ask(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))):
            used, free = memory.used, memory.free
        elif 'torch' in sys.modules:
            try:
                free, total = sys.modules['torch'].cuda.mem_get_info(self._device)
                used = total - free
            except RuntimeError:        # a CUDA error that the engine reports
                pass
        return [None if count is None else count / 1e9 for count in (used, free)]


def _ask(nvml, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except nvml.NVMLError:              # this device does not tell, or NVML was closed meanwhile
        return None


def _throttle_reasons(nvml, handle):
    bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    names = {
        'sw_power_cap': nvml.nvmlClocksThrottleReasonSwPowerCap,
        'hw_slowdown': nvml.nvmlClocksThrottleReasonHwSlowdown,
        'sync_boost': nvml.nvmlClocksThrottleReasonSyncBoost,
        'sw_thermal': nvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        'hw_thermal': nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        'hw_power_brake': nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown}
    return ' '.join(name for name, bit in names.items() if bits & bit) or 'none'


def find_engine_peak(footprint: Footprint, config: DecodeConfig) -> Peak:
    """
    Find the peak of the memory that an engine's weights are in.

    A measurement, where it comes to that, takes about a second and, on a GPU, 256 MiB.
    """
    if not footprint.device.startswith('cuda'):
        # Without its name, which may hold that of a GPU: an AMD A10 is no NVIDIA A10.
        # All cores read: what the bus can do does not depend on how many threads decode.
        peak = find_peak(config.roofline.peak_bandwidth_gb_s, '',
                         measure=measure_cpu_read_bandwidth)
        return peak if peak.source == 'parameter' else replace(
            peak, no_floor=fits_cache(footprint.read_weight_bytes, last_cache_bytes()))
    return find_peak(
        config.roofline.peak_bandwidth_gb_s, footprint.device_name,
        driver=lambda: _memory_bus(footprint.device),
        measure=lambda: _measure_cuda_read_bandwidth(footprint.device))


def _memory_bus(device):
    """Give (memory clock in kHz, bus width in bits), None where torch does not tell."""
    import torch
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, 'memory_clock_rate', 0)
    width = getattr(properties, 'memory_bus_width', 0)
    return (clock, width) if clock and width else None


def _measure_cuda_read_bandwidth(device):
    """Read 256 MiB ten times, more than any cache holds; bytes per second of the best."""
    import torch
    words = torch.ones(64 << 20, dtype=torch.float32, device=device)
    best_s = float('inf')
    with torch.cuda.device(device):
        for _ in range(10):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            words.sum()
            end.record()
            end.synchronize()
            best_s = min(best_s, begin.elapsed_time(end) * 1e-3)
    return words.nbytes / best_s


def _kilobytes(path, name):
    """Give one line of a /proc file in bytes, None where it is not there."""
    try:
        found = re.search(rf'^{name}:\s*(\d+) kB', Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
