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
Percentiles of many values in bounded memory: exact for few, from a histogram for many.

The histogram's bins are log-spaced, 1 % wide, so a percentile read from it is within 0.5 % of the
true one. Counts, sums and the largest value are always exact.
"""

from bisect import bisect_right
from collections import Counter
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import accumulate
import math
import threading
from typing import Any
from typing import cast
from typing import NamedTuple

EXACT_ROWS = 1024               # up to this many in a sliding window, nothing is rounded
EXACT_VALUES = 16384            # the same for a `Distribution`
SLICES = 64                     # parts of a sliding window
CHUNK = 64                      # values that go into a histogram at once
UNREAD = 4096                   # rows of a sliding window that may wait for a reader
SCALE = 100.0                   # bins for each factor of e
OFFSET = 2100                   # makes the bin of the smallest value positive
SMALLEST = 1e-9                 # what is nearer to 0 counts as 0


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """
    Give a percentile by linear interpolation between the two nearest ranks.

    :param ordered: values in ascending order.
    :param percent: 0 to 100.
    :return: None where there are no values.
    """
    if not ordered:
        return None
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    low = ordered[below]
    return low + (ordered[above] - low) * (rank - below)


def deviation(values: Sequence[float]) -> float | None:
    """Give the standard deviation of all these values, None for fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def bin_of(value: float) -> int:
    """Give the bin of a value; bins are in the order of their values, and 0 is bin 0."""
    if value > SMALLEST:
        return int(SCALE * math.log(value) + OFFSET)
    if value < -SMALLEST:
        return -int(SCALE * math.log(-value) + OFFSET)
    return 0


def value_of(number: int) -> float:
    """Give the value that stands for a bin, at most 0.5 % from any value in it."""
    if not number:
        return 0.0
    return math.copysign(math.exp((abs(number) + 0.5 - OFFSET) / SCALE), number)


class Ranked(Sequence[float]):
    """The values in a histogram in ascending order, as if each were written out."""

    def __init__(self, bins: Mapping[int, int], largest: float = math.inf) -> None:
        """
        Read a histogram.

        :param bins: how many values each bin holds; an empty bin may be there.
        :param largest: of the values, where it is known: none will be above it.
        """
        self._bins = sorted(bins)
        self._ends = list(accumulate(map(bins.__getitem__, self._bins)))
        self._largest = largest

    def __len__(self) -> int:
        """Count the values."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, rank: Any) -> Any:
        """Give the value of a rank, counted from 0."""
        return min(value_of(self._bins[bisect_right(self._ends, rank)]), self._largest)


class Moments:
    """Count, sums and largest of some values: what is exact however many there are."""

    def __init__(self) -> None:
        """Begin with no value."""
        self.count = 0
        self.total = self.squares = 0.0
        self.largest = -math.inf

    def put(self, values: Sequence[float]) -> None:
        """Take in values, at least one."""
        self.count += len(values)
        self.total += sum(values)
        self.squares += sum([value * value for value in values])
        self.largest = max(self.largest, max(values))

    def add(self, other: 'Moments') -> None:
        """Take in what another has."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.largest = max(self.largest, other.largest)

    @property
    def deviation(self) -> float | None:
        """Give the standard deviation, None for fewer than two values."""
        if self.count < 2:
            return None
        mean = self.total / self.count
        return math.sqrt(max(self.squares / self.count - mean * mean, 0.0))


class Summary(NamedTuple):
    """What is known of some values."""

    ordered: Sequence[float]            # ascending
    largest: float | None               # exact, as the next; None where there are no values
    deviation: float | None             # the standard deviation; None for fewer than two


