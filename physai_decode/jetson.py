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
What a Jetson says of itself, by jetson-stats where that is installed and its service runs.

Its power is told now and then; between two times it counts as unchanged. It knows nothing of ROS.
"""

from collections.abc import Callable
import threading
import time
from typing import Any

INTERVAL_S = 0.2


class Jetson:
    """The board, from now until `close`."""

    def __init__(self, jtop: Callable[..., Any],
                 clock: Callable[[], float] = time.monotonic) -> None:
        """
        Begin to listen.

        :param jtop: the class of jetson-stats, of version 4.
        :param clock: monotonic, in seconds.
        :raises Exception: of jetson-stats' own; its service does not run.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._power_w: float | None = None
        self._energy_j, self._since_s = 0.0, clock()
        self._board = jtop(interval=INTERVAL_S)
        self._board.attach(self._hear)
        self._board.start()

    @property
    def energy_j(self) -> float | None:
        """Energy that the board took since this began; None where it does not tell its power."""
        with self._lock:
            if self._power_w is None:
                return None
            return self._energy_j + self._power_w * (self._clock() - self._since_s)

    @property
    def memory_clock_part(self) -> float | None:
        """Give the memory clock in force over the highest, None where the board does not tell."""
        now, most = (_told(self._board, 'memory', 'EMC', key) for key in ('cur', 'max'))
        return now / most if now and most else None

    def read(self) -> dict[str, float | str | None]:
        """Give what the board told last, by the keys of `telemetry.KEYS`; None where nothing."""
        board = self._board
        mode = getattr(board, 'nvpmodel', None)
        gpu = next(iter((_told(board, 'gpu') or {}).values()), None)
        return {
            'temperature_c': _told(board, 'temperature', 'gpu', 'temp'),
            'power_w': self._power_w,
            'sm_clock_mhz': _scaled(_found(gpu, 'freq', 'cur'), 1e-3),
            'memory_clock_mhz': _scaled(_told(board, 'memory', 'EMC', 'cur'), 1e-3),
            'power_mode': None if mode is None else str(getattr(mode, 'name', mode))}

    def close(self) -> None:
        """Listen no more."""
        self._board.detach(self._hear)
        self._board.close()

    def _hear(self, board: Any) -> None:
        """Take the power since the last time; in jetson-stats' thread."""
        power_w, now_s = _scaled(_told(board, 'power', 'tot', 'power'), 1e-3), self._clock()
        with self._lock:
            self._energy_j += (self._power_w or 0.0) * (now_s - self._since_s)
            self._power_w, self._since_s = power_w, now_s


def _told(board: Any, name: str, *keys: str) -> Any:
    return _found(getattr(board, name, None), *keys)


def _found(value: Any, *keys: str) -> Any:
    """Look into dictionaries, which differ from board to board."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None else float(value) * factor
