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

"""`Collector`: when it collects garbage during back-to-back answers, and how often."""

import gc
from types import SimpleNamespace

from physai_decode import collector
from physai_decode.collector import Collector
import pytest


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    """Return a clock; check that garbage collection is on before and after the test."""
    assert gc.isenabled()
    yield Clock()
    assert gc.isenabled()


@pytest.fixture
def collections(monkeypatch):
    """Return a list that receives the generation of each collection."""
    generations = []
    monkeypatch.setattr(gc, 'collect', lambda generation=2: generations.append(generation))
    return generations


class Cycle:
    """A reference cycle: only a collection frees it."""

    def __init__(self) -> None:
        self.me = self


def cycles() -> int:
    """Count the cycles that are not freed."""
    return sum(type(each) is Cycle for each in gc.get_objects())


@pytest.mark.parametrize('step_s', [0.012, 0.0])
def test_garbage_is_bounded_while_the_queue_never_empties(clock, step_s, monkeypatch):
    """Objects that outlive the collection after their own request are freed by a later one."""
    monkeypatch.setattr(collector, 'FULL_EVERY_OBJECTS', 3000)
    paused = Collector(clock).paused
    kept, most = [], 0
    for index in range(3000):
        with paused(full=lambda: False):
            kept = [*kept, Cycle(), Cycle()][-4:]       # alive for two requests
            clock.now_s += step_s
        if index % 100 == 99:
            most = max(most, cycles())
    assert most < 3000


def test_collection_waits_for_the_end_of_all_answers(clock, collections):
    """All workers share the collector, so their answers overlap."""
    paused = Collector(clock).paused
    with paused(full=lambda: True):
        with paused(full=lambda: True):
            assert not gc.isenabled()
        assert not gc.isenabled()
        assert collections == []
    assert collections == [2]
    with paused(full=lambda: False):
        pass
    assert collections == [2, 0]


def test_collects_although_answers_always_overlap(clock, collections):
    """The end of one answer is enough if the last collection was `OVERLAP_S` ago."""
    paused = Collector(clock).paused
    with paused(full=lambda: False):
        for _ in range(10):
            with paused(full=lambda: False):
                clock.now_s += collector.OVERLAP_S / 3 + 0.01
            assert not gc.isenabled()
        assert len(collections) == 3
    assert len(collections) == 4


def test_slow_full_collections_are_rare(clock, monkeypatch):
    """They take at most `FULL_SHARE` of the time."""
    took_s = 0.0

    def collect(generation=2):
        nonlocal took_s
        took_s += 0.5 if generation == 2 else 0.0
        clock.now_s += 0.5 if generation == 2 else 0.0

    monkeypatch.setattr(gc, 'collect', collect)
    paused, begin_s = Collector(clock).paused, clock.now_s
    for _ in range(30000):
        with paused(full=lambda: False):
            clock.now_s += 0.02
    assert 0 < took_s <= collector.FULL_SHARE * (clock.now_s - begin_s) + 0.5


def test_leaves_collection_off_if_it_was_off(clock, collections):
    """An application may have its own reason to disable it."""
    gc.disable()
    try:
        with Collector(clock).paused(full=lambda: True):
            pass
        assert not gc.isenabled()
        assert collections == []
    finally:
        gc.enable()


def test_an_error_ends_the_pause(clock):
    """Garbage collection is on again."""
    with pytest.raises(ValueError), Collector(clock).paused(full=lambda: True):
        raise ValueError
    assert gc.isenabled()


def test_returns_freed_memory_if_the_c_library_can(monkeypatch):
    paddings = []
    for library in (SimpleNamespace(malloc_trim=paddings.append), SimpleNamespace()):
        monkeypatch.setattr(collector.ctypes, 'CDLL', lambda name, library=library: library)
        collector.give_back()
    assert paddings == [0]
