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
The device and dtype of an engine, its memory, streams and timers.

All engines that compute with torch share this module.
"""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
import os
from pathlib import Path
import platform
import re
import resource
import time
import traceback
from typing import Any

from physai_decode.config import EngineConfig
from physai_decode.engine import EngineError
from physai_decode.engines import chip
import torch

WARM_UP_STEPS = 3
_SHARE = 'CUDA_MPS_ACTIVE_THREAD_PERCENTAGE'
_DEFAULT_THREADS = torch.get_num_threads()  # of torch, before `select` changes it


def select(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    """
    Select the device and the dtype by the settings.

    On a CPU, ``cpu_threads`` is set for the whole process. On a GPU, ``gpu_share_percent`` is; it
    has to be set before the process first uses the GPU.

    :raises EngineError: this machine lacks the device or the dtype, or the process already uses
        the GPU.
    """
    _limit_share(config.gpu_share_percent)
    device = _device(config.device)
    if device.type == 'cpu':
        torch.set_num_threads(config.cpu_threads or _DEFAULT_THREADS)
    return device, _dtype(config.dtype, device)


def describe(device: torch.device) -> tuple[str, str]:
    """Return the name of the device, and its UUID or an empty string."""
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        uuid = getattr(properties, 'uuid', '')
        return properties.name, f'GPU-{uuid}' if uuid else ''
    return cpu_name(), ''


def cpu_name() -> str:
    """Return the name of the CPU, or its architecture if Linux does not report a name."""
    try:
        found = re.search(
            r'^(?:model name|Model)\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine() or 'CPU'


def free_bytes(device: torch.device) -> int | None:
    """
    Return the free memory of the device; None if unknown.

    For the host, a limit on the address space (ulimit -v) counts too.
    """
    # An integrated GPU reports the page cache as used, although it can be reclaimed.
    if not shares_memory(device):
        return torch.cuda.mem_get_info(device)[0]
    available = _kilobytes('/proc/meminfo', 'MemAvailable')
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _kilobytes('/proc/self/status', 'VmSize')
    limits = [] if available is None else [available * 1024]
    if limit != resource.RLIM_INFINITY and used is not None:
        limits.append(max(0, limit - used * 1024))
    return min(limits, default=None)


def shares_memory(device: torch.device) -> bool:
    """Whether the memory of the device is that of the host, as on a CPU or a Jetson."""
    return device.type != 'cuda' or bool(torch.cuda.get_device_properties(device).is_integrated)


def _kilobytes(path: str, name: str) -> int | None:
    try:
        found = re.search(rf'^{name}:\s*(\d+) kB', Path(path).read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, on the device or the host."""
    # The last one is of PyTorch's allocator on a Jetson, whose NVML does not report the memory.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(
        isinstance(error, RuntimeError) and re.search(
            "can't allocate memory|out of memory|NVML_SUCCESS == r .*CUDACachingAllocator",
            str(error)))


@contextmanager
def enough_memory(device: torch.device, needed_bytes: int) -> Iterator[None]:
    """
    Convert out-of-memory errors in the construction of an engine.

    The memory of a failed construction is freed before the error is raised.

    :param needed_bytes: lower bound for weights and KV cache.
    :raises EngineError: there is too little memory; the message has the needed and free bytes.
    """
    free = free_bytes(device)
    message = (
        f'not enough memory on {device}: at least {needed_bytes / 1e9:.2f} GB are needed, '
        + (f'{free / 1e9:.2f} GB are free' if free is not None else 'the free memory is unknown')
        + '; use a smaller or quantised model or a smaller engine.max_context, or end other '
        'processes on the device')
    if free is not None and needed_bytes > free:
        raise EngineError(message)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        if device.type == 'cuda' and shares_memory(device):
            message += ('; if as much is free, run "sudo sysctl vm.drop_caches=3", because the '
                        'driver may not get the memory of the page cache')
        raise EngineError(message) from None


@contextmanager
def attention_backends(device: torch.device) -> Iterator[None]:
    """
    Exclude cuDNN from scaled_dot_product_attention inside ``with``; no effect on a CPU.

    Use this for attention over a length that changes with every call. PyTorch prefers cuDNN on
    compute capability 9.0 and 10.x, and cuDNN builds a plan for each new length. On an H200
    (PyTorch 2.11, cuDNN 9.19), such a call takes 35 to 37 ms, compared with 0.03 to 0.07 ms with
    PyTorch's own kernels. The setting applies to the whole process.
    """
    if device.type != 'cuda':
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def use(device: torch.device, stream: 'torch.cuda.Stream | None' = None) -> None:
    """
    Make a CUDA device and stream current for this thread; no effect on a CPU.

    :param stream: None selects the default stream of the device.
    """
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream or torch.cuda.default_stream(device))


