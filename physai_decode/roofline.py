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
How fast a decode step can be at best: the bytes it must read over the memory bus's peak.

Pure functions of shapes, and where the peak comes from. It knows nothing of torch or ROS, and of
no limit but the memory bus: a step bound by arithmetic (a long prefill) has another floor, and
weights that fit into a processor's cache can be read faster than memory allows, so that a small
model on a CPU can be above 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
import os
from pathlib import Path
import re
import threading
import time

from physai_decode.engine import Footprint

CONVENTIONS = ('read', 'checkpoint')
TRIES_A_TURN = 5
REST_S = 0.1

# GB/s (1e9 bytes) by device name, the first match wins; each from the vendor's data sheet of
# that name. A MIG slice has only a part of its GPU's bandwidth and is not looked up.
_DATASHEETS = (
    (r'\bB200\b', 8000.0, 'NVIDIA HGX B200 datasheet'),
    (r'\bGH200 144G', 4900.0, 'NVIDIA GH200 Grace Hopper Superchip datasheet, HBM3e'),
    (r'\bGH200 480GB\b', 4000.0, 'NVIDIA GH200 Grace Hopper Superchip datasheet, HBM3'),
    (r'\bH200\b', 4800.0, 'NVIDIA H200 datasheet'),
    (r'\bH100 NVL\b', 3900.0, 'NVIDIA H100 datasheet, NVL'),
    (r'\bH100 PCIe\b', 2000.0, 'NVIDIA H100 PCIe product brief'),
    (r'\bH100 (80GB HBM3|SXM)', 3350.0, 'NVIDIA H100 datasheet, SXM'),
    (r'\bA100-SXM4-80GB\b', 2039.0, 'NVIDIA A100 datasheet, 80GB SXM'),
    (r'\bA100 80GB PCIe\b', 1935.0, 'NVIDIA A100 datasheet, 80GB PCIe'),
    (r'\bA100-(SXM4|PCIE)-40GB\b', 1555.0, 'NVIDIA A100 datasheet, 40GB'),
    (r'\bA10G?\b', 600.0, 'NVIDIA A10 datasheet'),
    (r'\bL40S\b', 864.0, 'NVIDIA L40S datasheet'),
    (r'\bL40\b', 864.0, 'NVIDIA L40 datasheet'),
    (r'\bL4\b', 300.0, 'NVIDIA L4 datasheet'),
    (r'\bT4\b', 320.0, 'NVIDIA T4 datasheet'),
    (r'\bRTX 6000 Ada\b', 960.0, 'NVIDIA RTX 6000 Ada Generation datasheet'),
    (r'\bRTX A6000\b', 768.0, 'NVIDIA RTX A6000 datasheet'),
    (r'\bRTX 5090\b(?! Laptop)', 1792.0, 'NVIDIA RTX Blackwell GPU architecture, RTX 5090'),
    (r'\bRTX 4090\b(?! Laptop)', 1008.0, 'NVIDIA Ada GPU architecture, RTX 4090'),
    (r'\bGB10\b|\bDGX Spark\b', 273.0, 'NVIDIA DGX Spark datasheet'),
    (r'\b(AGX Thor|Thor T[45]000|T[45]000)\b', 273.0, 'NVIDIA Jetson Thor datasheet'),
    (r'\bAGX Orin\b', 204.8, 'NVIDIA Jetson AGX Orin datasheet'),
    (r'\bOrin NX\b', 102.4, 'NVIDIA Jetson Orin NX datasheet'),
    (r'\bOrin Nano\b.*\bSuper\b.*\b4GB\b', 51.0, 'NVIDIA Jetson Orin Nano datasheet, 4GB Super'),
    (r'\bOrin Nano\b.*\bSuper\b', 102.0, 'NVIDIA Jetson Orin Nano datasheet, 8GB Super'),
    (r'\bOrin Nano\b.*\b4GB\b', 34.0, 'NVIDIA Jetson Orin Nano datasheet, 4GB'),
    (r'\bOrin Nano\b', 68.0, 'NVIDIA Jetson Orin Nano datasheet, 8GB'),
)

# GPUs that share the board's memory. CUDA's memory clock is not that of the DRAM there.
_INTEGRATED = re.compile(r'\b(Orin|Thor|GB10|Xavier|Tegra)\b', re.IGNORECASE)

_SLICE = re.compile(r'\bMIG\b')
BEATEN = 1.03                   # times the peak: more is no error of measurement


