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
The scheduling of the decode thread: priority or time slice, cores, and locked memory.

A setting that the system does not permit is reported with the way to permit it, and the thread
runs without it. The effective settings are read back from the kernel.
"""

from collections.abc import Collection
from collections.abc import Iterator
from contextlib import contextmanager
import ctypes
from dataclasses import dataclass
import os
from pathlib import Path
import platform
import re
import resource
import struct
import sys

from physai_decode.config import RealtimeConfig

POLICIES = {os.SCHED_OTHER: 'other', os.SCHED_FIFO: 'fifo', os.SCHED_RR: 'rr',
            os.SCHED_BATCH: 'batch', os.SCHED_IDLE: 'idle', 6: 'deadline'}
_RESET_ON_FORK = 0x40000000
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4   # of sys/mman.h, except PowerPC and Alpha
_CAP_IPC_LOCK, _CAP_SYS_NICE = 14, 23
# How long a thread waits for the GIL before it asks the holder to release it; 5 ms by default.
# Without a real-time priority, a shorter time costs more than it gains, because the thread that
# gets the GIL may still have to wait for a core.
SWITCH_S = 1e-4
# The time slice of a thread that sleeps until a token is ready. From Linux 6.12 on, a thread that
# wakes up preempts one with a longer slice; the default is 0.7 to 3 ms, by the number of cores.
# The slice has to be longer than the host's work on a token, or else a timer tick during that work
# gives the core away until the next tick.
SLICE_NS = 500_000
_ATTRIBUTES = struct.Struct('=IIQiIQQQ')    # sched_attr of linux/sched/types.h, first version
_POLICY, _RUNTIME = 1, 5                    # fields of it
# Numbers of the system calls sched_setattr and sched_getattr, which the C library may lack.
_CALLS = {('x86_64', 8): (314, 315), ('aarch64', 8): (274, 275)}.get(
    (platform.machine(), struct.calcsize('P')))
_TASKS = '/proc/self/task'
_PERMIT = ('set "USER - {limit}" in /etc/security/limits.conf and log in again, set '
           '{unit} in a systemd unit, or use docker run --ulimit {docker} or --cap-add '
           '{capability}')
PERMIT_PRIORITY = _PERMIT.format(limit='rtprio 99', unit='LimitRTPRIO=99', docker='rtprio=99',
                                 capability='SYS_NICE')
PERMIT_MEMORY = _PERMIT.format(limit='memlock unlimited', unit='LimitMEMLOCK=infinity',
                               docker='memlock=-1', capability='IPC_LOCK')
PERMIT_GROUP = ('run "sysctl kernel.sched_rt_runtime_us=-1" as root of the host, or write a '
                'share, such as 950000, to cpu.rt_runtime_us of the control group and those above')
_CPU_GROUP = re.compile(r'^\d+:(?:[^:\n]*,)?cpu(?:,[^:\n]*)?:(.*)$', re.M)
_CPU_MOUNT = re.compile(
    r'^\S+ \S+ \S+ (\S+) (\S+) .* - cgroup \S+ (?:\S*,)?cpu(?:,\S*)?$', re.M)


@dataclass(frozen=True)
class InForce:
    """The effective scheduling of a thread, read from the kernel."""

    scheduling: str | None          # class, priority and slice; None: the thread has ended
    decode_cores: str | None        # numbers of cores, such as 2 3
    memory_locked: bool
    realtime_refused: str           # the settings that are not in force, and why


class Placement:
    """The scheduling of a thread until `end`; all other threads move off its cores."""

    def __init__(self, thread_id: int, config: RealtimeConfig, sleeps: bool = False) -> None:
        """
        Apply the settings that the system permits.

        :param thread_id: the kernel's id of the thread, which must not have started threads yet.
            Those that it starts later inherit its scheduling class, its slice and its cores.
        :param sleeps: whether the thread sleeps until a token is ready; if so, it gets a slice of
            `SLICE_NS`, unless it has a priority or the kernel has no slices.
        """
        self._thread_id = thread_id
        self._before = os.sched_getaffinity(0)
        self._other_cores: set[int] = set()     # of all other threads; empty: unchanged
        self._locked = False
        self._switch_s = sys.getswitchinterval()
        self._refused = [text for text in (
            self._lock() if config.lock_memory else '',
            self._pin(set(config.cpu_affinity)) if config.cpu_affinity else '',
            self._raise(config.priority) if config.priority else '') if text]
        self._has_slice = sleeps and _set_slice(thread_id, SLICE_NS)

    @property
    def refused(self) -> str:
        """The settings that are not in force, and how to permit them; empty if there are none."""
        return '; '.join(self._refused)

    def in_force(self) -> InForce:
        """Read the effective scheduling from the kernel; from any thread."""
        scheduling = cores = None
        try:
            policy = os.sched_getscheduler(self._thread_id) & ~_RESET_ON_FORK
            priority = os.sched_getparam(self._thread_id).sched_priority
            scheduling = POLICIES.get(policy, str(policy)) + (f' {priority}' if priority else '')
            if self._has_slice and (slice_ns := _slice_ns(self._thread_id)):
                scheduling += f', slice {1e-6 * slice_ns:g} ms'
            cores = ' '.join(map(str, sorted(os.sched_getaffinity(self._thread_id))))
        except ProcessLookupError:
            pass
        return InForce(scheduling, cores, _status('VmLck') > 0, self.refused)

    def end(self) -> None:
        """Undo what affects other threads; call this after the thread has ended."""
        sys.setswitchinterval(self._switch_s)
        if self._other_cores:
            _move(self._before, {self._thread_id}, self._other_cores)
            self._other_cores = set()
        if self._locked:
            _libc().munlockall()
            self._locked = False

    def _raise(self, priority: int) -> str:
        try:
            os.sched_setscheduler(self._thread_id, os.SCHED_FIFO, os.sched_param(priority))
        except OSError as error:
            return (f'realtime.priority {priority} is not in force ({error.strerror}; '
                    f'{_priority_advice(priority)}')
        sys.setswitchinterval(SWITCH_S)
        return ''

    def _pin(self, cores: set[int]) -> str:
        try:
            os.sched_setaffinity(self._thread_id, cores)
            effective = os.sched_getaffinity(self._thread_id)
        except (OSError, OverflowError):
            effective = set()
        if effective != cores:
            if effective:
                os.sched_setaffinity(self._thread_id, self._before)
            return (f'realtime.cpu_affinity {sorted(cores)} is not in force: this process may '
                    f'use the cores {_list(self._before)}; name some of these, or permit more '
                    '(taskset, AllowedCPUs= in a systemd unit, docker run --cpuset-cpus)')
        self._other_cores = self._before - cores
        if not self._other_cores:
            return (f'realtime.cpu_affinity {sorted(cores)} leaves no core to the other threads: '
                    'they share those of the decode thread; name fewer cores')
        _move(self._other_cores, {self._thread_id})
        return ''

    def _lock(self) -> str:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if limit != resource.RLIM_INFINITY and not _status('CapEff', 16) >> _CAP_IPC_LOCK & 1:
            # With a limit, the first allocation beyond it would kill the process later.
            return (f'realtime.lock_memory is not in force (the limit memlock is {limit} bytes, '
                    f'not unlimited): to permit it, {PERMIT_MEMORY}')
        if _libc().mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
            return (f'realtime.lock_memory is not in force ({os.strerror(ctypes.get_errno())}): '
                    f'to permit it, {PERMIT_MEMORY}')
        self._locked = True
        return ''


def follow(pid: int) -> None:
    """Give the calling thread the class, slice and cores of a process's main thread."""
    try:
        os.sched_setscheduler(0, os.sched_getscheduler(pid), os.sched_getparam(pid))
        _set_slice(0, _slice_ns(pid))
        os.sched_setaffinity(0, os.sched_getaffinity(pid))
    except OSError:                     # it has ended, or this is not permitted
        pass


