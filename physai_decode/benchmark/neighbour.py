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
Neighbours of a decode step: processes that keep the cores or the GPU busy, and tell how they fare.

Run as ``python -m physai_decode.benchmark.neighbour HZ BATCH`` it is the one on the GPU: a network
of convolutions of ResNet-50's shapes, on a schedule, that prints the time of each pass in seconds.
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

from physai_decode.config import ConfigError
from physai_decode.pace import Pace

HZ, BATCH = 30.0, 1
BLOCKS = ((64, 3), (128, 4), (256, 6), (512, 3))        # channels within a block, and blocks
START_S = 120.0                 # until the network has run once


@dataclass(frozen=True)
class Kind:
    """Which neighbour: one busy loop for each core, or a network on the GPU."""

    where: str                  # cpu, gpu
    hz: float = HZ
    batch: int = BATCH


def parse(text: str) -> Kind:
    """
    Read ``cpu`` or ``gpu[:hz,batch]``, such as ``gpu:30,1``.

    :raises ConfigError: it is neither, or a number is not allowed.
    """
    where, _, rest = text.partition(':')
    try:
        values = [float(each) for each in rest.split(',')] if rest else []
        kind = Kind(where, *values[:1], *map(int, values[1:]))
        if where not in ('cpu', 'gpu') or rest and where == 'cpu' or len(values) > 2 \
                or not 0 < kind.hz <= 10000 or not 1 <= kind.batch <= 1024:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f'--beside {text}: expected cpu, or gpu[:hz,batch] such as gpu:30,1, '
                          'with up to 10000 Hz and a batch of 1 to 1024') from None
    return kind


class Neighbour:
    """One that runs, and what it said of its passes."""

    def __init__(self, process: 'subprocess.Popen[str] | None' = None) -> None:
        """Take the process that prints its times; None where the neighbour has none."""
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
        Wait until it works.

        :raises RuntimeError: it does not.
        """
        if not self._ready.wait(START_S) or self._process is not None and not self._times:
            raise RuntimeError('the neighbour on the GPU does not run: PyTorch finds no CUDA '
                               'device, or its memory is taken')

    def listen(self, seconds: float) -> list[float]:
        """Give the times of its passes since the last call and so long from now, in seconds."""
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
def running(kind: Kind) -> Iterator[Neighbour]:
    """
    Have a neighbour inside ``with``; it is ended after that.

    :raises RuntimeError: it can't run.
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
        other = Neighbour(start('-m', __spec__.name if __spec__ else __name__, str(kind.hz),
                                str(kind.batch)))
        other.wait()
        other.listen(0.0)
        yield other


def main() -> int:
    """Run the network on its schedule until ended."""
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
    network = nn.Sequential(*layers).half().cuda().to(memory_format=torch.channels_last)
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
