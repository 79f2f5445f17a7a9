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

"""Percentiles from histograms against those of all values, and what they may cost."""

import random
import statistics
import sys
import threading
import time

import numpy
from physai_decode import histogram
from physai_decode.histogram import bin_of
from physai_decode.histogram import deviation
from physai_decode.histogram import Distribution
from physai_decode.histogram import percentile
from physai_decode.histogram import Ranked
from physai_decode.histogram import SlidingWindow
from physai_decode.histogram import value_of
import pytest

PERCENTS = (0, 1, 50, 95, 99, 100)


@pytest.mark.parametrize('count', [1, 2, 3, 10, 101, 1000])
def test_percentiles_equal_those_of_numpy(count):
    source = random.Random(count)
    values = [source.expovariate(1.0) for _ in range(count)]
    for percent in PERCENTS:
        assert percentile(sorted(values), percent) == pytest.approx(
            numpy.percentile(values, percent))
    if count > 1:
        assert deviation(values) == pytest.approx(statistics.pstdev(values))


def test_statistics_without_values_are_none():
    assert percentile([], 50) is None
    assert deviation([]) is None
    assert deviation([1.0]) is None
    assert Distribution().summary() == ([], None, None)
    assert SlidingWindow(1.0, 2).read(0.0) == [([], None, None)] * 2
    assert percentile(Ranked({}), 50) is None


@pytest.mark.parametrize('size', [1e-8, 1e-3, 0.5, 1.0, 3.3, 1e6, 1e12])
@pytest.mark.parametrize('sign', [1, -1])
def test_bins_are_narrow_and_in_order(size, sign):
    """This holds for any magnitude and either sign."""
    source = random.Random(7)
    values = sorted(sign * size * source.uniform(1, 10) for _ in range(500))
    for value in values:
        assert value_of(bin_of(value)) == pytest.approx(value, rel=0.00502)
    assert [bin_of(value) for value in values] == sorted(bin_of(value) for value in values)
    assert bin_of(-size) < bin_of(0.0) == bin_of(1e-10) == bin_of(-1e-10) < bin_of(size)
    assert value_of(bin_of(0.0)) == 0.0


def test_ranked_has_the_values_of_its_bins_in_order():
    values = [-2.0, 0.0, 0.0, 1.0, 1.0, 1.0, 5.0]
    bins = {}
    for value in values:
        bins[bin_of(value)] = bins.get(bin_of(value), 0) + 1
    ranked = Ranked(bins, largest=5.0)
    assert len(ranked) == len(values)
    assert [ranked[rank] for rank in range(7)] == pytest.approx(values, rel=0.0051)
    assert ranked[6] <= 5.0


@pytest.mark.parametrize('count', [100, histogram.EXACT_VALUES, 50000])
def test_distribution_is_accurate(count):
    """It is exact for few values, and within 0.5 % for many; sums and maximum are always exact."""
    source = random.Random(1)
    values = [source.lognormvariate(1.0, 0.5) for _ in range(count)]
    distribution = Distribution()
    for value in values:
        distribution.add(value)
    summary = distribution.summary()
    assert len(summary.ordered) == count
    assert summary.largest == max(values)
    assert summary.deviation == pytest.approx(statistics.pstdev(values))
    exact = count <= histogram.EXACT_VALUES
    for percent in PERCENTS:
        assert percentile(summary.ordered, percent) == pytest.approx(
            percentile(sorted(values), percent), rel=1e-12 if exact else 0.0051)
    assert distribution.summary() == summary or not exact       # reading changes nothing
    assert len(distribution.summary().ordered) == count


def size_of(value, known) -> int:
    """Count the bytes of a value and of all that it refers to."""
    if id(value) in known:
        return 0
    known.add(id(value))
    inner = []
    if isinstance(value, dict):
        inner = [*value, *value.values()]
    elif hasattr(value, '__dict__'):
        inner = list(value.__dict__.values())
    elif not isinstance(value, (str, bytes)) and hasattr(value, '__iter__'):
        inner = list(value)
    return sys.getsizeof(value) + sum(size_of(each, known) for each in inner)


