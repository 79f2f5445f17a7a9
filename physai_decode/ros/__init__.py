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

"""The ROS side: the lifecycle node, its topics and parameters, and the commands that listen."""

import signal

from physai_decode.ros import memory

# The signals that end the node. A terminal sends SIGHUP when it closes; nohup ignores it.
SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    SIGNALS += signal.SIGHUP,

memory.check_shared_memory()
# numpy starts threads on import, as rclpy does. They have to block these signals too: otherwise
# the kernel delivers a signal that the main thread blocks to one of them, and it is lost.
_before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
try:
    import numpy as numpy
finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before)
