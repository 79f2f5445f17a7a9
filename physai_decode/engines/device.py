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
The device and number format an engine runs on, its memory and its clock.

Shared by the engines that compute with torch. It knows nothing of models.
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
_OWN_THREADS = torch.get_num_threads()      # before anybody set it


def select(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    """
    Find the device and the number format that the settings ask for.

    On a CPU, ``cpu_threads`` takes effect for the whole process, and on a GPU
    ``gpu_share_percent`` does, which has to be set before the process first uses the GPU.

    :raises EngineError: this machine does not have it, or it is too late for the share.
    """
    _limit_share(config.gpu_share_percent)
    device = _device(config.device)
    if device.type == 'cpu':
        torch.set_num_threads(config.cpu_threads or _OWN_THREADS)
    return device, _dtype(config.dtype, device)


def describe(device: torch.device) -> tuple[str, str]:
    """Give the device's name and its UUID, which is empty where there is none."""
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        uuid = getattr(properties, 'uuid', '')
        return properties.name, f'GPU-{uuid}' if uuid else ''
    return cpu_name(), ''


def cpu_name() -> str:
    """Give the processor's name, or its architecture's where it does not tell."""
    try:
        found = re.search(
            r'^(?:model name|Model)\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine() or 'CPU'


def free_bytes(device: torch.device) -> int | None:
    """
    Give the memory that can still be taken on the device; None where it is not known.

    Of the host it is no more than what a limit of the address space (ulimit -v) leaves.
    """
    # A GPU that shares the host's memory counts the page cache as used, though it can be had.
    if device.type == 'cuda' and not torch.cuda.get_device_properties(device).is_integrated:
        return torch.cuda.mem_get_info(device)[0]
    available = _kilobytes('/proc/meminfo', 'MemAvailable')
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = _kilobytes('/proc/self/status', 'VmSize')
    rooms = [] if available is None else [available * 1024]
    if limit != resource.RLIM_INFINITY and taken is not None:
        rooms.append(max(0, limit - taken * 1024))
    return min(rooms, default=None)


def _kilobytes(path: str, name: str) -> int | None:
    try:
        found = re.search(rf'^{name}:\s*(\d+) kB', Path(path).read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is a lack of memory, on the device or the host."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(
        isinstance(error, RuntimeError)
        and re.search("can't allocate memory|out of memory", str(error)))


@contextmanager
def enough_memory(device: torch.device, needed_bytes: int) -> Iterator[None]:
    """
    Guard the construction of an engine against a lack of memory.

    What the failed construction held is freed before the error leaves here.

    :param needed_bytes: what the weights and the cache take at the least.
    :raises EngineError: with the bytes needed and free.
    """
    free = free_bytes(device)
    message = (
        f'not enough memory on {device}: at least {needed_bytes / 1e9:.2f} GB are needed, '
        + (f'{free / 1e9:.2f} GB are free' if free is not None else 'what is free is not known')
        + '; use a smaller or quantised model or a smaller engine.max_context, or end what else '
        'uses the device')
    if free is not None and needed_bytes > free:
        raise EngineError(message)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise EngineError(message) from None


@contextmanager
def attention_backends(device: torch.device) -> Iterator[None]:
    """
    Keep cuDNN out of scaled_dot_product_attention inside ``with``; on a CPU nothing changes.

    For attention over a length that is new each time. PyTorch prefers cuDNN on chips of 9.0 and
    10.x, and cuDNN makes a plan for each length: on an H200 (PyTorch 2.11, cuDNN 9.19) 35 to 37 ms
    for one call where PyTorch's own kernels take 0.03 to 0.07 ms. The setting is the process's.
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
    Make a CUDA device the current one of this thread: kernels are launched there.

    :param stream: where; None: the device's default stream.
    """
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream or torch.cuda.default_stream(device))


def stream(device: torch.device, priority: int) -> 'torch.cuda.Stream | None':
    """Give a stream of its own for a priority below 0, else None: the default one has 0."""
    if device.type != 'cuda' or not priority:
        return None
    return torch.cuda.Stream(device, priority=priority)


def share(config: EngineConfig) -> dict[str, str]:
    """Tell what limits the part of the GPU that this process takes; nothing without a limit."""
    if not config.gpu_share_percent:
        return {}
    if mps_pipe().exists():
        return {'gpu_share': f'{config.gpu_share_percent} %'}
    return {'gpu_share': f'not in force: no daemon of MPS listens in {mps_pipe().parent}; start '
                         'one with "nvidia-cuda-mps-control -d", then this process again'}


def mps_pipe() -> Path:
    """Give where the daemon of MPS listens, if it runs."""
    return Path(os.environ.get('CUDA_MPS_PIPE_DIRECTORY') or '/tmp/nvidia-mps') / 'control'


def _limit_share(percent: int) -> None:
    if percent and torch.cuda.is_initialized() and os.environ.get(_SHARE) != str(percent):
        raise EngineError(
            f'engine.gpu_share_percent {percent} comes too late: this process already uses the '
            'GPU; set it in the params file and start the process again')
    if percent:
        os.environ[_SHARE] = str(percent)


def give_back(device: torch.device) -> None:
    """Give memory that PyTorch keeps for later back to a CUDA device."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def capture(step: Callable[[], None], device: torch.device,
            pool: Any = None) -> torch.cuda.CUDAGraph:
    """
    Run a step a few times, then capture it in a CUDA graph.

    :param pool: the memory pool of a graph that never runs at the same time, to share.
    """
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads of the node may ask the device for its state meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local'):
        step()
    return graph


class Stopwatch:
    """Times the work between `start` and `stop` on a device: CUDA events, or the CPU's clock."""

    def __init__(self, device: torch.device):
        self._events = None
        if device.type == 'cuda':
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._stamps = [0.0, 0.0]

    def start(self) -> None:
        """Begin; on CUDA in the current stream."""
        self._mark(0)

    def stop(self) -> None:
        """End; on CUDA in the current stream, without waiting for it."""
        self._mark(1)

    def read_s(self) -> float:
        """Give the seconds between the two, after waiting for the second."""
        if self._events is None:
            return self._stamps[1] - self._stamps[0]
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) * 1e-3

    def _mark(self, index):
        if self._events is None:
            self._stamps[index] = time.perf_counter()
        else:
            self._events[index].record()


