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
Reads a Jetson's telemetry from jetson-stats, if it is installed and its service runs.

jetson-stats reports periodically. The energy counter assumes that the power is constant between
two reports of it. If the reports end, the figures become unknown. If they continue, the counter
has been reset, because the energy in between is unknown. An idle board lowers its clocks, so the
memory clock is that of a busy GPU.
"""

from collections.abc import Callable
import math
import threading
import time
from typing import Any

from physai_decode.engine import described
from physai_decode.pip_command import install

INTERVAL_S = 0.2
LOW = 0.95                      # a clock below this part of its maximum is low
BUSY_PERCENT = 50               # load of the GPU; an idle one lowers its clock
KHZ_FROM = 10_000               # a clock from this value on is in kHz, a lower one in MHz
STALE_S = 5.0                   # a report that is older no longer counts
RESET_J = 1e9                   # by which a reset lowers the counter, below any earlier reading


class Jetson:
    """The telemetry of the board until `close`."""

    def __init__(self, jtop: Callable[..., Any],
                 clock: Callable[[], float] = time.monotonic) -> None:
        """
        Subscribe to jetson-stats.

        :param jtop: the class ``jtop`` of jetson-stats.
        :param clock: a monotonic clock in seconds.
        :raises Exception: the service of jetson-stats does not run, or is older than version 4.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._reported_s = -math.inf        # the last report, and the last one of the power
        self._uptime: Any = None            # of the board at that report
        self._power_w: float | None = None
        self._busy_clocks_mhz: tuple[float, float] | None = None
        self._energy_j, self._since_s = 0.0, clock()
        self._board = jtop(interval=INTERVAL_S)
        if not hasattr(self._board, 'memory'):
            raise RuntimeError('it is older than version 4')
        self._board.attach(self._on_update)
        try:
            self._board.start()
        except BaseException:
            self.close()
            raise

    @property
    def energy_j(self) -> float | None:
        """The energy counter in joules, None if the board does not report its power."""
        with self._lock:
            after_s = self._clock() - self._since_s
            if self._power_w is None or after_s > STALE_S:
                return None
            return self._energy_j + self._power_w * after_s

    @property
    def memory_clocks_mhz(self) -> tuple[float, float] | None:
        """The memory clock while the GPU was last busy, and the highest; None if unknown."""
        with self._lock:
            return self._busy_clocks_mhz

    def read(self) -> dict[str, float | str | None]:
        """Return the last report by keys of `telemetry.KEYS`; missing or None means unknown."""
        now_s, board = self._clock(), self._board
        with self._lock:
            if now_s - self._reported_s > STALE_S:
                return {}
            power_w = None if now_s - self._since_s > STALE_S else self._power_w
        mode = getattr(board, 'nvpmodel', None)
        gpu = _gpu(board)
        return {
            'temperature_c': None if _value(board, 'temperature', 'gpu', 'online') is False
            else _value(board, 'temperature', 'gpu', 'temp'),       # offline: -256
            'power_w': power_w,
            'sm_clock_mhz': _clock_mhz(_nested(gpu, 'freq', 'cur')),
            'memory_clock_mhz': _clock_mhz(_value(board, 'memory', 'EMC', 'cur')),
            'throttle_reasons': self._low_clocks(gpu),
            'power_mode': None if mode is None else str(getattr(mode, 'name', mode))}

    def _low_clocks(self, gpu: Any) -> str | None:
        """Name the clocks below their maximum while the GPU is busy; None if that is unknown."""
        clocks = {'low_gpu_clock': _nested(gpu, 'freq'),
                  'low_memory_clock': _value(self._board, 'memory', 'EMC')}
        pairs = {name: (_clock_mhz(_nested(each, 'cur')), _clock_mhz(_nested(each, 'max')))
                 for name, each in clocks.items()}
        known = {name: (current, highest) for name, (current, highest) in pairs.items()
                 if current is not None and highest is not None}
        load = _nested(gpu, 'status', 'load')
        if load is None or not known:
            return None
        low = [name for name, (current, highest) in known.items() if current < LOW * highest]
        return ' '.join(low) if low and load >= BUSY_PERCENT else 'none'

    def close(self) -> None:
        """Unsubscribe."""
        self._board.detach(self._on_update)
        self._board.close()

    def _on_update(self, board: Any) -> None:
        """Add the energy since the last report; called in a thread of jetson-stats."""
        uptime = getattr(board, 'uptime', None)
        if uptime is not None and uptime == self._uptime:
            return          # its service has no new report, so it gives the last one again
        power_w, now_s = _scaled(_value(board, 'power', 'tot', 'power'), 1e-3), self._clock()
        current, highest = (
            _clock_mhz(_value(board, 'memory', 'EMC', key)) for key in ('cur', 'max'))
        load = _nested(_gpu(board), 'status', 'load')
        with self._lock:
            self._reported_s, self._uptime = now_s, uptime
            if power_w is not None:
                after_s = now_s - self._since_s
                self._energy_j += (self._power_w or 0.0) * after_s \
                    if after_s <= STALE_S else -RESET_J
                self._power_w, self._since_s = power_w, now_s
            if current and highest and load is not None and load >= BUSY_PERCENT:
                self._busy_clocks_mhz = current, highest


def connect() -> tuple[Jetson | None, str]:
    """Subscribe to jetson-stats; return the board, or None with the reason and what to do."""
    try:
        from jtop import jtop
        return Jetson(jtop), ''
    # It is not installed, or raises an error of its own, without which the node can run.
    except Exception as error:
        advice = (f'install it with {install("jetson-stats")}, its service with sudo pip3 install '
                  '-U jetson-stats') if isinstance(error, ImportError) else (
            'run sudo systemctl restart jtop, add this user to the group jtop, give the service '
            'and this Python the same version, and mount /run/jtop.sock in a container')
        reason = ' '.join(described(error).split())
        return None, (f'jetson-stats is not used ({reason}), so power, energy and clocks may be '
                      f'unknown, and the floor does not follow the memory clock: {advice}')


def _gpu(board: Any) -> Any:
    """Return the report on the GPU, of which a Jetson has one."""
    return next(iter((_value(board, 'gpu') or {}).values()), None)


def _value(board: Any, name: str, *keys: str) -> Any:
    return _nested(getattr(board, name, None), *keys)


def _nested(value: Any, *keys: str) -> Any:
    """Return a value in nested mappings, None if this board does not have it."""
    for key in keys:        # some are classes of jetson-stats, which only resemble a dict
        value = value.get(key) if hasattr(value, 'get') else None
    return value


def _clock_mhz(value: Any) -> float | None:
    """
    Return a clock of jetson-stats in MHz; None if it is unknown, for which it reports 0 or 1.

    Its clocks are in kHz, but those of a Thor's GPU are in MHz where NVML reports them.
    """
    clock = float(value or 0)
    return None if clock <= 1 else clock * 1e-3 if clock >= KHZ_FROM else clock


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None else float(value) * factor
