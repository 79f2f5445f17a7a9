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
The floor of a decode step: the bytes that it has to read over the peak bandwidth of the memory.

The floor considers only the memory bus. Work that is bound by arithmetic, such as a long prefill,
has another limit. Weights that fit into a CPU's cache can be read faster than from memory, so the
r_floor of a small model on a CPU could exceed 1.
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
READS_BETWEEN_PAUSES = 5
PAUSE_S = 0.1

# GB/s (1e9 bytes) by device name, from the vendor's data sheet; the first match wins. MIG slices
# are excluded, because they have only a part of the bandwidth.
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

# The memory clock in MHz for which the peak of a data sheet holds.
_RATED_MHZ = {
    'NVIDIA Jetson AGX Orin datasheet': 3200, 'NVIDIA Jetson Orin NX datasheet': 3200,
    'NVIDIA Jetson Orin Nano datasheet, 4GB Super': 3200,
    'NVIDIA Jetson Orin Nano datasheet, 8GB Super': 3200,
    'NVIDIA Jetson Orin Nano datasheet, 4GB': 2133, 'NVIDIA Jetson Orin Nano datasheet, 8GB': 2133}

# GPUs that share the board's memory. For them, CUDA does not report the clock of the DRAM.
_JETSON = re.compile(r'\b(Orin|Thor|Xavier|Tegra)\b', re.IGNORECASE)
_INTEGRATED = re.compile(rf'{_JETSON.pattern}|\bGB10\b', re.IGNORECASE)

# Jetson modules by the number that /proc/device-tree/compatible has, because a board of another
# vendor can have any name.
_MODULES = (
    ('p3834', 'AGX Thor'), ('p3701', 'AGX Orin'), (r'p3767-000[01]', 'Orin NX'),
    (r'p3767-000[345]\S*-super', 'Orin Nano Super'), (r'p3767-000[345]', 'Orin Nano'))

_SLICE = re.compile(r'\bMIG\b')
TOLERANCE = 1.03                # a bandwidth above this many times the peak refutes the peak


@dataclass(frozen=True)
class Peak:
    """The peak read bandwidth of the memory, and its source."""

    bytes_per_s: float | None       # None: unknown
    source: str     # parameter, driver, NAME datasheet, measured, observed in steps, unknown
    no_floor: str = ''              # why it does not limit a step; empty if it does

    @property
    def floor_bytes_per_s(self) -> float | None:
        """The bandwidth that limits a step, None if there is no such limit or it is unknown."""
        return None if self.no_floor else self.bytes_per_s


def kv_bytes(layers: int, kv_heads: int, head_dim: int, context: int, element_bytes: int,
             sliding_window: int = 0) -> int:
    """
    Return the size of the KV cache that a decode step reads, in bytes.

    :param context: tokens in the cache.
    :param sliding_window: the most tokens that a step reads; 0 for no limit.
    """
    if sliding_window:
        context = min(context, sliding_window)
    return 2 * layers * kv_heads * head_dim * context * element_bytes


def floor_s(weight_bytes: float, kv_bytes: float, peak_bytes_per_s: float | None) -> float | None:
    """Return the floor of a decode step in seconds, None if the peak is unknown."""
    if not peak_bytes_per_s:
        return None
    return (weight_bytes + kv_bytes) / peak_bytes_per_s


def r_floor(floor_s: float | None, observed_s: float | None) -> float | None:
    """Return the floor over the observed time, None if either is unknown; 1 is the limit."""
    if floor_s is None or not observed_s:
        return None
    return floor_s / observed_s


def is_integrated(device_name: str) -> bool:
    """Return whether a GPU shares the board's memory, as on a Jetson."""
    return bool(_INTEGRATED.search(device_name))


def is_jetson(device_name: str) -> bool:
    """Return whether a GPU is that of a Jetson."""
    return bool(_JETSON.search(device_name))


