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

"""The checks of shared memory and address space before ROS starts."""

import os
import resource
from types import SimpleNamespace

from physai_decode.ros import memory
import pytest


def test_accepts_enough_memory():
    memory.check_shared_memory()
    memory.check_address_space()


def test_exits_if_shared_memory_is_full(monkeypatch):
    monkeypatch.setattr(os, 'statvfs', lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(SystemExit, match=r'/dev/shm has 4096 bytes free.*--shm-size'):
        memory.check_shared_memory()


def test_accepts_a_system_without_shared_memory(monkeypatch):
    monkeypatch.setattr(memory, 'SHARED_MEMORY', '/no/such/folder')
    memory.check_shared_memory()


def test_exits_if_the_address_space_is_small(monkeypatch):
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (10**9, resource.RLIM_INFINITY))
    with pytest.raises(SystemExit, match=r'limited to 1000000000 bytes.*ulimit -v unlimited'):
        memory.check_address_space()
