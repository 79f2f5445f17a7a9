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
Room without which libraries kill the process instead of raising, looked at before they are loaded.

It imports nothing of ROS: already the import of rclpy writes to shared memory.
"""

import os
import resource

SHARED_MEMORY = '/dev/shm'
# rclpy takes 8 kB; Fast DDS about 650 kB, but says so and goes on without where that is not free.
SHARED_MEMORY_BYTES = 2**16
# 2.5 GB with the smallest model: PyTorch's libraries, and each thread's stack and heap. Most of it
# is mapped and never used.
ADDRESS_SPACE_BYTES = 3 * 2**30


def check_shared_memory() -> None:
    """
    Look whether ROS can start.

    :raises SystemExit: it can't; the message says what to do.
    """
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:                 # no shared memory at all: the libraries do without
        pass
    else:
        free = found.f_bavail * found.f_frsize
        if free < SHARED_MEMORY_BYTES:
            raise SystemExit(
                f'{SHARED_MEMORY} has {free} bytes free, and ROS needs {SHARED_MEMORY_BYTES} to '
                'start: delete what ended processes left there, or make it larger (mount -o '
                f'remount,size=64m {SHARED_MEMORY}; of a container --shm-size=64m)')


def check_address_space() -> None:
    """
    Look whether PyTorch can start.

    :raises SystemExit: it can't; the message says what to do.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_BYTES:
        raise SystemExit(
            f'the address space is limited to {limit} bytes, and a node needs '
            f'{ADDRESS_SPACE_BYTES} and the size of its model: raise it (ulimit -v unlimited), '
            'and limit the memory with a control group, such as MemoryMax of systemd')
