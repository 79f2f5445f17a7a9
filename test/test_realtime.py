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

"""`Placement`: the scheduling class, cores and locked memory of the decode thread."""

from contextlib import contextmanager
import os
import resource
import sys
import threading

from fake_engine import FakeEngine
from physai_decode import realtime
from physai_decode.config import RealtimeConfig
from physai_decode.realtime import Placement
import pytest
from worker_rig import maker
from worker_rig import wait_for

CORES = os.sched_getaffinity(0)
make = pytest.fixture(maker)
sliced = pytest.mark.skipif(
    not realtime._slice_ns(0), reason='this system has no time slices, or does not tell them')
several_cores = pytest.mark.skipif(len(CORES) < 2, reason='needs two cores')


def permitted():
    """Return whether this user may give a thread a real-time class."""
    results = []

    def attempt():
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            results.append(True)
        except PermissionError:
            results.append(False)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return results[0]


@contextmanager
def waiting():
    """Run a thread that waits until the end of ``with``."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def test_without_settings_nothing_changes():
    """`in_force` still reports the class and the cores."""
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig())
        in_force = placement.in_force()
        assert in_force.scheduling == 'other' and in_force.realtime_refused == ''
        assert in_force.decode_cores == ' '.join(map(str, sorted(CORES)))
        placement.end()
    wait_for(lambda: placement.in_force().scheduling is None)       # the thread has ended


@sliced
def test_a_thread_that_sleeps_has_a_short_slice():
    """It keeps its class and its nice value, and other threads keep their slice."""
    with waiting() as thread, waiting() as other:
        os.sched_setscheduler(thread.native_id, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, thread.native_id, 3)
        placement = Placement(thread.native_id, RealtimeConfig(), sleeps=True)
        assert placement.in_force().scheduling == 'batch, slice 0.5 ms' and not placement.refused
        assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == 3
        assert realtime._slice_ns(thread.native_id) == realtime.SLICE_NS
        assert realtime._slice_ns(other.native_id) == realtime._slice_ns(0) > realtime.SLICE_NS


@pytest.mark.parametrize('fifo', [False, pytest.param(True, marks=pytest.mark.skipif(
    not permitted(), reason='this user may not use a real-time class'))])
def test_a_thread_of_another_class_has_no_slice(fifo):
    """`sched_setattr` would refuse the slice, or give the thread another class."""
    with waiting() as thread:
        if not fifo:
            os.sched_setscheduler(thread.native_id, os.SCHED_IDLE, os.sched_param(0))
        placement = Placement(thread.native_id, RealtimeConfig(priority=int(fifo)), sleeps=True)
        assert placement.in_force().scheduling == ('fifo 1' if fifo else 'idle')
        placement.end()


class Kernel:
    """A C library whose ``sched_setattr`` and ``sched_getattr`` return 0 and do nothing."""

    def syscall(self, *arguments):
        return 0


@pytest.mark.parametrize('calls', [None, (-1, 315), (-1, -1), (314, 315)])
def test_a_system_without_slices_is_no_problem(monkeypatch, calls):
    """Another processor, a container that refuses the calls, and a kernel older than 6.12."""
    monkeypatch.setattr(realtime, '_CALLS', calls)
    if calls == (314, 315):
        monkeypatch.setattr(realtime, '_libc', Kernel)
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig(), sleeps=True)
        assert placement.in_force().scheduling == 'other' and not placement.refused
    with realtime.short_slice(True) as granted:
        assert not granted


@sliced
def test_a_short_slice_ends_with_its_block():
    """Processes that the thread starts later have the slice that it had before."""
    before_ns = realtime._slice_ns(0)
    with realtime.short_slice(False) as granted:
        assert not granted and realtime._slice_ns(0) == before_ns
    with pytest.raises(KeyError), realtime.short_slice(True) as granted:
        assert granted and realtime._slice_ns(0) == realtime.SLICE_NS
        raise KeyError
    assert realtime._slice_ns(0) == before_ns


@pytest.mark.skipif(not permitted(), reason='this user may not use a real-time class')
def test_only_the_decode_thread_gets_the_real_time_class():
    """The switch interval of the interpreter is short meanwhile."""
    with waiting() as thread, waiting() as other:
        before_s = sys.getswitchinterval()
        placement = Placement(thread.native_id, RealtimeConfig(priority=1))
        in_force = placement.in_force()
        assert sys.getswitchinterval() == pytest.approx(realtime.SWITCH_S)
        placement.end()
        assert sys.getswitchinterval() == before_s
        assert in_force.scheduling == 'fifo 1' and not in_force.realtime_refused
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        assert os.sched_getscheduler(other.native_id) == os.SCHED_OTHER


@several_cores
def test_other_threads_move_to_the_other_cores():
    """Existing and new threads do; at the end, all may use all cores again."""
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


def test_reports_that_no_core_is_left_for_other_threads():
    """The other threads keep their cores."""
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig(cpu_affinity=tuple(CORES)))
        assert 'leaves no core to the other threads' in placement.refused
        assert os.sched_getaffinity(0) == CORES
        placement.end()


@pytest.mark.parametrize('core', [4000, 4095])
def test_rejects_a_core_that_does_not_exist(core):
    """The message lists the allowed cores, and no thread moves."""
    cores = (min(CORES), core)
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig(cpu_affinity=cores))
        assert f'may use the cores {", ".join(map(str, sorted(CORES)))}' in placement.refused
        assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) == CORES


def test_reports_how_to_permit_what_the_system_denies(monkeypatch):
    """The thread keeps its class, and no memory is locked."""
    def refuse(*arguments):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'sched_setscheduler', refuse)
    monkeypatch.setattr(resource, 'getrlimit', lambda what: (65536, 65536))
    monkeypatch.setattr(realtime, '_status', lambda name, base=10: 0)
    with waiting() as thread:
        placement = Placement(thread.native_id, RealtimeConfig(priority=80, lock_memory=True))
        in_force = placement.in_force()
        assert in_force.scheduling == 'other' and in_force.memory_locked is False
    for words in ('realtime.priority 80 is not in force (Operation not permitted',
                  'rtprio 99', 'LimitRTPRIO=99', '--ulimit rtprio=99', 'SYS_NICE',
                  'realtime.lock_memory is not in force (the limit memlock is 65536 bytes',
                  'memlock unlimited', 'LimitMEMLOCK=infinity', '--ulimit memlock=-1'):
        assert words in in_force.realtime_refused


SHARE = 'sys/fs/cgroup/cpu,cpuacct/robot/cpu.rt_runtime_us'
GROUP_FILES = {
    'proc/sys/kernel/sched_rt_runtime_us': '950000\n',
    'proc/self/cgroup': '4:memory:/\n3:cpuset:/other\n2:cpu,cpuacct:/docker/ab/robot\n0::/\n',
    'proc/self/mountinfo': (
        '30 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n'
        '31 30 0:27 / /sys/fs/cgroup/cpuset rw,relatime shared:9 - cgroup cgroup rw,cpuset\n'
        '32 30 0:28 /docker/ab /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup '
        'rw,cpu,cpuacct\n'),
    SHARE: '0\n'}


@pytest.mark.parametrize(('changes', 'refuses'), [
    ({}, True), ({SHARE: '950000\n'}, False), ({SHARE: None}, None),
    ({SHARE: None, SHARE.replace('rt_runtime_us', 'shares'): '1024\n'}, False),
    ({'proc/sys/kernel/sched_rt_runtime_us': '-1\n'}, False),
    ({'proc/sys/kernel/sched_rt_runtime_us': None}, None),
    ({'proc/self/cgroup': '0::/docker/ab\n'}, None),
    ({'proc/self/mountinfo': '29 25 0:25 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n'}, None)])
def test_reads_whether_the_control_group_has_a_share(tmp_path, changes, refuses):
    """A container mounts its own group; version 2 of control groups does not show the share."""
    for name, text in {**GROUP_FILES, **changes}.items():
        if text is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    assert realtime.group_refuses(tmp_path) is refuses


@pytest.mark.parametrize(('limit', 'capabilities', 'refuses', 'words', 'absent'), [
    (0, 0, False, 'the limit rtprio is 0): to permit it, set "USER - rtprio 99"', 'sysctl'),
    (0, 0, None, 'rtprio is 0): to permit it, set "USER - rtprio 99"', 'cpu.rt_runtime_us of the '
     'control group is 0'),
    (0, 1 << 23, True, 'cpu.rt_runtime_us of the control group is 0): to permit it, run "sysctl '
     'kernel.sched_rt_runtime_us=-1"', 'limits.conf'),
    (80, 0, True, 'rtprio is 80, cpu.rt_runtime_us of the control group is 0): to permit it, run',
     'limits.conf'),
    (resource.RLIM_INFINITY, 0, True, 'rtprio is unlimited, cpu', 'limits.conf'),
    (79, 0, True, 'SYS_NICE; also run "sysctl', 'still refused'),
    (99, 0, None, 'if it is still refused, the kernel has CONFIG_RT_GROUP_SCHED', 'group is 0')])
def test_names_what_refuses_a_priority(monkeypatch, limit, capabilities, refuses, words, absent):
    """Without a share of its control group, even root cannot use a real-time class."""
    def refuse(*arguments):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'sched_setscheduler', refuse)
    monkeypatch.setattr(resource, 'getrlimit', lambda what: (limit, limit))
    monkeypatch.setattr(realtime, '_status', lambda name, base=10: capabilities)
    monkeypatch.setattr(realtime, 'group_refuses', lambda: refuses)
    with waiting() as thread:
        refused = Placement(thread.native_id, RealtimeConfig(priority=80)).refused
    assert words in refused and absent not in refused


def test_locks_and_unlocks_memory(monkeypatch):
    """The flags are MCL_CURRENT, MCL_FUTURE and MCL_ONFAULT; it unlocks once."""
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
def test_follow_moves_a_process_to_the_cores_of_the_main_thread():
    """A process that the decode thread starts would otherwise stay on its core."""
    own = min(CORES)

    def run():
        os.sched_setaffinity(0, {own})
        realtime.follow(os.getpid())
        cores.append(os.sched_getaffinity(0))

    cores = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert cores == [CORES]


@sliced
def test_follow_takes_the_slice_of_the_main_thread():
    with waiting() as thread:
        Placement(thread.native_id, RealtimeConfig(), sleeps=True)
        before_ns = realtime._slice_ns(0)
        realtime.follow(thread.native_id)
        assert realtime._slice_ns(0) == realtime.SLICE_NS
    realtime._set_slice(0, before_ns)


@sliced
@pytest.mark.parametrize('sleeps', [False, True])
def test_worker_gives_its_thread_a_slice_if_it_sleeps(make, sleeps):
    """Only on a GPU: threads that compute on a CPU would inherit the slice."""
    worker, _ = make(FakeEngine(sleeps=sleeps))
    assert worker.in_force.scheduling == ('other, slice 0.5 ms' if sleeps else 'other')


@several_cores
def test_worker_places_its_thread_from_start_to_stop(make):
    """A worker that is restarted does so again."""
    own = min(CORES)
    worker, _ = make(realtime=RealtimeConfig(cpu_affinity=(own,)))
    for _ in range(2):
        assert worker.in_force.decode_cores == str(own)
        assert os.sched_getaffinity(0) == CORES - {own}
        assert worker.stop(10.0)
        assert os.sched_getaffinity(0) == CORES
        worker.start()


def test_a_status_without_proc_is_0(monkeypatch):
    def fail(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(realtime.Path, 'read_text', fail)
    assert realtime._status('VmLck') == 0