@dataclass(frozen=True)
class Peak:
    """The memory's peak read bandwidth in bytes per second, None where unknown, and its source."""

    bytes_per_s: float | None
    source: str     # parameter, driver, NAME datasheet, measured, observed in steps, unknown
    no_floor: str = ''              # why it is no floor of a step; empty where it is

    @property
    def floor_bytes_per_s(self) -> float | None:
        """What a step's floor is made with, None where it has none."""
        return None if self.no_floor else self.bytes_per_s


def kv_bytes(layers: int, kv_heads: int, head_dim: int, context: int, element_bytes: int,
             sliding_window: int = 0) -> int:
    """
    Give the bytes of keys and values that one decode step reads.

    :param context: tokens in the cache; no more than sliding_window of them count where that is
        not 0.
    """
    if sliding_window:
        context = min(context, sliding_window)
    return 2 * layers * kv_heads * head_dim * context * element_bytes


def floor_s(weight_bytes: int, kv_bytes: int, peak_bytes_per_s: float | None) -> float | None:
    """Give the least time of one decode step in seconds, None where the peak is unknown."""
    if not peak_bytes_per_s:
        return None
    return (weight_bytes + kv_bytes) / peak_bytes_per_s


def r_floor(floor_s: float | None, observed_s: float | None) -> float | None:
    """Give the floor over the observed time: 1 is the limit; None where either is not known."""
    if floor_s is None or not observed_s:
        return None
    return floor_s / observed_s


def is_integrated(device_name: str) -> bool:
    """Tell whether a GPU of this name shares the board's memory, as a Jetson's does."""
    return bool(_INTEGRATED.search(device_name))


class Roofline:
    """The floor of one engine's decode step on one memory bus."""

    def __init__(self, footprint: Footprint, peak: Peak) -> None:
        """
        Keep what the floor is made of.

        :param footprint: the engine's shapes and bytes.
        :param peak: the memory bus.
        """
        self.footprint = footprint
        self.peak = peak

    def kv_bytes(self, context: int) -> int:
        """Give the bytes of keys and values that a step at this context (tokens) reads."""
        shape = self.footprint
        windowed = shape.layers if shape.windowed_layers is None else shape.windowed_layers
        rest = shape.kv_heads, shape.head_dim, context, shape.kv_element_bytes
        return (kv_bytes(windowed, *rest, shape.sliding_window)
                + kv_bytes(shape.layers - windowed, *rest))

    def step_bytes(self, context: int, convention: str = 'read') -> int:
        """
        Give all bytes that a step at this context (tokens) must read.

        :param convention: read (what the step really reads) or checkpoint (all weights of the
            checkpoint at their stored size).
        """
        if convention not in CONVENTIONS:
            raise ValueError(f'convention is {convention!r}: allowed are {", ".join(CONVENTIONS)}')
        weights = (self.footprint.read_weight_bytes if convention == 'read'
                   else self.footprint.checkpoint_weight_bytes)
        return weights + self.kv_bytes(context)

    def floor_s(self, context: int, convention: str = 'read') -> float | None:
        """Give the least time in seconds of a step at this context, None where unknown."""
        return floor_s(self.step_bytes(context, convention), 0, self.peak.floor_bytes_per_s)


def find_peak(parameter_gb_s: float, device_name: str,
              driver: Callable[[], tuple[float, int] | None] | None = None,
              measure: Callable[[], float] | None = None) -> Peak:
    """
    Find the memory's peak bandwidth: parameter, driver, data sheet, measurement, in this order.

    The driver's figure is not used for a GPU that shares the board's memory (Jetson): there CUDA
    gives the GPU's own clock for the memory's. Nor for a slice of a GPU (MIG), which has a part.

    :param parameter_gb_s: what the user set, in GB/s; 0 for nothing.
    :param device_name: as the device's driver gives it, such as ``NVIDIA L4``.
    :param driver: gives the memory clock in kHz (of a bus that moves two words a clock) and the
        bus width in bits, or None where the driver does not say.
    :param measure: reads a large buffer, gives bytes per second. Less than the true peak, so
        r_floor comes out too high.
    """
    if parameter_gb_s > 0:
        return Peak(parameter_gb_s * 1e9, 'parameter')
    whole = not (is_integrated(device_name) or _SLICE.search(device_name))
    if driver is not None and whole:
        clock_khz, width_bits = driver() or (0, 0)
        if clock_khz and width_bits:
            return Peak(2 * clock_khz * 1e3 * width_bits / 8, 'driver')
    found = datasheet(device_name)
    if found is None and _INTEGRATED.search(device_name):
        found = datasheet(board_name())
    if found is not None:
        return found
    rate = measure() if measure is not None else 0.0
    return Peak(rate, 'measured') if rate > 0 else Peak(None, 'unknown')