class Distribution:
    """
    Values that only ever come, such as those of one request.

    Exact up to `EXACT_VALUES` values; then the oldest are kept in a histogram.
    """

    def __init__(self) -> None:
        """Begin with no value."""
        self._newest: list[float] = []
        self._moments = Moments()               # of all before
        self._bins: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Take one value."""
        self._newest.append(value)
        if len(self._newest) >= EXACT_VALUES + CHUNK:
            chunk = self._newest[:CHUNK]
            del self._newest[:CHUNK]
            self._moments.put(chunk)
            _merge(self._bins, _count(chunk))

    def summary(self) -> Summary:
        """Tell what is known of all values so far."""
        if not self._bins:
            return _exact(self._newest)
        moments, bins = Moments(), dict(self._bins)
        moments.add(self._moments)
        moments.put(self._newest)
        _merge(bins, _count(self._newest))
        return Summary(Ranked(bins, moments.largest), moments.largest, moments.deviation)


Row = tuple[float | None, ...]


class _Slice:
    """Rows of a sliding window that came one after another: a histogram of each column."""

    def __init__(self, columns: int, end_s: float) -> None:
        self.end_s = end_s                      # a row that comes later is not for this one
        self.last_s = -math.inf                 # when its newest row came
        self.moments = Moments()                # of the first column
        self.columns: list[dict[int, int]] = [{} for _ in range(columns)]


class SlidingWindow:
    """
    Rows of values that came in the last seconds, such as those of each token.

    Exact while there are at most `EXACT_ROWS` rows. Of more, the older ones are kept in `SLICES`
    histograms, and the window begins up to one of these too early. Memory is bounded by bins and
    slices, whatever the rate. One thread adds, others read: what is to be computed is computed by
    those who read, and the one who adds never waits.
    """

    def __init__(self, window_s: float, columns: int) -> None:
        """
        Begin empty.

        :param window_s: how far it looks back.
        :param columns: values in a row.
        """
        self._window_s = window_s
        self._new: deque[tuple[float, Row]] = deque()       # not looked at yet; appends and pops
        self._lock = threading.Lock()                       # are safe. It guards all below
        self._rows: deque[tuple[float, Row]] = deque()      # before these, and when they came
        self._slices: deque[_Slice] = deque()               # before these
        self._sums: list[dict[int, int]] = [{} for _ in range(columns)]     # of all slices

    def add(self, now_s: float, row: Row) -> None:
        """Take one row; its first value is never None."""
        self._new.append((now_s, row))
        # Nobody has read for long: bit by bit, so that no row takes long. A reader does the same.
        if len(self._new) > UNREAD and self._lock.acquire(blocking=False):
            try:
                self._advance(now_s, CHUNK)
            finally:
                self._lock.release()

    def read(self, now_s: float) -> list[Summary]:
        """
        Tell what is known of each column; of all but the first only ``ordered``.

        :param now_s: the window is the ``window_s`` before.
        """
        since_s = now_s - self._window_s
        with self._lock:
            self._advance(now_s, len(self._new))
            rows = [row for at_s, row in self._rows if at_s >= since_s]
            moments, sums = Moments(), [dict(bins) for bins in self._sums]
            for each in self._slices:
                moments.add(each.moments)
        columns = [[value for row in rows if (value := row[column]) is not None]
                   for column in range(len(sums))]
        if not moments.count:
            return [_exact(columns[0]), *(Summary(sorted(column), None, None)
                                          for column in columns[1:])]
        if rows:
            moments.put(columns[0])
        for bins, column in zip(sums, columns):
            _merge(bins, _count(column))
        return [Summary(Ranked(sums[0], moments.largest), moments.largest, moments.deviation),
                *(Summary(Ranked(bins), None, None) for bins in sums[1:])]

    def _advance(self, now_s: float, count: int) -> None:
        """Look at this many new rows, and let go of what has left the window."""
        since_s = now_s - self._window_s
        self._rows.extend(self._new.popleft() for _ in range(count))
        while self._slices and self._slices[0].last_s < since_s:
            for bins, gone in zip(self._sums, self._slices.popleft().columns):
                _merge(bins, gone, -1)
        batch: list[Row] = []
        while len(self._rows) > EXACT_ROWS:
            at_s, row = self._rows.popleft()
            if at_s < since_s:
                continue
            if not self._slices or at_s >= self._slices[-1].end_s:
                self._put(batch)
                batch = []
                self._slices.append(
                    _Slice(len(self._sums), at_s + self._window_s / SLICES))
            batch.append(row)
            self._slices[-1].last_s = at_s
        self._put(batch)

    def _put(self, rows: Sequence[Row]) -> None:
        """Put rows into the newest slice."""
        if not rows:
            return
        part = self._slices[-1]
        part.moments.put([cast(float, row[0]) for row in rows])
        for bins, sums, column in zip(part.columns, self._sums, zip(*rows)):
            counts = _count([value for value in column if value is not None])
            _merge(bins, counts)
            _merge(sums, counts)


def _exact(values: Sequence[float]) -> Summary:
    ordered = sorted(values)
    return Summary(ordered, ordered[-1] if ordered else None, deviation(ordered))


def _count(values: Sequence[float]) -> Counter[int]:
    """Count the values in each bin."""
    log = math.log                  # and `bin_of` without the call, for most values
    return Counter([int(SCALE * log(value) + OFFSET) if value > SMALLEST else bin_of(value)
                    for value in values])


def _merge(bins: dict[int, int], more: Mapping[int, int], times: int = 1) -> None:
    """Add one histogram to another, or with ``times`` -1 take it away; no bin stays empty."""
    for number, count in more.items():
        left = bins.get(number, 0) + times * count
        if left:
            bins[number] = left
        else:
            del bins[number]
