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
Percentiles in bounded memory: exact for few values, from a histogram for many.

The histogram has logarithmic bins, 1 % wide, so its percentiles are within 0.5 % of the true ones.
Counts, sums and the largest value are always exact.
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

EXACT_ROWS = 1024               # rows of a `SlidingWindow` that are kept exactly
EXACT_VALUES = 16384            # values of a `Distribution` that are kept exactly
SLICES = 64                     # histograms of a sliding window
CHUNK = 64                      # values that are moved into a histogram at once
UNREAD = 4096                   # rows that may accumulate before the writer processes them
SCALE = 100.0                   # bins per factor of e
OFFSET = 2100                   # makes the bin of the smallest value positive
SMALLEST = 1e-9                 # a value closer to 0 counts as 0


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """
    Return a percentile, interpolated linearly between the two nearest ranks.

    :param ordered: values in ascending order.
    :param percent: 0 to 100.
    :returns: None if there are no values.
    """
    if not ordered:
        return None
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    low = ordered[below]
    return low + (ordered[above] - low) * (rank - below)


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation, None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def bin_of(value: float) -> int:
    """Return the bin of a value; bins are numbered in ascending order, and 0 is in bin 0."""
    if value > SMALLEST:
        return int(SCALE * math.log(value) + OFFSET)
    if value < -SMALLEST:
        return -int(SCALE * math.log(-value) + OFFSET)
    return 0


def value_of(number: int) -> float:
    """Return the value that represents a bin, within 0.5 % of every value in it."""
    if not number:
        return 0.0
    return math.copysign(math.exp((abs(number) + 0.5 - OFFSET) / SCALE), number)


class Ranked(Sequence[float]):
    """The values of a histogram as a sequence in ascending order."""

    def __init__(self, bins: Mapping[int, int], largest: float = math.inf) -> None:
        """
        View a histogram.

        :param bins: number of values in each bin; a bin may be empty.
        :param largest: the largest value, if known, which limits the value of the last bin.
        """
        self._bins = sorted(bins)
        self._ends = list(accumulate(map(bins.__getitem__, self._bins)))
        self._largest = largest

    def __len__(self) -> int:
        """Return the number of values."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, rank: Any) -> Any:
        """Return the value with a rank, counted from 0."""
        return min(value_of(self._bins[bisect_right(self._ends, rank)]), self._largest)


class Moments:
    """The exact count, sums and largest value of any number of values."""

    def __init__(self) -> None:
        """Start without values."""
        self.count = 0
        self.total = self.squares = 0.0
        self.largest = -math.inf

    def put(self, values: Sequence[float]) -> None:
        """Add values, at least one."""
        self.count += len(values)
        self.total += sum(values)
        self.squares += sum([value * value for value in values])
        self.largest = max(self.largest, max(values))

    def add(self, other: 'Moments') -> None:
        """Add the values of another."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.largest = max(self.largest, other.largest)

    @property
    def deviation(self) -> float | None:
        """The standard deviation, None for fewer than two values."""
        if self.count < 2:
            return None
        mean = self.total / self.count
        return math.sqrt(max(self.squares / self.count - mean * mean, 0.0))


class Summary(NamedTuple):
    """The statistics of some values."""

    ordered: Sequence[float]            # ascending
    largest: float | None               # exact; None if there are no values
    deviation: float | None             # exact standard deviation; None for fewer than two values


class Distribution:
    """
    The distribution of a growing set of values, such as those of one request.

    It is exact for up to `EXACT_VALUES` values. Beyond that, the oldest move into a histogram.
    """

    def __init__(self) -> None:
        """Start without values."""
        self._newest: list[float] = []
        self._moments = Moments()               # of the values in the histogram
        self._bins: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Add a value."""
        self._newest.append(value)
        if len(self._newest) >= EXACT_VALUES + CHUNK:
            chunk = self._newest[:CHUNK]
            del self._newest[:CHUNK]
            self._moments.put(chunk)
            _merge(self._bins, _count(chunk))

    def summary(self) -> Summary:
        """Return the statistics of all values so far."""
        if not self._bins:
            return _exact(self._newest)
        moments, bins = Moments(), dict(self._bins)
        moments.add(self._moments)
        moments.put(self._newest)
        _merge(bins, _count(self._newest))
        return Summary(Ranked(bins, moments.largest), moments.largest, moments.deviation)


Row = tuple[float | None, ...]


class _Slice:
    """The rows of a part of a sliding window, as one histogram per column."""

    def __init__(self, columns: int, end_s: float) -> None:
        self.end_s = end_s                      # later rows belong to the next slice
        self.last_s = -math.inf                 # time of the newest row
        self.moments = Moments()                # of the first column
        self.columns: list[dict[int, int]] = [{} for _ in range(columns)]


class SlidingWindow:
    """
    The rows of values of the last seconds, such as one row per token.

    The window is exact for up to `EXACT_ROWS` rows. Beyond that, older rows move into `SLICES`
    histograms, and the window starts up to one slice too early. Memory is bounded, whatever the
    rate. One thread adds rows and others read. Readers do the computation, and the writer never
    blocks.
    """

    def __init__(self, window_s: float, columns: int) -> None:
        """
        Start without rows.

        :param window_s: length of the window in seconds.
        :param columns: number of values in a row.
        """
        self._window_s = window_s
        # Rows with their times, from the newest to the oldest: _new, _rows, then the slices. Other
        # threads may append to _new at any time; _lock guards the rest.
        self._new: deque[tuple[float, Row]] = deque()
        self._lock = threading.Lock()
        self._rows: deque[tuple[float, Row]] = deque()
        self._slices: deque[_Slice] = deque()
        self._sums: list[dict[int, int]] = [{} for _ in range(columns)]     # of all slices

    def add(self, now_s: float, row: Row) -> None:
        """Add a row, whose first value must not be None."""
        self._new.append((now_s, row))
        # Without readers, the writer processes rows in small chunks, so that no call takes long.
        if len(self._new) > UNREAD and self._lock.acquire(blocking=False):
            try:
                self._advance(now_s, CHUNK)
            finally:
                self._lock.release()

    def read(self, now_s: float) -> list[Summary]:
        """
        Return the statistics of each column; for all but the first, only ``ordered``.

        :param now_s: the end of the window.
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
        """Process some new rows, and drop the slices that have left the window."""
        since_s = now_s - self._window_s
        self._rows.extend(self._new.popleft() for _ in range(count))
        while self._slices and self._slices[0].last_s < since_s:
            for bins, dropped in zip(self._sums, self._slices.popleft().columns):
                _merge(bins, dropped, -1)
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
        """Add rows to the newest slice."""
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
    """Count the values per bin."""
    log = math.log                  # `bin_of` inlined for most values, for speed
    return Counter([int(SCALE * log(value) + OFFSET) if value > SMALLEST else bin_of(value)
                    for value in values])


def _merge(bins: dict[int, int], more: Mapping[int, int], times: int = 1) -> None:
    """Add a histogram to another, or subtract it with ``times`` -1; remove empty bins."""
    for number, count in more.items():
        left = bins.get(number, 0) + times * count
        if left:
            bins[number] = left
        else:
            del bins[number]