class Roofline:
    """The floor of one engine's decode step on one memory bus."""

    def __init__(self, footprint: Footprint, peak: Peak) -> None:
        """
        Keep the figures of the floor.

        :param footprint: the shapes and sizes of the engine's model.
        :param peak: the peak bandwidth of the memory bus.
        """
        self.footprint = footprint
        self.peak = peak

    def kv_bytes(self, context: int) -> int:
        """Return the size of the KV cache that a step reads at a context in tokens, in bytes."""
        shape = self.footprint
        windowed = shape.layers if shape.windowed_layers is None else shape.windowed_layers
        rest = shape.kv_heads, shape.head_dim, context, shape.kv_element_bytes
        return (kv_bytes(windowed, *rest, shape.sliding_window)
                + kv_bytes(shape.layers - windowed, *rest))

    def step_bytes(self, context: int, convention: str = 'read') -> int:
        """
        Return the bytes that a step has to read at a context in tokens.

        :param convention: ``read`` counts the weights that the step really reads, ``checkpoint``
            all weights of the checkpoint at their stored size.
        :raises ValueError: the convention is not one of these.
        """
        if convention not in CONVENTIONS:
            raise ValueError(f'convention is {convention!r}: expected {" or ".join(CONVENTIONS)}')
        weights = (self.footprint.read_weight_bytes if convention == 'read'
                   else self.footprint.checkpoint_weight_bytes)
        return weights + self.kv_bytes(context)

    def floor_s(self, context: int, convention: str = 'read') -> float | None:
        """Return the floor of a step at a context in tokens, in seconds; None if unknown."""
        return floor_s(self.step_bytes(context, convention), 0, self.peak.floor_bytes_per_s)


def find_peak(parameter_gb_s: float, device_name: str,
              driver: Callable[[], tuple[float, int] | None] | None = None,
              measure: Callable[[], float] | None = None) -> Peak:
    """
    Find the peak bandwidth of the memory.

    The sources are, in this order: parameter, driver, data sheet, measurement. The driver is not
    used for a GPU that shares the board's memory (Jetson), for which CUDA reports the clock of the
    GPU, or for a MIG slice, which has only a part of the bandwidth.

    :param parameter_gb_s: set by the user, in GB/s; 0 if not set.
    :param device_name: as the driver reports it, such as ``NVIDIA L4``.
    :param driver: returns the memory clock in kHz (of a double data rate bus) and the bus width in
        bits, or None if the driver does not report them.
    :param measure: reads a large buffer and returns bytes per second. This is less than the true
        peak, so r_floor is too high.
    """
    if parameter_gb_s > 0:
        return Peak(parameter_gb_s * 1e9, 'parameter')
    if driver is not None and not (is_integrated(device_name) or _SLICE.search(device_name)):
        clock_khz, width_bits = driver() or (0, 0)
        if clock_khz and width_bits:
            return Peak(2 * clock_khz * 1e3 * width_bits / 8, 'driver')
    peak = datasheet(device_name)
    if peak is None and _INTEGRATED.search(device_name):
        peak = datasheet(board_name())
    if peak is not None:
        return peak
    rate = measure() if measure is not None else 0.0
    return Peak(rate, 'measured') if rate > 0 else Peak(None, 'unknown')


def datasheet(device_name: str) -> Peak | None:
    """Return the peak in the data sheet of a device, None if there is no entry."""
    if _SLICE.search(device_name):
        return None
    for pattern, gb_s, source in _DATASHEETS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return Peak(gb_s * 1e9, source)
    return None


def board_name(folder: str = '/proc/device-tree') -> str:
    """
    Return the name of the board, such as ``NVIDIA Jetson AGX Orin Developer Kit``, or ''.

    The GPU of every Orin board is called Orin. If the board's own name is in no data sheet, that
    of its module is added. The name of an Orin Nano gets its memory size as a suffix, because its
    two modules have the same name.
    """
    name, compatible = (_text(Path(folder) / file) for file in ('model', 'compatible'))
    if datasheet(name) is None:
        module = next((module for number, module in _MODULES
                       if re.search(rf'\b{number}', compatible)), '')
        name = f'{name} {module}'.strip()
    memory_bytes = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return f'{name} 4GB' if 'Orin Nano' in name and memory_bytes < 6e9 else name


