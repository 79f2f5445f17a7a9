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
Reads the device's memory, temperature, power, clocks and throttle reasons while the node runs.

The sources are NVML for a GPU and jetson-stats for a Jetson, if installed; otherwise only torch's
view of the memory is known. On a CPU, the figures are the memory of the process and the available
memory of the system. An unknown value is None.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
import re
import sys
from typing import Any

from physai_decode.config import DecodeConfig
from physai_decode.engine import Footprint
from physai_decode.jetson import connect
from physai_decode.jetson import Jetson
from physai_decode.roofline import find_peak
from physai_decode.roofline import fits_cache
from physai_decode.roofline import is_integrated
from physai_decode.roofline import is_jetson
from physai_decode.roofline import last_cache_bytes
from physai_decode.roofline import measure_cpu_read_bandwidth
from physai_decode.roofline import Peak

KEYS = ('memory_used_gb', 'memory_free_gb', 'temperature_c', 'power_w', 'sm_clock_mhz',
        'memory_clock_mhz', 'throttle_reasons', 'power_mode')
# Bits of nvmlClocksThrottleReasons in nvml.h.
_THROTTLE_REASONS = {
    'sw_power_cap': 0x04, 'hw_slowdown': 0x08, 'sync_boost': 0x10, 'sw_thermal': 0x20,
    'hw_thermal': 0x40, 'hw_power_brake': 0x80}


def spent_j(before_j: float | None, after_j: float | None) -> float | None:
    """Return the energy between two readings of a counter; None if it is unknown."""
    if before_j is None or after_j is None or after_j < before_j:      # it was reset
        return None
    return after_j - before_j


class Telemetry:
    """The telemetry of one device until `close`."""

    def __init__(self, footprint: Footprint) -> None:
        self._cuda = footprint.device.startswith('cuda')
        self._device = footprint.device
        self._nvml: Any = None
        self._handle: Any = None
        self._board: Jetson | None = None
        if self._cuda and footprint.device_uuid:
            self._open(footprint.device_uuid)
        # The counters of the two sources differ, so one of them is used throughout.
        self._nvml_counts = self._nvml_energy_mj() is not None
        self._integrated = self._cuda and is_integrated(footprint.device_name)
        self.problem = ''               # why a Jetson has no jetson-stats, and what to do
        if self._integrated:
            self._board, problem = connect()
            if is_jetson(footprint.device_name):
                self.problem = problem

    def read(self) -> dict[str, float | str | None]:
        """Read the device, which takes about a millisecond; the keys are always `KEYS`."""
        values: dict[str, float | str | None] = dict.fromkeys(KEYS)
        # Another thread may call close.
        nvml, handle, board = self._nvml, self._handle, self._board
        values['memory_used_gb'], values['memory_free_gb'] = self._memory(nvml, handle)
        if board is not None:
            values.update(board.read())
        if nvml is None:
            return values
        for key, query in (
                ('temperature_c',
                 lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                ('power_w', lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
                ('sm_clock_mhz',
                 lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                ('memory_clock_mhz',
                 lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                ('throttle_reasons',
                 lambda: _throttle_reasons(nvml, handle, values['throttle_reasons']))):
            if (value := _query(nvml, query)) is not None:
                values[key] = value
        return values

    def energy_j(self) -> float | None:
        """
        Return the device's energy counter in joules, None if it has none.

        The counter includes all programs on the device, and on a Jetson the whole board.
        """
        if self._nvml_counts:
            energy_mj = self._nvml_energy_mj()
            return None if energy_mj is None else energy_mj / 1e3
        board = self._board
        return None if board is None else board.energy_j

    @property
    def memory_clocks_mhz(self) -> tuple[float, float] | None:
        """A Jetson's memory clock, see `Jetson.memory_clocks_mhz`; None if unknown."""
        board = self._board
        return None if board is None else board.memory_clocks_mhz

    def close(self) -> None:
        """Close NVML and jetson-stats."""
        board, self._board = self._board, None
        if board is not None:
            board.close()
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            _query(nvml, nvml.nvmlShutdown)

    def _open(self, uuid: str) -> None:
        try:
            import pynvml
            pynvml.nvmlInit()
        except Exception:               # not installed, or a driver without NVML (Jetson)
            return
        try:
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            self._nvml = pynvml
        except pynvml.NVMLError:
            _query(pynvml, pynvml.nvmlShutdown)

    def _nvml_energy_mj(self) -> int | None:
        nvml, handle = self._nvml, self._handle
        return None if nvml is None else _query(
            nvml, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    def _memory(self, nvml: Any, handle: Any) -> tuple[float | None, float | None]:
        """Return the used and the free memory in GB."""
        used: int | None = None
        free: int | None = None
        if not self._cuda:
            used = _size_bytes('/proc/self/status', 'VmRSS')
            free = _size_bytes('/proc/meminfo', 'MemAvailable')
        elif nvml and (memory := _query(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))):
            used, free = memory.used, memory.free
        elif 'torch' in sys.modules:
            try:
                free, total = sys.modules['torch'].cuda.mem_get_info(self._device)
                if self._integrated:    # its driver reports the page cache as used
                    free = _size_bytes('/proc/meminfo', 'MemAvailable') or free
                used = total - free
            except RuntimeError:        # a CUDA error, which the engine reports
                pass
        return None if used is None else used / 1e9, None if free is None else free / 1e9


def _query(nvml: Any, query: Callable[[], Any]) -> Any:
    try:
        return query()
    # The device does not support it, NVML was just closed, or an old pynvml, such as that of
    # Ubuntu 22.04, lacks it.
    except (nvml.NVMLError, AttributeError):
        return None


def _throttle_reasons(nvml: Any, handle: Any, of_board: Any) -> str:
    """Return NVML's reasons, and the low clocks of a Jetson, which NVML does not report."""
    bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    names = [name for name, bit in _THROTTLE_REASONS.items() if bits & bit]
    if of_board not in (None, 'none'):
        names.append(of_board)
    return ' '.join(names) or 'none'


def find_engine_peak(footprint: Footprint, config: DecodeConfig) -> Peak:
    """
    Find the peak bandwidth of the memory that holds an engine's weights.

    If it has to be measured, this takes about a second, and 256 MiB on a GPU.
    """
    if not footprint.device.startswith('cuda'):
        # Without the name, because a CPU can be called like a GPU (AMD A10, NVIDIA A10). All cores
        # read, because the peak of the bus does not depend on how many threads decode.
        peak = find_peak(config.roofline.peak_bandwidth_gb_s, '',
                         measure=measure_cpu_read_bandwidth)
        return peak if peak.source == 'parameter' else replace(
            peak, no_floor=fits_cache(footprint.read_weight_bytes, last_cache_bytes()))
    return find_peak(
        config.roofline.peak_bandwidth_gb_s, footprint.device_name,
        driver=lambda: _memory_bus(footprint.device),
        measure=lambda: _measure_cuda_read_bandwidth(footprint.device))


def _memory_bus(device: str) -> tuple[float, int] | None:
    """Return the memory clock in kHz and the bus width in bits, None if torch has neither."""
    import torch
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, 'memory_clock_rate', 0)
    width = getattr(properties, 'memory_bus_width', 0)
    return (clock, width) if clock and width else None


def _measure_cuda_read_bandwidth(device: str) -> float:
    """Read 256 MiB ten times, and return the best rate in bytes per second."""
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


def _size_bytes(path: str, name: str) -> int | None:
    """Return a size in kB from a /proc file in bytes, None if it is missing."""
    try:
        match = re.search(rf'^{name}:\s*(\d+) kB', Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None