def datasheet(device_name: str) -> Peak | None:
    """Give the peak that a data sheet states for a device of this name, None where none does."""
    if _SLICE.search(device_name):
        return None
    for pattern, gb_s, source in _DATASHEETS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return Peak(gb_s * 1e9, source)
    return None


def board_name(path: str = '/proc/device-tree/model') -> str:
    """
    Name the board, such as ``NVIDIA Jetson AGX Orin Developer Kit``; empty where it says nothing.

    A Jetson's GPU is just called Orin on all of them. The two Orin Nano modules are told apart by
    their memory, which the name does not say.
    """
    try:
        name = Path(path).read_bytes().decode('utf-8', 'replace').strip('\0\n ')
    except OSError:
        return ''
    memory_bytes = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return f'{name} 4GB' if 'Orin Nano' in name and memory_bytes < 6e9 else name


def beaten(peak: Peak, bandwidth_gb_s: float | None) -> Peak | None:
    """
    Give the peak that takes the place of one that steps have beaten, None where they have not.

    :param bandwidth_gb_s: the median of many steps.
    """
    known = peak.floor_bytes_per_s
    if known is None or bandwidth_gb_s is None or bandwidth_gb_s * 1e9 <= BEATEN * known:
        return None
    return Peak(bandwidth_gb_s * 1e9, 'observed in steps')


def at_clock(peak: Peak, part: float | None) -> Peak:
    """
    Give a data sheet's peak at the memory clock in force; the sheet's own is the most.

    :param part: of the highest memory clock, None where it is not known.
    """
    if peak.bytes_per_s is None or part is None or not peak.source.endswith('datasheet'):
        return peak
    part = min(part, 1.0)
    return replace(peak, bytes_per_s=part * peak.bytes_per_s)


def fits_cache(weight_bytes: int, cache_bytes: int | None) -> str:
    """
    Say that weights stay in a processor's cache, so that the bus is no floor; else empty.

    :param cache_bytes: as `last_cache_bytes` gives it.
    """
    if cache_bytes is None or weight_bytes > cache_bytes:
        return ''
    return (f'the weights that a step reads ({weight_bytes / 1e6:.1f} MB) fit the last-level '
            f'cache ({cache_bytes / 1e6:.1f} MB), which is faster than the bus')


def measure_cpu_read_bandwidth(threads: int = 0, tries: int = 20) -> float:
    """
    Read a buffer much larger than the caches, and give the best rate in bytes per second.

    :param threads: how many read at once, each its own part; 0 takes as many as there are cores
        for this process.
    :param tries: reads of the whole buffer, with a rest after some: another program that is busy
        now and then meets some of them only.
    """
    import numpy

    threads = threads or len(os.sched_getaffinity(0))
    # Four times the last cache, at least 128 MiB; what is left in the cache from the last round
    # is then overwritten before it is read again.
    words = max(4 * (last_cache_bytes() or 0), 128 << 20) // 8
    parts = numpy.array_split(numpy.ones(words, numpy.uint64), threads)
    best_s = float('inf')
    for turn in range(1, tries + 1):
        readers = [threading.Thread(target=numpy.bitwise_or.reduce, args=(part,))
                   for part in parts]
        begin_s = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best_s = min(best_s, time.perf_counter() - begin_s)
        if turn % TRIES_A_TURN == 0 and turn < tries:
            time.sleep(REST_S)
    return 8 * words / best_s


def last_cache_bytes(cpus: str = '/sys/devices/system/cpu') -> int | None:
    """Give the bytes of all last-level caches together, None where the system does not say."""
    caches: dict[tuple[int, str], int] = {}
    for folder in Path(cpus).glob('cpu[0-9]*/cache/index*'):
        try:
            level, size, cores = ((folder / name).read_text().strip()
                                  for name in ('level', 'size', 'shared_cpu_list'))
        except OSError:
            continue
        if found := re.fullmatch(r'(\d+)([KMG]?)', size):
            unit = {'': 0, 'K': 10, 'M': 20, 'G': 30}[found[2]]
            caches[int(level), cores] = int(found[1]) << unit
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or None
