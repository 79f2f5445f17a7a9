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
The garbage collector, kept out of answers, and garbage kept small all the same.

And memory that was freed, given back to the system.
"""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import ctypes
import gc
import threading
import time

FULL_EVERY_S = 10.0             # a full collection is due after so long,
FULL_EVERY_OBJECTS = 20000      # or once so many objects have outlived a young one;
FULL_SHARE = 0.01               # but full ones take no more than this part of the time
OVERLAP_S = 30.0                # without any collection, while answers overlap


class Collector:
    """
    Keeps the garbage collector out of answers.

    A collection stops all threads, for longer than a token takes. So it waits until no answer
    runs. One for the process, as the garbage collector is: several workers may share it. Where
    their answers overlap without end, the end of one of them has to do every `OVERLAP_S`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing paused; the clock is in seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._pauses = 0
        self._was_enabled = False
        self._last_s = self._last_full_s = clock()  # when a collection ended
        self._full_took_s = 0.0                     # the last full one
        self._survivors = 0                         # since that one, at most

    @contextmanager
    def paused(self, full: Callable[[], bool]) -> Iterator[None]:
        """
        Pause collection; when the last pause ends, make up for it.

        :param full: asked then. True: nothing waits, so all is collected. False: only what is
            new is, unless a full collection is due. A full one takes some 0.02 ms for each 1000
            objects that are not frozen, see ``gc.freeze``.
        """
        with self._lock:
            if not self._pauses:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                overdue = self._clock() - self._last_s >= OVERLAP_S
                if self._was_enabled and (not self._pauses or overdue):
                    self._collect(full())
                if self._was_enabled and not self._pauses:
                    gc.enable()

    def _collect(self, full: bool) -> None:
        begin_s = self._clock()
        self._survivors += gc.get_count()[0]
        since_s = begin_s - self._last_full_s
        due = since_s >= FULL_EVERY_S or self._survivors >= FULL_EVERY_OBJECTS
        if full or due and since_s >= self._full_took_s / FULL_SHARE:
            gc.collect()
            self._last_full_s, self._survivors = self._clock(), 0
            self._full_took_s = self._last_full_s - begin_s
        else:
            gc.collect(0)
        self._last_s = self._clock()


COLLECTOR = Collector()


def give_back() -> None:
    """
    Give memory that was freed back to the system.

    glibc keeps it, for each thread that has allocated: after 15 loads of the embedded model in
    three threads by turns, 35 MB. This takes some milliseconds, and does nothing where the C
    library is another.
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)
