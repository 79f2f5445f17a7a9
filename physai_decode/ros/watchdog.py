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
Ends the node's process where a signal asks for it and no Python code can run any more.

Native code that never releases the interpreter's lock stops every thread of Python in its process,
also those that wait for signals. So a second process, this file run as a script, looks on: the
node leaves SIGINT and SIGTERM blocked and pending, and the kernel shows them in ``/proc``.
"""

import os
import select
import subprocess
import sys

POLL_S = 0.1
POLLS = 17                      # from the one that sees a signal to SIGKILL: 1.7 s


def start() -> 'subprocess.Popen[bytes]':
    """
    Have this process watched until it ends.

    The caller has blocked the signals, in all threads, and never takes them off. Without
    ``/proc`` the watchdog ends at once, and the node is on its own.
    """
    # A session of its own: Ctrl-C in the terminal is not for it. Its standard input ends with us.
    return subprocess.Popen(
        [sys.executable, '-I', '-S', __file__, str(os.getpid())], start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pending(status: bytes) -> bool:
    """Tell whether a ``/proc/PID/status`` shows SIGINT (2) or SIGTERM (15) waiting."""
    return any(int(status.partition(name)[2].split(None, 1)[0], 16) & (1 << 1 | 1 << 14)
               for name in (b'\nSigPnd:', b'\nShdPnd:'))


def watch(pid: int) -> None:
    """Look on until the parent ends, or has to be killed."""
    file = os.open(f'/proc/{pid}/status', os.O_RDONLY)
    polls = 0                   # since a signal came, but for those that find it stopped
    while not select.select([0], [], [], POLL_S)[0]:
        status = os.pread(file, 1 << 16, 0)
        if polls or pending(status):
            polls += b'\nState:\tT' not in status
        if polls > POLLS and os.getppid() == pid:
            os.kill(pid, 9)     # SIGKILL, without a module for its name


if __name__ == '__main__':
    watch(int(sys.argv[1]))