def _text(path: Path) -> str:
    """Return a property of the device tree, with spaces between its strings; '' if missing."""
    try:
        return path.read_bytes().decode('utf-8', 'replace').replace('\0', ' ').strip()
    except OSError:
        return ''


def observed_peak(peak: Peak, bandwidth_gb_s: float | None) -> Peak | None:
    """
    Return a corrected peak if decode steps were faster than the known one, otherwise None.

    :param bandwidth_gb_s: the median of many steps.
    """
    known = peak.floor_bytes_per_s
    if known is None or bandwidth_gb_s is None or bandwidth_gb_s * 1e9 <= TOLERANCE * known:
        return None
    return Peak(bandwidth_gb_s * 1e9, 'observed in steps')


def at_clock(peak: Peak, clocks_mhz: tuple[float, float] | None) -> Peak:
    """
    Scale the peak of a data sheet, which is for the rated memory clock, to the current clock.

    :param clocks_mhz: the current and the highest memory clock, None if unknown. A power mode can
        limit the highest one, so it is used only for boards whose rated clock is unknown.
    """
    if peak.bytes_per_s is None or clocks_mhz is None or 'datasheet' not in peak.source:
        return peak
    current, highest = clocks_mhz
    part = min(current / _RATED_MHZ.get(peak.source, highest), 1.0)
    return replace(peak, bytes_per_s=part * peak.bytes_per_s)


def fits_cache(weight_bytes: int, cache_bytes: int | None) -> str:
    """
    Return a message if the weights fit the CPU's cache, so that the bus is no limit, or ''.

    :param cache_bytes: see `last_cache_bytes`.
    """
    if cache_bytes is None or weight_bytes > cache_bytes:
        return ''
    return (f'the weights that a step reads ({weight_bytes / 1e6:.1f} MB) fit the last-level '
            f'cache ({cache_bytes / 1e6:.1f} MB), which is faster than the bus')


def measure_cpu_read_bandwidth(threads: int = 0, tries: int = 20) -> float:
    """
    Read a buffer much larger than the caches, and return the best rate in bytes per second.

    :param threads: number of threads, each of which reads its own part; 0 for one per core that
        this process may use.
    :param tries: reads of the whole buffer. There are pauses between them, so that another
        program that is busy for a while disturbs only some of them.
    """
    import numpy

    threads = threads or len(os.sched_getaffinity(0))
    # Four times the last-level cache and at least 128 MiB, so that each read evicts its data from
    # the cache before the next read.
    words = max(4 * (last_cache_bytes() or 0), 128 << 20) // 8
    parts = numpy.array_split(numpy.ones(words, numpy.uint64), threads)
    best_s = float('inf')
    for number in range(1, tries + 1):
        readers = [threading.Thread(target=numpy.bitwise_or.reduce, args=(part,))
                   for part in parts]
        begin_s = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best_s = min(best_s, time.perf_counter() - begin_s)
        if number % READS_BETWEEN_PAUSES == 0 and number < tries:
            time.sleep(PAUSE_S)
    return 8 * words / best_s


def last_cache_bytes(cpus: str = '/sys/devices/system/cpu') -> int | None:
    """Return the total size of all last-level caches in bytes, None if unknown."""
    caches: dict[tuple[int, str], int] = {}
    for folder in Path(cpus).glob('cpu[0-9]*/cache/index*'):
        try:
            level, size, cores = ((folder / name).read_text().strip()
                                  for name in ('level', 'size', 'shared_cpu_list'))
        except OSError:
            continue
        if match := re.fullmatch(r'(\d+)([KMG]?)', size):
            shift = {'': 0, 'K': 10, 'M': 20, 'G': 30}[match[2]]
            caches[int(level), cores] = int(match[1]) << shift
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or None
