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

"""The process that launched the node; when it ends, the node ends too."""

import os
import select

VARIABLE = 'PHYSAI_DECODE_LAUNCHER'     # the process id of the launcher


class Launcher:
    """
    Watches the launcher, whose process id the launch file puts into the environment.

    A node that was started by hand has no launcher and may outlive its shell, as under nohup. The
    launcher need not be the parent process, because a prefix such as xterm may run in between.
    The class watches a pidfd (Linux 5.3), so a new process with the same id can't be mistaken for
    the launcher.
    """

    def __init__(self) -> None:
        """Watch the process that the environment names, if any."""
        self.gone = False
        self._poll = select.poll()
        given = os.environ.get(VARIABLE, '')
        if given.isdigit() and hasattr(os, 'pidfd_open'):
            try:
                self._poll.register(os.pidfd_open(int(given)), select.POLLIN)
            except ProcessLookupError:      # it ended while this process started
                self.gone = True
            except OSError:                 # the kernel has no pidfd
                pass

    def ended(self) -> bool:
        """Return whether there was a launcher that has ended."""
        self.gone = self.gone or bool(self._poll.poll(0))
        return self.gone
