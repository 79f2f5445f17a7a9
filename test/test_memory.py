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

"""A command ends with advice if memory is too small for its libraries to start."""

import os
import resource
from types import SimpleNamespace

from physai_decode.ros import memory
import pytest


def test_enough_memory():
    memory.check_shared_memory()
    memory.check_address_space()


def test_full_shared_memory(monkeypatch):
    monkeypatch.setattr(os, 'statvfs', lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(SystemExit, match=r'/dev/shm has 4096 bytes free.*--shm-size'):
        memory.check_shared_memory()


def test_no_shared_memory(monkeypatch):
    monkeypatch.setattr(memory, 'SHARED_MEMORY', '/no/such/folder')
    memory.check_shared_memory()


def test_a_small_address_space(monkeypatch):
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (10**9, resource.RLIM_INFINITY))
    with pytest.raises(SystemExit, match=r'limited to 1000000000 bytes.*ulimit -v unlimited'):
        memory.check_address_space()