@contextmanager
def short_slice(sleeps: bool) -> Iterator[bool]:
    """
    Give the calling thread a slice of `SLICE_NS` inside ``with``, as `Placement` does.

    Processes and threads that it starts there inherit the slice.

    :param sleeps: whether the thread sleeps until a token is ready; if not, nothing changes.
    :return: whether the slice is in force.
    """
    before_ns = _slice_ns(0)
    granted = sleeps and _set_slice(0, SLICE_NS)
    try:
        yield granted
    finally:
        if granted:
            _set_slice(0, before_ns)


def _set_slice(thread_id: int, slice_ns: int) -> bool:
    """Set the time slice of a thread without a priority; return whether it is in force."""
    attributes = _attributes(thread_id)
    if _CALLS is None or not attributes or attributes[_POLICY] not in (
            os.SCHED_OTHER, os.SCHED_BATCH):
        return False
    attributes[_RUNTIME] = slice_ns
    _libc().syscall(_CALLS[0], thread_id, _ATTRIBUTES.pack(*attributes), 0)
    return _slice_ns(thread_id) == slice_ns         # older kernels ignore it


def _slice_ns(thread_id: int) -> int:
    """Return the time slice of a thread, 0 if it is unknown."""
    return (_attributes(thread_id) or [0] * 8)[_RUNTIME]


