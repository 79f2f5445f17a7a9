"""
The machine a measurement was made on: device, driver, clocks, versions, memory in use.

Torch is asked only where it is already loaded; what can't be found out is left out.
"""

from importlib import metadata
import os
from pathlib import Path
import platform
import sys
from typing import Any

from physai_decode import __version__

_PACKAGES = ('torch', 'triton', 'transformers', 'safetensors', 'numpy', 'bitsandbytes',
             'gptqmodel', 'exllamav2', 'rclpy')


def describe() -> dict[str, Any]:
    """Give what somebody needs to judge or repeat a measurement made in this process."""
    told = {
        'physai_decode': __version__,
        'python': platform.python_version(),
        'system': f'{platform.system()} {platform.release()} {platform.machine()}',
        'cpu': _cpu_name(),
        'cpu_cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
        else os.cpu_count(),
        'memory_gb': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9, 1),
        'packages': {},
    }
    for package in _PACKAGES:
        try:
            told['packages'][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    torch = sys.modules.get('torch')
    if torch is not None:
        told['torch_threads'] = torch.get_num_threads()
        if torch.cuda.is_initialized():
            told['gpu'] = _gpu(torch)
    return told


def _gpu(torch):
    index = torch.cuda.current_device()
    seen = torch.cuda.get_device_properties(index)
    told = {
        'name': seen.name, 'count': torch.cuda.device_count(),
        'compute_capability': f'{seen.major}.{seen.minor}',
        'multiprocessors': seen.multi_processor_count,
        'memory_gb': round(seen.total_memory / 1e9, 1),
        'cuda': torch.version.cuda,
    }
    with _Nvml(seen) as nvml:
        if nvml:
            told.update(nvml.describe())
    return told


def memory() -> dict[str, int]:
    """Give peak and present memory in bytes: resident, by torch on the device, by the driver."""
    import resource
    told = {'resident_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    torch = sys.modules.get('torch')
    if torch is not None and torch.cuda.is_initialized():
        told['torch_peak_bytes'] = torch.cuda.max_memory_allocated()
        with _Nvml(torch.cuda.get_device_properties(torch.cuda.current_device())) as nvml:
            if nvml:
                told['device_used_bytes'] = nvml.used_bytes()
    return told


def memory_bus() -> tuple[float, int] | None:
    """Give (memory clock in kHz, bus width in bits) of torch's current CUDA device, or None."""
    torch = sys.modules.get('torch')
    if torch is None or not torch.cuda.is_initialized():
        return None
    seen = torch.cuda.get_device_properties(torch.cuda.current_device())
    clock, width = (getattr(seen, name, 0) for name in ('memory_clock_rate', 'memory_bus_width'))
    return (clock, width) if clock and width else None


class _Nvml:
    """NVML for one device while inside ``with``; false where there is none."""

    def __init__(self, properties):
        self.uuid = str(getattr(properties, 'uuid', ''))
        self.handle = None

    def __enter__(self):
        try:
            import pynvml
            pynvml.nvmlInit()
        except Exception:                   # not installed, no driver, or one without NVML
            return self
        self.pynvml = pynvml
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = pynvml.nvmlDeviceGetUUID(handle)
            uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
            if self.uuid in uuid:
                self.handle = handle
                break
        return self

    def __exit__(self, *_):
        if self.handle is not None:
            self.pynvml.nvmlShutdown()

    def __bool__(self):
        return self.handle is not None

    def used_bytes(self):
        return int(self.pynvml.nvmlDeviceGetMemoryInfo(self.handle).used)

    def describe(self):
        nvml, handle = self.pynvml, self.handle
        asked = {
            'driver': nvml.nvmlSystemGetDriverVersion,
            'sm_clock_mhz': lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            'sm_clock_max_mhz': lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            'memory_clock_mhz': lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            'temperature_c': lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU),
            'power_limit_w': lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        }
        told = {}
        for name, ask in asked.items():
            try:
                value = ask()
            except nvml.NVMLError:
                continue
            told[name] = value.decode() if isinstance(value, bytes) else value
        return told


def _cpu_name():
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(':')
        if name.strip() in ('model name', 'Model'):
            return value.strip()
    return platform.processor() or platform.machine()
