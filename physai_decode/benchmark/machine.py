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
Describe the machine of a measurement: device, driver, clocks, versions, memory in use.

Torch is used only if it is already loaded. Unknown values are left out.
"""

from collections.abc import Callable
import contextlib
from importlib import metadata
import os
from pathlib import Path
import platform
import resource
import sys
from typing import Any

from physai_decode import __version__
from physai_decode.engine import Footprint
from physai_decode.realtime import short_slice
from physai_decode.realtime import SLICE_NS
from physai_decode.telemetry import Telemetry

_PACKAGES = ('torch', 'triton', 'transformers', 'safetensors', 'numpy', 'bitsandbytes',
             'gptqmodel', 'exllamav2', 'rclpy')


def describe(footprint: Footprint) -> dict[str, Any]:
    """Describe the machine and software, to assess or repeat a measurement of this process."""
    facts: dict[str, Any] = {
        'physai_decode': __version__,
        'python': platform.python_version(),
        'system': f'{platform.system()} {platform.release()} {platform.machine()}',
        'cpu': footprint.device_name,
        'cpu_cores': len(os.sched_getaffinity(0)),
        'memory_gb': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9, 1),
        'packages': packages(),
    }
    if footprint.sleeps:
        with short_slice(True) as granted:
            facts['time_slice'] = f'{1e-6 * SLICE_NS:g} ms' if granted else 'default'
    torch = sys.modules.get('torch')
    if torch is not None:
        facts['torch_threads'] = torch.get_num_threads()
        if footprint.device.startswith('cuda'):
            from physai_decode.engines.device import cpu_name
            facts['cpu'] = cpu_name()
            facts['gpu'] = _gpu(torch, footprint)
    return facts


def load_average() -> dict[str, float]:
    """Return the mean number of processes that run or wait for a core, by period."""
    return {f'{minutes} min:': round(load, 2)
            for minutes, load in zip((1, 5, 15), os.getloadavg(), strict=True)}


def waited_s() -> float | None:
    """Return how long the threads of this process have waited for a core; None if unknown."""
    total_ns = 0
    try:
        for thread in Path('/proc/self/task').iterdir():
            with contextlib.suppress(FileNotFoundError):        # the thread has ended
                total_ns += int((thread / 'schedstat').read_text().split()[1])
    except (IndexError, OSError, ValueError):
        return None
    return total_ns * 1e-9


def packages() -> dict[str, str]:
    """Return the versions of the installed packages that a measurement depends on."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def memory(footprint: Footprint) -> dict[str, float]:
    """Return memory in GB: peak of the process, peak of torch and total use on the device."""
    used = {'resident_peak_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if footprint.device.startswith('cuda'):
        torch = sys.modules['torch']
        used['torch_peak_gb'] = torch.cuda.max_memory_allocated(footprint.device) / 1e9
        used['device_used_gb'] = _telemetry(footprint)['memory_used_gb']
    return used


def driver() -> str | None:
    """Return the version of the driver, or None if NVML does not report it."""
    return next(iter(_nvml(lambda nvml: [nvml.nvmlSystemGetDriverVersion()])), None)


def gpus() -> list[str]:
    """Return the UUIDs of the GPUs; empty if NVML does not report them."""
    return _nvml(lambda nvml: [
        nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index))
        for index in range(nvml.nvmlDeviceGetCount())])


def _nvml(read: Callable[[Any], list[Any]]) -> list[str]:
    """Return what ``read`` reads from NVML as text; empty if it is not available."""
    try:
        import pynvml
        pynvml.nvmlInit()
        try:
            found = read(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except Exception:                       # pynvml is not installed, or NVML is not available
        return []
    return [each.decode() if isinstance(each, bytes) else str(each) for each in found]


def _gpu(torch: Any, footprint: Footprint) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(footprint.device)
    facts = {
        'name': properties.name, 'count': torch.cuda.device_count(), 'driver': driver(),
        'cuda': torch.version.cuda, 'compute_capability': f'{properties.major}.{properties.minor}',
        'multiprocessors': properties.multi_processor_count,
        'memory_gb': round(properties.total_memory / 1e9, 1)}
    facts.update(_telemetry(footprint))
    return {name: value for name, value in facts.items() if value is not None}


def _telemetry(footprint: Footprint) -> dict[str, Any]:
    telemetry = Telemetry(footprint)
    try:
        return telemetry.read()
    finally:
        telemetry.close()
