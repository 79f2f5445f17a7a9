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
Kills the node's process if it does not react to a signal because native code holds the GIL.

Native code that never releases the GIL stops every Python thread, including the one that polls for
signals. A second process therefore runs this file as a script. The node keeps the signals
that end it blocked, so they stay pending, and the kernel shows them in ``/proc``.
"""

import os
import select
import subprocess
import sys

POLL_S = 0.1
ENDING = 1 << 0 | 1 << 1 | 1 << 14       # the bits of SIGHUP, SIGINT and SIGTERM
POLLS = 17                      # from the first sight of a signal to SIGKILL: 1.7 s


def start() -> 'subprocess.Popen[bytes]':
    """
    Start a watchdog for this process.

    The caller must have blocked the signals in all threads, and must leave them pending. Without
    ``/proc``, the watchdog exits at once and nothing watches the node.
    """
    # In its own session, Ctrl-C does not reach the watchdog. Its stdin closes when this process
    # ends.
    return subprocess.Popen(
        [sys.executable, '-I', '-S', __file__, str(os.getpid())], start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pending(status: bytes) -> bool:
    """Return whether a signal that ends the node is pending, by ``/proc/PID/status``."""
    return any(int(status.partition(name)[2].split(None, 1)[0], 16) & ENDING
               for name in (b'\nSigPnd:', b'\nShdPnd:'))


def watch(pid: int) -> None:
    """Poll until the parent process ends, and kill it if it ignores a signal."""
    file = os.open(f'/proc/{pid}/status', os.O_RDONLY)
    polls = 0                   # since a signal became pending, not counting a stopped process
    while not select.select([0], [], [], POLL_S)[0]:
        status = os.pread(file, 1 << 16, 0)
        if polls or pending(status):
            polls += b'\nState:\tT' not in status
        if polls > POLLS and os.getppid() == pid:
            os.kill(pid, 9)     # SIGKILL; the signal module is not imported, to start fast


if __name__ == '__main__':
    watch(int(sys.argv[1]))
