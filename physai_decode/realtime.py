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
The decode thread's place on the machine: its scheduling class, its cores, and locked memory.

What the system does not permit is told with the way to permit it, and the thread goes on without.
What is in force is read back from the kernel. It knows nothing of requests, engines or ROS.
"""

from collections.abc import Collection
import ctypes
from dataclasses import dataclass
import os
from pathlib import Path
import re
import resource
import sys

from physai_decode.config import RealtimeConfig

POLICIES = {os.SCHED_OTHER: 'other', os.SCHED_FIFO: 'fifo', os.SCHED_RR: 'rr',
            os.SCHED_BATCH: 'batch', os.SCHED_IDLE: 'idle', 6: 'deadline'}
_RESET_ON_FORK = 0x40000000
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4       # of sys/mman.h, but on PowerPC and Alpha
_CAP_IPC_LOCK = 14
# Who wants the interpreter's lock waits so long before its holder is asked for it; 5 ms by
# default. Without a real-time class a shorter time costs more than it brings: who was asked then
# waits for a core, and the lock with it.
SWITCH_S = 1e-4
_TASKS = '/proc/self/task'
_PERMIT = ('permit it by "USER - {limit}" in /etc/security/limits.conf and a new login, by {unit} '
           'in a systemd unit, or by docker run --ulimit {docker} or --cap-add {capability}')
PERMIT_PRIORITY = _PERMIT.format(limit='rtprio 99', unit='LimitRTPRIO=99', docker='rtprio=99',
                                 capability='SYS_NICE')
PERMIT_MEMORY = _PERMIT.format(limit='memlock unlimited', unit='LimitMEMLOCK=infinity',
                               docker='memlock=-1', capability='IPC_LOCK')


@dataclass(frozen=True)
class InForce:
    """How a thread is scheduled, as the kernel says."""

    scheduling: str | None          # other, or fifo and its priority; None: the thread has ended
    decode_cores: str | None        # numbers of cores, such as 2 3
    memory_locked: bool
    realtime_refused: str           # what was asked for and is not in force, and why


class Placement:
    """One thread in its place, until `end`; all others of the process beside its cores."""

    def __init__(self, thread_id: int, config: RealtimeConfig) -> None:
        """
        Put a thread into its place, as far as the system permits.

        :param thread_id: as the kernel counts; the thread has started no others yet. Those that it
            starts from now on get its class and its cores.
        """
        self._thread_id = thread_id
        self._before = os.sched_getaffinity(0)
        self._others: set[int] = set()          # cores of all other threads; empty: as before
        self._locked = False
        self._switch_s = sys.getswitchinterval()
        self._refused = [text for text in (
            self._lock() if config.lock_memory else '',
            self._pin(set(config.cpu_affinity)) if config.cpu_affinity else '',
            self._raise(config.priority) if config.priority else '') if text]

    @property
    def refused(self) -> str:
        """Say what was asked for and is not in force, and how to have it; empty for nothing."""
        return '; '.join(self._refused)

    def in_force(self) -> InForce:
        """Ask the kernel how the thread is scheduled now; from any thread."""
        scheduling = cores = None
        try:
            policy = os.sched_getscheduler(self._thread_id) & ~_RESET_ON_FORK
            priority = os.sched_getparam(self._thread_id).sched_priority
            scheduling = POLICIES.get(policy, str(policy)) + (f' {priority}' if priority else '')
            cores = ' '.join(map(str, sorted(os.sched_getaffinity(self._thread_id))))
        except ProcessLookupError:
            pass
        return InForce(scheduling, cores, _status('VmLck') > 0, self.refused)

    def end(self) -> None:
        """Undo what concerns other threads; to be called when the thread has ended."""
        sys.setswitchinterval(self._switch_s)
        if self._others:
            _move(self._before, {self._thread_id}, self._others)
            self._others = set()
        if self._locked:
            _libc().munlockall()
            self._locked = False

    def _raise(self, priority: int) -> str:
        try:
            os.sched_setscheduler(self._thread_id, os.SCHED_FIFO, os.sched_param(priority))
        except OSError as error:
            limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
            return (f'realtime.priority {priority} is not in force ({error.strerror}; the limit '
                    f'rtprio is {limit}): {PERMIT_PRIORITY}')
        sys.setswitchinterval(SWITCH_S)
        return ''

    def _pin(self, cores: set[int]) -> str:
        try:
            os.sched_setaffinity(self._thread_id, cores)
            given = os.sched_getaffinity(self._thread_id)
        except (OSError, OverflowError):
            given = set()
        if given != cores:
            if given:
                os.sched_setaffinity(self._thread_id, self._before)
            return (f'realtime.cpu_affinity {sorted(cores)} is not in force: this process may '
                    f'use the cores {_list(self._before)}; name some of these, or permit more '
                    '(taskset, AllowedCPUs= in a systemd unit, docker run --cpuset-cpus)')
        self._others = self._before - cores
        if not self._others:
            return (f'realtime.cpu_affinity {sorted(cores)} leaves no core to the other threads: '
                    'they share those of the decode thread; name fewer cores')
        _move(self._others, {self._thread_id})
        return ''

    def _lock(self) -> str:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if limit != resource.RLIM_INFINITY and not _status('CapEff', 16) >> _CAP_IPC_LOCK & 1:
            # Under a limit, the first allocation that exceeds it would end the process later.
            return (f'realtime.lock_memory is not in force (the limit memlock is {limit} bytes, '
                    f'not unlimited): {PERMIT_MEMORY}')
        if _libc().mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
            return (f'realtime.lock_memory is not in force ({os.strerror(ctypes.get_errno())}): '
                    f'{PERMIT_MEMORY}')
        self._locked = True
        return ''


def follow(pid: int) -> None:
    """Take the class and the cores of another process's main thread; for a child of its own."""
    try:
        os.sched_setscheduler(0, os.sched_getscheduler(pid), os.sched_getparam(pid))
        os.sched_setaffinity(0, os.sched_getaffinity(pid))
    except OSError:                     # it has ended, or more is not permitted: then as it is
        pass


def _move(cores: set[int], spared: Collection[int], only: set[int] | None = None) -> None:
    """
    Move the threads of this process, and with them those that they start from now on.

    :param spared: threads that stay.
    :param only: moves those alone that have these cores.
    """
    done = set(spared)
    # A thread that was started meanwhile by one not yet moved is found in another round.
    while found := {int(each) for each in os.listdir(_TASKS)} - done:
        for thread_id in found:
            try:
                if only is None or os.sched_getaffinity(thread_id) == only:
                    os.sched_setaffinity(thread_id, cores)
            except ProcessLookupError:
                pass
        done |= found


def _status(name: str, base: int = 10) -> int:
    """Give one number of this process's status."""
    found = re.search(rf'^{name}:\s*([0-9a-f]+)', Path('/proc/self/status').read_text(), re.M)
    return int(found[1], base) if found else 0


def _list(cores: Collection[int]) -> str:
    return ', '.join(map(str, sorted(cores)))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