@cache
def stream(device: torch.device, priority: int) -> 'torch.cuda.Stream | None':
    """
    Return the stream of a priority below 0; None for 0, which the default stream has.

    All engines share it, so that a draft model can run between the steps of another model.
    """
    if device.type != 'cuda' or not priority:
        return None
    return torch.cuda.Stream(device, priority=priority)


def in_force(config: EngineConfig, device: str) -> dict[str, str]:
    """
    Describe the limits in effect on this process's use of its device.

    :param device: of the `Footprint`.
    :returns: the threads of a CPU, or the share of a GPU if it is limited.
    """
    if device == 'cpu':
        return {'cpu_threads': str(torch.get_num_threads())}
    if not device.startswith('cuda') or not config.gpu_share_percent:
        return {}
    if mps_pipe().exists():
        return {'gpu_share': f'{config.gpu_share_percent} %'}
    return {'gpu_share': f'not in force: no MPS daemon listens in {mps_pipe().parent}; start one '
                         'with "nvidia-cuda-mps-control -d", then restart this process'}


def mps_pipe() -> Path:
    """Return the path of the control pipe of the MPS daemon."""
    return Path(os.environ.get('CUDA_MPS_PIPE_DIRECTORY') or '/tmp/nvidia-mps') / 'control'


def _limit_share(percent: int) -> None:
    if percent and torch.cuda.is_initialized() and os.environ.get(_SHARE) != str(percent):
        raise EngineError(
            f'engine.gpu_share_percent is {percent}, but this process already uses the GPU: set '
            'it in the params file and restart the process')
    if percent:
        os.environ[_SHARE] = str(percent)


def give_back(device: torch.device) -> None:
    """Release the memory that PyTorch caches on a CUDA device."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def capture(step: Callable[[], None], device: torch.device,
            pool: Any = None) -> torch.cuda.CUDAGraph:
    """
    Run a step a few times, then capture it in a CUDA graph.

    :param pool: memory pool to share with a graph that never runs at the same time.
    """
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Thread-local, because other threads of the node may query the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local'):
        step()
    return graph


class Stopwatch:
    """Times the work between `start` and `stop`, with CUDA events or the clock of the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == 'cuda':
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._stamps = [0.0, 0.0]

    def start(self) -> None:
        """Start; on CUDA, in the current stream."""
        self._mark(0)

    def stop(self) -> None:
        """Stop; on CUDA, in the current stream and without waiting for it."""
        self._mark(1)

    def read_s(self) -> float:
        """Wait for `stop` and return the time in seconds."""
        if self._events is None:
            return self._stamps[1] - self._stamps[0]
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) * 1e-3

    def _mark(self, index: int) -> None:
        if self._events is None:
            self._stamps[index] = time.perf_counter()
        else:
            self._events[index].record()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """
    Return the stream on which this process warms up and captures graphs, one at a time.

    PyTorch keeps a workspace for cuBLAS (32 MiB on Hopper) for each stream that used it.
    """
    return torch.cuda.Stream(device)


def _device(name: str) -> torch.device:
    if not re.fullmatch(r'auto|cpu|cuda(:\d+)?', name):
        raise EngineError(f'engine.device is {name!r}: expected auto, cpu, cuda or cuda:N')
    if name == 'cpu' or (name == 'auto' and not torch.cuda.is_available()):
        return torch.device('cpu')
    if not torch.cuda.is_available():
        reason = 'finds no CUDA device: check the driver (nvidia-smi)' if torch.version.cuda \
            else 'is built without CUDA: install a build of PyTorch with CUDA'
        raise EngineError(
            f'engine.device is {name!r}, but PyTorch {torch.__version__} {reason} (on a Jetson, '
            'install the PyTorch for its JetPack), or set engine.device to cpu')
    index = int(name[5:]) if ':' in name else 0
    count = torch.cuda.device_count()
    if index >= count:
        raise EngineError(
            f'engine.device is {name!r}, but this machine has {count} CUDA '
            f'device{"s" if count > 1 else ""}: expected cuda:0 to cuda:{count - 1}')
    return torch.device('cuda', index)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    has_bfloat16 = device.type == 'cpu' or chip.capability(device) >= (8, 0)
    if name == 'auto':
        if device.type == 'cpu':
            return torch.float32
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if name not in ('bfloat16', 'float16', 'float32'):
        raise EngineError(
            f'engine.dtype is {name!r}: expected auto, bfloat16, float16 or float32')
    if name == 'bfloat16' and not has_bfloat16:
        raise EngineError(
            f'engine.dtype is bfloat16, which {describe(device)[0]} does not support: set it to '
            'float16 or auto')
    dtype: torch.dtype = getattr(torch, name)
    return dtype
