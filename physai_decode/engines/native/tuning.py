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
Caches the fastest configuration of each kernel on a device in a file.

If the file can't be read, kernels are tuned again; if it can't be written, at each start.
"""

from collections.abc import Callable
from contextlib import suppress
import json
import os
from pathlib import Path
from statistics import median

from physai_decode import regular_file
from physai_decode.engine import EngineError
from physai_decode.engines import device as devices
import torch

REPLAYS = 10
_MOST_BYTES = 2**24              # of the file; an entry takes about 100 bytes


def timed(step: Callable[[], None]) -> float:
    """
    Time a step in a CUDA graph.

    :returns: seconds, the median of `REPLAYS` replays.
    """
    graph = devices.capture(step, torch.device('cuda', torch.cuda.current_device()))
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return median(times)


class TuningCache:
    """Configurations by name, for one kind of device and compiler."""

    def __init__(self, owner: str, folder: Path | None = None) -> None:
        """
        Read the file.

        :param owner: the device and compiler, such as their names and versions.
        :param folder: the folder of the file; by default ``$XDG_CACHE_HOME/physai_decode``.
        """
        try:
            base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        except RuntimeError:            # the user has no home folder: nothing is stored
            base = os.devnull
        self._path = (folder or Path(base) / 'physai_decode') / 'kernels.json'
        self._owner = owner
        try:
            known = json.loads(regular_file.read(self._path, _MOST_BYTES))
        except (EngineError, OSError, RecursionError, ValueError):
            known = {}
        self._known = known if isinstance(known, dict) else {}
        if not isinstance(self._known.setdefault(owner, {}), dict):
            self._known[owner] = {}

    def get(self, name: str) -> list[int] | None:
        """Return the numbers stored under ``name``, or None."""
        return self._known[self._owner].get(name)

    def put(self, name: str, numbers: list[int]) -> None:
        """Store numbers under ``name``."""
        self._known[self._owner][name] = numbers
        part = self._path.with_suffix(f'.{os.getpid()}')
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(json.dumps(self._known, indent=1))
                part.replace(self._path)
            finally:
                part.unlink(missing_ok=True)        # what a full disk has left
