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

"""The process that launched this one: where it ends, an orphan is left, which ends too."""

import os
import select

VARIABLE = 'PHYSAI_DECODE_LAUNCHER'     # its value is the launcher's process id


class Parent:
    """
    Watches the launcher, of which our launch file tells the process id.

    A node that was started by hand has none and may outlive its shell, as under nohup. Watched is
    the launcher and not the parent, as a prefix such as xterm may stand between them; and by a
    file descriptor, which a new process of the same number does not deceive (Linux 5.3).
    """

    def __init__(self) -> None:
        """Watch the process that the environment names, where it names one."""
        self.gone = False
        self._poll = select.poll()
        given = os.environ.get(VARIABLE, '')
        if given.isdigit() and hasattr(os, 'pidfd_open'):
            try:
                self._poll.register(os.pidfd_open(int(given)), select.POLLIN)
            except ProcessLookupError:      # it ended while this process began
                self.gone = True
            except OSError:                 # the kernel can't
                pass

    def ended(self) -> bool:
        """Tell whether there was a launcher and it is there no longer."""
        self.gone = self.gone or bool(self._poll.poll(0))
        return self.gone
