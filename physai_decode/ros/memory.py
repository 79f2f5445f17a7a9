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
Checks for memory shortages that would kill the process instead of raising an exception.

They have to run before the libraries are loaded. This module imports nothing of ROS, because the
import of rclpy alone writes to shared memory.
"""

import os
import resource

SHARED_MEMORY = '/dev/shm'
# rclpy needs 8 kB. Fast DDS uses about 650 kB, but logs a warning and works without them.
SHARED_MEMORY_BYTES = 2**16
# The smallest model maps 2.5 GB: PyTorch's libraries, and a stack and a heap per thread. Most of
# it is never used.
ADDRESS_SPACE_BYTES = 3 * 2**30


def check_shared_memory() -> None:
    """
    Check that shared memory has enough space for ROS to start.

    :raises SystemExit: it does not; the message says what to do.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:                 # there is no shared memory; the libraries work without it
        pass
    else:
        free = status.f_bavail * status.f_frsize
        if free < SHARED_MEMORY_BYTES:
            raise SystemExit(
                f'{SHARED_MEMORY} has {free} bytes free, but ROS needs {SHARED_MEMORY_BYTES} to '
                'start: delete files that ended processes left there, or enlarge it (mount -o '
                f'remount,size=64m {SHARED_MEMORY}; for a container, --shm-size=64m)')


def check_address_space() -> None:
    """
    Check that the address space is large enough for PyTorch to start.

    :raises SystemExit: it is not; the message says what to do.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_BYTES:
        raise SystemExit(
            f'the address space is limited to {limit} bytes, but a node needs '
            f'{ADDRESS_SPACE_BYTES} plus the size of its model: raise the limit (ulimit -v '
            'unlimited), and limit memory with a control group instead, such as MemoryMax= in a '
            'systemd unit')
