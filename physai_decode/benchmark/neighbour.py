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
Neighbours of a decode step: processes that load the cores or the GPU and report their own times.

``python -m physai_decode.benchmark.neighbour HZ BATCH`` runs the neighbour on the GPU: a
convolutional network with ResNet-50's shapes, on a schedule. It prints the time of each pass in
seconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import ExitStack
from dataclasses import dataclass
import os
import subprocess
import sys
import threading
import time
from typing import Any

from physai_decode.config import ConfigError
from physai_decode.pace import Pace

HZ, BATCH = 30.0, 1
BLOCKS = ((64, 3), (128, 4), (256, 6), (512, 3))        # inner channels, number of blocks
START_S = 120.0                 # limit on the time to the first pass of the network


@dataclass(frozen=True)
class NeighbourKind:
    """A kind of neighbour: one busy loop per core, or a network on the GPU."""

    where: str                  # cpu, gpu
    hz: float = HZ
    batch: int = BATCH


def parse(text: str) -> NeighbourKind:
    """
    Read ``cpu`` or ``gpu[:hz,batch]``, such as ``gpu:30,1``.

    :raises ConfigError: the text is neither, or a number is out of range.
    """
    where, _, rest = text.partition(':')
    try:
        values = [float(each) for each in rest.split(',')] if rest else []
        hz, batch, *surplus = values + [HZ, BATCH][len(values):]
        kind = NeighbourKind(where, hz, int(batch))
        if where not in ('cpu', 'gpu') or rest and where == 'cpu' or surplus \
                or not 0 < kind.hz <= 10000 or not 1 <= kind.batch <= 1024:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f'--beside {text}: expected cpu, or gpu[:hz,batch] such as gpu:30,1, '
                          'with up to 10000 Hz and a batch of 1 to 1024') from None
    return kind


class Neighbour:
    """A running neighbour and the times of its passes."""

    def __init__(self, process: 'subprocess.Popen[str] | None' = None) -> None:
        """
        Start to read times.

        :param process: prints its times; None for a neighbour without times.
        """
        self._process = process
        self._times: list[float] = []
        self._ready = threading.Event()
        if process is None:
            self._ready.set()
        else:
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()

    def wait(self) -> None:
        """
        Wait for the first pass.

        :raises RuntimeError: the neighbour ended, or there was no pass within `START_S`.
        """
        if not self._ready.wait(START_S) or self._process is not None and not self._times:
            raise RuntimeError('the neighbour on the GPU does not run: check that PyTorch '
                               'finds a CUDA device with free memory')

    def collect(self, seconds: float) -> list[float]:
        """Wait for this many seconds; return the times of all passes since the last call."""
        if self._process is not None:
            time.sleep(seconds)
        times, self._times = self._times, []
        return times

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self._times.append(float(line))
            self._ready.set()
        self._ready.set()


@contextmanager
def running(kind: NeighbourKind) -> Iterator[Neighbour]:
    """
    Run a neighbour inside ``with``.

    :raises RuntimeError: the neighbour cannot run.
    """
    with ExitStack() as ending:
        def start(*arguments: str) -> 'subprocess.Popen[str]':
            process = subprocess.Popen([sys.executable, *arguments], text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            ending.callback(process.communicate)
            ending.callback(process.kill)
            return process

        if kind.where == 'cpu':
            for _ in os.sched_getaffinity(0):
                start('-c', 'while True: pass')
            yield Neighbour()
            return
        neighbour = Neighbour(start('-m', __spec__.name if __spec__ else __name__,
                                    str(kind.hz), str(kind.batch)))
        neighbour.wait()
        neighbour.collect(0.0)
        yield neighbour


def main() -> int:
    """Run the network on its schedule until the process is killed."""
    import torch
    from torch import nn

    hz, batch = float(sys.argv[1]), int(sys.argv[2])
    if not torch.cuda.is_available():
        return 1
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for inner, count in BLOCKS:
        for block in range(count):
            stride = 2 if block == 0 and inner > 64 else 1
            layers += [nn.Conv2d(channels, inner, 1), nn.ReLU(),
                       nn.Conv2d(inner, inner, 3, stride, 1), nn.ReLU(),
                       nn.Conv2d(inner, 4 * inner, 1), nn.ReLU()]
            channels = 4 * inner
    network: Any = nn.Sequential(*layers).half().cuda()
    network.to(memory_format=torch.channels_last)
    images = torch.rand(batch, 3, 224, 224, device='cuda', dtype=torch.float16)
    with torch.inference_mode():
        for _ in range(5):
            network(images)
        torch.cuda.synchronize()
        pace = Pace(hz, time.perf_counter())
        while True:
            begin_s = time.perf_counter()
            network(images)
            torch.cuda.synchronize()
            print(time.perf_counter() - begin_s, flush=True)
            now_s = time.perf_counter()
            time.sleep(max(0.0, pace.due_s(now_s) - now_s))


if __name__ == '__main__':
    sys.exit(main())
