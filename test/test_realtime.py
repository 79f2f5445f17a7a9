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

"""The decode thread's place: what is asked for, what the system permits, what is in force."""

from contextlib import contextmanager
import os
import resource
import sys
import threading

from physai_decode import realtime
from physai_decode.config import RealtimeConfig
from physai_decode.realtime import Placement
import pytest
from worker_rig import making
from worker_rig import wait_for

CORES = os.sched_getaffinity(0)
several_cores = pytest.mark.skipif(len(CORES) < 2, reason='needs two cores')


def permitted(policy=os.SCHED_FIFO, priority=1):
    """Tell whether a thread of this user may have this class."""
    found = []

    def attempt():
        try:
            os.sched_setscheduler(0, policy, os.sched_param(priority))
            found.append(True)
        except PermissionError:
            found.append(False)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found[0]


@contextmanager
def waiting():
    """Give a thread that waits till the end of ``with``."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def test_without_settings_nothing_changes():
    """And what is in force is told all the same."""
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig())
        told = placement.in_force()
        assert told.scheduling == 'other' and told.realtime_refused == ''
        assert told.decode_cores == ' '.join(map(str, sorted(CORES)))
        placement.end()
    wait_for(lambda: placement.in_force().scheduling is None)       # the kernel forgets it


@pytest.mark.skipif(not permitted(), reason='this user may have no real-time class')
def test_the_class_is_read_back():
    """The thread has it, and no other."""
    with waiting() as thread, waiting() as other:
        before_s = sys.getswitchinterval()
        placement = Placement(thread.native_id, RealtimeConfig(priority=1))
        told = placement.in_force()
        assert sys.getswitchinterval() == pytest.approx(realtime.SWITCH_S)
        placement.end()
        assert sys.getswitchinterval() == before_s
        assert told.scheduling == 'fifo 1' and not told.realtime_refused
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        assert os.sched_getscheduler(other.native_id) == os.SCHED_OTHER


@several_cores
def test_other_threads_take_the_other_cores():
    """Those that are there, those they start, and all of them again as before at the end."""
    own = min(CORES)
    with waiting() as older, waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig(cpu_affinity=(own,)))
        with waiting() as younger:
            assert os.sched_getaffinity(thread.native_id) == {own}
            assert placement.in_force().decode_cores == str(own)
            for each in (older.native_id, younger.native_id, 0):
                assert os.sched_getaffinity(each) == CORES - {own}
            placement.end()
            for each in (older.native_id, younger.native_id, 0):
                assert os.sched_getaffinity(each) == CORES


def test_all_cores_leave_none_to_the_others():
    """It is told, and the others stay where they are."""
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig(cpu_affinity=tuple(CORES)))
        assert 'leaves no core to the other threads' in placement.refused
        assert os.sched_getaffinity(0) == CORES
        placement.end()


@pytest.mark.parametrize('core', [4000, 4095])
def test_a_core_that_is_not_there_is_refused(core):
    """The message has what may be named, and nothing has changed."""
    cores = (min(CORES), core)
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig(cpu_affinity=cores))
        assert f'may use the cores {", ".join(map(str, sorted(CORES)))}' in placement.refused
        assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) == CORES


def test_what_is_not_permitted_is_told_with_the_way(monkeypatch):
    """And the thread goes on as it is."""
    def refuse(*arguments):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'sched_setscheduler', refuse)
    monkeypatch.setattr(resource, 'getrlimit', lambda what: (65536, 65536))
    monkeypatch.setattr(realtime, '_status', lambda name, base=10: 0)
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig(priority=80, lock_memory=True))
        told = placement.in_force()
        assert told.scheduling == 'other' and told.memory_locked is False
    for words in ('realtime.priority 80 is not in force (Operation not permitted',
                  'rtprio 99', 'LimitRTPRIO=99', '--ulimit rtprio=99', 'SYS_NICE',
                  'realtime.lock_memory is not in force (the limit memlock is 65536 bytes',
                  'memlock unlimited', 'LimitMEMLOCK=infinity', '--ulimit memlock=-1'):
        assert words in told.realtime_refused


def test_memory_is_locked_and_let_go(monkeypatch):
    """By the C library, for what is there and what will be, page by page as they are used."""
    calls = []

    class Library:
        def mlockall(self, flags):
            calls.append(flags)
            return 0

        def munlockall(self):
            calls.append('unlocked')

    monkeypatch.setattr(realtime, '_libc', Library)
    monkeypatch.setattr(resource, 'getrlimit', lambda what: (resource.RLIM_INFINITY,) * 2)
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig(lock_memory=True))
        assert not placement.refused
        placement.end()
        placement.end()
    assert calls == [7, 'unlocked']


@several_cores
def test_a_child_follows_the_main_thread():
    """What the decode thread starts does not stay on its core."""
    own = min(CORES)

    def run():
        os.sched_setaffinity(0, {own})
        realtime.follow(os.getpid())
        seen.append(os.sched_getaffinity(0))

    seen = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [CORES]


@several_cores
def test_a_worker_places_its_thread():
    """From start to stop; a worker that is started again does so again."""
    own = min(CORES)
    with making() as make:
        worker, _ = make(realtime=RealtimeConfig(cpu_affinity=(own,)))
        for _ in range(2):
            assert worker.in_force.decode_cores == str(own)
            assert os.sched_getaffinity(0) == CORES - {own}
            assert worker.stop(10.0)
            assert os.sched_getaffinity(0) == CORES
            worker.start()