def test_memory_of_a_distribution_is_bounded():
    """200,000 values take hardly more memory than 20,000."""
    source, distribution, sizes = random.Random(2), Distribution(), []
    for _ in range(2):
        for _ in range(20000 if not sizes else 180000):
            distribution.add(source.lognormvariate(1.0, 0.5))
        sizes.append(size_of(distribution, set()))
    assert sizes[1] < sizes[0] + 50000


def feed(window, rows, step_s, read_every=0):
    """Add rows, one each step."""
    for index, row in enumerate(rows):
        window.add(index * step_s, row)
        if read_every and index % read_every == 0:
            window.read(index * step_s)
    return (len(rows) - 1) * step_s


@pytest.mark.parametrize('read_every', [0, 100, 3000])
def test_window_with_many_rows_is_accurate(read_every):
    """It is up to one slice too long, and its percentiles are within 0.5 %."""
    source = random.Random(3)
    rows = [(source.lognormvariate(1.0, 0.3), None if index % 2 else source.gauss(0.0, 1.0))
            for index in range(20000)]
    window = SlidingWindow(10.0, 2)
    now_s = feed(window, rows, 0.001, read_every)
    first, second = window.read(now_s)
    count = len(first.ordered)
    assert 10001 <= count <= 10001 + 10000 / histogram.SLICES + histogram.CHUNK
    inside = rows[-count:]
    values = sorted(row[0] for row in inside)
    assert first.largest == values[-1]
    assert first.deviation == pytest.approx(statistics.pstdev(values))
    for percent in PERCENTS:
        assert percentile(first.ordered, percent) == pytest.approx(
            percentile(values, percent), rel=0.0051)
    others = sorted(row[1] for row in inside if row[1] is not None)
    assert len(second.ordered) == len(others)
    assert percentile(second.ordered, 95) == pytest.approx(percentile(others, 95), rel=0.0051)
    assert percentile(second.ordered, 5) == pytest.approx(percentile(others, 5), rel=0.0051)


def test_window_with_few_rows_is_exact():
    """This holds even after a time with many rows."""
    window = SlidingWindow(1.0, 1)
    now_s = feed(window, [(float(index),) for index in range(5000)], 0.0001)
    assert len(window.read(now_s)[0].ordered) == 5000
    for index in range(50):
        window.add(now_s + 2.0 + index * 0.01, (index + 0.123,))
    summary, = window.read(now_s + 2.5)
    assert summary.ordered == [index + 0.123 for index in range(50)]
    assert window._slices == window._rows.__class__() and window._sums == [{}]
    assert window.read(now_s + 60.0)[0] == ([], None, None)


@pytest.mark.parametrize('read_every', [0, 333])
def test_memory_of_a_window_is_bounded(read_every):
    """Ten times the rate takes less than twice the memory, with and without readers."""
    sizes = []
    for count in (20000, 200000):
        source, window = random.Random(4), SlidingWindow(3600.0, 2)
        feed(window, [(source.lognormvariate(1.0, 0.3), 0.5) for _ in range(count)],
             3600.0 / count, read_every)
        sizes.append(size_of([window._new, window._rows, window._slices, window._sums], set()))
    assert sizes[1] < 2 * sizes[0]
    assert sizes[1] < 4e6


def test_writer_never_waits_for_a_reader():
    """It does not wait even if a reader holds the lock for a long time."""
    window = SlidingWindow(3600.0, 1)
    with window._lock:
        adder = threading.Thread(target=feed, args=(window, [(1.0,)] * 10000, 0.001))
        adder.start()
        adder.join(60)
        assert not adder.is_alive()
    assert len(window.read(10.0)[0].ordered) == 10000


def test_reading_a_long_window_is_fast():
    """It has an hour of tokens at 333 per second; sorting them took more than a second."""
    source, window = random.Random(5), SlidingWindow(3600.0, 5)
    values = [source.lognormvariate(1.0, 0.3) for _ in range(1000)]
    rows = [(value, 0.1, 1.0, 1.0 / value, 300.0 / value) for value in values]
    now_s = feed(window, rows * 200, 0.018, 5000)
    took_s = []
    for _ in range(5):
        begin_s = time.thread_time()
        window.read(now_s)
        took_s.append(time.thread_time() - begin_s)
    assert min(took_s) < 0.05
