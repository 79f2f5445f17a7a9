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

"""Runs the garbage collector between answers, and returns freed memory to the system."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import ctypes
import gc
import threading
import time

FULL_EVERY_S = 10.0             # a full collection is due after this time
FULL_EVERY_OBJECTS = 20000      # or after this many objects survived young collections
FULL_SHARE = 0.01               # maximum share of the time for full collections
OVERLAP_S = 30.0                # time without a collection, after which any answer's end runs one


class Collector:
    """
    Postpones garbage collection until no answer runs.

    A collection stops all threads for longer than a token takes. There is one collector per
    process, which several workers may share. If their answers overlap all the time, a collection
    runs at the end of an answer every `OVERLAP_S`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Start with garbage collection unpaused.

        :param clock: a monotonic clock in seconds.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._pauses = 0
        self._was_enabled = False
        self._last_s = self._last_full_s = clock()  # when the last collections ended
        self._full_duration_s = 0.0                 # of the last full collection
        self._survivors = 0                         # upper bound, since that collection

    @contextmanager
    def paused(self, full: Callable[[], bool]) -> Iterator[None]:
        """
        Pause garbage collection inside ``with``; at the end of the last pause, collect.

        :param full: called at the end. True makes the collection full, because no request waits.
            False collects only young objects, unless a full collection is due. A full one takes
            about 0.02 ms per 1000 objects that are not frozen (see ``gc.freeze``).
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
        if full or due and since_s >= self._full_duration_s / FULL_SHARE:
            gc.collect()
            self._last_full_s, self._survivors = self._clock(), 0
            self._full_duration_s = self._last_full_s - begin_s
        else:
            gc.collect(0)
        self._last_s = self._clock()


COLLECTOR = Collector()


def give_back() -> None:
    """
    Return freed memory to the system.

    glibc keeps freed memory per thread: 35 MB after 15 loads of the embedded model in three
    alternating threads. This takes a few milliseconds, and does nothing with other C libraries.
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)