def _attributes(thread_id: int) -> list[int]:
    """Return the fields of the thread's sched_attr; empty if the system does not tell them."""
    data = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if _CALLS is None or _libc().syscall(_CALLS[1], thread_id, data, _ATTRIBUTES.size, 0):
        return []
    return list(_ATTRIBUTES.unpack(data))


def _move(cores: set[int], spared: Collection[int], only: set[int] | None = None) -> None:
    """
    Set the cores of the threads of this process; new threads inherit them.

    :param spared: threads that keep their cores.
    :param only: moves only threads that have exactly these cores.
    """
    done = set(spared)
    # Repeat for threads that were started meanwhile by threads not yet moved.
    while remaining := {int(each) for each in os.listdir(_TASKS)} - done:
        for thread_id in remaining:
            try:
                if only is None or os.sched_getaffinity(thread_id) == only:
                    os.sched_setaffinity(thread_id, cores)
            except ProcessLookupError:
                pass
        done |= remaining


def _status(name: str, base: int = 10) -> int:
    """Return a number from ``/proc/self/status``, 0 if it is missing."""
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:
        return 0
    match = re.search(rf'^{name}:\s*([0-9a-f]+)', status, re.M)
    return int(match[1], base) if match else 0


def _priority_advice(priority: int) -> str:
    """Return what may forbid a real-time priority, and how to permit it."""
    limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
    unlimited = limit == resource.RLIM_INFINITY
    refused = group_refuses()
    parts = [f'the limit rtprio is {"unlimited" if unlimited else limit}']
    if refused:
        parts.append('cpu.rt_runtime_us of the control group is 0')
    allowed = (unlimited or limit >= priority
               or _status('CapEff', 16) >> _CAP_SYS_NICE & 1 == 1)
    advice = PERMIT_GROUP if refused and allowed else PERMIT_PRIORITY
    if refused and not allowed:
        advice += f'; also {PERMIT_GROUP}'
    if refused is None:
        advice += ('; if it is still refused, the kernel has CONFIG_RT_GROUP_SCHED, and the '
                   f'control group has no share of real-time classes: {PERMIT_GROUP}')
    return f'{", ".join(parts)}): to permit it, {advice}'


def group_refuses(root: Path = Path('/')) -> bool | None:
    """
    Return whether the control group of this process has no share of real-time classes.

    A kernel with CONFIG_RT_GROUP_SCHED checks this, even for root.

    :param root: root of the file system.
    :returns: None if it is unknown, because only version 1 of control groups shows the share.
    """
    proc = root / 'proc'
    try:
        if int((proc / 'sys/kernel/sched_rt_runtime_us').read_text()) < 0:
            return False                # the kernel does not limit real-time classes
        group = _CPU_GROUP.search((proc / 'self/cgroup').read_text())
        mount = _CPU_MOUNT.search((proc / 'self/mountinfo').read_text())
        if group is None or mount is None:
            return None
        # In a container, the mount begins at a group below the root.
        folder = root / mount[2].lstrip('/') / os.path.relpath(group[1], mount[1])
        share = folder / 'cpu.rt_runtime_us'
        return share.name in os.listdir(folder) and int(share.read_text()) == 0
    except (OSError, ValueError):
        return None


def _list(cores: Collection[int]) -> str:
    return ', '.join(map(str, sorted(cores)))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