@cache
def _capture_stream(device):
    """
    Give the one stream of this process to warm up and capture graphs on, one at a time.

    PyTorch keeps cuBLAS's workspace (32 MiB on Hopper chips) for each stream it was ever used on.
    """
    return torch.cuda.Stream(device)


def _device(name):
    if not re.fullmatch(r'auto|cpu|cuda(:\d+)?', name):
        raise EngineError(f'engine.device is {name!r}: allowed are auto, cpu, cuda and cuda:N')
    if name == 'cpu' or (name == 'auto' and not torch.cuda.is_available()):
        return torch.device('cpu')
    if not torch.cuda.is_available():
        reason = 'it finds no CUDA device: check the driver (nvidia-smi)' if torch.version.cuda \
            else 'it is built without CUDA: install a build of PyTorch with CUDA'
        raise EngineError(
            f'engine.device is {name!r}, but PyTorch {torch.__version__} can not use it: '
            f'{reason}, or set engine.device to cpu')
    index = int(name[5:]) if ':' in name else 0
    count = torch.cuda.device_count()
    if index >= count:
        raise EngineError(
            f'engine.device is {name!r}, but this machine has {count} CUDA '
            f'device{"s" if count > 1 else ""}: allowed are cuda:0 to cuda:{count - 1}')
    return torch.device('cuda', index)


def _dtype(name, device):
    has_bfloat16 = device.type == 'cpu' or chip.capability(device) >= (8, 0)
    if name == 'auto':
        if device.type == 'cpu':
            return torch.float32
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if name not in ('bfloat16', 'float16', 'float32'):
        raise EngineError(
            f'engine.dtype is {name!r}: allowed are auto, bfloat16, float16 and float32')
    if name == 'bfloat16' and not has_bfloat16:
        raise EngineError(
            f'engine.dtype is bfloat16, which {describe(device)[0]} does not have: set it to '
            'float16 or auto')
    return getattr(torch, name)
